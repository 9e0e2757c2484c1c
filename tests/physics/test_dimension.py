"""Dimensions of clouds against exact laws, closed forms and scikit-dimension (math F, G.1, G.2, J 23, J 24)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import skdim
import torch
from scipy.optimize import brentq
from torch import Tensor

from emformer.geometry.dimension import (
    SCALES,
    Estimate,
    erank_eigen,
    erank_sv,
    gride,
    levina_bickel,
    participation_ratio,
    rank_residual,
    twonn,
    twonn_censored,
    twonn_fit,
    twonn_mle,
)
from emformer.geometry.neighbours import NEAR_DUPLICATES, Neighbours, _screen, log_ratios, near_duplicates, nearest

BY_DISTANCE: tuple[Callable[[Neighbours], Estimate], ...] = (twonn, twonn_mle, twonn_fit, twonn_censored, levina_bickel)
BY_SPECTRUM = (participation_ratio, erank_eigen, erank_sv, rank_residual)


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)


def direct(cloud: Tensor) -> tuple[Tensor, Tensor]:
    """All distances from differences of coordinates, ascending, and whose they are."""
    r = torch.cdist(cloud, cloud, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    values, order = r.sort(dim=1, stable=True)
    return values[:, :-1], order[:, :-1]


def with_ratios(ratios: Tensor) -> Neighbours:
    """Points whose l = log(r_2/r_1) are given."""
    rows = torch.arange(len(ratios))
    return Neighbours(torch.stack([torch.ones_like(ratios), ratios.exp()], 1), rows[:, None].expand(-1, 2), rows, len(rows))


def test_neighbours_are_those_of_all_distances() -> None:
    normal = draw(0)
    massive, line = normal(700, 32), normal(500, 1) * normal(1, 16)
    massive[3] *= 1e6
    groups = normal(8, 24).repeat_interleave(60, 0)
    clouds = {
        "gaussian": (normal(600, 128), 64),
        "few points": (normal(12, 5), 4),
        "all others": (normal(30, 3), 29),
        "one coordinate": (normal(300, 1), 6),
        "massive token": (massive, 9),
        "line": (line, 5),
        "clusters below float32": (groups + 1e-5 * normal(480, 24), 5),
        "clusters below products": (groups + 1e-9 * normal(480, 24), 5),
        "far away": (normal(400, 24) + 1e3, 8),
    }
    for name, (cloud, k) in clouds.items():
        found, (r, order) = nearest(cloud, k), direct(cloud)
        torch.testing.assert_close(found.distances, r[:, :k], rtol=1e-12, atol=0, msg=name)
        assert torch.equal(found.indices, order[:, :k]), name
        for scale in (2.0**600, 2.0**-600):  # whose squares are infinite, and 0
            assert torch.equal(nearest(scale * cloud, k).distances, scale * found.distances), name
    # float32 and the same numbers in float64 are the same cloud
    single = (normal(400, 48) + 1e3).float()
    for one, two in zip(nearest(single, 3)[:3], nearest(single.double(), 3)[:3], strict=True):
        assert torch.equal(one, two)


def test_ties_go_by_row() -> None:
    grid = torch.cartesian_prod(*[torch.arange(6.0)] * 3)
    simplex = torch.eye(40)
    for cloud, k in ((grid, 7), (simplex, 5)):
        found, (r, order) = nearest(cloud, k), direct(cloud.double())
        torch.testing.assert_close(found.distances, r[:, :k], rtol=1e-14, atol=0)
        assert torch.equal(found.indices, order[:, :k])


def test_nothing_is_proven_by_coarse_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may be set to round float32 products to bfloat16; then every row is searched again."""
    cloud = draw(1)(500, 64)
    r, order = direct(cloud)
    exact, rows = torch.addmm, torch.arange(500)

    def coarse(c: Tensor, a: Tensor, b: Tensor, *, alpha: float, out: Tensor) -> Tensor:
        if a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return exact(c, a, b, alpha=alpha, out=out)

    assert bool((_screen(cloud.float(), rows, 18)[1] > r[:, 9].square()).all())
    monkeypatch.setattr(torch, "addmm", coarse)
    assert bool((_screen(cloud.float(), rows, 18)[1] == -torch.inf).all())
    assert torch.equal(nearest(cloud, 10).indices, order[:, :10])


