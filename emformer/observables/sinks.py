"""Family "sinks": the first token that most queries look at, how constant that is, and what it gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import leaves, sinks
from emformer.geometry.spectra import wide
from emformer.observables.base import Moments, Observation, Reservoir, Row, estimate
from emformer.observables.foliation import chance
from emformer.parts import UserError
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Sinks(parts.Observable):
    """The first token as a sink, of every head and of their mean; contents F y are effective, the norm's bias left out.

    Weights are made to sum to one where the kernel's do not; of weights that may be negative only contents are told. Between
    prompts the cosine of what sinks give is told for pairs that begin with the same token, which causality makes 1, and apart
    from them for pairs that do not, one prompt for each token; beside it stands the same of a later token. Compare sink rates of
    prompts of one length only, and everything with an untrained model.

    Cost a layer: the H N^2 weights in float64 and H N^2 r. Memory: `prompts` vectors of r numbers a head and layer, and of the
    weights the trajectory's budget. Source: math H.2; Gu et al. 2024, "When attention sink emerges in language models"
    (2410.10781).

    Args:
        threshold: above which mean weight a token is a sink.
        prompts: at most so many are kept for the cosine between prompts, drawn at random.
        control: position, from 1, of the token that is held against the first.
        seed: of the draw.
    """

    threshold: float = 0.3
    prompts: int = 256
    control: int = 5
    seed: int = 0

    family: ClassVar[str] = "sinks"
    keys: ClassVar[Mapping[str, str]] = {
        "attn.sink_rate": "1 if the mean weight on token k, over the queries that see it, is above the threshold; [0, 1]; null "
        "that of uniform attention, 0 on long prompts",
        "sink.mass": "mean weight on the first token, over the queries with a choice; [0, 1]; null that of uniform attention",
        "sink.variation": "sd/mean of that weight over the queries; >= 0; 0 is a constant bias; null that of uniform attention",
        "sink.argmax": "share of prompts in which the token of the largest mean weight, among those that half as many queries "
        "see as any, is the first; [0, 1]; null that of uniform attention",
        "sink.unspent": "1 - the sum of a query's weights, what no token gets, of kernels whose rows do not sum to one; <= 1",
        "sink.share": "|a_1 F y_1|/|sum_j a_j F y_j|, the first token's part in what a query gets; >= 0; 1 where it is all",
        "sink.drain": "|F y_1|/median over the others of |F y_j|; >= 0; below 1 the first token gives less; null 1",
        "sink.value_cos": "mean cosine of F y_1 between prompts; [-1, 1]; param 'same': first tokens equal, null 1 by causality; "
        "'different': first tokens all different, null 0; 'control': another position, its tokens all different, null 0; cloud "
        "'centred': mean of F y_j over the other positions removed",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if not self.threshold > 0 or self.prompts < 2 or self.control < 2 or self.seed < 0:
            raise UserError(
                f"{self} cannot be measured: threshold is above 0, prompts and control at least 2 and the seed at least 0."
            )

    def begin(self) -> Observation:
        return _Sinks(self)


class _Sinks(Observation):
    def __init__(self, setting: Sinks):
        self._setting, self._moments = setting, Moments()
        self._pool = Reservoir(setting.prompts, setting.seed)
        self._layers: dict[int, _Layer] = {}

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        rates, expected, pooled = [], [], {}
        blind = True  # whether the first token has seen itself alone so far
        for k in trajectory.attentions:
            step, kernel = trajectory.steps[k], trajectory.block(k).attention.kernel
            at = step.layer, step.point
            given = contents(trajectory, k)
            seen = see(trajectory, k, given, divided=not kernel.normalised and not kernel.signed)
            if not kernel.signed:
                rate, null = self._weights(at, seen, kernel.normalised)
                rates.append(rate)
                expected.append(null)
            self._moments.by_head(seen.share[..., seen.chooses], *at, "sink.share")
            self._moments.by_head(sinks.value_ratio(given), *at, "sink.drain", null=1.0)
            if trajectory.tokens is not None:
                if k not in self._layers:
                    self._layers[k] = _Layer(at, blind, trajectory, k)
                self._layers[k].add(given)
                pooled[f"first{k}"] = given[:, :, 0]
                if given.shape[2] >= self._setting.control:
                    pooled[f"control{k}"] = given[:, :, self._setting.control - 1]
            blind = blind and int(seen.keys[0]) == 1
        if rates:
            whole = torch.stack(rates).nanmean((0, 2))
            self._moments.add(whole, None, None, "attn.sink_rate", param="k=1", null=sum(expected) / len(expected))
        if pooled:
            assert trajectory.tokens is not None
            pooled["first"] = trajectory.tokens[:, 0]
            if trajectory.tokens.shape[1] >= self._setting.control:
                pooled["control"] = trajectory.tokens[:, self._setting.control - 1]
            self._pool.offer(**pooled)

    def _weights(self, at: tuple[int, str], seen: Seen, normalised: bool) -> tuple[Tensor, float]:
        """What the pattern alone tells; the sink rate (B, H) and its null."""
        threshold = self._setting.threshold
        if not normalised:
            self._moments.by_head(1 - seen.total, *at, "sink.unspent")
        alphas = [mass / seen.queries for mass in (seen.mass, seen.even)]
        rate, null = (sinks.sink_rate_of(alpha, 1, threshold) for alpha in alphas)
        self._moments.by_head(rate, *at, "attn.sink_rate", null=float(null), param="k=1")
        mass, fair = (sinks.sink_mass_of(first, seen.chooses) for first in (seen.first, 1 / seen.keys.clamp(min=1).double()))
        self._moments.by_head(mass.mean, *at, "sink.mass", null=float(fair.mean))
        self._moments.by_head(mass.variation, *at, "sink.variation", null=float(fair.variation))
        # a mean of few weights is large by chance
        enough = (int(seen.queries.max()) + 1) // 2
        first, usual = (sinks.sink_position_of(alpha, seen.queries, enough) for alpha in alphas)
        share = (first == 1).double().where(~first.isnan(), torch.nan)
        self._moments.by_head(share, *at, "sink.argmax", null=math.nan if usual.isnan() else float(usual == 1))
        return rate, float(null)

    def rows(self) -> list[Row]:
        found = self._moments.rows()
        for k, layer in self._layers.items():
            found += layer.rows(self._pool, k)
        return found


class Seen(NamedTuple):
    """What the pattern of a step says: `keys` (T,) that a query sees, `queries` (S,) that see a key, `chooses` (T,) the queries
    that see the first key and another; the weights' sum `total` and the first one's part `share` (B, H, T); and of weights that
    are made to sum to one the `first` (B, H, T), what each key receives `mass` (B, H, S), and of uniform ones `even` (S,)."""

    keys: Tensor
    queries: Tensor
    chooses: Tensor
    total: Tensor
    share: Tensor
    first: Tensor
    mass: Tensor
    even: Tensor


def see(trajectory: Trajectory, k: int, given: Tensor, divided: bool) -> Seen:
    """What the pattern of step k says of the first token. `given`: `contents`. `divided`: weights are made to sum to one."""
    keys, queries = trajectory.counts(k)
    sees, total, share, first = [], [], [], []
    mass: Tensor | float = 0.0
    even: Tensor | float = 0.0
    for chunk in trajectory.chunks(k):
        a = wide(chunk.pattern)
        share.append(sinks.sink_share(a[..., 0], given[:, :, 0], a @ given))
        total.append(a.sum(-1))
        if divided:
            a = a * (1 / total[-1]).where(total[-1] > 0, 0.0).unsqueeze(-1)
        first.append(a[..., 0].clone())  # a view would keep all of a
        sees.append(chunk.visible[:, 0].clone())
        mass = mass + sinks.received(a, chunk.visible)
        even = even + sinks.received(sinks.uniform(chunk.visible), chunk.visible)
    assert isinstance(mass, Tensor) and isinstance(even, Tensor)
    rows = (torch.cat(some, -1) for some in (total, share, first))
    return Seen(keys, queries, torch.cat(sees) & (keys >= 2), *rows, mass, even)


class _Layer:
    """What the cosine between prompts needs of one layer: where it is, its mean content, what chance would give."""

    def __init__(self, at: tuple[int, str], blind: bool, trajectory: Trajectory, k: int):
        content = trajectory.block(k).attention.content
        right = content.right_rows()
        if right is None:
            right = torch.eye(content.dim, dtype=torch.float64, device=content.left_rows().device).unsqueeze(0)
        a, _ = trajectory.fold(k)
        fold = None if a is None else wide(a)
        self.at, self.same = at, 1.0 if blind else math.nan
        self.each, self.whole = chance(right.repeat_interleave(content.heads // len(right), 0), _core(content.left_rows()), fold)
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, given: Tensor) -> None:
        """Contents (B, H, T, r), of which the first is no part of the mean."""
        self.total = self.total + given[:, :, 1:].sum((0, 2))
        self.count += given.shape[0] * (given.shape[2] - 1)

    def rows(self, pool: Reservoir, k: int) -> list[Row]:
        found = []
        for cloud in ("raw", "centred"):
            if cloud == "centred" and not self.count:
                continue
            mean = self.total / self.count if cloud == "centred" else None
            assert mean is None or isinstance(mean, Tensor)
            for param in ("same", "different", "control"):
                name = "control" if param == "control" else "first"
                if name not in pool:
                    continue
                values, ids = pool[f"{name}{k}"], pool[name].tolist()
                cosines, used = (_alike if param == "same" else _apart)(values, ids, mean)
                found += self._told(cosines, used, len(ids), param, cloud)
        return found

    def _told(self, cosines: Tensor, used: int, offered: int, param: str, cloud: str) -> list[Row]:
        """`used` of the `offered` prompts are part of a pair."""
        found, null = [], self.same if param == "same" else 0.0
        for head, value in [(None, cosines.nanmean()), *enumerate(cosines)]:
            n = 0 if value.isnan() else used
            shared = self.whole if head is None else self.each[head]
            sd = leaves.anisotropy_sd(n, 1) * math.sqrt(shared) if param != "same" and n > 1 else math.nan
            nulls = {"null": null, "null_sd": sd}
            found.append(
                estimate(self.at, "sink.value_cos", float(value), n, offered - n, **nulls, head=head, cloud=cloud, param=param)
            )
        return found


@torch.no_grad()
def contents(trajectory: Trajectory, k: int) -> Tensor:
    """F_h y_j of step k (B, H, T, p) in float64, in an orthonormal basis of the p dimensions that head h writes to.

    Effective: of y without the norm's bias. Lengths and angles are those in E. Cost H N r^2.
    """
    content, y = trajectory.block(k).attention.content, trajectory.steps[k].read
    _, bias = trajectory.fold(k)
    if bias is not None:
        y = y - bias
    z = wide(content.right(y)).repeat_interleave(content.heads // content.groups, 1)
    return z @ _core(content.left_rows())


def _core(left_rows: Tensor) -> Tensor:
    """T (H, r, p) with L = Q T^T, Q of orthonormal columns."""
    return torch.linalg.qr(wide(left_rows).mT, mode="r").R.mT


def _apart(values: Tensor, ids: Sequence[int], mean: Tensor | None) -> tuple[Tensor, int]:
    """Cosine (H,) over pairs of different ids: the first prompt of each id, and how many these are."""
    first: dict[int, int] = {}
    for place, token in enumerate(ids):
        first.setdefault(token, place)
    chosen = values[list(first.values())]
    return sinks.value_cosine(chosen, mean), len(chosen)


def _alike(values: Tensor, ids: Sequence[int], mean: Tensor | None) -> tuple[Tensor, int]:
    """Cosine (H,) over all pairs of equal ids, and how many prompts are part of such a pair."""
    places: dict[int, list[int]] = {}
    for place, token in enumerate(ids):
        places.setdefault(token, []).append(place)
    groups = [group for group in places.values() if len(group) > 1]
    total, pairs = values.new_zeros(values.shape[1]), values.new_zeros(values.shape[1])
    for group in groups:
        cosine = sinks.value_cosine(values[group], mean)
        weight = len(group) * (len(group) - 1) * (~cosine.isnan()).double()
        total, pairs = total + weight * cosine.nan_to_num(), pairs + weight
    return total / pairs, sum(map(len, groups))  # 0/0 is nan
