"""How many clusters there are, at each temperature and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from scipy.stats import t as student

from emformer import parts
from emformer.geometry.clusters import components, mean_cosine
from emformer.geometry.lines import line
from emformer.parts import UserError
from emformer.theory.outcome import Chart, Curves, Heat, Outcome, Statement
from emformer.theory.particles import idealised, sweep, times_of, unit_vectors
from emformer.trajectory import Trajectory

SOURCE = "math E.1; 2312.10794, 2410.23228"
FITTED = 8.0  # least beta of the fit: below it there are too few clusters to count
FEWEST = 8  # tokens a cluster, on average, above which it is no longer the tokens that are counted


@dataclass(frozen=True, kw_only=True)
class Phase(parts.Experiment):
    """SA with M = F = I from uniform tokens on the circle and the sphere: numbers of clusters and mean cosines over (beta, t).

    Args:
        dims: spaces R^d, each at least 2; the exponent is fitted for d = 2, and told for the others.
        tokens: N, at least 16.
        largest: largest beta, at least 32; the grid goes from 1 to it by factors of sqrt(2).
        seeds: starts, at least 3, the same at each beta.
        time: how long; recorded at 41 times.
        early: when clusters are counted for the fit: once they are there, before many have merged; within `time`.
        together: cosine from which two tokens are in one cluster, in (0, 1).
        step: of RK4.
        seed: of the starts.
    """

    dims: Sequence[int] = (2, 3)
    tokens: int = 128
    largest: float = 256.0
    seeds: int = 6
    time: float = 40.0
    early: float = 20.0
    together: float = 0.999
    step: float = 0.2
    seed: int = 0

    name: ClassVar[str] = "phase"
    title: ClassVar[str] = "numbers of clusters over inverse temperature and time"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))  # YAML gives a list
        if not self.dims or min(self.dims) < 2 or self.tokens < 16 or self.seeds < 3 or not 32 <= self.largest < math.inf:
            raise UserError("Phase: choose dims of at least 2, 16 tokens, 3 seeds, and a largest beta of 32 or more.")
        if not 0 < self.early <= self.time < math.inf or not 0 < self.together < 1 or not self.step > 0:
            raise UserError("Phase: choose 0 < early <= time, together in (0, 1), and a step above 0.")

    @classmethod
    def examples(cls) -> Sequence[Phase]:
        return [cls(dims=(2,), tokens=48, largest=32.0, seeds=3, time=10.0, early=10.0, step=0.25)]

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        betas = [2 ** (k / 2) for k in range(math.floor(2 * math.log2(self.largest) + 1e-9) + 1)]
        times = [self.time * k / 40 for k in range(41)]
        statements: list[Statement] = []
        counts, cosines, lines = [], [], []
        kept: dict[str, Trajectory] = {}
        for part, dim in enumerate(self.dims):
            panel = {2: "circle", 3: "sphere"}.get(dim, f"d = {dim}")
            x = unit_vectors(self.seeds, self.tokens, dim, self.seed)
            found = sweep(
                idealised(dim),
                x,
                betas,
                times,
                step=self.step,
                tell=lambda share, part=part, panel=panel: tell((part + share) / len(self.dims), panel),
            )
            number = np.empty((len(betas), len(times), self.seeds))
            for k, (beta, one) in enumerate(found.items()):
                for j, (time, cloud) in enumerate(zip(times_of(one), one.clouds, strict=True)):
                    number[k, j] = components(cloud, (self.together,)).count[:, 0].numpy()
                    counts.append((panel, time, beta, math.log2(number[k, j].mean())))
                    cosines.append((panel, time, beta, float(mean_cosine(cloud).mean.mean())))
            when = min(range(41), key=lambda j: abs(times[j] - self.early))
            statements += self._exponent(dim, panel, np.array(betas), number[:, when])
            end = number[0, -1]
            statements.append(
                Statement(f"{panel}: clusters at beta 1 in the end, most", SOURCE, "equals", 1.0, float(end.max()), n=self.seeds)
            )
            for beta, row in zip(betas, number[:, when], strict=True):
                margin = student.ppf(0.975, self.seeds - 1) * row.std(ddof=1) / self.seeds**0.5
                lines.append((panel, "measured", beta, row.mean(), max(row.mean() - margin, 0.5), row.mean() + margin))
                if dim == 2:
                    theory = max((2 * beta) ** 0.5, 1.0)
                    lines.append((panel, "theory: sqrt(2 beta), the fastest wave", beta, theory, math.nan, math.nan))
            picked = min(betas, key=lambda beta: abs(math.log(beta / 16)))
            kept[f"{panel}-beta={picked:g}".replace(" ", "")] = found[picked]
        words = ["panel", "x", "y", "value"]
        charts: dict[str, Chart] = {
            "clusters": Heat(
                pd.DataFrame(counts, columns=words),
                f"Groups of tokens that a chain of cosines above {self.together:g} joins, the mean of {self.seeds} starts, as "
                "doublings: 0 is one cluster, 3 are eight.",
                "time",
                "beta",
                "log2 of clusters",
                log_y=True,
            ),
            "cosine": Heat(
                pd.DataFrame(cosines, columns=words),
                f"How alike tokens are, on average over pairs and {self.seeds} starts.",
                "time",
                "beta",
                "mean cosine",
                limits=(-0.1, 1.0),
                log_y=True,
            ),
            "count": Curves(
                pd.DataFrame(lines, columns=["panel", "line", "x", "y", "low", "high"]),
                f"Clusters at t = {self.early:g}.",
                "beta",
                "clusters",
                log_x=True,
                log_y=True,
            ),
        }
        note = (
            "Near the uniform law on the circle the wave cos(k theta) grows at the rate k^2 I_k(beta)/(beta I_0(beta)), fastest "
            "at k = sqrt(2 beta). Counts fall short of it because noise excites slower waves as well, and neighbours merge."
        )
        return Outcome(statements, charts, kept, note)

    def _exponent(self, dim: int, panel: str, betas: np.ndarray, counts: np.ndarray) -> list[Statement]:
        """Of the mean count (betas, seeds) in beta, its error by leaving out one start after the other."""
        mean = counts.mean(1)
        used = (betas >= FITTED) & (mean <= self.tokens / FEWEST)
        if used.sum() < 3:
            return []
        log = np.log(betas[used])

        def fit(some: np.ndarray) -> float:
            return line(log, np.log(counts[used][:, some].mean(1))).slope

        every = np.arange(self.seeds)
        slope = fit(every)
        left = np.array([fit(every[every != k]) for k in every])
        error = float(math.sqrt((self.seeds - 1) / self.seeds * np.square(left - left.mean()).sum()))
        claim = f"{panel}: exponent of the number of clusters in beta at t = {self.early:g}"
        if dim > 2:
            return [Statement(claim, SOURCE, "measured", math.nan, slope, n=self.seeds, error=error)]
        ratio = float((mean[used] / (2 * betas[used]) ** 0.5).mean())
        return [
            Statement(claim, SOURCE, "equals", 0.5, slope, 0.05, self.seeds, error),
            Statement(f"{panel}: that number over sqrt(2 beta)", SOURCE, "measured", math.nan, ratio, n=self.seeds),
        ]
