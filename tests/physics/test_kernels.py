"""Kernels against their formulas written out, and which biases each of them notices (math A.2, A.8, B, E.6, J 22)."""

from __future__ import annotations

import math

import pytest
import torch
from builders import attention, cloud, examples, fill, span
from torch import Tensor

from emformer import parts
from emformer.kernels import L2, Hardmax, Linear, Sigmoid, Sinkhorn, SinkSoftmax, Softmax, TopK, Unnormalised
from emformer.kernels.base import Kernel
from emformer.masks import Causal, Full, Visible, Window, visible
from emformer.operators import Dense, LowRank, ScaledOrthogonal
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Drift, Functional

H, N, R, D = 2, 9, 4, 8
EVERY = pytest.mark.parametrize("setting", examples(parts.Kernel))
CAUSAL, FULL = visible(Causal(), span(N), N), Visible(None)


def factors(size: float = 1.0) -> tuple[Tensor, Tensor]:
    return size * torch.randn(1, H, N, R, dtype=torch.float64), torch.randn(1, H, N, R, dtype=torch.float64)


def weights(setting: parts.Kernel, u: Tensor, v: Tensor, seen: Visible = CAUSAL, score: Tensor | None = None) -> Tensor:
    kernel = setting.build(H, D).double()
    assert isinstance(kernel, Kernel)
    if score is not None:
        fill(kernel.score, score)
    with torch.no_grad():
        return kernel.weights(u, v, seen)


def rows(u: Tensor, v: Tensor):
    """Head, query, and the scores of the tokens that a causal query sees."""
    for h in range(H):
        for i in range(N):
            yield h, i, v[0, h, : i + 1] @ u[0, h, i]


@torch.no_grad()
def test_a_sink_by_hand(seed):
    u, v = factors()
    b = torch.randn(H, dtype=torch.float64)
    learned, zero = weights(SinkSoftmax(beta=1.5), u, v, score=b), weights(SinkSoftmax(beta=1.5, learned=False), u, v)
    for h, i, s in rows(u, v):
        power = (1.5 * s).exp()
        assert (learned[0, h, i, : i + 1] - power / (power.sum() + (1.5 * b[h]).exp())).abs().max() < 1e-14
        assert (zero[0, h, i, : i + 1] - power / (power.sum() + 1)).abs().max() < 1e-14
    far = weights(SinkSoftmax(), u, v, score=torch.full((H,), -100.0, dtype=torch.float64))
    assert (far - weights(Softmax(), u, v)).abs().max() < 1e-14


def test_the_value_of_a_sink_is_one_more_token(seed):
    """The mixture is that of a softmax over the tokens and a vector of E that every query sees, and so is the update."""
    layer = attention(LowRank(rank=R), LowRank(rank=3), kernel=SinkSoftmax(), drift=Drift())
    y = cloud(N)
    with torch.no_grad():
        z = layer(y, span(N))
        for h in range(3):
            u, v = layer.form.left(y)[:, h], layer.form.right(y)[:, h]
            s = (u @ v.mT).masked_fill(~Causal().visible(span(N)[:, None], span(N)), -torch.inf)
            s = torch.cat([layer.kernel.score[h].expand(2, N, 1), s], -1)
            tokens = torch.cat([layer.kernel.value[h].expand(2, 1, 12), y], 1)
            right = layer.content.right_rows()[h]
            a = s.softmax(-1)
            expected = a @ (tokens @ right.mT) + a[..., 1:].sum(-1, keepdim=True) * layer.value_bias[h]
            assert (z[:, h] - expected).abs().max() < 1e-12


@torch.no_grad()
def test_l2_by_hand(seed):
    """exp(-|Qx - Ky|^2) with Q = L^T/sqrt(2), K = R^T/sqrt(2)."""
    u, v = factors()
    a = weights(L2(), u, v)
    for h, i, _ in rows(u, v):
        power = (-(u[0, h, i] / 2**0.5 - v[0, h, : i + 1] / 2**0.5).square().sum(-1)).exp()
        assert (a[0, h, i, : i + 1] - power / power.sum()).abs().max() < 1e-13


