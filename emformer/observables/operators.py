"""Family "operators": how symmetric, attractive and compatible M and F are, what they read of each other, and where they lead a
cloud, read off the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from emformer import parts
from emformer.circuits import Outlook, compositions, growth, outlook
from emformer.diagnostics import diagnose, factors
from emformer.geometry import spectra
from emformer.model import Emformer
from emformer.observables.base import Observation, Row
from emformer.parts import UserError
from emformer.surgery import shuffle
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Operators(parts.Observable):
    """`emformer.diagnostics.diagnose` and `emformer.circuits` of the model that made the trajectory, in rows: of each head, and
    of their mean; what grows (`op.expansion` …) of the heads together is that of the sum of their B, not a mean.

    No prompt has a part in it: the model is looked at once, n_valid is 1 where a value is defined, and nothing has a spread.
    Operators are the effective ones; layers that share a block are told once, as layer 0. Compositions are told in the rows of
    the later layer: of all pairs of heads, and the largest for each head that reads. Cost: see `diagnose`; twice that with the
    control; H^2 r^2 d a pair of layers, and d^3 a layer.

    Args:
        widest: no defect for heads whose M has a factor wider than this.
        limit: most steps of the search for the defect.
        control: draw the nulls of the defect and of what grows, from the same model with the singular vectors of its contents
            shuffled, and of rotations.
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
        "op.radius": "spectral radius max |lambda|; units of W; null random singular vectors",
        "op.rotation": "share of sum |lambda|^2 in complex pairs, which turn the space; [0, 1]; 0 symmetric, 1 skew; null random "
        "singular vectors",
        "op.compose": "|M' F|/(|M'||F|), what a layer reads of what the earlier layer 'from' wrote, mean over pairs of heads; "
        "[0, 1]; param 'Q' (M'^T F), 'K' (M' F) or 'V' (F' F); null random singular vectors, about 1/sqrt(d)",
        "op.compose_max": "the same of the pair of heads with the most, and of each head that reads with the earlier one that it "
        "reads most of; [0, 1]; null the largest of as many random pairs",
        "op.expansion": "sum of positive eigenvalues of B = F M^T + M F^T over that of all, by size; [0, 1]; 1 the cloud spreads "
        "along all directions, 0 it gathers; null 1/2",
        "op.expanding": "number of directions along which the cloud spreads, positive eigenvalues of B, of all heads together "
        "(one of rank r <= d/2 has r); 0 .. d; null half the rank",
        "op.growth": "largest eigenvalue of B, the rate at which variance 1 grows; units of F M, 1/(steps |x|/sqrt d); null "
        "shuffled F",
        "op.blowup": "1/op.growth, the time scale of the fastest growth of a Gaussian cloud of covariance I, and only if the "
        "operators commute when it is infinitely wide; steps |x|/sqrt d; undefined where nothing grows; null shuffled F",
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

    @torch.no_grad()
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
    shuffled = shuffle(model, settings.seed, ("content",)) if settings.control else None
    control: dict[int, list[float]] = {}
    if shuffled is not None:
        for head in diagnose(shuffled, settings.widest, settings.limit):
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
            values = [getattr(head, field) for head in mine]
            yield from _rows(values, Row(layer, "attn", key, None, null=null, null_sd=spread, param=param))
        yield from _turning(model, layer, settings)
        yield from _growth(model, shuffled, layer)
    yield from _compositions(model)


