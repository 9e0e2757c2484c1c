"""Tokens on the circle: where temperature turns negative, three of them may keep apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch

from emformer import parts
from emformer.geometry.clusters import components, mean_cosine
from emformer.geometry.lines import line
from emformer.parts import UserError
from emformer.theory.outcome import Curves, Outcome, Statement
from emformer.theory.particles import idealised, simulate, times_of, unit_vectors
from emformer.trajectory import Trajectory

SOURCE = "math E.1; 2507.22857"
PROVEN = -0.16  # down to here every start is known to gather
EDGE = -2 / 3
ALIKE = 0.999
NOTE = (
    "That gathering may fail below -2/3 is a matter of three clusters of one weight: the triangle alone is stable there. Between "
    "-2/3 and -0.16 the sources claim nothing, and shares are told as measured."
)


@dataclass(frozen=True, kw_only=True)
class Circle(parts.Experiment):
    """SA in the plane, with weights e^{beta cos} of a beta that may be negative: M = beta I, F = I.

    Three tokens at 120 degrees from each other rest, by symmetry. Pushed, they return or leave at the rate
    lambda = 3 e^{-beta/2} (1/2 + 3 beta/4)/(e^beta + 2 e^{-beta/2}), both ways of pushing alike: stable below beta = -2/3.

    Args:
        tokens: numbers N of tokens of uniform starts.
        betas: at which uniform starts are followed.
        pushed: at which the triangle is pushed.
        seeds: uniform starts of each N and beta.
        time: how long.
        step: of RK4.
        seed: of the first start.
    """

    tokens: Sequence[int] = (3, 8, 32)
    betas: Sequence[float] = (-1.0, -0.5, -0.15, -0.05, 1.0)
    pushed: Sequence[float] = (-1.5, -1.0, -0.75, -0.6, -0.3)
    seeds: int = 64
    time: float = 60.0
    step: float = 0.1
    seed: int = 0

    name: ClassVar[str] = "circle"
    title: ClassVar[str] = "tokens on the circle: down to which beta they gather"

    @classmethod
    def examples(cls) -> Sequence[Circle]:
        return [cls(tokens=(3, 4), betas=(-1.0, 1.0), pushed=(-1.0, -0.3), seeds=4, time=10.0)]

    def __post_init__(self) -> None:
        for field in ("tokens", "betas", "pushed"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # YAML gives a list
        if not self.tokens or min(self.tokens) < 2 or self.seeds < 1 or not self.time > 0 or not self.step > 0:
            raise UserError("Circle: choose at least 2 tokens, at least one seed, and a positive time and step.")
        if not self.betas or any(abs(beta - EDGE) < 0.01 for beta in self.pushed):
            raise UserError("Circle: choose at least one of betas, and values of pushed away from -2/3, where nothing moves.")

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        statements, rows, kept, apart = [], [], {}, []
        runs = [(count, beta) for count in self.tokens for beta in self.betas]
        times = [self.time * k / 40 for k in range(41)]
        for k, (count, beta) in enumerate(runs):
            x = unit_vectors(self.seeds, count, 2, self.seed)
            trajectory = simulate(
                idealised(2, beta), x, times, step=self.step, tell=lambda s, k=k: tell((k + s) / len(runs), "uniform starts")
            )
            one = (components(trajectory.clouds[-1], (ALIKE,)).count[:, 0] == 1).double().mean()
            claim = f"{count} tokens, beta {beta:g}: the share of uniform starts that are one cluster at time {self.time:g}"
            how = "equals" if beta >= PROVEN else "measured"
            statements.append(Statement(claim, SOURCE, how, 1.0, float(one), 0.0, self.seeds))
            rows += [
                (f"{count} tokens", f"beta {beta:g}", time, float(mean_cosine(cloud).mean.mean()))
                for time, cloud in zip(times, trajectory.clouds, strict=True)
            ]
            if count == 3 and beta < EDGE:
                apart.append((beta, float(1 - one)))
            if count == self.tokens[-1]:
                kept[f"{count} tokens, beta {beta:g}"] = trajectory
        for beta, share in apart:
            claim = f"3 tokens, beta {beta:g} < -2/3: the share of uniform starts that never gather is above 0"
            statements.append(Statement(claim, SOURCE, "at least", 1 / self.seeds, share, 0.0, self.seeds))
        statements += [self._pushed(beta, rows) for beta in self.pushed]
        statements.append(_others())
        frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y"])
        caption = (
            f"How alike tokens are on average over pairs and {self.seeds} starts; and by how much the sides of a triangle of "
            "three tokens that was pushed out of its rest differ, relative to the push."
        )
        return Outcome(statements, {"gathering": Curves(frame, caption, "time", "")}, kept, NOTE)

    def _pushed(self, beta: float, rows: list) -> Statement:
        """A triangle turned out of its angles by 1e-6, over so long that it may grow or shrink by e^2."""
        rate = polygon_rate(3, beta)
        angles = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3], dtype=torch.float64)
        push = 1e-6 * torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
        x = torch.stack([(angles + push).cos(), (angles + push).sin()], -1).unsqueeze(0)
        times = np.linspace(0, 2 / abs(rate), 21).tolist()
        trajectory = simulate(idealised(2, beta), x, times, step=min(self.step, 0.05))
        sizes = _pushes(trajectory)
        measured = line(np.array(times_of(trajectory)), np.log(sizes)).slope
        rows += [
            ("a pushed triangle", f"beta {beta:g}", time, float(size / 1e-6)) for time, size in zip(times, sizes, strict=True)
        ]
        claim = f"beta {beta:g}: three tokens at 120 degrees, pushed, {'return' if rate < 0 else 'leave'} at the rate"
        return Statement(claim, SOURCE, "equals", rate, measured, 1e-4 * abs(rate))


def polygon_rate(count: int, beta: float) -> float:
    """The rate at which N tokens, evenly spaced on the circle, leave their rest under SA; negative: it is stable.

    The largest over all ways of pushing them, Fourier modes k = 1 … N - 1, of (1/Z) sum_j h'(2 pi j/N) (cos(2 pi j k/N) - 1) with
    h(a) = e^{beta cos a} sin a and Z the partition sum. For three it is the lambda of `Circle`.
    """
    angles = 2 * np.pi * np.arange(count) / count
    weights = np.exp(beta * np.cos(angles))
    slopes = weights * (np.cos(angles) - beta * np.sin(angles) ** 2)
    modes = np.cos(np.outer(np.arange(1, count), angles)) - 1
    return float((modes @ slopes).max() / weights.sum())


def _others() -> Statement:
    found = [polygon_rate(count, beta) for count in (2, *range(4, 65)) for beta in np.linspace(-2, 0, 41)]
    claim = "the least rate at which any other polygon, of 2 or 4 to 64 tokens, leaves its rest at a beta in [-2, 0]"
    return Statement(claim, "math E.1; linear stability, by Fourier modes", "at least", 0.0, min(found), 0.0, len(found))


def _pushes(trajectory: Trajectory) -> np.ndarray:
    """How far the angle between the first two tokens is from 120 degrees, relative to its push of 2."""
    found = []
    for cloud in trajectory.clouds:
        a, b = cloud[0, 0], cloud[0, 1]
        angle = torch.atan2(a[0] * b[1] - a[1] * b[0], (a * b).sum())
        found.append(abs(float(angle) - 2 * math.pi / 3) / 2)
    return np.array(found)
