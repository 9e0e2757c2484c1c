"""Rotary positions make the form a family M_Delta (math A.4, J 4). The rotations are written out here as matrices."""

from __future__ import annotations

import math

import pytest
import torch
from builders import attention, cloud, fill, span, stir
from torch import Tensor

from emformer.operators import Dense, LowRank
from emformer.positions import RoPE

D, H, R, N = 16, 2, 8, 12


def frequencies(width: int, base: float = 10000.0) -> list[float]:
    return [base ** (-2 * k / width) for k in range(width // 2)]


def rotation(delta: float, width: int, base: float = 10000.0, total: int | None = None) -> Tensor:
    """R_delta on the first `width` of `total` coordinates, plane k spanned by k and k + width/2."""
    out = torch.eye(total or width, dtype=torch.float64)
    for k, w in enumerate(frequencies(width, base)):
        cos, sin = math.cos(delta * w), math.sin(delta * w)
        rows = torch.tensor([k, k + width // 2])
        out[rows[:, None], rows] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return out


def scores(layer, y: Tensor, start: int = 0) -> Tensor:
    with torch.no_grad():
        u, v = layer.factors(y, span(y.shape[1], start))
        return u @ v.mT


FORMS = [
    pytest.param(LowRank(rank=R), id="low-rank"),
    pytest.param(LowRank(rank=R, groups=1), id="multi-query"),
    pytest.param(Dense(), id="dense"),
]


def rotary(form, dtype=torch.float64, **settings):
    return attention(form, LowRank(rank=4), dim=D, heads=H, positions=[RoPE(**settings)], dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
def test_scores_come_from_the_family(seed, form):
    """s_ij = y_i^T M_{j-i} y_j with M_Delta = U R_Delta V^T / sqrt(r), or M R_Delta for a dense form."""
    layer, y = rotary(form), cloud(N, D)
    m = layer.form
    got = scores(layer, y)
    for h in range(H):
        for i in range(N):
            for j in range(N):
                if m.identity_right:
                    family = m.matrix()[h] @ rotation(j - i, D)
                else:
                    right = m.right_factor[h * m.groups // H].mT
                    family = m.left_factor[h].mT @ rotation(j - i, R) @ right.mT
                expected = torch.einsum("bd,de,be->b", y[:, i], family, y[:, j])
                assert (got[:, h, i, j] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_a_shift_by_seven_changes_no_score(seed, form):
    layer, y = rotary(form), cloud(N, D)
    assert (scores(layer, y, 7) - scores(layer, y)).abs().max() < 1e-10
    moved = attention(form, LowRank(rank=4), dim=D, heads=H, positions=[RoPE(offset=7)])
    moved.load_state_dict(layer.state_dict())
    assert (scores(moved, y) - scores(layer, y, 7)).abs().max() < 1e-12  # `offset` is this shift


@pytest.mark.parametrize("form", FORMS)
def test_a_shift_by_seven_in_single_precision(seed, form):
    layer, y = rotary(form, torch.float32), cloud(64, D, dtype=torch.float32)
    with torch.no_grad():
        layer.form.left_factor.mul_(3)
    for start in (0, 1000, 3000):
        here, there = scores(layer, y, start), scores(layer, y, start + 7)
        assert 1 < here.std() <= 5
        assert (here - there).abs().max() < 1e-4
    assert (scores(layer, y, 3007) - scores(layer, y)).abs().max() < 1e-4


def test_tables_are_formed_in_double_precision():
    layer = RoPE().build(64)
    index = span(64, 100_000)
    cos, sin = layer.tables(index, torch.zeros(1, dtype=torch.float32))
    angle = index.double()[:, None] * torch.tensor(frequencies(64), dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float32
    assert max((cos - angle.cos()).abs().max(), (sin - angle.sin()).abs().max()) < 1e-6


def test_a_fraction_leaves_the_other_coordinates_alone(seed):
    part = RoPE(base=100.0, fraction=0.5, offset=3)
    turned = part.build(R)
    u, v = torch.randn(1, H, N, R, dtype=torch.float64), torch.randn(1, H, N, R, dtype=torch.float64)
    got, _ = turned(u, v, span(N), span(N))
    for p in range(N):
        expected = u[:, :, p] @ rotation(p + 3, R // 2, 100.0, R).mT
        assert (got[:, :, p] - expected).abs().max() < 1e-12


def gauge(g: Tensor, layer) -> None:
    with torch.no_grad():
        layer.form.left_factor.copy_(g.mT @ layer.form.left_factor)
        layer.form.right_factor.copy_(torch.linalg.inv(g) @ layer.form.right_factor)


def test_the_complex_diagonal_gauge_remains(seed):
    """G = blockdiag(a_k I + b_k J) commutes with every R_p."""
    layer, y = rotary(LowRank(rank=R)), cloud(N, D)
    before = scores(layer, y)
    half = R // 2
    size = 0.5 + torch.rand(half, dtype=torch.float64)
    phase = 2 * math.pi * torch.rand(half, dtype=torch.float64)
    a, b = (size * phase.cos()).diag(), (size * phase.sin()).diag()
    gauge(torch.cat([torch.cat([a, -b], 1), torch.cat([b, a], 1)]), layer)
    assert (scores(layer, y) - before).abs().max() < 1e-10


def test_a_generic_gauge_does_not(seed):
    layer, y = rotary(LowRank(rank=R)), cloud(N, D)
    before, matrix = scores(layer, y), layer.form.matrix()
    gauge(torch.randn(R, R, dtype=torch.float64), layer)
    assert (layer.form.matrix() - matrix).abs().max() < 1e-8  # the same M
    assert (scores(layer, y) - before).abs().max() > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_the_tilt_of_a_leaf(seed, form):
    """V^T V = I: cos tau(Delta) = sum_k |u_k|^2 cos(Delta w_k) / sum_k |u_k|^2, and |r(Delta)| is constant."""
    layer = stir(rotary(form))
    m, turn = layer.form, layer.positions[0]
    if not m.identity_right:
        basis = torch.linalg.qr(torch.randn(m.groups, D, R, dtype=torch.float64)).Q
        fill(m.right_factor, basis.mT)
    y, width = cloud(N, D), m.rank
    with torch.no_grad():
        u = m.left(y)
        flat = m.pull(u)  # r_i(0) = V u
        plane = u[..., : width // 2].square() + u[..., width // 2 :].square()
        for delta in (0, 1, 2, 5, 17, 100):
            for sign in (1, -1):
                index = torch.full((N,), -sign * delta)  # r_i(Delta) = V R_{-Delta} u
                turned, _ = turn(u, m.right(y), index, index)
                tilted = m.pull(turned)
                length = tilted.norm(dim=-1), flat.norm(dim=-1)
                cosine = (tilted * flat).sum(-1) / (length[0] * length[1])
                angle = delta * torch.tensor(frequencies(width), dtype=torch.float64)
                expected = (plane * angle.cos()).sum(-1) / plane.sum(-1)
                assert (cosine - expected).abs().max() < 1e-12
                assert (length[0] / length[1] - 1).abs().max() < 1e-12
        assert (expected - 1).abs().max() > 0.1
