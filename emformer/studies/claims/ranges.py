"""Do early layers look at what is near, and late ones at what is far?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.geometry.energy import NEAR, attention_range
from emformer.geometry.sinks import uniform
from emformer.geometry.spectra import wide
from emformer.intervals import over_models
from emformer.masks import Visible
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.studies.lines import BAND, band, draws, mean, spearman, trend
from emformer.studies.subjects import Subject, Tell
from emformer.theory.outcome import Curves
from emformer.trajectory import Trajectory
from emformer.verdicts import Findings, Verdict

LEAST = 0.001  # of a difference of ratios that is one
SOURCE = "S0 residual stream"
LOOKS, WRITES = "range of the weights / uniform", "range of the update / uniform"


@dataclass(frozen=True)
class Ranges(parts.Study):
    """How far layers look, and from how far what they write comes, by depth: math D.9, S0 "early layers write short-range".

    *Looks*: R_i = sum_j a_ij |i - j| over its value for weights that are uniform on what the query sees, so that masks and places
    in the text cancel; the first token, which often is a sink, is left out of weights and null alike; mean over queries that see
    8 keys or more, and over heads weighted by |D^h|. *Writes*: the query is shown keys up to distance r alone, and the first
    token, its weights made anew; R_i = sum over r of |D_i(r) - D_i|/|D_i|, the mean distance of what the update is made of, over
    the same number for uniform weights. A key that is looked at and says nothing counts in the first and not in the second.

    Depth is the layer's number, and trend Spearman's correlation with it, held against all orders of the layers as well. The
    untrained twin has no reason for any trend. Cost: 14 passes of attention, a few seconds for the default.
    """

    name: ClassVar[str] = "ranges"
    title: ClassVar[str] = "do early layers work at short range, and late ones at long range?"

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        for subject in subjects:
            _check(subject)
        looks = []
        for k, subject in enumerate(subjects):
            pair = []
            for half, (model, word) in enumerate(((None, subject.name), (subject.untrained(), f"untrained {subject.name}"))):
                tell((2 * k + half) / (2 * len(subjects)), word)
                pair.append(_measured(subject, model))
            looks.append(pair)
        tell(1.0, "intervals")
        groups, seed = [subject.groups.numpy() for subject in subjects], subjects[0].seed
        verdicts = []
        for name, verb in ((LOOKS, "look"), (WRITES, "write from")):
            trained, twins = ([getattr(pair[one], verb.split()[0]) for pair in looks] for one in (0, 1))
            measured, why = trend(trained, groups=groups, seed=seed)
            null = float(np.mean([float(spearman(mean(twin, 0))) for twin in twins]))
            claim, against = f"later layers {verb} farther away than earlier ones", "the untrained twin"
            quantity = f"Spearman's correlation of the layer with the {name}"
            verdicts.append(Verdict(claim, SOURCE, quantity, measured, least=0.0, null=null, against=against, why=why))
            gain = [
                values[:, -1] - values[:, 0] - (twin[:, -1] - twin[:, 0]) for values, twin in zip(trained, twins, strict=True)
            ]
            claim = f"training makes the last layer {verb} farther away than the first"
            quantity = f"{name}, last layer - first, less the twin's"
            interval = over_models(gain, groups=groups, seed=seed)
            why = draws(len(subjects))
            verdicts.append(Verdict(claim, SOURCE, quantity, interval, least=LEAST, null=0.0, against=against, why=why))
            first = over_models([values[:, 0] for values in trained], groups=groups, seed=seed)
            null = float(np.mean([mean(twin[:, 0]) for twin in twins]))
            claim = f"the first layer {'looks' if verb == 'look' else 'writes from'} nearer than uniform weights"
            verdicts.append(Verdict(claim, SOURCE, f"{name}, first layer", first, most=1.0, null=null, against=against))
        note = "Ranges are ratios: 1 is what uniform weights on the visible tokens give."
        return Findings(verdicts, {"ranges": _chart(subjects, looks), "tails": _tails(subjects, looks)}, note)


class Measured(NamedTuple):
    """Of one model: both ratios by prompt and layer (P, L), and |D(r) - D|/|D| by layer and r (L, r)."""

    look: np.ndarray
    write: np.ndarray
    tails: np.ndarray


def reaches(length: int) -> list[int]:
    """0, 1, 2, 4 … below the longest distance."""
    found = [0] + [2**k for k in range(length.bit_length()) if 2**k < length - 1]
    return found if length > 1 else []


def _check(subject: Subject) -> None:
    model, length = subject.model, subject.tokens.shape[1]
    if model.settings.depth < 2:
        raise UserError(f"ranges: {subject.name} has one layer, so that none is early or late; take a deeper model.")
    if length <= NEAR:
        raise UserError(f"ranges: of prompts of {length} tokens hardly any is far; choose a --length above {NEAR}.")
    for layer in range(model.settings.depth):
        if model.layer(layer).attention.kernel.signed:
            raise UserError(
                f"ranges: in layer {layer} of {subject.name} weights may be negative, with no mean distance; take another model."
            )


def _measured(subject: Subject, model: Emformer | None) -> Measured:
    found = [_ranges(one) for one in subject.trajectories(model)]
    look, write, tails = (np.concatenate(column) for column in zip(*found, strict=True))
    return Measured(look, write, tails.mean(0))


@torch.no_grad()
def _ranges(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(looks (B, L), writes (B, L), tails (B, L, r))."""
    columns = [(_looks(trajectory, k), *_writes(trajectory, k)) for k in trajectory.attentions]
    trajectory.forget()
    look, write, tails = (torch.stack(column, 1).cpu().numpy() for column in zip(*columns, strict=True))
    return look, write, tails


