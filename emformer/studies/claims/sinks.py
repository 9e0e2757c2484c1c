"""Are attention sinks constant affine biases?"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from emformer import parts, surgery
from emformer.geometry import sinks
from emformer.intervals import Interval, Statistic, first, over_models
from emformer.model import Emformer
from emformer.observables.sinks import contents, see
from emformer.parts import UserError
from emformer.studies.lines import averaged, draws, mean, points, unlike
from emformer.studies.losses import by_token, task
from emformer.studies.subjects import AT_ONCE, Subject, Tell, part_of
from emformer.theory.outcome import Chart, Curves
from emformer.training.objectives import IGNORE
from emformer.trajectory import Trajectory, capture
from emformer.verdicts import Findings, Verdict

SAME = 32  # prompts that are given one first token
IDENTITY = 1e-6  # of a cosine, math J 25
CONSTANT = 0.99  # cosine of vectors that are called the same; S2 tells .994
MORE = 0.01  # a difference of cosines, or of shares of heads, that is one
COST = 1e-4  # nats a token: a difference of losses that is one
VALVE = 0.1  # of its mean: a weight that varies by more is no constant; ours, as SLIGHT is
SLIGHT = 0.1  # of what removal costs: what costs less costs next to nothing
OURS = "{} is a threshold of ours: S2 gives none"


@dataclass(frozen=True)
class Sinks(parts.Study):
    """D_i = (1 - lam_i) F m_i^rest + lam_i F y_1: is lam large, is F y_1 a constant, and is it as a constant that it serves?
    math H.2, S2 7 and 9.2; Gu et al. 2024, "When attention sink emerges in language models" (2410.10781).

    A head is a sink head if token 1 is a sink, alpha_1 > `threshold`, in more than the share `heads` of one half of the prompts.
    What is claimed of sinks is measured on these heads and on the other half, which shares no text with the first; of models that
    have none it is undecided, and charts show all heads.

    F y_1 of two contexts is compared where their first tokens differ, a prompt for every token. Prompts with the same one have a
    cosine of 1 in any causal model, trained or not, because token 1 sees itself alone: that is a test of causality, which is done
    too, and no evidence. The same cosine of the later position `control`, of tokens that differ, stands beside it; all raw and
    with the mean of F y_j over the other positions removed. F y is effective, the norm's bias left out.

    Ablations of the sink heads, all at once: token 1 hidden from all queries and the rest renormalised; its content replaced by
    0, or by its mean over the half of the prompts that chose them, under the same weights. The same is done to the token at
    `control`. What is told is the change of the model's own loss, over the queries that see both. Contents can be replaced where
    weights sum to one, tokens hidden where rows are computed by themselves.

    Cost: about seven passes over the prompts with loss, four without.

    Args:
        threshold: alpha above which a token is a sink, in (0, 1).
        heads: share of prompts, in (0, 1), in which token 1 must be one.
        control: position, from 1, of the token that the first is held against; at least 2.
    """

    threshold: float = 0.3
    heads: float = 0.5
    control: int = 5

    name: ClassVar[str] = "sinks"
    title: ClassVar[str] = "are attention sinks constant affine biases?"
    prompts: ClassVar[int] = 192

    def __post_init__(self) -> None:
        for word, value in (("threshold", self.threshold), ("heads", self.heads)):
            if not 0 < value < 1:
                raise UserError(f"sinks: {word} is {value}; choose a number between 0 and 1.")
        if self.control < 2:
            raise UserError(f"sinks: control is {self.control}; choose a position from 2 on, as 5.")

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        for one in subjects:
            if one.tokens.shape[1] < self.control + 2:
                raise UserError(
                    f"sinks: {one.name} is shown prompts of {one.tokens.shape[1]} tokens; a control at position {self.control} "
                    f"takes {self.control + 2}: choose a larger --length."
                )
        found = []
        for k, subject in enumerate(subjects):
            inner = part_of(tell, k / len(subjects), (k + 1) / len(subjects))
            chooser, judge = halved(subject)
            some = look(chooser, subject.model, self).chosen(self.heads)
            inner(0.1, f"{subject.name}, sink heads")
            own = look(judge, subject.model, self)
            inner(0.2, subject.name)
            twin = look(judge, subject.untrained(), self)
            inner(0.3, f"{subject.name}, untrained")
            last = part_of(inner, 0.3, 1.0)
            loss = effects(judge, chooser, own.by_layer(some), self.control, last) if len(some) else NO_HEADS
            found.append(One(judge, own, twin, some, loss))
            inner(1.0, subject.name)
        return Findings(_verdicts(found, self), _charts(found, self), _note(found, self))


def halved(subject: Subject) -> tuple[Subject, Subject]:
    """The subject with every other text, and with the rest of them.

    Raises:
        UserError: where all prompts share one text.
    """
    _, text = np.unique(subject.groups.numpy(), return_inverse=True)
    if text.max() < 1:
        raise UserError(f"sinks: the prompts of {subject.name} share one text; heads are chosen on one and judged on another.")

    def part(half: int) -> Subject:
        some = torch.from_numpy(np.flatnonzero(text % 2 == half))
        labels = None if subject.labels is None else subject.labels[:, some]
        return replace(subject, tokens=subject.tokens[some], labels=labels, groups=subject.groups[some])

    return part(0), part(1)


# What token 1 gives ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Looked:
    """Of one model, P prompts and the N heads of all its layers: see `look`.

    Attributes:
        layer, head: (N,).
        rate, alpha, later: (P, N) whether token 1 is a sink, its mean weight, and that of the control.
        share, drain, variation: (P, N) |lam F y_1|/|D|, |F y_1|/median |F y_j|, and sd/mean of lam over the queries.
        even: (2, N) rate and alpha of uniform weights.
        pulse: (pairs, 2, N) of pairs of prompts, see `_pulse`.
        cosines: "different" and "control" (pairs, 2, N) of F y, raw and centred, of token 1 and of the control in prompts that
            begin differently; "same" of token 1 in two contexts that begin with one token.
    """

    layer: np.ndarray
    head: np.ndarray
    rate: np.ndarray
    alpha: np.ndarray
    later: np.ndarray
    share: np.ndarray
    drain: np.ndarray
    variation: np.ndarray
    even: np.ndarray
    pulse: np.ndarray
    cosines: dict[str, np.ndarray]

    def chosen(self, share: float) -> np.ndarray:
        """Indices of the sink heads; none of weights that may be negative."""
        return np.flatnonzero(self.rate.mean(0) > share)

    def by_layer(self, some: np.ndarray) -> dict[int, tuple[int, ...]]:
        """These heads of each layer that has any."""
        at = list(zip(self.layer[some].tolist(), self.head[some].tolist(), strict=True))
        return {layer: tuple(head for k, head in at if k == layer) for layer in sorted({k for k, _ in at})}


@torch.no_grad()
def look(subject: Subject, model: Emformer, setting: Sinks) -> Looked:
    """What the heads of a model do with token 1, on a subject's prompts. Cost: two passes, and H N (N + d) a prompt and layer."""
    lots: list[dict[str, Tensor]] = []
    layer: list[int] = []
    for trajectory in subject.trajectories(model):
        each = [_heads(trajectory, k, setting) for k in trajectory.attentions]
        lots.append({name: torch.cat([one[name] for one in each], 1) for name in each[0]})
        layer = [trajectory.steps[k].layer for k, one in zip(trajectory.attentions, each, strict=True) for _ in one["alpha"][0]]
    found = {name: torch.cat([lot[name] for lot in lots]) for name in lots[0]}
    mean = found["total"].sum(0) / (found["alpha"].shape[0] * (subject.tokens.shape[1] - 1))
    begin, later = (subject.tokens[:, k].tolist() for k in (0, setting.control - 1))
    chosen = pairs(begin, later, subject.groups.tolist())
    alone = np.sort(np.unique(subject.groups.numpy(), return_index=True)[1])  # one prompt of each text
    same = _same_first(subject.tokens[torch.from_numpy(alone)], model)
    heads = np.array(layer)
    return Looked(
        heads,
        np.array([k - layer.index(one) for k, one in enumerate(layer)]),
        *(found[name].numpy() for name in ("rate", "alpha", "later", "share", "drain", "variation")),
        found["even"][0].T.numpy(),
        _pulse(found["lam"].numpy()[alone]),
        {
            "different": _cosines(found["first"], mean, chosen),
            "control": _cosines(found["control"], mean, chosen),
            "same": _cosines(same, mean, [(k, k + 1) for k in range(0, len(same) - 1, 2)]),
        },
    )


