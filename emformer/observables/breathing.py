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
from emformer.observables.base import Observation, Reservoir, Row, estimate
from emformer.parts import UserError
from emformer.trajectory import Trajectory

AT = ("attn", "ffn")
NAMES = {"attn": "attn", "ffn": "mlp"}


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
        "geo.id_twonn": "TwoNN dimension of the state as it would be; > 0",
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


class _Breathing(Observation):
    """Last tokens of the prompts at every state; of a parallel block also with either share alone."""

    def __init__(self, points: int, seed: int):
        self._seed, self._reservoir = seed, Reservoir(points, seed)
        self._states: list[tuple[int, str]] = []
        self._changes: list[Change] = []

    @property
    def _parallel(self) -> bool:
        """Whether changes lead to halves of blocks, which stand behind the states."""
        return any(change.after >= len(self._states) for change in self._changes)

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        states = trajectory.states
        raw = [state.x for state in states]
        self._states, self._changes = [(state.layer, state.point) for state in states], []
        for k, step in enumerate(trajectory.steps):
            if step.point in AT:
                self._changes.append(Change(step.layer, step.point, k, k + 1))
            elif step.ffn is not None:
                for point, half in zip(AT, trajectory.halves(k), strict=True):
                    self._changes.append(Change(step.layer, point, k, len(raw)))
                    raw.append(half)
        found = {f"raw{k}": x[:, -1] for k, x in enumerate(raw)}
        found |= {f"read{k}": state.read[:, -1] for k, state in enumerate(states) if state.read is not None}
        found |= {f"update{k}": step.update[:, -1] for k, step in enumerate(trajectory.steps)}
        self._reservoir.offer(**found, **_group(trajectory))

    @torch.no_grad()
    def rows(self) -> list[Row]:
        if not len(self._reservoir):
            return []
        found: list[Row] = []
        views: dict[str, list[Neighbours]] = {}
        for cloud in ("raw", "read"):
            clouds = self._reservoir.numbered(cloud)
            if clouds:
                views[cloud] = [nearest(one, 2 * max(dimension.SCALES)) for one in clouds]
                found += self._dimensions(cloud, clouds, views[cloud])
        found += self._updates()
        for cloud in views:
            found += self._breath(cloud, views)
        return found

    def _dimensions(self, cloud: str, clouds: Sequence[Tensor], near: Sequence[Neighbours]) -> list[Row]:
        found: list[Row] = []
        errors = _errors(near[: len(self._states)], self._seed, _numbered(self._reservoir))
        for at, x, here, error in zip(self._states, clouds, near, errors, strict=False):
            n, d = x.shape
            one = dimension.twonn(here)
            told = [estimate(at, "geo.id_twonn", one.value, one.n, one.dropped, error=one.value * error)]
            for scale, one in zip(dimension.SCALES, dimension.gride(here), strict=True):
                told.append(estimate(at, "geo.id_gride", one.value, one.n, one.dropped, error=one.se, param=f"k={scale}"))
            told += [
                estimate(at, "geo.pr", float(dimension.participation_ratio(x)), n, null=n * d / (n + d)),
                estimate(at, "geo.erank_sv", float(dimension.erank_sv(x)), n),
                estimate(at, "geo.rank_resid", float(dimension.rank_residual(x)), n, null=math.sqrt(1 - 1 / n)),
                estimate(at, "geo.duplicates", 1 - len(here.kept) / n, n),
                estimate(at, "geo.near_duplicates", near_duplicates(here), len(here.kept)),
            ]
            found += [row._replace(cloud=cloud) for row in told]
        return found

    def _updates(self) -> list[Row]:
        found: list[Row] = []
        for at, update in zip(self._states[1:], self._reservoir.numbered("update"), strict=True):
            one = dimension.twonn(nearest(update, 2))
            found.append(estimate(at, "geo.id_twonn", one.value, one.n, one.dropped, error=one.se, param="update"))
        return found

    def _breath(self, cloud: str, views: Mapping[str, Sequence[Neighbours]]) -> list[Row]:
        near, changes, groups = views[cloud], self._changes, _numbered(self._reservoir)
        if cloud == "read" and self._parallel:
            return []
        sides = {point: [(c.before, c.after) for c in changes if c.point == point] for point in AT}
        if not changes:
            return []
        paired = [c.layer for c in changes if c.point == "attn"] == [c.layer for c in changes if c.point == "ffn"]
        if paired:
            whole = breathing.breathing(near, sides["attn"], sides["ffn"], seed=self._seed, prompts=groups)
            each = {"attn": whole.attn, "ffn": whole.mlp}
        else:
            each = {
                point: breathing.contrasts(near, _weights(pairs, len(near)), seed=self._seed, prompts=groups)
                for point, pairs in sides.items()
                if pairs
            }
        found: list[Row] = []
        n = len(self._reservoir)
        for point, change in each.items():
            counted = breathing.counts(change, self._others(cloud, views, sides[point]))
            layers = [c.layer for c in changes if c.point == point]
            numbers = zip(layers, change.value.tolist(), change.se.tolist(), change.p.tolist(), counted.tolist(), strict=True)
            for layer, value, error, p, counts in numbers:
                at, name = (layer, point), NAMES[point]
                size = (0, n) if math.isnan(value) else (n, 0)
                found += [
                    estimate(at, f"breath.b_{name}", value, *size, error=error, null=0.0),
                    estimate(at, f"breath.p_{name}", p, *size),
                    estimate(at, f"breath.counts_{name}", float(counts) if size[0] else math.nan, *size, null=breathing.LEVEL),
                ]
        if paired:
            at, total = (None, None), whole.sawtooth
            blocks = total.n_valid, total.n_dropped
            found.append(estimate(at, "breath.sawtooth", total.fraction, *blocks, null=0.25))
            for key, one in (("amplitude", whole.amplitude), ("drift", whole.drift)):
                found.append(estimate(at, f"breath.{key}", float(one.value), *blocks, error=float(one.se), null=0.0))
            found.append(estimate(at, "breath.p_value", whole.p if total.n_valid else math.nan, *blocks))
        return [row._replace(cloud=cloud, param="parallel" if self._parallel else None) for row in found]

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


