"""Tokens on the sphere: one cluster in the end, up the energy all the way, and from a hemisphere exponentially fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from scipy.integrate import simpson
from scipy.optimize import linprog
from scipy.stats import binom
from torch import Tensor

from emformer import parts
from emformer.geometry.clusters import components, mean_cosine
from emformer.geometry.lines import line
from emformer.kernels import Softmax, Unnormalised
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.theory.energies import dissipation, scaled_energy, uniform_energy
from emformer.theory.equiangular import crossing_time
from emformer.theory.outcome import Chart, Curves, Outcome, Paths, Statement
from emformer.theory.particles import idealised, sweep, times_of, unit_vectors
from emformer.trajectory import Trajectory

SOURCE = "math E.1; 2312.10794"
ALIKE = 0.99  # cosine from which two tokens are of one cluster
OPPOSED = -0.95  # of the two clusters that wait longest for each other, in all but rare starts
MISS = 1e-12  # rounding of an energy


@dataclass(frozen=True, kw_only=True)
class Sphere(parts.Experiment):
    """Clouds of uniform directions under SA (softmax) or USA (unnormalised) with M = F = I: where do they go, and how fast.

    Args:
        dim: d of the space, at least 3; 3 is the sphere that can be looked at. The circle is the experiment `circle`.
        tokens: N.
        betas: inverse temperatures, all simulated at once.
        seeds: starts of each.
        field: "sa" or "usa", whose time is counted in units of e^-beta.
        time: how long. All starts are claimed to become one cluster where two tokens that begin at cosine -0.95 meet by then.
        step: of RK4.
        draws: clouds whose hemisphere is looked for.
        seed: of the first start.
    """

    dim: int = 3
    tokens: int = 32
    betas: Sequence[float] = (1.0, 2.0, 4.0, 9.0)
    seeds: int = 8
    field: Literal["sa", "usa"] = "sa"
    time: float = 200.0
    step: float = 0.1
    draws: int = 400
    seed: int = 0

    name: ClassVar[str] = "sphere"
    title: ClassVar[str] = "tokens on the sphere gather in one cluster (SA and USA)"

    @classmethod
    def examples(cls) -> Sequence[Sphere]:
        return [cls(tokens=6, betas=(1.0, 4.0), seeds=2, time=10.0, draws=20)]

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # YAML gives a list
        if self.dim < 3 or self.tokens < 3 or self.seeds < 1 or self.draws < 1 or not self.betas or min(self.betas) <= 0:
            raise UserError("Sphere: choose dim and tokens of at least 3, at least one seed and draw, and betas above 0.")
        if not self.time >= 10 or not self.step > 0:
            raise UserError(f"Sphere: time is {self.time} and step {self.step}; choose at least 10, and a positive step.")

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        times = [0.0, *np.linspace(0.05, 1, 20).tolist(), *np.geomspace(1, self.time, 60)[1:].tolist()]
        x = unit_vectors(self.seeds, self.tokens, self.dim, self.seed)
        uniform = self._sweep(x, times, 1.0, lambda share: tell(0.6 * share, "uniform starts"))
        near = x.clone()
        near[..., -1] = near[..., -1].abs()
        cap = self._sweep(near, times, 1.0, lambda share: tell(0.6 + 0.3 * share, "starts in a hemisphere"))
        away = self._sweep(x, times, -1.0, lambda share: tell(0.9 + 0.08 * share, "repulsion"), betas=(1.0,), until=80.0)[1.0]
        statements = [
            *self._gathered(uniform),
            *(self._monotone(beta, trajectory, 1.0) for beta, trajectory in uniform.items()),
            *(self._dissipates(beta, trajectory) for beta, trajectory in uniform.items()),
            *self._exponential(cap),
            self._monotone(1.0, away, -1.0),
            self._spread(away),
            *self._hemispheres(),
            self._null(),
        ]
        tell(1.0, "done")
        kept = {f"beta={beta:g}": one for beta, one in uniform.items()} | {"repelled": away}
        return Outcome(statements, self._charts(uniform, away), kept, self._note(uniform))

    def _sweep(
        self,
        x: Tensor,
        times: Sequence[float],
        content: float,
        tell: Callable[[float], None],
        betas: Sequence[float] | None = None,
        until: float = math.inf,
    ) -> dict[Any, Trajectory]:
        betas = self.betas if betas is None else betas
        paces = None if self.field == "sa" else [math.exp(-beta) for beta in betas]
        times = [time for time in times if time <= until]
        return sweep(self._model(content), x, betas, times, paces=paces, step=self.step, tell=tell)

    def _model(self, content: float = 1.0, beta: float = 1.0) -> Emformer:
        kernel = Softmax(beta=beta) if self.field == "sa" else Unnormalised(beta=beta, clip=None)
        return idealised(self.dim, content=content, kernel=kernel)

    def _patience(self, beta: float) -> float:
        return crossing_time(OPPOSED, ALIKE, beta, motion=self.field)

    def _clock(self, beta: float, trajectory: Trajectory) -> np.ndarray:
        """Times in the units that `time` has."""
        return np.array(times_of(trajectory)) * (1.0 if self.field == "sa" else math.exp(beta))

    def _gathered(self, found: Mapping) -> list[Statement]:
        statements = []
        for beta, trajectory in found.items():
            one = (components(trajectory.clouds[-1], (ALIKE,)).count[:, 0] == 1).double()
            patient = self._patience(beta) < self.time
            claim = f"beta {beta:g}: the share of starts that are one cluster at time {self.time:g}"
            how = "equals" if patient else "measured"
            statements.append(Statement(claim, f"{SOURCE}; Markdahl 2017", how, 1.0, float(one.mean()), 0.0, len(one)))
        return statements

    def _monotone(self, beta: float, trajectory: Trajectory, sign: float) -> Statement:
        """E is compared through its logarithm: what it misses by is relative."""
        logs = torch.stack([scaled_energy(x, beta) for x in trajectory.clouds]).log()
        worst = float(-torch.expm1(sign * logs.diff(dim=0)).min())
        word = "rises: its largest relative fall" if sign > 0 else "with content -I falls: its largest relative rise"
        source = SOURCE if sign > 0 else "math E.1"
        return Statement(f"beta {beta:g}: the energy {word}", source, "at most", 0.0, worst, MISS, logs.diff(dim=0).numel())

    def _dissipates(self, beta: float, trajectory: Trajectory) -> Statement:
        """The states up to time 1 are evenly spaced."""
        rate = []
        pace = 1.0 if self.field == "sa" else math.exp(-beta)
        block, i = trajectory.block(0), torch.arange(self.tokens)
        for x in trajectory.clouds[:21]:
            velocity = pace * next(block.flow(x, i, None, 0)).update / self.dim**0.5
            rate.append(dissipation(x, velocity, beta, self.field).numpy())
        gained = scaled_energy(trajectory.clouds[20], beta) - scaled_energy(trajectory.clouds[0], beta)
        summed = torch.from_numpy(simpson(np.stack(rate), dx=0.05, axis=0))
        ratio = float((summed / gained - 1).abs().max())
        claim = f"beta {beta:g}: mean w |velocity|^2, summed over time, is the energy that is gained: relative miss"
        return Statement(claim, SOURCE, "at most", 0.0, ratio, 1e-3, self.seeds)

    def _exponential(self, found: Mapping) -> list[Statement]:
        statements = []
        for beta, trajectory in found.items():
            gaps = torch.stack([1 - mean_cosine(x).mean for x in trajectory.clouds]).numpy()
            rates = [_rate(self._clock(beta, trajectory), gap) for gap in gaps.T]
            known = np.array([rate for rate in rates if not math.isnan(rate)])
            mean = float(known.mean()) if len(known) else math.nan
            error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan
            claim = f"beta {beta:g}: from a hemisphere, the rate at which the mean gap 1 - cos closes in the end"
            patient = self._patience(beta) < self.time
            how = "equals" if patient else "measured"
            statements.append(Statement(claim, f"{SOURCE}, Theorem 6.3", how, 2.0, mean, 0.02, len(known), error))
        return statements

    def _spread(self, away: Trajectory) -> Statement:
        null = -1 / (self.tokens - 1)
        cosine = mean_cosine(away.clouds[-1]).mean
        claim = "beta 1, content -I: the mean cosine tends to -1/(N - 1), that of a cloud with its barycentre at 0"
        return Statement(claim, "math E.1", "equals", null, float(cosine[(cosine - null).abs().argmax()]), 1e-6, self.seeds)

    def _hemispheres(self) -> list[Statement]:
        """Wendel 1962: N uniform directions lie in a hemisphere with probability 2^{1 - N} sum_{k < d} (N - 1 choose k)."""
        found = []
        for count, dim in ((8, 8), (8, 12), (16, 8), (12, 4)):
            x = unit_vectors(self.draws, count, dim, self.seed)
            share = float(np.mean([in_hemisphere(one) for one in x]))
            chance = float(binom.cdf(dim - 1, count - 1, 0.5))
            error = math.sqrt(chance * (1 - chance) / self.draws)
            tail = ": d >= N puts every start into one" if dim >= count else ""
            claim = f"the share of clouds of {count} uniform directions in R^{dim} that lie in an open hemisphere{tail}"
            found.append(Statement(claim, "math E.1; Wendel 1962", "equals", chance, share, 4 * error, self.draws, error))
        return found

    def _null(self) -> Statement:
        beta, count = self.betas[0], 512
        energies = scaled_energy(unit_vectors(32, count, self.dim, self.seed), beta)
        predicted = 1 / count + (1 - 1 / count) * uniform_energy(self.dim, beta)
        error = float(energies.std() / math.sqrt(len(energies)))
        claim = f"beta {beta:g}: the mean energy of {count} uniform directions is 1/N plus a Bessel function"
        return Statement(claim, "math E.1", "equals", predicted, float(energies.mean()), 4 * error, len(energies), error)

    def _charts(self, uniform: Mapping, away: Trajectory) -> dict[str, Chart]:
        rows = []
        named = [(f"beta {beta:g}", beta, trajectory) for beta, trajectory in uniform.items()]
        for name, beta, trajectory in [*named, ("beta 1, content -I", 1.0, away)]:
            for time, cloud in zip(self._clock(beta, trajectory), trajectory.clouds, strict=True):
                values = {
                    "mean cosine": mean_cosine(cloud).mean,
                    "energy": scaled_energy(cloud, beta),
                    f"clusters (cosine {ALIKE})": components(cloud, (ALIKE,)).count[:, 0].double(),
                }
                rows += [
                    (panel, name, time, float(v.mean()), float(v.min()), float(v.max()))
                    for panel, v in values.items()
                    if time > 0
                ]
        unit = "time" if self.field == "sa" else "time, in units of e^-beta"
        caption = (
            "How alike tokens are on average over pairs, their energy 2 beta e^-beta E, and into how many groups they fall; mean "
            f"over {self.seeds} starts, the band from the least to the most."
        )
        frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y", "low", "high"])
        charts: dict[str, Chart] = {"gathering": Curves(frame, caption, unit, "", log_x=True)}
        if self.dim == 3:
            beta, first = list(uniform.items())[len(uniform) // 2]
            steps = [
                ("one start", f"token {k}", time, *(cloud[0, k] / self.dim**0.5).tolist())
                for k in range(self.tokens)
                for time, cloud in zip(self._clock(beta, first), first.clouds, strict=True)
            ]
            moved = pd.DataFrame(steps, columns=["panel", "path", "time", "x", "y", "z"])
            charts["paths"] = Paths(moved, f"The way of each token of one start, beta {beta:g}.", ("x", "y", "z"), "sphere")
        return charts

    def _note(self, found: Mapping) -> str:
        apart = []
        for beta, trajectory in found.items():
            count = components(trajectory.clouds[-1], (ALIKE,)).count[:, 0]
            if (count > 1).any():
                wait = self._patience(beta)
                apart.append(
                    f"At beta {beta:g}, {int((count > 1).sum())} of {self.seeds} starts still are several clusters (up to "
                    f"{int(count.max())}); two tokens that begin at cosine {OPPOSED} meet after {wait:.3g} only."
                )
        return " ".join(apart)


def in_hemisphere(x: Tensor) -> bool:
    """Whether some w has <w, x_i> > 0 for all rows: then some w has them all at least 1, which is a linear programme."""
    rows = x.numpy()
    return linprog(np.zeros(rows.shape[1]), A_ub=-rows, b_ub=-np.ones(len(rows)), bounds=(None, None)).status == 0


def _rate(times: np.ndarray, gap: np.ndarray) -> float:
    """-d log gap/dt where the gap is between 1e-3 and 1e-9; nan for fewer than three such states."""
    late = (gap < 1e-3) & (gap > 1e-9)
    return -line(times[late], np.log(gap[late])).slope if late.sum() > 2 else math.nan
