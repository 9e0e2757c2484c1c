"""Family "breathing": the intrinsic dimension of the last-token cloud along the depth, and whether it rises and falls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import breathing, dimension
from emformer.geometry.neighbours import Neighbours, near_duplicates, nearest
from emformer.observables.base import Observation, Reservoir, Row
from emformer.parts import UserError
from emformer.trajectory import Trajectory

AT = ("attn", "ffn")
NAMES = {"attn": "b_attn", "ffn": "b_mlp"}


@dataclass(frozen=True)
class Breathing(parts.Observable):
    """Dimension of the cloud of last tokens, one point a prompt, at every state: raw and read, at several scales.

    Up after attention and down after the FFN, in every block, is what the sources claim (a sawtooth). A block counts if the
    interval of its change excludes 0 and the change has one sign at Gride k = 2, 4, 8 and in the raw and the read cloud. In a
    parallel block both changes are from its input, by either share alone (param "parallel").

    The number of points is the same at all states, for an estimate falls short of the truth by an amount that depends on it:
    numbers mean something beside each other alone. A state at which more than a tenth of the points are duplicates (X^0 where
    positions are not in the embedding) has no dimension, and neither have the changes next to it. Prompts that share text are
    resampled together.

    Cost: two searches of neighbours a state, each points^2 d. Source: math G.

    Args:
        points: at most this many prompts, drawn at random from all that are shown.
        seed: of the draw and of the bootstrap.
    """

    points: int = 2048
    seed: int = 0

    family: ClassVar[str] = "breathing"
    keys: ClassVar[Mapping[str, str]] = {
        "geo.id_twonn": "TwoNN dimension, unbiased; > 0; compare at equal n (param 'update': of the cloud of updates)",
        "geo.id_gride": "dimension at the k-th neighbour; > 0; compare at equal n",
        "geo.pr": "participation ratio of the covariance; [1, min(n-1, d)]; null n d/(n+d)",
        "geo.erank_sv": "exp entropy of the singular values of the centred cloud; [1, min(n-1, d)]",
        "geo.rank_resid": "|X - 1 mean^T|/|X|; [0, 1]; 0 rank collapse; null sqrt(1 - 1/n)",
        "geo.duplicates": "share of points that repeat another; [0, 1]; above .1 there is no dimension",
        "geo.near_duplicates": "share of points with r_1 < .01 median r_2; [0, 1]; above .05 believe no dimension",
        "breath.b_attn": "log dimension after attention / before; nats; null 0",
        "breath.b_mlp": "log dimension after the FFN / before; nats; null 0",
        "breath.p_attn": "two-sided p of b_attn = 0, by prompts; [0, 1]",
        "breath.p_mlp": "two-sided p of b_mlp = 0, by prompts; [0, 1]",
        "breath.counts_attn": "1 if b_attn counts: significant, and of one sign in all views; else 0; null .05 at most",
        "breath.counts_mlp": "1 if b_mlp counts; else 0; null .05 at most",
        "breath.sawtooth": "share of blocks with b_attn > 0 > b_mlp; [0, 1]; null 1/4 of fair signs, 1/3 of unrelated clouds",
        "breath.amplitude": "mean of (b_attn - b_mlp)/2; nats; null 0",
        "breath.drift": "mean of b_attn + b_mlp; nats; null 0",
        "breath.p_value": "p of 'up on average at attention, down at the FFN'; [0, 1]; <= .05 in at most 5 % by chance",
    }

    def __post_init__(self) -> None:
        _check(self)

    def begin(self) -> Observation:
        return _Breathing(self.points, self.seed)


@dataclass(frozen=True)
class Controls(parts.Observable):
    """What the same blocks do to the dimension if a sublayer does something else of the same size (math G.4).

    "noise": the update replaced by an isotropic random vector of its length, which always adds dimensions. "uniform": attention
    replaced by the average over all visible tokens, through the same F. Rows are those of `Breathing` with this in `param`.

    Cost: two further searches a state. Source: math G.4.

    Args:
        points: at most this many prompts.
        seed: of the draw, the noise and the bootstrap.
    """

    points: int = 2048
    seed: int = 0

    family: ClassVar[str] = "breathing"
    keys: ClassVar[Mapping[str, str]] = {
        "geo.id_twonn": "TwoNN dimension of the state as it would be",
        "breath.b_attn": "log dimension after / before; nats; null 0",
        "breath.b_mlp": "log dimension after / before; nats; null 0",
    }

    def __post_init__(self) -> None:
        _check(self)

    def begin(self) -> Observation:
        return _Controls(self.points, self.seed)


def _check(setting: Breathing | Controls) -> None:
    if setting.points < 3 or setting.seed < 0:
        raise UserError(f"{setting} cannot be measured: points is at least 3 and the seed at least 0.")


class Change(NamedTuple):
    """A sublayer's step of the last-token cloud: the clouds before and after it, by index, and where it stands."""

    layer: int
    point: str  # "attn" or "ffn"
    before: int
    after: int


