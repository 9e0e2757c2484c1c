"""Do tokens gather by meaning as depth goes on, beyond what the words themselves say?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from emformer import parts
from emformer.geometry import clusters
from emformer.intervals import LEVEL, Interval, bootstrap, over_models
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.studies.lines import BAND, band, draws, mean
from emformer.studies.subjects import Subject, Tell, part_of
from emformer.theory.outcome import Chart, Curves
from emformer.trajectory import Trajectory
from emformer.verdicts import Findings, Verdict

STREAM = 11  # sets these random numbers apart from those of prompts and other studies of the same seed
COLLAPSED = 0.9  # mean cosine from which a cloud counts as one direction: ours
LEAST = 0.001  # of a difference of AUC, or of AMI, that is one: ours
SAME = 10  # decimals up to which two cosines are one: equal states meet in products that round differently
SOURCE = "S0 clustering"
NEXT = "one word, next token"


@dataclass(frozen=True)
class Clusters(parts.Study):
    """Whether tokens that belong together come closer to each other than to others, layer by layer: math F, S0 "clustering".

    A token's identity already gives its class, so pairs are chosen with care. *Different words*: of two tokens with different ids
    in different prompts, are those of one class closer? *One word*: of two occurrences of one id in different prompts, are those
    with the same neighbour in the text, or the same contextual class (as the subject that is spoken about), closer? Closeness is
    the cosine of centred states, and what is told of a token is its AUC: the chance that a partner with its label is closer than
    a partner without, ties counting half. In [0, 1], 1/2 for states that ignore the label, whatever the sizes of classes. First
    tokens, whose context is empty, are left out.

    Controls: the embedding (where occurrences of one word are all alike unless positions tell them apart), the untrained twin,
    and labels shuffled (of words among words, of occurrences among those of the same word). Neighbours in the text tell a twin's
    states apart too, because it mixes context blindly. Beside it the agreement (AMI) of k-means with the first classification on
    one occurrence of each word, which is one number a model; and the mean cosine of a prompt, which the idealised flows drive
    to 1. Cost: about `points`^2 (d + 200) a state and model, a minute for the default.

    Args:
        points: tokens that are compared, drawn from all prompts; at least 16.
        shuffles: of the labels, at least 2.
    """

    name: ClassVar[str] = "clusters"
    title: ClassVar[str] = "do clusters by meaning emerge with depth, beyond the words themselves?"

    points: int = 2048
    shuffles: int = 16

    @classmethod
    def examples(cls) -> Sequence[Clusters]:
        return [cls(points=96, shuffles=4)]

    def __post_init__(self) -> None:
        for name, least in (("points", 16), ("shuffles", 2)):
            if getattr(self, name) < least:
                raise UserError(f"clusters: {name} is {getattr(self, name)}; choose at least {least}.")

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        if subjects[0].tokens.shape[1] < 3:
            raise UserError("clusters: prompts of fewer than three tokens have no context to compare; choose a larger --length.")
        looks = []
        for k, subject in enumerate(subjects):
            part = part_of(tell, k / len(subjects), (k + 1) / len(subjects))
            looks.append(_look(subject, self.points, self.shuffles, part))
        questions = [name for name in looks[0].trained if all(name in one.trained for one in looks)]
        groups = [subject.groups.numpy() for subject in subjects]
        seed = subjects[0].seed
        verdicts = [verdict for name in questions for verdict in _judged(name, looks, groups, seed)]
        verdicts += _deepening(looks, groups, seed)
        verdicts += _clustered(looks, seed) + _collapsed(looks, groups, seed)
        known = (
            ""
            if subjects[0].labels is not None
            else " This text knows no classes of its words: only their neighbours are compared."
        )
        note = (
            "AUC: the chance that a token's partner with its label is closer to it than a partner without; 1/2 is chance. "
            "Intervals draw prompts, with their tokens as anchors and as partners; the words are those of the text." + known
        )
        return Findings(verdicts, _charts(looks, [subject.name for subject in subjects], groups), note)


class Question(NamedTuple):
    """What pairs are compared, and by which label: `same` one word's occurrences, or different words."""

    name: str
    label: np.ndarray  # (n,), -1 for none
    same: bool


class Points(NamedTuple):
    """Tokens that are compared, the same at every layer: places in the prompts (n,), ids, prompts, groups of prompts."""

    place: np.ndarray
    token: np.ndarray
    prompt: np.ndarray
    group: np.ndarray


