"""When is an attention field a gradient: the integrability defect of each departure from the gradient corner, by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.geometry.integrability import Field as Velocities
from emformer.geometry.integrability import Space, defect, estimated_defect, exact_defect, project
from emformer.kernels import Sinkhorn, Softmax, Unnormalised
from emformer.masks import Causal
from emformer.observables.fields import Layer, layer
from emformer.parts import UserError
from emformer.theory.outcome import Curves, How, Outcome, Statement
from emformer.theory.particles import idealised, simulate, unit_vectors
from emformer.trajectory import Trajectory

SOURCE = "math E.3"
ZERO = 1e-20  # of omega: what a gradient leaves in float64
PROBES = 256


@dataclass(frozen=True, kw_only=True)
class Field(parts.Experiment):
    """omega = |(J - J^T)/2|^2/|J|^2 of attention fields on unit vectors, in R^d and on the sphere: 0 a gradient, 1/2 a field
    whose Jacobian is random.

    The fields are those of the model's own kernels and operators. Numbers of the table (math E.3) are of single draws, so they
    are claimed within two standard deviations between draws.

    Args:
        dim: d.
        tokens: N; the Jacobian has N d rows.
        beta: inverse temperature.
        scale: standard deviation of the entries of M and F.
        draws: clouds with operators of their own.
        betas: of the chart, with a quarter of the draws; none for no chart.
        seed: of the first draw.
    """

    dim: int = 6
    tokens: int = 12
    beta: float = 1.5
    scale: float = 0.4
    draws: int = 20
    betas: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0)
    seed: int = 0

    name: ClassVar[str] = "field"
    title: ClassVar[str] = "which attention is a gradient flow: the integrability defect of each obstruction"

    @classmethod
    def examples(cls) -> Sequence[Field]:
        return [cls(dim=3, tokens=4, draws=4, betas=(1.0,))]

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # YAML gives a list
        if self.dim < 3 or self.tokens < 2 or self.draws < 4 or not (self.scale > 0 and min((self.beta, *self.betas)) > 0):
            raise UserError("Field: choose dim of at least 3, tokens of at least 2, draws of at least 4; beta and scale above 0.")

    def run(self, tell: Callable[[float, str], None]) -> Outcome:
        told = self._table(lambda share: tell(0.6 * share, "Jacobians"))
        statements = [_zero(name, space, told) for name in ZEROES for space in ("ambient", "sphere")]
        statements += [_number(*row, told) for row in NUMBERS]
        wide = replace(self, scale=1.0)._table(lambda share: tell(0.6 + 0.1 * share, "wider operators"), ["softmax, F = M"])
        for space in ("ambient", "sphere"):
            statements.append(_number("softmax, F = M", space, 0.055, wide, 0.025, "entries of sd 1: .03 to .08, "))
        statements += self._orders(told)
        statements += self._instrument()
        rows = []
        for k, beta in enumerate(self.betas):
            some = replace(self, beta=beta, draws=max(4, self.draws // 4))._table(lambda share: None, CHARTED)
            for (name, space), values in some.items():
                error = 1.96 * float(values.std()) / len(values) ** 0.5
                mean = float(values.mean())
                rows.append((space, name, beta, mean, mean - error, mean + error))
            tell(0.7 + 0.3 * (k + 1) / len(self.betas), "temperatures")
        charts = {}
        if rows:
            frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y", "low", "high"])
            caption = "How far each field is from a gradient (0); a field of random Jacobian has 1/2."
            charts["defect"] = Curves(frame, caption, "beta", "omega", log_x=True)
        note = (
            "The content F that is not bound to M is the largest obstruction, softmax the smallest: it only makes tokens mobile "
            "in different measure, and is undone by multiplying each velocity by its partition sum."
        )
        return Outcome(statements, charts, dict(self._kept()), note)

    def _table(self, tell: Callable[[float], None], names: Sequence[str] | None = None) -> dict[tuple[str, Space], Tensor]:
        """omega of every draw, by field and space."""
        found: dict[tuple[str, Space], list[float]] = {}
        for k in range(self.draws):
            x = unit_vectors(1, self.tokens, self.dim, self.seed + k)
            for space in ("ambient", "sphere"):
                for name, field in self._fields(k, x, space, names):
                    found.setdefault((name, space), []).append(float(exact_defect(field, x, space)[0]))
            tell((k + 1) / self.draws)
        return {place: torch.tensor(values, dtype=torch.float64) for place, values in found.items()}

    def _fields(self, k: int, x: Tensor, space: Space, names: Sequence[str] | None) -> Iterator[tuple[str, Velocities]]:
        draw = self._draw(k)
        plain, softmax = Unnormalised(beta=self.beta, clip=None), Softmax(beta=self.beta)
        m, p = draw.symmetric, draw.metric
        made = {
            "USA, M = F = I": _Made(1.0, 1.0, plain),
            "USA, F = M": _Made(m, m, plain),
            "USA, heads F = M": _Made(draw.heads, draw.heads, plain),
            "Sinkhorn, F = M": _Made(m, m, Sinkhorn(beta=self.beta, tolerance=1e-10, iterations=500)),
            "softmax, M = F = I": _Made(1.0, 1.0, softmax),
            "softmax, F = M": _Made(m, m, softmax),
            "softmax, heads F = M": _Made(draw.heads, draw.heads, softmax),
            "USA, F = P M": _Made(m, p @ m, plain),
            "causal softmax, M = F = I": _Made(1.0, 1.0, softmax, Causal()),
            "USA, M general, F = M": _Made(draw.form, draw.form, plain),
            "USA, M symmetric, F free": _Made(m, draw.content, plain),
            "softmax, M general, F free": _Made(draw.form, draw.content, softmax),
        }
        for name, each in made.items():
            derived = {"softmax, F = M": "softmax times Z, F = M", "USA, F = P M": "P^-1 (USA, F = P M)"}.get(name)
            if names is not None and name not in names:
                continue
            one = self._layer(each, x, space)
            yield name, one.field
            if names is not None:
                continue
            if name == "softmax, F = M":
                assert one.weighted is not None and derived is not None
                yield derived, one.weighted
            if name == "USA, F = P M":
                assert derived is not None
                inverse = torch.linalg.inv(p)
                yield derived, _through(one.field, inverse)
                if space == "sphere":
                    yield f"{derived}, after the projection", _through(_tangent(one.field), inverse)

    def _layer(self, made: _Made, x: Tensor, space: Space) -> Layer:
        one = layer(self._seen(made, x, space), 0)
        assert one is not None and one.space == space
        return one

    def _seen(self, made: _Made, x: Tensor, space: Space) -> Trajectory:
        where = "flat" if space == "ambient" else "sphere"
        model = idealised(self.dim, made.form, made.content, kernel=made.kernel, mask=made.mask, space=where)
        return simulate(model, x, [0.0, 0.1], step=0.1, method="euler")

    def _draw(self, k: int) -> _Draw:
        source = torch.Generator().manual_seed(self.seed + 7919 * (k + 1))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, self.dim, self.dim, generator=source, dtype=torch.float64)

        root, free = normal(), [self.scale * normal() for _ in range(3)]
        heads = self.scale * normal(3)
        metric = root @ root.mT / self.dim + 0.1 * torch.eye(self.dim, dtype=torch.float64)
        return _Draw((free[0] + free[0].mT) / 2, (heads + heads.mT) / 2, metric, free[1], free[2])

    def _orders(self, told: dict[tuple[str, Space], Tensor]) -> Iterator[Statement]:
        """From the smallest obstruction to the largest, draw by draw."""
        ladder = ["softmax, F = M", "USA, F = P M", "USA, M general, F = M", "softmax, M general, F free"]
        for less, more in pairwise(ladder):
            gap = told[more, "ambient"] - told[less, "ambient"]
            error = float(gap.std()) / len(gap) ** 0.5
            claim = f"omega of ({more}) above that of ({less}), mean difference less two standard errors"
            yield Statement(claim, "math K", "at least", 0.0, float(gap.mean()) - 2 * error, 0.0, len(gap), error)

    def _instrument(self) -> Iterator[Statement]:
        source = torch.Generator().manual_seed(self.seed)
        random = defect(torch.randn(5, 200, 200, generator=source, dtype=torch.float64))
        furthest = random[(random - 0.5).abs().argmax()]
        yield Statement("omega of a random Jacobian, 200 x 200, furthest of 5", SOURCE, "equals", 0.5, float(furthest), 0.015, 5)
        misses = []
        for k in range(5):
            x, draw = unit_vectors(1, self.tokens, self.dim, self.seed + k), self._draw(k)
            field = self._layer(_Made(draw.form, draw.content, Softmax(beta=self.beta)), x, "sphere").field
            found = estimated_defect(field, x, "sphere", PROBES, seed=k, chunk=64).value
            misses.append(float((found - exact_defect(field, x, "sphere")).abs()))
        claim = f"Hutchinson's estimate with {PROBES} probes: furthest from the exact omega of 5"
        yield Statement(claim, SOURCE, "at most", 0.0, max(misses), 0.03, 5)

    def _kept(self) -> Iterator[tuple[str, Trajectory]]:
        """A gradient flow and one that is far from it, for the observables of trained models."""
        x, draw = unit_vectors(8, self.tokens, self.dim, self.seed), self._draw(0)
        gradient = _Made(draw.symmetric, draw.symmetric, Unnormalised(beta=self.beta, clip=None))
        yield "USA, F = M", self._seen(gradient, x, "sphere")
        yield "softmax, F free", self._seen(_Made(draw.form, draw.content, Softmax(beta=self.beta)), x, "sphere")


class _Made(NamedTuple):
    """What an attention is made of: M and F, numbers or matrices; no mask is a full one."""

    form: float | Tensor
    content: float | Tensor
    kernel: parts.Kernel
    mask: parts.Mask | None = None


class _Draw(NamedTuple):
    """`symmetric` M, three symmetric `heads`, a `metric` P, a general `form` and a free `content`."""

    symmetric: Tensor
    heads: Tensor
    metric: Tensor
    form: Tensor
    content: Tensor


ZEROES = (
    "USA, M = F = I",
    "USA, F = M",
    "USA, heads F = M",
    "Sinkhorn, F = M",
    "softmax times Z, F = M",
    "P^-1 (USA, F = P M)",
)
NUMBERS: tuple[tuple[str, Space, float], ...] = (
    ("softmax, M = F = I", "ambient", 0.008),
    ("softmax, F = M", "ambient", 0.012),
    ("softmax, heads F = M", "ambient", 0.012),
    ("USA, F = P M", "ambient", 0.16),
    ("P^-1 (USA, F = P M), after the projection", "sphere", 0.09),
    ("causal softmax, M = F = I", "ambient", 0.080),
    ("causal softmax, M = F = I", "sphere", 0.348),
    ("USA, M general, F = M", "ambient", 0.29),
    ("USA, M symmetric, F free", "ambient", 0.46),
    ("softmax, M general, F free", "ambient", 0.48),
    ("softmax, M general, F free", "sphere", 0.38),
)
CHARTED = (
    "softmax, M = F = I",
    "softmax, F = M",
    "USA, F = P M",
    "causal softmax, M = F = I",
    "USA, M general, F = M",
    "softmax, M general, F free",
)


def _zero(name: str, space: Space, told: dict[tuple[str, Space], Tensor]) -> Statement:
    values = told[name, space]
    return Statement(
        f"omega of ({name}), {_place(space)}, largest", SOURCE, "at most", 0.0, float(values.max()), ZERO, len(values)
    )


def _number(
    name: str,
    space: Space,
    predicted: float,
    told: dict[tuple[str, Space], Tensor],
    tolerance: float | None = None,
    about: str = "",
) -> Statement:
    values = told[name, space]
    spread = float(values.std())
    allowed = 2 * spread if tolerance is None else tolerance
    # the table is of single draws: of some fields they differ so much that its number says little of the mean
    how: How = "equals" if allowed <= predicted / 2 else "measured"
    claim = f"omega of ({name}), {about}{_place(space)}, mean"
    if tolerance is None:
        claim += f"; the table's one draw has {predicted:g}"
    error = spread / len(values) ** 0.5
    return Statement(claim, SOURCE, how, predicted, float(values.mean()), allowed, len(values), error)


def _place(space: Space) -> str:
    return "in R^d" if space == "ambient" else "on the sphere"


def _through(field: Velocities, matrix: Tensor) -> Velocities:
    """Velocities times a symmetric matrix."""
    return lambda x: field(x) @ matrix


def _tangent(field: Velocities) -> Velocities:
    return lambda x: project(x, field(x), "sphere")
