"""Family "wgf": how far attention is from a gradient flow, and whether the cloud climbs the energy that it would climb.

Beside it `emformer.observables.controls` says what the same instrument reads where the answer is known, and
`emformer.observables.landscape` how much the energy changes from layer to layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import integrability, paths
from emformer.geometry.spectra import wide
from emformer.observables.base import Moments, Observation, Row
from emformer.observables.fields import Layer, WholePatterns, half, joined, layer, rounding, space_of, weights_of_one
from emformer.parts import UserError
from emformer.trajectory import Trajectory

AT_ONCE = 16  # probes, as so many copies of a cloud

Where = tuple[int | None, str | None, str | None]

KEYS: Mapping[str, str] = {
    "wgf.omega": "|(J - J^T)/2|^2/|J|^2 of the field's Jacobian; [0, 1]; 0 a gradient; null .5; param 'z': each velocity times "
    "its partition sum, which undoes softmax (one head); controls: 'shuffled' singular vectors, the 'gradient' corner (0)",
    "wgf.r2": "cos^2(field, grad E) over the cloud; [0, 1]; null 1/(N (d - 1)); param 'best': best mixture of heads; controls: "
    "'shuffled' singular vectors, 'random' velocities, the 'gradient' corner (1)",
    "wgf.viol": "share of prompts in which a step lowers E; [0, 1]; null .5, none if 'ambient'; param 'fixed': share of all "
    "steps that lower the energy of the mean form; controls: 'random' steps as long, the 'gradient' corner (0)",
    "wgf.tv_ratio": "sum of the falls of log E over the sum of its changes, over prompts; [0, 1]; null .5, none if 'ambient'; "
    "param 'fixed': of the energy of the mean form, over depth",
    "wgf.dissip_slope": "slope of the change of log E on <grad log E, step>, over prompts; 1 for small steps",
}


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
    keys: ClassVar[Mapping[str, str]] = KEYS
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.probes < 1:
            raise UserError(f"GradientFlow: prompts is {self.prompts} and probes {self.probes}; choose at least 1 of each.")

    def begin(self) -> Observation:
        return _GradientFlow(self.prompts, self.probes, self.seed)


class _GradientFlow(WholePatterns):
    def __init__(self, prompts: int, probes: int, seed: int):
        super().__init__(prompts)
        self._probes, self._seed = probes, seed
        self._moments = Moments()
        self._errors: dict[Where, list[float]] = {}
        self._changes: dict[Where, list[tuple[Tensor, Tensor]]] = {}

    def _undefined(self, trajectory: Trajectory, k: int, nothing: Tensor) -> None:
        step, space = trajectory.steps[k], space_of(trajectory.block(k))
        at, param = (step.layer, step.point), "ambient" if space == "ambient" else None
        climbs = param if step.ffn is None else joined("parallel", param)
        self._moments.add(nothing, *at, "wgf.omega", param=param, null=0.5)
        self._moments.add(nothing, *at, "wgf.r2", param=param)
        self._moments.add(nothing, *at, "wgf.viol", param=climbs, null=half(climbs))
        self._changes.setdefault((*at, climbs), []).append((nothing, nothing))

    def _look(self, trajectory: Trajectory, known: list[int], count: int) -> None:
        layers = []
        for k in known:
            one = layer(trajectory, k)
            assert one is not None
            self._field(trajectory, k, one, count)
            self._climb(trajectory, k, one, count)
            layers.append(one)
        if known and known == list(trajectory.attentions) and len({one.space for one in layers}) == 1:
            self._depth(trajectory, layers, count)

    def _field(self, trajectory: Trajectory, k: int, one: Layer, count: int) -> None:
        step = trajectory.steps[k]
        at, x = (step.layer, step.point), wide(step.before[:count])
        probes = min(AT_ONCE, trajectory.budget // weights_of_one(trajectory, k))
        for field, param in ((one.field, one.param), (one.weighted, joined("z", one.param))):
            if field is None:
                continue
            # prompt by prompt, so that what a prompt's probes are does not hang on the prompts beside it
            found = [
                integrability.estimated_defect(field, some, one.space, self._probes, self._seed + self._before + b, probes)
                for b, some in enumerate(x.split(1))
            ]
            self._moments.add(torch.cat([each.value for each in found]), *at, "wgf.omega", param=param, null=0.5)
            self._errors.setdefault((*at, param), []).extend(float(each.error) for each in found)
        velocity = one.field(one.place(x))
        found = integrability.alignment(velocity, one.gradient(x), x, one.space)
        self._moments.add(found, *at, "wgf.r2", param=one.param, null=one.null(x))
        if len(one.forms) > 1:
            best = integrability.best_alignment(velocity, one.gradients(x)[0], x, one.space)
            self._moments.add(best, *at, "wgf.r2", param=joined("best", one.param))

    def _climb(self, trajectory: Trajectory, k: int, one: Layer, count: int) -> None:
        step = trajectory.steps[k]
        # of a parallel block the attention's share alone
        after = step.after if step.ffn is None else trajectory.halves(k)[0]
        param = one.param if step.ffn is None else joined("parallel", one.param)
        x, moved = wide(step.before[:count]), wide(after[:count]) - wide(step.before[:count])
        speed = moved
        if one.space != "ambient":
            speed = moved * paths.split(x, moved, one.space == "centred").mobility.unsqueeze(-1)
        predicted = (one.gradient(x) * speed).sum((-2, -1))
        change = one.total(wide(after[:count])) - one.total(x)
        viol = integrability.violations(change, rounding(step.before))
        self._moments.add(viol, step.layer, step.point, "wgf.viol", param=param, null=half(param))
        self._changes.setdefault((step.layer, step.point, param), []).append((change.cpu(), predicted.cpu()))

    def _depth(self, trajectory: Trajectory, known: list[Layer], count: int) -> None:
        """One energy for all layers, of the mean form over layers and heads, along all states."""
        mean = torch.stack([one.beta * one.forms.mean(0) for one in known]).mean(0, keepdim=True)
        fixed = known[0]._replace(forms=mean, beta=1.0)
        change = torch.stack([fixed.total(wide(x[:count])) for x in trajectory.clouds]).diff(dim=0)
        falls, param = integrability.violations(change, rounding(trajectory.clouds[0])).mean(0), joined("fixed", fixed.param)
        self._moments.add(falls, None, None, "wgf.viol", param=param, null=half(param))
        ratio = integrability.variation_ratio(change)
        self._moments.add(ratio, None, None, "wgf.tv_ratio", param=param, null=half(param))

    def rows(self) -> list[Row]:
        found = []
        for row in self._moments.rows():
            errors = [e for e in self._errors.get((row.layer, row.point, row.param), []) if e == e]
            # between prompts the spread holds the probes' noise too; of one prompt there is that alone
            alone = row.key == "wgf.omega" and row.n_valid == 1 and len(errors) == 1
            found.append(row._replace(se=errors[0]) if alone else row)
        for (at, point, param), pairs in self._changes.items():
            change, predicted = (torch.cat(values) for values in zip(*pairs, strict=True))
            found.append(_ratio(change)._replace(layer=at, point=point, null=half(param), param=param))
            slope = integrability.dissipation_slope(change, predicted)
            told = slope.slope if slope.slope == slope.slope else None
            error = slope.error if slope.error == slope.error else None
            row = Row(at, point, "wgf.dissip_slope", told, se=error, n_valid=slope.n_valid, n_dropped=slope.n_dropped)
            found.append(row._replace(param=param))
        return found


def _ratio(change: Tensor) -> Row:
    """TV-/TV over prompts, with the standard error of a ratio of means."""
    known = change[~change.isnan()]
    ratio, n = float(integrability.variation_ratio(known)), len(known)
    row = Row(None, None, "wgf.tv_ratio", None, n_valid=n, n_dropped=len(change) - n)
    if ratio != ratio:
        return row
    size = known.abs()
    spread = (known.clamp(max=0).abs() - ratio * size).square().sum() / (n * (n - 1)) if n > 1 else None
    return row._replace(mean=ratio, se=None if spread is None else float(spread.sqrt() / size.mean()))
