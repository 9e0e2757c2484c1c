"""Are early layers fragile and late ones robust: what the loss does when a sublayer, or a whole layer, is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from emformer import parts
from emformer.geometry import lens
from emformer.intervals import over_models
from emformer.model import Emformer
from emformer.studies.lines import LAYERS, draws, spearman, trend
from emformer.studies.losses import by_prompt, task
from emformer.studies.subjects import Subject, Tell
from emformer.surgery import Means, mean_ablate, means, skip
from emformer.surgery.copies import copied
from emformer.theory.outcome import Curves
from emformer.training.objectives import IGNORE
from emformer.verdicts import Findings, Verdict

Site = Literal["layer", "attn", "ffn"]
Way = Literal["skip", "mean", "resample"]
SITES: tuple[Site, ...] = ("layer", "attn", "ffn")
WAYS: tuple[Way, ...] = ("skip", "mean", "resample")
SUBLAYERS: dict[Site, tuple[Literal["attn", "ffn"], ...]] = {"layer": ("attn", "ffn"), "attn": ("attn",), "ffn": ("ffn",)}
CALLED = {"layer": "a whole layer", "attn": "attention", "ffn": "the FFN"}


@dataclass(frozen=True)
class Fragility(parts.Study):
    """S2 6: "Early layers are fragile"; "Later layers in wide models are robust". math H.4.

    How wide is wide S2 does not say: a refutation is one at the width of these models.

    dL_l = loss without the update of layer l - loss, in nats of the model's own objective, mean over prompts. The update of
    attention, of the FFN or of both is left out ("skip": 0; a norm after the sum and a retraction still act), is its mean at that
    position over the prompts ("mean"), or is that of another prompt at the same position ("resample"), which is as large and of
    the same law, and so leaves the stream where later layers know it, but says what the other prompt is about.

    Two numbers for each: Spearman's correlation of l and dL_l, null 0, claimed < 0; and R/(1 + R), R = mean dL of the first third
    of the layers / of the last third, null 1/2, claimed > 1/2, that is R > 1; a loss that falls counts as 0 there. Both also
    without layer 0, which often serves as part of the embedding.

    An untrained model has no loss to lose, but an early update reaches more layers than a late one. So the twin is asked how much
    its prediction changes, KL_l = KL(p || p without layer l), and the trend of KL_l over the layers is held against the twin's.

    Fewer than six models show one profile over the layers, however many prompts: each number is then also held against all orders
    of the layers (`emformer.studies.lines.trend`), of which four are too few to tell anything.

    Fewer than 3 layers have no early and late: all is then told and nothing decided. Masked tokens are masked once, by a
    generator of the study's own.

    Cost: 11 L + 4 passes over the prompts: half a minute for 128 prompts of 64 tokens with d = 128, L = 4.
    """

    name: ClassVar[str] = "fragility"
    title: ClassVar[str] = "are early layers fragile and late ones robust?"
    prompts: ClassVar[int] = 128

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        found = []
        for k, subject in enumerate(subjects):
            rises: dict[tuple[Site, Way], np.ndarray] = {}
            for site, way, values in _rises(subject):
                rises[site, way] = values
                tell((k + len(rises) / (1 + len(SITES) * len(WAYS))) / len(subjects), f"{subject.name}: {way} {site}")
            shifts = np.stack([_shifts(subject, model) for model in (subject.model, subject.untrained())], 1)
            found.append(Found(rises, shifts))
            tell((k + 1) / len(subjects), f"{subject.name}: untrained")
        tell(1.0, "intervals")
        groups = [subject.groups.cpu().numpy() for subject in subjects]
        return Findings(
            _verdicts(found, groups, subjects), {"loss": _chart(subjects, found, groups), "shift": _shift(found)}, _note(subjects)
        )


# Losses ---------------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Of one model: dL_l of every prompt (P, L), nan where there is nothing to leave out; KL_l of the model and, behind it, of
    its untrained twin (P, 2, L)."""

    rises: dict[tuple[Site, Way], np.ndarray]
    shifts: np.ndarray


def _rises(subject: Subject) -> Iterator[tuple[Site, Way, np.ndarray]]:
    """dL_l of every prompt (P, L), site by site and way by way; nan where there is nothing to leave out."""
    given, model = task(subject), subject.model
    lots = [(given.inputs[some], given.targets[some]) for some in subject.batches()]
    usual = np.concatenate([by_prompt(model, *lot) for lot in lots])
    mean = means(model, [inputs for inputs, _ in lots])
    for site in SITES:
        for way in WAYS:
            columns = []
            for layer in range(model.settings.depth):
                if site == "ffn" and model.layer(layer).ffn is None:
                    columns.append(np.full(len(usual), math.nan))
                    continue
                columns.append(np.concatenate(list(_without(model, layer, site, way, mean, lots))) - usual)
            yield site, way, np.stack(columns, 1)


