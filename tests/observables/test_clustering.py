"""Family "clustering": planted clusters are found, clouds without any are not told to have them."""

from __future__ import annotations

import math

import builders
import pytest
import torch

from emformer.observables import Row
from emformer.observables.clustering import Clustering, Density, Scan
from emformer.parts import UserError
from emformer.trajectory import Trajectory

FAMILY = [Clustering(points=64, k=3, neighbours=5), Density(points=64), Scan(points=64, most=5)]


def told(observable, *trajectories: Trajectory) -> dict[tuple, Row]:
    return {(row.key, row.layer, row.point, row.param): row for row in builders.told(observable, trajectories)}


def planted(seed: int, clusters: int = 4, prompts: int = 16, tokens: int = 21, dim: int = 24) -> Trajectory:
    """Tokens of random classes: noise at first, then a cloud that falls ever more into its classes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.randint(clusters, (prompts, tokens), generator=generator)
    centres, noise = 3 * torch.linalg.qr(draw(dim, dim))[0][:clusters] * math.sqrt(dim), draw(prompts, tokens, dim)
    clouds = [noise + strength * centres[labels] for strength in (0.0, 0.1, 1.0)]
    return Trajectory.from_clouds(clouds, labels=labels, tokens=torch.arange(prompts * tokens).view(prompts, tokens) % 50)


def test_planted_clusters_are_found_where_they_form(seed):
    trajectory = planted(seed)
    found = (
        told(Clustering(points=300, k=4), trajectory) | told(Density(points=300), trajectory) | told(Scan(points=300), trajectory)
    )
    none, weak, strong = (0, "embed"), (0, "block"), (1, "block")
    assert found["clu.silhouette", *strong, None].mean > 0.6 > 0.2 > found["clu.silhouette", *none, None].mean
    assert found["clu.density_count", *strong, None].mean == 4 and found["clu.density_noise", *strong, None].mean < 0.05
    assert found["clu.density_noise", *none, None].mean > 0.5
    assert found["clu.best_k", *strong, None].mean == 4
    ratio = [found["clu.wt_ratio", *at, "label=class"] for at in (none, weak, strong)]
    assert ratio[0].mean == pytest.approx(ratio[0].null, abs=4 * ratio[0].se + 0.01), "labels that mean nothing separate nothing"
    assert ratio[0].mean > ratio[1].mean > ratio[2].mean < 0.3
    assert found["clu.chi_label", *strong, "label=class"].mean > 0.95
    assert found["clu.chi_label", *none, "label=class"].mean == pytest.approx(
        found["clu.chi_label", *none, "label=class"].null, abs=0.05
    )
    assert found["clu.ami_final", *strong, None].mean == pytest.approx(1)
    assert abs(found["clu.ami_final", *none, None].mean) < 0.1 and ratio[0].n_valid <= 300
    assert found["clu.components", *strong, "c=0.9"].mean < found["clu.components", *none, "c=0.9"].mean == 21


def test_a_collapsed_cloud_is_one_piece_that_points_one_way():
    cloud = torch.randn(3, 12, 8, dtype=torch.float64)
    towards = torch.randn(8, dtype=torch.float64)
    found = told(Clustering(points=20, k=2, neighbours=3), Trajectory.from_clouds([cloud, 1e-4 * cloud + towards]))
    assert found["clu.mean_cos", 0, "block", None].mean == pytest.approx(1, abs=1e-6)
    assert found["clu.mean_cos_centred", 0, "block", None].null == -1 / 11
    assert [found["clu.components", 0, "block", f"c={c}"].mean for c in (0.9, 0.99, 0.999)] == [1, 1, 1]
    assert abs(found["clu.mean_cos", 0, "embed", None].mean) < 0.3


def test_a_still_cloud_keeps_its_clusters_and_neighbours():
    cloud = torch.randn(4, 16, 8, dtype=torch.float64)
    found = told(Clustering(points=50, k=4, neighbours=5), Trajectory.from_clouds([cloud, 3 * cloud, 3 * cloud]))
    assert found["clu.ari_next", 1, "block", None].mean == 1 and found["clu.chi_k", 1, "block", "k=5"].mean == 1
    assert found["clu.chi_k", 1, "block", "k=5"].null == pytest.approx(5 / 49)
    assert ("clu.ari_next", 0, "embed", None) not in found, "nothing comes before the first state"


def test_the_pooled_cloud_never_holds_a_first_token_and_is_the_same_at_every_state():
    clouds = torch.randn(3, 10, 6, 4, dtype=torch.float64)
    clouds[:, :, 0] = 1e3
    observation = Clustering(points=30).begin()
    for part in clouds.split(4, dim=1):
        observation.update(Trajectory.from_clouds(list(part)))
    pool = observation._pool._reservoir
    rows = clouds[0, :, 1:].reshape(-1, 4)
    places = [(rows == row).all(-1).nonzero().item() for row in pool["x0"]]
    assert len(set(places)) == 30
    assert all(torch.equal(pool[f"x{k}"], clouds[k, :, 1:].reshape(-1, 4)[places]) for k in range(3))


@pytest.mark.parametrize("observable", FAMILY, ids=lambda one: type(one).__name__)
def test_degenerate_clouds_are_finite_or_undefined(observable):
    zero, one, same = torch.zeros(2, 4, 6), torch.ones(2, 1, 6), torch.ones(2, 4, 6)
    nan = same.clone()
    nan[0, 2] = math.nan
    for clouds in ([zero, same], [same, 2 * same], [one, 3 * one], [nan, same]):
        labels = torch.zeros(clouds[0].shape[:2], dtype=torch.long)
        for row in told(observable, Trajectory.from_clouds(clouds, labels=labels)).values():
            assert row.mean is None or math.isfinite(row.mean), row
    zeros = told(Clustering(), Trajectory.from_clouds([zero, same]))["clu.mean_cos", 0, "embed", None]
    assert (zeros.mean, zeros.n_valid, zeros.n_dropped) == (None, 0, 2)
    assert observable.begin().rows() == []


def test_settings_that_cannot_be_measured_are_refused():
    for bad in (lambda: Clustering(k=0), lambda: Density(smallest=4), lambda: Scan(most=1), lambda: Clustering(seed=-1)):
        with pytest.raises(UserError, match="cannot be measured"):
            bad()
