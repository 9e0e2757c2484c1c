"""Tokens at equal angles: particles against one scalar equation, the rates at its end, waiting times, and long contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.attention import Memory
from emformer.geometry.lines import line
from emformer.kernels import Softmax, Unnormalised
from emformer.parts import UserError
from emformer.theory.equiangular import (
    POWER,
    RATES,
    Motion,
    cloud,
    crossing_time,
    layer_cosine,
    long_context,
    solve,
)
from emformer.theory.outcome import Curves, Outcome, Statement
from emformer.theory.particles import idealised, simulate
from emformer.trajectory import Trajectory

SOURCE = "math E.1; 2312.10794, section 6"
NAMES = {"sa": "SA (Post-LN)", "usa": "USA", "preln": "Pre-LN"}
MOTIONS: tuple[Motion, ...] = ("sa", "usa", "preln")


@dataclass(frozen=True, kw_only=True)
class Equiangular(parts.Experiment):
    """Clouds with all cosines equal, under SA, USA and Pre-LN with M = F = I, held against their closed forms.

    Args:
        tokens: N.
        dim: d, at least N.
        beta: inverse temperature.
        cosines: rho at the start; each below 1 and at least 0.
        step: of RK4; for "usa" in units of e^-beta.
        late: times between which the power of Pre-LN is fitted (beta = 1).
        waiting: inverse temperatures at which two tokens go from rho 0 to 0.9.
        context: N of the long context, in as many dimensions (N^2 numbers in float32, twice: 0.8 GB at 10,000).
        gammas: beta = gamma log N there, at rho = 1/2, whose edge is gamma = 2.
    """

    tokens: int = 5
    dim: int = 8
    beta: float = 4.0
    cosines: Sequence[float] = (0.0, 0.5)
    step: float = 0.01
    late: tuple[float, float] = (500.0, 2000.0)
    waiting: Sequence[float] = (4.0, 8.0, 12.0)
    context: int = 10_000
    gammas: Sequence[float] = (1.0, 2.0, 4.0)

    name: ClassVar[str] = "equiangular"
    title: ClassVar[str] = "tokens at equal angles: closed forms, rates, waiting times, long contexts"

    @classmethod
    def examples(cls) -> Sequence[Equiangular]:
        return [cls(step=0.05, waiting=(4.0,), context=200)]

    def __post_init__(self) -> None:
        for field in ("cosines", "waiting", "gammas", "late"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # YAML gives a list
        if not 2 <= self.tokens <= self.dim or self.context < 10:
            raise UserError("Equiangular: choose 2 tokens or more, as many dimensions at least, and a context of at least 10.")
        if not self.cosines or not all(0 <= rho < 1 for rho in self.cosines):
            raise UserError(f"Equiangular: cosines are {list(self.cosines)}; choose some, each in [0, 1).")
        if not (self.beta > 0 and self.step > 0 and 10 <= self.late[0] < self.late[1] and all(b > 0 for b in self.waiting)):
            raise UserError("Equiangular: choose a beta, waiting and step above 0, and late times that ascend from 10 or more.")

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        statements: list[Statement] = []
        rows: list[tuple] = []
        late: list[tuple] = []
        kept: dict[str, Trajectory] = {}
        for motion in MOTIONS:
            for rho in self.cosines:
                tell(0.1, f"{NAMES[motion]} from {rho:g}")
                statements.append(self._against_theory(motion, rho, rows, kept))
        statements += [self._rate(motion) for motion in ("sa", "usa")]
        tell(0.3, "the power of Pre-LN")
        statements += self._power(late, tell)
        tell(0.6, "two tokens wait")
        statements += [self._wait(beta) for beta in self.waiting]
        tell(0.8, "a long context")
        statements += self._context()
        early, power = (pd.DataFrame(found, columns=["panel", "line", "x", "y"]) for found in (rows, late))
        caption = "The gap 1 - rho of equiangular tokens by time, particles and the scalar equation."
        slow = "The gap 1 - rho in the long run: it closes exponentially under SA, as t^-2 under Pre-LN."
        charts = {
            "gap": Curves(early, caption, "time (USA: in units of e^-beta)", "1 - rho", log_y=True),
            "power": Curves(power, slow, "time", "1 - rho", log_x=True, log_y=True),
        }
        return Outcome(statements, charts, kept, NOTE)

    def _model(self, motion: Motion, tokens: int, dim: int, beta: float) -> Any:
        kernel = Unnormalised(beta=beta, clip=None) if motion == "usa" else Softmax(beta=beta)
        return idealised(dim, kernel=kernel, space="preln" if motion == "preln" else "sphere")

    def _against_theory(self, motion: Motion, rho: float, rows: list, kept: dict) -> Statement:
        times = np.linspace(0, 1, 21)
        pace = math.exp(-self.beta) if motion == "usa" else 1.0
        model = self._model(motion, self.tokens, self.dim, self.beta)
        found = simulate(model, cloud(self.tokens, self.dim, rho), (pace * times).tolist(), step=pace * self.step)
        expected = solve(motion, self.tokens, self.beta, rho, times.tolist())
        gaps = np.array([_gaps(x) for x in found.clouds])
        miss = float(np.abs(gaps - expected.gap[:, None]).max())
        for k, time in enumerate(times):
            panel = f"from rho {rho:g}, beta {self.beta:g}, N = {self.tokens}"
            rows.append((panel, NAMES[motion], time, float(gaps[k].mean())))
            rows.append((panel, f"theory, {NAMES[motion]}", time, float(expected.gap[k])))
        kept[f"{motion} from {rho:g}"] = found
        claim = f"{NAMES[motion]} from rho {rho:g}: all cosines of the particles are those of the scalar equation, t <= 1"
        return Statement(claim, SOURCE, "at most", 0.0, miss, 1e-8, len(times))

    def _rate(self, motion: Motion) -> Statement:
        """Of particles that begin near each other, at gaps from 1e-3 down to 1e-9."""
        pace = math.exp(-self.beta) if motion == "usa" else 1.0
        times = np.linspace(0, 8, 33)
        model = self._model(motion, self.tokens, self.dim, self.beta)
        found = simulate(model, cloud(self.tokens, self.dim, 0.999), (pace * times).tolist(), step=pace * 0.02)
        gaps = np.array([_gaps(x).mean() for x in found.clouds])
        late = (gaps < 1e-4) & (gaps > 1e-9)
        slope = -line(times[late], np.log(gaps[late])).slope
        unit = "2 e^beta, here in units of e^beta" if motion == "usa" else "2"
        claim = f"{NAMES[motion]}: the gap closes at the rate {unit}"
        return Statement(claim, SOURCE, "equals", RATES[motion], slope, 2e-3, int(late.sum()))

    def _power(self, rows: list, tell: Callable[[float, str], None]) -> list[Statement]:
        """Tokens grow longer, and slower: steps in proportion to the time."""
        statements = []
        for rho in self.cosines:
            model, x = self._model("preln", self.tokens, self.dim, 1.0), cloud(self.tokens, self.dim, rho)
            marks = [0.0, *np.geomspace(1, self.late[1], 60).tolist()]
            gaps = []
            for begin, end in pairwise(marks):
                x = simulate(model, x, [0.0, end - begin], step=0.05 * max(1.0, begin)).clouds[-1]
                gaps.append(float(_gaps(x).mean()))
            times, values = np.array(marks[1:]), np.array(gaps)
            late = times >= self.late[0]
            power = -line(np.log(times[late]), np.log(values[late])).slope
            claim = f"Pre-LN from rho {rho:g}, beta 1: the gap falls as t^-p for t in [{self.late[0]:g}, {self.late[1]:g}], p ="
            statements.append(Statement(claim, "math E.1", "equals", POWER, power, 0.02, int(late.sum())))
            solved = solve("preln", self.tokens, 1.0, rho, marks).gap[1:]
            claim = f"Pre-LN from rho {rho:g}, beta 1: the gap of the particles over that of the scalar equation, less 1, t <= "
            miss = float(np.abs(values / solved - 1).max())
            statements.append(Statement(f"{claim}{self.late[1]:g}", "math E.1", "at most", 0.0, miss, 1e-5, len(values)))
            panel = f"from rho {rho:g}, beta 1, long times"
            rows += [(panel, NAMES["preln"], t, g) for t, g in zip(times, values, strict=True)]
            rows += [(panel, f"theory, {NAMES['preln']}", t, g) for t, g in zip(times, solved, strict=True)]
            post = solve("sa", self.tokens, 1.0, rho, [0.0, *np.linspace(1, 12, 30).tolist()])
            rows += [(panel, f"theory, {NAMES['sa']}", t, g) for t, g in zip(np.linspace(1, 12, 30), post.gap[1:], strict=True)]
        return statements

    def _wait(self, beta: float) -> Statement:
        """When two particles at right angles reach cosine 0.9; between states the inverse of rho is interpolated."""
        expected = crossing_time(0.0, 0.9, beta)
        times = np.linspace(0, 1.05 * expected, 400)
        model = self._model("sa", 2, 2, beta)
        # steps up to 0.5, of a motion that takes thousands: RK4 is stable to 1.4 here
        found = simulate(model, cloud(2, 2, 0.0), times.tolist(), step=max(0.1, expected / 15_000))
        cosines = 1 - np.array([_gaps(x).mean() for x in found.clouds])
        measured = float(np.interp(0.9, cosines, times))
        claim = f"two tokens at right angles reach cosine 0.9 at beta {beta:g} after the time"
        return Statement(claim, "math E.1", "equals", expected, measured, 0.01 * expected)

    def _context(self) -> list[Statement]:
        statements = []
        count, rho = self.context, 0.5
        keys = cloud_in_float(count, rho)
        for gamma in self.gammas:
            beta = gamma * math.log(count)
            exact = layer_cosine(count, rho, beta)
            claim = f"one SA layer, {count:,} tokens of cosine 1/2, beta = {gamma:g} log N: the cosine of what it makes of two"
            statements.append(Statement(claim, SOURCE, "equals", exact, _decoded_cosine(keys, beta), 1e-4))
            limit = long_context(rho, gamma)
            claim = f"and its limit for many tokens, beta = {gamma:g} log N, by the closed form at N = {count:,}"
            statements.append(Statement(claim, SOURCE, "equals", limit, exact, 0.005))
        return statements


NOTE = (
    "The long context takes the model's own attention for two tokens, the last, with all others in its memory. Limits are "
    "reached as N^-|gamma/2 - 1| only: at gamma = 3 and N = 10,000 the cosine is still 0.505."
)


def cloud_in_float(count: int, rho: float) -> Tensor:
    """`cloud` of as many dimensions as tokens, in float32 and without a copy in float64."""
    apart = math.sqrt(1 - rho)
    common = (math.sqrt(1 + (count - 1) * rho) - apart) / count
    found = torch.full((1, count, count), common, dtype=torch.float32)
    found[0].diagonal().add_(apart)
    return found


@torch.no_grad()
def _decoded_cosine(x: Tensor, beta: float) -> float:
    """Of the updates of the last two of the tokens x (1, N, d), attention seeing all of them."""
    count = x.shape[1]
    attention = idealised(x.shape[-1], kernel=Softmax(beta=beta), space="flat", dtype=torch.float32).layer(0).attention
    memory = Memory(count)
    memory.append(x[:, :-2])
    mixture = attention.absorbed(x[:, -2:], torch.arange(count - 2, count), memory)
    first, second = attention.lift(mixture)[0].double()
    return float(first @ second / (first.norm() * second.norm()))


def _gaps(x: Tensor) -> np.ndarray:
    """1 - cos of all pairs of one cloud (1, N, d), as |theta_i - theta_j|^2/2: exact however close they are."""
    theta = torch.nn.functional.normalize(x[0], dim=-1)
    i, j = np.triu_indices(len(theta), 1)
    return ((theta[i] - theta[j]).square().sum(-1) / 2).numpy()
