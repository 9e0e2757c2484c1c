"""Family "wgf": how far attention is from a gradient flow, and whether the cloud climbs the energy that it would climb."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from emformer import parts
from emformer.block import Block
from emformer.diagnostics import Effective, effective
from emformer.geometry import integrability, paths
from emformer.geometry.integrability import Field, Space
from emformer.geometry.spectra import wide
from emformer.kernels.base import scores
from emformer.masks import visible
from emformer.norms import Norm
from emformer.observables.base import Moments, Observation, Row
from emformer.observables.energy import temperature
from emformer.parts import UserError
from emformer.placements import Retraction
from emformer.trajectory import Trajectory

ROUNDING = {torch.float64: 1e-12}  # of log E, by type of the clouds
HALF_AND_FLOAT = 1e-6
AT_ONCE = 16  # probes, as so many copies of a cloud

Where = tuple[int | None, str | None, str | None]


@dataclass(frozen=True)
class GradientFlow(parts.Observable):
    """Every attention step as a field on the unit directions theta of what it reads, beside its own energy.

    The energy of a layer is E = sum_h sum_ij exp(beta theta_i^T d S_h theta_j), S_h the symmetric part of the effective M_h: the
    one that attention climbs if M is symmetric, F = c M, the mask full and the weights not normalised. The field is the layer's
    update with effective operators, before the placement shapes it; the FFN is left out. theta lies in the plane of mean 0
    where the norm removes the mean; layers that read without a norm are told in R^d at the cloud itself (param "ambient").

    There are rows for layers without positions only, whose kernel can be differentiated and reads nothing but the score: RoPE
    makes M a family of forms, a key norm makes the score no form. Cost: 4 `probes` calls of the field a prompt and layer, each
    H N d (2 d + 2 N) in float64: seconds. Derivatives go through whole patterns: where the H N^2 weights of one prompt are beyond
    the trajectory's budget, everything is undefined and counted as dropped. Source: math E.3, E.4, K.

    Args:
        prompts: how many are looked at, the first ones.
        probes: random directions a prompt, for omega.
        seed: of the probes.
    """

    prompts: int = 8
    probes: int = 64
    seed: int = 0

    family: ClassVar[str] = "wgf"
    keys: ClassVar[Mapping[str, str]] = {
        "wgf.omega": "|(J - J^T)/2|^2/|J|^2 of the field's Jacobian; [0, 1]; 0 a gradient; null .5; param 'z': each velocity "
        "times its partition sum, which undoes softmax (one head)",
        "wgf.r2": "cos^2(field, grad E) over the cloud; [0, 1]; null 1/(N (d - 1)); param 'best': best mixture of heads",
        "wgf.viol": "share of prompts in which a step lowers E; [0, 1]; null .5; param 'fixed': share of all steps that lower "
        "the energy of the mean form",
        "wgf.tv_ratio": "sum of the falls of log E over the sum of its changes, over prompts; [0, 1]; null .5; param 'fixed': of "
        "the energy of the mean form, over depth",
        "wgf.dissip_slope": "slope of the change of log E on <grad log E, step>, over prompts; 1 for small steps",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.probes < 1:
            raise UserError(f"GradientFlow: prompts is {self.prompts} and probes {self.probes}; choose at least 1 of each.")

    def begin(self) -> Observation:
        return _GradientFlow(self.prompts, self.probes, self.seed)


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


@torch.no_grad()
def layer(trajectory: Trajectory, k: int) -> Layer | None:
    """Step k as a field on clouds (B, N, d) in float64, differentiable in either mode; None where there is none."""
    block = trajectory.block(k)
    if not _has_field(block):
        return None
    kernel = block.attention.kernel
    told = effective(block)
    space, dim = _space(block), told.form.shape[-1]
    scale = 1.0 if space == "ambient" else dim**0.5
    beta = temperature(kernel)
    field = _field(block, told, scale)
    weighted = None if beta is None or len(told.form) > 1 else _weighted(trajectory, k, field, told, scale, beta)
    symmetric = scale**2 * (told.form + told.form.mT) / 2
    return Layer(space, field, weighted, symmetric, getattr(kernel, "beta", 1.0))


class _GradientFlow(Observation):
    def __init__(self, prompts: int, probes: int, seed: int):
        self._left, self._probes, self._seed = prompts, probes, seed
        self._moments = Moments()
        self._errors: dict[Where, list[float]] = {}
        self._changes: dict[Where, list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        for part in trajectory.lots():
            if self._left:
                self._take(part)

    def _take(self, trajectory: Trajectory) -> None:
        """A few prompts, whose patterns can be held."""
        count = min(self._left, trajectory.prompts)
        known = [k for k in trajectory.attentions if _has_field(trajectory.block(k))]
        if any(_size(trajectory, k) > trajectory.budget for k in known):
            self._undefined(trajectory, known, count)
        else:
            self._look(trajectory, count)
        self._left -= count
        self._seed += count

    def _undefined(self, trajectory: Trajectory, known: list[int], count: int) -> None:
        nothing = torch.full((count,), torch.nan, dtype=torch.float64)
        for k in known:
            step, block = trajectory.steps[k], trajectory.block(k)
            at, param = (step.layer, step.point), "ambient" if _space(block) == "ambient" else None
            climbs = param if step.ffn is None else _joined("parallel", param)
            self._moments.add(nothing, *at, "wgf.omega", param=param, null=0.5)
            self._moments.add(nothing, *at, "wgf.r2", param=param)
            self._moments.add(nothing, *at, "wgf.viol", param=climbs, null=0.5)
            self._changes.setdefault((*at, climbs), []).append((nothing, nothing))

    def _look(self, trajectory: Trajectory, count: int) -> None:
        layers = {k: layer(trajectory, k) for k in trajectory.attentions}
        for k, one in layers.items():
            if one is not None:
                self._field(trajectory, k, one, count)
                self._climb(trajectory, k, one, count)
        known = [one for one in layers.values() if one is not None]
        if known and len(known) == len(layers) and len({one.space for one in known}) == 1:
            self._depth(trajectory, known, count)

    def _field(self, trajectory: Trajectory, k: int, one: Layer, count: int) -> None:
        step = trajectory.steps[k]
        at, x = (step.layer, step.point), wide(step.before[:count])
        probes = min(AT_ONCE, trajectory.budget // _size(trajectory, k))
        for field, param in ((one.field, one.param), (one.weighted, _joined("z", one.param))):
            if field is None:
                continue
            # prompt by prompt, so that what a prompt's probes are does not hang on the prompts beside it
            found = [
                integrability.estimated_defect(field, some, one.space, self._probes, self._seed + b, probes)
                for b, some in enumerate(x.split(1))
            ]
            self._moments.add(torch.cat([each.value for each in found]), *at, "wgf.omega", param=param, null=0.5)
            self._errors.setdefault((*at, param), []).extend(float(each.error) for each in found)
        gradients, log_energy = _gradients(one, x)
        share = log_energy.softmax(-1)[..., None, None]
        velocity = one.field(_place(x, one.space))
        freedom = x.shape[1] * (x.shape[2] - {"ambient": 0, "sphere": 1, "centred": 2}[one.space])
        null = 1 / freedom if freedom > 0 else None
        found = integrability.alignment(velocity, (share * gradients).sum(1), x, one.space)
        self._moments.add(found, *at, "wgf.r2", param=one.param, null=null)
        if gradients.shape[1] > 1:
            best = integrability.best_alignment(velocity, gradients, x, one.space)
            self._moments.add(best, *at, "wgf.r2", param=_joined("best", one.param))

    def _climb(self, trajectory: Trajectory, k: int, one: Layer, count: int) -> None:
        step = trajectory.steps[k]
        # of a parallel block the attention's share alone
        after = step.after if step.ffn is None else trajectory.halves(k)[0]
        param = one.param if step.ffn is None else _joined("parallel", one.param)
        x, moved = wide(step.before[:count]), wide(after[:count]) - wide(step.before[:count])
        gradients, log_energy = _gradients(one, x)
        gradient = (log_energy.softmax(-1)[..., None, None] * gradients).sum(1)
        speed = moved
        if one.space != "ambient":
            speed = moved * paths.split(x, moved, one.space == "centred").mobility.unsqueeze(-1)
        predicted = (gradient * speed).sum((-2, -1))
        change = _total(one, wide(after[:count])) - log_energy.logsumexp(-1)
        viol = integrability.violations(change, _rounding(step.before))
        self._moments.add(viol, step.layer, step.point, "wgf.viol", param=param, null=0.5)
        self._changes.setdefault((step.layer, step.point, param), []).append((change.cpu(), predicted.cpu()))

    def _depth(self, trajectory: Trajectory, known: list[Layer], count: int) -> None:
        """One energy for all layers, of the mean form over layers and heads, along all states."""
        mean = torch.stack([one.beta * one.forms.mean(0) for one in known]).mean(0, keepdim=True)
        fixed = known[0]._replace(forms=mean, beta=1.0)
        change = torch.stack([_total(fixed, wide(x[:count])) for x in trajectory.clouds]).diff(dim=0)
        falls = integrability.violations(change, _rounding(trajectory.clouds[0])).mean(0)
        self._moments.add(falls, None, None, "wgf.viol", param=_joined("fixed", fixed.param), null=0.5)
        ratio = integrability.variation_ratio(change)
        self._moments.add(ratio, None, None, "wgf.tv_ratio", param=_joined("fixed", fixed.param), null=0.5)

    def rows(self) -> list[Row]:
        found = []
        for row in self._moments.rows():
            errors = [e for e in self._errors.get((row.layer, row.point, row.param), []) if e == e]
            # between prompts the spread holds the probes' noise too; of one prompt there is that alone
            alone = row.key == "wgf.omega" and row.n_valid == 1 and len(errors) == 1
            found.append(row._replace(se=errors[0]) if alone else row)
        for (layer, point, param), pairs in self._changes.items():
            change, predicted = (torch.cat(values) for values in zip(*pairs, strict=True))
            found.append(_ratio(change)._replace(layer=layer, point=point, param=param))
            slope = integrability.dissipation_slope(change, predicted)
            told = slope.slope if slope.slope == slope.slope else None
            error = slope.error if slope.error == slope.error else None
            row = Row(layer, point, "wgf.dissip_slope", told, se=error, n_valid=slope.n_valid, n_dropped=slope.n_dropped)
            found.append(row._replace(param=param))
        return found


def _has_field(block: Block) -> bool:
    kernel = block.attention.kernel
    return not (len(block.attention.positions) or kernel.reads_factors or not kernel.differentiable)


def _size(trajectory: Trajectory, k: int) -> int:
    """Weights of one prompt."""
    return trajectory.block(k).attention.form.heads * trajectory.steps[k].before.shape[1] ** 2


def _space(block: Block) -> Space:
    """Where the directions live that this block's attention reads."""
    if isinstance(block.read_attn, Norm):
        return "centred" if block.read_attn.centred else "sphere"
    return "sphere" if isinstance(block.place_attn, Retraction) else "ambient"


