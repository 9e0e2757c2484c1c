"""Tokens on the sphere that only look back: the first one leads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.parts import UserError
from emformer.theory.ensembles import ensemble
from emformer.theory.limits import toward
from emformer.theory.outcome import Chart, Curves, Outcome, Paths, Statement
from emformer.theory.particles import unit_vectors
from emformer.trajectory import Trajectory

SOURCE = "math E.1; 2411.04990, theorem 4.1"
SEEN = 10.0  # of time: later nothing moves that could be seen
FLOOR = 1e-16  # below it a distance is rounding, and a logarithm shows nothing


@dataclass(frozen=True, kw_only=True)
class CausalClustering(parts.Experiment):
    """SA with the causal mask, and a random M for each start: V = I, where all tokens should come to the first one, which stays;
    and random symmetric V, where the first one goes its own way to the top eigenvector.

    Args:
        dims: spaces R^d for V = I, each at least 2.
        tokens: N, at least 2.
        seeds: starts of each, at least 1; start k is drawn from `seed` + k.
        beta: inverse temperature.
        time: how long for V = I.
        contents: how many random V, each with `seeds` starts in R^3; 0 leaves them out.
        content_time: how long for those.
        step: of RK4; half of it for other V, some of which are faster.
        seed: of the first start.
    """

    dims: Sequence[int] = (2, 3, 5)
    tokens: int = 16
    seeds: int = 5
    beta: float = 1.0
    time: float = 300.0
    contents: int = 8
    content_time: float = 100.0
    step: float = 0.1
    seed: int = 0

    name: ClassVar[str] = "causal"
    title: ClassVar[str] = "tokens that look back gather at the first one, whatever the queries and keys"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))  # YAML gives a list
        if not self.dims or min(self.dims) < 2 or self.tokens < 2 or self.seeds < 1 or self.contents < 0:
            raise UserError("CausalClustering: choose dims and tokens of at least 2, a seed or more, and no negative contents.")
        if not all(one > 0 for one in (self.beta, self.time, self.content_time, self.step)):
            raise UserError("CausalClustering: beta, time, content_time and step are above 0.")

    @classmethod
    def examples(cls) -> Sequence[CausalClustering]:
        return [cls(dims=(3,), tokens=4, seeds=2, time=30.0, contents=1, content_time=10.0, step=0.5)]

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        share = 1 / (len(self.dims) + self.contents)
        statements, rows = [], []
        trajectories: dict[str, Trajectory] = {}
        charts: dict[str, Chart] = {}
        for part, dim in enumerate(self.dims):
            times = _spaced(self.time)
            found = self._starts(dim, 1.0, times, lambda done, part=part: tell(share * (part + done), "V = I"))
            far, moved = [], []
            for k, one in enumerate(found):
                first = one.clouds[0][:, 0]
                path = [float(toward(cloud, first).amax()) for cloud in one.clouds]
                line = f"V = I, d = {dim}", f"V = I, seed {self.seed + k}"
                rows += [(*line, t, max(y, FLOOR)) for t, y in zip(times, path, strict=True) if t > 0]
                far.append(path[-1])
                moved.append(max(float((cloud[:, 0] - first).abs().max()) for cloud in one.clouds) / dim**0.5)
            trajectories[f"d={dim}"] = found[0]
            statements += [
                Statement(
                    f"V = I, d = {dim}: 1 - cos of the token farthest from x_1(0) at t = {self.time:g}, of all starts",
                    SOURCE,
                    "at most",
                    0.0,
                    max(far),
                    1e-6,
                    self.seeds,
                ),
                Statement(f"V = I, d = {dim}: what the first token moves", SOURCE, "at most", 0.0, max(moved), 1e-12, self.seeds),
            ]
            if dim == 3:
                words = "One start, V = I: all come to the first."
                charts["paths"] = Paths(_paths(found[0], times), words, ("1", "2", "3"), "sphere")
        note = ""
        if self.contents:
            other, more = self._general(lambda done: tell(share * (len(self.dims) + self.contents * done), "other V"))
            statements += other
            rows += more
            note = (
                "With V other than I a token also draws itself to the top eigenvector or to its opposite, and may stay there, or "
                "where M holds it, against the first one: not all follow."
            )
        frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y"])
        caption = (
            "V = I: 1 - cos of the farthest token from x_1(0). Other V: 1 - |cos| of the first token with the top eigenvector, "
            "one start each."
        )
        charts["distance"] = Curves(frame, caption, "time", "1 - cos", log_x=True, log_y=True)
        return Outcome(statements, charts, trajectories, note)

    def _starts(
        self, dim: int, content: float | Tensor, times: list[float], tell: Callable[[float], None], first: int = 0
    ) -> list[Trajectory]:
        step = self.step / (2 if isinstance(content, Tensor) else 1)
        forms, clouds = [], []
        for k in range(first, first + self.seeds):
            generator = torch.Generator().manual_seed(self.seed + k)
            forms.append(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
            clouds.append(unit_vectors(1, self.tokens, dim, self.seed + k + 1000))
        x, kernel = torch.cat(clouds), Softmax(beta=self.beta)
        return ensemble(torch.stack(forms), x, times, step=step, tell=tell, content=content, kernel=kernel, mask=Causal())

    def _general(self, tell: Callable[[float], None]) -> tuple[list[Statement], list[tuple[str, str, float, float]]]:
        """Symmetric V."""
        times = _spaced(self.content_time)
        rows, own, top = [], [], []
        follow, axis = torch.zeros(2, self.contents, self.seeds, dtype=torch.float64)
        for k in range(self.contents):
            half = torch.randn(3, 3, generator=torch.Generator().manual_seed(self.seed + 2000 + k), dtype=torch.float64) / 2
            content = half + half.mT
            phi = torch.linalg.eigh(content).eigenvectors[None, :, -1]
            found = self._starts(
                3, content, times, lambda done, k=k: tell((k + done) / self.contents), first=3000 + k * self.seeds
            )
            for start, one in enumerate(found):
                first = [cloud[:, :1] for cloud in one.clouds]
                flow = [first[0] @ torch.linalg.matrix_exp(time * content).mT for time in times]
                own.append(max(float(toward(a, b[:, 0])) for a, b in zip(first, flow, strict=True)))
                path = [float(torch.minimum(toward(cloud, phi), toward(cloud, -phi))) for cloud in first]
                top.append(path[-1])
                rest = toward(one.clouds[-1][:, 1:], first[-1][:, 0])
                follow[k, start] = (rest < 1e-6).double().mean()
                axis[k, start] = (torch.minimum(rest, 2 - rest) < 1e-6).double().mean()
                if start == 0:
                    rows += [("other V", f"V {k}", t, max(y, FLOOR)) for t, y in zip(times, path, strict=True) if t > 0]
        n = len(own)
        shares = [_by_content(one) for one in (follow, axis)]
        return [
            Statement(
                "V symmetric: 1 - cos of the first token with e^{tV} x_1(0), its own (Oja) flow; largest",
                "math E.1",
                "at most",
                0.0,
                max(own),
                1e-10,
                n,
            ),
            Statement(
                "V symmetric: 1 - |cos| of the first token with the top eigenvector in the end; largest",
                "math E.1; 2411.04990",
                "at most",
                0.0,
                max(top),
                1e-6,
                n,
            ),
            Statement("V symmetric: share of the others that end where the first does", "math E.1", "equals", 1.0, *shares[0]),
            Statement("V symmetric: share that end there or at its opposite", "math E.1", "measured", math.nan, *shares[1]),
        ], rows


def _by_content(shares: Tensor) -> tuple[float, float, int, float]:
    """Mean, tolerance 0, n and standard error of (V, starts): starts with one V are alike, so that n is the number of V."""
    means = shares.mean(1)
    n = len(means)
    return float(means.mean()), 0.0, n, float(means.std()) / n**0.5 if n > 1 else math.nan


def _spaced(time: float) -> list[float]:
    """60 times, ever farther apart: much happens early."""
    found = [0.0, *(time * 10 ** (3 * (k / 59 - 1)) for k in range(60))]
    assert all(a < b for a, b in pairwise(found))
    return found


def _paths(trajectory: Trajectory, times: list[float]) -> pd.DataFrame:
    scale = trajectory.clouds[0].shape[-1] ** -0.5
    rows = [
        ("V = I", f"token {k + 1}", time, *(scale * cloud[0, k]).tolist())
        for k in range(trajectory.clouds[0].shape[1])
        for time, cloud in zip(times, trajectory.clouds, strict=True)
        if time <= SEEN
    ]
    return pd.DataFrame(rows, columns=["panel", "path", "time", "x", "y", "z"])
