"""Is the flow of a cloud optimal transport, and does attention bear the fingerprint of a gradient?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from emformer import parts, surgery
from emformer.block import Block
from emformer.geometry import integrability, transport
from emformer.geometry.integrability import Field
from emformer.geometry.spectra import wide
from emformer.intervals import Interval, over_models
from emformer.model import Emformer
from emformer.norms import Norm
from emformer.observables.fields import corner, of, space_of
from emformer.parts import UserError
from emformer.studies.lines import BAND, band
from emformer.studies.subjects import Subject, Tell, part_of
from emformer.theory.outcome import Chart, Curves
from emformer.trajectory import Trajectory, capture
from emformer.verdicts import Findings, Verdict

FINGERPRINT = "S0 Wasserstein gradient flow, math K"
TRANSPORT = "S0 flow in Wasserstein space, math D.8"
GRADIENT = 0.01  # omega up to which a field counts as a gradient: ours
BROKEN = 1e-6  # omega of the gradient corner from which the instrument does not work
OPTIMAL = 0.99  # W2 over the identity's cost from which a step counts as optimal transport: ours
LEAST = 0.001  # of a difference that is one: ours
APART = 100_003  # seeds between models, whose prompts have one each
AT_ONCE = 8  # probes, as so many copies of a cloud


@dataclass(frozen=True)
class Flow(parts.Study):
    """Whether a layer's move is optimal transport, and how near its attention is to a gradient: math D.8, E.3, K.

    *Fingerprint*: omega = |(J - J^T)/2|^2/|J|^2 of the field that attention makes on the unit directions of what it reads (0 a
    gradient, 1/2 a random Jacobian), and R^2 = cos^2(field, grad E) with the layer's own energy, each against the same layer
    with its spectra and random singular vectors, others for each prompt. Supported where omega is below that control, and R^2
    above it. R^2 needs one form M: positions that turn queries and keys make it many, and it is then undefined. The gradient
    corner of each layer, which has no positions, must give omega = 0; where it does not, the instrument is broken, and where no
    layer has one it is not proven: nothing is claimed then. Means over layers.

    *Transport*: W2 of a step over the cost of every token going to its own image. In many dimensions small steps are optimal for
    random weights as well: a check, no discovery. The path of the cloud against a random walk of its own W2 steps. First tokens
    are left out here. Cost: 12 `probes` calls of the field a prompt and layer.

    Args:
        probes: random directions a prompt and layer for omega, at least 2.
    """

    name: ClassVar[str] = "flow"
    title: ClassVar[str] = "is the flow optimal transport, with the fingerprint of a gradient flow?"
    prompts: ClassVar[int] = 8

    probes: int = 32

    @classmethod
    def examples(cls) -> Sequence[Flow]:
        return [cls(probes=2)]

    def __post_init__(self) -> None:
        if self.probes < 2:
            raise UserError(f"flow: probes is {self.probes}; choose at least 2 random directions.")

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        for subject in subjects:
            if subject.tokens.shape[1] < 3:
                raise UserError("flow: a cloud of fewer than two tokens beside the first has no shape; choose a larger --length.")
        found = []
        for k, subject in enumerate(subjects):
            part = part_of(tell, k / len(subjects), (k + 1) / len(subjects))
            found.append(_measured(subject, self.probes, subject.seed + APART * k, part))
        groups = [subject.groups.cpu().numpy() for subject in subjects]
        charts = _charts([subject.name for subject in subjects], found, groups)
        return Findings(_verdicts(found, groups, subjects[0].seed), charts, _note(subjects))


Values = Mapping[str, np.ndarray]  # (P, layers or steps), or (P,)


def field(block: Block) -> Field:
    """The attention of a block as a map of directions theta (B, N, d) to updates, in float64, before the placement shapes them.

    What is read is Gamma Pi (sqrt(d) theta) + b with a norm (math A.6), sqrt(d) theta on a sphere, theta itself in R^d. Positions
    are a part of the field, unlike in `emformer.observables.fields`, which has the energies.
    """
    attention = deepcopy(block.attention).double().requires_grad_(False)
    dim, ambient = attention.form.dim, space_of(block) == "ambient"
    scale, norm = 1.0 if ambient else math.sqrt(dim), block.read_attn
    gain, bias = norm.affine(dim) if isinstance(norm, Norm) else (None, None)

    def velocity(theta: Tensor) -> Tensor:
        y = scale * theta
        if gain is not None and bias is not None:
            y = y @ gain.detach().to(y).mT + bias.detach().to(y)
        i = torch.arange(y.shape[1], device=y.device)
        return attention.lift(attention.mix(attention.weights(y, i), y))

    return velocity


def _measured(subject: Subject, probes: int, first: int, tell: Tell) -> Values:
    rows: list[dict[str, np.ndarray]] = []
    count = len(subject.tokens)
    twin = subject.untrained()
    for p in range(count):
        tell(p / count, f"{subject.name}, prompt {p + 1} of {count}")
        tokens, seed = subject.tokens[p : p + 1], first + p
        trajectory = capture(subject.model, tokens)
        row = _moved(trajectory, "")
        row |= _moved(capture(twin, tokens), "untrained ")
        row |= _fields(trajectory, subject.model, "", probes, seed)
        row |= _fields(trajectory, surgery.shuffle(subject.model, seed=seed), "shuffled ", probes, seed)
        row |= _fields(capture(twin, tokens), twin, "untrained ", probes, seed)
        row["corner"] = _corners(trajectory, seed)
        rows.append(row)
    tell(1.0, subject.name)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _moved(trajectory: Trajectory, who: str) -> dict[str, np.ndarray]:
    """W2 over the identity's cost by step, and the squared geodesic ratio of the cloud's path less that of a random walk."""
    clouds = [x[:, 1:] for x in trajectory.clouds]
    hops = [transport.wasserstein(before, after) for before, after in pairwise(clouds)]
    w2 = np.array([float(hop.w2) for hop in hops])
    chord, length = float(transport.wasserstein(clouds[0], clouds[-1]).w2), w2.sum()
    straight = (chord**2 - (w2**2).sum()) / length**2 if length > 0 else math.nan
    return {f"{who}ratio": np.array([float(hop.ratio) for hop in hops]), f"{who}geodesic": np.array(straight)}


def _fields(trajectory: Trajectory, model: Emformer, who: str, probes: int, seed: int) -> dict[str, np.ndarray]:
    """omega and R^2 by attention step, of the model's layers at the trajectory's clouds; nan where there is none."""
    omega, r2 = [], []
    for k in trajectory.attentions:
        step = trajectory.steps[k]
        block, x = model.layer(step.layer), wide(step.before)
        space = space_of(block)
        if block.attention.kernel.differentiable:
            omega.append(float(integrability.estimated_defect(field(block), x, space, probes, seed, AT_ONCE).value))
        else:
            omega.append(math.nan)
        one = of(block)
        if one is None:
            r2.append(math.nan)
        else:
            r2.append(float(integrability.alignment(one.field(one.place(x)), one.gradient(x), x, space).detach()))
    return {f"{who}omega": np.array(omega), f"{who}r2": np.array(r2)}


def _corners(trajectory: Trajectory, seed: int) -> np.ndarray:
    """omega of the gradient flow that is nearest to each layer, 0 but for rounding; nan where a layer has no form even without
    its positions."""
    found = []
    for k in trajectory.attentions:
        block, x = deepcopy(trajectory.block(k)), wide(trajectory.steps[k].before)
        block.attention.positions = nn.ModuleList()
        one = of(block)
        if one is None:
            found.append(math.nan)
        else:
            found.append(float(integrability.estimated_defect(corner(one, x).field, x, one.space, 2, seed).value))
    return np.array(found)


# ----------------------------------------------------------------------------------------------------------------------


def _verdicts(found: Sequence[Values], groups: Sequence[np.ndarray], seed: int) -> list[Verdict]:
    def measured(values: list[np.ndarray]) -> Interval:
        return over_models(values, groups=groups, seed=seed)

    def mean(key: str) -> list[np.ndarray]:
        """(P,) of each model, over layers."""
        return [one[key].mean(1) for one in found]

    def total(key: str) -> float:
        return float(np.mean([one[key].mean() for one in found]))

    def differences(key: str) -> list[np.ndarray]:
        return [one - other for one, other in zip(mean(key), mean(f"shuffled {key}"), strict=True)]

    corners = np.concatenate([one["corner"].ravel() for one in found])
    worst = float(corners[~np.isnan(corners)].max(initial=-math.inf))
    broken = f"the instrument reads {worst:.1e} of a gradient flow, and not 0" if worst > BROKEN else ""
    if math.isinf(worst):
        broken = "no layer has a form of which a gradient flow could prove the instrument"
    dense = "a layer's kernel has no derivative" if math.isnan(total("omega")) else broken
    ours = f"that an omega of {GRADIENT} is a gradient is ours"
    form = "positions or the kernel leave no single form M, and no energy, in some layer" if math.isnan(total("r2")) else broken
    control = "the same spectra with random singular vectors"
    apart = Interval(math.nan, math.nan, math.nan, 0, "prompts")
    return [
        Verdict(
            "attention is nearer to a gradient flow than with random singular vectors",
            FINGERPRINT,
            "omega - omega of the shuffled layers, mean over layers",
            apart if broken else measured(differences("omega")),
            most=-LEAST,
            null=0.0,
            against=control,
            why=dense,
        ),
        Verdict(
            "attention climbs its energy more than with random singular vectors",
            FINGERPRINT,
            "R^2 - R^2 of the shuffled layers, mean over layers",
            apart if broken else measured(differences("r2")),
            least=LEAST,
            null=0.0,
            against=control,
            why=form,
        ),
        Verdict(
            "attention is a gradient flow",
            FINGERPRINT,
            "omega, mean over layers",
            apart if broken else measured(mean("omega")),
            most=GRADIENT,
            null=total("shuffled omega"),
            against=control,
            why=dense or ours,
        ),
        Verdict(
            "a sublayer moves the cloud by optimal transport",
            TRANSPORT,
            "W2 of a step / cost of every token going to its own image, mean over steps",
            measured(mean("ratio")),
            least=OPTIMAL,
            null=total("untrained ratio"),
            against="the untrained twin",
            why=f"where steps are small for the distances of tokens that is so for any field; that {OPTIMAL} is optimal is ours",
        ),
        Verdict(
            "the cloud's path in Wasserstein space is straighter than a random walk",
            TRANSPORT,
            "(W2(first, last)^2 - sum W2^2)/(sum W2)^2",
            measured([one["geodesic"] for one in found]),
            least=LEAST,
            null=total("untrained geodesic"),
            against="the untrained twin",
        ),
    ]


def _charts(names: Sequence[str], found: Sequence[Values], groups: Sequence[np.ndarray]) -> dict[str, Chart]:
    captions = {
        "omega": ("How far attention is from a gradient, by layer: 0 a gradient, 1/2 a random Jacobian.", "layer"),
        "r2": ("How far attention follows the gradient of its layer's energy, by layer.", "layer"),
        "ratio": ("W2 of a step over the cost of every token going to its own image, by step.", "step"),
    }
    charts: dict[str, Chart] = {}
    for key, (caption, x) in captions.items():
        rows = []
        for name, one, group in zip(names, found, groups, strict=True):
            for who, line in (("", name), ("shuffled ", f"shuffled {name}"), ("untrained ", f"untrained {name}")):
                if f"{who}{key}" in one:
                    rows += band(key, line, one[f"{who}{key}"], group)
        charts[key] = Curves(pd.DataFrame(rows, columns=BAND), caption, x, key)
    return charts


def _note(subjects: Sequence[Subject]) -> str:
    told = "The FFN is no part of the field, and shuffled layers are looked at where the trained model's clouds are."
    turned = [one.name for one in subjects if of(one.model.layer(0)) is None]
    if turned:
        told += f" {', '.join(turned)}: R^2 is not there, as the score is no single form."
    return told
