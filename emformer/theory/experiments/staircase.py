"""Dynamic metastability: well separated caps collapse at once, and then wait for a time exponential in beta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.geometry.clusters import components
from emformer.geometry.integrability import log_energy, relative_drop
from emformer.geometry.lines import line
from emformer.parts import UserError
from emformer.theory.ensembles import ensemble
from emformer.theory.equiangular import crossing_time
from emformer.theory.marching import crossing
from emformer.theory.outcome import Chart, Curves, Outcome, Paths, Statement
from emformer.theory.particles import times_of
from emformer.trajectory import Trajectory

SOURCE = "math E.1; 2410.06833"
TOGETHER = 0.9  # the cosine at which two clusters have met
# (longitude, latitude) in degrees: the first two meet soon, then the third, at last the fourth
STAIRS = ((0.0, 0.0), (44.0, 0.0), (94.0, 0.0), (46.0, 86.0))
ACROSS = ((0.0, 0.0), (90.0, 0.0))
MEETINGS = {4.0: 8.390, 8.0: 194.1, 12.0: 6886.0}  # of two tokens, from cosine 0 to 0.9


class Caps(NamedTuple):
    beta: float
    centres: Sequence[tuple[float, float]]
    spread: float


@dataclass(frozen=True, kw_only=True)
class Staircase(parts.Experiment):
    """SA on the sphere S^2 from caps of tokens: two at a right angle, for how long they collapse and how long they wait; and four
    at different distances, whose energy climbs in steps.

    All starts run as one tensor with steps that halving accepts.

    Args:
        tokens: N, a multiple of 4, at least 8.
        spread: angle, in radians, by which tokens stray from the centre of their cap; in (0, 0.2].
        betas: inverse temperatures of the two caps, at least three, each above 2.
        stairs: those of the four caps.
        two: whether two single tokens at beta 4, 8 and 12 are held against the closed form; beta 12 meets at 6886.
        time: how long, at least 10. What has not met by then is left out of what is fitted.
        kept: times at which the clouds are kept, at least 30, in a geometric sequence.
        tolerance: of a coordinate, from one recorded time to the next.
        seed: of the caps.
    """

    tokens: int = 12
    spread: float = 0.1
    betas: Sequence[float] = (6.0, 7.0, 8.0, 9.0, 10.0, 11.0)
    stairs: Sequence[float] = (8.0, 10.0, 12.0)
    two: bool = True
    time: float = 7500.0
    kept: int = 380
    tolerance: float = 1e-6
    seed: int = 0

    name: ClassVar[str] = "staircase"
    title: ClassVar[str] = "clusters that wait exponentially long before they merge, and the staircase of the energy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # YAML gives a list
        object.__setattr__(self, "stairs", tuple(self.stairs))
        if self.tokens < 8 or self.tokens % 4 or not 0 < self.spread <= 0.2:
            raise UserError("Staircase: choose tokens in fours, at least 8, and a spread in (0, 0.2].")
        if len(set(self.betas)) < 3 or min(self.betas) <= 2 or not self.stairs or min(self.stairs) <= 0:
            raise UserError("Staircase: choose three betas above 2 or more, and at least one for the stairs.")
        if not 10 <= self.time < math.inf or self.kept < 30 or not self.tolerance > 0:
            raise UserError("Staircase: choose a time of 10 or more, 30 kept, and a tolerance above 0.")

    @classmethod
    def examples(cls) -> Sequence[Staircase]:
        return [cls(tokens=8, betas=(2.5, 3.0, 3.5), stairs=(4.0,), time=16.0, kept=30, tolerance=1e-3)]

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        pairs = [Caps(beta, ACROSS, self.spread) for beta in self.betas]
        stairs = [Caps(beta, STAIRS, self.spread) for beta in self.stairs]
        points = [Caps(beta, ACROSS, 0.0) for beta in MEETINGS if self.two]
        whole = [*pairs, *stairs, *points]
        x = torch.stack([self._start(one) for one in whole])
        forms = torch.stack([one.beta * torch.eye(3, dtype=x.dtype) for one in whole])
        count = self.kept - 1
        times = [0.0, *(0.1 * (self.time / 0.1) ** (k / count) for k in range(self.kept))]
        found = ensemble(forms, x, times, tolerance=self.tolerance, tell=lambda share: tell(0.9 * share, "waiting"))
        tell(0.9, "looking for meetings")
        cut = len(pairs), len(pairs) + len(stairs)
        waits, first = self._waits(found[: cut[0]])
        climbs = self._climbs(found[cut[0] : cut[1]])
        closed = self._closed(found[cut[1] :])
        statements = [*closed, *waits.statements, *climbs.statements, self._rises(found)]
        charts = {**climbs.charts, **waits.charts}
        kept = {f"four-caps-beta={beta:g}": one for beta, one in zip(self.stairs, found[cut[0] :], strict=False)}
        return Outcome(statements, charts, {f"two-caps-beta={self.betas[first]:g}": found[first], **kept})

    def _start(self, caps: Caps) -> Tensor:
        """Unit vectors about the centres; each cap is balanced, so that it collapses to its centre."""
        centres = _centres(caps.centres)
        size = self.tokens // len(centres)
        generator = torch.Generator().manual_seed(self.seed)
        stray = torch.randn(len(centres), size, 3, generator=generator, dtype=torch.float64)
        stray = stray - (stray * centres[:, None]).sum(-1, keepdim=True) * centres[:, None]
        stray = stray - stray.mean(1, keepdim=True)
        return torch.nn.functional.normalize(centres[:, None] + caps.spread * stray / 2**0.5, dim=-1).flatten(0, 1)

    def _closed(self, found: Sequence[Trajectory]) -> list[Statement]:
        """Two tokens; caps without spread are single tokens of twice the number."""
        return [
            Statement(
                f"beta {beta:g}: time of two tokens from cosine 0 to {TOGETHER:g}, closed form",
                SOURCE,
                "equals",
                time,
                crossing(one, _cosine, TOGETHER),
                0.01 * time,
            )
            for (beta, time), one in zip(MEETINGS.items(), found, strict=False)
            if time < self.time
        ]

    def _waits(self, found: Sequence[Trajectory]) -> tuple[Outcome, int]:
        """T1 and T2 of two caps."""
        rows, early, late, law, known = [], [], [], [], []
        for beta, one in zip(self.betas, found, strict=True):
            met = crossing(one, _cosine, TOGETHER)
            if math.isnan(met):
                continue
            collapsed = crossing(one, lambda cloud, beta=beta: -_radius(cloud), -self.spread * math.exp(-beta / 2))
            k = int(np.searchsorted(times_of(one), collapsed))
            start = times_of(one)[k]
            known.append(beta)
            early.append(collapsed)
            late.append(met)
            law.append(start + crossing_time(_cosine(one.clouds[k][0]), TOGETHER, beta))
            rows += [
                ("meet", "measured", beta, met),
                ("meet", "theory: two tokens", beta, law[-1]),
                ("meet", "theory: e^beta/(2 beta)", beta, math.exp(beta) / (2 * beta)),
                ("collapse", "measured", beta, collapsed),
                ("collapse", "theory: beta/2", beta, beta / 2),
            ]
        n = len(known)
        if n < 3:
            raise ArithmeticError(f"only {n} pairs of caps have met by {self.time:g}; choose smaller betas, or more time")
        b = np.array(known)
        wait, wait_error, _ = line(b, np.log(b * np.array(late)))
        plain, plain_error, _ = line(b, np.log(late))
        fall, fall_error, _ = line(b, np.array(early))
        miss = max(abs(a / c - 1) for a, c in zip(late, law, strict=True))
        contraction = "caps: slope of T1 in beta, the time to shrink by e^{-beta/2}: they contract at rate 1"
        statements = [
            Statement(contraction, SOURCE, "equals", 0.5, fall, 0.03, n, fall_error),
            Statement("caps: slope of log(beta T2) in beta, right angle", SOURCE, "equals", 1.0, wait, 0.05, n, wait_error),
            Statement("caps: slope of log T2 alone", SOURCE, "measured", math.nan, plain, n=n, error=plain_error),
            Statement("caps: T2 against the two-token law, largest relative miss", SOURCE, "at most", 0.0, miss, 0.01, n),
            Statement("caps: least T2/T1", SOURCE, "measured", math.nan, float((np.array(late) / early).min()), n=n),
        ]
        chart = Curves(
            pd.DataFrame(rows, columns=["panel", "line", "x", "y"]),
            f"Two caps at a right angle: when each is e^(-beta/2) as wide as at first, and when they meet (cosine {TOGETHER:g}).",
            "beta",
            "time",
            log_y=True,
        )
        return Outcome(statements, {"times": chart}), self.betas.index(known[-1])

    def _climbs(self, found: Sequence[Trajectory]) -> Outcome:
        """Energies of the four caps."""
        rows, miss, steps, top = [], [], [], max(self.stairs)
        for beta, one in zip(self.stairs, found, strict=True):
            times, levels = times_of(one), []
            for time, cloud in zip(times, one.clouds, strict=True):
                height, pieces = _height(cloud, beta), int(components(cloud, (TOGETHER,)).count[0, 0])
                levels.append((pieces, height))
                if time:
                    rows += [("energy", f"beta {beta:g}", time, height), ("clusters", f"beta {beta:g}", time, float(pieces))]
            counts = [pieces for pieces, _ in levels]
            steps.append(len(set(counts)))
            for pieces, share in ((4, 4 / 16), (3, 6 / 16), (2, 10 / 16), (1, 1.0)):
                flat = [height for count, height in levels if count == pieces]
                if flat and beta == top:
                    miss.append(abs(float(np.median(flat)) - share))
        frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y"])
        heights = Curves(
            frame,
            "Four caps: 2 beta e^(-beta) E, which is the sum of the squared shares of the clusters: 1/4, 3/8, 5/8, 1.",
            "time",
            "energy, and clusters",
            log_x=True,
        )
        last = found[-1]
        scale = 3**-0.5
        moved = [
            (f"beta {self.stairs[-1]:g}", f"token {k}", time, *(scale * cloud[0, k]).tolist())
            for k in range(self.tokens)
            for time, cloud in zip(times_of(last)[::4], last.clouds[::4], strict=True)
        ]
        paths = Paths(
            pd.DataFrame(moved, columns=["panel", "path", "time", "x", "y", "z"]),
            "Four caps meet, one after the other; most of the time nothing moves.",
            ("1", "2", "3"),
            "sphere",
        )
        charts: dict[str, Chart] = {"stairs": heights, "paths": paths}
        n = len(found)
        return Outcome(
            [
                Statement("stairs: fewest numbers of clusters that a start has", SOURCE, "equals", 4.0, float(min(steps)), n=n),
                Statement(
                    f"stairs, beta {top:g}: height (median) against the sum of squared shares of clusters, largest difference",
                    SOURCE,
                    "at most",
                    0.0,
                    max(miss),
                    0.02,
                ),
            ],
            charts,
        )

    def _rises(self, found: Sequence[Trajectory]) -> Statement:
        """The energy along all of them."""
        worst = 0.0
        for one in found:
            form = one.block(0).attention.form.matrix() * 3  # of unit vectors
            energies = torch.cat([log_energy(cloud, form)[:, 0] for cloud in one.clouds])
            worst = max(worst, float(relative_drop(energies[:-1], energies[1:]).max()))
        return Statement("all: largest relative fall of the energy", SOURCE, "at most", 0.0, worst, 1e-10, len(found))


def _height(cloud: Tensor, beta: float) -> float:
    """2 beta e^{-beta} E_beta in (0, 1]."""
    eye = torch.eye(cloud.shape[-1], dtype=cloud.dtype).unsqueeze(0)
    return float((log_energy(cloud, eye, beta) - beta).exp()) / cloud.shape[1] ** 2


def _centres(angles: Sequence[tuple[float, float]]) -> Tensor:
    """Unit vectors of (longitude, latitude)."""
    lon, lat = torch.tensor(angles, dtype=torch.float64).deg2rad().unbind(-1)
    return torch.stack([lon.cos() * lat.cos(), lon.sin() * lat.cos(), lat.sin()], -1)


def _halves(cloud: Tensor) -> tuple[Tensor, Tensor]:
    u = torch.nn.functional.normalize(cloud, dim=-1)
    return u[: len(u) // 2], u[len(u) // 2 :]


def _cosine(cloud: Tensor) -> float:
    """Of the centres of two caps."""
    a, b = (torch.nn.functional.normalize(half.mean(0), dim=0) for half in _halves(cloud))
    return float(a @ b)


def _radius(cloud: Tensor) -> float:
    """The largest distance of a token from the mean of its cap, of two caps."""
    return max(float((half - half.mean(0)).norm(dim=-1).max()) for half in _halves(cloud))