class Look(NamedTuple):
    """Of one model: AUC (P, L + 1) by question, prompts as rows, of the trained model and its twin; AUC of shuffled labels
    (shuffles, 2), at the embedding and at the last layer, by question; AMI (L + 1,), none without classes; mean cosines
    (P, L + 1)."""

    trained: dict[str, np.ndarray]
    untrained: dict[str, np.ndarray]
    shuffled: dict[str, np.ndarray]
    ami: np.ndarray
    cosine: np.ndarray
    twin: np.ndarray


class Separation(NamedTuple):
    """`auc` (n,) of each row as an anchor; `pull` (n,): the derivative of the sum of all AUCs by a row's weight as a partner."""

    auc: np.ndarray
    pull: np.ndarray


def separation(states: Tensor, label: np.ndarray, eligible: np.ndarray) -> Separation:
    """AUC of each row of states (n, d) as an anchor: P(cos to an eligible partner with its label > cos to one without) + ties/2.

    In [0, 1], null 1/2; nan for a row without a label, or without partners of both kinds. Cosines are of the rows as given, equal
    up to 1e-10. The derivative of an anchor's AUC A by the weight of a partner is (v - A)/m, with v the share of the other kind
    that is farther (of a partner with the label) or of the labelled that are closer (of one without), and m how many partners are
    of its kind. Cost n^2 (d + log n). Source: math F; Mann and Whitney 1947; DeLong, DeLong and Clarke-Pearson 1988.

    Args:
        label: (n,), below 0 for none; such rows are no partners either.
        eligible: (n, n), which pairs are compared.
    """
    known, same = _partners(label, eligible)
    other, order = known & ~same, _Order(_cosines(states))
    positive, negative = same.sum(1, keepdims=True), other.sum(1, keepdims=True)
    defined = (positive > 0) & (negative > 0)
    positive, negative = np.maximum(positive, 1), np.maximum(negative, 1)
    wins = np.where(same, order.below(other) / negative, 1 - order.below(same) / positive)
    auc = np.where(same, wins, 0.0).sum(1, keepdims=True) / positive
    pull = np.where(known & defined, (wins - auc) / np.where(same, positive, negative), 0.0).sum(0)
    return Separation(np.where(defined, auc, np.nan)[:, 0], pull)


def by_prompt(found: Separation, prompt: np.ndarray, count: int) -> np.ndarray:
    """(P,) values of which the mean is the mean AUC of all anchors, and the spread that which it has over draws of prompts.

    A prompt's tokens are anchors, and partners of all others. Its value is the mean AUC plus P times its derivative by the weight
    of the prompt in all three places (the infinitesimal jackknife); means of AUCs by prompt have the first place alone.
    nan where no anchor has an AUC.
    """
    known = ~np.isnan(found.auc)
    middle = float(mean(found.auc))
    added = np.where(known, found.auc - middle, 0.0) + found.pull
    return middle + count / max(known.sum(), 1) * np.bincount(prompt, added, minlength=count)