@torch.no_grad()
def test_l2_is_softmax_where_keys_are_of_one_length(seed):
    """On a sphere, with K scaled orthogonal (math A.8): here R = I and RMS-normalised tokens."""
    y = cloud(N)
    y = y / y.norm(dim=-1, keepdim=True)
    form = ScaledOrthogonal(score_std=3.0)
    one, two = (attention(form, Dense(), kernel=kernel) for kernel in (L2(), Softmax()))
    two.load_state_dict(one.state_dict())
    assert (one.weights(y, span(N)) - two.weights(y, span(N))).abs().max() < 1e-13
    y = y * (1 + torch.rand(2, N, 1, dtype=torch.float64))
    assert (one.weights(y, span(N)) - two.weights(y, span(N))).abs().max() > 1e-3


@torch.no_grad()
def test_unnormalised_sigmoid_and_linear_by_hand(seed):
    u, v = factors(3.0)
    usa, cut = weights(Unnormalised(beta=0.7, clip=None), u, v), weights(Unnormalised(beta=0.7, clip=1.5), u, v)
    sigmoid, linear = weights(Sigmoid(beta=0.7), u, v), weights(Linear(beta=0.7), u, v)
    for h, i, s in rows(u, v):
        n, s = i + 1, 0.7 * s
        assert (usa[0, h, i, :n] - s.exp() / n).abs().max() < 1e-12 * float(s.exp().max())
        assert (cut[0, h, i, :n] - s.clamp(-1.5, 1.5).exp() / n).abs().max() < 1e-13
        assert (sigmoid[0, h, i, :n] - 1 / (1 + n * (-s).exp())).abs().max() < 1e-13
        assert (linear[0, h, i, :n] - s / n).abs().max() < 1e-13
    assert cut.max() <= math.exp(1.5) and not torch.allclose(cut, usa)


@torch.no_grad()
def test_the_number_of_visible_tokens_is_that_of_the_row(seed):
    u, v = 0 * factors()[0], factors()[1]
    seen = visible(Window(size=2), span(N), N)
    count = seen.dense(N, N, u.device).sum(-1).double()
    assert (weights(Unnormalised(), u, v, seen).sum(-1) - 1).abs().max() < 1e-14
    assert (weights(Sigmoid(), u, v, seen)[0, 0].amax(-1) - 1 / (1 + count)).abs().max() < 1e-14


@torch.no_grad()
def test_top_k_by_hand(seed):
    u, v = factors(3.0)
    a, full = weights(TopK(k=3), u, v), weights(Softmax(), u, v)
    for h, i, s in rows(u, v):
        kept = s.argsort(descending=True)[:3]
        expected = torch.zeros(i + 1, dtype=torch.float64)
        expected[kept] = s[kept].softmax(-1)
        assert (a[0, h, i, : i + 1] - expected).abs().max() < 1e-13
    assert torch.equal(weights(TopK(k=N), u, v), full) and torch.equal(weights(TopK(k=100), u, v), full)
    assert torch.equal(weights(TopK(k=1), u, v), weights(Hardmax(), u, v))


@torch.no_grad()
def test_hardmax_is_the_cold_limit_and_shares_ties(seed):
    u, v = factors()
    assert (weights(Hardmax(), u, v) - weights(Softmax(beta=1e6), u, v)).abs().max() < 1e-6
    v[:, :, 3] = v[:, :, 1]
    u[:, :, 5] = 10 * v[:, :, 1]
    v[:, :, [0, 2, 4, 5]] *= 0.01
    assert weights(Hardmax(), u, v)[0, 0, 5].tolist() == [0, 0.5, 0, 0.5, 0, 0, 0, 0, 0]


# Sinkhorn -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0, 8.0])
@torch.no_grad()
def test_sinkhorn_is_doubly_stochastic_and_of_the_right_form(seed, size):
    """Sums of one both ways, and log a - s = f_i + g_j: the two together have one solution."""
    u, v = factors(size)
    a = weights(Sinkhorn(), u, v, FULL)
    assert (a.sum(-1) - 1).abs().max() < 1e-12 and (a.sum(-2) - 1).abs().max() < 1e-6
    potential = a.log() - u @ v.mT
    mixed = potential - potential.mean(-1, keepdim=True) - potential.mean(-2, keepdim=True) + potential.mean((-2, -1), True)
    assert mixed.abs().max() < 1e-9