class _Last(Observation):
    """Last tokens of the prompts at every state; of a parallel block also with either share alone."""

    def __init__(self, points: int, seed: int):
        self._seed, self._reservoir = seed, Reservoir(points, seed)
        self._states: list[tuple[int, str]] = []
        self._changes: list[Change] = []
        self._parallel = False
        self._groups: Tensor | None = None

    def _clouds(self, trajectory: Trajectory) -> list[tuple[str, Tensor]]:
        """(name, (B, d)) of the states, in order, and then of the halves of parallel blocks."""
        states = trajectory.states
        self._states = [(state.layer, state.point) for state in states]
        found = [(f"raw{k}", state.x[:, -1]) for k, state in enumerate(states)]
        found += [(f"read{k}", state.read[:, -1]) for k, state in enumerate(states) if state.read is not None]
        found += [(f"update{k}", step.update[:, -1]) for k, step in enumerate(trajectory.steps)]
        found += _group(trajectory)
        self._changes, extra = [], len(states)
        for k, step in enumerate(trajectory.steps):
            if step.point in AT:
                self._changes.append(Change(step.layer, step.point, k, k + 1))
            elif step.ffn is not None:
                self._parallel = True
                for point, half in zip(AT, trajectory.halves(k), strict=True):
                    self._changes.append(Change(step.layer, point, k, extra))
                    found.append((f"raw{extra}", half[:, -1]))
                    extra += 1
        return found


