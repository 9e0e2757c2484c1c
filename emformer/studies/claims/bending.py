"""Do the paths of later tokens bend with the meaning of a word that is changed before them?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.geometry.spectra import wide
from emformer.intervals import FEWEST, over_models
from emformer.model import Emformer
from emformer.observables.lens import whole_layers
from emformer.parts import UserError
from emformer.studies.flips import flips
from emformer.studies.lines import draws
from emformer.studies.subjects import AT_ONCE, Subject, Tell, part_of, vocabulary_of
from emformer.theory.outcome import Curves
from emformer.trajectory import capture
from emformer.verdicts import Findings, Verdict

STREAM = 29  # sets the edits apart from other random numbers of the seed
POOL = 64  # words of like frequency, without classes: the nearest and the farthest of them by embedding are taken
KINDS = ("near", "far")


@dataclass(frozen=True)
class Bending(parts.Study):
    """S2 8.3: trajectories exhibit meaning-consistent bending under controlled context edits. math H.4.

    In each prompt one token, in the second quarter, is changed twice: to one of its own meaning ("near") and to one of another
    ("far"), as frequent as the near one. With classes of words, near is of the same in every classification, and far of another
    in each; without, near is the nearest and far the farthest by embedding of the words that are about as frequent as the token.
    Deflection of a later token i at a state: |LN x_i - LN x'_i| / |LN x_i|, LN as the next sublayer reads; and the angle between
    its updates D_i and D'_i. Both are means over later tokens and the depth; under a mask that is not causal, over all others.

    Claimed: log(far/near) > 0, by prompts; null 0, which exchanging the two edits within a prompt gives exactly (permutation
    test, the same prompts in all models; from six models on within a model). A far word is farther away to begin with, and
    whatever is larger bends more: so the same is asked of the deflection per size of the edit, the deflection of the changed
    token in X^0. The untrained twin knows no meaning. Tokens before the edit of a causal model must not move at all, a check.

    Cost: six passes over the prompts: 20 s for 128 prompts of 64 tokens with d = 128, L = 4.

    Args:
        choices: words that are closest in frequency, of which one is drawn; 1 for the closest.
    """

    choices: int = 8

    name: ClassVar[str] = "bending"
    title: ClassVar[str] = "do later tokens bend with the meaning of a word that is changed?"
    prompts: ClassVar[int] = 128

    def __post_init__(self) -> None:
        if self.choices < 1:
            raise UserError(f"bending: choices is {self.choices}; choose at least 1.")

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        found = []
        for k, subject in enumerate(subjects):
            part = part_of(tell, k / len(subjects), (k + 1) / len(subjects))
            made = edits(subject, self.choices)
            part(0.1, f"{subject.name}: edits")
            causal = is_causal(subject.model)
            trained = {kind: bend(subject.model, subject.tokens, made, kind, causal) for kind in KINDS}
            part(0.5, f"{subject.name}: deflections")
            twin = {kind: bend(subject.untrained(), subject.tokens, made, kind, causal) for kind in KINDS}
            part(1.0, f"{subject.name}: untrained")
            found.append(Found(made, causal, trained, twin, subject.groups.cpu().numpy()[made.prompts]))
        return Findings(_verdicts(found, subjects), _charts(found, subjects[0].seed), _note(found, subjects))


# Edits ----------------------------------------------------------------------------------------------------------------


class Edits(NamedTuple):
    """Prompts that have an edit (n,), the place of the token that is changed (n,), and to what: ids (n,) by kind."""

    prompts: np.ndarray
    places: np.ndarray
    words: dict[str, np.ndarray]
    labelled: bool


def edits(subject: Subject, choices: int) -> Edits:
    """Minimal pairs for the subject's prompts, drawn by a generator of their own; prompts in which nothing fits are left out."""
    tokens = subject.tokens.cpu().numpy()
    random = np.random.default_rng((STREAM, subject.seed))
    counts = np.bincount(tokens.ravel(), minlength=vocabulary_of(subject)).astype(float)
    labels = None if subject.labels is None else subject.labels.cpu().numpy()
    table = None if labels is None else _classes(tokens, labels, len(counts))
    vectors = subject.model.embedding.weight.detach().cpu().double().numpy()[: len(counts)]
    vectors = vectors - vectors[counts > 0].mean(0)
    kept: list[tuple[int, int, int, int]] = []
    length = tokens.shape[1]
    for prompt, row in enumerate(tokens):
        for place in random.permutation(np.arange(length // 4, max(length // 4 + 1, length // 2))):
            if labels is not None and table is not None:
                pair = _by_class(int(row[place]), labels[:, prompt, place], table, counts, choices, random)
            else:
                pair = _by_embedding(int(row[place]), vectors, counts)
            if pair is not None:
                kept.append((prompt, int(place), *pair))
                break
    found = np.array(kept, dtype=np.int64).reshape(-1, 4)
    return Edits(found[:, 0], found[:, 1], {"near": found[:, 2], "far": found[:, 3]}, table is not None)


def _classes(tokens: np.ndarray, labels: np.ndarray, vocabulary: int) -> np.ndarray:
    """(C, V): the class that each word has most often, -1 for none, or for a word that is not there."""
    found = []
    for one in labels:
        known = one >= 0
        tally = np.zeros((vocabulary, int(one.max(initial=-1)) + 2), dtype=np.int64)
        np.add.at(tally, (tokens[known], one[known] + 1), 1)
        found.append(tally.argmax(1) - 1)
    return np.stack(found)


def _by_class(
    word: int, classes: np.ndarray, table: np.ndarray, counts: np.ndarray, choices: int, random: np.random.Generator
) -> tuple[int, int] | None:
    """A word of the same classes, and one of others that is as frequent as that."""
    if (classes < 0).any():
        return None
    known = (counts > 0) & (table >= 0).all(0)
    known[word] = False
    near = np.flatnonzero(known & (table == classes[:, None]).all(0))
    far = np.flatnonzero(known & (table != classes[:, None]).all(0))
    if not len(near) or not len(far):
        return None
    first = int(random.choice(_alike(near, counts, counts[word])[:choices]))
    return first, int(random.choice(_alike(far, counts, counts[first])[:choices]))


def _by_embedding(word: int, vectors: np.ndarray, counts: np.ndarray) -> tuple[int, int] | None:
    """Of the words about as frequent as this one, the nearest and the farthest by the cosine of embeddings less their mean."""
    there = np.flatnonzero(counts > 0)
    pool = _alike(there[there != word], counts, counts[word])[:POOL]
    if len(pool) < 2:
        return None
    sizes = np.linalg.norm(vectors[pool], axis=1) * np.linalg.norm(vectors[word])
    cosine = np.divide(vectors[pool] @ vectors[word], sizes, out=np.zeros(len(pool)), where=sizes > 0)
    return int(pool[cosine.argmax()]), int(pool[cosine.argmin()])


def _alike(words: np.ndarray, counts: np.ndarray, count: float) -> np.ndarray:
    """The words, the closest in log frequency first."""
    return words[np.argsort(np.abs(np.log(counts[words]) - math.log(count)), kind="stable")]


# Deflections ----------------------------------------------------------------------------------------------------------


class Bent(NamedTuple):
    """Of each prompt; states are X^0 and what each layer leaves."""

    later: np.ndarray  # (n, L + 1) deflection, mean over the tokens that see the edit
    edited: np.ndarray  # (n, L + 1) of the token that is changed
    angle: np.ndarray  # (n,) radians, mean over these tokens and all steps
    before: np.ndarray  # (n,) the largest deflection of a token before the edit, at any state
    reach: np.ndarray  # (n, T) at the last state, by the distance i - e; nan at 0 and where there is no token

    @property
    def whole(self) -> np.ndarray:
        """(n,): the mean over layers, without X^0, where only the edit itself is."""
        return self.later[:, 1:].mean(1)


class Found(NamedTuple):
    edits: Edits
    causal: bool
    trained: dict[str, Bent]
    twin: dict[str, Bent]
    groups: np.ndarray


def is_causal(model: Emformer) -> bool:
    """Whether no token can know of one that comes after it."""
    layers = [model.layer(k).attention for k in range(model.settings.depth)]
    return all(one.mask.causal and one.kernel.rowwise for one in layers)


@torch.no_grad()
def bend(model: Emformer, tokens: Tensor, made: Edits, kind: str, causal: bool) -> Bent:
    """Deflections by the edits of one kind."""
    lots = []
    for start in range(0, len(made.prompts), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        place = torch.from_numpy(made.places[some]).to(tokens)
        plain = tokens[torch.from_numpy(made.prompts[some]).to(tokens.device)]
        changed = plain.clone()
        changed[torch.arange(len(plain)), place] = torch.from_numpy(made.words[kind][some]).to(tokens)
        lots.append(_bend(model, plain, changed, place, causal))
    if not lots:
        empty = np.empty((0, model.settings.depth + 1))
        return Bent(empty, empty, empty[:, 0], empty[:, 0], np.empty((0, tokens.shape[1])))
    return Bent(*(torch.cat(column).cpu().numpy() for column in zip(*lots, strict=True)))


def _bend(model: Emformer, plain: Tensor, changed: Tensor, place: Tensor, causal: bool) -> tuple[Tensor, ...]:
    one, other = capture(model, plain), capture(model, changed)
    distance = torch.arange(plain.shape[1], device=plain.device) - place[:, None]
    sees = distance > 0 if causal else distance != 0
    moved = []
    for here, there in zip(one.states, other.states, strict=True):
        a, b = (wide(state.x if state.read is None else state.read) for state in (here, there))
        moved.append((a - b).norm(dim=-1) / a.norm(dim=-1))
    layers = torch.stack([moved[k] for k in whole_layers(one.states)], 1)
    angles = torch.stack([_angle(wide(a.update), wide(b.update)) for a, b in zip(one.steps, other.steps, strict=True)], 1)
    at = place[:, None, None].expand(-1, layers.shape[1], 1)
    before = torch.stack(moved, 1).where(distance[:, None] < 0, 0.0).amax((1, 2))
    index = torch.arange(1, plain.shape[1], device=plain.device) + place[:, None]
    reach = layers[:, -1].gather(1, index.clamp(max=plain.shape[1] - 1)).where(index < plain.shape[1], torch.nan)
    reach = torch.cat([torch.full_like(reach[:, :1], torch.nan), reach], 1)
    return (
        layers.where(sees[:, None], torch.nan).nanmean(-1),
        layers.gather(2, at)[..., 0],
        angles.where(sees[:, None], torch.nan).nanmean((1, 2)),
        before,
        reach,
    )


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """In [0, pi], exactly 0 for equal vectors; nan where one is 0."""
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


# Verdicts -------------------------------------------------------------------------------------------------------------


def log_ratio(far: np.ndarray, near: np.ndarray) -> np.ndarray:
    """log(far/near); nan where one of them is 0 or unknown."""
    known = (far > 0) & (near > 0)
    return np.log(np.where(known, far, 1.0) / np.where(known, near, 1.0)) + np.where(known, 0.0, math.nan)


def permuted(values: Sequence[np.ndarray], groups: Sequence[np.ndarray], seed: int) -> float:
    """p of a mean over models at least as large if near and far were exchanged at random: in each model where there are enough of
    them, else in each group of prompts, in all models at once, for they were shown the same."""
    if any(not np.isfinite(one).any() for one in values):
        return math.nan
    if len(values) >= FEWEST:
        return flips(np.array([np.nanmean(one) for one in values]), seed)
    _, where = np.unique(np.concatenate(groups), return_inverse=True)
    parts = np.concatenate([np.where(np.isfinite(one), one, 0.0) / np.isfinite(one).sum() for one in values])
    return flips(np.bincount(where, parts), seed)


def _verdicts(found: Sequence[Found], subjects: Sequence[Subject]) -> list[Verdict]:
    groups, seed = [one.groups for one in found], subjects[0].seed
    labelled = all(one.edits.labelled for one in found)
    nothing = "" if all(len(one.edits.prompts) for one in found) else "no prompt has a word that could be changed so"

    def ratio(side: str, value: str) -> list[np.ndarray]:
        lots = [getattr(one, side) for one in found]
        return [log_ratio(*(_value(lot[kind], value) for kind in ("far", "near"))) for lot in lots]

    def verdict(claim: str, quantity: str, values: Sequence[np.ndarray], against: str, why: str = "") -> Verdict:
        measured = over_models(values, groups=groups, seed=seed)
        told = f"{why + ', ' if why else ''}permutation of the edits: p = {permuted(values, groups, seed):.2g}"
        return Verdict(claim, "S2 8.3", quantity, measured, least=0.0, null=0.0, against=against, why=nothing or told)

    exchanged = "near and far exchanged"
    size = np.mean([np.nanmean(one) if np.isfinite(one).any() else math.nan for one in ratio("trained", "size")])
    sizes = f"the edit itself has log(far/near) {size:+.3g}"
    raw = verdict(
        "a word of another meaning bends later tokens more than one of the same"
        if labelled
        else "a word far by embedding bends later tokens more than a near one",
        "log(far/near) of the deflection, mean over later tokens and layers",
        ratio("trained", "whole"),
        exchanged,
        sizes if labelled else f"{sizes} by construction, for far means far by embedding",
    )
    gain = verdict(
        "a far word bends them more than its size would",
        "log(far/near) of the deflection over that of the changed token in X^0",
        ratio("trained", "gain"),
        exchanged,
    )
    verdicts = [raw, gain] if labelled else [gain, raw]
    verdicts.append(
        verdict(
            "the updates of later tokens turn more",
            "log(far/near) of the angle between D and D', mean over later tokens and steps",
            ratio("trained", "angle"),
            exchanged,
        )
    )
    differences = [mine - its for mine, its in zip(ratio("trained", "whole"), ratio("twin", "whole"), strict=True)]
    verdicts.append(
        verdict(
            "that is the work of training",
            "log(far/near) of the deflection, less that of the untrained twin",
            differences,
            "the untrained twin",
            draws(len(found)),
        )
    )
    if all(one.causal for one in found):
        before = [np.maximum(one.trained["near"].before, one.trained["far"].before) for one in found]
        measured = over_models(before, groups=groups, seed=seed)
        verdicts.append(
            Verdict(
                "tokens before the edit do not move: the model is causal",
                "math H.4",
                "largest deflection of a token before the edit, at any state",
                measured,
                most=0.0,
                why=nothing,
                check=True,
            )
        )
    return verdicts


def _value(one: Bent, name: str) -> np.ndarray:
    sizes: dict[str, Any] = {"whole": one.whole, "angle": one.angle, "size": one.edited[:, 0]}
    if name == "gain":
        return np.divide(one.whole, one.edited[:, 0], out=np.zeros(len(one.angle)), where=one.edited[:, 0] > 0)
    return sizes[name]


def _charts(found: Sequence[Found], seed: int) -> dict[str, Curves]:
    """Means over the models that have the layer, with their intervals."""
    rows, reaches = [], []
    for side, name in (("trained", ""), ("twin", ", untrained")):
        for kind in KINDS:
            lots = [getattr(one, side)[kind] for one in found]
            for field, panel in (("later", "later tokens"), ("edited", "the changed token")):
                rows += [(panel, kind + name, *row) for row in _means([getattr(one, field) for one in lots], found, seed)]
            if side == "trained":
                reaches += [
                    ("the last state", kind, *row) for row in _means([one.reach for one in lots], found, seed) if row[0] > 0
                ]
    columns = ["panel", "line", "x", "y", "low", "high"]
    word = "relative deflection"
    return {
        "deflection": Curves(pd.DataFrame(rows, columns=columns), "Deflection by an edit; 0 is the embedding.", "layer", word),
        "reach": Curves(
            pd.DataFrame(reaches, columns=columns), "Deflection at the end, by the distance from the edit.", "tokens later", word
        ),
    }


def _means(values: Sequence[np.ndarray], found: Sequence[Found], seed: int) -> list[tuple[int, float, float, float]]:
    """(column, mean, low, high) of each column."""
    rows = []
    for column in range(max(one.shape[1] for one in values)):
        have = [k for k, one in enumerate(values) if column < one.shape[1]]
        columns, groups = [values[k][:, column] for k in have], [found[k].groups for k in have]
        one = over_models(columns, groups=groups, seed=seed, resamples=400)
        rows.append((column, one.value, one.low, one.high))
    return rows


def _note(found: Sequence[Found], subjects: Sequence[Subject]) -> str:
    said = []
    for subject, one in zip(subjects, found, strict=True):
        names = ", ".join(subject.classes)
        how = f"by class ({names})" if one.edits.labelled else "by embedding, for its words have no classes"
        said.append(
            f"{subject.name}: {len(one.edits.prompts)} of {len(subject.tokens)} prompts have an edit, near and far {how}."
        )
    if not all(one.edits.labelled for one in found):
        said.append("Near and far by embedding are what the model holds to be alike: that is not yet meaning.")
    if not all(one.causal for one in found):
        said.append("Not every mask is causal: tokens on both sides see the edit.")
    said.append("The deflection per size of the edit is no fair measure where a state saturates: it falls for large edits.")
    return "\n".join(said)