def _heads(trajectory: Trajectory, k: int, setting: Sinks) -> dict[str, Tensor]:
    """Of the heads of one attention step, (B, H …) each."""
    kernel = trajectory.block(k).attention.kernel
    given = _given(trajectory, k)
    seen = see(trajectory, k, given, divided=not kernel.normalised and not kernel.signed)
    alpha, even = (mass / seen.queries for mass in (seen.mass, seen.even))
    rate, fair = (sinks.sink_rate_of(one, 1, setting.threshold) for one in (alpha, even))
    lam = sinks.sink_mass_of(seen.first, seen.chooses)
    weights = {
        "rate": rate,
        "alpha": alpha[..., 0],
        "later": alpha[..., setting.control - 1],
        "share": seen.share.where(seen.chooses, torch.nan).nanmean(-1),
        "variation": lam.variation,
        "lam": lam.mass,
    }
    if kernel.signed:  # a mean of weights that may be negative is no amount of attention
        weights = {name: torch.full_like(value, torch.nan) for name, value in weights.items()}
    whole = {
        "even": torch.stack([fair, even[0]]).expand(*rate.shape, 2),
        "drain": sinks.value_ratio(given),
        "first": given[:, :, 0],
        "control": given[:, :, setting.control - 1],
        "total": given[:, :, 1:].sum(2),
    }
    return {name: value.cpu() for name, value in (weights | whole).items()}


