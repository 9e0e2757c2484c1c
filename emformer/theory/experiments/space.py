"""Tokens in R^d without a norm: once their growth is divided out they gather in corners, on planes, at the ends of a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.parts import UserError
from emformer.theory.limits import boolean, depth, distinct, leaders, levels, rank, support, vertices
from emformer.theory.outcome import Chart, Curves, Heat, Outcome, Paths, Statement
from emformer.theory.particles import idealised, simulate, times_of, unit_vectors
from emformer.theory.rescaled import patterns, rescaled
from emformer.trajectory import Trajectory

SOURCE = "math E.2; 2305.05465"
DIRECTIONS = 200  # in which the hull is looked at
SHOWN = (0, 2, 4, 8)  # times of the patterns on a line
SPECTRUM = (1.0, 0.5, -0.4)  # of V with one eigenvalue on top: the rate of time, one that follows, one that pushes apart


@dataclass(frozen=True, kw_only=True)
class Space(parts.Experiment):
    """x' = V sum_j P_ij x_j with P = softmax(x^T M x), seen as z = e^{-tV} x: which limit does the spectrum of V choose.

    V = I and a random M > 0, in the plane and in space (a polytope); V with one largest eigenvalue and a random M (planes); the
    line (Boolean weights and leaders).

    Args:
        tokens: N, at least 4.
        seeds: starts of each, at least 1; on planes each with operators of its own.
        time: how long, at least 15, in units of the largest eigenvalue's inverse; 40 is where growth is no longer followed.
        step: of RK4, below 1.
        near: what counts as the same place, row or number; > 0.
        seed: of the first start.
    """

    tokens: int = 40
    seeds: int = 8
    time: float = 25.0
    step: float = 0.05
    near: float = 1e-3
    seed: int = 0

    name: ClassVar[str] = "space"
    title: ClassVar[str] = "tokens in R^d: polytopes, hyperplanes and leaders (rescaled tokens)"

    def __post_init__(self) -> None:
        if self.tokens < 4 or self.seeds < 1 or not 15 <= self.time < math.inf:
            raise UserError("Space: choose at least 4 tokens, one seed, and a time of 15 or more.")
        if not 0 < self.step < 1 or not self.near > 0:
            raise UserError("Space: choose a step between 0 and 1, and near above 0.")

    @classmethod
    def examples(cls) -> Sequence[Space]:
        return [cls(tokens=8, seeds=1, time=15.0, step=0.5)]

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        statements: list[Statement] = []
        charts: dict[str, Chart] = {}
        trajectories: dict[str, Trajectory] = {}
        found = [
            self._growth(lambda share: tell(0.2 * share, "against the tokens themselves")),
            self._polytope(lambda share: tell(0.2 + 0.3 * share, "polytopes")),
            self._planes(lambda share: tell(0.5 + 0.3 * share, "planes")),
            self._line(lambda share: tell(0.8 + 0.2 * share, "leaders")),
        ]
        for one in found:
            statements += one.statements
            charts |= one.charts
            trajectories |= one.trajectories
        return Outcome(
            statements,
            charts,
            trajectories,
            "Here z = e^{-tV} x. A third plane, or a row that is not Boolean, takes a token that balances at 0, which random "
            "starts do not have.",
        )

    def _times(self) -> list[float]:
        return [self.time * k / 40 for k in range(41)]

    def _draw(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed + seed), dtype=torch.float64)

    def _cube(self, dim: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return 5 * (2 * torch.rand(self.seeds, self.tokens, dim, generator=generator, dtype=torch.float64) - 1)

    def _growth(self, tell: Callable[[float], None]) -> Outcome:
        """z against x itself while x is small; and how fast it does not stay so."""
        form, content = self._draw(3, 3, seed=1), self._draw(3, 3, seed=2) / 2
        model, x = idealised(3, form, content, space="flat"), unit_vectors(self.seeds, self.tokens, 3, self.seed)
        step, times = min(self.step, 0.02), [0.0, 0.5]
        direct, seen = (flow(model, x, times, step=step) for flow in (simulate, rescaled))
        tell(0.5)
        miss = max(
            float((a @ torch.linalg.matrix_exp(-t * content).mT - b).abs().max())
            for t, a, b in zip(times, direct.clouds, seen.clouds, strict=True)
        )
        large = simulate(idealised(2, space="flat"), self._cube(2), self._times(), step=self.step)
        early, late = (large.clouds[k].norm(dim=-1).amax(-1).log() for k in (20, 40))
        rate = (late - early) / (self.time - times_of(large)[20])
        size = float(large.clouds[-1].abs().max())
        return Outcome(
            [
                Statement("largest difference of z and e^{-tV} x up to t = 1/2", SOURCE, "at most", 0.0, miss, 1e-8, self.seeds),
                Statement("V = I: rate at which the farthest token goes away", SOURCE, "equals", 1.0, *_mean(rate, 1e-4)),
                Statement(f"V = I: largest coordinate at t = {self.time:g}", SOURCE, "measured", math.nan, size, n=self.seeds),
            ]
        )

    def _polytope(self, tell: Callable[[float], None]) -> Outcome:
        """V = I and M > 0."""
        statements, rows, trajectories = [], [], {}
        for part, dim in enumerate((2, 3)):
            x = self._cube(dim)
            root = self._draw(dim, dim, seed=5)
            form = root @ root.mT / dim + torch.eye(dim, dtype=root.dtype)
            model = idealised(dim, form, space="flat")
            found = rescaled(model, x, self._times(), step=self.step, tell=lambda share, part=part: tell((part + share) / 2))
            trajectories[f"polytope-{dim}d"] = found
            u = torch.nn.functional.normalize(self._draw(DIRECTIONS, dim, seed=3), dim=-1)
            growth = max(float((support(b, u) - support(a, u)).max()) for a, b in pairwise(found.clouds))
            for time, cloud in zip(times_of(found)[::2], found.clouds[::2], strict=True):
                corners = vertices(cloud, self.near).sum(-1)
                rows += [(f"V = I, d = {dim}", f"seed {self.seed + k}", time, float(c)) for k, c in enumerate(corners)]
            last = found.clouds[-1]
            ends = vertices(last, self.near)
            away = torch.stack([torch.cdist(cloud, cloud[some]).amin(-1) for cloud, some in zip(last, ends, strict=True)])
            corner = away <= self.near
            reached = corner | (depth(last) <= self.near) | (last.norm(dim=-1) <= self.near)
            moves = float((last - found.clouds[-2]).norm(dim=-1).max())
            statements += [
                # rounding of coordinates up to 5
                Statement(
                    f"d = {dim}: most that the hull grows in any of {DIRECTIONS} directions between two times",
                    SOURCE,
                    "at most",
                    0.0,
                    growth,
                    1e-14,
                    self.seeds,
                ),
                Statement(
                    f"d = {dim}: share of tokens that end in a vertex, on the boundary or at 0",
                    SOURCE,
                    "equals",
                    1.0,
                    *_mean(reached.double().mean(-1), 0.0),
                ),
                Statement(f"d = {dim}: in a vertex", SOURCE, "measured", math.nan, *_mean(corner.double().mean(-1), 0.0)),
                Statement(f"d = {dim}: what any token still moves", SOURCE, "at most", 0.0, moves, self.near, self.seeds),
            ]
        flat = trajectories["polytope-2d"]
        points = [
            ("V = I", f"token {k}", time, *cloud[0, k].tolist(), math.nan)
            for k in range(self.tokens)
            for time, cloud in zip(times_of(flat), flat.clouds, strict=True)
        ]
        charts: dict[str, Chart] = {
            "vertices": Curves(
                pd.DataFrame(rows, columns=["panel", "line", "x", "y"]),
                f"Vertices of the tokens' hull, to within {self.near:g}: it shrinks to the polytope that their leaders span.",
                "time",
                "vertices",
            ),
            "polytope": Paths(
                pd.DataFrame(points, columns=["panel", "path", "time", "x", "y", "z"]),
                "Rescaled tokens of one start find the corners of a polytope.",
                ("z 1", "z 2", ""),
            ),
        }
        return Outcome(statements, charts, trajectories)

    def _planes(self, tell: Callable[[float], None]) -> Outcome:
        """V with one eigenvalue on top: each seed has a V, and an M with phi^T M phi > 0."""
        rows, ends, counts, trajectories = [], [], [], {}
        dim = len(SPECTRUM)
        for seed in range(self.seeds):
            basis, form = self._draw(2, dim, dim, seed=100 + seed)
            dual = torch.linalg.inv(basis)
            content = basis @ torch.diag(basis.new_tensor(SPECTRUM)) @ dual
            phi, normal = basis[:, 0], torch.nn.functional.normalize(dual[0], dim=0)
            form = form * (phi @ form @ phi).sign()
            x = self._draw(1, self.tokens, dim, seed=200 + seed)
            found = rescaled(
                idealised(dim, form, content, space="flat"),
                x,
                self._times(),
                step=self.step,
                tell=lambda share, seed=seed: tell((seed + share) / self.seeds),
            )
            trajectories.setdefault("planes", found)
            left = torch.stack([levels(cloud @ normal).within[0] for cloud in found.clouds])
            left = left / left[0, 0]
            ends.append(left[-1])
            counts.append(int((left[-1] > self.near**2).sum()) + 1)
            rows += [
                (f"{k + 1} plane{'s' * (k > 0)}", f"seed {self.seed + seed}", time, max(float(one[k]), 1e-18))
                for time, one in zip(times_of(found), left, strict=True)
                for k in range(3)
            ]
        worst = torch.stack(ends).amax(0)
        statements = [
            Statement(
                "one largest eigenvalue: variance of <z, phi*> left about 3 planes, of that at the start; worst start",
                SOURCE,
                "at most",
                0.0,
                float(worst[2]),
                1e-9,
                self.seeds,
            ),
            Statement("the same about 2 planes", SOURCE, "measured", math.nan, float(worst[1]), n=self.seeds),
            Statement("the same about 1 plane", SOURCE, "measured", math.nan, float(worst[0]), n=self.seeds),
            Statement("most planes that any start needs", SOURCE, "at most", 3.0, float(max(counts)), n=self.seeds),
        ]
        chart = Curves(
            pd.DataFrame(rows, columns=["panel", "line", "x", "y"]),
            "What tokens vary about the best 1, 2 and 3 parallel planes, of what they vary at the start (drawn down to 1e-18).",
            "time",
            "share of the variance",
            log_y=True,
        )
        return Outcome(statements, {"planes": chart}, trajectories)

    def _line(self, tell: Callable[[float], None]) -> Outcome:
        """d = 1, V = M = 1."""
        starts = 8 * self.seeds
        x = self._draw(starts, self.tokens, 1, seed=4)
        times = sorted({*SHOWN, *self._times()})
        found = rescaled(idealised(1, space="flat"), x, [float(t) for t in times], step=self.step, tell=tell)
        seen = [one[:, 0] for one in patterns(found)]
        rows = []
        for time, weights in zip(times, seen, strict=True):
            for panel, values in (("distinct rows", distinct(weights, self.near)), ("rank", rank(weights, self.near))):
                y = values.double()
                rows.append((panel, "mean", time, float(y.mean()), float(y.quantile(0.05)), float(y.quantile(0.95))))
        values, last = x[..., 0], seen[-1]
        # who is above 0 follows the greatest, who is below it the least
        index = torch.arange(self.tokens)
        upper, lower = values.argmax(-1, keepdim=True), values.argmin(-1, keepdim=True)
        extreme = (index == upper) & (values.amax(-1, keepdim=True) > 0) | (index == lower) & (values.amin(-1, keepdim=True) < 0)
        led = (leaders(last) == extreme).all(-1).double()
        loose = boolean(last).sort(-1).values
        most = float(distinct(last, self.near).max())
        statements = [
            Statement("line: most distinct rows of the limiting weights", SOURCE, "at most", 3.0, most, n=starts),
            Statement("line: their largest rank", SOURCE, "at most", 3.0, float(rank(last, self.near).max()), n=starts),
            Statement(
                "line: most weight that any row but one gives away from one token",
                SOURCE,
                "at most",
                0.0,
                float(loose[:, -2].max()),
                self.near,
                starts,
            ),
            Statement("line: the same of that one row", SOURCE, "measured", math.nan, float(loose[:, -1].max()), n=starts),
            Statement("line: starts whose leaders are the extreme tokens, share", SOURCE, "equals", 1.0, *_mean(led, 0.0)),
        ]
        order = values[0].argsort()
        shown = np.concatenate([seen[times.index(time)][0][order][:, order].numpy().ravel() for time in SHOWN])
        place = np.indices((self.tokens, self.tokens)).reshape(2, -1)
        heat = pd.DataFrame(
            {
                "panel": np.repeat([f"t = {time}" for time in SHOWN], self.tokens**2),
                "x": np.tile(place[1], len(SHOWN)),
                "y": np.tile(place[0], len(SHOWN)),
                "value": shown,
            }
        )
        charts: dict[str, Chart] = {
            "rows": Curves(
                pd.DataFrame(rows, columns=["panel", "line", "x", "y", "low", "high"]),
                f"Weights of tokens on a line become Boolean: {starts} starts, the band from the 5th to the 95th of a hundred.",
                "time",
                "number",
                log_y=True,
            ),
            "pattern": Heat(
                heat, "Weights on a line, tokens in their order on it, of one start.", "key", "query", "weight", limits=(0.0, 1.0)
            ),
        }
        return Outcome(statements, charts, {"line": found})


def _mean(values: Tensor, tolerance: float) -> tuple[float, float, int, float]:
    """(mean, tolerance, n, standard error), as a statement takes them."""
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
    return float(values.mean()), tolerance, len(values), error
