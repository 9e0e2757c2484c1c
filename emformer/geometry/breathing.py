"""Does the dimension of the cloud rise at attention and fall at the FFN: the sawtooth, with an error that holds.

One prompt, one point: the resampled unit is the prompt. The terms l_i of TwoNN are not independent, because points share their
distances; a bootstrap that resamples them as if they were finds a change where there is none 12 % of the time instead of 5 %. So
its spread is stretched by what two random halves of the prompts, each with its own neighbours, differ more than independent
terms would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from emformer.geometry.dimension import twonn
from emformer.geometry.neighbours import Neighbours, log_ratios

LEVEL = 0.05
AGREEMENT = (2, 4, 8)  # scales of `dimension.gride` whose signs must agree, see `counts`
_ROUNDING = 1e-10  # nats; changes this small are none

Pairs = Sequence[tuple[int, int]]


class Change(NamedTuple):
    """Changes of log dimension, in nats, each with its uncertainty over prompts. nan where a dimension is undefined."""

    value: Float64[Tensor, "*changes"]
    se: Float64[Tensor, "*changes"]
    low: Float64[Tensor, "*changes"]  # 95 %; without 0 iff p <= .05
    high: Float64[Tensor, "*changes"]
    p: Float64[Tensor, "*changes"]  # two-sided, of no change
    p_up: Float64[Tensor, "*changes"]  # of no increase
    p_down: Float64[Tensor, "*changes"]  # of no decrease
    inflation: Float64[Tensor, "*changes"]  # variance over that of independent terms: the effective N is N / inflation


class Sawtooth(NamedTuple):
    """Of the blocks where both changes are defined; nan for none."""

    fraction: float
    amplitude: float
    drift: float
    n_valid: int
    n_dropped: int


class Breathing(NamedTuple):
    """`attn`, `mlp` have one change a block; the means over the blocks where both are defined are scalars."""

    attn: Change
    mlp: Change
    mean_attn: Change
    mean_mlp: Change
    amplitude: Change
    drift: Change
    p: float
    sawtooth: Sawtooth


def steps(dimensions: Float[Tensor, "*scales states"]) -> tuple[Float64[Tensor, "*scales b"], Float64[Tensor, "*scales b"]]:
    """b_attn = log(d^{l+1/2} / d^l) and b_mlp = log(d^{l+1} / d^{l+1/2}) of dimensions at X^0, X^{1/2}, X^1 ... X^L.

    In nats. Null 0. nan where a dimension is. Raises ValueError for an even number of states. Source: math G.4.
    """
    if dimensions.shape[-1] % 2 == 0:
        raise ValueError(f"a trajectory of whole blocks has an odd number of states, not {dimensions.shape[-1]}")
    change = dimensions.double().log().diff(dim=-1)
    return change[..., ::2], change[..., 1::2]


def sawtooth(attn: Float[Tensor, " blocks"], mlp: Float[Tensor, " blocks"]) -> Sawtooth:
    """The share of blocks with b_attn > 0 > b_mlp, the amplitude mean (b_attn - b_mlp)/2 and the drift mean (b_attn + b_mlp).

    Share in [0, 1]: 1 is the strict sawtooth. Its null is 1/4 for independent fair signs, but 1/3 for unrelated clouds of one
    dimension: the middle one of three is the largest. Amplitude and drift in nats, null 0. Blocks with an undefined change are
    left out and counted. Source: math G.4.
    """
    valid = (attn.isfinite() & mlp.isfinite()).tolist()
    n = sum(valid)
    a, m = attn[valid].double(), mlp[valid].double()
    rises = ((a > 0) & (m < 0)).double()
    return Sawtooth(_mean(rises), _mean((a - m) / 2), _mean(a + m), n, len(valid) - n)


def counts(change: Change, others: Float[Tensor, "views blocks"]) -> Bool[Tensor, " blocks"]:
    """Whether a block's change counts: its interval excludes 0, and every other view of it has the same sign.

    The views: `dimension.gride` at the scales `AGREEMENT`, and all of them for the other of the raw and the read cloud. A view
    that is nan or 0 agrees with nothing. The agreement only vetoes: without change, at most 5 % count. Source: math G.4.
    """
    return (change.p <= LEVEL) & (change.value.sign() == others.sign()).all(0)


def breathing(
    states: Sequence[Neighbours],
    attn: Pairs | None = None,
    mlp: Pairs | None = None,
    prompts: Int64[Tensor, " points"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Breathing:
    """The test for breathing of a whole trajectory, on the clouds X^0, X^{1/2}, X^1 ... X^L of the same prompts.

    `p` is of "the mean b_attn is not positive or the mean b_mlp not negative", the larger of two one-sided p: a trajectory
    breathes if it does both. At most 5 % of those that do not breathe have p <= .05: 5 % if one of the two happens clearly and
    the other is 0 (dimensions 4, 6, 6, 8, 8), 1 to 3 % if nothing happens at all. `amplitude.p` is of "nothing happens", and 5
    % then; alone it cannot tell a sawtooth from growth at two speeds. The test resamples the prompts of the whole trajectory.
    Flipping the signs of L blocks instead gives no p below 2^-L, and neighbouring blocks share a cloud. Source: math G.4.

    Args:
        attn: for each block the states before and after attention. Default: (0, 1), (2, 3) ...
        mlp: the same for the FFN. Default: (1, 2), (3, 4) ... A parallel block has both from its input.
        prompts, resamples, seed: see `contrasts`.
    """
    if attn is None and mlp is None and len(states) % 2:
        attn = [(at, at + 1) for at in range(0, len(states) - 1, 2)]
        mlp = [(at + 1, at + 2) for at in range(0, len(states) - 1, 2)]
    if attn is None or mlp is None or len(attn) != len(mlp):
        raise ValueError("needs a pair of states for attention and one for the FFN of each block, or an odd number of states")
    rows = torch.zeros(2 * len(attn), len(states), dtype=torch.float64)
    for row, (before, after) in zip(rows, [*attn, *mlp], strict=True):
        row[before] -= 1
        row[after] += 1
    a, m = rows.chunk(2)
    defined = [math.isfinite(twonn(state).value) for state in states]
    valid = [all(defined[at] for at in (*x, *y)) for x, y in zip(attn, mlp, strict=True)]
    a_mean, m_mean = a[valid].mean(0), m[valid].mean(0)
    means = torch.stack([a_mean, m_mean, (a_mean - m_mean) / 2, a_mean + m_mean])
    change = contrasts(states, torch.cat([rows, means]), prompts, resamples, seed=seed)
    n = len(attn)
    a_change, m_change = (Change(*(field[part] for field in change)) for part in (slice(n), slice(n, 2 * n)))
    mean_attn, mean_mlp, amplitude, drift = (Change(*(field[2 * n + at] for field in change)) for at in range(4))
    p = float(torch.maximum(mean_attn.p_up, mean_mlp.p_down))
    total = sawtooth(a_change.value, m_change.value)
    return Breathing(a_change, m_change, mean_attn, mean_mlp, amplitude, drift, p, total)


@torch.no_grad()
def contrasts(
    states: Sequence[Neighbours],
    weights: Float[Tensor, "changes states"],
    prompts: Int64[Tensor, " points"] | None = None,
    resamples: int = 2000,
    splits: int = 128,
    seed: int = 0,
) -> Change:
    """sum_s w_s log d_s for each row w of weights, d the `twonn` of each state, with its uncertainty over prompts.

    A row -1, +1 is a change; one that is 1 at a single state gives the error of a dimension, dependence included.

    The cluster bootstrap draws prompts with replacement, the same for all states, and keeps each point's ratio (with neighbours
    searched anew, two in three points would meet their own copy at distance 0). Its deviations are multiplied by the root of
    `inflation`: over random splits of the prompts into halves, the mean squared difference of the halves, each with the
    neighbours it has within itself, over the variance of that difference were the terms independent. The halves are
    independent and alike, so the first is the true variance whatever the dependence, at half the density; the quotient carries
    it over to the full one, where a small motion changes the ratios more. The interval is symmetric, the p (1 + exceedances) /
    (1 + resamples).

    Needs 16 neighbours, better 32: a point that sees less than two of its own half is left out there. nan where a state with
    weight is undefined; the uncertainty also where a half is. Bitwise the same for the same seed; the global generators are not
    touched. Cost (splits (S + C) + resamples) N for S states and C rows. Raises ValueError where the states differ in size.

    Args:
        prompts: which prompt each point is from, any numbers. Default: each point is a prompt.
        seed: of the resamples and the splits.
    """
    points = {state.points for state in states}
    if len(points) != 1:
        raise ValueError(f"the states must have the same points, not {sorted(points)}")
    size = points.pop()
    prompts = torch.arange(size) if prompts is None else prompts.cpu().unique(return_inverse=True)[1]
    if len(prompts) != size:
        raise ValueError(f"needs the prompt of each of the {size} points, got {len(prompts)}")
    value = torch.tensor([twonn(state).value for state in states], dtype=torch.float64).log()
    defined = value.isfinite()
    weights = weights.double().cpu()
    missing = ((weights != 0) & ~defined).any(1) | ~weights.isfinite().all(1)
    # 0 times nan would spread over the rows that do not use the state
    weights = weights.where(~missing[:, None], 0)[:, defined]
    states = [state for state, use in zip(states, defined.tolist(), strict=True) if use]
    if not states:
        return Change(*torch.full((len(Change._fields), len(weights)), torch.nan, dtype=torch.float64))

    generator = np.random.default_rng(seed)
    n = int(prompts.max()) + 1
    drawn = _resamples(n, resamples, generator)
    place = torch.from_numpy(generator.random((splits, n)).argsort(1)).T.contiguous()
    halves = (place < n // 2)[prompts]
    totals, numbers = _by_prompt(states, prompts, n)
    usual = numbers.sum(0).log() - totals.sum(0).log()
    deviation = weights @ ((drawn @ numbers).log() - (drawn @ totals).log() - usual).T
    gaps, influences = map(torch.stack, zip(*(_halves(state, prompts, n, halves) for state in states), strict=True))
    excess = (weights @ gaps).square().mean(1)
    independent = torch.linalg.vector_norm(weights @ influences.flatten(1), dim=1).square() / splits
    inflation = torch.where(excess + independent < _ROUNDING**2, 1, excess / independent)
    deviation = deviation * inflation.sqrt()[:, None]

    point = (weights @ value[defined]).where(~missing, torch.nan)
    # the order statistic that makes "0 outside" and p <= LEVEL the same
    width = deviation.abs().topk(max(1, int(LEVEL * (1 + resamples))), dim=1).values[:, -1]
    # a step that moves nothing changes the dimension by rounding alone, which must not look like a sign
    slack, at = _ROUNDING, point[:, None]
    exceeding = (deviation.abs() >= at.abs() - slack, deviation >= at - slack, deviation <= at + slack)
    ps = [(1 + cases.sum(1).double()) / (1 + resamples) for cases in exceeding]
    fields = (deviation.std(1), point - width, point + width, *ps, inflation)
    unknown = missing | ~deviation.isfinite().all(1)
    return Change(point, *(field.where(~unknown, torch.nan) for field in fields))


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _resamples(n: int, resamples: int, generator: np.random.Generator) -> Tensor:
    """(resamples, n): how often each of n prompts is drawn in n draws."""
    drawn = generator.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return torch.from_numpy(np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)).double()


def _by_prompt(states: Sequence[Neighbours], prompts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(n, S): the sum of the ratios of each prompt's points, and their number."""
    ratios = torch.stack([log_ratios(state).cpu() for state in states], 1)
    present = ratios.isfinite()
    empty = ratios.new_zeros(n, len(states))
    return empty.index_add(0, prompts, ratios.where(present, 0)), empty.index_add(0, prompts, present.double())