def _partners(label: np.ndarray, eligible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(partners with a label of an anchor with one, those with the same one), (n, n)."""
    there = label >= 0
    known = eligible & there & there[:, None]
    return known, known & (label == label[:, None])


def _cosines(states: Tensor) -> np.ndarray:
    directions = clusters.unit(states).cloud.nan_to_num(0.0)
    return np.round((directions @ directions.mT).cpu().numpy(), SAME)


class _Order:
    """The order within each row of values (n, n), and where runs of equal ones start."""

    def __init__(self, values: np.ndarray):
        self.order = values.argsort(1)
        ascending = np.take_along_axis(values, self.order, 1)
        edge = np.ones(values.shape, bool)
        edge[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
        self.bounds = np.append(np.flatnonzero(edge), edge.size)

    def below(self, some: np.ndarray) -> np.ndarray:
        """(n, n): how many of `some` (n, n) are below each value in its row, equal ones counting half."""
        inside = np.take_along_axis(some, self.order, 1)
        total = np.concatenate([[0], inside.ravel().cumsum()])
        middle = (total[self.bounds[:-1]] + total[self.bounds[1:]]) / 2
        found = np.empty(some.shape)
        counted = np.repeat(middle, np.diff(self.bounds)).reshape(some.shape) - total[: -1 : some.shape[1], None]
        np.put_along_axis(found, self.order, counted, 1)
        return found


# ----------------------------------------------------------------------------------------------------------------------


def _look(subject: Subject, points: int, shuffles: int, tell: Tell) -> Look:
    chosen = _chosen(subject, points)
    questions = _questions(subject, chosen)
    random = np.random.default_rng((STREAM, subject.seed))
    apart = chosen.group != chosen.group[:, None]
    alike = chosen.token == chosen.token[:, None]
    found = []
    for k, (model, word) in enumerate(((None, subject.name), (subject.untrained(), "untrained"))):
        tell(0.5 * k, word)
        states, cosine = _states(subject, model, chosen)
        auc: dict[str, list[np.ndarray]] = {one.name: [] for one in questions}
        for layer, state in enumerate(states):
            directions = clusters.centred(state)
            for one in questions:
                each = _answers(directions, one, chosen, apart, alike)
                auc[one.name].append(by_prompt(each, chosen.prompt, len(subject.tokens)))
            tell(0.5 * k + 0.45 * (layer + 1) / len(states), f"{word}, layer {layer}")
        found.append(({name: np.stack(values, 1) for name, values in auc.items()}, states, cosine))
    (trained, states, cosine), (untrained, _, twin) = found
    ends, ami = [states[0], states[-1]], np.empty(0)
    shuffled = {one.name: _shuffled(ends, one, chosen, apart, alike, shuffles, random) for one in questions}
    if subject.labels is not None:
        classes = subject.labels[0].flatten().cpu().numpy()[chosen.place]
        ami = np.array([_agreement(state, classes, chosen.token, subject.seed) for state in states])
    tell(1.0, subject.name)
    return Look(trained, untrained, shuffled, ami, cosine, twin)


def _chosen(subject: Subject, points: int) -> Points:
    """Tokens at random from all prompts, but for first ones."""
    count, length = subject.tokens.shape
    places = np.arange(count * length).reshape(count, length)[:, 1:].ravel()
    random = np.random.default_rng((STREAM, subject.seed, 1))
    place = np.sort(random.choice(places, min(points, len(places)), replace=False))
    prompt = place // length
    return Points(place, subject.tokens.flatten().cpu().numpy()[place], prompt, subject.groups.cpu().numpy()[prompt])


def _questions(subject: Subject, chosen: Points) -> list[Question]:
    """By the first classification between different words; by the others, and by the neighbours in the text, between occurrences
    of one word."""
    ids = subject.tokens.cpu().numpy()
    before, after = np.full_like(ids, -1), np.full_like(ids, -1)
    before[:, 1:], after[:, :-1] = ids[:, :-1], ids[:, 1:]
    found = []
    if subject.labels is not None:
        for k, name in enumerate(subject.classes):
            label = subject.labels[k].cpu().numpy().ravel()[chosen.place]
            found.append(Question(f"different words, {name}", label, False))
            if k:
                found.append(Question(f"one word, {name}", label, True))
    found.append(Question(NEXT, after.ravel()[chosen.place], True))
    found.append(Question("one word, previous token", before.ravel()[chosen.place], True))
    return found


def _states(subject: Subject, model: Emformer | None, chosen: Points) -> tuple[list[Tensor], np.ndarray]:
    """The chosen tokens' states (n, d) by layer, the embedding first, and mean cosines of prompts (P, L + 1)."""
    rows: list[list[Tensor]] = []
    cosine: list[np.ndarray] = []
    for trajectory in subject.trajectories(model):
        clouds = list(_ends(trajectory))
        rows.append([x.flatten(0, 1) for x in clouds])
        cosine.append(np.stack([clusters.mean_cosine(x[:, 1:]).mean.cpu().numpy() for x in clouds], 1))
    place = torch.from_numpy(chosen.place).to(rows[0][0].device)
    return [torch.cat(layer)[place] for layer in zip(*rows, strict=True)], np.concatenate(cosine)


def _ends(trajectory: Trajectory) -> Iterator[Tensor]:
    """X^0, and what every layer left."""
    steps = trajectory.steps
    yield steps[0].before
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if following is None or following.layer != step.layer:
            yield step.after


def _answers(directions: Tensor, one: Question, chosen: Points, apart: np.ndarray, alike: np.ndarray) -> Separation:
    """`separation` of every chosen token."""
    if not one.same:
        return separation(directions, one.label, apart & ~alike)
    found = Separation(np.full(len(chosen.token), np.nan), np.zeros(len(chosen.token)))
    for rows in _occurrences(chosen.token):
        some = separation(directions[torch.from_numpy(rows)], one.label[rows], apart[np.ix_(rows, rows)])
        found.auc[rows], found.pull[rows] = some
    return found


def _occurrences(token: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of one id, of every id that occurs three times: a partner with the label, and one without."""
    for one in np.unique(token):
        rows = np.flatnonzero(token == one)
        if len(rows) > 2:
            yield rows


def _shuffled(
    states: Sequence[Tensor],
    one: Question,
    chosen: Points,
    apart: np.ndarray,
    alike: np.ndarray,
    shuffles: int,
    random: np.random.Generator,
) -> np.ndarray:
    """Mean AUC over anchors (shuffles, states), of labels that were permuted: a word's among words, an occurrence's among its
    word's. One permutation for all states."""
    there = one.label >= 0
    labels = []
    for _ in range(shuffles):
        label = one.label.copy()
        if one.same:
            for rows in _occurrences(chosen.token):
                label[rows] = random.permutation(label[rows])
        elif there.any():
            names, first, where = np.unique(chosen.token[there], return_index=True, return_inverse=True)
            label[there] = one.label[there][first][random.permutation(len(names))][where]
        labels.append(label)
    found = np.full((shuffles, len(states)), np.nan)
    for column, state in enumerate(states):
        directions = clusters.centred(state)
        if one.same:
            each = [_answers(directions, one._replace(label=label), chosen, apart, alike).auc for label in labels]
        else:
            known = _partners(one.label, apart & ~alike)[0]  # which no permutation changes
            below = _Order(_cosines(directions)).below(known)
            each = [_auc(below, known & (label == label[:, None]), known) for label in labels]
        found[:, column] = [mean(values) for values in each]
    return found


def _auc(below: np.ndarray, same: np.ndarray, known: np.ndarray) -> np.ndarray:
    """AUC of each row from how many known ones are below: those of the same label have P^2/2 of them among themselves."""
    positive = same.sum(1).astype(float)
    negative = known.sum(1) - positive
    pairs = np.where(positive * negative > 0, positive * negative, np.nan)
    return (np.where(same, below, 0.0).sum(1) - positive**2 / 2) / pairs


def _agreement(state: Tensor, classes: np.ndarray, token: np.ndarray, seed: int) -> float:
    """AMI of k-means with the classes, of one occurrence of every word; nan for fewer than two classes."""
    rows = np.flatnonzero(classes >= 0)
    rows = rows[np.unique(token[rows], return_index=True)[1]]
    k = len(np.unique(classes[rows]))
    if k < 2:
        return float("nan")
    fit = clusters.kmeans(clusters.unit(clusters.centred(state[torch.from_numpy(rows)])).cloud, k, seed, starts=2)
    return clusters.persistence(fit.labels, torch.from_numpy(classes[rows]), ["ami"]).ami


# ----------------------------------------------------------------------------------------------------------------------


def _judged(name: str, looks: Sequence[Look], groups: Sequence[np.ndarray], seed: int) -> list[Verdict]:
    """Of different words: nearer at the end than in the embedding, and than by chance. Of one word: nearer than in the twin."""
    pairs, label = name.split(", ")
    trained, untrained = ([getattr(one, kind)[name] for one in looks] for kind in ("trained", "untrained"))
    if pairs == "one word":
        beyond = [auc[:, -1] - twin[:, -1] for auc, twin in zip(trained, untrained, strict=True)]
        claim = f"occurrences of one word with the same {label} gather at the last layer"
        quantity = "AUC at the last layer - the untrained twin's"
        null = float(np.mean([mean(one.shuffled[name][:, 1]) for one in looks])) - 0.5
        interval = over_models(beyond, groups=groups, seed=seed)
        against = "shuffled labels, less 1/2"
        return [Verdict(claim, SOURCE, quantity, interval, least=LEAST, null=null, against=against, why=draws(len(looks)))]
    gain = over_models([auc[:, -1] - auc[:, 0] for auc in trained], groups=groups, seed=seed)
    last = [mean(one.shuffled[name][:, 1]) for one in looks]
    above = over_models([auc[:, -1] - null for auc, null in zip(trained, last, strict=True)], groups=groups, seed=seed)
    twin = float(np.mean([mean(auc[:, -1] - auc[:, 0]) for auc in untrained]))
    why = f"the interval is widened by the spread of shuffled labels, whose AUC is {np.mean(last):.3f}"
    found = [
        Verdict(
            f"different words of one {label} gather with depth",
            SOURCE,
            "AUC at the last layer - AUC of the embedding",
            _widened(gain, [one.shuffled[name][:, 1] - one.shuffled[name][:, 0] for one in looks]),
            least=LEAST,
            null=twin,
            against="the untrained twin's change",
            why=why,
        ),
        Verdict(
            f"at the last layer different words of one {label} are closer than words of others",
            SOURCE,
            "AUC at the last layer - AUC of shuffled labels",
            _widened(above, [one.shuffled[name][:, 1] for one in looks]),
            least=LEAST,
            null=0.0,
            against="labels shuffled among words",
            why=why,
        ),
    ]
    return found if name == next(iter(looks[0].trained)) else found[:1]


def _deepening(looks: Sequence[Look], groups: Sequence[np.ndarray], seed: int) -> list[Verdict]:
    """Whether more than one layer does it."""
    later = [one.trained[NEXT][:, -1] - one.trained[NEXT][:, 1] for one in looks]
    if any(one.trained[NEXT].shape[1] < 3 for one in looks):
        return []
    twin = float(np.mean([mean(one.untrained[NEXT][:, -1] - one.untrained[NEXT][:, 1]) for one in looks]))
    claim = "occurrences of one word with the same next token go on gathering after the first layer"
    interval = over_models(later, groups=groups, seed=seed)
    quantity = "AUC at the last layer - AUC after the first"
    return [Verdict(claim, SOURCE, quantity, interval, least=LEAST, null=twin, against="the untrained twin's change")]


def _widened(interval: Interval, shuffled: Sequence[np.ndarray]) -> Interval:
    """The interval with the chance of the words added: of few words, labels without meaning are off 1/2 by so much."""
    spread = float(np.mean([values.std(ddof=1) for values in shuffled])) * stats.t.ppf(1 - LEVEL / 2, len(shuffled[0]) - 1)
    low = interval.value - np.hypot(interval.value - interval.low, spread)
    return interval._replace(low=float(low), high=float(interval.value + np.hypot(interval.high - interval.value, spread)))


def _clustered(looks: Sequence[Look], seed: int) -> list[Verdict]:
    """One clustering a model, so that models alone are units."""
    if not all(len(one.ami) for one in looks):
        return []
    interval = bootstrap(np.array([one.ami[-1] - one.ami[0] for one in looks]), of="models", seed=seed)
    claim = "k-means finds the classes of words better at the last layer than in the embedding"
    quantity = "AMI of the clusters of one occurrence of each word, last layer - embedding"
    return [Verdict(claim, SOURCE, quantity, interval, least=LEAST, null=0.0, against="clusters that ignore depth")]


def _collapsed(looks: Sequence[Look], groups: Sequence[np.ndarray], seed: int) -> list[Verdict]:
    interval: Interval = over_models([one.cosine[:, -1] for one in looks], groups=groups, seed=seed)
    twin = float(np.mean([mean(one.twin[:, -1]) for one in looks]))
    claim = "the tokens of a prompt collapse to one direction, as in the idealised flow"
    quantity = "mean cosine between the tokens of a prompt at the last layer"
    why = f"that {COLLAPSED} is one direction is ours"
    source, against = "S0 clustering, math E.1", "the untrained twin"
    return [Verdict(claim, source, quantity, interval, least=COLLAPSED, null=twin, against=against, why=why)]


def _charts(looks: Sequence[Look], names: Sequence[str], groups: Sequence[np.ndarray]) -> dict[str, Chart]:
    rows = [
        row
        for name, look, group in zip(names, looks, groups, strict=True)
        for line, values in ((name, look.trained), (f"untrained {name}", look.untrained))
        for question, auc in values.items()
        for row in band(question, line, auc, group)
    ]
    rows += [
        (question, "theory 1/2", layer, 0.5, math.nan, math.nan)
        for question, auc in looks[0].trained.items()
        for layer in (0, auc.shape[1] - 1)
    ]
    caption = "Chance that a token's partner with its label is closer than one without, by layer; 0 is the embedding."
    found: dict[str, Chart] = {"closer": _curves(rows, caption, "AUC")}
    rows = [
        row
        for name, look, group in zip(names, looks, groups, strict=True)
        for line, values in ((name, look.cosine), (f"untrained {name}", look.twin))
        for row in band("mean cosine", line, values, group)
    ]
    found["collapse"] = _curves(
        rows, "Mean cosine between the tokens of a prompt, first tokens left out, by layer.", "mean cosine"
    )
    rows = [
        ("k-means and classes", name, layer, column, math.nan, math.nan)
        for name, look in zip(names, looks, strict=True)
        for layer, column in enumerate(look.ami)
    ]
    if rows:
        caption = "Agreement of k-means with the classes of words, on one occurrence of each word, by layer; 0 is chance."
        found["agreement"] = _curves(rows, caption, "AMI")
    return found


def _curves(rows: Sequence[tuple[str, str, int, float, float, float]], caption: str, y: str) -> Curves:
    return Curves(pd.DataFrame(rows, columns=BAND), caption, "layer", y)
