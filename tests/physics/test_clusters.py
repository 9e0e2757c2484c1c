"""Clustering of clouds against closed forms, planted clusters and scikit-learn (math F, J 24)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.cluster import KMeans
from torch import Tensor

from emformer.geometry.clusters import (
    centred,
    choose_k,
    components,
    hdbscan,
    kmeans,
    label_overlap,
    mean_cosine,
    neighbour_overlap,
    neighbours,
    persistence,
    separation,
    silhouette,
    unit,
)


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def planted(k: int, size: int, d: int, spread: float, reach: float = 1.0) -> tuple[Tensor, Tensor]:
    """k clusters of equal size around orthogonal centres, in random order, and their labels."""
    labels = torch.arange(k).repeat(size)[torch.randperm(k * size)]
    return reach * torch.eye(d, dtype=torch.float64)[labels] + spread * normal(k * size, d) / math.sqrt(d), labels


def cosines(cloud: Tensor) -> Tensor:
    """cos(x_i, x_j) over i != j, one by one."""
    pairs = torch.nn.functional.cosine_similarity(cloud.unsqueeze(-2), cloud.unsqueeze(-3), dim=-1)
    return pairs[~torch.eye(len(cloud), dtype=torch.bool)]


def nearest(cloud: Tensor, k: int) -> list[set[int]]:
    """By sorting exact differences."""
    order = (cloud.unsqueeze(1) - cloud).norm(dim=-1).fill_diagonal_(torch.inf).argsort(-1)
    return [set(row[:k]) for row in order.tolist()]


def test_mean_cosine_identity(seed: int) -> None:
    """J 24: the formula is the average over pairs to 1e-12, raw and centred, and the error is the jackknife."""
    for n, d in ((2, 3), (3, 1), (40, 8), (100, 64)):
        x = normal(n, d) * normal(n, 1).exp() + normal(d)
        for cloud in (x, centred(x)):
            found = mean_cosine(cloud)
            assert abs(found.mean - cosines(cloud).mean()) < 1e-12
            assert found.order == pytest.approx(float(torch.nn.functional.normalize(cloud, dim=-1).mean(0).norm()), abs=1e-12)
            if 2 < n < 50:
                left = torch.stack([mean_cosine(cloud[torch.arange(n) != i]).mean for i in range(n)])
                jackknife = ((n - 1) * left.var(correction=0)).sqrt()
                assert found.error == pytest.approx(float(jackknife), rel=1e-9, abs=1e-13)
    assert found.n == 100 and found.n_dropped == 0


def test_mean_cosine_closed_forms() -> None:
    """One direction 1, a frame 0, a simplex -1/(N - 1), opposite bundles; one massive coordinate blinds the raw value alone."""
    torch.manual_seed(0)
    axis, frame = normal(7), torch.eye(9, dtype=torch.float64)
    assert mean_cosine(axis * torch.rand(20, 1).add(0.1)).mean == pytest.approx(1, abs=1e-12)
    assert mean_cosine(frame).mean == pytest.approx(0, abs=1e-15)
    assert mean_cosine(centred(frame)).mean == pytest.approx(-1 / 8, abs=1e-15)
    signs = torch.tensor([1.0] * 6 + [-1.0] * 3, dtype=torch.float64)
    assert mean_cosine(signs.unsqueeze(-1) * axis).mean == pytest.approx((3**2 - 9) / (9 * 8), abs=1e-12)
    x = normal(500, 128)
    x[:, 5] += 50
    assert mean_cosine(x).mean == pytest.approx(2500 / (2500 + 128), abs=0.005)
    assert mean_cosine(centred(x)).mean == pytest.approx(-1 / 499, abs=1e-4)
    found = mean_cosine(torch.cat([x[:10], torch.zeros(3, 128, dtype=torch.float64)]))
    assert found.mean == pytest.approx(float(mean_cosine(x[:10]).mean), rel=1e-12) and found.n == 10 and found.n_dropped == 3


def test_components() -> None:
    """J 24: monotone in the threshold. Planted bundles are counted, dropped rows are not; a chain is one piece."""
    torch.manual_seed(0)
    grid = (-0.5, 0.0, 0.3, 0.7, 0.9, 0.99, 0.999)
    x = normal(6, 50, 3) * torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64)
    x[0, 4] = 0
    found = components(x, grid)
    assert (found.count.diff(dim=-1) >= 0).all() and (found.count >= 1).all() and (found.count <= found.n.unsqueeze(-1)).all()
    assert found.n.tolist() == [49] + [50] * 5 and found.n_dropped.tolist() == [1] + [0] * 5
    for b in range(6):
        assert (components(x[b], grid).count == found.count[b]).all()
    for k in (1, 3, 8):
        cloud, _ = planted(k, 10, 16, 0.05)
        assert components(cloud).count.tolist()[:2] == [k, k]
    angle = 0.1 * torch.arange(32, dtype=torch.float64)  # cos .1 = .995
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    assert components(circle, (0.9, 0.99, 0.996)).count.tolist() == [1, 1, 32]
    assert components(torch.ones(5, 2), (0.999,)).count.tolist() == [1]
    for wrong in ((), (1.0,), (0.5, -1.1), (math.nan,)):
        with pytest.raises(ValueError, match="cosines"):
            components(x, wrong)


def test_planted_clusters_are_found(seed: int) -> None:
    """By k-means, by HDBSCAN and by the scan over k, exactly; the same again for the same seed, whatever the global generator."""
    for k, size, d in ((2, 30, 3), (5, 20, 32), (8, 24, 64)):
        cloud, labels = planted(k, size, d, 0.1)
        directions = unit(3 * cloud).cloud
        state, drawn = torch.get_rng_state(), np.random.get_state()[1].tolist()
        for found in (kmeans(directions, k, seed), hdbscan(directions), choose_k(directions, seed).best):
            assert found.k == k and found.noise == 0 and found.n == k * size and found.n_dropped == 0
            assert sorted(set(found.labels.tolist())) == list(range(k))
            agreement = persistence(found.labels, labels)
            assert agreement[:3] == pytest.approx((1, 1, 1), abs=1e-12) and agreement.n == k * size
        assert torch.equal(torch.get_rng_state(), state) and np.random.get_state()[1].tolist() == drawn
        torch.manual_seed(99)
        assert torch.equal(kmeans(directions, k, seed).labels, kmeans(directions, k, seed).labels)
    cloud = normal(60, 4)  # without clusters the starts matter
    fitted = KMeans(7, n_init=4, random_state=seed).fit(cloud.numpy())
    assert persistence(kmeans(cloud, 7, seed).labels, torch.from_numpy(fitted.labels_).long()).ari == 1
    # a scatter around the clusters belongs to none of them
    scatter = torch.cat([planted(3, 40, 8, 0.05)[0], 4 * normal(20, 8)])
    found = hdbscan(scatter)
    assert found.k == 3 and found.noise == pytest.approx(20 / 140, abs=0.03) and (found.labels[:120] >= 0).float().mean() > 0.95


def test_silhouette() -> None:
    """By hand on a line, scikit-learn to 1e-10, noise left out, the scan's values those of its partitions."""
    line = torch.tensor([[0.0], [1.0], [10.0], [11.0]], dtype=torch.float64)
    ends, middles = 1 - 1 / 10.5, 1 - 1 / 9.5
    found = silhouette(line, torch.tensor([4, 4, 7, 7]))
    assert found.mean == pytest.approx((ends + middles) / 2, rel=1e-12)
    assert found.error == pytest.approx(abs(ends - middles) / math.sqrt(3) / 2, rel=1e-12) and found.k == 2
    torch.manual_seed(0)
    for n, d, k in ((30, 2, 3), (200, 16, 5), (200, 16, 40)):
        cloud, labels = normal(n, d) + 100, torch.randint(-1, k, (n,))
        kept = labels >= 0
        found = silhouette(cloud, labels)
        truth = metrics.silhouette_score(cloud[kept] - 100, labels[kept])
        assert abs(found.mean - truth) < 1e-10 and found.n == int(kept.sum()) and found.n_dropped == n - found.n
    cloud, _ = planted(4, 20, 8, 0.6)
    scan = choose_k(cloud, seed=1)
    assert scan.tried == tuple(range(2, 17)) and len(scan.silhouettes) == 15 and scan.silhouette == max(scan.silhouettes)
    for k, value in zip(scan.tried[:4], scan.silhouettes, strict=False):
        assert value == pytest.approx(silhouette(cloud, kmeans(cloud, k, 1, starts=2).labels).mean, rel=1e-12)
    assert choose_k(cloud, most=3).tried == (2, 3) and choose_k(normal(12, 2)).tried == (2,)


