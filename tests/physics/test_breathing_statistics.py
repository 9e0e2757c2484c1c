"""The sawtooth test: what does not breathe is found to at the nominal rate, what does is found (math G.4)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from emformer.geometry.breathing import AGREEMENT, LEVEL, Change, breathing, contrasts, counts, sawtooth, steps
from emformer.geometry.dimension import gride, twonn
from emformer.geometry.neighbours import Neighbours, log_ratios, nearest

K = 24  # neighbours: in a half, one point in 10^6 sees less than two of them
ROW = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)


def turned(cloud: Tensor, normal: Callable[..., Tensor], d: int = 24) -> Tensor:
    """The same cloud in d dimensions, turned, scaled and moved."""
    inside = torch.linalg.qr(normal(d, cloud.shape[1])).Q
    return 0.3 * cloud @ inside.mT + normal(d)


def rates(trajectory: Callable[[int], list[Tensor]], draws: int = 300) -> dict[str, float]:
    """How often each test finds something at 5 %."""
    found: dict[str, list[float]] = {name: [] for name in ("attn", "mlp", "amplitude", "p", "independent")}
    for seed in range(draws):
        one = breathing([nearest(cloud, K) for cloud in trajectory(seed)], resamples=400, seed=seed)
        found["attn"] += one.attn.p.tolist()
        found["mlp"] += one.mlp.p.tolist()
        found["amplitude"].append(float(one.amplitude.p))
        found["p"].append(one.p)
        naive = one.mlp.value.abs() / (one.mlp.se / one.mlp.inflation.sqrt())
        found["independent"] += (LEVEL * (naive <= 1.96)).add(0.01).tolist()
    return {name: float(np.mean(np.array(ps) <= LEVEL)) for name, ps in found.items()}


def nominal(rate: float, tests: int) -> bool:
    """Within 2.6 binomial standard errors of 5 %."""
    return abs(rate - LEVEL) <= 2.6 * math.sqrt(LEVEL * (1 - LEVEL) / tests)


def test_small_motions_of_one_dimension_are_not_breathing() -> None:
    """A cloud that keeps its law while every point moves a little: neighbours stay, ratios change together."""

    def trajectory(seed: int) -> list[Tensor]:
        normal = draw(seed)
        clouds = [normal(300, 4)]
        for size in (0.03, 0.1):
            clouds.append(math.sqrt(1 - size**2) * clouds[-1] + size * normal(300, 4))
        return [turned(cloud, normal) for cloud in clouds]

    found = rates(trajectory)
    assert nominal(found["attn"], 300) and nominal(found["mlp"], 300) and nominal(found["amplitude"], 300), found
    assert found["p"] <= LEVEL, found
    assert found["independent"] > 0.09, found  # what the correction is for


def test_a_step_that_only_rises_is_not_breathing() -> None:
    """Dimensions 4, 8, 8 of unrelated clouds: the hardest case for the test of the whole, which is exactly nominal there."""

    def trajectory(seed: int) -> list[Tensor]:
        normal = draw(1000 + seed)
        return [turned(normal(300, d), normal) for d in (4, 8, 8)]

    found = rates(trajectory)
    assert nominal(found["mlp"], 300) and nominal(found["p"], 300), found
    assert found["attn"] > 0.99, found


def test_copies_have_not_changed() -> None:
    """The identical cloud has p = 1; turned and scaled by powers of two nothing changes but the rounding."""
    normal = draw(0)
    cloud = normal(300, 6)
    near = nearest(cloud, K)
    one = breathing([near, nearest(4 * cloud, K), near])
    for change in (one.attn, one.mlp, one.amplitude, one.drift):
        assert bool((change.value == 0).all() and (change.p == 1).all() and (change.inflation == 1).all())
    assert one.p == 1 and one.sawtooth.fraction == 0
    moved = breathing([near, nearest(turned(cloud, normal), K), near])
    assert abs(float(moved.attn.value)) < 1e-12 and abs(float(moved.amplitude.high)) < 1e-12


def planted(seed: int) -> list[Tensor]:
    """Two blocks, 4 -> 6 -> 4: attention adds two coordinates to every prompt, the FFN takes them away."""
    normal = draw(seed)
    base = normal(1000, 4)
    clouds = []
    for added in (False, True, False, True, False):
        base = math.sqrt(0.99) * base + 0.1 * normal(1000, 4)
        clouds.append(turned(torch.cat([base, normal(1000, 2)], 1) if added else base, normal))
    return clouds


def test_a_planted_sawtooth_is_found(seed: int) -> None:
    raw = planted(seed)
    views = {"raw": raw, "read": [cloud / cloud.norm(dim=1, keepdim=True) for cloud in raw]}
    near = {name: [nearest(cloud, 32) for cloud in clouds] for name, clouds in views.items()}
    one = breathing(near["raw"], seed=seed)
    assert one.p < 0.001 and one.sawtooth.fraction == 1 and one.sawtooth.n_valid == 2
    assert bool((one.attn.low > 0).all() and (one.mlp.high < 0).all())
    # N = 1000 reads 5.95 for 6 dimensions; the standard error is .037
    assert one.sawtooth.amplitude == pytest.approx(math.log(5.95 / 4.05), abs=0.1)
    assert float(one.amplitude.se) == pytest.approx(0.037, rel=0.3)
    assert float(one.amplitude.value) == pytest.approx(one.sawtooth.amplitude, rel=1e-12)
    assert float(one.drift.value) == pytest.approx(one.sawtooth.drift, abs=1e-12)
    assert float(one.drift.p) > 0.001
    tables = [torch.tensor([[e.value for e in gride(state, (1, *AGREEMENT))] for state in states]).T for states in near.values()]
    attn, mlp = steps(torch.cat(tables))
    assert bool(counts(one.attn, attn).all() and counts(one.mlp, mlp).all())
    # the other way round it is a sawtooth upside down
    other = breathing([near["raw"][at] for at in (1, 2, 3, 4, 1)], seed=seed)
    assert other.p > 0.99 and other.sawtooth.fraction == 0 and float(other.amplitude.p) < 0.001


def test_error_is_that_over_clouds() -> None:
    """The standard error of a dimension, with one point a prompt and with three dependent ones; 1/sqrt(N) is too small."""
    single = ROW[:, 1:]
    for points in (1, 3):
        prompts, values, errors, inflations = torch.arange(300) // points, [], [], []
        for seed in range(100):
            normal = draw(seed)
            cloud = normal(300, 3) + normal(300 // points, 3)[prompts]
            change = contrasts([nearest(cloud, K)], single, prompts, resamples=400, seed=seed)
            values.append(float(change.value))
            errors.append(float(change.se))
            inflations.append(float(change.inflation))
        sd = np.std(values, ddof=1)
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(sd, rel=0.18), points
        assert 1.3 < np.mean(inflations) < 1.9
        assert sd * math.sqrt(300) > 1.1


def test_independent_terms_are_not_inflated() -> None:
    """Ratios without shared neighbours: inflation 1, and the error is the closed form 1/sqrt(N), paired or not."""
    generator = torch.Generator().manual_seed(0)
    n, k = 400, 40
    rows = torch.arange(n)
    # neighbours whose order says nothing: the r-th distance has r^-1 shares of a unit exponential, as in a Poisson process
    states = []
    for d in (3.0, 5.0):
        gaps = torch.empty(n, k, dtype=torch.float64).exponential_(generator=generator).cumsum(1)
        strangers = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in rows])
        strangers = torch.where(strangers == rows[:, None], (strangers + 1) % n, strangers)
        states.append(Neighbours(gaps ** (1 / d), strangers, rows, n))
    change = contrasts(states, torch.tensor([[-1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    assert change.value.tolist() == pytest.approx([math.log(5 / 3), math.log(3), math.log(5)], abs=0.15)
    assert change.inflation.tolist() == pytest.approx([1, 1, 1], abs=0.4)
    naive = change.se / change.inflation.sqrt()
    assert naive.tolist() == pytest.approx([math.sqrt(2 / n), 1 / math.sqrt(n), 1 / math.sqrt(n)], rel=0.15)


def test_value_is_the_ratio_of_the_reported_dimensions_and_the_interval_is_the_p() -> None:
    normal = draw(1)
    # different points are dropped in each state
    clouds = [normal(300, d) for d in (3, 5, 4)]
    clouds[0][:9] = clouds[0][9:18]
    clouds[1][100:120] = clouds[1][0]
    near = [nearest(cloud, K) for cloud in clouds]
    d = [twonn(state).value for state in near]
    rows = torch.tensor([[-1.0, 1, 0], [0, -1, 1], [-1, 0, 1], [-1, 2, -1], [0, 0, 0]], dtype=torch.float64)
    change = contrasts(near, rows, resamples=999)
    truth = rows @ torch.tensor(d, dtype=torch.float64).log()
    torch.testing.assert_close(change.value, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(change.high - change.value, change.value - change.low)
    for seed in range(60):
        change = contrasts(near, rows[:4], resamples=199, splits=16, seed=seed)
        outside = (change.low > 0) | (change.high < 0)
        assert torch.equal(outside, change.p <= LEVEL)
        assert bool((change.p_up + change.p_down >= 1).all() and (change.p > 0.0049).all())


def test_splits_search_neighbours_within_the_halves() -> None:
    """The inflation against the search done from scratch in each half."""
    normal = draw(2)
    clouds = [normal(60, 2), normal(60, 3)]
    found = contrasts([nearest(cloud, 59) for cloud in clouds], ROW, resamples=10, splits=8, seed=3)
    generator = np.random.default_rng(3)
    generator.integers(60, size=(10, 60))  # the resamples come first
    place = generator.random((8, 60)).argsort(1)
    excess, independent = [], []
    for row in place:
        gap, parts = 0.0, torch.zeros(60, dtype=torch.float64)
        for sign, cloud in zip((-1, 1), clouds, strict=True):
            for side, rows in ((1, np.flatnonzero(row < 30)), (-1, np.flatnonzero(row >= 30))):
                ratios = log_ratios(nearest(cloud[rows], 2))
                gap -= sign * side * float(ratios.mean().log())
                parts[rows] += sign * (ratios / ratios.sum() - 1 / 30)
        excess.append(gap**2)
        independent.append(float(parts.square().sum()))
    assert float(found.inflation) == pytest.approx(np.mean(excess) / np.mean(independent), rel=1e-10)


def test_resamples_keep_the_neighbours_and_the_pairs() -> None:
    """The bootstrap's error against the closed form for paired terms: the norm of each prompt's part in the difference."""
    normal = draw(3)
    base = normal(600, 3)
    clouds = [base, math.sqrt(1 - 0.05**2) * base + 0.05 * normal(600, 3)]
    prompts = torch.arange(600) // 2
    near = [nearest(cloud, K) for cloud in clouds]
    change = contrasts(near, ROW, prompts, resamples=4000)
    ratios = torch.stack([log_ratios(state) for state in near])
    parts = (ratios / ratios.sum(1, keepdim=True)).diff(dim=0)[0].view(300, 2).sum(1)
    naive = float(change.se / change.inflation.sqrt())
    assert naive == pytest.approx(float(parts.norm()), rel=0.05)
    unpaired = (ratios / ratios.sum(1, keepdim=True) - 1 / 600).norm()
    assert naive < 0.8 * float(unpaired)


def test_sawtooth_of_numbers() -> None:
    nan = math.nan
    attn, mlp = steps(torch.tensor([4.0, 6, 5, 5, 6, 3, 6, nan, 4]))
    torch.testing.assert_close(attn, torch.tensor([6 / 4, 5 / 5, 3 / 6, nan]).double().log(), equal_nan=True)
    torch.testing.assert_close(mlp, torch.tensor([5 / 6, 6 / 5, 6 / 3, nan]).double().log(), equal_nan=True)
    one = sawtooth(attn, mlp)
    assert (one.fraction, one.n_valid, one.n_dropped) == (1 / 3, 3, 1)
    assert one.amplitude == pytest.approx((math.log(6 / 4) - math.log(5 / 6) - math.log(6 / 5) + 2 * math.log(0.5)) / 6)
    assert one.drift == pytest.approx(math.log(6 / 4) / 3)
    none = sawtooth(attn[3:], mlp[3:])
    assert math.isnan(none.fraction) and math.isnan(none.amplitude) and (none.n_valid, none.n_dropped) == (0, 1)
    batch = steps(torch.rand(5, 7) + 1)
    assert [part.shape for part in batch] == [(5, 3), (5, 3)]
    with pytest.raises(ValueError, match="odd number of states"):
        steps(torch.ones(4))


def test_a_block_counts_only_if_all_views_agree() -> None:
    value = torch.tensor([0.3, 0.3, 0.3, -0.3, 0.3, math.nan], dtype=torch.float64)
    p = torch.tensor([0.01, 0.06, 0.01, 0.05, 0.01, math.nan], dtype=torch.float64)
    change = Change(value, *[value] * 3, p, *[value] * 3)
    others = torch.tensor([[0.1, 0.1, 0.1, -0.2, math.nan, 0.1], [0.1, 0.1, -0.1, -0.1, 0.1, 0.1]])
    assert counts(change, others).tolist() == [True, False, False, True, False, False]
    assert not counts(change, torch.zeros(1, 6)).any()


def test_undefined_states_leave_out_their_blocks() -> None:
    normal = draw(4)
    clouds = [normal(200, d) for d in (3, 5, 3, 5, 3, 5, 3)]
    clouds[0][:50] = clouds[0][50]  # a quarter are duplicates
    near = [nearest(cloud, K) for cloud in clouds]
    one = breathing(near)
    assert one.attn.value.isfinite().tolist() == [False, True, True] and bool(one.mlp.value.isfinite().all())
    for field in one.attn[1:]:
        assert field.isfinite().tolist() == [False, True, True]
    assert (one.sawtooth.n_valid, one.sawtooth.n_dropped) == (2, 1)
    rest = breathing(near[2:])
    for whole, part in zip(one[2:6], rest[2:6], strict=True):
        torch.testing.assert_close(whole.value, part.value, rtol=1e-12, atol=1e-14)
    assert one.p < 0.05
    last = breathing(near[::-1])
    assert last.attn.value.isfinite().all() and last.mlp.value.isfinite().tolist() == [True, True, False]
    torch.testing.assert_close(last.mean_attn.value, breathing(near[:1:-1]).mean_attn.value, rtol=1e-12, atol=0)
    nowhere = breathing([nearest(torch.ones(50, 3), K)] * 3)
    assert math.isnan(nowhere.p) and math.isnan(nowhere.sawtooth.amplitude) and bool(nowhere.attn.p.isnan().all())
    for size, known in ((0, False), (1, False), (2, False), (3, True), (4, True), (12, True)):
        few = breathing([nearest(normal(size, 2), K) for _ in range(3)])
        for change in few[:6]:
            assert bool(change.value.isfinite().all()) == known
            assert all(bool((field.isfinite() | field.isnan()).all()) for field in change)
            assert bool(change.se.isfinite().all()) or size < 12
    # the same with the regular simplex, whose ratios are all 1, between clouds
    few = breathing([nearest(normal(24, 24), K), nearest(torch.eye(24), K), nearest(normal(24, 24), K)])
    assert few.sawtooth.n_dropped == 1 and bool(few.drift.value.isnan())
    assert breathing([near[0]]).sawtooth.n_valid == 0


def test_pairs_of_parallel_blocks() -> None:
    """Attention and FFN both from the block's input: states X, X + D^attn, X + D^ffn, X'."""
    normal = draw(5)
    near = [nearest(normal(300, d), K) for d in (4, 7, 3, 5)]
    one = breathing(near, attn=[(0, 1)], mlp=[(0, 2)])
    d = [twonn(state).value for state in near]
    assert (float(one.attn.value), float(one.mlp.value)) == pytest.approx((math.log(d[1] / d[0]), math.log(d[2] / d[0])))
    assert one.sawtooth.fraction == 1 and one.p < 0.05


def test_bitwise_the_same_and_no_global_randomness() -> None:
    near = [nearest(cloud, K) for cloud in planted(0)[:3]]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two, other = breathing(near), breathing(near), breathing(near, seed=1)
    for first, second in zip(one[:6], two[:6], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert one.p == two.p and float(one.attn.se) != float(other.attn.se)
    # the seed moves the error by the noise of 128 splits
    assert float(one.attn.se) == pytest.approx(float(other.attn.se), rel=0.35)
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()
    # numbers of prompts need not be consecutive
    labels = torch.arange(1000) * 7 - 50
    assert torch.equal(contrasts(near[:2], ROW).se, contrasts(near[:2], ROW, labels).se)


def test_mistakes_of_the_caller() -> None:
    normal = draw(6)
    near = [nearest(normal(n, 2), K) for n in (30, 30, 31)]
    with pytest.raises(ValueError, match="the same points"):
        breathing(near)
    with pytest.raises(ValueError, match="odd number of states"):
        breathing(near[:2])
    with pytest.raises(ValueError, match="a pair of states"):
        breathing(near[:2], attn=[(0, 1)])
    with pytest.raises(ValueError, match="prompt of each of the 30 points, got 3"):
        contrasts(near[:2], ROW, torch.arange(3))