def test_neighbours_of_a_moved_cloud(seed: int) -> None:
    normal = draw(seed)
    cloud, order = normal(300, 20), torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    before = nearest(cloud, 12)
    turned = nearest(3 * cloud @ torch.linalg.qr(normal(20, 20)).Q + normal(20), 12)
    torch.testing.assert_close(turned.distances, 3 * before.distances, rtol=1e-11, atol=0)
    assert torch.equal(turned.indices, before.indices)
    shuffled = nearest(cloud[order], 12)
    assert torch.equal(order[shuffled.indices], before.indices[order])
    for k in (1, 3, 6):
        torch.testing.assert_close(log_ratios(turned, k), log_ratios(before, k), rtol=0, atol=1e-10)


def test_bitwise_the_same_again_and_no_global_randomness() -> None:
    cloud = draw(2)(1500, 40)
    state = torch.get_rng_state()
    first, threads = nearest(cloud, 20), torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        second = nearest(cloud, 20)
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(first[:3], second[:3], strict=True):
        assert torch.equal(one, two)
    assert [f(first) for f in BY_DISTANCE] == [f(second) for f in BY_DISTANCE]
    assert torch.equal(torch.get_rng_state(), state)


def test_duplicates_are_kept_once_and_counted() -> None:
    normal = draw(3)
    base = normal(500, 6)
    order = torch.randperm(540, generator=torch.Generator().manual_seed(0))
    cloud = torch.cat([base, base[:40]])[order]
    found = nearest(cloud, 40)
    seen: dict[bytes, int] = {}
    firsts = [seen.setdefault(row.numpy().tobytes(), at) == at for at, row in enumerate(cloud)]
    assert found.kept.tolist() == [at for at, first in enumerate(firsts) if first]
    assert found.points == 540 and len(found.kept) == 500
    assert bool(found.distances.gt(0).all()) and set(found.indices.flatten().tolist()) <= set(found.kept.tolist())
    assert torch.equal(log_ratios(found).isnan(), ~torch.tensor(firsts))
    alone = nearest(base, 40)
    for estimate in (*BY_DISTANCE, lambda near: gride(near, (4,))[0]):
        one, two = estimate(found), estimate(alone)
        assert one.n == two.n == 500 and (one.dropped, two.dropped) == (40, 0)
        assert math.isfinite(one.value) and one.value == pytest.approx(two.value, rel=1e-12)
    # -0 is 0; of 100 points 10 may go, 11 may not
    assert len(nearest(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [2.0, 0.0]]), 1).kept) == 2
    for repeated, known in ((10, True), (11, False)):
        cloud = torch.cat([base[: 100 - repeated], base[:repeated]])
        near = nearest(cloud, 40)
        for one in (*(f(near) for f in BY_DISTANCE), *gride(near, (1, 2))):
            assert math.isfinite(one.value) == known and one.dropped == repeated


