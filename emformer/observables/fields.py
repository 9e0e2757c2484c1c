"""One attention step as a field on directions, and the energy of its layer: what the family "wgf" looks at, and at which
prompts."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from emformer import parts
from emformer.block import Block
from emformer.diagnostics import Effective, effective
from emformer.geometry import integrability, paths
from emformer.geometry.integrability import Field, Space
from emformer.geometry.spectra import wide
from emformer.kernels import Kernel
from emformer.kernels.base import scores
from emformer.kernels.unnormalised import UnnormalisedKernel
from emformer.masks import Full, visible
from emformer.norms import Norm
from emformer.observables.base import Observation
from emformer.observables.energy import temperature
from emformer.placements import Retraction
from emformer.trajectory import Trajectory

ROUNDING = {torch.float64: 1e-12}  # of log E, by type of the clouds
HALF_AND_FLOAT = 1e-6


class Layer(NamedTuple):
    """One attention step as a field: what it is, where it is taken, and its own energy.

    `field` maps theta to velocities; `forms` (H, d, d) and `beta` make the energy; `weighted` is the field times the partition
    sums of the queries, or None where there is not one softmax.
    """

    space: Space
    field: Field
    weighted: Field | None
    forms: Tensor
    beta: float

    @property
    def param(self) -> str | None:
        return "ambient" if self.space == "ambient" else None

    def freedom(self, x: Tensor) -> int:
        """The dimension of the space that clouds (B, N, d) move in, N (d - 1) on the sphere; 1 over it is the null of R^2."""
        return x.shape[1] * (x.shape[2] - {"ambient": 0, "sphere": 1, "centred": 2}[self.space])

    def null(self, x: Tensor) -> float | None:
        """Of R^2; None where clouds cannot move."""
        freedom = self.freedom(x)
        return 1 / freedom if freedom > 0 else None

    def place(self, x: Tensor) -> Tensor:
        """theta of the cloud x."""
        return x if self.space == "ambient" else paths.direction(x, self.space == "centred")

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """grad log E_h (B, H, N, d) and log E_h (B, H) of the cloud x."""
        log_energy = integrability.log_energy(x, self.forms, self.beta, self.space)
        return integrability.energy_gradient(x, self.forms, self.beta, self.space), log_energy

    def gradient(self, x: Tensor) -> Tensor:
        """grad log sum_h E_h (B, N, d)."""
        gradients, log_energy = self.gradients(x)
        return (log_energy.softmax(-1)[..., None, None] * gradients).sum(1)

    def total(self, x: Tensor) -> Tensor:
        """log sum_h E_h (B,)."""
        return integrability.log_energy(x, self.forms, self.beta, self.space).logsumexp(-1)


@torch.no_grad()
def layer(trajectory: Trajectory, k: int) -> Layer | None:
    """Step k as a field on clouds (B, N, d) in float64, differentiable in either mode; None where there is none."""
    block = trajectory.block(k)
    one, beta = of(block), temperature(block.attention.kernel)
    if one is None or beta is None or len(one.forms) > 1:
        return one
    told, scale = effective(block), _scale(one.space, one.forms)
    return one._replace(weighted=_weighted(trajectory, k, one, told, scale, beta))


@torch.no_grad()
def of(block: Block) -> Layer | None:
    """The block's attention as a field, not weighted; None where there is none."""
    if not has_field(block):
        return None
    attention, told, space = block.attention, effective(block), space_of(block)
    scale, kernel = _scale(space, told.form), attention.kernel
    lost = -told.shift
    if kernel.value is not None:
        lost = lost + (wide(attention.content.matrix()) @ wide(kernel.value).unsqueeze(-1)).squeeze(-1)
    field = _field(copy.deepcopy(kernel).to(told.form), attention.mask, told, scale, lost)
    symmetric = scale**2 * (told.form + told.form.mT) / 2
    return Layer(space, field, None, symmetric, getattr(kernel, "beta", 1.0))


@torch.no_grad()
def corner(one: Layer, x: Tensor) -> Layer:
    """The gradient flow that is nearest to a layer at the cloud x (B, N, d): M the positive semidefinite part of its symmetric M,
    F = M, weights e^{beta s}/N of no row, a full mask, no biases. A common factor keeps the weights in range."""
    values, vectors = torch.linalg.eigh(one.forms)
    forms = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
    theta = one.place(x)
    top = float((theta.unsqueeze(1) @ forms * theta.unsqueeze(1)).sum(-1).nan_to_num().max())  # a PSD form is largest at i = j
    nothing = forms.new_zeros(forms.shape[:2])
    told = Effective(forms, nothing, forms, nothing[0], nothing, nothing[:, 0] - top, nothing)
    field = _field(UnnormalisedKernel(one.beta, None), Full(), told, 1.0, nothing)
    return Layer(one.space, field, None, forms, one.beta)


