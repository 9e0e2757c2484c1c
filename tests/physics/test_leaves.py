"""Leaves: gaps and tilts in closed form, nulls by Monte Carlo, and rows that no later token can touch."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from emformer.geometry.leaves import (
    anisotropy,
    anisotropy_sd,
    common_correlation,
    common_share,
    gradient_rank,
    head_overlap,
    leaf_coordinate,
    leaf_spread,
    rope_gradients,
    rope_tilt,
    row_variance,
    tilt,
    top_gap,
    within_row_variance,
    without_direction,
)
from emformer.positions import RoPE

B, H, N, D = 2, 3, 7, 8
CAUSAL = torch.ones(N, N).tril().bool()
FULL = torch.ones(N, N).bool()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def orthonormal(*shape: int) -> Tensor:
    return torch.linalg.qr(normal(*shape)).Q


def close(got: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> bool:
    assert got.dtype == torch.float64
    return bool(((got - expected).abs() < tolerance).all())


def attention(scores: Tensor, visible: Tensor, beta: float) -> Tensor:
    return (beta * scores).masked_fill(~visible, -torch.inf).softmax(-1)


# gradients


def test_leaf_coordinates_are_distances_to_the_plane(seed):
    y, m = normal(B, N, D), normal(H, D, D)
    r = torch.einsum("bnd,hde->bhne", y, m)
    s = torch.einsum("bnd,hde,bme->bhnm", y, m, y)
    coordinate = leaf_coordinate(r, y)
    assert close(coordinate * r.norm(dim=-1, keepdim=True), s)
    # moving a token along the gradient by t moves its leaf by t, moving it across does not move it
    rhat = r / r.norm(dim=-1, keepdim=True)
    along = y + 0.3 * rhat[:, 1, 2].unsqueeze(1)
    across = along - (along @ rhat[:, 1, 2].unsqueeze(-1)) * rhat[:, 1, 2].unsqueeze(1)
    assert close(leaf_coordinate(r, along)[:, 1, 2] - coordinate[:, 1, 2], 0.3)
    assert close(leaf_coordinate(r, across)[:, 1, 2], 0)
    assert (coordinate.abs() <= y.norm(dim=-1)[:, None, None] + 1e-12).all()
    # scores of two tokens differ by no more than |r| times their distance
    span = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs()
    assert (span <= r.norm(dim=-1)[..., None, None] * torch.cdist(y, y)[:, None, None] + 1e-9).all()


def test_anisotropy_is_the_mean_over_pairs(seed):
    r = normal(B, H, N, D) + 1
    unit = r / r.norm(dim=-1, keepdim=True)
    pairs = unit @ unit.mT
    expected = (pairs.sum((-2, -1)) - N) / (N * (N - 1))
    assert close(anisotropy(r), expected)
    assert close(anisotropy(r[..., :1, :].expand(-1, -1, N, -1)), 1)  # one direction
    assert close(anisotropy(torch.eye(D, dtype=torch.float64)), 0)
    assert close(anisotropy(torch.stack([r[0, 0, 0], -3 * r[0, 0, 0]])), -1)
    # the regular simplex reaches the lower end
    simplex = torch.eye(D, dtype=torch.float64) - 1 / D
    assert close(anisotropy(simplex), -1 / (D - 1))


def test_anisotropy_of_independent_directions():
    torch.manual_seed(0)
    for count, dim in ((2, 3), (20, 8), (64, 32)):
        draws = anisotropy(normal(4000, count, dim))
        sd = anisotropy_sd(count, dim)
        assert abs(draws.mean()) < 4 * sd / math.sqrt(4000)
        assert abs(draws.std() / sd - 1) < 0.06, (count, dim)
    # of rank r in d dimensions r counts
    draws = anisotropy(normal(4000, 20, 4) @ orthonormal(16, 4).T)
    assert abs(draws.std() / anisotropy_sd(20, 4) - 1) < 0.06
    assert math.isnan(anisotropy_sd(1, 8)) and math.isnan(anisotropy_sd(5, 0))


def test_common_share(seed):
    r = normal(B, H, N, D)
    assert close(common_share(r[..., :1, :].expand(-1, -1, N, -1)), 1)
    assert close(common_share(r - r.mean(-2, keepdim=True)), 0)
    assert close(common_share(1e-11 * r), common_share(r)) and common_share(1e-13 * r).isnan().all()
    # equal parts along the mean and across it
    assert close(common_share(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)), 0.5)
    assert abs(common_share(normal(4000, N, D)).mean() - 1 / N) < 0.005


def test_common_gradient_finds_the_sink_that_it_makes(seed):
    y, r = normal(B, N, D), normal(B, H, N, D)
    common = r.mean(-2) @ y.mT
    assert close(common_correlation(r, y, 3 * common + 1), 1) and close(common_correlation(r, y, -common), -1)
    mass = normal(B, H, N)
    expected = torch.stack(
        [torch.corrcoef(torch.stack(p))[0, 1] for p in zip(common.flatten(0, 1), mass.flatten(0, 1), strict=True)]
    )
    assert close(common_correlation(r, y, mass), expected.view(B, H))
    uniform = torch.full((B, H, N), 0.1, dtype=torch.float64) * 3
    assert common_correlation(r, y, uniform).isnan().all()
    assert common_correlation(r, y[:, :1].expand(-1, N, -1), mass).isnan().all()


def test_rank_of_the_gradients_is_that_of_the_form(seed):
    y, m = normal(B, 40, D), orthonormal(D, 3) @ orthonormal(D, 3).T
    white = torch.linalg.qr(normal(40, D)).Q
    assert close(gradient_rank(white @ m), 3)
    assert (gradient_rank(y @ m) <= 3).all() and (gradient_rank(y @ m) > 2).all()
    assert (gradient_rank(y @ m + normal(D)) <= 4).all()  # a functional adds one


def test_head_overlap(seed):
    rows = normal(H, 3, D)
    shared = rows.clone()
    shared[1] = normal(3, 3) @ rows[0]  # another basis of the same space
    found = head_overlap(shared)
    assert close(found, found.T) and close(found.diagonal(), 1) and close(found[0, 1], 1)
    axes = torch.eye(D, dtype=torch.float64)
    shares = torch.tensor([[3, 0, 1], [0, 3, 2], [1, 2, 3]]).double() / 3
    assert close(head_overlap(torch.stack([axes[:3], axes[3:6], axes[2:5]])), shares)
    spaces = head_overlap(normal(60, 2, D))
    assert abs(spaces[~torch.eye(60).bool()].mean() - 2 / D) < 0.02
    assert head_overlap(torch.stack([rows[0], 0 * rows[0]]))[0, 1].isnan()


# scores


@pytest.mark.parametrize("visible", [CAUSAL, FULL], ids=["causal", "full"])
def test_top_gap_is_the_log_ratio_of_the_top_weights(seed, visible):
    scores = 3 * normal(B, H, N, N)
    for beta in (0.5, 1.0, 2.0):
        a = attention(scores, visible, beta).sort(-1, descending=True).values
        gap, multiplicity = top_gap(scores, visible, beta)
        rows = visible.sum(-1) >= 2
        assert close(gap[..., rows], (a[..., 0] / a[..., 1]).log()[..., rows], 1e-10)
        assert gap[..., ~rows].isnan().all() and (multiplicity == 1).all()
        n = visible.sum(-1)[rows]
        assert (a[..., rows, 0] >= 1 / (1 + (n - 1) * (-gap[..., rows]).exp()) - 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_tokens_are_one_leaf(seed, dtype):
    y, m = normal(B, 5, D), normal(D, D) / D
    y = y[:, [0, 1, 1, 2, 3, 3, 3, 4]].to(dtype)
    scores = y @ m.to(dtype) @ y.mT
    visible = torch.ones(8, 8).bool()
    gap, multiplicity = top_gap(scores, visible)
    copies = torch.tensor([1, 2, 2, 1, 3, 3, 3, 1])
    top = scores.argmax(-1)
    assert (multiplicity == copies[top]).all()
    distinct = scores[..., [0, 1, 3, 4, 7]].sort(-1, descending=True).values.double()
    assert close(gap, distinct[..., 0] - distinct[..., 1], 1e-5 if dtype == torch.float32 else 1e-12)
    # m equal weights on top
    a = attention(scores.double(), visible, 1.0).amax(-1)
    assert (a >= 1 / (multiplicity + (8 - multiplicity) * (-gap).exp()) - 1e-6).all()


def test_leaves_are_told_apart_at_a_millionth_of_the_spread(seed):
    row = torch.tensor([0.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    visible = torch.ones(1, 5).bool()
    for step, apart in ((1e-5, True), (1e-7, False)):
        gap, multiplicity = top_gap(torch.cat([row, row[-1:] - step]).view(1, 5), visible)
        assert close(gap, step if apart else 1.0) and multiplicity == (1 if apart else 2)
    # rounding alone makes no leaves
    rounded = 0.3 + torch.tensor([0.0, 1, -1, 2, 0], dtype=torch.float64).view(1, 5) * 5e-17
    assert top_gap(rounded, visible).gap.isnan() and top_gap(rounded, visible).multiplicity == 5


def test_row_variance_matches_each_row(seed):
    scores = normal(B, H, N, N)
    variance = row_variance(scores, CAUSAL)
    assert variance[..., 0].isnan().all()
    for i in range(1, N):
        assert close(variance[..., i], scores[..., i, : i + 1].var(-1))
    assert close(leaf_spread(scores, FULL), scores.std(-1))
    assert close(within_row_variance(scores, FULL), scores.var(-1).mean(-1))
    assert close(within_row_variance(scores, CAUSAL), variance[..., 1:].mean(-1))


def test_within_row_variance_of_correlated_tokens():
    torch.manual_seed(0)
    for r in (0.0, 0.3, 0.8):
        y = math.sqrt(r) * normal(400, 1, 64) + math.sqrt(1 - r) * normal(400, N, 64)
        q = normal(400, N, 64) / 8  # scores of variance 1
        for visible in (CAUSAL, FULL):
            got = within_row_variance(q @ y.mT, visible)
            assert abs(got.mean() - (1 - r)) < 4 * got.std() / 20


@pytest.mark.parametrize("visible", [CAUSAL, CAUSAL & CAUSAL.T.roll(2, 1)], ids=["causal", "hole"])
def test_rows_do_not_see_what_is_hidden(seed, visible):
    scores = normal(B, H, N, N)
    visible = visible | torch.eye(N).bool()
    before = [top_gap(scores, visible).gap, row_variance(scores, visible), leaf_spread(scores, visible)]
    for junk in (7.0, -1e9, torch.inf, torch.nan):
        after = scores.masked_fill(~visible, junk)
        for a, b in zip(
            before, [top_gap(after, visible).gap, row_variance(after, visible), leaf_spread(after, visible)], strict=True
        ):
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    # a token changes no earlier row, bit for bit
    changed = scores.clone()
    changed[..., 4, :], changed[..., :, 4] = 2.0, 3.0
    for f in (lambda s: top_gap(s, CAUSAL).gap, lambda s: leaf_spread(s, CAUSAL)):
        a, b = f(scores)[..., :4].nan_to_num(-1), f(changed)[..., :4].nan_to_num(-1)
        assert torch.equal(a, b) and not torch.equal(f(scores)[..., 4:], f(changed)[..., 4:])


# tilt


class Rotary(NamedTuple):
    u: Tensor
    rows: Tensor
    frequencies: Tensor


def rotary(rank: int = 6, dim: int = D, planes: int = 3, orthonormal_rows: bool = True) -> Rotary:
    rows = torch.stack([orthonormal(dim, rank).T for _ in range(H)]) if orthonormal_rows else normal(H, rank, dim)
    return Rotary(normal(B, H, N, rank), rows, 10.0 ** -(torch.arange(planes, dtype=torch.float64) * 2 / rank))


def test_tilt_in_closed_form(seed):
    u, rows, w = rotary()
    offsets = [-9, -2, -1, 0, 1, 2, 9, 40]
    size = u[..., :3].square() + u[..., 3:].square()  # |u_k|^2 of plane k: coordinates k and k + 3
    cosine = torch.stack([(size * (delta * w).cos()).sum(-1) / size.sum(-1) for delta in offsets], -1)
    for found in (rope_tilt(u, rows, w, offsets), rope_tilt(u, None, w, offsets)):
        assert close(found.cosine, cosine.mean(-2))
        assert close(found.angle, cosine.clamp(-1, 1).acos().mean(-2), 1e-7)
        assert close(found.norm_ratio, 1) and not found.undefined.any()
        assert close(found.angle[..., 3], 0) and close(found.angle[..., :3].flip(-1), found.angle[..., 4:7])
        assert (found.angle <= torch.tensor(offsets).abs() * w.max() + 1e-12).all()
    # token by token
    turned, still = rope_gradients(u, rows, 2 * w), rope_gradients(u, rows, 0 * w)
    assert close((turned * still).sum(-1) / turned.norm(dim=-1) / still.norm(dim=-1), cosine[..., 5])
    # near 0, where the arc cosine would be off by 1e-8
    assert close(
        tilt(lambda delta: rope_gradients(u[..., :2], None, 1e-9 * delta * w[:1]), [1, 3]).angle,
        1e-9 * torch.tensor([1, 3]),
        1e-15,
    )


def test_tilt_of_a_general_form(seed):
    offsets = [-3, 0, 5, 11]
    for rank, dim, planes in ((6, D, 3), (6, D, 2), (10, D, 5), (6, 6, 3)):
        u, rows, w = rotary(rank, dim, planes, orthonormal_rows=False)
        direct = tilt(lambda delta, u=u, rows=rows, w=w: rope_gradients(u, rows, delta * w), offsets)
        for a, b in zip(direct, rope_tilt(u, rows, w, offsets), strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and close(a.double().nan_to_num(), b.double().nan_to_num())
        r = {delta: rope_gradients(u, rows, delta * w) for delta in [0, *offsets]}
        stacked = tilt(r.__getitem__, offsets)
        assert torch.equal(stacked.cosine, direct.cosine) and torch.equal(stacked.norm_ratio, direct.norm_ratio)
        ratio = torch.stack([(r[k].norm(dim=-1) / r[0].norm(dim=-1)).mean(-1) for k in offsets], -1)
        assert close(direct.norm_ratio, ratio) and (rank > dim or planes < 3 or (ratio[..., 0] - 1).abs().max() > 1e-3)


def test_rope_gradients_are_those_of_the_scores(seed):
    for fraction in (1.0, 0.5):
        q, rows, y = normal(B, H, N, 8), normal(H, 8, D), normal(B, N, D)
        turn = RoPE(base=50.0, fraction=fraction, offset=3).build(8)
        keys = torch.einsum("bnd,hrd->bhnr", y, rows)
        index = torch.arange(N)
        u, v = turn(q, keys, index, index)
        w = 50.0 ** -(torch.arange(0, turn.width, 2, dtype=torch.float64) / turn.width)
        for delta in (-6, -1, 0, 4):
            r = rope_gradients(q, rows, delta * w)
            i = index[(index + delta >= 0) & (index + delta < N)]
            expected = (u[:, :, i] * v[:, :, i + delta]).sum(-1)
            assert close(torch.einsum("bhnd,bnd->bhn", r[:, :, i], y[:, i + delta]), expected, 1e-10)


def test_coherence_length(seed):
    # one plane: cos tau = cos(Delta w) for every token, below 1/2 from Delta w > pi/3 on
    u, w = normal(B, H, N, 2), torch.tensor([0.1], dtype=torch.float64)
    assert math.ceil(math.pi / 3 / 0.1) == 11
    assert close(rope_tilt(u, None, w, range(-40, 1)).coherence, 11)
    assert close(rope_tilt(u, None, w, [0, 3, 64, 16, 13]).coherence, 13)
    assert rope_tilt(u, None, w, range(11)).coherence.isnan().all()  # longer than any that was asked for
    assert tilt(lambda delta: u, [0, 1, 50]).coherence.isnan().all() and close(tilt(lambda delta: u, [0, 7]).angle, 0)
    assert close(rope_tilt(u, None, 20 * w, [0, 1]).coherence, 1)


def test_nothing_changes_in_a_rotated_frame(seed):
    o = orthonormal(D, D)
    y, m, u = normal(B, N, D), normal(H, D, D), normal(H, D)
    found = []
    for cloud, form, functional in ((y, m, u), (y @ o.T, o @ m @ o.T, u @ o.T)):
        r = torch.einsum("bnd,hde->bhne", cloud, form) + functional.unsqueeze(1)
        s = r @ cloud.unsqueeze(1).mT
        mass = attention(s, CAUSAL, 1.0).sum(-2)
        found.append(
            [
                leaf_coordinate(r, cloud),
                anisotropy(r),
                common_share(r),
                common_correlation(r, cloud, mass),
                gradient_rank(r),
                top_gap(s, CAUSAL).gap[..., 1:],
                leaf_spread(s, CAUSAL)[..., 1:],
                head_overlap(form),
            ]
        )
    for a, b in zip(*found, strict=True):
        assert close(a, b, 1e-9)


def test_degenerate_clouds():
    torch.manual_seed(0)
    one, zero, constant = normal(B, H, 1, D), torch.zeros(B, H, N, D), normal(D).expand(B, H, N, D)
    mixed = normal(B, H, N, D)
    mixed[:, :, 2:4] = torch.tensor([0.0, 1e-13]).view(2, 1)
    assert (
        (without_direction(zero) == N).all() and (without_direction(mixed) == 2).all() and not without_direction(constant).any()
    )
    broken = mixed.clone()
    broken[0, 0, 0, 0], broken[0, 0, 1, 0] = torch.nan, torch.inf
    assert without_direction(broken)[0, 0] == 4
    read = normal(B, N, D)
    coordinate = leaf_coordinate(mixed, read)
    assert coordinate[:, :, 2:4].isnan().all() and coordinate.isnan().sum() == 2 * B * H * N
    kept = mixed[:, :, [0, 1, 4, 5, 6]]
    assert close(anisotropy(mixed), anisotropy(kept))
    assert anisotropy(broken)[0, 0].isnan() and anisotropy(broken).isnan().sum() == 1
    assert anisotropy(one).isnan().all() and anisotropy(zero).isnan().all() and close(anisotropy(constant), 1)
    assert common_share(zero).isnan().all() and close(common_share(constant), 1) and close(common_share(one), 1)
    assert gradient_rank(zero).isnan().all() and close(gradient_rank(constant), 1)
    assert gradient_rank(broken)[0, 0].isnan() and gradient_rank(broken).isnan().sum() == 1
    single = torch.ones(1, 1).bool()
    assert top_gap(one[..., :1], single).gap.isnan().all() and (top_gap(one[..., :1], single).multiplicity == 1).all()
    assert row_variance(one[..., :1], single).isnan().all() and within_row_variance(one[..., :1], single).isnan().all()
    flat = torch.full((N, N), 0.1)
    assert top_gap(flat, FULL).gap.isnan().all() and (top_gap(flat, FULL).multiplicity == N).all()
    assert close(row_variance(flat, FULL), 0)
    blind = CAUSAL.clone()
    blind[3] = False
    gap = top_gap(normal(N, N), blind)
    assert gap.gap[3].isnan() and gap.multiplicity[3] == 0 and row_variance(normal(N, N), blind)[3].isnan()
    lost = normal(N, N)
    lost[1, 0], lost[2, 0], lost[3, 0] = torch.nan, torch.inf, -torch.inf
    gap = top_gap(lost, FULL)
    assert gap.gap[1:4].isnan().all() and gap.multiplicity[1:4].isnan().all() and not gap.gap[4:].isnan().any()
    turned = tilt(lambda delta: mixed, [0, 1])
    assert (turned.undefined == 2).all() and close(turned.angle, 0) and close(turned.norm_ratio, 1)
    assert tilt(lambda delta: zero, [0, 1]).angle.isnan().all() and tilt(lambda delta: zero, [0, 1]).norm_ratio.isnan().all()
    # a form that does not see the first coordinate until it is turned: no direction at 0, and none to compare with
    born = rope_tilt(
        torch.tensor([1.0, 0.0]).expand(B, H, N, 2), torch.tensor([[0.0, 0.0], [0.0, 1.0]]).expand(H, 2, 2), torch.ones(1), [1, 2]
    )
    assert (
        (born.undefined == N).all()
        and born.cosine.isnan().all()
        and born.norm_ratio.isnan().all()
        and born.coherence.isnan().all()
    )
    with pytest.raises(ValueError, match="planes"):
        rope_gradients(mixed, None, torch.ones(5))