class _Breathing(_Last):
    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        self._reservoir.offer(**dict(self._clouds(trajectory)))

    @torch.no_grad()
    def rows(self) -> list[Row]:
        if not len(self._reservoir):
            return []
        self._groups = _numbered(self._reservoir)
        found: list[Row] = []
        views: dict[str, list[Neighbours]] = {}
        for cloud in ("raw", "read"):
            clouds = self._all(cloud)
            if clouds:
                views[cloud] = [nearest(one, 2 * max(dimension.SCALES)) for one in clouds]
                found += self._dimensions(cloud, clouds, views[cloud])
        found += self._updates()
        for cloud in views:
            found += self._breath(cloud, views)
        return found

    def _all(self, cloud: str) -> list[Tensor]:
        """Every cloud of this kind, states first; a read cloud of half a block is not known."""
        count = (
            1 + max((change.after for change in self._changes), default=len(self._states) - 1)
            if cloud == "raw"
            else len(self._states)
        )
        count = max(count, len(self._states))
        if f"{cloud}{count - 1}" not in self._reservoir:
            return []
        return [self._reservoir[f"{cloud}{k}"].cpu() for k in range(count)]

    def _dimensions(self, cloud: str, clouds: Sequence[Tensor], near: Sequence[Neighbours]) -> list[Row]:
        found: list[Row] = []
        errors = _errors(near[: len(self._states)], self._seed, self._groups)
        for k, (layer, point) in enumerate(self._states):
            x, here = clouds[k], near[k]
            n, d = x.shape
            at: dict[str, Any] = {"cloud": cloud}
            twonn = dimension.twonn(here)
            found.append(_row((layer, point), "geo.id_twonn", twonn.value, twonn.value * errors[k], twonn.n, twonn.dropped, **at))
            for scale, one in zip(dimension.SCALES, dimension.gride(here), strict=True):
                row = _row((layer, point), "geo.id_gride", one.value, one.se, one.n, one.dropped, **at, param=f"k={scale}")
                found.append(row)
            for name, value, null in (
                ("geo.pr", dimension.participation_ratio(x), n * d / (n + d)),
                ("geo.erank_sv", dimension.erank_sv(x), None),
                ("geo.rank_resid", dimension.rank_residual(x), math.sqrt(1 - 1 / n)),
            ):
                found.append(_row((layer, point), name, float(value), math.nan, n, 0, **at, null=null))
            found.append(_row((layer, point), "geo.duplicates", 1 - len(here.kept) / n, math.nan, n, 0, **at))
            found.append(_row((layer, point), "geo.near_duplicates", near_duplicates(here), math.nan, len(here.kept), 0, **at))
        return found

    def _updates(self) -> list[Row]:
        found: list[Row] = []
        for k, (layer, point) in enumerate(self._states[1:]):
            one = dimension.twonn(nearest(self._reservoir[f"update{k}"].cpu(), 2))
            found.append(_row((layer, point), "geo.id_twonn", one.value, one.se, one.n, one.dropped, param="update"))
        return found

    def _breath(self, cloud: str, views: Mapping[str, Sequence[Neighbours]]) -> list[Row]:
        near, changes = views[cloud], self._changes
        if cloud == "read" and self._parallel:
            return []
        param = "parallel" if self._parallel else None
        sides = {point: [(c.before, c.after) for c in changes if c.point == point] for point in AT}
        if not changes:
            return []
        paired = [c.layer for c in changes if c.point == "attn"] == [c.layer for c in changes if c.point == "ffn"]
        if paired:
            whole = breathing.breathing(near, sides["attn"], sides["ffn"], seed=self._seed, prompts=self._groups)
            each = {"attn": whole.attn, "ffn": whole.mlp}
        else:
            each = {
                point: breathing.contrasts(near, _weights(pairs, len(near)), seed=self._seed, prompts=self._groups)
                for point, pairs in sides.items()
                if pairs
            }
        found: list[Row] = []
        n = len(self._reservoir)
        for point, change in each.items():
            others = self._others(cloud, views, sides[point])
            counted = breathing.counts(change, others)
            name, layers = NAMES[point], [c.layer for c in changes if c.point == point]
            for k, layer in enumerate(layers):
                known = bool(change.value[k].isfinite())
                size = (n, 0) if known else (0, n)
                value, error, p = float(change.value[k]), float(change.se[k]), float(change.p[k])
                where: dict[str, Any] = {"cloud": cloud, "param": param}
                found.append(_row((layer, point), f"breath.{name}", value, error, *size, null=0.0, **where))
                found.append(_row((layer, point), f"breath.p_{name[2:]}", p, math.nan, *size, **where))
                counts = float(counted[k]) if known else math.nan
                found.append(
                    _row((layer, point), f"breath.counts_{name[2:]}", counts, math.nan, *size, null=breathing.LEVEL, **where)
                )
        if paired:
            nowhere, total = (None, None), whole.sawtooth
            blocks = total.n_valid, total.n_dropped
            where = {"cloud": cloud, "param": param}
            found.append(_row(nowhere, "breath.sawtooth", total.fraction, math.nan, *blocks, null=0.25, **where))
            for key, change in (("amplitude", whole.amplitude), ("drift", whole.drift)):
                found.append(_row(nowhere, f"breath.{key}", float(change.value), float(change.se), *blocks, null=0.0, **where))
            found.append(_row(nowhere, "breath.p_value", whole.p if total.n_valid else math.nan, math.nan, *blocks, **where))
        return found

    def _others(self, cloud: str, views: Mapping[str, Sequence[Neighbours]], pairs: Sequence[tuple[int, int]]) -> Tensor:
        """(views, blocks): the same changes at other scales and in the other cloud, as far as there is one."""
        found = []
        for name, near in views.items():
            if max(after for _, after in pairs) >= len(near):
                continue  # no read cloud of half a block
            scales = breathing.AGREEMENT if name == cloud else (1, *breathing.AGREEMENT)
            table = torch.tensor(
                [[one.value for one in dimension.gride(here, scales)] for here in near], dtype=torch.float64
            ).log()
            before, after = (list(side) for side in zip(*pairs, strict=True))
            found += list((table[after] - table[before]).T)
        return torch.stack(found)