def test_persistence() -> None:
    """1 for a relabelling, -1/2 for the crossed pairs, 0 on average for independent labels; no label, no vote."""
    torch.manual_seed(0)
    a = torch.randint(0, 5, (60,))
    assert persistence(a, torch.tensor([3, 9, 1, 0, 7])[a])[:3] == pytest.approx((1, 1, 1), abs=1e-12)
    assert persistence(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])).ari == pytest.approx(-0.5)
    # six tokens in (3, 3) against (2, 4), the odd one out on the border: 4 pairs agree of 6 and 7 of 15
    found = persistence(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 1, 1]))
    assert found.ari == pytest.approx((4 - 6 * 7 / 15) / ((6 + 7) / 2 - 6 * 7 / 15))
    draws = torch.tensor([persistence(torch.randint(0, 4, (80,)), torch.randint(0, 6, (80,)))[:2] for _ in range(100)])
    assert (draws.mean(0).abs() < 3.5 * draws.std(0) / 10).all()
    alone = persistence(a, a, ["ami"])
    assert alone.ami == pytest.approx(1) and math.isnan(alone.ari) and math.isnan(alone.v_measure)
    noisy = a.clone()
    noisy[:7] = -1
    assert persistence(a, noisy) == (1, pytest.approx(1), 1, 53, 7)
    assert all(math.isnan(value) for value in persistence(a, -torch.ones_like(a))[:3])