def _place(x: Tensor, space: Space) -> Tensor:
    return x if space == "ambient" else paths.direction(x, space == "centred")


def _field(block: Block, told: Effective, scale: float) -> Field:
    """D(scale theta) of the effective operators, with all that the layer adds: F m - (1 - mass) (shift - F value) + g."""
    attention = block.attention
    kernel: Any = copy.deepcopy(attention.kernel).to(told.form)
    lost = -told.shift
    if kernel.value is not None:
        lost = lost + (wide(attention.content.matrix()) @ kernel.value.unsqueeze(-1)).squeeze(-1)

    def field(theta: Tensor) -> Tensor:
        y = scale * theta
        i = torch.arange(y.shape[1], device=y.device)
        a = kernel.weights(*_factors(y, told), visible(attention.mask, i, len(i)))
        update = torch.einsum("bhnd,hed->bne", a @ y.unsqueeze(1), told.content) + told.drift
        return update if kernel.normalised else update + torch.einsum("bhn,hd->bnd", 1 - a.sum(-1), lost)

    return field


def _weighted(trajectory: Trajectory, k: int, field: Field, told: Effective, scale: float, beta: float) -> Field:
    """The field times Z_i = sum_j e^{beta s_ij} of one head, up to a constant that keeps Z in range."""
    hidden = ~trajectory.visible(k)

    def exponents(theta: Tensor) -> Tensor:
        return (beta * scores(*_factors(scale * theta, told))[:, 0]).masked_fill(hidden, -torch.inf)

    read = wide(trajectory.steps[k].before)
    top = float(exponents(_place(read, _space(trajectory.block(k)))).nan_to_num(-torch.inf).max())
    return lambda theta: (exponents(theta) - top).exp().sum(-1, keepdim=True) * field(theta)


