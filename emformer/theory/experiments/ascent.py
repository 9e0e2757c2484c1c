"""Steps of any length climb the energy where attention attracts, and what it takes to make them fall."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.geometry.integrability import log_energy, relative_drop, violations
from emformer.kernels import Softmax
from emformer.masks import Causal, Full
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.placements import PreNorm
from emformer.settings import Embedding
from emformer.theory.outcome import Curves, Outcome, Statement
from emformer.theory.particles import Space, idealised, simulate
from emformer.trajectory import Trajectory, capture

SOURCE = "math E.4"
ROUNDING = 1e-12
Operators = Literal["psd", "symmetric", "general"]
Operator = Operators | float  # a number c is c I


class Draw(NamedTuple):
    """All that one seed draws, in turn from one generator, so that no part of it tells of another."""

    matrices: Mapping[Operators, Tensor]  # (d, d)
    other: Tensor  # (d, d), general, for an F of its own
    x: Tensor  # unit vectors (1, N, d)
    lengths: Tensor  # (1, N, 1), .1 to 100
    tokens: Tensor  # (1, N), of 64
    model: int  # the seed of the real model's own draws


class Climb(NamedTuple):
    """log E (steps + 1,) of one run, and the run."""

    logs: Tensor
    trajectory: Trajectory

    @property
    def drop(self) -> float:
        """The largest share of E that one step lost."""
        return float(relative_drop(self.logs[:-1], self.logs[1:]).max())


@dataclass(frozen=True, kw_only=True)
class Ascent(parts.Experiment):
    """theta_i <- normalise(theta_i + c_i A_i(theta)): does E_M = sum_ij e^{beta theta_i^T M theta_j} rise at every step?

    M = Q Q^T/d with F = M must, for any c_i >= 0: the theorem. Then what it assumes is taken away, one thing after another: M
    indefinite, F of the other sign, a causal mask, M without symmetry, F of its own, a step along the tangent.

    Args:
        tokens: N.
        dim: d.
        steps: lengths c.
        betas: inverse temperatures of the theorem.
        count: steps of a run.
        seeds: operators and starts of each claim that must hold for all; of a causal mask four, of shares twenty times as many.
        depth: layers of the real Pre-LN model.
        seed: of the first.
    """

    tokens: int = 16
    dim: int = 8
    steps: Sequence[float] = (0.1, 1.0, 10.0, 100.0)
    betas: Sequence[float] = (0.1, 1.0, 5.0)
    count: int = 40
    seeds: int = 5
    depth: int = 40
    seed: int = 0

    name: ClassVar[str] = "ascent"
    title: ClassVar[str] = "steps of any length climb the energy, where attention attracts"

    @classmethod
    def examples(cls) -> Sequence[Ascent]:
        return [cls(tokens=6, dim=4, steps=(0.1, 10.0), betas=(1.0,), count=4, seeds=1, depth=4)]

    def __post_init__(self) -> None:
        for field in ("steps", "betas"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # YAML gives a list
        if min(self.tokens, self.dim, self.count, self.depth) < 2 or self.seeds < 1:
            raise UserError("Ascent: choose tokens, dim, count and depth of at least 2, and at least one seed.")
        if not self.steps or not self.betas or min(*self.steps, *self.betas, 1.0) <= 0:
            raise UserError("Ascent: choose some steps and betas, all above 0.")

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        statements = []
        claims = (self._theorem, self._lengths, self._module, self._tangent, self._indefinite, self._repulsion)
        claims += (self._descent, self._causal, self._free, self._untied)
        for k, claim in enumerate(claims):
            tell(k / len(claims), "steps up and down")
            statements += claim()
        charts, kept = self._pictures()
        tell(1.0, "done")
        return Outcome(statements, charts, kept, NOTE)

    def _theorem(self) -> list[Statement]:
        found = []
        for step in self.steps:
            runs = [self._climb(seed, step, beta=beta) for beta in self.betas for seed in self._seeds()]
            found.append(self._falls(f"M = F = QQ^T/d, steps of {step:g}: the largest fall of E in a step", runs))
        return found

    def _lengths(self) -> list[Statement]:
        """Under Pre-LN a token of length r moves by c/r: a mobility of its own, here from 0.01 to 10."""
        found = []
        for step in self.steps:
            runs = [self._climb(seed, step, beta=beta, space="preln") for beta in self.betas for seed in self._seeds()]
            claim = f"the same with a mobility of each token (Pre-LN, lengths of .1 to 100), steps of {step:g}"
            found.append(self._falls(claim, runs))
        return found

    def _module(self) -> list[Statement]:
        """The model that is trained: tokens, RMSNorm with its eps and gain 1, no FFN, one block for all layers, captured."""
        found = []
        for step in self.steps:
            runs = [self._captured(step, seed) for seed in self._seeds()]
            share = float(np.mean([float(violations(one.logs.diff(), ROUNDING).mean()) for one in runs]))
            claim = f"through a real Pre-LN model of {self.depth} layers, epsilon {step:g}: the share of layers that lower E"
            found.append(Statement(claim, SOURCE, "equals", 0.0, share, 0.0, self.seeds * self.depth))
        return found

    def _tangent(self) -> list[Statement]:
        """Not of the theorem: the step theta + c P A leaves out the part along theta, which holds a token where it is."""
        runs = [self._climb(seed, 0.1, space="sphere") for seed in self._seeds()]
        found = [self._falls("M = F = QQ^T/d, projected to the tangent, steps of 0.1: the largest fall", runs)]
        runs = [self._climb(seed, 10.0, space="sphere") for seed in self._seeds()]
        claim = "M = F = QQ^T/d, projected to the tangent, steps of 10: the largest fall of E in a step"
        return [*found, Statement(claim, SOURCE, "measured", 0.0, max(one.drop for one in runs), n=len(runs))]

    def _indefinite(self) -> list[Statement]:
        """Entries of variance 1/d, so that |M| is about 1.4: what counts is the step times |M|."""

        def drops(step: float) -> list[Climb]:
            return [self._climb(seed, step, "symmetric", beta=beta) for beta in (0.1, 1.0) for seed in self._seeds()]

        small = [*drops(0.1), *drops(1.0)]
        large = [*drops(10.0), *drops(100.0)]
        most = max(one.drop for one in large)
        return [
            self._falls("M = F symmetric and indefinite, steps to 1: the largest fall", small),
            Statement(
                "M = F symmetric and indefinite, steps of 10 and 100: the largest fall",
                SOURCE,
                "at least",
                0.1,
                most,
                0.0,
                len(large),
            ),
        ]

    def _repulsion(self) -> list[Statement]:
        short = [self._climb(seed, step, -1.0) for step in (0.1, 0.5, 1.0) for seed in self._seeds()]
        long = [self._climb(seed, 100.0, -1.0) for seed in self._seeds()]
        least = min(one.drop for one in long)
        return [
            self._falls("M = F = -I, steps to 1: the largest fall", short),
            Statement(
                "M = F = -I, steps of 100: the largest fall, of the start where it is least",
                SOURCE,
                "at least",
                0.1,
                least,
                0.0,
                len(long),
            ),
        ]

    def _descent(self) -> list[Statement]:
        """E falls for M = I, F = -I as long as steps are short; from where on does it rise."""
        grid = [0.25 * k for k in range(2, 21)]
        broken = [
            step
            for step in grid
            if any(
                float(relative_drop(c.logs[1:], c.logs[:-1]).max()) > ROUNDING
                for c in (self._climb(seed, step, 1.0, -1.0) for seed in self._seeds())
            )
        ]
        least = min(broken, default=math.nan)
        claim = "M = I, F = -I: the shortest step at which E rises (known: between 2 and 4)"
        return [Statement(claim, SOURCE, "equals", 3.0, least, 1.0, len(grid) * self.seeds)]

    def _causal(self) -> list[Statement]:
        found = []
        for beta in (0.1, 1.0):
            runs = [self._climb(seed, step, beta=beta, mask=Causal()) for step in self.steps for seed in self._seeds(4)]
            claim = f"M = F = QQ^T/d, causal mask, beta {beta:g}: the largest fall (possible, not generic)"
            found.append(Statement(claim, SOURCE, "measured", 0.0, max(one.drop for one in runs), n=len(runs)))
        return found

    def _free(self) -> list[Statement]:
        found = []
        words: tuple[Operators, ...] = ("symmetric", "general")
        for word in words:
            runs = [[self._climb(seed, 0.1, word, "own", beta) for beta in self.betas] for seed in self._seeds(20)]
            share, ratio = _down(runs)
            claim = f"M {word}, F of its own: the share of steps that lower E (known: .4 to .7)"
            found.append(Statement(claim, SOURCE, "equals", 0.55, share.value, 0.15, len(runs), share.error))
            claim = f"M {word}, F of its own: falls of log E in its whole variation (known: .5 to .8)"
            found.append(Statement(claim, SOURCE, "equals", 0.65, ratio.value, 0.15, len(runs), ratio.error))
        return found

    def _untied(self) -> list[Statement]:
        runs = [[self._climb(seed, 0.1, "general")] for seed in self._seeds(20)]
        share, ratio = _down(runs)
        return [
            Statement(
                "M general, F = M: the share of steps that lower E (known: .1 to .3)",
                SOURCE,
                "equals",
                0.2,
                share.value,
                0.1,
                len(runs),
                share.error,
            ),
            Statement(
                "M general, F = M: falls of log E in its whole variation (known: below .005)",
                SOURCE,
                "at most",
                0.005,
                ratio.value,
                0.0,
                len(runs),
                ratio.error,
            ),
        ]

    def _climb(
        self,
        seed: int,
        step: float,
        form: Operator = "psd",
        content: float | Literal["own"] | None = None,
        beta: float = 1.0,
        space: Space = "postln",
        mask: parts.Mask | None = None,
    ) -> Climb:
        """From what the seed draws; `content` None: F = M."""
        draw = self._draw(seed)
        matrix = draw.matrices[form] if isinstance(form, str) else form * torch.eye(self.dim, dtype=torch.float64)
        field = matrix if content is None else draw.other if content == "own" else content
        model = idealised(self.dim, matrix, field, Softmax(beta=beta), mask or Full(), space=space)
        x = draw.lengths * draw.x if space == "preln" else draw.x
        trajectory = simulate(model, x, [step * k for k in range(self.count + 1)], step=step, method="euler")
        return Climb(torch.cat([log_energy(y, matrix[None], beta)[:, 0] for y in trajectory.clouds]), trajectory)

    @torch.no_grad()
    def _captured(self, step: float, seed: int) -> Climb:
        draw = self._draw(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.model)
            model = Emformer(
                64,
                dim=self.dim,
                depth=self.depth,
                heads=1,
                context=self.tokens,
                form=Dense(),
                content=Dense(),
                kernel=Softmax(),
                mask=Full(),
                placement=PreNorm(),
                norm=RMSNorm(eps=1e-6),
                embedding=Embedding(std=1.0),
                shared=True,
                epsilon=step,
            ).double()
        matrix = draw.matrices["psd"]
        attention: Any = model.layer(0).attention
        attention.form.assign(matrix.mT[None])
        attention.content.assign(matrix.mT[None])
        trajectory = capture(model, draw.tokens)
        # what is read has length sqrt(d), so the energy of unit vectors has the form d M
        logs = [log_energy(y, self.dim * matrix[None])[:, 0] for y in trajectory.clouds]
        return Climb(torch.cat(logs), trajectory)

    def _draw(self, seed: int) -> Draw:
        generator = torch.Generator().manual_seed(seed)
        q, other = torch.randn(2, self.dim, self.dim, generator=generator, dtype=torch.float64) / math.sqrt(self.dim)
        x = torch.randn(1, self.tokens, self.dim, generator=generator, dtype=torch.float64)
        powers = torch.rand(1, self.tokens, 1, generator=generator, dtype=torch.float64)
        tokens = torch.randint(64, (1, self.tokens), generator=generator)
        model = int(torch.randint(2**31, (), generator=generator))
        matrices: dict[Operators, Tensor] = {"psd": q @ q.mT, "symmetric": (q + q.mT) / 2, "general": q}
        return Draw(matrices, other, torch.nn.functional.normalize(x, dim=-1), 10 ** (3 * powers - 1), tokens, model)

    def _seeds(self, times: int = 1) -> range:
        return range(self.seed, self.seed + times * self.seeds)

    def _falls(self, claim: str, runs: Sequence[Climb]) -> Statement:
        return Statement(claim, SOURCE, "at most", 0.0, max(one.drop for one in runs), ROUNDING, len(runs))

    def _pictures(self) -> tuple[dict[str, Curves], dict[str, Trajectory]]:
        shown: dict[str, tuple[Operator, Literal["own"] | None, Space]] = {
            "M = F = QQ^T/d": ("psd", None, "postln"),
            "M = F = QQ^T/d, projected to the tangent": ("psd", None, "sphere"),
            "M = F = -I": (-1.0, None, "postln"),
            "M general, F of its own": ("general", "own", "postln"),
        }
        rows, kept = [], {}
        for panel, (form, content, space) in shown.items():
            for step in self.steps:
                one = self._climb(self.seed, step, form, content, space=space)
                rows += [(panel, f"step {step:g}", k, float(e - one.logs[0])) for k, e in enumerate(one.logs)]
            kept[f"{panel}, step {self.steps[-1]:g}"] = one.trajectory
        frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y"])
        caption = "The energy along one run, log E less its value at the start, for steps of several lengths."
        return {"energy": Curves(frame, caption, "step", "log E - log E(0)")}, kept


NOTE = (
    "The theorem is of the step that normalises theta + c A, as Post-LN and, by the length of its tokens, Pre-LN do. The "
    "placement Sphere takes out the part of A along theta before it steps: the same flow for short steps, but long ones "
    "overshoot, and lower the energy even where attention attracts. Under a general M with F = M a cloud gathers and then, "
    "for many M, turns for ever, which lowers the energy as often as it raises it: falls become more with the time that "
    "is simulated: in 4 units of time, as by default, about 5 % of the steps, 43 % in 20 and 49 % in 60 (of 40 draws)."
)


class Estimate(NamedTuple):
    value: float
    error: float  # of one seed against another


def _down(runs: Sequence[Sequence[Climb]]) -> tuple[Estimate, Estimate]:
    """The share of steps that lower E, and the falls of log E in its variation; `runs` by seeds, each with runs of its own.

    What one seed draws is in all its runs, so that seeds are what is independent. The second is a ratio of sums over all runs;
    its error is that of their quotient to first order.
    """
    changes = [[one.logs.diff() for one in mine] for mine in runs]
    shares = np.array([np.mean([float(violations(one, ROUNDING).mean()) for one in mine]) for mine in changes])
    falls = np.array([sum(float((-one).clamp(min=0).sum()) for one in mine) for mine in changes])
    whole = np.array([sum(float(one.abs().sum()) for one in mine) for mine in changes])
    ratio, root = float(falls.sum() / whole.sum()), math.sqrt(len(runs))
    left = (falls - ratio * whole) / whole.mean()
    return Estimate(float(shares.mean()), float(shares.std(ddof=1) / root)), Estimate(ratio, float(left.std(ddof=1) / root))