@torch.no_grad()
def _shifts(subject: Subject, model: Emformer) -> np.ndarray:
    """(P, L): KL(p || p without layer l), mean over the targets of each prompt, nats."""
    given, found = task(subject), []
    for some in subject.batches():
        inputs, asked = given.inputs[some], given.targets[some] != IGNORE
        usual, columns = model(inputs), []
        for layer in range(model.settings.depth):
            changed = skip(model, "attn", layer)
            changed = changed if model.layer(layer).ffn is None else skip(changed, "ffn", layer)
            divergence = lens.read(changed(inputs), usual).divergence
            columns.append(divergence.where(asked, torch.nan).nanmean(1))
        found.append(torch.stack(columns, 1))
    return torch.cat(found).cpu().numpy()


def _without(
    model: Emformer, layer: int, site: Site, way: Way, mean: Means, lots: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[np.ndarray]:
    """The losses of each lot of prompts, this site of this layer left out."""
    points = [point for point in SUBLAYERS[site] if point == "attn" or model.layer(layer).ffn is not None]
    if way == "resample":
        for inputs, targets in lots:
            if len(inputs) < 2:  # nobody to take an update from
                yield np.full(len(inputs), math.nan)
            else:
                yield by_prompt(resampled(model, inputs, layer, points), inputs, targets)
        return
    changed = model
    for point in points:
        changed = skip(changed, point, layer) if way == "skip" else mean_ablate(changed, mean, point, layer)
    for inputs, targets in lots:
        yield by_prompt(changed, inputs, targets)


class Given(nn.Module):
    """Stands for a sublayer, attention or FFN, that makes this update (B, T, d), whatever it reads."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def update(self, y: Tensor, i: Tensor, memory: object = None) -> tuple[None, Tensor]:
        return None, self.value

    def forward(self, y: Tensor) -> Tensor:
        return self.value


@torch.no_grad()
def resampled(model: Emformer, inputs: Tensor, layer: int, points: Sequence[str]) -> Emformer:
    """A copy in which sublayers of a layer make, for each of these prompts (B, T), the update that they made for the one before
    it (for the first: for the last). All points take it of the same prompt. It reads these prompts and no others."""
    updates: dict[str, Tensor] = {}
    for step in model.flow(inputs):
        if step.layer != layer:
            continue
        block = model.layer(layer)
        if step.mixture is not None:
            updates["attn"] = block.attention.lift(step.mixture)
        if step.point != "attn" and block.ffn is not None:
            read = step.read if step.point == "ffn" else step.before if block.read_ffn is None else block.read_ffn(step.before)
            updates["ffn"] = block.ffn(read)
    copy, _, _ = copied(model, f"resample {', '.join(points)}", layer)
    block = copy.layer(layer)
    for point in points:
        stand = Given(updates[point].roll(1, 0))
        if point == "attn":
            cast(nn.Module, block).attention = stand
        else:
            block.ffn = stand
    return copy.eval()


# Verdicts -------------------------------------------------------------------------------------------------------------


def share(rises: np.ndarray) -> np.ndarray:
    """(…, L) -> (…): first/(first + last) of the mean dL of the first and of the last third of the layers, each at least 0.

    R/(1 + R) with R their ratio, in [0, 1]. nan for fewer than 3 layers, or where neither third loses anything.
    """
    layers = rises.shape[-1]
    if layers < LAYERS:
        return np.full(rises.shape[:-1], math.nan)
    third = layers // 3
    first, last = (np.maximum(some.mean(-1), 0.0) for some in (rises[..., :third], rises[..., layers - third :]))
    total = first + last
    return np.divide(first, total, out=np.full(total.shape, math.nan), where=total > 0)


def beyond(shifts: np.ndarray) -> np.ndarray:
    """(…, 2, L) -> (…): `spearman` of the first profile less that of the second, in [-2, 2]."""
    both = spearman(shifts)
    return both[..., 0] - both[..., 1]


STATISTICS = {"Spearman": spearman, "share": share}


def _verdicts(found: Sequence[Found], groups: Sequence[np.ndarray], subjects: Sequence[Subject]) -> list[Verdict]:
    seed = subjects[0].seed

    def verdict(claim: str, site: Site, way: Way, name: str, first: int = 0) -> Verdict:
        values = [one.rises[site, way][:, first:] for one in found]
        values = [one[:, ~np.isnan(one).all(0)] for one in values]  # the layers that have this site
        measured, why = trend(values, STATISTICS[name], groups=groups, seed=seed)
        if math.isnan(measured.value) and not why:
            why = "no layer is missed: the loss rises nowhere"
        what = f"{way} of {CALLED[site]}{' without layer 0' if first else ''}"
        if name == "Spearman":
            quantity = f"Spearman(l, dL_l), {what}"
            return Verdict(claim, "S2 6", quantity, measured, most=0.0, null=0.0, against="no trend in depth", why=why)
        if math.isfinite(measured.value):
            value = measured.value
            ratio = f"R = {value / (1 - value):.3g}" if value < 1 else "the last third loses nothing"
            why = "; ".join(filter(None, (ratio, why)))
        quantity = f"R/(1 + R), R = mean dL of the first third / of the last, {what}"
        return Verdict(claim, "S2 6", quantity, measured, least=0.5, null=0.5, against="thirds alike", why=why)

    more, why = trend([one.shifts for one in found], beyond, groups=groups, seed=seed)
    if math.isfinite(more.value):
        why = "; ".join(filter(None, ("the model's and the twin's: " + _trends(found), draws(len(found)), why)))
    return [
        verdict("the earlier a layer, the more the model misses it", "layer", "skip", "Spearman"),
        verdict("the first third of the layers is missed more than the last", "layer", "skip", "share"),
        verdict("the earlier a layer after the first, the more the model misses it", "layer", "skip", "Spearman", 1),
        verdict("after the first layer too, the first third is missed more than the last", "layer", "skip", "share", 1),
        verdict("early layers are more fragile to their mean update", "layer", "mean", "Spearman"),
        verdict("early layers are more fragile to another prompt's update", "layer", "resample", "Spearman"),
        verdict(
            "after the first layer too, early ones are more fragile to another prompt's update", "layer", "resample", "share", 1
        ),
        verdict("the earlier its layer, the more attention is missed", "attn", "skip", "Spearman"),
        verdict("the earlier its layer, the more the FFN is missed", "ffn", "skip", "Spearman"),
        Verdict(
            "that early layers are fragile is the work of training",
            "S2 6",
            "Spearman(l, KL_l), skip of a whole layer, less that of the untrained twin",
            more,
            most=0.0,
            null=0.0,
            against="the untrained twin",
            why=why,
        ),
    ]


def _trends(found: Sequence[Found]) -> str:
    """Spearman of the mean KL_l, of the models and of their twins."""
    return ", ".join(f"{one:.3g}" for one in np.mean([spearman(one.shifts.mean(0)) for one in found], axis=0))


def _chart(subjects: Sequence[Subject], found: Sequence[Found], groups: Sequence[np.ndarray]) -> Curves:
    """Mean over models of dL_l; of one model, with its interval."""
    rows = []
    for site in SITES:
        for way in WAYS:
            for layer in range(max(one.rises[site, way].shape[1] for one in found)):
                have = [k for k, one in enumerate(found) if layer < one.rises[site, way].shape[1]]
                columns = [found[k].rises[site, way][:, layer] for k in have]
                if any(np.isnan(column).all() for column in columns):
                    continue
                one = over_models(columns, groups=[groups[k] for k in have], seed=subjects[0].seed)
                rows.append((CALLED[site], way, layer, one.value, one.low, one.high))
    unit = subjects[0].loaded.config.training.objective.unit
    caption = (
        "Rise of the loss when the update of a layer is left out (skip), is its mean, or is that of another prompt (resample)."
    )
    frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y", "low", "high"])
    return Curves(frame, caption, "layer", f"rise of the loss, {unit}")


def _shift(found: Sequence[Found]) -> Curves:
    """Mean over models of KL_l, and of their twins'."""
    rows = []
    for k, line in enumerate(("trained", "untrained twin")):
        for one in found:
            rows += [("the prediction", line, layer, y) for layer, y in enumerate(one.shifts[:, k].mean(0))]
    frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y"])
    frame = frame.groupby(["panel", "line", "x"], sort=False, as_index=False).mean()
    return Curves(frame, "How far the prediction moves when a whole layer is skipped.", "layer", "KL(p || p without), nats")


def _note(subjects: Sequence[Subject]) -> str:
    width = subjects[0].model.settings.dim
    said = [
        f"S2 says that late layers of wide models are robust, and not how wide that is; here d = {width}.",
        "A skipped first layer leaves later ones with states they never saw; the mean and another prompt's update do so less.",
        "Later layers meet a stream that has grown, so that an update of one size turns it less: that late layers are robust "
        "may be true of any sum.",
        "Another prompt's last updates say what that prompt would go on with: a late layer is then not missed, it misleads.",
    ]
    if len({type(subject.loaded.config.training.objective) for subject in subjects}) > 1:
        said.append("The models have several objectives, and their losses several units.")
    return "\n".join(said)
