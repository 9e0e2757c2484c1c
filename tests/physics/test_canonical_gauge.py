"""The canonical gauges: factors that do not depend on the gauge they are given in (math A.3, A.4, J 3)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from emformer.geometry.gauges import Gauge, apply, balanced, planes
from emformer.operators import LowRank

GROUPS, R, D = 2, 6, 12
SHARES = pytest.mark.parametrize("share", [1, 3])
WIDTHS = pytest.mark.parametrize("width", [0, 2, 4, R])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def factors(share: int) -> tuple[Tensor, Tensor]:
    return normal(GROUPS, share, R, D), normal(GROUPS, R, D)


def general() -> Gauge:
    """A random G for each group, cond(G) = 10."""
    left, right = (torch.linalg.qr(normal(GROUPS, R, R)).Q for _ in range(2))
    g = (left * torch.logspace(-0.5, 0.5, R, dtype=torch.float64)) @ right
    assert (torch.linalg.cond(g) < 10 + 1e-9).all()
    return Gauge(g, torch.linalg.inv(g))


def turning(width: int) -> Gauge:
    """A random G that RoPE allows: a I + b J in every plane, anything on the coordinates that do not turn."""
    g = torch.zeros(GROUPS, R, R, dtype=torch.float64)
    half = width // 2
    for group in range(GROUPS):
        for k in range(half):
            length, angle = 0.5 + torch.rand(()), 2 * math.pi * torch.rand(())
            a, b = length * angle.cos(), length * angle.sin()
            g[group, k, k] = g[group, k + half, k + half] = a
            g[group, k, k + half], g[group, k + half, k] = -b, b
    g[:, width:, width:] = general().forward[:, width:, width:]
    return Gauge(g, torch.linalg.inv(g))


def rotation(position: float, width: int) -> Tensor:
    """R_p: the angle p w_k in the plane of k and k + width/2, w_k = 10000^(-2k/width)."""
    out, half = torch.eye(R, dtype=torch.float64), width // 2
    for k in range(half):
        angle = position * 10000 ** (-2 * k / width)
        out[k, k] = out[k + half, k + half] = math.cos(angle)
        out[k, k + half], out[k + half, k] = -math.sin(angle), math.sin(angle)
    return out


def operators(left: Tensor, right: Tensor, turn: Tensor | None = None) -> Tensor:
    """W_h = L_h R^T, or L_h turn R^T: (G, s, d, d)."""
    return left.mT @ (right if turn is None else turn @ right).unsqueeze(1)


def gram(left: Tensor) -> Tensor:
    """sum_h L_h^T L_h: (G, r, r)."""
    return (left @ left.mT).sum(1)


def largest(columns: Tensor) -> Tensor:
    return columns.gather(-1, columns.abs().argmax(-1, keepdim=True)).squeeze(-1)


def stacked(left: Tensor) -> Tensor:
    """(G, r, s d): the columns of the stacked L as rows."""
    return left.transpose(1, 2).flatten(2)


def distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@SHARES
def test_a_gauge_leaves_the_operators(seed, share):
    left, right = factors(share)
    for gauge in (balanced(left, right), planes(left, right, 4), general()):
        assert (gauge.forward @ gauge.inverse - torch.eye(R)).abs().max() < 1e-10
        new = apply(left, right, gauge)
        assert (operators(*new) - operators(left, right)).abs().max() < 1e-10
        assert distance(new, (left, right)) > 0.1


def test_the_layout_is_that_of_the_package(seed):
    operator = LowRank(rank=4, groups=2).build("form", D, 6).double()
    matrix = operator.matrix().detach()
    left, right = operator.left_factor.detach().unflatten(0, (2, 3)), operator.right_factor.detach()
    left, right = apply(left, right, balanced(left, right))
    operator.left_factor.data, operator.right_factor.data = left.flatten(0, 1), right
    assert (operator.matrix() - matrix).abs().max() < 1e-10


@SHARES
def test_balanced_factors_carry_the_singular_values(seed, share):
    left, right = factors(share)
    together = torch.cat([*operators(left, right).unbind(1)], -2)  # the heads of a group on top of each other
    values = torch.linalg.svdvals(together)[:, :R]
    left, right = apply(left, right, balanced(left, right))
    assert (gram(left) - right @ right.mT).abs().max() < 1e-10
    assert (gram(left) - torch.diag_embed(values)).abs().max() < 1e-10
    assert (largest(stacked(left)) > 0).all()


def test_the_mean_energy_of_balanced_factors_is_the_nuclear_norm(seed):
    left, right = factors(1)
    nuclear = torch.linalg.svdvals(operators(left, right)).sum((-2, -1))
    before = (left.square().sum((1, 2, 3)) + right.square().sum((1, 2))) / 2
    left, right = apply(left, right, balanced(left, right))
    after = (left.square().sum((1, 2, 3)) + right.square().sum((1, 2))) / 2
    assert (after - nuclear).abs().max() < 1e-10
    assert (before > nuclear + 1e-3).all()


@SHARES
def test_balanced_is_canonical(seed, share):
    left, right = factors(share)
    once = apply(left, right, balanced(left, right))
    for _ in range(5):
        moved = apply(left, right, general())
        assert distance(moved, (left, right)) > 0.1
        assert distance(apply(*moved, balanced(*moved)), once) < 1e-8
    flipped = -left, -right
    assert distance(apply(*flipped, balanced(*flipped)), once) < 1e-8
    again = balanced(*once)
    assert (again.forward - torch.eye(R)).abs().max() < 1e-8
    assert distance(apply(*once, again), once) < 1e-8


@SHARES
@WIDTHS
def test_planes_are_canonical(seed, share, width):
    left, right = factors(share)
    once = apply(left, right, planes(left, right, width))
    for _ in range(5):
        moved = apply(left, right, turning(width))
        assert distance(moved, (left, right)) > 0.1
        assert distance(apply(*moved, planes(*moved, width)), once) < 1e-8
    again = planes(*once, width)
    assert (again.forward - torch.eye(R)).abs().max() < 1e-8
    if width:
        moved = apply(left, right, general())  # with RoPE this is another model
        assert distance(apply(*moved, planes(*moved, width)), once) > 1e-2


@SHARES
@WIDTHS
def test_planes_are_normal(seed, share, width):
    left, right = factors(share)
    left, right = apply(left, right, planes(left, right, width))
    inner, half = gram(left), width // 2
    for k in range(half):
        pair = torch.tensor([k, k + half])
        block = inner[:, pair[:, None], pair]
        assert block[:, 0, 1].abs().max() < 1e-10
        assert (block[:, 0, 0] > block[:, 1, 1]).all()
        assert (block.diagonal(dim1=1, dim2=2).sum(-1) - right[:, pair].square().sum((1, 2))).abs().max() < 1e-10
    assert (largest(stacked(left))[:, :half] > 0).all() and (largest(stacked(left))[:, width:] > 0).all()
    rest = inner[:, width:, width:] - right[:, width:] @ right[:, width:].mT
    assert (rest.abs() < 1e-10).all()


@SHARES
@pytest.mark.parametrize("width", [2, 4, R])
def test_rotations_see_the_balanced_gauge_and_not_that_of_the_planes(seed, share, width):
    left, right = factors(share)
    by_planes, by_values = planes(left, right, width), balanced(left, right)
    seen = 0.0
    for p in (-40, -3, 0, 1, 2, 17, 500):
        turn = rotation(p, width)
        assert (by_planes.forward @ turn - turn @ by_planes.forward).abs().max() < 1e-10
        before = operators(left, right, turn)  # the family M_p: scores are q^T M_p t
        assert (operators(*apply(left, right, by_planes), turn) - before).abs().max() < 1e-10
        seen = max(seen, float((operators(*apply(left, right, by_values), turn) - before).abs().max()))
    assert seen > 1e-2


def test_scores_under_rotation(seed):
    left, right = factors(3)
    q, t = normal(5, D), normal(5, D)

    def scores(left: Tensor, right: Tensor) -> Tensor:
        """(G, s, 5, 5) with (R_i L^T q_i) . (R_j R^T t_j), turned as the two sides of the product are."""
        turns = torch.stack([rotation(p, R) for p in range(5)])
        u = torch.einsum("iab,gsbd,id->gsia", turns, left, q)
        v = torch.einsum("jab,gbd,jd->gja", turns, right, t)
        return torch.einsum("gsia,gja->gsij", u, v)

    before = scores(left, right)
    assert (scores(*apply(left, right, planes(left, right, R))) - before).abs().max() < 1e-10
    assert (scores(*apply(left, right, balanced(left, right))) - before).abs().max() > 1e-2


def test_a_deficient_group_has_no_balanced_gauge(seed):
    left, right = factors(3)
    left[1, :, 2] = left[1, :, 0] - left[1, :, 4]
    with pytest.raises(ValueError, match="group 1 have rank 5 and factors of width 6"):
        balanced(left, right)
    with pytest.raises(ValueError, match="group 0 have rank 3 and factors of width 6"):
        balanced(normal(1, 2, R, 3), normal(1, R, 3))
    planes(left, right, R)  # needs planes that are not 0, and no more
    right[0, [1, 1 + R // 2]] = 0
    with pytest.raises(ValueError, match="plane 1 of the right factor of group 0"):
        planes(left, right, R)
    for width in (-2, 3, R + 2):
        with pytest.raises(ValueError, match=f"width is {width}"):
            planes(left, right, width)


def test_close_to_deficient_factors_keep_their_operators(seed):
    left, right = factors(1)
    squeeze = torch.logspace(0, -8, R, dtype=torch.float64)[:, None]
    new = apply(left * squeeze, right, balanced(left * squeeze, right))
    assert (operators(*new) - operators(left * squeeze, right)).abs().max() < 1e-10
    assert (gram(new[0]) - new[1] @ new[1].mT).abs().max() < 1e-10


def test_single_precision(seed):
    left, right = (x.float() for x in factors(3))
    for gauge in (balanced(left, right), planes(left, right, 4)):
        assert gauge.forward.dtype == gauge.inverse.dtype == torch.float64
        new = apply(left, right, gauge)
        assert new[0].dtype == new[1].dtype == torch.float32
        assert (operators(*new) - operators(left, right)).abs().max() < 1e-4