class _Controls(_Last):
    """Each step's cloud as it would be after another update of the same block."""

    def __init__(self, points: int, seed: int):
        super().__init__(points, seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._instead: list[tuple[int, str, str, int]] = []  # layer, point, param, state before

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        found = {f"raw{k}": state.x[:, -1] for k, state in enumerate(trajectory.states)}
        self._instead = []
        for k, step in enumerate(trajectory.steps):
            x, epsilon = step.before[:, -1:], trajectory.epsilon[k]
            place: Any = None
            if trajectory.model is not None:
                block = trajectory.block(k)
                place = block.place_ffn if step.point == "ffn" else block.place_attn
            shares = [(step.point, step.update[:, -1:])]
            if step.ffn is not None:
                shares = [("attn", (step.update - step.ffn)[:, -1:]), ("ffn", step.ffn[:, -1:])]
            for point, update in shares:
                if point in AT:
                    random = torch.randn(update.shape, generator=self._generator, dtype=torch.float64).to(update)
                    random = random * update.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)
                    self._offer(found, step.layer, point, "noise", k, x + epsilon * random, place)
            if step.mixture is not None and trajectory.model is not None:
                self._offer(found, step.layer, "attn", "uniform", k, x + epsilon * _uniform(trajectory, k), place)
        self._reservoir.offer(**found, **dict(_group(trajectory)))

    def _offer(self, found: dict[str, Tensor], layer: int, point: str, param: str, k: int, raw: Tensor, place: Any) -> None:
        found[f"instead{len(self._instead)}"] = (raw if place is None else place(raw))[:, 0]
        self._instead.append((layer, point, param, k))

    @torch.no_grad()
    def rows(self) -> list[Row]:
        if not len(self._reservoir) or not self._instead:
            return []
        groups = _numbered(self._reservoir)
        states = 1 + max(k for *_, k in self._instead)
        scales = 2 * max(dimension.SCALES)  # as many neighbours as the halves of the bootstrap may need
        near = [nearest(self._reservoir[f"raw{k}"].cpu(), scales) for k in range(states)]
        near += [nearest(self._reservoir[f"instead{k}"].cpu(), scales) for k in range(len(self._instead))]
        pairs = [(before, states + k) for k, (*_, before) in enumerate(self._instead)]
        change = breathing.contrasts(near, _weights(pairs, len(near)), seed=self._seed, prompts=groups)
        errors = _errors(near[states:], self._seed, groups)
        found: list[Row] = []
        n = len(self._reservoir)
        for k, (layer, point, param, _) in enumerate(self._instead):
            one = dimension.twonn(near[states + k])
            found.append(_row((layer, point), "geo.id_twonn", one.value, one.value * errors[k], one.n, one.dropped, param=param))
            value, error = float(change.value[k]), float(change.se[k])
            size = (0, n) if math.isnan(value) else (n, 0)
            found.append(_row((layer, point), f"breath.{NAMES[point]}", value, error, *size, null=0.0, param=param))
        return found


def _uniform(trajectory: Trajectory, k: int) -> Tensor:
    """(B, 1, d): the update of the last token if it looked at everything it sees alike."""
    step, block = trajectory.steps[k], trajectory.block(k)
    attention, seen = block.attention, trajectory.visible(k)[-1:]
    a = (seen / seen.sum()).to(step.read).expand(len(step.read), attention.form.heads, 1, -1)
    update = attention.lift(attention.mix(a, step.read))
    return update if block.shape_attn is None else block.shape_attn(step.before[:, -1:], update)


def _weights(pairs: Sequence[tuple[int, int]], states: int) -> Tensor:
    """(pairs, states): +1 after, -1 before."""
    rows = torch.zeros(len(pairs), states, dtype=torch.float64)
    for row, (before, after) in zip(rows, pairs, strict=True):
        row[before] -= 1
        row[after] += 1
    return rows


def _errors(near: Sequence[Neighbours], seed: int, groups: Tensor | None) -> list[float]:
    """Standard errors of log dimension at each state, the dependence of points included."""
    return breathing.contrasts(near, torch.eye(len(near), dtype=torch.float64), seed=seed, prompts=groups).se.tolist()


def _group(trajectory: Trajectory) -> list[tuple[str, Tensor]]:
    return [] if trajectory.groups is None else [("group", trajectory.groups)]


def _numbered(reservoir: Reservoir) -> Tensor | None:
    """The group of each point, numbered from 0: what the bootstrap draws whole. None: each point is its own."""
    return reservoir["group"].unique(return_inverse=True)[1] if "group" in reservoir else None


def _row(
    at: tuple[int | None, str | None],
    key: str,
    value: float,
    error: float,
    n_valid: int,
    n_dropped: int = 0,
    *,
    null: float | None = None,
    cloud: str = "raw",
    param: str | None = None,
) -> Row:
    mean, se = (None if math.isnan(number) else number for number in (value, error))
    return Row(*at, key, mean, None, se, n_valid, n_dropped, null, cloud=cloud, param=param)
