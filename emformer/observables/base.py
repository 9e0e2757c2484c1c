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


class _Sum:
    __slots__ = ("dropped", "mean", "n", "null", "square", "undefined", "values")

    def __init__(self) -> None:
        self.n = self.dropped = self.values = self.undefined = 0
        self.mean = self.square = 0.0
        self.null: tuple[float | None, float | None] = None, None


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
        null: float | None = None,
        null_sd: float | None = None,
    ) -> None:
        """Take in values (B,), (B, T), with `heads` (B, H) or (B, H, T): one a prompt, or one a token of it.

        A prompt's value is the mean over its tokens that have one; the share of tokens without is told in a row of its own,
        `<key>.undefined`, if there are any. `null`, `null_sd`: expectation and standard deviation of a prompt's value under the
        null.
        """
        values = values.detach().double().cpu() if values.device.type != "mps" else values.detach().cpu().double()
        tokens = values.ndim == (3 if heads else 2)
        known = ~values.isnan()
        if tokens:
            counts, total = known.sum(-1), values.shape[-1]
            values = values.nan_to_num(0.0, math.inf, -math.inf).where(known, 0.0).sum(-1) / counts  # 0/0 is nan
            lost = total * torch.ones_like(counts) - counts
            known = counts > 0
        else:
            total, lost = 1, torch.zeros_like(known, dtype=torch.long)
        if not heads:
            values, known, lost = values.unsqueeze(1), known.unsqueeze(1), lost.unsqueeze(1)
        n = known.sum(0)
        zeroed = values.where(known, 0.0)
        mean = zeroed.sum(0) / n
        square = (zeroed - mean).where(known, 0.0).square().sum(0)
        columns = zip(n.tolist(), mean.tolist(), square.tolist(), lost.sum(0).tolist(), strict=True)
        for head, (count, middle, spread, undefined) in enumerate(columns):
            place = Place(layer, point, key, head if heads else None, cloud, param)
            one = self._sums.setdefault(place, _Sum())
            one.dropped += len(values) - count
            one.values += len(values) * total
            one.undefined += undefined
            one.null = null, null_sd
            if count:
                both, shift = one.n + count, middle - one.mean
                one.square += spread + shift * shift * one.n * count / both
                one.mean += shift * count / both
                one.n = both

    def rows(self) -> list[Row]:
        """One row a statistic, in the order of their first values; sd is the unbiased one, undefined for one prompt."""
        found = []
        for place, one in self._sums.items():
            sd = math.sqrt(one.square / (one.n - 1)) if one.n > 1 else None
            se = None if sd is None else sd / math.sqrt(one.n)
            mean = one.mean if one.n else None
            row = Row(place.layer, place.point, place.key, mean, sd, se, one.n, one.dropped, *one.null, *place[3:])
            found.append(row)
            if one.undefined:
                share = one.undefined / one.values
                found.append(
                    Row(*place[:2], f"{place.key}.undefined", share, n_valid=one.n + one.dropped)._replace(
                        head=place.head, cloud=place.cloud, param=place.param
                    )
                )
        return found


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
        """Hand one more trajectory to whoever still wants prompts."""
        for k, (look, observable, observation) in enumerate(self._open):
            if look.prompts is not None and self._seen >= look.prompts:
                continue
            need = self._missing.get(k) or lacks(observable, trajectory)
            if need is None:
                observation.update(trajectory)
            else:
                self._missing[k] = need
        self._seen += trajectory.prompts
        trajectory.forget()

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
