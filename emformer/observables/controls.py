"""Family "wgf", the controls: what its instrument reads of layers and velocities whose answer is known."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.block import Block
from emformer.geometry import integrability
from emformer.geometry.spectra import wide
from emformer.observables.base import Moments, Observation, Row
from emformer.observables.fields import Layer, WholePatterns, corner, half, joined, of, rounding, space_of, weights_of_one
from emformer.observables.wgf import AT_ONCE, KEYS
from emformer.parts import UserError
from emformer.surgery.copies import generator
from emformer.surgery.matrices import shuffled
from emformer.trajectory import Trajectory

FEW = 4  # probes of the gradient corner, whose defect is 0 for any
DRAWS = 16  # of random velocities a prompt
CONTROLS = {
    "shuffled": ("wgf.omega", "wgf.r2"),
    "random": ("wgf.r2", "wgf.viol"),
    "gradient": ("wgf.omega", "wgf.r2", "wgf.viol"),
}


@dataclass(frozen=True)
class GradientControls(parts.Observable):
    """Each attention step that `GradientFlow` looks at, on the first of its prompts, in three other guises (rows by `param`):

    * "shuffled": the layer with the spectra of M and F that it has and random singular vectors (`surgery.shuffle`, with the seed
      plus the prompt's number: others for each prompt, so that `se` holds the spread between shuffles), at the same cloud. A
      trained layer whose omega is below, and r2 above, owes that to how its M and F fit together;
    * "random": isotropic velocities, others for each prompt and layer, of tokens as far moved as they are, against the layer's
      energy: r2 has its null, viol not quite its 1/2, because a long step in any direction changes a curved energy. In R^d, where
      it mostly lifts it, viol has no null but this control;
    * "gradient": the gradient flow nearest to the layer. M becomes the positive semidefinite part of its symmetric part, F = M,
      the mask is full, weights are e^{beta s}/N. omega is 0, r2 is 1, and a step of any length (here the fastest token moves by
      its own size) climbs: where a report shows something else, the instrument is broken.

    Cost: that of `GradientFlow`, of as many prompts and probes, and four QR of d x d a head, prompt and layer. The same layers
    have rows, and where whole patterns are beyond the budget everything is undefined and counted as dropped. Source: math E.3,
    E.4, K.

    Args:
        prompts: how many are looked at, the first ones.
        probes: random directions a prompt, for omega.
        seed: of the shuffle, the velocities and the probes.
    """

    prompts: int = 4
    probes: int = 32
    seed: int = 0

    family: ClassVar[str] = "wgf"
    keys: ClassVar[Mapping[str, str]] = {key: KEYS[key] for key in ("wgf.omega", "wgf.r2", "wgf.viol")}
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    @classmethod
    def examples(cls) -> Sequence[GradientControls]:
        return [cls(prompts=2, probes=2)]

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.probes < 1:
            raise UserError(f"GradientControls: prompts is {self.prompts} and probes {self.probes}; choose at least 1 of each.")

    def begin(self) -> Observation:
        return _GradientControls(self.prompts, self.probes, self.seed)


class _GradientControls(WholePatterns):
    def __init__(self, prompts: int, probes: int, seed: int):
        super().__init__(prompts)
        self._probes, self._seed = probes, seed
        self._moments = Moments()

    def _undefined(self, trajectory: Trajectory, k: int, nothing: Tensor) -> None:
        step = trajectory.steps[k]
        space = "ambient" if space_of(trajectory.block(k)) == "ambient" else None
        for control, keys in CONTROLS.items():
            param = joined(control, space)
            for key in keys:
                null = {"wgf.omega": 0.5, "wgf.r2": None, "wgf.viol": half(param)}[key]
                self._moments.add(nothing, step.layer, step.point, key, param=param, null=null)

    def _look(self, trajectory: Trajectory, known: list[int], count: int) -> None:
        for k in known:
            step, block = trajectory.steps[k], trajectory.block(k)
            after = step.after if step.ffn is None else trajectory.halves(k)[0]
            one = of(block)
            assert one is not None
            x = wide(step.before[:count])
            probes = min(AT_ONCE, trajectory.budget // weights_of_one(trajectory, k))
            at = step.layer, step.point
            self._random(at, one, x, wide(after[:count]) - x, rounding(step.before))
            for b, some in enumerate(x.split(1)):
                seed = self._seed + self._before + b
                other = of(_shuffled(block, seed, step.layer))
                assert other is not None
                self._field(at, other, some, joined("shuffled", one.param), self._probes, seed, probes)
                # a prompt's corner is its own, with a factor that keeps its own weights in range
                ideal = corner(one, some)
                self._field(at, ideal, some, joined("gradient", one.param), FEW, seed, probes)
                self._climb(at, ideal, some)

    def _field(self, at: tuple[int, str], one: Layer, x: Tensor, param: str | None, probes: int, seed: int, chunk: int) -> None:
        """omega and r2 of a field against its own energy, at one prompt."""
        omega = integrability.estimated_defect(one.field, x, one.space, probes, seed, chunk).value
        self._moments.add(omega, *at, "wgf.omega", param=param, null=0.5)
        r2 = integrability.alignment(one.field(one.place(x)), one.gradient(x), x, one.space)
        self._moments.add(r2, *at, "wgf.r2", param=param, null=one.null(x))

    def _climb(self, at: tuple[int, str], ideal: Layer, x: Tensor) -> None:
        """Does the corner climb its energy in a step in which the fastest token of this one prompt moves by its own size?"""
        theta, param = ideal.place(x), joined("gradient", ideal.param)
        v = ideal.field(theta)
        speed = v.norm(dim=-1).amax()
        size = theta.norm(dim=-1).square().mean().sqrt()
        moved = theta + v * (size / speed.where(speed > 0, torch.nan))
        before = ideal.total(theta)
        allowed = 1e-12 * max(1.0, float(before.abs().nan_to_num()))
        change = ideal.total(moved) - before
        self._moments.add(integrability.violations(change, allowed), *at, "wgf.viol", param=param, null=half(param))

    def _random(self, at: tuple[int, str], one: Layer, x: Tensor, moved: Tensor, tolerance: float) -> None:
        theta, gradient, before = one.place(x), one.gradient(x), one.total(x)
        lengths = moved.norm(dim=-1, keepdim=True)
        r2, falls = [], []
        sources = [generator("velocities", self._seed, self._before + b, at[0]) for b in range(len(x))]
        for _ in range(DRAWS):
            drawn = [torch.randn(x.shape[1:], generator=source, dtype=torch.float64) for source in sources]
            v = integrability.project(theta, torch.stack(drawn).to(theta), one.space)
            r2.append(integrability.alignment(v, gradient, x, one.space))
            step = lengths * nn.functional.normalize(v, dim=-1)
            falls.append(integrability.violations(one.total(x + step) - before, tolerance))
        param = joined("random", one.param)
        self._moments.add(torch.stack(r2).mean(0), *at, "wgf.r2", param=param, null=one.null(x))
        self._moments.add(torch.stack(falls).mean(0), *at, "wgf.viol", param=param, null=half(param))

    def rows(self) -> list[Row]:
        return self._moments.rows()


def _shuffled(block: Block, seed: int, layer: int) -> Block:
    """The block with random singular vectors; the FFN, which no field of attention knows, is left out."""
    found = copy.copy(block)
    found._modules = {name: part for name, part in block._modules.items() if name != "ffn"}
    found.attention = shuffled(copy.deepcopy(block.attention), seed, layer)
    return found