def _looks(trajectory: Trajectory, k: int) -> Tensor:
    """(B,): the range of the weights over that of uniform ones, mean over queries, heads weighted by |D^h|."""
    visible = trajectory.visible(k)
    ratio = attention_range(trajectory.pattern(k), visible).without_sink
    weight = wide(trajectory.heads(k)[0]).norm(dim=-1).where(~ratio.isnan(), 0.0)
    each = (weight * ratio.nan_to_num()).sum(1) / weight.sum(1)
    return each.nanmean(-1)


def _writes(trajectory: Trajectory, k: int) -> tuple[Tensor, Tensor]:
    """(B,) the range of the update over that of an update with uniform weights, and (B, r) its tails."""
    step, attention, visible = trajectory.steps[k], trajectory.block(k).attention, trajectory.visible(k)
    length = len(visible)
    i = torch.arange(length, device=visible.device)
    distance = (i[:, None] - i).abs()
    u, v = attention.factors(step.read, i)
    far = visible.sum(-1) >= NEAR

    def change(table: Tensor, even: bool) -> Tensor:
        """(B, T): |D(table) - D|/|D| for queries that see enough."""
        seen = uniform(table).to(step.read), uniform(visible).to(step.read)
        if even:
            shape = len(step.read), attention.form.heads, length, length
            some, all_ = (a.expand(shape) for a in seen)
        else:
            some, all_ = attention.kernel.weights(u, v, Visible(table)), trajectory.pattern(k)
        whole = attention.lift(attention.mix(all_, step.read))
        part = attention.lift(attention.mix(some, step.read))
        size = wide(whole).norm(dim=-1)
        return (wide(part) - wide(whole)).norm(dim=-1) / size.where((size > 0) & far, torch.nan)

    sums, tails = [], []
    for even in (False, True):
        grid = reaches(length)
        curve = torch.stack([change(visible & ((distance <= r) | (i == 0)), even) for r in grid], -1)
        steps = torch.tensor(np.diff([*grid, length - 1]), dtype=curve.dtype, device=curve.device)
        sums.append((curve * steps).sum(-1).nanmean(-1))
        tails.append(curve.nanmean(1))
    return sums[0] / sums[1].where(sums[1] > 0, torch.nan), tails[0]


def _chart(subjects: Sequence[Subject], looks: Sequence[Sequence[Measured]]) -> Curves:
    rows = []
    for subject, pair in zip(subjects, looks, strict=True):
        for one, line in zip(pair, (subject.name, f"untrained {subject.name}"), strict=True):
            for panel, values in ((LOOKS, one.look), (WRITES, one.write)):
                rows += band(panel, line, values, subject.groups.numpy())
    rows += [
        (panel, "theory uniform", layer, 1.0, math.nan, math.nan)
        for panel in (LOOKS, WRITES)
        for layer in (0, looks[0][0].look.shape[1] - 1)
    ]
    frame = pd.DataFrame(rows, columns=BAND)
    caption = (
        "Mean distance of what attention looks at, and of what its update is made of, over that of uniform weights, by layer."
    )
    return Curves(frame, caption, "layer", "range / uniform")


def _tails(subjects: Sequence[Subject], looks: Sequence[Sequence[Measured]]) -> Curves:
    rows = []
    for subject, (trained, _) in zip(subjects, looks, strict=True):
        grid = reaches(subject.tokens.shape[1])
        rows += [
            (subject.name, f"layer {k}", r, y) for k, curve in enumerate(trained.tails) for r, y in zip(grid, curve, strict=True)
        ]
    frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y"])
    caption = "How much the update of attention changes where only keys up to this distance, and the first token, are seen."
    return Curves(frame, caption, "distance seen", "|D(r) - D| / |D|")