def _halves(state: Neighbours, prompts: Tensor, n: int, halves: Tensor) -> tuple[Tensor, Tensor]:
    """For each split, the difference of log dimension between its halves (R,), and each prompt's part in it (n, R)."""
    kept, near = state.kept.cpu(), state.indices.cpu()
    logs = state.distances.cpu().log()
    own = halves[kept]
    known = bool((near >= 0).all())
    first, second = torch.zeros(2, *own.shape, dtype=torch.bool)
    before_first, before_second = torch.zeros(2, *own.shape, dtype=torch.uint8)
    for at in range(min(near.shape[1], 255)):
        same = halves[near[:, at]] == own
        if not known:
            same &= near[:, at, None] >= 0
        second |= same & first
        first |= same
        before_first += (~first).view(torch.uint8)
        before_second += (~second).view(torch.uint8)
        if at % 4 == 3 and second.all():
            break
    last = near.shape[1] - 1  # of a point without two, which `second` leaves out
    ratios = logs.gather(1, before_second.long().clamp_(max=last)) - logs.gather(1, before_first.long().clamp_(max=last))
    gap, parts = 0.0, 0.0
    for sign, half in ((1, own & second), (-1, ~own & second)):
        total, count = ratios.where(half, 0).sum(0), half.sum(0)
        gap = gap + sign * (count.log() - total.log())
        parts = parts + torch.where(half, ratios / total - 1 / count, 0)
    return gap, logs.new_zeros(n, halves.shape[1]).index_add(0, prompts[kept], parts)
