"""What attention cannot exceed: speed, steepness, support, the parting of two clouds, and its Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.geometry.transport import wasserstein
from emformer.kernels import Softmax
from emformer.model import Emformer
from emformer.observables.fields import of
from emformer.parts import UserError
from emformer.theory import bounds
from emformer.theory.outcome import Curves, Outcome, Statement
from emformer.theory.particles import idealised, simulate, times_of
from emformer.trajectory import Trajectory

ROUNDING = 1e-9
SOURCE = "math E.5; 2501.18322"
LIPSCHITZ = "math E.5; 2312.14820"
STEEP = 4.0  # beta |M| R^2 of the seesaw
NEAR = 0.25  # of its bound, what an adversary reaches at least


@dataclass(frozen=True, kw_only=True)
class Bounds(parts.Experiment):
    """The transformer PDE in R^d, with random M and F of one head and of several: are the bounds bounds, and how loose are they.

    Random clouds stay far below most bounds, and would below wrong ones. So two are met by adversaries too, clouds that come
    within about a factor of three of them.

    Args:
        dim: d.
        tokens: N.
        heads: of the model with several; 1 for none.
        draws: random operators and clouds for each statement.
        beta: inverse temperature.
        time: how long clouds are followed; operators have entries of sd 1/(2 sqrt d), so |F| is about 1.
        apart: distance between two clouds at the start, relative to their radius.
        counts: numbers of tokens n, ascending, for the Lipschitz constant; M = F = I.
        reach: R of the ball there; a crowd looks at one token, or two, while n is far below e^(beta R^2/4).
        seed: of the first draw.
    """

    dim: int = 6
    tokens: int = 24
    heads: int = 3
    draws: int = 20
    beta: float = 1.0
    time: float = 2.0
    apart: float = 1e-3
    counts: Sequence[int] = (8, 16, 32, 64, 128, 256)
    reach: float = 8.0
    seed: int = 0

    name: ClassVar[str] = "bounds"
    title: ClassVar[str] = "speed, steepness, support and Lipschitz bounds of attention, and how loose they are"

    @classmethod
    def examples(cls) -> Sequence[Bounds]:
        return [cls(dim=3, tokens=6, heads=2, draws=2, time=0.2, counts=(4, 8))]

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(self.counts))  # YAML gives a list
        if (
            min(self.dim, self.tokens, self.draws) < 2
            or self.heads < 1
            or not (self.beta > 0 and self.time > 0 and self.reach > 0)
        ):
            raise UserError(
                "Bounds: choose dim, tokens and draws of at least 2, a head or more, and beta, time and reach above 0."
            )
        if (
            len(self.counts) < 2
            or min(self.counts) < 2
            or list(self.counts) != sorted(set(self.counts))
            or not 0 < self.apart < 1
        ):
            raise UserError("Bounds: choose at least two ascending counts of 2 tokens or more, and apart between 0 and 1.")

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        speeds, slopes, errors, supports, layers, partings = ([] for _ in range(6))
        rows: list[tuple[str, str, float, float]] = []
        kept: Trajectory | None = None
        kinds = sorted({1, self.heads})
        for k in range(self.draws):
            for heads in kinds:
                draw = self._draw(k, heads)
                moment = _moment(draw, self.beta)
                speeds.append(moment.speed)
                slopes.append(moment.steepness)
                errors.append(moment.error)
                seen = self._follow(draw)
                kept = kept or seen
                supports.append(_support(seen, draw, self.time))
                layers.append(self._layers(draw))
                partings.append(self._parting(draw, rows if (k, heads) == (0, 1) else []))
            tell(0.5 * (k + 1) / self.draws, "clouds")
        lipschitz = self._lipschitz(tell, rows)
        seesaw, _ = self._parting(self._seesaw(), [])
        n = len(kinds) * self.draws
        worst = torch.tensor(partings)
        statements = [
            Statement(
                "D Gamma = beta sum F Cov_a M^T, against autograd: largest error",
                SOURCE,
                "at most",
                0.0,
                max(errors),
                ROUNDING,
                n,
            ),
            Statement("|Gamma|/(sum |F| R), largest", SOURCE, "at most", 1.0, max(speeds), ROUNDING, n),
            Statement("|D Gamma|/(beta sum |F||M| R^2), largest", SOURCE, "at most", 1.0, max(slopes), ROUNDING, n),
            Statement("how loose that is: the bound over |D Gamma|, median", SOURCE, "measured", 43.0, _median(slopes, -1), n=n),
            Statement("R(t)/(R(0) e^(t sum |F|)), largest over t", SOURCE, "at most", 1.0, max(supports), ROUNDING, n),
            Statement("R'/((1 + eps sum |F|) R), largest over Euler layers", SOURCE, "at most", 1.0, max(layers), ROUNDING, n),
            Statement(
                "log growth of max |x - x'| over int L, L = sum |F| (1 + 2 beta |M| R^2), largest",
                SOURCE,
                "at most",
                1.0,
                float(worst[:, 0].max()),
                ROUNDING,
                n,
            ),
            Statement(
                f"the same of a seesaw, which has Cov = R^2 and beta |M| R^2 = {STEEP:g}",
                SOURCE,
                "at least",
                NEAR,
                seesaw,
            ),
            Statement(
                "growth of W2 between the two clouds, median", SOURCE, "measured", math.nan, float(worst[:, 1].median()), n=n
            ),
            Statement(
                "|J|/(|F| (b + sqrt n (1 + 2b))), b = beta |M| R^2, largest",
                LIPSCHITZ,
                "at most",
                1.0,
                lipschitz.largest,
                ROUNDING,
                lipschitz.n,
            ),
            Statement(
                "the same of a crowd torn between two tokens, largest over n",
                LIPSCHITZ,
                "at least",
                NEAR,
                lipschitz.torn,
                0.0,
                len(self.counts),
            ),
            Statement(
                "a crowd that looks at one token: |J| ~ n^p, p",
                LIPSCHITZ,
                "equals",
                0.5,
                lipschitz.crowd.exponent,
                0.05,
                len(self.counts),
            ),
            Statement(
                f"tokens scattered in the ball: |J| ~ n^p from {self._late()[0]} tokens on, p",
                LIPSCHITZ,
                "measured",
                0.5,
                lipschitz.late.exponent,
                n=self.draws,
                error=lipschitz.late.error,
            ),
        ]
        frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y"])
        parting, growth = frame[frame["panel"] == "parting"], frame[frame["panel"] == "Lipschitz"]
        charts = {
            "parting": Curves(
                parting,
                "Two clouds that begin close: how far they part, and how far the bound lets them, first draw.",
                "time",
                "distance",
                log_y=True,
            ),
            "lipschitz": Curves(
                growth, "The local Lipschitz constant of attention on n tokens.", "tokens n", "|J|", log_x=True, log_y=True
            ),
        }
        assert kept is not None
        note = (
            "Bounds are of worst cases, and some hold by orders of magnitude for random clouds: that of stability has R^2 in the "
            "exponent and says nothing of clouds far from the origin. Adversaries come within about a factor of three of it and "
            "of the Lipschitz bound. The exponent 1/2 is an adversary's too: for scattered tokens |J| rises faster while they "
            "are few, and then no more, once it is that of the law they are drawn from."
        )
        return Outcome(statements, charts, {"one head": kept}, note)

    def _draw(self, k: int, heads: int) -> _Draw:
        source = torch.Generator().manual_seed(self.seed + 1000 * heads + k)
        size = 0.5 / math.sqrt(self.dim)
        shape = heads, self.dim, self.dim
        form, content = (size * torch.randn(*shape, generator=source, dtype=torch.float64) for _ in range(2))
        cloud = torch.randn(1, self.tokens, self.dim, generator=source, dtype=torch.float64)
        beside = torch.randn(1, self.tokens, self.dim, generator=source, dtype=torch.float64)
        beside = cloud + self.apart * bounds.radius(cloud) * beside / bounds.radius(beside)
        model = idealised(self.dim, form, content / heads, kernel=Softmax(beta=self.beta), space="flat")
        return _Draw(model, form, content / heads, cloud, beside)

    def _seesaw(self) -> _Draw:
        """In the unit ball, beside itself lifted a little."""
        operator = torch.zeros(1, self.dim, self.dim, dtype=torch.float64)
        operator[0, 1, 0] = 1
        form = STEEP / self.beta * operator
        cloud = bounds.seesaw(self.tokens - self.tokens % 2, self.dim, 1.0)
        beside = cloud.clone()
        beside[..., 1] = 1e-6
        model = idealised(self.dim, form, operator, kernel=Softmax(beta=self.beta), space="flat")
        return _Draw(model, form, operator, cloud, beside)

    def _follow(self, draw: _Draw) -> Trajectory:
        times = [self.time * k / 20 for k in range(21)]
        return simulate(draw.model, torch.cat([draw.cloud, draw.beside]), times, step=0.05)

    def _layers(self, draw: _Draw) -> float:
        """Of Euler steps of size 1, a transformer's."""
        seen = simulate(draw.model, draw.cloud, [float(k) for k in range(9)], step=1.0, method="euler")
        reach = torch.stack([bounds.radius(x) for x in seen.clouds])
        allowed = 1 + bounds.speed_bound(draw.content, torch.ones_like(reach[0]))
        return float((reach[1:] / (allowed * reach[:-1])).max())

    def _parting(self, draw: _Draw, rows: list[tuple[str, str, float, float]]) -> tuple[float, float]:
        """(log growth of the largest distance over int L, largest over t; growth of W2)."""
        seen = self._follow(draw)
        apart = torch.stack([(x[0] - x[1]).norm(dim=-1).max() for x in seen.clouds])
        reach = torch.stack([bounds.radius(x).max() for x in seen.clouds])
        times = times_of(seen)
        allowed = bounds.parting_bound(draw.form, draw.content, self.beta, reach, reach.new_tensor(times))
        w2 = [float(wasserstein(x[:1], x[1:]).w2[0]) for x in (seen.clouds[0], seen.clouds[-1])]
        for time, distance, log_bound in zip(times, apart.tolist(), allowed.tolist(), strict=True):
            rows.append(("parting", "largest |x - x'|", time, distance))
            rows.append(("parting", "theory: the bound", time, float(apart[0]) * math.exp(min(log_bound, 600.0))))
        return float(((apart[1:] / apart[0]).log() / allowed[1:]).max()), w2[1] / w2[0]

    def _lipschitz(self, tell: Callable[[float, str], None], rows: list[tuple[str, str, float, float]]) -> _Lipschitz:
        kernel, turn = Softmax(beta=self.beta), bounds.turn(self.dim)
        one = of(idealised(self.dim, kernel=kernel, space="flat").layer(0))
        turned = of(idealised(self.dim, turn, kernel=kernel, space="flat").layer(0))
        assert one is not None and turned is not None
        eye, found, crowds, worst, torn = torch.eye(self.dim, dtype=torch.float64)[None], [], [], 0.0, 0.0
        reach = torch.tensor([self.reach], dtype=torch.float64)
        for k, n in enumerate(self.counts):
            source = torch.Generator().manual_seed(self.seed)
            x = torch.randn(self.draws, n, self.dim, generator=source, dtype=torch.float64)
            radii = torch.rand(self.draws, n, 1, generator=source, dtype=torch.float64) ** (1 / self.dim)
            x = self.reach * radii * torch.nn.functional.normalize(x, dim=-1)
            allowed = float(bounds.lipschitz_bound(eye, eye, self.beta, reach, n))
            crowds.append(bounds.stretch(one.field, bounds.crowd(n, self.dim, self.reach)).value)
            found.append(bounds.stretch(one.field, x, seed=self.seed).value)
            pulled = float(bounds.stretch(turned.field, bounds.torn(n, self.dim, self.reach)).value)
            torn = max(torn, pulled / allowed)  # |turn| = 1 too
            worst = max(worst, float(torch.cat([crowds[-1], found[-1]]).max()) / allowed, pulled / allowed)
            rows += [
                ("Lipschitz", "a crowd torn between two", float(n), pulled),
                ("Lipschitz", "a crowd that looks at one token", float(n), float(crowds[-1])),
                ("Lipschitz", "scattered tokens, mean", float(n), float(found[-1].mean())),
                ("Lipschitz", "theory: the bound", float(n), allowed),
            ]
            tell(0.5 + 0.5 * (k + 1) / len(self.counts), "Lipschitz constants")
        n = torch.tensor(self.counts, dtype=torch.float64)
        count = len(self.counts) * (self.draws + 2)
        late = len(self._late())
        scattered = bounds.exponent(n[-late:], torch.stack(found[-late:], 1))
        return _Lipschitz(count, worst, torn, bounds.exponent(n, torch.stack(crowds, 1)), scattered)

    def _late(self) -> Sequence[int]:
        """The larger counts, of which scattered tokens are no longer few."""
        return self.counts[len(self.counts) // 2 - 1 :]


class _Draw(NamedTuple):
    model: Emformer
    form: Tensor
    content: Tensor
    cloud: Tensor
    beside: Tensor


class _Lipschitz(NamedTuple):
    """Of `n` clouds the largest |J| over its bound, and that of a torn crowd; how |J| grows with the tokens of a crowd, and of
    many scattered ones."""

    n: int
    largest: float
    torn: float
    crowd: bounds.Growth
    late: bounds.Growth


class _Moment(NamedTuple):
    """At one cloud: speed and steepness over their bounds, and the error of the formula of the latter."""

    speed: float
    steepness: float
    error: float


def _moment(draw: _Draw, beta: float) -> _Moment:
    x, attention = draw.cloud, draw.model.layer(0).attention
    i = torch.arange(x.shape[1])
    a, reach = attention.weights(x, i), bounds.radius(x)
    speed = attention.update(x, i)[1].norm(dim=-1).max()
    slopes = bounds.steepness(a, x, draw.form, draw.content, beta)

    def frozen(query: Tensor) -> Tensor:
        s = beta * torch.einsum("d,hde,ne->hn", query, draw.form, x[0])
        return torch.einsum("hn,nd,hed->e", s.softmax(-1), x[0], draw.content)

    exact = torch.func.vmap(torch.func.jacrev(frozen))(x[0])
    steep = torch.linalg.matrix_norm(slopes, 2).max()
    return _Moment(
        float(speed / bounds.speed_bound(draw.content, reach)),
        float(steep / bounds.steepness_bound(draw.form, draw.content, beta, reach)),
        float((exact - slopes[0]).abs().max()),
    )


def _support(seen: Trajectory, draw: _Draw, time: float) -> float:
    reach = [bounds.radius(x) for x in seen.clouds]
    times = times_of(seen)
    return max(
        float((r / bounds.support_bound(draw.content, reach[0], t)).max()) for t, r in zip(times[1:], reach[1:], strict=True)
    )


def _median(values: list[float], power: int) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median()) ** power