class _Controls(Observation):
    """Each step's cloud as it would be after another update of the same block."""

    def __init__(self, points: int, seed: int):
        self._seed, self._reservoir = seed, Reservoir(points, seed)
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
                self._offer(found, step.layer, "attn", "uniform", k, x + epsilon * uniform(trajectory, k), place)
        self._reservoir.offer(**found, **_group(trajectory))

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
        clouds = self._reservoir.numbered("raw")[:states] + self._reservoir.numbered("instead")
        near = [nearest(cloud, scales) for cloud in clouds]
        pairs = [(before, states + k) for k, (*_, before) in enumerate(self._instead)]
        change = breathing.contrasts(near, _weights(pairs, len(near)), seed=self._seed, prompts=groups)
        errors = _errors(near[states:], self._seed, groups)
        found: list[Row] = []
        n = len(self._reservoir)
        for k, (layer, point, param, _) in enumerate(self._instead):
            one, at = dimension.twonn(near[states + k]), (layer, point)
            found.append(estimate(at, "geo.id_twonn", one.value, one.n, one.dropped, error=one.value * errors[k], param=param))
            value, error = float(change.value[k]), float(change.se[k])
            size = (0, n) if math.isnan(value) else (n, 0)
            found.append(estimate(at, f"breath.b_{NAMES[point]}", value, *size, error=error, null=0.0, param=param))
        return found


def uniform(trajectory: Trajectory, k: int) -> Tensor:
    """(B, 1, d): the update of the last token if it looked at everything it sees alike."""
    step, block = trajectory.steps[k], trajectory.block(k)
    attention, seen = block.attention, trajectory.visible(k, slice(-1, None))
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


def _group(trajectory: Trajectory) -> dict[str, Tensor]:
    return {} if trajectory.groups is None else {"group": trajectory.groups}


def _numbered(reservoir: Reservoir) -> Tensor | None:
    """The group of each point, numbered from 0: what the bootstrap draws whole. None: each point is its own."""
    return reservoir["group"].unique(return_inverse=True)[1] if "group" in reservoir else None