def _turning(model: Emformer, layer: int, settings: Operators) -> Iterator[Row]:
    """Radius and rotation of M and F."""
    told = factors(model.layer(layer))
    dim = model.settings.dim
    for role, left, right in (
        ("form", told.form_left, told.form_right),
        ("content", told.content_left, told.content_right),
    ):
        found = spectra.turning(left, right)
        values = spectra.thin_singular_values(left, right)
        sizes = values.norm(dim=-1) / math.sqrt(dim)
        drawn = None
        if settings.control:
            drawn = spectra.random_turning(values / sizes.where(sizes > 0, 1.0).unsqueeze(-1), dim, settings.seed)
        row = Row(layer, "attn", "op.radius", None, param=role)
        null, spread = (None, None) if drawn is None else _moments(_known(drawn.radius))
        for place in _rows(found.radius.tolist(), row):
            size = float(sizes.mean() if place.head is None else sizes[place.head])
            among = 1.0 if place.head is not None else math.sqrt(len(sizes))
            yield place._replace(
                null=None if null is None else null * size, null_sd=None if spread is None else spread * size / among
            )
        null, spread = (None, None) if drawn is None else _moments(_known(drawn.rotation))
        yield from _rows(found.rotation.tolist(), row._replace(key="op.rotation", null=null, null_sd=spread))


GROWTH = ("op.expansion", "op.expanding", "op.growth", "op.blowup")  # in the order of `circuits.Outlook`


def _growth(model: Emformer, shuffled: Emformer | None, layer: int) -> Iterator[Row]:
    """Of each head's B, and of the sum of them."""
    heads, whole = _outlook(model, layer)
    controls = None if shuffled is None else _outlook(shuffled, layer)
    form, content = model.layer(layer).attention.form, model.layer(layer).attention.content
    for field, key in enumerate(GROWTH):
        null: float | None = None
        spread: float | None = None
        if key == "op.expansion":
            null = 0.5
        elif controls is not None:
            null, spread = _moments(_known(controls[0][field]))
        row = Row(layer, "attn", key, None, null=null, null_sd=spread)
        if key != "op.expanding":
            yield from list(_rows(heads[field].tolist(), row))[:-1]
        total = null
        if key == "op.expanding":
            total = min(form.dim, 2 * form.heads * min(form.rank, content.rank)) / 2
        elif key != "op.expansion" and controls is not None:
            total = float(controls[1][field])
        row = _defined(row, float(whole[field]))
        yield row._replace(null=None if total is None or math.isnan(total) else total, null_sd=None)


def _outlook(model: Emformer, layer: int) -> tuple[Outlook, Outlook]:
    found = growth(model.layer(layer))
    return outlook(found.heads), outlook(found.values)


def _compositions(model: Emformer) -> Iterator[Row]:
    for one in compositions(model):
        row = Row(one.layer, "attn", "op.compose", None, param=f"{one.kind} from={one.source}")
        null, spread, count = float(one.null.nanmean()), float(one.null_sd.nanmean()), one.value.numel()
        known = not math.isnan(null)
        mean = float(one.value.nanmean())
        # pairs are independent under the null, those with a head in common too
        yield _defined(row, mean)._replace(null=null if known else None, null_sd=spread / math.sqrt(count) if known else None)
        row = row._replace(key="op.compose_max")
        best = one.value.nan_to_num(nan=-1.0).amax(-1)
        best = best.where(best >= 0, torch.nan)
        for head, value in enumerate(best.tolist()):
            yield _defined(row, value)._replace(head=head, null=null + spread * _highest(one.value.shape[1]) if known else None)
        highest = max(_known(best), default=math.nan)
        yield _defined(row, highest)._replace(null=null + spread * _highest(count) if known else None)


def _highest(count: int) -> float:
    """The expectation of the largest of so many standard normal numbers (Blom 1958, to about 1 %)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def _known(values: Tensor) -> list[float]:
    return [value for value in values.tolist() if not math.isnan(value)]


def _defined(row: Row, value: float) -> Row:
    defined = not math.isnan(value)
    return row._replace(mean=value if defined else None, n_valid=int(defined), n_dropped=int(not defined))


def _rows(values: Sequence[float], row: Row) -> Iterator[Row]:
    """One a head, and their mean over those that are defined."""
    for head, value in enumerate(values):
        yield _defined(row, value)._replace(head=head)
    mean, _ = _moments([value for value in values if not math.isnan(value)])
    spread = None if row.null_sd is None else row.null_sd / math.sqrt(len(values))
    yield _defined(row, math.nan if mean is None else mean)._replace(null_sd=spread)


def _moments(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None where there are too few."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else None