def _given(trajectory: Trajectory, k: int) -> Tensor:
    """F y (B, H, T, d), in a basis of its own for each head: layers may write to fewer dimensions, the others are 0."""
    given = contents(trajectory, k)
    return functional.pad(given, (0, trajectory.steps[k].before.shape[-1] - given.shape[-1]))


def pairs(ids: Sequence[int], later: Sequence[int], groups: Sequence[int]) -> list[tuple[int, int]]:
    """Disjoint pairs of prompts, every first token once, of prompts that share text one; the tokens `later` of a pair differ too.

    In a causal model F y_1 is a function of the first token alone: prompts that begin alike are one observation.
    """
    tokens, texts, free = set[int](), set[int](), list[int]()
    for place, (token, group) in enumerate(zip(ids, groups, strict=True)):
        if token not in tokens and group not in texts:
            tokens.add(token)
            texts.add(group)
            free.append(place)
    found = []
    while len(free) > 1:
        one = free.pop(0)
        other = next((place for place in free if later[place] != later[one]), None)
        if other is not None:
            free.remove(other)
            found.append((one, other))
    return found


def _cosines(values: Tensor, mean: Tensor, chosen: Sequence[tuple[int, int]]) -> np.ndarray:
    """Raw and centred cosines (pairs, 2, N) of vectors (P, N, d), `mean` (N, d)."""
    if not chosen:
        return np.empty((0, 2, values.shape[1]))
    both = torch.stack([values[[pair[k] for pair in chosen]] for k in (0, 1)])
    removed = mean.expand_as(both[0]).flatten(0, 1)
    found = [sinks.value_cosine(both.flatten(1, 2), each).view(both.shape[1:3]) for each in (None, removed)]
    return torch.stack(found, 1).numpy()


def _same_first(tokens: Tensor, model: Emformer) -> Tensor:
    """F y_1 (P', N, d) in contexts that all begin with the token that most of the prompts (P, T) begin with."""
    begin = Counter(tokens[:, 0].tolist()).most_common(1)[0][0]
    tokens = tokens[:SAME].clone()
    tokens[:, 0] = begin
    found = []
    for start in range(0, len(tokens), AT_ONCE):
        trajectory = capture(model, tokens[start : start + AT_ONCE])
        found.append(torch.cat([_given(trajectory, k)[:, :, 0].cpu() for k in trajectory.attentions], 1))
    return torch.cat(found)