@torch.no_grad()
def test_sinkhorn_in_the_support_of_a_window(seed):
    u, v = factors()
    a = weights(Sinkhorn(), u, v, visible(Window(size=3), span(N), N))
    assert (a.sum(-1) - 1).abs().max() < 1e-12 and (a.sum(-2) - 1).abs().max() < 1e-6
    assert (a == 0).sum() == 2 * H * (N - 3) * (N - 2) // 2


def test_too_few_iterations_are_told(seed):
    u, v = factors(60.0)
    with pytest.warns(UserWarning, match="Sinkhorn"):
        a = weights(Sinkhorn(iterations=3), u, v, FULL)
    assert a.isfinite().all() and (a.sum(-1) - 1).abs().max() < 1e-12


def test_gradients_of_sinkhorn_do_not_depend_on_its_iterations(seed):
    """The derivative of the last Newton step is the implicit one: the same from a loose and from a tight tolerance."""
    u, v = (x.requires_grad_() for x in factors())
    out = torch.randn(1, H, N, N, dtype=torch.float64)
    found = []
    for tolerance in (1e-5, 1e-12):
        kernel = Sinkhorn(tolerance=tolerance).build(H, D)
        found.append(torch.autograd.grad((kernel.weights(u, v, FULL) * out).sum(), (u, v)))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("beta", [1.0, 0.5])
@torch.no_grad()
def test_the_gain_of_sinkhorn_on_a_gaussian(beta):
    """J 22: mixtures of a Gaussian cloud are affine in the query, with the gain of math E.6.

    G = S^{1/2} U diag(t) W^T S^{-1/2},  S^{1/2} (beta A) S^{1/2} = U diag(s) W^T,  t = (-1 + sqrt(1 + 4 s^2))/(2 s),  A = M^T.
    """
    torch.manual_seed(0)
    d, n, clouds = 3, 1500, 8
    root = torch.randn(d, d, dtype=torch.float64)
    sigma = root @ root.mT / d + 0.3 * torch.eye(d, dtype=torch.float64)
    a = beta * torch.randn(d, d, dtype=torch.float64) / d
    gain = gaussian_gain(a, sigma)
    # the potentials of two quadratic forms, iterated: a fixed point of the same problem, found another way
    p = q = torch.zeros(d, d, dtype=torch.float64)
    inverse = torch.linalg.inv(sigma)
    for _ in range(2000):
        p = a.mT @ torch.linalg.inv(inverse + q) @ a
        q = a @ torch.linalg.inv(inverse + p) @ a.mT
    assert (torch.linalg.inv(inverse + q) @ a - gain).abs().max() < 1e-10

    kernel = Sinkhorn(beta=beta).build(1, d)
    half = torch.linalg.cholesky(sigma)
    shares = []
    for _ in range(clouds):
        x = torch.randn(n, d, dtype=torch.float64) @ half.mT
        x = x - x.mean(0)
        u = (x @ a.mT / beta)[None, None]  # A x, so that u.y = y^T A x
        z = kernel(u, x[None, None], x[None, None], FULL)[0, 0]
        found = torch.linalg.lstsq(x, z).solution.mT
        shares.append((found * gain).sum() / gain.square().sum())
    shares = torch.stack(shares)
    error = shares.std() / clouds**0.5
    assert (shares.mean() - 1).abs() < 3 * error and error < 0.05


