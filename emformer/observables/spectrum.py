"""Family "spectrum": how much of a cloud's spectrum survives the mixing of its tokens, and each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import retention
from emformer.geometry.sinks import uniform
from emformer.observables.base import Moments, Observation, Row
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Spectrum(parts.Observable):
    """Spectral retention of every head's pattern on the read cloud, alone (param "A") and beside the residual stream ("I+A"), and
    of every step that the cloud really made; heads and their mean.

    kappa is heavy tailed, and of a causal pattern often infinite: such prompts are in no mean of its logarithm but counted.
    (I + A)/2 has the kappa and the rank of I + A, and half its rho. Retained is not unmoved: see |D| beside it.

    Cost, most of it in float64 decompositions: four N x N a head, prompt and attention step; two N x d a prompt and step.
    Source: math H.3.
    """

    family: ClassVar[str] = "spectrum"
    keys: ClassVar[Mapping[str, str]] = {
        "spec.rho_A": "|Op Y|_*/|Y|_*, the nuclear norm that the pattern leaves of what it reads; >= 0; 1 a permutation, about "
        "1.18/N a mixing to rank 1",
        "spec.kappa_log10": "log10 sigma_max/sigma_min of Op, infinite ones dropped; >= 0; 0 a permutation; null that of uniform "
        "attention",
        "spec.erank_A": "effective rank of Op; 1 .. N; N a permutation; null that of uniform attention",
        "spec.rho_X": "|X'|_*/|X|_* of a step; > 0; 1 an isometry; param 'normalised': of X/|X|_F, where scale does not count; "
        "'parallel': of one share of a parallel block alone",
    }

    def begin(self) -> Observation:
        return _Spectrum()


class _Spectrum(Observation):
    def __init__(self) -> None:
        self._moments = Moments()

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        attentions = set(trajectory.attentions)
        for k, step in enumerate(trajectory.steps):
            if k in attentions:
                self._mixing(trajectory, k)
            self._step(step.before, step.after, (step.layer, step.point))
            if step.ffn is not None:
                for point, half in zip(("attn", "ffn"), trajectory.halves(k), strict=True):
                    self._step(step.before, half, (step.layer, point), "parallel")

    def _mixing(self, trajectory: Trajectory, k: int) -> None:
        step, a, visible = trajectory.steps[k], trajectory.pattern(k), trajectory.visible(k)
        at = step.layer, step.point
        even = uniform(visible).to(a)[None, None]
        told = retention.mixing(a, step.read)
        null = retention.mixing(even, torch.eye(len(visible), dtype=a.dtype, device=a.device).unsqueeze(0))
        # beside I the size of the weights counts, and uniform weights are known only if they sum to one
        known = trajectory.block(k).attention.kernel.normalised
        for param, of, chance in (("A", told.mix, null.mix), ("I+A", told.residual, null.residual)):
            self._moments.by_head(of.rho, *at, "spec.rho_A", cloud="read", param=param)
            log_kappa = of.log_kappa.where(of.log_kappa.isfinite(), torch.nan)
            for key, values, expected in (
                ("spec.kappa_log10", log_kappa, float(chance.log_kappa)),
                ("spec.erank_A", of.erank, float(chance.erank)),
            ):
                compared = (known or param == "A") and math.isfinite(expected)
                self._moments.by_head(values, *at, key, param=param, null=expected if compared else None)

    def _step(self, before: Tensor, after: Tensor, at: tuple[int, str], param: str | None = None) -> None:
        kept = retention.signal_retention(before, after)
        self._moments.add(kept.rho, *at, "spec.rho_X", param=param)
        self._moments.add(kept.shape, *at, "spec.rho_X", param="normalised" if param is None else f"{param} normalised")

    def rows(self) -> list[Row]:
        return self._moments.rows()
