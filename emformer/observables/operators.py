"""Family "operators": how symmetric, attractive and compatible M and F are, head by head, read off the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from emformer import parts
from emformer.diagnostics import Diagnosis, diagnose
from emformer.model import Emformer
from emformer.observables.base import Observation, Row
from emformer.parts import UserError
from emformer.surgery import shuffle
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Operators(parts.Observable):
    """`emformer.diagnostics.diagnose` of the model that made the trajectory, in rows: of each head, and of their mean.

    No prompt has a part in it: the model is looked at once, n_valid is 1 where a value is defined, and nothing has a spread.
    Operators are the effective ones; layers that share a block are told once, as layer 0. Cost: see `diagnose`; twice that with
    the control.

    Args:
        widest: no defect for heads whose M has a factor wider than this.
        limit: most steps of the search for the defect.
        control: draw the null of the defect too, from the same model with the singular vectors of its contents shuffled.
        seed: of the shuffling.
    """

    widest: int = 256
    limit: int = 200
    control: bool = True
    seed: int = 0

    family: ClassVar[str] = "operators"
    keys: ClassVar[Mapping[str, str]] = {
        "op.asym": "|K|^2/|W|^2 of the skew part; [0, 1]; null (d - 1)/2d; param 'form' (M) or 'content' (F), as below",
        "op.attraction": "sum of positive eigenvalues of the symmetric part over that of all, by size; [0, 1]; null 1/2",
        "op.compat": "min |F - P M|/|F| over P >= 0; [0, 1]; 0 iff F = P M; null: F with random singular vectors, its sd over "
        "heads; param 'sphere': 1 - cos^2(F, M), null 1 - 1/d^2",
        "op.compat_error": "how far op.compat may be above the minimum; [0, 1]",
        "op.norm": "|W|_F; units of W",
        "op.rank": "exp of the entropy of the singular values; [1, d]",
        "op.stable": "|W|_F^2/|W|_2^2; [1, op.rank]",
        "op.top": "largest singular value; units of W",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if self.widest < 0 or self.limit < 1:
            raise UserError(f"Operators: widest is {self.widest} and limit {self.limit}; choose at least 0 and 1.")

    def begin(self) -> Observation:
        return _Operators(self)


class _Operators(Observation):
    def __init__(self, settings: Operators):
        self._settings = settings
        self._rows: list[Row] | None = None

    def update(self, trajectory: Trajectory) -> None:
        if self._rows is None and trajectory.model is not None:
            self._rows = list(_told(trajectory.model, self._settings))

    def rows(self) -> list[Row]:
        return list(self._rows or ())


BOTH = ("asym", "attraction", "norm", "rank", "stable", "top")
# key, param, field of the diagnosis
COLUMNS = (
    ("op.compat", None, "compat"),
    ("op.compat", "sphere", "compat_sphere"),
    ("op.compat_error", None, "compat_error"),
    *((f"op.{name}", role, f"{name}_{role}") for name in BOTH for role in ("form", "content")),
)


def _told(model: Emformer, settings: Operators) -> Iterator[Row]:
    heads = diagnose(model, settings.widest, settings.limit)
    control: dict[int, list[float]] = {}
    if settings.control:
        for head in diagnose(shuffle(model, settings.seed, ("content",)), settings.widest, settings.limit):
            if not math.isnan(head.compat):
                control.setdefault(head.layer, []).append(head.compat)
    dim = model.settings.dim
    known = {"op.asym": (dim - 1) / (2 * dim), "op.attraction": 0.5, "sphere": 1 - 1 / dim**2}
    for layer in sorted({head.layer for head in heads}):
        mine = [head for head in heads if head.layer == layer]
        for key, param, field in COLUMNS:
            null, spread = known.get("sphere" if param == "sphere" else key), None
            if field == "compat":
                null, spread = _moments(control.get(layer, []))
            yield from _rows(mine, field, Row(layer, "attn", key, None, null=null, null_sd=spread, param=param))


def _rows(heads: Sequence[Diagnosis], field: str, row: Row) -> Iterator[Row]:
    """One a head, and their mean over those that are defined."""
    values = [getattr(head, field) for head in heads]
    for head, value in enumerate(values):
        defined = not math.isnan(value)
        yield row._replace(head=head, mean=value if defined else None, n_valid=int(defined), n_dropped=int(not defined))
    mean, _ = _moments([value for value in values if not math.isnan(value)])
    spread = None if row.null_sd is None else row.null_sd / math.sqrt(len(values))
    yield row._replace(mean=mean, n_valid=int(mean is not None), n_dropped=int(mean is None), null_sd=spread)


def _moments(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None where there are too few."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else None
