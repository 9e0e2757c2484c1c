"""Gaussian clouds of the plane: where their covariances go, in the cone of all covariances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.kernels import L2, Sinkhorn, Softmax
from emformer.parts import UserError
from emformer.theory.gaussian import (
    Closure,
    Evolution,
    Law,
    blow_up,
    closed_form,
    closure,
    cone,
    evolve,
    from_cone,
    limit,
)
from emformer.theory.outcome import Outcome, Paths, Statement
from emformer.theory.particles import idealised

S3 = "S3; math E.6"
OWN = "math E.6 (own derivation)"
SHOWN = 60  # points of a path

Rows = tuple[tuple[float, float], tuple[float, float]]
ONE: Rows = ((1.0, 0.0), (0.0, 1.0))
FIRST: Rows = ((1.0, 0.0), (0.0, 0.0))
SECOND: Rows = ((0.0, 0.0), (0.0, 1.0))
MIRROR: Rows = ((1.0, 0.0), (0.0, -1.0))
TURN: Rows = ((0.0, -1.0), (1.0, 0.0))
SLANTED: Rows = ((1.0, 0.5), (0.0, 0.3))
UPRIGHT: Rows = ((1.0, 0.0), (0.0, 0.3))


class Case(NamedTuple):
    """F_h and M_h^T of each head (V and A of S3), the factor on A, and the kernel."""

    content: Sequence[Rows]
    tilt: Sequence[Rows]
    sign: float = 1.0
    kernel: parts.Kernel = Softmax()


# what the clouds come to, as S3's figure names it
CONVERGENT = {
    "zero": Case([ONE], [ONE], -1),
    "a line": Case([ONE], [FIRST], -1),
    "a plane": Case([FIRST], [SECOND], -1),
    "two lines": Case([MIRROR], [MIRROR], -1),
}
NORMALISED = {
    "softmax, blow-up": Case([ONE], [SLANTED]),
    "two heads, blow-up": Case([FIRST, SECOND], [FIRST, SECOND]),
    "L2, divergence": Case([ONE], [UPRIGHT], kernel=L2()),
    "softmax, converges or blows up": Case([FIRST], [((0.0, 0.0), (1.0, 0.0))], -1),
    "softmax, blow-up of round clouds": Case([TURN], [TURN], -1),
    "Sinkhorn, divergence": Case([ONE], [SLANTED], kernel=Sinkhorn()),
}
WIDEST = {"L2, divergence": 1e5, "Sinkhorn, divergence": 1e5}  # these see narrow directions to 1e-16 of the trace only


@dataclass(frozen=True, kw_only=True)
class Gaussian(parts.Experiment):
    """The covariance Sigma' = sum_h F_h Sigma M_h^T Sigma + transposed (softmax; L2 and Sinkhorn likewise), from many starts.

    Ten cases whose ends are known in closed form. Four in which the cloud collapses, seen in the cone of covariances: onto zero,
    a line, a plane, two lines; and six in which Sigma/tr Sigma is followed in the unit disk, its edge being the clouds of rank
    one: blow-ups of softmax and of two heads, divergence without blow-up of L2 and Sinkhorn attention, starts of which some
    converge and some blow up, and a blow-up that makes clouds round.

    Args:
        starts: initial covariances of each case.
        seed: of the generator that draws them.
        time: how long the collapsing clouds are followed; they come to their ends as 1/time.
        tolerance: relative error of a step of the integrator.
    """

    starts: int = 12
    seed: int = 0
    time: float = 1e4
    tolerance: float = 1e-10

    name: ClassVar[str] = "gaussian"
    title: ClassVar[str] = "Gaussian clouds: covariances in the cone, collapse and blow-up (S3's figure)"

    def __post_init__(self) -> None:
        if self.starts < 2 or not 10 <= self.time <= 1e6 or not 1e-13 <= self.tolerance <= 1e-6:
            raise UserError("Gaussian: choose at least 2 starts, a time in [10, 1e6] and a tolerance in [1e-13, 1e-6].")

    @classmethod
    def examples(cls) -> Sequence[Gaussian]:
        return [cls(starts=2, time=1000.0, tolerance=1e-7)]

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        starts = _starts(self.starts, self.seed)
        instants = [0.0, *torch.logspace(-2, math.log10(self.time), SHOWN - 1, dtype=torch.float64).tolist()]
        instants[-1] = self.time
        followed: dict[str, list[Evolution]] = {}
        built = {name: _closure(case) for name, case in (CONVERGENT | NORMALISED).items()}
        for done, (name, gaussian) in enumerate(built.items()):
            tell(done / len(built), name)
            times = instants if name in CONVERGENT else None
            until = self.time if name in CONVERGENT else 100.0
            followed[name] = [
                evolve(gaussian, _law(cov), until, times, largest=WIDEST.get(name, 1e8), tolerance=self.tolerance)
                for cov in starts
            ]
        statements = [
            *_collapsing(built, followed, starts, self.time),
            *_blowing_up(built, followed, starts),
            *_diverging(built, followed),
        ]
        tell(1.0, "drawing")
        in_cone = _frame(followed, list(CONVERGENT), cone)
        in_disk = _frame(followed, list(NORMALISED), _disk)
        charts = {
            "cone": Paths(
                in_cone,
                "Covariances ((a, c), (c, b)) of softmax attention in time: inside the cone of full rank, on it of rank one.",
                ("a - b", "2c", "a + b"),
                "cone",
            ),
            "normalised": Paths(
                in_disk,
                "Covariances divided by their trace, in time; on the circle they are of rank one, in the middle round.",
                ("(a - b)/(a + b)", "2c/(a + b)", ""),
                "circle",
            ),
        }
        note = (
            "F commutes with B and the cloud in 'zero', 'a line' and 'softmax, blow-up', and only there S3's closed form is the "
            "solution. Where it does not, the eigenvalues of B decide nothing: B = 0 in 'softmax, converges or blows up', and "
            "half of the starts blow up; B has no kernel in 'two lines', and the limits are of rank one. A blow-up need not "
            "flatten the cloud either: F a quarter turn and M its inverse make it round."
        )
        return Outcome(statements, charts, note=note)


def _starts(count: int, seed: int) -> Tensor:
    """Covariances (count, 2, 2), of trace 1 to 3, uniform in the inner nine tenths of the disk."""
    z, radius, angle = torch.rand(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z, radius, angle = 1 + 2 * z, 0.9 * radius.sqrt(), 2 * math.pi * angle
    return from_cone(torch.stack([z * radius * angle.cos(), z * radius * angle.sin(), z], -1))


def _closure(case: Case) -> Closure:
    content, tilt = (torch.tensor(list(given), dtype=torch.float64) for given in (case.content, case.tilt))
    return closure(idealised(2, form=case.sign * tilt.mT.contiguous(), content=content, kernel=case.kernel, space="flat"))


def _law(cov: Tensor) -> Law:
    return Law(cov.new_zeros(2), cov)


def _disk(cov: Tensor) -> Tensor:
    points = cone(cov)
    return torch.cat([points[..., :2] / points[..., 2:], torch.full_like(points[..., :1], torch.nan)], -1)


def _ends(evolutions: Sequence[Evolution]) -> Tensor:
    return torch.stack([one.covs[-1] for one in evolutions])


def _thin(cov: Tensor) -> Tensor:
    """The least eigenvalue as a share of the trace: 0 at rank one, 1/2 where round."""
    return torch.linalg.eigvalsh(cov)[..., 0] / cov.diagonal(dim1=-2, dim2=-1).sum(-1)


def _miss(found: Tensor, expected: Tensor, of: Tensor) -> float:
    """The largest error relative to the covariances `of`."""
    return float((torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(of)).max())


def _collapsing(built: dict[str, Closure], followed: dict[str, list[Evolution]], starts: Tensor, time: float) -> list[Statement]:
    n = len(starts)
    found = []

    def add(claim: str, source: str, predicted: float, measured: float, tolerance: float) -> None:
        found.append(Statement(claim, source, "equals", predicted, measured, tolerance, n))

    for name in ("zero", "a line"):
        ends = _ends(followed[name])
        error = _miss(ends, closed_form(built[name], starts, time), starts)
        add(f"{name}: Sigma(t) is (Sigma^-1 - tB)^-1 (largest relative error)", S3, 0.0, error, 1e-6)
        left = _miss(ends, limit(built[name], starts), starts)
        add(f"{name}: it tends to (P Sigma^-1 P)^-1 on ker B, 0 elsewhere (largest relative distance)", S3, 0.0, left, 10 / time)
    expected = {
        "zero": (0, 0),
        "a line": (1, 1),
        "a plane": (2, 2),
        "two lines": (0, 1),
    }  # dim ker B, rank
    for name, (kernel, rank) in expected.items():
        values = torch.linalg.eigvalsh(built[name].growth())
        assert int((values.abs() < 1e-12).sum()) == kernel
        ranks = (torch.linalg.eigvalsh(_ends(followed[name])) > 5 / time).sum(-1).double()
        words = (
            f"dim ker B = {kernel}" if kernel == rank else f"{rank}, though dim ker B = {kernel}: F does not commute with Sigma"
        )
        wrong = float((ranks - rank).abs().max())
        add(f"{name}: the limiting rank is {words} (largest deviation)", S3 if kernel == rank else OWN, 0.0, wrong, 0.0)
    end = cone(_ends(followed["a line"]))
    away = float((torch.stack([end[:, 0] + end[:, 2], end[:, 1]]).abs().amax(0) / end[:, 2]).max())
    add("a line: all limits are on one ray of the cone (largest angle)", S3, 0.0, away, 10 / time * float(1 / end[:, 2].min()))
    a, b, c = starts[:, 0, 0], starts[:, 1, 1], starts[:, 0, 1]
    flat = torch.stack([(a * b - c * c) / b, b], -1).diag_embed()
    error = _miss(_ends(followed["a plane"]), flat, starts)
    add("a plane: the limit is diag(det/b, b), in the plane c = 0 (largest relative error)", OWN, 0.0, error, 1e-6)
    both = torch.stack([torch.stack([c.abs(), c], -1), torch.stack([c, c.abs()], -1)], -2)
    error = _miss(_ends(followed["two lines"]), both, starts)
    add("two lines: the limit is |c| ((1, s), (s, 1)), s the sign of c (largest relative error)", OWN, 0.0, error, 1e-6)
    return found


def _blowing_up(built: dict[str, Closure], followed: dict[str, list[Evolution]], starts: Tensor) -> list[Statement]:
    found = []

    def add(claim: str, source: str, predicted: float, measured: float, tolerance: float, n: int) -> None:
        found.append(Statement(claim, source, "equals", predicted, measured, tolerance, n))

    def late(name: str, expected: Tensor, chosen: Tensor) -> float:
        times = torch.tensor([one.blow_up for one in followed[name]], dtype=torch.float64)[chosen]
        return float((times / expected[chosen] - 1).abs().max())

    every = torch.ones(len(starts), dtype=torch.bool)
    a, b, c = starts[:, 0, 0], starts[:, 1, 1], starts[:, 0, 1]
    x, y, z = cone(starts).unbind(-1)
    radius = torch.hypot(x, y)

    name = "softmax, blow-up"
    claim = "at 1/lambda_max(Sigma^1/2 B Sigma^1/2)"
    add(f"{name}: {claim} (largest relative error)", S3, 0.0, late(name, blow_up(built[name], starts), every), 1e-2, len(starts))
    ends = _ends(followed[name])
    add(f"{name}: Sigma/tr tends to rank one (largest least eigenvalue)", S3, 0.0, float(_thin(ends).max()), 1e-4, len(starts))
    values, vectors = torch.linalg.eigh(starts)
    root = vectors * values.sqrt().unsqueeze(-2) @ vectors.mT
    top = (root @ torch.linalg.eigh(root @ built[name].growth() @ root).eigenvectors[..., -1:]).squeeze(-1)
    aim = top.unsqueeze(-1) * top.unsqueeze(-2) / top.square().sum(-1)[:, None, None]
    away = float((_disk(ends) - _disk(aim))[:, :2].norm(dim=-1).max())
    add(
        f"{name}: its axis is Sigma^1/2 v, v the top eigenvector (largest distance in the disk)", S3, 0.0, away, 1e-3, len(starts)
    )

    name = "two heads, blow-up"
    claim = "each head its own axis: at 1/(2 max(a, b))"
    add(
        f"{name}: {claim} (largest relative error)", OWN, 0.0, late(name, 1 / (2 * torch.maximum(a, b)), every), 1e-2, len(starts)
    )
    aim = torch.where(a > b, 1.0, -1.0)
    away = float((_disk(_ends(followed[name]))[:, 0] - aim).abs().max())
    add(f"{name}: Sigma/tr tends to rank one, on the wider axis (largest distance in the disk)", S3, 0.0, away, 1e-3, len(starts))

    name = "softmax, converges or blows up"
    growth = float(torch.linalg.matrix_norm(built[name].growth()))
    add(f"{name}: B = 0 (its norm)", OWN, 0.0, growth, 1e-12, 1)
    blown = torch.tensor([math.isfinite(one.blow_up) for one in followed[name]])
    wrong = float((blown != (c < 0)).sum())
    add(f"{name}: it blows up where c < 0, and nowhere else (starts that do not)", OWN, 0.0, wrong, 0.0, len(starts))
    if bool((c < 0).any()):
        add(f"{name}: at 1/|c| (largest relative error)", OWN, 0.0, late(name, -1 / c, c < 0), 1e-2, int((c < 0).sum()))

    name = "softmax, blow-up of round clouds"
    claim = "at artanh(r/z)/r, r^2 = x^2 + y^2 in the cone"
    expected = torch.atanh(radius / z) / radius
    add(f"{name}: {claim} (largest relative error)", OWN, 0.0, late(name, expected, every), 1e-2, len(starts))
    thin = float(_thin(_ends(followed[name])).min())
    add(f"{name}: Sigma/tr tends to 1/2 (least eigenvalue): a blow-up need not be of rank one", OWN, 0.5, thin, 1e-3, len(starts))
    return found


def _diverging(built: dict[str, Closure], followed: dict[str, list[Evolution]]) -> list[Statement]:
    found = []
    for name, source in (("L2, divergence", S3), ("Sinkhorn, divergence", OWN)):
        paths = followed[name]
        n = len(paths)
        blown = float(sum(math.isfinite(one.blow_up) for one in paths))
        found.append(Statement(f"{name}: no blow-up in finite time (starts that do)", source, "equals", 0.0, blown, 0.0, n))
        rates = [float(built[name].velocity(one.end).cov.trace() / one.covs[-1].trace()) for one in paths]
        thin = _thin(_ends(paths))
        if name.startswith("L2"):
            claim = "tr Sigma grows at rate 2 in the end, as of tokens with x' = F M^T x (the start furthest from it)"
            far = max(rates, key=lambda rate: abs(rate - 2))
            found.append(Statement(f"{name}: {claim}", OWN, "equals", 2.0, far, 0.1, n))
            claim = "Sigma/tr tends to rank one (largest least eigenvalue)"
            found.append(Statement(f"{name}: {claim}", S3, "equals", 0.0, float(thin.max()), 1e-2, n))
        else:
            claim = "tr Sigma grows at most at rate 2 |F| = 2 (the fastest start)"
            found.append(Statement(f"{name}: {claim}", OWN, "at most", 2.0, max(rates), 1e-9, n))
            claim = "the least eigenvalue of Sigma/tr at the end, on average: its shape comes to rest before it is flat"
            found.append(Statement(f"{name}: {claim}", OWN, "measured", math.nan, float(thin.mean()), n=n))
    return found


def _frame(followed: dict[str, list[Evolution]], names: Sequence[str], place: Callable[[Tensor], Tensor]) -> pd.DataFrame:
    rows = []
    for name in names:
        for k, one in enumerate(followed[name]):
            points = place(one.covs)
            rows += [(name, f"start {k}", float(one.times[i]), *points[i].tolist()) for i in _spread(points, SHOWN)]
    return pd.DataFrame(rows, columns=["panel", "path", "time", "x", "y", "z"])


def _spread(points: Tensor, count: int) -> list[int]:
    """At most `count` indices, first and last among them, about evenly along the path."""
    seen = points.nan_to_num()
    length = torch.cat([seen.new_zeros(1), (seen[1:] - seen[:-1]).norm(dim=-1).cumsum(0)])
    marks = torch.linspace(0, 1, count, dtype=seen.dtype) * length[-1]
    found = torch.searchsorted(length, marks).clamp(max=len(length) - 1).tolist()
    chosen = [0] + [b for a, b in pairwise(found) if b != a]
    return chosen if chosen[-1] == len(length) - 1 else [*chosen, len(length) - 1]