class FirstPrompts(Observation):
    """What looks at so many prompts of a pass, the first ones, a few at a time, whose patterns can be held."""

    def __init__(self, prompts: int):
        self._left, self._before = prompts, 0

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        for part in trajectory.lots():
            count = min(self._left, part.prompts)
            if count:
                self._take(part, count)
            self._left -= count
            self._before += count  # prompts seen so far: the number of the next one

    @abstractmethod
    def _take(self, trajectory: Trajectory, count: int) -> None:
        """The first `count` prompts of the trajectory."""


class WholePatterns(FirstPrompts):
    """The same, through whole patterns: where a prompt's weights are beyond the budget, all is undefined."""

    def _take(self, trajectory: Trajectory, count: int) -> None:
        known = [k for k in trajectory.attentions if has_field(trajectory.block(k))]
        if any(weights_of_one(trajectory, k) > trajectory.budget for k in known):
            nothing = torch.full((count,), torch.nan, dtype=torch.float64)
            for k in known:
                self._undefined(trajectory, k, nothing)
        else:
            self._look(trajectory, known, count)

    @abstractmethod
    def _look(self, trajectory: Trajectory, known: list[int], count: int) -> None:
        """The steps `known` have a field."""

    @abstractmethod
    def _undefined(self, trajectory: Trajectory, k: int, nothing: Tensor) -> None:
        """Add `nothing`, a nan for each prompt, wherever step k would have a number."""


def has_field(block: Block) -> bool:
    kernel = block.attention.kernel
    return not (len(block.attention.positions) or kernel.reads_factors or not kernel.differentiable)


def weights_of_one(trajectory: Trajectory, k: int) -> int:
    """Weights of one prompt."""
    return trajectory.block(k).attention.form.heads * trajectory.steps[k].before.shape[1] ** 2


def space_of(block: Block) -> Space:
    """Where the directions live that this block's attention reads."""
    if isinstance(block.read_attn, Norm):
        return "centred" if block.read_attn.centred else "sphere"
    return "sphere" if isinstance(block.place_attn, Retraction) else "ambient"


def _scale(space: Space, forms: Tensor) -> float:
    """|yhat|, of tokens that are read as directions."""
    return 1.0 if space == "ambient" else forms.shape[-1] ** 0.5


def _field(kernel: Kernel, mask: parts.Mask, told: Effective, scale: float, lost: Tensor) -> Field:
    """D(scale theta) of the effective operators, with all that the layer adds: F m + (1 - mass) lost + g."""

    def field(theta: Tensor) -> Tensor:
        y = scale * theta
        i = torch.arange(y.shape[1], device=y.device)
        a = kernel.weights(*_factors(y, told), visible(mask, i, len(i)))
        update = torch.einsum("bhnd,hed->bne", a @ y.unsqueeze(1), told.content) + told.drift
        return update if kernel.normalised else update + torch.einsum("bhn,hd->bnd", 1 - a.sum(-1), lost)

    return field


def _weighted(trajectory: Trajectory, k: int, one: Layer, told: Effective, scale: float, beta: float) -> Field:
    """The field times Z_i = sum_j e^{beta s_ij} of one head, up to a constant that keeps Z in range."""
    hidden = ~trajectory.visible(k)

    def exponents(theta: Tensor) -> Tensor:
        return (beta * scores(*_factors(scale * theta, told))[:, 0]).masked_fill(hidden, -torch.inf)

    top = float(exponents(one.place(wide(trajectory.steps[k].before))).nan_to_num(-torch.inf).max())
    return lambda theta: (exponents(theta) - top).exp().sum(-1, keepdim=True) * one.field(theta)


def _factors(y: Tensor, told: Effective) -> tuple[Tensor, Tensor]:
    """(u, v) with s_ij = u_i . v_j for the bare cloud: what is constant along rows is one more coordinate, 1 of every key."""
    queries = torch.einsum("bnd,hde->bhne", y, told.form) + told.functional.unsqueeze(1)
    rows = torch.einsum("bnd,hd->bhn", y, told.query) + told.constant.unsqueeze(-1)
    keys = torch.cat([y, torch.ones_like(y[..., :1])], -1)
    return torch.cat([queries, rows.unsqueeze(-1)], -1), keys.unsqueeze(1)


def half(param: str | None) -> float | None:
    """The null of falls, of rows with this param: 1/2, but none in R^d, where energies bend upwards and long steps climb."""
    return None if "ambient" in (param or "").split() else 0.5


def rounding(clouds: Tensor) -> float:
    """Of log E."""
    return ROUNDING.get(clouds.dtype, HALF_AND_FLOAT)


def joined(*words: str | None) -> str | None:
    """A row's `param` of several words."""
    return " ".join(word for word in words if word is not None) or None
