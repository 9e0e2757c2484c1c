"""Tokens on the sphere: one cluster in the end, from any start and at any temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pandas as pd
import torch

from emformer import parts
from emformer.geometry.clusters import mean_cosine
from emformer.kernels import Softmax, Unnormalised
from emformer.parts import UserError
from emformer.theory.outcome import Curves, Outcome, Paths, Statement
from emformer.theory.particles import idealised, sweep, times_of, unit_vectors


@dataclass(frozen=True, kw_only=True)
class Sphere(parts.Experiment):
    """Clouds of uniform directions under SA (softmax) or USA (unnormalised) with M = F = I: where do they go, and how fast.

    Args:
        dim: d of the space; 2 is the circle, 3 the sphere that can be looked at.
        tokens: N.
        betas: inverse temperatures, all simulated at once.
        seeds: starts of each.
        field: "sa" or "usa", whose time is counted in units of e^-beta.
        time: how long.
        step: of RK4.
        seed: of the first start.
    """

    dim: int = 3
    tokens: int = 32
    betas: Sequence[float] = (1.0, 4.0, 9.0)
    seeds: int = 8
    field: Literal["sa", "usa"] = "sa"
    time: float = 20.0
    step: float = 0.05
    seed: int = 0

    name: ClassVar[str] = "sphere"
    title: ClassVar[str] = "tokens on the sphere gather in one cluster (SA and USA)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # YAML gives a list
        if self.dim < 2 or self.tokens < 2 or self.seeds < 1 or not self.betas or min(self.betas) <= 0:
            raise UserError("Sphere: choose dim and tokens of at least 2, at least one seed, and betas above 0.")

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        kernel = Softmax() if self.field == "sa" else Unnormalised(clip=None)
        model = idealised(self.dim, kernel=kernel)
        x = unit_vectors(self.seeds, self.tokens, self.dim, self.seed)
        paces = None if self.field == "sa" else torch.tensor(self.betas).neg().exp().tolist()
        times = [self.time * k / 60 for k in range(61)]
        found = sweep(model, x, self.betas, times, paces=paces, step=self.step, tell=lambda share: tell(share, "integrating"))
        rows = []
        for beta, trajectory in found.items():
            for time, cloud in zip(times_of(trajectory), trajectory.clouds, strict=True):
                cosine = mean_cosine(cloud).mean
                rows += [("mean cosine", f"beta {beta:g}, seed {k}", time, float(c)) for k, c in enumerate(cosine)]
        statements = [
            Statement(
                f"beta {beta:g}: the least mean cosine of {self.seeds} starts tends to 1",
                "math E.1; 2312.10794",
                "equals",
                1.0,
                float(mean_cosine(trajectory.clouds[-1]).mean.min()),
                1e-2,
                self.seeds,
            )
            for beta, trajectory in found.items()
        ]
        frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y"])
        charts = {"cosine": Curves(frame, "How alike tokens are, on average over pairs.", "time", "mean cosine")}
        first = next(iter(found.values()))
        steps = [
            ("one start", f"token {k}", time, *(cloud[0, k, :3] / self.dim**0.5).tolist())
            for k in range(self.tokens)
            for time, cloud in zip(times_of(first), first.clouds, strict=True)
        ]
        if self.dim == 3:
            moved = pd.DataFrame(steps, columns=["panel", "path", "time", "x", "y", "z"])
            charts["paths"] = Paths(moved, "The way of each token.", ("x", "y", "z"), "sphere")
        return Outcome(statements, charts, {f"beta={beta:g}": one for beta, one in found.items()})