def gaussian_gain(a: Tensor, sigma: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(sigma)
    root = vectors @ values.sqrt().diag() @ vectors.mT
    u, s, wt = torch.linalg.svd(root @ a @ root)
    t = (-1 + (1 + 4 * s**2).sqrt()) / (2 * s)
    return root @ u @ t.diag() @ wt @ torch.linalg.inv(root)


# Biases (math A.2) ----------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_which_biases_a_kernel_notices(seed, setting):
    """b_Q adds a functional of the key, b_K a function of the query, b_V a constant: each is gauge exactly where it says so."""
    kernel = setting.build(H, D).double()
    seen = CAUSAL if kernel.rowwise else FULL
    (u, v), c = factors(), torch.randn(1, H, N, 3, dtype=torch.float64)
    b = torch.randn(H, 1, R, dtype=torch.float64)
    a = kernel.weights(u, v, seen)
    by_query, by_key = (kernel.weights(u + b, v, seen) - a).abs().max(), (kernel.weights(u, v + b, seen) - a).abs().max()
    if kernel.reads_factors:  # L2 sees the difference of both biases
        assert by_query > 1e-3
        assert (kernel.weights(u + b, v + b, seen) - a).abs().max() < 1e-12
    else:
        assert (by_query < 1e-10) == kernel.column_invariant
        assert (by_key < 1e-10) == kernel.row_invariant
    constant = torch.randn(3, dtype=torch.float64)
    moved = kernel(u, v, c + constant, seen) - kernel(u, v, c, seen)
    assert ((moved - constant).abs().max() < 1e-12) == kernel.normalised


@EVERY
def test_a_layer_has_the_biases_that_count(setting):
    kernel = setting.build(3, 12)
    mask = Causal() if kernel.rowwise else Full()

    def build(**more):
        return attention(LowRank(rank=R), LowRank(rank=R), kernel=setting, mask=mask, drift=Drift(), **more)

    assert (build().value_bias is None) == kernel.normalised
    if kernel.column_invariant:
        with pytest.raises(UserError, match="functional"):
            build(functional=Functional())
    else:
        assert (build(functional=Functional()).biases.right is None) == kernel.row_invariant
    assert build(functional=Functional(), positions=[RoPE()]).biases.right is not None


@pytest.mark.parametrize("kernel", [Sigmoid(), Unnormalised(), Linear(), SinkSoftmax(learned=False)], ids=repr)
@torch.no_grad()
def test_attention_with_all_biases_by_hand(seed, kernel):
    """s = (W_Q^T y + b_Q).(W_K^T y + b_K), contents W_V^T y + b_V: with u, w, c0 and b_V all in their places."""
    layer = attention(LowRank(rank=R), LowRank(rank=3), kernel=kernel, functional=Functional(), drift=Drift())
    y, table = cloud(N), Causal().visible(span(N)[:, None], span(N))
    expected = layer.drift.expand(2, N, 12).clone()
    count = table.sum(-1, keepdim=True).double()
    for h in range(3):
        m, f = layer.form.matrix()[h], layer.content.matrix()[h]
        left, right = layer.form.left_rows()[h], layer.form.right_rows()[h]
        b_q, b_k = layer.biases.left[h], layer.biases.right[h]
        s = torch.einsum("bid,de,bje->bij", y, m, y) + (y @ (right.mT @ b_q)).unsqueeze(1) + (y @ (left.mT @ b_k)).unsqueeze(2)
        s = s + b_q @ b_k
        a = {
            Sigmoid: lambda s: (s - count.log()).sigmoid(),
            Unnormalised: lambda s: s.clamp(-10, 10).exp() / count,
            Linear: lambda s: s / count,
            SinkSoftmax: lambda s: s.exp() / (1 + (s.exp() * table).sum(-1, keepdim=True)),
        }[type(kernel)](s)
        a = a * table
        lifted = layer.content.left_rows()[h].mT @ layer.value_bias[h]
        expected += a @ y @ f.mT + a.sum(-1, keepdim=True) * lifted
    assert (layer.lift(layer(y, span(N))) - expected).abs().max() < 1e-12 * float(expected.abs().max().clamp(min=1))


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [Causal(), Window(size=1)], ids=repr)
def test_sinkhorn_under_a_causal_mask_is_refused(mask):
    """A lower-triangular doubly stochastic matrix is the identity (math A.8)."""
    with pytest.raises(UserError, match="identity"):
        attention(LowRank(rank=R), LowRank(rank=R), kernel=Sinkhorn(), mask=mask)


@pytest.mark.parametrize(
    "wrong",
    [lambda: TopK(k=0), lambda: Unnormalised(clip=0.0), lambda: Sinkhorn(tolerance=0.0), lambda: Sinkhorn(iterations=0)],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError):
        wrong()