def test_neighbours_and_their_overlap(seed: int) -> None:
    """J 24: exact neighbours; chi of a cloud and itself is 1, after an isometry too; unrelated clouds share k/(N - 1) of them."""
    n, d, k = 100, 12, 8
    x = normal(n, d) + 50
    found = neighbours(x, k)
    assert [set(row) for row in found.indices.tolist()] == nearest(x, k) and found.ties == 0
    turned = 3 * x @ torch.linalg.qr(normal(d, d)).Q + normal(d)
    for image in (x, turned):
        overlap = neighbour_overlap(found.indices, neighbours(image, k).indices)
        assert overlap.share == 1 and overlap.error == 0 and overlap.null == k / (n - 1) and overlap.n == n
    pairs = normal(2, 20, n, d)
    chi = neighbour_overlap(neighbours(pairs[0], k).indices, neighbours(pairs[1], k).indices)
    assert abs(chi.share.mean() - k / (n - 1)) < 3 * chi.share.std() / math.sqrt(20)
    shared = [len(a & b) / k for a, b in zip(nearest(pairs[0, 3], k), nearest(pairs[1, 3], k), strict=True)]
    assert chi.share[3] == pytest.approx(np.mean(shared), rel=1e-12)
    assert chi.error[3] == pytest.approx(np.std(shared, ddof=1) / math.sqrt(n), rel=1e-9)


