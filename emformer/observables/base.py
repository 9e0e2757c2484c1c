"""What an observable is made of: rows, online moments over prompts, reservoirs of points, and the pass that fills them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emformer import parts
from emformer.trajectory import Trajectory

Order = Literal["text", "shuffled"]


class Row(NamedTuple):
    """One statistic, in the schema that everything recorded shares; a step and, on a study, config and seed join it.

    `layer`, `point` ("embed", "attn", "ffn", "block"): the state, or the step that led to it. `head`: None for all. `cloud`:
    "raw", "read" or "centred". `param`: what else the key depends on, as "k=4", "c=0.99", "delta=-8", "parallel"; or None.
    `mean` over `n_valid` prompts (of a pooled cloud: the estimate from `n_valid` points), `sd` between prompts, `se` of the
    mean, `n_dropped` prompts (points) for which it is undefined. `null`, `null_sd`: mean and standard deviation that chance alone
    would give a prompt's value (the estimate), where they are known: to be held against `mean` and `sd`. Undefined is None.
    """

    layer: int | None
    point: str | None
    key: str
    mean: float | None
    sd: float | None = None
    se: float | None = None
    n_valid: int = 0
    n_dropped: int = 0
    null: float | None = None
    null_sd: float | None = None
    head: int | None = None
    cloud: str = "raw"
    param: str | None = None


COLUMNS = (
    "step",
    "layer",
    "point",
    "head",
    "key",
    "cloud",
    "param",
    "mean",
    "sd",
    "se",
    "n_valid",
    "n_dropped",
    "null",
    "null_sd",
)


class Observation(ABC):
    """One measurement under way. Its memory does not grow with the number of trajectories it is given."""

    @abstractmethod
    def update(self, trajectory: Trajectory) -> None:
        """Take in the prompts of one more trajectory, of the same model and shape as those before. Nothing in it is changed."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """What was found so far, in a fixed order."""


class Place(NamedTuple):
    """Where a statistic stands: all of a row but its numbers."""

    layer: int | None
    point: str | None
    key: str
    head: int | None = None
    cloud: str = "raw"
    param: str | None = None


def estimate(
    at: tuple[int | None, str | None],
    key: str,
    value: float,
    n_valid: int,
    n_dropped: int = 0,
    *,
    error: float = math.nan,
    null: float = math.nan,
    null_sd: float = math.nan,
    head: int | None = None,
    cloud: str = "raw",
    param: str | None = None,
) -> Row:
    """The row of one number from many points: it has an error, and no spread between prompts. nan is undefined."""
    mean, se, expected, spread = (None if math.isnan(number) else number for number in (value, error, null, null_sd))
    return Row(*at, key, mean, None, se, n_valid, n_dropped, expected, spread, head, cloud, param)


class _Mean:
    """A running mean of what is defined."""

    __slots__ = ("n", "value")

    def __init__(self) -> None:
        self.n, self.value = 0, 0.0

    def add(self, count: int, mean: float) -> None:
        if count:
            self.n += count
            self.value += (mean - self.value) * (count / self.n)

    def told(self) -> float | None:
        return self.value if self.n else None


class _Sum:
    __slots__ = ("dropped", "mean", "null", "null_sd", "square", "undefined", "values")

    def __init__(self) -> None:
        self.dropped = self.values = self.undefined = 0
        self.square = 0.0
        self.mean, self.null, self.null_sd = _Mean(), _Mean(), _Mean()


Null = float | Tensor | None


class Moments:
    """Mean and variance over prompts of many statistics at once, online: count, mean and squared deviations of each.

    Batches are merged by Chan, Golub and LeVeque's update, in float64. nan is undefined: it enters no mean and is counted.
    """

    def __init__(self) -> None:
        self._sums: dict[Place, _Sum] = {}

    def add(
        self,
        values: Tensor,
        layer: int | None,
        point: str | None,
        key: str,
        *,
        heads: bool = False,
        cloud: str = "raw",
        param: str | None = None,
        null: Null = None,
        null_sd: Null = None,
    ) -> None:
        """Take in values (B,), (B, T), with `heads` (B, H) or (B, H, T): one a prompt, or one a token of it.

        A prompt's value is the mean over its tokens that have one; the share of tokens without is told in a row of its own,
        `<key>.undefined`, if there are any. `null`, `null_sd`: expectation and standard deviation of a prompt's value under the
        null, one number or a tensor that broadcasts to the values, of which the mean is told.
        """
        tokens = values.ndim == (3 if heads else 2)
        own = _columns(values, tokens, heads)
        known = ~own.isnan()
        n = known.sum(0)
        mean = own.where(known, 0.0).sum(0) / n
        square = (own - mean).where(known, 0.0).square().sum(0)
        lost = values.isnan().sum(-1) if tokens else torch.zeros(values.shape, dtype=torch.long)
        lost = lost.sum(0) if heads else lost.sum(0, keepdim=True)
        for head, (count, middle, deviation, undefined) in enumerate(
            zip(*(x.tolist() for x in (n, mean, square, lost)), strict=True)
        ):
            one = self._sums.setdefault(Place(layer, point, key, head if heads else None, cloud, param), _Sum())
            one.dropped += len(own) - count
            one.values += len(own) * (values.shape[-1] if tokens else 1)
            one.undefined += undefined
            if count:
                shift, before = middle - one.mean.value, one.mean.n
                one.mean.add(count, middle)
                one.square += deviation + shift * shift * before * count / one.mean.n
            for kept, given in ((one.null, null), (one.null_sd, null_sd)):
                if isinstance(given, Tensor):
                    column = _columns(given.broadcast_to(values.shape), tokens, heads)[:, head]
                    kept.add(int((~column.isnan()).sum()), float(column.nanmean()))
                elif given is not None and not math.isnan(given):
                    kept.add(len(own), given)

    def by_head(
        self,
        values: Tensor,
        layer: int | None,
        point: str | None,
        key: str,
        *,
        mean: Tensor | None = None,
        cloud: str = "raw",
        param: str | None = None,
        null: Null = None,
        null_sd: Null = None,
        mean_null_sd: Null = None,
    ) -> None:
        """`add` of every head's values (B, H) or (B, H, T), and of their mean over heads, or of `mean` in its place.

        Args:
            null: of the heads; its mean over them is that of the mean.
            null_sd: of the heads. mean_null_sd: of the mean, which depends on how independent heads are.
        """
        self.add(values, layer, point, key, heads=True, cloud=cloud, param=param, null=null, null_sd=null_sd)
        mean = values.nanmean(1) if mean is None else mean
        whole = null.broadcast_to(values.shape).nanmean(1) if isinstance(null, Tensor) else null
        self.add(mean, layer, point, key, cloud=cloud, param=param, null=whole, null_sd=mean_null_sd)

    def rows(self) -> list[Row]:
        """One row a statistic, in the order of their first values; sd is the unbiased one, undefined for one prompt."""
        found = []
        for place, one in self._sums.items():
            n = one.mean.n
            sd = math.sqrt(one.square / (n - 1)) if n > 1 else None
            se = None if sd is None else sd / math.sqrt(n)
            where = place.layer, place.point
            nulls = one.null.told(), one.null_sd.told()
            found.append(Row(*where, place.key, one.mean.value if n else None, sd, se, n, one.dropped, *nulls, *place[3:]))
            if one.undefined:
                share, key = one.undefined / one.values, f"{place.key}.undefined"
                found.append(
                    Row(*where, key, share, n_valid=n + one.dropped, head=place.head, cloud=place.cloud, param=place.param)
                )
        return found


def _columns(values: Tensor, tokens: bool, heads: bool) -> Tensor:
    """(B, H), or (B, 1), in float64 on the CPU: the mean over the tokens that have a value; nan where none has."""
    values = values.detach().cpu().double()
    if tokens:
        known = ~values.isnan()
        values = values.nan_to_num(0.0, math.inf, -math.inf).where(known, 0.0).sum(-1) / known.sum(-1)
    return values if heads else values.unsqueeze(1)


class Reservoir:
    """At most `size` points drawn uniformly from all that were offered, each with its rows of several tensors.

    Vitter's algorithm R with a generator of its own: the same offers and seed keep the same points. Memory: `size` rows.
    """

    def __init__(self, size: int, seed: int = 0):
        self.size, self.offered = size, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: dict[str, Tensor] = {}

    def offer(self, **rows: Tensor) -> None:
        """Offer n points: tensors (n, …) that belong together, the same names every time. Copies what it keeps."""
        n = len(next(iter(rows.values())))
        # where each point goes: the first `size` in order, later ones to a random place among all seen so far
        index = torch.arange(self.offered, self.offered + n)
        draw = (torch.rand(n, generator=self._generator, dtype=torch.float64) * (index + 1)).long().clamp(max=self.offered + n)
        place = index.where(index < self.size, draw)
        self.offered += n
        # a later point replaces an earlier one
        target = {where: source for source, where in enumerate(place.tolist()) if where < self.size}
        if not target:
            return
        to, taken = torch.tensor(list(target)), torch.tensor(list(target.values()))
        for name, values in rows.items():
            new = values.detach()[taken.to(values.device)]
            if name not in self._kept:
                self._kept[name] = new.new_empty(self.size, *new.shape[1:])
            self._kept[name][to.to(new.device)] = new

    def __len__(self) -> int:
        return min(self.size, self.offered)

    def numbered(self, name: str) -> list[Tensor]:
        """The rows of name0, name1 …, on the CPU."""
        found: list[Tensor] = []
        while f"{name}{len(found)}" in self._kept:
            found.append(self[f"{name}{len(found)}"].cpu())
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name][: len(self)]


def lacks(observable: parts.Observable, trajectory: Trajectory) -> str | None:
    """What the observable needs and the trajectory does not have; None if all is there."""
    has = {
        "model": trajectory.model is not None,
        "reads": trajectory.states[0].read is not None,
        "labels": trajectory.labels is not None,
        "tokens": trajectory.tokens is not None,
        "vocabulary": trajectory.model is not None and trajectory.model.vocab > 1,
    }
    return next((need for need in sorted(observable.needs) if not has[need]), None)


class Look(NamedTuple):
    """Observables, the number of prompts they see, and whether these are the text's or shuffled ones.

    "shuffled": the tokens of a prompt in random order but for the last, which stays: the same words without their syntax.
    Rows of shuffled prompts say so in `param`.
    """

    observables: Sequence[parts.Observable]
    prompts: int | None = None
    order: Order = "text"


class Pass:
    """Observations of one pass over some trajectories, each told as long as it wants prompts.

    Args:
        looks: what is looked at. Observations that need what a trajectory lacks are skipped: see `skipped`.
    """

    def __init__(self, looks: Iterable[Look]):
        self._open = [(look, observable, observable.begin()) for look in looks for observable in look.observables]
        self._missing: dict[int, str] = {}
        self._seen = 0

    def update(self, trajectory: Trajectory) -> None:
        """Hand one more trajectory to whoever still wants prompts, as many prompts at a time as its budget has room for."""
        wanted: list[Observation] = []
        for k, (look, observable, observation) in enumerate(self._open):
            if look.prompts is not None and self._seen >= look.prompts:
                continue
            need = self._missing.get(k) or lacks(observable, trajectory)
            if need is None:
                wanted.append(observation)
            else:
                self._missing[k] = need
        # a lot for all of them: they share its patterns
        for part in trajectory.lots():
            for observation in wanted:
                observation.update(part)
            part.forget()
        self._seen += trajectory.prompts

    @property
    def skipped(self) -> list[str]:
        """One sentence for each observable that could not be measured."""
        return [
            f"{self._open[k][1].family}: skipped, for the trajectory has no {need}" for k, need in sorted(self._missing.items())
        ]

    def rows(self) -> list[Row]:
        """All rows, those of shuffled prompts marked in `param`."""
        found: list[Row] = []
        for k, (look, _, observation) in enumerate(self._open):
            if k in self._missing:
                continue
            for row in observation.rows():
                if look.order != "text":
                    row = row._replace(param=look.order if row.param is None else f"{row.param} {look.order}")
                found.append(row)
        return found