def _pulse(lam: np.ndarray) -> np.ndarray:
    """(P/2, 2, N) of lam (P, N, T): half the variance of lam_i - lam_i' over the queries of two prompts, and their mean lam.

    The difference does without what position alone explains, its variance without what the first tokens explain.
    """
    lam = lam[..., np.isfinite(lam).any((0, 1))]
    a, b = lam[0 : len(lam) - 1 : 2], lam[1::2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # heads without a choice are undefined
        return np.stack([np.nanvar(a - b, -1, ddof=1) / 2, (np.nanmean(a, -1) + np.nanmean(b, -1)) / 2], 1)


# What it costs to take it away ----------------------------------------------------------------------------------------

Edit = Literal["hidden", "zero", "mean"]
EDITS: tuple[Edit, ...] = ("hidden", "zero", "mean")


class Effects(NamedTuple):
    """Change of the loss: `change`[edit, token] (P, T) in nats, token "first" or "control", nan where no target counts; or `why`
    there is none of an edit."""

    change: dict[tuple[Edit, str], np.ndarray]
    why: dict[Edit, str]


NO_HEADS = Effects({}, dict.fromkeys(EDITS, "token 1 is a sink of no head"))


@torch.no_grad()
def effects(subject: Subject, others: Subject, heads: Mapping[int, tuple[int, ...]], control: int, tell: Tell) -> Effects:
    """What the loss does when token 1, or the one at `control`, is edited in these heads of these layers.

    A mean is that of the prompts of `others`: of its own, a token would be part.
    """
    model = subject.model
    try:
        inputs, targets = task(subject)
        elsewhere = task(others).inputs
    except UserError as error:
        return Effects({}, dict.fromkeys(EDITS, f"no loss: {error}"))
    targets = targets.masked_fill(~_sees_both(model, heads, control, inputs.shape[1]).to(targets.device), IGNORE)
    why = _impossible(model, heads, elsewhere, targets)
    possible = [edit for edit in EDITS if edit not in why]
    whole = by_token(model, inputs, targets) if possible else np.empty(0)
    change = {}
    for k, edit in enumerate(possible):
        how = edit if edit != "mean" else surgery.means(model, elsewhere.split(AT_ONCE))
        for token, position in (("first", 0), ("control", control - 1)):
            change[edit, token] = by_token(_cut(model, heads, how, position), inputs, targets) - whole
        tell((k + 1) / len(possible), f"{subject.name}: {edit}")
    return Effects(change, why)


def _sees_both(model: Emformer, heads: Mapping[int, tuple[int, ...]], control: int, tokens: int) -> Tensor:
    """(T,): the queries, neither of the two themselves, that see both in all of these layers."""
    i = torch.arange(tokens)
    both = (i != 0) & (i != control - 1)
    for layer in heads:
        mask = model.layer(layer).attention.mask
        both &= mask.visible(i, torch.zeros_like(i)) & mask.visible(i, torch.full_like(i, control - 1))
    return both


def _impossible(model: Emformer, heads: Mapping[int, tuple[int, ...]], others: Tensor, targets: Tensor) -> dict[Edit, str]:
    """Edits that cannot be made, and why; a mean is one over `others`."""
    if not (targets != IGNORE).any():
        return dict.fromkeys(EDITS, "no query that predicts anything sees both tokens under this mask")
    kernels = [model.layer(layer).attention.kernel for layer in heads]
    found = {}
    if not all(kernel.rowwise for kernel in kernels):
        found["hidden"] = "the kernel balances columns too: no token can be hidden from it"
    if not all(kernel.normalised for kernel in kernels):
        found |= dict.fromkeys(EDITS[1:], "the kernel's rows do not sum to one: what they lack is not the sink's alone")
    elif len(set(others[:, 0].tolist())) < 6:
        found["mean"] = "the prompts have too few first tokens: the mean of what one token gives is that token"
    return found


def _cut(
    model: Emformer, heads: Mapping[int, tuple[int, ...]], how: Literal["hidden", "zero"] | surgery.Means, position: int
) -> Emformer:
    """The token at `position` hidden, or its content replaced, in these heads; layers of equal heads in one go."""
    for some in sorted(set(heads.values())):
        layers = [layer for layer, each in heads.items() if each == some]
        if how == "hidden":
            model = surgery.remove_sink(model, position, layers, some)
        else:
            model = surgery.replace_sink(model, how, position, layers, some)
    return model


# Verdicts -------------------------------------------------------------------------------------------------------------


class One(NamedTuple):
    """What was found of one subject: trained, untrained, the sink heads, and what their edits cost."""

    subject: Subject
    own: Looked
    twin: Looked
    some: np.ndarray
    loss: Effects

    def beyond(self, looked: Looked) -> np.ndarray:
        """(pairs,): centred cosine of token 1 less that of the control, mean over the sink heads."""
        return (looked.cosines["different"] - looked.cosines["control"])[:, 1, self.some].mean(1)


UNKNOWN = Interval(math.nan, math.nan, math.nan, 0, "prompts")


def _verdicts(found: Sequence[One], setting: Sinks) -> list[Verdict]:
    having = [one for one in found if len(one.some)]
    none = "" if having else _none(found, setting)
    few = none or ("" if all(len(one.own.cosines["different"]) for one in having) else "all prompts begin with the same token")
    later, seed, alone = f"position {setting.control}", found[0].subject.seed, all(one_alone(one.subject) for one in found)
    return [
        Verdict(
            "the vector that a sink gives is the same whatever the first token",
            "S2 9.2",
            "cosine of F y_1 between prompts of different first tokens, mean over sink heads",
            _over([one.own.cosines["different"][:, 0, one.some].mean(1) for one in having], seed),
            least=CONSTANT,
            null=_mean([one.own.cosines["control"][:, 0, one.some] for one in having]),
            against=later,
            why=few,
        ),
        Verdict(
            "it is more alike between contexts than what a later token gives",
            "S2 9.2",
            f"the same with the mean F y_j removed, less that of {later}",
            _over([one.beyond(one.own) for one in having], seed),
            least=MORE,
            null=_mean([one.beyond(one.twin) for one in having]),
            against="the untrained model",
            why=few,
        ),
        Verdict(
            "with the same first token it is the same in every context",
            "S2 9.2",
            "1 - cosine of F y_1 between prompts of one first token, largest of all heads, raw and mean-removed",
            _over([_away(one.own) for one in found], seed),
            most=IDENTITY,
            null=_mean([_away(one.twin) for one in found]),
            against="the untrained model",
            why=IDENTICAL if alone else SEEN,
            check=alone,
        ),
        *_costs(having, none, setting),
        Verdict(
            "the weight on the sink is a valve: it varies with the query and not with its position alone",
            "S2 9.2",
            "sd of lam_i over queries, without what position and prompt explain, over its mean",
            _over([one.own.pulse[:, :, one.some].mean(-1) for one in having], seed, _valve),
            least=VALVE,
            null=_mean([_valve(mean(one.twin.pulse[:, :, one.some].mean(-1), 0)[None]) for one in having]),
            against="the untrained model",
            why=none or OURS.format(f"{VALVE:g} of its mean"),
        ),
        Verdict(
            "the sink drains attention: it gives less than other tokens do",
            "math H.2",
            "|F y_1|/median |F y_j|, geometric mean over sink heads",
            _over_prompts(having, [_log(one.own.drain[:, one.some]).mean(1) for one in having], lambda m: np.exp(m[:, 0])),
            most=1.0,
            null=math.exp(_mean([_log(one.twin.drain[:, one.some]) for one in having])),
            against="the untrained model",
            why=none,
        ),
        _rate(found, setting),
    ]


IDENTICAL = "token 1 sees itself alone: this is causality, true of any weights, and a cosine near 1 is no evidence of a bias"
SEEN = "token 1 sees later tokens under this mask: what it gives depends on the context, and position 1 is as any other"


def _over(values: Sequence[np.ndarray], seed: int, statistic: Statistic = first) -> Interval:
    """Of rows that are pairs of prompts, each of texts of its own."""
    if not values:
        return UNKNOWN
    found = over_models(values, statistic, seed=seed)
    return found._replace(of="pairs") if found.of == "prompts" else found


def _over_prompts(of: Sequence[One], values: Sequence[np.ndarray], statistic: Statistic = first) -> Interval:
    """Of rows that are the prompts of these subjects."""
    if not values:
        return UNKNOWN
    return over_models(values, statistic, groups=[one.subject.groups.numpy() for one in of], seed=of[0].subject.seed)


def _mean(values: Sequence[np.ndarray]) -> float:
    """The mean over models of what is defined; nan for none, or where one has nothing."""
    means = [one[np.isfinite(one)].mean() if np.isfinite(one).any() else math.nan for one in values]
    return float(np.mean(means)) if means else math.nan


def _valve(means: np.ndarray) -> np.ndarray:
    return np.sqrt(means[:, 0]) / means[:, 1]


def _log(x: np.ndarray) -> np.ndarray:
    """nan for 0: a token that gives nothing has no ratio."""
    return np.log(np.where(x > 0, x, math.nan))


def _away(looked: Looked) -> np.ndarray:
    """(pairs,): the largest 1 - cosine of any head; nan where no vector has a direction."""
    away = 1 - looked.cosines["same"]
    known = ~np.isnan(away)
    return np.where(known.any((1, 2)), np.where(known, away, -math.inf).max((1, 2), initial=-math.inf), math.nan)


def one_alone(subject: Subject) -> bool:
    """Whether token 1 sees itself alone in every layer."""
    j = torch.arange(subject.tokens.shape[1])
    masks = [subject.model.layer(k).attention.mask for k in range(subject.model.settings.depth)]
    return all(int(mask.visible(torch.zeros_like(j), j).sum()) == 1 for mask in masks)


def _none(found: Sequence[One], setting: Sinks) -> str:
    """Why there is no sink head."""
    alpha = np.concatenate([one.own.alpha.mean(0) for one in found])
    if np.isnan(alpha).all():
        return "weights of this kernel may be negative: no share of attention goes to a token"
    often = f"{setting.threshold:g} of its attention in more than {setting.heads:.0%} of prompts"
    return f"no head gives token 1 more than {often}; the largest mean is {np.nanmax(alpha):.2f}"


def _costs(having: Sequence[One], none: str, setting: Sinks) -> list[Verdict]:
    """What the ablations say."""

    def told(*edits: tuple[float, Edit, str]) -> tuple[Interval, str]:
        """The change of loss a target, summed over edits (factor, edit, token); or why it is not known."""
        why = none or next((one.loss.why[edit] for one in having for _, edit, _ in edits if edit in one.loss.why), "")
        if why:
            return UNKNOWN, why
        values = [sum((factor * one.loss.change[edit, token] for factor, edit, token in edits), np.zeros(())) for one in having]
        sums = [np.stack([np.nansum(value, 1), np.isfinite(value).sum(1)], 1) for value in values]
        return _over_prompts(having, sums, lambda m: m[:, 0] / m[:, 1]), ""

    def alone(edit: Edit, token: str) -> float:
        return told((1.0, edit, token))[0].value

    later = f"position {setting.control}"
    bias, no_bias = told((1.0, "mean", "first"), (-SLIGHT, "hidden", "first"))
    content, no_content = told((1.0, "zero", "first"), (-1.0, "zero", "control"))
    hidden, no_hidden = told((1.0, "hidden", "first"), (-1.0, "hidden", "control"))
    weight, other = _mean([one.own.alpha[:, one.some] for one in having]), _mean([one.own.later[:, one.some] for one in having])
    return [
        Verdict(
            "its content acts as a constant bias: the mean in its place costs less than a tenth of what removal costs",
            "S2 9.2",
            "change of loss with the mean of other prompts for F y_1, less a tenth of that without the sink; nats a target",
            bias,
            most=-COST,
            null=told((1.0, "mean", "control"), (-SLIGHT, "hidden", "control"))[0].value,
            against=f"the same of {later}",
            why=no_bias
            or f"mean {alone('mean', 'first'):.4f}, removed {alone('hidden', 'first'):.4f} nats; {OURS.format('a tenth')}",
        ),
        Verdict(
            "its content is used: 0 in its place costs more than 0 in a later token's",
            "S2 7",
            f"change of loss with 0 for F y_1, less that with 0 for F y of {later}; nats a target",
            content,
            least=COST,
            null=0.0,
            against=later,
            why=no_content or f"0 for F y_1 {alone('zero', 'first'):.4f}, of {later} {alone('zero', 'control'):.4f} nats",
        ),
        Verdict(
            "removing the sink costs more than removing a later token",
            "S2 7",
            f"change of loss with token 1 hidden and the rest renormalised, less that of {later}; nats a target",
            hidden,
            least=COST,
            null=0.0,
            against=later,
            why=no_hidden or f"mean weight {weight:.2f} on token 1 and {other:.3f} on the other: a sink has more to take away",
        ),
    ]


def _rate(found: Sequence[One], setting: Sinks) -> Verdict:
    known = [one for one in found if not np.isnan(one.own.rate).all()]
    values = [(one.own.rate - np.maximum(one.twin.rate, one.own.even[:1])).mean(1) for one in known]
    return Verdict(
        "the first token is a sink",
        "S2 7",
        f"share of heads and prompts with alpha_1 > {setting.threshold:g}, less that untrained or of uniform weights",
        _over_prompts(known, values),
        least=MORE,
        null=0.0,
        against="the untrained model and uniform weights",
        why=draws(len(known)) if known else _none(found, setting),
    )


# Charts ---------------------------------------------------------------------------------------------------------------

PANELS = {
    "rate": "sink rate",
    "alpha": "mean weight on token 1",
    "share": "|lam F y_1|/|D|",
    "drain": "|F y_1|/median |F y_j|",
    "variation": "sd/mean of lam",
}
EDITED = {"hidden": "removed", "zero": "0 in its place", "mean": "its mean in its place"}


def _charts(found: Sequence[One], setting: Sinks) -> dict[str, Chart]:
    compared = {"different": "different first tokens", "control": f"position {setting.control}", "same": "one first token"}
    heads, cosines, losses = [], [], []
    for one in found:
        for suffix, looked in (("", one.own), (", untrained", one.twin)):
            x = looked.layer + looked.head / (looked.head.max() + 1)
            heads += [
                points(panel, "untrained" if suffix else "trained", x, getattr(looked, key)) for key, panel in PANELS.items()
            ]
            for key, line in compared.items():
                raw, centred = looked.cosines[key].transpose(1, 0, 2)
                cosines += [points("raw", line + suffix, looked.layer, raw)]
                cosines += [points("mean removed", line + suffix, looked.layer, centred)]
        heads += [points(PANELS[key], "theory: uniform", x, one.own.even[k, None]) for k, key in enumerate(("rate", "alpha"))]
        for (edit, token), change in one.loss.change.items():
            counted = np.isfinite(change).any(0)
            line = "token 1" if token == "first" else f"token {setting.control}"
            losses.append(points(EDITED[edit], line, np.flatnonzero(counted) + 1, change[:, counted]))
    told = [
        ("heads", heads, "What heads do with token 1: every layer from its first head to its last.", "layer", "value"),
        ("cosines", cosines, "How alike what a token gives is between prompts; mean over all heads.", "layer", "cosine"),
        ("loss", losses, "What an edit of a token in the sink heads does to the loss at each query.", "position", "nats"),
    ]
    return {name: Curves(averaged(rows), caption, x, y) for name, rows, caption, x, y in told if any(map(len, rows))}


def _note(found: Sequence[One], setting: Sinks) -> str:
    lines = []
    for one in found:
        own, model = one.own, one.subject.model
        places = ", ".join(f"{layer}.{head}" for layer, head in zip(own.layer[one.some], own.head[one.some], strict=True))
        lines.append(
            f"{one.subject.name}: {len(one.some)} of {len(own.layer)} heads are sink heads{': ' * bool(places)}{places[:300]} "
            f"(layer.head), chosen on one half of the prompts and judged on the other, of which "
            f"{len(own.cosines['different'])} pairs begin with different tokens."
        )
        if len(one.some):
            part, spread = own.share[:, one.some].mean(), own.variation[:, one.some].mean()
            lines.append(f"Their sink gives {part:.2f} of |D| on average, with a weight of sd/mean {spread:.2f} over queries.")
        if any(model.layer(k).attention.kernel.value is not None for k in range(model.settings.depth)):
            lines.append("The kernel has a sink of its own, whose vector is a constant by construction; this is about token 1.")
        if not one_alone(one.subject):
            lines.append("Token 1 sees later tokens under this mask: position 1 is not privileged.")
        cosines = [one.own.cosines[key] for key in ("different", "control", "same")]
        if not all(map(len, cosines)):
            continue
        raw, centred = (", ".join(f"{_mean([each[:, k]]):.3f}".replace("nan", "undefined") for each in cosines) for k in range(2))
        lines.append(
            f"Over all heads the cosine of F y_1 of different first tokens, of position {setting.control} and of one first token "
            f"is {raw}, and {centred} with the mean removed."
        )
    return "\n".join(filter(None, [*lines, unlike([one.subject for one in found])]))