def test_ties_and_dropped_neighbours() -> None:
    """A grid ties, a general cloud does not; a row that is no token has no neighbours and is nobody's."""
    torch.manual_seed(0)
    grid = torch.cartesian_prod(*(torch.arange(6, dtype=torch.float64),) * 2)
    assert neighbours(grid, 1).ties == 1 and neighbours(normal(36, 2), 1).ties == 0
    repeated = normal(9, 5).repeat_interleave(4, 0)  # three equal others each
    assert neighbours(repeated, 2).ties == 1 and neighbours(repeated, 3).ties == 0
    x = normal(30, 4)
    broken = x.clone()
    broken[[3, 17]] = torch.tensor([[math.nan], [math.inf]], dtype=torch.float64)
    kept = torch.ones(30, dtype=torch.bool)
    kept[[3, 17]] = False
    found, truth = neighbours(torch.stack([broken, x]), 5).indices, neighbours(x[kept], 5).indices
    assert (found[0][~kept] == -1).all() and torch.equal(found[0][kept], kept.nonzero()[:, 0][truth])
    overlap = neighbour_overlap(found[0], found[1])
    assert overlap.n == 28 and overlap.n_dropped == 2 and overlap.null == 5 / 27
    assert (neighbours(x[:4], 5).indices == -1).all() and neighbours(x[:4], 5).ties.isnan()
    assert neighbour_overlap(neighbours(x[:6], 5).indices, neighbours(x[6:12], 5).indices).share == 1
    with pytest.raises(ValueError, match="k >= 1"):
        neighbours(x, 0)


def test_label_overlap() -> None:
    """1 for classes apart; its null, with tokens that carry no label among the neighbours, is the mean over relabellings."""
    torch.manual_seed(0)
    cloud, labels = planted(4, 15, 8, 0.1)
    found = neighbours(cloud, 6).indices
    assert label_overlap(found, labels).share == 1 and label_overlap(found, labels).n == 60
    sizes = torch.bincount(labels).double()
    assert label_overlap(found, labels).null == pytest.approx(float((sizes * (sizes - 1)).sum() / (60 * 59)), rel=1e-12)
    some = torch.cat([labels[:45], torch.full((15,), -1)])
    draws = [label_overlap(found, some[torch.randperm(60)]) for _ in range(300)]
    shares = torch.stack([draw.share for draw in draws])
    assert abs(shares.mean() - draws[0].null) < 3.5 * shares.std() / math.sqrt(300)
    assert draws[0].n == 45 and draws[0].n_dropped == 15
    both = label_overlap(torch.stack([found, found]), torch.stack([labels, some]))
    assert both.share[0] == 1 and both.null[1] == draws[0].null


def test_separation_null(seed: int) -> None:
    """J 24: labels that ignore the cloud give W/T = (N - K)/(N - 1) and Fisher 1, on average over 50 draws."""
    draws = [separation(normal(256, 32) + 5, torch.arange(256) % 6) for _ in range(50)]
    assert np.mean([draw.within for draw in draws]) == pytest.approx((256 - 6) / 255, abs=0.002)
    assert draws[0].null == (256 - 6) / 255
    assert np.mean([draw.fisher for draw in draws]) == pytest.approx(1, abs=0.08)


def test_separation_against_closed_forms_and_sklearn() -> None:
    """Two pairs on a line; Calinski-Harabasz is the same Fisher ratio; classes of one are dropped; the error is the spread."""
    line = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]], dtype=torch.float64)
    found = separation(line, torch.tensor([2, 2, 8, 8]))
    assert found.within == pytest.approx(1 / 5) and found.null == 2 / 3
    assert found.fisher == pytest.approx(16 / (4 / 2)) and found.davies_bouldin == pytest.approx((1 + 1) / 4)
    torch.manual_seed(0)
    for k, spread in ((2, 1.0), (7, 3.0), (30, 0.3)):
        cloud, labels = planted(k, 9, 40, spread)
        found = separation(cloud + 20, labels)
        assert found.fisher == pytest.approx(metrics.calinski_harabasz_score(cloud, labels), rel=1e-9)
        assert found.davies_bouldin == pytest.approx(metrics.davies_bouldin_score(cloud, labels), rel=1e-9)
        assert found.within == pytest.approx(1 / (1 + found.fisher * (k - 1) / (9 * k - k)), rel=1e-12)
        lonely = torch.cat([cloud, normal(3, 40)]), torch.cat([labels, torch.tensor([500, -1, 77])])
        assert separation(*lonely)[:5] == pytest.approx(separation(cloud, labels)[:5], rel=1e-9)
        assert separation(*lonely)[5:] == (k, 9 * k, 3, 2)
    draws = [separation(*planted(5, 40, 10, 1.5)) for _ in range(200)]
    spread = np.std([draw.within for draw in draws])
    assert np.mean([draw.error for draw in draws]) == pytest.approx(spread, rel=0.25)