def _factors(y: Tensor, told: Effective) -> tuple[Tensor, Tensor]:
    """(u, v) with s_ij = u_i . v_j for the bare cloud: what is constant along rows is one more coordinate, 1 of every key."""
    queries = torch.einsum("bnd,hde->bhne", y, told.form) + told.functional.unsqueeze(1)
    rows = torch.einsum("bnd,hd->bhn", y, told.query) + told.constant.unsqueeze(-1)
    keys = torch.cat([y, torch.ones_like(y[..., :1])], -1)
    return torch.cat([queries, rows.unsqueeze(-1)], -1), keys.unsqueeze(1)


def _gradients(one: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """grad log E_h (B, H, N, d) and log E_h (B, H)."""
    gradients = integrability.energy_gradient(x, one.forms, one.beta, one.space)
    return gradients, integrability.log_energy(x, one.forms, one.beta, one.space)


def _total(one: Layer, x: Tensor) -> Tensor:
    """log sum_h E_h (B,)."""
    return integrability.log_energy(x, one.forms, one.beta, one.space).logsumexp(-1)


def _ratio(change: Tensor) -> Row:
    """TV-/TV over prompts, with the standard error of a ratio of means."""
    known = change[~change.isnan()]
    ratio, n = float(integrability.variation_ratio(known)), len(known)
    row = Row(None, None, "wgf.tv_ratio", None, n_valid=n, n_dropped=len(change) - n, null=0.5)
    if ratio != ratio:
        return row
    size = known.abs()
    spread = (known.clamp(max=0).abs() - ratio * size).square().sum() / (n * (n - 1)) if n > 1 else None
    return row._replace(mean=ratio, se=None if spread is None else float(spread.sqrt() / size.mean()))


def _rounding(clouds: Tensor) -> float:
    return ROUNDING.get(clouds.dtype, HALF_AND_FLOAT)


def _joined(*words: str | None) -> str | None:
    return " ".join(word for word in words if word is not None) or None
