"""Does the last point carry the prediction, and how long does it need the others?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from emformer import parts
from emformer.geometry.spectra import wide
from emformer.intervals import over_models
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.studies.lines import BAND, band
from emformer.studies.subjects import AT_ONCE, Subject, Tell, part_of
from emformer.theory.outcome import Curves
from emformer.trajectory import capture
from emformer.verdicts import Findings, Verdict

SOURCE = "S0 readout"
ROUNDING = 1e-5  # of a loss in float32, nats
NEEDED = 0.05  # share of what the others are worth below which the last point needs them no more: ours


@dataclass(frozen=True)
class Readout(parts.Study):
    """What the last point of a prompt knows of the next token, beside the other points, and from which layer on it is on its own.

    The last token of a prompt is the target, and the one before it the last point, at place e. Losses are in nats, of logits read
    off a state by the closing norm and the unembedding. *Points*: the target read off the state at e - k; each point is trained
    to tell its own next token, so that k = 0 should win, and the question is by how much. *Identity*: with the last state kept
    and all others exchanged after the last layer, nothing changes: the unembedding reads one token. *Cut*: from layer l on the
    last point sees itself and the first token alone, which may be a sink; what the loss rises by is what the others are worth
    from there on. *Exchanged*: from layer l on the others are another prompt's. An untrained twin has nothing to lose. Causal
    models of the next token only. Cost: L^2/2 layers for every prompt, half a minute for the default.

    Args:
        points: how many points before the last one are read, at least 1.
    """

    name: ClassVar[str] = "readout"
    title: ClassVar[str] = "does the last point carry the prediction, and when is it on its own?"
    prompts: ClassVar[int] = 256

    points: int = 16

    @classmethod
    def examples(cls) -> Sequence[Readout]:
        return [cls(points=3)]

    def __post_init__(self) -> None:
        if self.points < 1:
            raise UserError(f"readout: points is {self.points}; choose at least 1 point before the last one.")

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        for subject in subjects:
            _check(subject)
        found: list[tuple[Losses, Losses]] = []
        for k, subject in enumerate(subjects):
            half = (k + 0.5) / len(subjects)
            trained = _measured(subject, subject.model, self.points, part_of(tell, k / len(subjects), half))
            twin = _measured(subject, subject.untrained(), self.points, part_of(tell, half, (k + 1) / len(subjects)))
            found.append((trained, twin))
        groups, seed = [subject.groups.cpu().numpy() for subject in subjects], subjects[0].seed

        def verdict(claim: str, quantity: str, values: list[np.ndarray], nulls: list[float]) -> Verdict:
            values = [one if one.ndim > 1 else one[:, None] for one in values]
            measured = over_models(values, _least, groups=groups, seed=seed)
            null = float(np.mean(nulls))
            return Verdict(claim, SOURCE, quantity, measured, least=ROUNDING, null=null, against="the untrained twin")

        beside = [one.points[:, 1:] - one.points[:, :1] for one, _ in found]
        needs = [one.cut[:, :-1] - one.cut[:, 1:] for one, _ in found]
        worth = [one.cut[:, 0] - one.cut[:, -1] for one, _ in found]
        last = [one.cut[:, -2] - one.cut[:, -1] for one, _ in found]
        changed = over_models([one.identity for one, _ in found], groups=groups, seed=seed)
        verdicts = [
            verdict(
                "the last point tells the next token better than any other point of the prompt",
                "loss read off the best other point - off the last point, nats",
                beside,
                [float(_least((twin.points[:, 1:] - twin.points[:, :1]).mean(0)[None])[0]) for _, twin in found],
            ),
            verdict(
                "the last point takes what it tells from the others",
                "loss cut off from the others in all layers - loss, nats",
                worth,
                [float((twin.cut[:, 0] - twin.cut[:, -1]).mean()) for _, twin in found],
            ),
            verdict(
                "it needs the others up to the last layer",
                "loss cut off in the last layer - loss, nats",
                last,
                [float((twin.cut[:, -2] - twin.cut[:, -1]).mean()) for _, twin in found],
            ),
            Verdict(
                "after the last layer the prediction is read off the last point alone",
                SOURCE,
                "change of the loss where all other last states are another prompt's, nats",
                changed,
                most=ROUNDING,
                null=0.0,
                against="arithmetic",
                why="an identity, as the unembedding reads one token",
                check=True,
            ),
        ]
        if needs[0].shape[1] > 1:
            verdicts.insert(
                3,
                verdict(
                    "the last point draws on the others in every layer",
                    "rise of the loss where it is cut off a layer earlier, of the layer where it is least, nats",
                    needs,
                    [float(_least((twin.cut[:, :-1] - twin.cut[:, 1:]).mean(0)[None])[0]) for _, twin in found],
                ),
            )
        names = [subject.name for subject in subjects]
        note = " ".join(_alone(name, one.cut.mean(0)) for name, (one, _) in zip(names, found, strict=True))
        return Findings(verdicts, _charts(names, found, groups), note)


class Losses(NamedTuple):
    """Of one model, in nats by prompt: read off the points e, e - 1 … (P, K + 1); cut off from layer 0, 1 … L on, L being never
    (P, L + 1); with another prompt's others from layer 0 … L on (P, L + 1); by layer through the lens (P, L + 1); `identity`
    (P,): |change| where the others are exchanged after the last layer."""

    points: np.ndarray
    cut: np.ndarray
    exchanged: np.ndarray
    lens: np.ndarray
    identity: np.ndarray


def _check(subject: Subject) -> None:
    model = subject.model
    if not subject.loaded.config.training.objective.covers_text:
        raise UserError(f"readout: {subject.name} was not trained to tell the next token; take a causal model that was.")
    for layer in range(model.settings.depth):
        attention = model.layer(layer).attention
        if not (attention.mask.causal and attention.kernel.rowwise):
            raise UserError(f"readout: layer {layer} of {subject.name} is not causal: a point would see its own target.")
    if subject.tokens.shape[1] < 3:
        raise UserError("readout: a prompt needs a target, a last point and one beside it; choose a --length of 3 or more.")


@torch.no_grad()
def _measured(subject: Subject, model: Emformer, points: int, tell: Tell) -> Losses:
    tokens, count = subject.tokens, len(subject.tokens)
    lots = list(subject.batches(AT_ONCE))
    rows = []
    for k, some in enumerate(lots):
        tell(k / len(lots), f"prompts {some.start + 1} to {some.stop}")
        index = torch.arange(some.start, some.stop, device=tokens.device)
        rows.append(_lot(model, tokens[some], tokens[(index + 1) % count, :-1], points))
    return Losses(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def _lot(model: Emformer, tokens: Tensor, others: Tensor, points: int) -> tuple[np.ndarray, ...]:
    inputs, target = tokens[:, :-1], tokens[:, -1]
    own, other = capture(model, inputs), capture(model, others)
    depth, e = model.settings.depth, inputs.shape[1] - 1
    starts = [next(k for k, step in enumerate(own.steps) if step.layer == layer) for layer in range(depth)]
    ends = [own.steps[k].before for k in starts] + [own.steps[-1].after]

    def loss(state: Tensor) -> Tensor:
        """(B,) of the target, read off states (B, d) by themselves."""
        return functional.cross_entropy(wide(model.unembed(state.unsqueeze(1))[:, 0]), target, reduction="none")

    def onward(x: Tensor, i: Tensor, layer: int) -> Tensor:
        """The last row of the states x (B, n, d) at places i, after the layers from this one on."""
        for one in range(layer, depth):
            for step in model.layer(one).flow(x, i, None, one):
                x = step.after
        return x[:, -1]

    places = torch.arange(e + 1, device=tokens.device)
    pair = places[[0, e]]  # by themselves, as a prompt of two tokens that stand where they stood
    cut = [onward(ends[layer][:, pair], pair, layer) for layer in range(depth)] + [ends[-1][:, -1]]
    aliens = [other.steps[k].before for k in starts] + [other.steps[-1].after]
    mixed = [torch.cat([alien[:, :-1], mine[:, -1:]], 1) for alien, mine in zip(aliens, ends, strict=True)]
    exchanged = [onward(x, places, layer) for layer, x in enumerate(mixed)]
    back = range(min(points, e) + 1)
    table = [
        torch.stack([loss(ends[-1][:, e - k]) for k in back], 1),
        torch.stack([loss(x) for x in cut], 1),
        torch.stack([loss(x) for x in exchanged], 1),
        torch.stack([loss(x[:, -1]) for x in ends], 1),
    ]
    whole = functional.cross_entropy(wide(model.unembed(mixed[-1])[:, -1]), target, reduction="none")
    table.append((whole - functional.cross_entropy(wide(model(inputs)[:, -1]), target, reduction="none")).abs())
    return tuple(values.cpu().numpy() for values in table)


def _least(means: np.ndarray) -> np.ndarray:
    """The smallest column of each row."""
    return means.min(1)


def _alone(name: str, cut: np.ndarray) -> str:
    """From which layer on the last point needs the others no more; L where it needs them to the end."""
    worth = cut - cut[-1]
    if not worth[0] > 0:
        return f"{name}: the others are worth nothing to the last point."
    layer = int(np.flatnonzero(worth <= NEEDED * worth[0])[0])
    told = (
        "in all layers" if layer == len(cut) - 1 else f"before layer {layer}, and from there on for less than {NEEDED:.0%} of it"
    )
    losses = ", ".join(f"{one:.2f}" for one in worth)
    return f"{name}: the last point needs the others {told}; cut off from each layer on it loses {losses} nats."


def _charts(names: Sequence[str], found: Sequence[tuple[Losses, Losses]], groups: Sequence[np.ndarray]) -> dict[str, Curves]:
    points, layers = [], []
    for name, (one, twin), group in zip(names, found, groups, strict=True):
        for line, losses in ((name, one), (f"untrained {name}", twin)):
            points += band("next token", line, losses.points, group)
        for panel, kind in (
            ("cut off from layer", "cut"),
            ("others exchanged from layer", "exchanged"),
            ("read at layer", "lens"),
        ):
            for line, losses in ((name, one), (f"untrained {name}", twin)):
                layers += band(panel, line, getattr(losses, kind), group)
    return {
        "layers": Curves(
            pd.DataFrame(layers, columns=BAND),
            "Loss of the next token where the last point is cut off from the others, or reads another prompt's, from this layer "
            "on (the last number: never), and by the logit lens.",
            "layer",
            "nats",
        ),
        "points": Curves(
            pd.DataFrame(points, columns=BAND),
            "Loss of the token after the last point, read off the point so many tokens before it, in the last layer.",
            "tokens before the last point",
            "nats",
        ),
    }