def test_degenerate_clouds() -> None:
    """One token, zeros, duplicates, constant clouds, rows of nan: counts and finite numbers or nan, never an error."""
    torch.manual_seed(0)
    one, zero, constant = normal(1, 5), torch.zeros(30, 5), torch.full((30, 5), 0.1)
    twice, close = normal(3, 5).repeat(10, 1), 1 + 1e-9 * normal(30, 5)
    broken = normal(30, 5)
    broken[::2] = math.nan
    for cloud in (one, zero, constant, twice, close, broken, normal(4, 5)):
        n = len(cloud)
        for rows in (cloud, unit(cloud).cloud, centred(cloud)):
            kept = int(rows.isfinite().all(-1).sum())
            labels = torch.arange(n) % 3
            parts = [kmeans(rows, 4), hdbscan(rows), choose_k(rows).best]
            assert all(part.n == kept and part.n_dropped == n - kept and len(part.labels) == n for part in parts)
            assert all((part.labels[~rows.isfinite().all(-1)] == -1).all() for part in parts)
            assert parts[0].k <= min(4, kept) and (parts[0].labels >= 0).sum() == kept
            near = neighbours(rows, 3).indices
            numbers = [*mean_cosine(rows), *components(rows), *neighbour_overlap(near, near), *label_overlap(near, labels)]
            numbers += [torch.tensor(value) for value in (*silhouette(rows, labels), *separation(rows, labels))]
            assert not any(number.double().isinf().any() for number in numbers)
    assert (
        unit(zero).n == 0 and unit(zero).n_dropped == 30 and mean_cosine(zero).mean.isnan() and components(zero).count.sum() == 0
    )
    assert mean_cosine(one).mean.isnan() and mean_cosine(constant).mean == pytest.approx(1)
    for flat in (constant, constant.double(), 7.3e5 * torch.ones(513, 7), 1e-3 * torch.ones(2047, 3, dtype=torch.float64)):
        assert (centred(flat) == 0).all() and mean_cosine(centred(flat)).n == 0  # not the directions of rounding errors
    assert kmeans(twice, 8).k == 3 and hdbscan(twice).k == 3 and hdbscan(constant).noise == 1
    assert silhouette(twice, torch.arange(30) % 3).mean == 1 and silhouette(constant, torch.arange(30) % 3).mean == 0
    points = separation(twice, torch.arange(30) % 3)
    assert points.within == pytest.approx(0, abs=1e-25) and math.isnan(points.fisher) and points.davies_bouldin < 1e-12
    assert all(math.isnan(value) for value in separation(constant, torch.arange(30) % 3)[:5])
    assert math.isnan(separation(broken, torch.zeros(30, dtype=torch.long)).within)
    assert unit(torch.tensor([[1e-300, 0.0], [1e300, 1e300]], dtype=torch.float64)).n == 2
    for f in (lambda: kmeans(twice, 0), lambda: kmeans(twice, 2, starts=0)):
        with pytest.raises(ValueError, match="k-means needs"):
            f()
    with pytest.raises(ValueError, match="at least 5 tokens"):
        hdbscan(twice, 4)