def test_near_duplicate_pairs_are_reported() -> None:
    """J 23: the share is 1 for jittered pairs, .021 in one dimension, at most .001 above; groups of three escape."""
    normal = draw(4)
    for size, share in ((2, 1.0), (3, 0.0), (5, 0.0)):
        cloud = normal(1000 // size, 20).repeat_interleave(size, 0)
        cloud = cloud + 1e-3 * normal(*cloud.shape)
        assert near_duplicates(nearest(cloud, 2)) == share
    for d in (1, 2, 3, 20):
        shares = [near_duplicates(nearest(normal(2000, d), 2)) for _ in range(5)]
        assert max(shares) < NEAR_DUPLICATES
        assert np.mean(shares) == pytest.approx(0.021, abs=0.006) if d == 1 else max(shares) <= 0.001
    # by hand: r_1 = .009 and .011 of the median r_2
    r = torch.tensor([[0.009, 1.0], [0.011, 1.0], [0.5, 1.0], [0.5, 2.0]], dtype=torch.float64)
    assert near_duplicates(Neighbours(r, torch.zeros(4, 2, dtype=torch.int64), torch.arange(4), 4)) == 0.25


def test_pareto_ratios_give_the_golden_table() -> None:
    """G.1 and J 23: d = 7, N = 500, 2000 draws; the standard errors and the exact intervals hold."""
    generator = torch.Generator().manual_seed(0)
    golden = {
        twonn_mle: (7.006, 0.315, 0.02),
        twonn: (7.0, 0.314, 0.02),
        twonn_fit: (7.019, 0.345, 0.02),
        twonn_censored: (6.994, 0.334, 0.02),
    }
    draws = [with_ratios(torch.empty(500, dtype=torch.float64).exponential_(7, generator=generator)) for _ in range(2000)]
    for estimate, (mean, sd, tolerance) in golden.items():
        found = [estimate(one) for one in draws]
        values = np.array([one.value for one in found])
        assert values.mean() == pytest.approx(mean, abs=0.03), estimate
        assert values.std(ddof=1) == pytest.approx(sd, abs=tolerance), estimate
        assert np.mean([one.se for one in found]) == pytest.approx(values.std(ddof=1), rel=0.05), estimate
        covered = np.mean([one.low < 7 < one.high for one in found])
        assert covered == pytest.approx(0.95, abs=0.015), estimate
        assert {(one.n, one.dropped) for one in found} == {(500, 0)}
    # the bias at N = 20: 20/19, none, and that of the fit
    small = [with_ratios(torch.empty(20, dtype=torch.float64).exponential_(7, generator=generator)) for _ in range(1000)]
    for estimate, mean in ((twonn_mle, 7 * 20 / 19), (twonn, 7), (twonn_fit, 7.69)):
        assert np.mean([estimate(one).value for one in small]) == pytest.approx(mean, abs=0.15), estimate


def test_formulas_on_four_ratios() -> None:
    ratios = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
    near = with_ratios(ratios)
    assert twonn_mle(near).value == pytest.approx(4 / 1.0)
    assert twonn(near).value == pytest.approx(3 / 1.0)
    assert twonn(near).se == pytest.approx(3 / math.sqrt(2))
    assert twonn_censored(near).value == pytest.approx(2 / (0.6 + 0.3))
    x, y = np.array([0.1, 0.2, 0.3]), -np.log(1 - np.array([1, 2, 3]) / 4)
    assert twonn_fit(near).value == pytest.approx((x @ y) / (x @ x))
    # the k-th smallest of n unit exponentials is a sum of gaps with standard deviations 1/n, 1/(n - 1) ...
    gaps = [sum(y[m:]) / (4 - m) for m in range(3)]
    assert twonn_fit(near).se == pytest.approx(twonn_fit(near).value * np.linalg.norm(gaps) / (y @ y))


def test_twonn_and_levina_bickel_equal_scikit_dimension() -> None:
    normal = draw(5)
    for n, d in ((1000, 3), (501, 8), (207, 40), (512, 128)):
        cloud = normal(n, d)
        near, points = nearest(cloud, 20), cloud.numpy()
        for ours, theirs in (
            (twonn_fit(near), skdim.id.TwoNN()),
            (twonn_censored(near), skdim.id.TwoNN(method="mle")),
            (twonn(near), skdim.id.TwoNN(method="mle", discard_fraction=0)),
        ):
            with np.errstate(divide="ignore"):  # of the empirical distribution at its end, which is not used
                assert ours.value == pytest.approx(theirs.fit(points).dimension_, rel=1e-9)
        peer = skdim.id.MLE()
        for k in (10, 20):
            assert levina_bickel(near, (k,)).value == pytest.approx(peer.fit_predict(points, n_neighbors=k), rel=1e-9)
        each = [levina_bickel(near, (k,)).value for k in range(10, 21)]
        assert levina_bickel(near).value == pytest.approx(np.mean(each), rel=1e-12)


def test_levina_bickel_error_is_that_of_its_terms() -> None:
    near = nearest(draw(6)(800, 4), 12)
    logs = near.distances.log()
    terms = (logs[:, 11:] - logs[:, :11]).mean(1)
    found = levina_bickel(near, (12,))
    assert found.value == pytest.approx(1 / float(terms.mean()))
    assert found.se == pytest.approx(found.value**2 * float(terms.std(correction=0)) / math.sqrt(800))


def test_gride_solves_its_score() -> None:
    near = nearest(draw(7)(600, 5), 64)
    found = gride(near)
    assert found[0].value == pytest.approx(twonn_mle(near).value, rel=1e-13)
    for k, one in zip(SCALES, found, strict=True):
        ratios = log_ratios(near, k).numpy()

        def score(d: float, k: int = k, x: np.ndarray = ratios) -> float:
            return len(x) / d + (k - 1) * np.sum(x / -np.expm1(-d * x)) - (2 * k - 1) * x.sum()

        root = brentq(score, 0.1, 100, xtol=1e-13, rtol=1e-14)
        assert one.value == pytest.approx(root, rel=1e-11)
        information = -(score(root * (1 + 1e-5)) - score(root * (1 - 1e-5))) / (2e-5 * root)
        assert one.se == pytest.approx(1 / math.sqrt(information), rel=1e-6)
        assert (one.low, one.high) == pytest.approx((one.value - 1.96 * one.se, one.value + 1.96 * one.se))


def test_gride_of_its_own_law() -> None:
    """(r_k / r_2k)^d is Beta(k, k): without shared distances the estimate is consistent and its error right."""
    rng = np.random.default_rng(0)
    for k, d in ((1, 3.0), (4, 7.0), (16, 40.0)):
        found = []
        for _ in range(200):
            ratio = torch.from_numpy(-np.log(rng.beta(k, k, 400)) / d)
            r = torch.ones(400, 2 * k, dtype=torch.float64)
            r[:, -1] = ratio.exp()
            rows = torch.arange(400)
            found += gride(Neighbours(r, rows[:, None].expand(-1, 2 * k), rows, 400), (k,))
        values = np.array([one.value for one in found])
        assert values.mean() == pytest.approx(d, rel=0.01)
        assert np.mean([one.se for one in found]) == pytest.approx(values.std(ddof=1), rel=0.15)


def test_gride_on_a_gaussian(seed: int) -> None:
    """J 23: N(0, I_5), N = 2000, k = 4 reads 5 +- .25; a cube, which has more boundary, 4.5."""
    assert gride(nearest(draw(seed)(2000, 5), 8), (4,))[0].value == pytest.approx(5, abs=0.25)
    cube = torch.rand(2000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert gride(nearest(cube, 8), (4,))[0].value == pytest.approx(4.5, abs=0.15)


def test_scale_curve_of_a_noisy_plane(seed: int) -> None:
    """G.2: a plane with noise .02 in 50 dimensions; k = 1 measures the noise."""
    normal = draw(seed)
    cloud = 0.02 * normal(2000, 50)
    cloud[:, :2] += normal(2000, 2)
    curve = [one.value for one in gride(nearest(cloud, 64))]
    for found, golden in zip(curve, (13.3, 9.6, 6.8, 4.9, 3.6, 2.9), strict=True):
        assert found == pytest.approx(golden, rel=0.08)


def test_groups_look_like_a_collapse_at_their_own_size() -> None:
    """G.2: groups of m points at 1e-3 read .16 at k = 1 for m = 2, and .12 at k = 4 for m = 5."""
    normal = draw(8)
    for size, k, value in ((2, 1, 0.16), (5, 4, 0.12)):
        cloud = normal(1000 // size, 20).repeat_interleave(size, 0)
        cloud = cloud + 1e-3 * normal(*cloud.shape)
        assert gride(nearest(cloud, 8), (k,))[0].value == pytest.approx(value, abs=0.02)


def test_offset_in_float32_costs_nothing_but_its_rounding() -> None:
    cloud = draw(9)(1500, 64)
    exact = twonn(nearest(cloud, 2)).value
    assert twonn(nearest((cloud + 1000).float(), 2)).value == pytest.approx(exact, rel=1e-4)
    assert twonn(nearest(cloud.float(), 2)).value == pytest.approx(exact, rel=1e-6)


def test_spectrum_of_known_clouds(seed: int) -> None:
    normal = draw(seed)
    for n, d, scales in ((400, 6, (3.0, 2.0, 1.0)), (10, 30, (5.0, 1.0))):
        values = torch.tensor(scales, dtype=torch.float64)
        # orthonormal columns orthogonal to 1: a centred cloud with these singular values
        left = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), normal(n, len(scales))], 1)).Q[:, 1:]
        right = torch.linalg.qr(normal(d, len(scales))).Q
        cloud = left * values @ right.mT + normal(d)
        square, p, q = values.square(), values / values.sum(), values.square() / values.square().sum()
        truth = (
            square.sum() ** 2 / square.square().sum(),
            torch.special.entr(q).sum().exp(),
            torch.special.entr(p).sum().exp(),
        )
        for measure, value in zip(BY_SPECTRUM, truth, strict=False):
            torch.testing.assert_close(measure(cloud), value, rtol=1e-9, atol=0)
        mean = cloud.mean(0).square().sum()
        residual = (1 - n * mean / cloud.square().sum()).sqrt()
        torch.testing.assert_close(rank_residual(cloud), residual, rtol=1e-10, atol=0)
    batch = normal(2, 3, 20, 7)
    for measure in BY_SPECTRUM:
        one_by_one = torch.stack([measure(cloud) for cloud in batch.flatten(0, 1)]).view(2, 3)
        torch.testing.assert_close(measure(batch), one_by_one, rtol=1e-12, atol=0)
    low, middle, high = (measure(normal(100, 20)) for measure in BY_SPECTRUM[:3])
    assert low < middle < high < 20


