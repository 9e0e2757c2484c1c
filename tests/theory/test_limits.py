"""Polytopes, planes, Boolean rows and leaders of clouds and weights whose limits are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from torch import Tensor

from emformer.theory.limits import boolean, depth, distinct, leaders, levels, rank, support, toward, vertices

SQUARE = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1], [0, 0], [0.5, -1], [0.9, 0.2]], dtype=torch.float64)
CORNERS = torch.tensor([True, True, True, True, False, False, False])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_corners_of_a_square():
    """The centre is none, nor is a token on an edge."""
    assert torch.equal(vertices(SQUARE), CORNERS)
    assert torch.equal(vertices(torch.stack([SQUARE, 5 * SQUARE + 3])), CORNERS.expand(2, -1))


def test_tokens_that_have_met_count_once():
    crowd = SQUARE.repeat_interleave(3, 0) + 1e-5 * draw(21, 2)
    assert vertices(crowd, 1e-3).sum() == 4 and vertices(crowd, 1e-9).sum() > 4


@pytest.mark.parametrize(
    ("cloud", "count"), [(torch.ones(5, 3), 1), (torch.arange(6.0).repeat(3, 1).mT, 2), (torch.zeros(1, 2), 1)]
)
def test_a_point_and_a_segment(cloud, count):
    assert vertices(cloud).sum() == count
    assert (depth(cloud) == 0).all()


def test_a_square_that_lies_in_space():
    turn = torch.linalg.qr(draw(3, 3)).Q
    flat = torch.nn.functional.pad(SQUARE, (0, 1)) @ turn + 2
    assert torch.equal(vertices(flat), CORNERS)
    assert (depth(flat) == 0).all()


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_vertices_are_those_of_qhull(seed, dim):
    cloud = draw(30, dim, seed=seed)
    hull = ConvexHull(cloud.numpy())
    assert vertices(cloud, 1e-9).nonzero()[:, 0].tolist() == sorted(hull.vertices)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan])
def test_no_tolerance_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        vertices(SQUARE, tolerance)


def test_depth_in_a_square_and_on_a_line():
    assert depth(SQUARE).tolist() == pytest.approx([0, 0, 0, 0, 1, 0, 0.1], abs=1e-12)
    line = torch.tensor([[0.0], [4.0], [1.0], [2.5]])
    assert depth(line).tolist() == pytest.approx([0, 0, 1, 1.5])


def test_support_of_a_square():
    u = torch.tensor([[1.0, 0.0], [2**-0.5, 2**-0.5]], dtype=torch.float64)
    assert support(SQUARE, u).tolist() == pytest.approx([1, 2**0.5])


def test_levels_of_values_on_levels():
    """Three planes leave something about one and two, and nothing about three."""
    values = torch.tensor([[2.0, -1.0, 5.0, 2.0, -1.0, 2.0]], dtype=torch.float64)
    centres, within = levels(values)
    assert centres[2].tolist() == [pytest.approx([-1, 2, 5])]
    assert within[0].tolist() == pytest.approx([float(values.var(correction=0)), (4 * 0.75**2 + 3 * 0.75**2 * 3) / 6, 0], abs=0.3)
    assert within[0, 2] == pytest.approx(0, abs=1e-15) and within[0, 1] > 0.1
    assert levels(torch.full((4,), 7.0)).within.tolist() == [0, 0, 0]


def test_no_partition_is_better(seed):
    """Against all assignments of seven values to at most three levels."""
    values = draw(7, seed=seed)
    y = values.numpy()
    best = [math.inf] * 3
    for labels in itertools.product(range(3), repeat=7):
        left = sum(((y[np.array(labels) == k] - y[np.array(labels) == k].mean()) ** 2).sum() for k in set(labels)) / 7
        best[len(set(labels)) - 1] = min(best[len(set(labels)) - 1], left)
    centres, within = levels(values)
    assert within.tolist() == pytest.approx(best, abs=1e-12)
    nearest = (values[:, None] - centres[2]).abs().amin(-1)
    assert float(nearest.square().mean()) == pytest.approx(best[2], abs=1e-12)


@pytest.mark.parametrize("most", [0, 8])
def test_levels_that_cannot_be(most):
    with pytest.raises(ValueError, match="levels"):
        levels(torch.arange(7.0), most)


def test_rows_and_leaders():
    """Three kinds of rows: two Boolean, and one between them, which makes neither a third leader nor a third dimension."""
    a = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1], [0.7, 0, 0, 0.3], [1, 0, 0, 0]])
    assert boolean(a).tolist() == pytest.approx([0, 0, 0.3, 0])
    assert distinct(a) == 3 and rank(a) == 2
    assert leaders(a).tolist() == [True, False, False, True]
    assert leaders(a[2:3], 0.8).tolist() == [False] * 4
    both = torch.stack([a, torch.eye(4)])
    assert distinct(both).tolist() == [3, 4] and rank(both).tolist() == [2, 4]


def test_rows_are_joined_by_chains():
    steps = torch.linspace(0, 0.5, 6)
    a = torch.stack([steps, 1 - steps], -1)[torch.tensor([3, 0, 5, 1, 4, 2])]
    assert distinct(a, 0.11) == 1 and distinct(a, 0.09) == 6
    assert distinct(torch.full((4, 4), 0.25)) == 1


def test_directions_toward_a_target():
    angles = torch.tensor([0.0, 1e-6, 1.0, math.pi], dtype=torch.float64)
    cloud = 3 * torch.stack([angles.cos(), angles.sin()], -1)
    found = toward(cloud, torch.tensor([2.0, 0.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0, 5e-13, 1 - math.cos(1), 2], rel=1e-9)
    assert toward(torch.zeros(1, 2), torch.ones(2)).isnan().all()
