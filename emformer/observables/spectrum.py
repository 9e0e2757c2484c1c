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

    Cost, most of it in float64 decompositions: four N x N a head, prompt and attention step; two N x d a prompt and step. A
    pattern is looked at whole: where the N x N of one head are beyond the trajectory's budget it is undefined, and counted as
    dropped. Source: math H.3.
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
        step = trajectory.steps[k]
        at, tokens = (step.layer, step.point), step.before.shape[1]
        told = [retention.mixing(a, step.read) for _, a in trajectory.matrices(k)]
        null = None
        if told:
            even = uniform(trajectory.visible(k)).to(step.read)[None, None]
            null = retention.mixing(even, torch.eye(tokens, dtype=even.dtype, device=even.device).unsqueeze(0))
        # beside I the size of the weights counts, and uniform weights are known only if they sum to one
        known = trajectory.block(k).attention.kernel.normalised
        shape = trajectory.prompts, trajectory.block(k).attention.form.heads
        for param, name in (("A", "mix"), ("I+A", "residual")):
            ops, chance = [getattr(one, name) for one in told], getattr(null, name, None)
            for key, field in (("spec.rho_A", "rho"), ("spec.kappa_log10", "log_kappa"), ("spec.erank_A", "erank")):
                values = torch.cat([getattr(op, field) for op in ops], 1) if ops else torch.full(shape, torch.nan)
                expected = math.nan if chance is None or field == "rho" else float(getattr(chance, field))
                compared = (known or param == "A") and math.isfinite(expected)
                self._moments.by_head(
                    values.where(values.isfinite(), torch.nan),
                    *at,
                    key,
                    cloud="read" if field == "rho" else "raw",
                    param=param,
                    null=expected if compared else None,
                )

    def _step(self, before: Tensor, after: Tensor, at: tuple[int, str], param: str | None = None) -> None:
        kept = retention.signal_retention(before, after)
        self._moments.add(kept.rho, *at, "spec.rho_X", param=param)
        self._moments.add(kept.shape, *at, "spec.rho_X", param="normalised" if param is None else f"{param} normalised")

    def rows(self) -> list[Row]:
        return self._moments.rows()