def test_participation_ratio_of_noise(seed: int) -> None:
    """J 24: N d/(N + d) +- 3 % at N = 256, d = 128; one massive token brings it to 1 (F)."""
    cloud = draw(seed)(256, 128)
    assert float(participation_ratio(cloud)) == pytest.approx(256 * 128 / (256 + 128), rel=0.03)
    cloud[0] *= 1000
    assert float(participation_ratio(cloud)) == pytest.approx(1, abs=0.01)
    assert float(rank_residual(cloud[1:])) == pytest.approx(math.sqrt(1 - 1 / 255), abs=0.002)


def test_hostile_clouds_give_numbers_or_nan() -> None:
    """And nan where nothing is defined, with every point accounted for."""
    normal = draw(10)
    broken = normal(40, 5)
    broken[7, 2] = torch.nan
    zeros = normal(200, 5)
    zeros[:30] = 0
    clouds = {
        "constant": (torch.full((50, 7), 0.1), False),
        "zero": (torch.zeros(50, 7), False),
        "one token": (normal(1, 7), False),
        "two tokens": (normal(2, 7), False),
        "no token": (normal(0, 7), False),
        "no coordinate": (normal(20, 0), False),
        "not a number": (broken, False),
        "infinite": (torch.tensor([[torch.inf, 0.0], [1.0, 2.0], [3.0, 4.0]]), False),
        "many zero vectors": (zeros, False),
        "few zero vectors": (zeros[26:], True),
        "regular simplex": (torch.eye(30), False),
        "fewer points than neighbours": (normal(25, 3), True),
        "near-duplicates": (normal(100, 4).repeat_interleave(2, 0) + 1e-12 * normal(200, 4), True),
        "bfloat16": (normal(200, 3).bfloat16(), True),
    }
    for name, (cloud, known) in clouds.items():
        near = nearest(cloud, 64)
        assert near.distances.shape == near.indices.shape == (len(near.kept), 64), name
        assert torch.equal(near.distances.isnan(), near.indices < 0), name
        assert math.isfinite(twonn(near).value) == known, name
        for one in (*(f(near) for f in BY_DISTANCE), *gride(near)):
            assert one.n + one.dropped == len(cloud), name
            assert not any(math.isinf(number) for number in one), name
            assert math.isnan(one.se) or one.se >= 0, name
        share = near_duplicates(near)
        assert math.isnan(share) or 0 <= share <= 1, name
        for measure in BY_SPECTRUM:
            assert not measure(cloud).isinf(), name
    for name in ("constant", "zero", "one token", "no token", "not a number", "infinite"):
        assert all(measure(clouds[name][0]).isnan() for measure in BY_SPECTRUM[:3]), name
    assert float(rank_residual(torch.full((50, 7), 0.1))) == 0
    assert all(math.isnan(rank_residual(clouds[name][0])) for name in ("zero", "no token", "not a number"))
    assert [math.isfinite(one.value) for one in gride(nearest(normal(25, 3), 64))] == [True, True, True, True, False, False]


def test_mistakes_of_the_caller() -> None:
    cloud = draw(11)(30, 3)
    near = nearest(cloud, 3)
    with pytest.raises(ValueError, match="at least 1"):
        nearest(cloud, 0)
    with pytest.raises(ValueError, match="needs 4 neighbours of each point, 3 were searched"):
        gride(near, (1, 2))
    with pytest.raises(ValueError, match="needs 20 neighbours"):
        levina_bickel(near)
    with pytest.raises(ValueError, match="at least 2"):
        levina_bickel(near, (1, 2))
