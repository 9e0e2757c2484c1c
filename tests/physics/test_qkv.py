"""Attention by M and F is QKV attention (math A.2, A.5; J 1, 2). The other side is written out here, in products."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from builders import attention, cloud, fill, span
from torch import Tensor, nn

from emformer.attention import Attention
from emformer.masks import Causal, Full
from emformer.operators import LowRank
from emformer.positions import RoPE
from emformer.settings import Drift, Functional

D, H, R, N = 12, 3, 4, 9
MASKS = [Causal(), Full()]


class QKV(NamedTuple):
    """Row-vector weights: queries W_Q (H, d, r), keys and values (G, d, r), output W_O (H, r, d), and their biases."""

    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    bq: Tensor
    bk: Tensor
    bv: Tensor
    bo: Tensor

    def scores(self, y: Tensor, turn: Tensor | None = None) -> Tensor:
        """(B, H, N, N), with 1/sqrt(r). `turn` (N, r, r): a matrix on the queries and keys of every position."""
        share = self.wq.shape[0] // self.wk.shape[0]
        q = torch.einsum("bnd,hdr->bhnr", y, self.wq) + self.bq[:, None]
        k = torch.einsum("bnd,gdr->bgnr", y, self.wk) + self.bk[:, None]
        k = torch.stack([k[:, h // share] for h in range(self.wq.shape[0])], 1)
        if turn is not None:
            q, k = torch.einsum("nrs,bhns->bhnr", turn, q), torch.einsum("nrs,bhns->bhnr", turn, k)
        return torch.einsum("bhir,bhjr->bhij", q, k) / math.sqrt(self.wq.shape[-1])

    def run(self, y: Tensor, causal: bool, turn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pattern (B, H, N, N) and output (B, N, d)."""
        score = self.scores(y, turn)
        if causal:
            row, column = torch.meshgrid(torch.arange(y.shape[1]), torch.arange(y.shape[1]), indexing="ij")
            score = torch.where(column <= row, score, -math.inf)
        power = (score - score.max(-1, keepdim=True).values).exp()
        pattern = power / power.sum(-1, keepdim=True)
        share = self.wq.shape[0] // self.wv.shape[0]
        out = self.bo.expand(y.shape).clone()
        for h in range(self.wq.shape[0]):
            value = y @ self.wv[h // share] + self.bv[h // share]
            out += pattern[:, h] @ value @ self.wo[h]
        return pattern, out


def draw(groups: int = H, rank: int = R) -> QKV:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return QKV(
        normal(H, D, rank) / 2,
        normal(groups, D, rank) / 2,
        normal(groups, D, rank) / 2,
        normal(H, rank, D) / 2,
        normal(H, rank),
        normal(groups, rank),
        normal(groups, rank),
        normal(D),
    )


def emf(w: QKV, **kwargs) -> Attention:
    """The same attention in the package, by copying factors: b_Q in the functional, b_V and b_O in the drift."""
    groups = w.wk.shape[0]
    layer = attention(
        LowRank(rank=R, groups=groups),
        LowRank(rank=R, groups=groups),
        functional=Functional(),
        drift=Drift(),
        **kwargs,
    )
    fill(layer.form.left_factor, w.wq.mT / math.sqrt(w.wq.shape[-1]))
    fill(layer.form.right_factor, w.wk.mT)
    fill(layer.content.left_factor, w.wo)
    fill(layer.content.right_factor, w.wv.mT)
    fill(layer.biases.left, w.bq / math.sqrt(R))  # the score's scale sits in M, and so on the query's side
    share = H // groups
    fill(layer.drift, w.bo + sum(w.bv[h // share] @ w.wo[h] for h in range(H)))
    return layer


def run(layer: Attention, y: Tensor) -> tuple[Tensor, Tensor]:
    i = span(y.shape[1])
    with torch.no_grad():
        return layer.weights(y, i), layer.lift(layer(y, i))


@pytest.mark.parametrize("groups", [3, 1])
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_outputs_and_patterns_equal_qkv_with_all_biases(seed, mask, groups):
    w, y = draw(groups), cloud(N)
    pattern, out = w.run(y, mask.causal)
    ours, update = run(emf(w, mask=mask), y)
    assert (ours - pattern).abs().max() < 1e-12
    assert (update - out).abs().max() < 1e-12


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_the_key_bias_changes_nothing(seed, mask):
    w, y = draw(), cloud(N)
    layer = emf(w, mask=mask)
    assert layer.biases.right is None  # there is none to set: it is gauge
    other = w._replace(bk=10 * torch.randn(H, R, dtype=torch.float64))
    pattern, out = other.run(y, mask.causal)
    ours, update = run(layer, y)
    assert (ours - pattern).abs().max() < 1e-12
    assert (update - out).abs().max() < 1e-12


def test_scores_differ_from_qkv_by_a_constant_per_row(seed):
    w, y = draw(), cloud(N)
    layer = emf(w)
    with torch.no_grad():
        u, v = layer.factors(y, span(N))
        form = torch.einsum("bid,hde,bje->bhij", y, layer.form.matrix(), y)
        form = form + torch.einsum("hd,bjd->bhj", layer.functional(), y)[:, :, None]
        difference = w.scores(y) - u @ v.mT
    assert (u @ v.mT - form).abs().max() < 1e-12  # s_ij = y_i^T M y_j + u^T y_j
    assert (difference - difference.mean(-1, keepdim=True)).abs().max() < 1e-12
    expected = torch.einsum("bid,hdr,hr->bhi", y, w.wq, w.bk) + (w.bq * w.bk).sum(-1)[:, None]
    assert (difference[..., 0] - expected / math.sqrt(R)).abs().max() < 1e-12  # w_h^T y_i + c0
    assert difference.abs().max() > 0.1


def test_without_its_query_bias_the_layer_is_another(seed):
    """The functional is no gauge: leaving b_Q out is seen."""
    w, y = draw(), cloud(N)
    pattern, _ = w._replace(bq=torch.zeros(H, R, dtype=torch.float64)).run(y, True)
    assert (run(emf(w), y)[0] - pattern).abs().max() > 1e-2


def test_homogeneous_lift(seed):
    """s = y~^T M~ y~ and D = sum F~ m~ with y~ = (y, 1): every bias is a row of a factor."""
    w, y = draw(), cloud(N)
    lifted = torch.cat([y, torch.ones(*y.shape[:2], 1, dtype=y.dtype)], -1)
    form = LowRank(rank=R).build("form", D + 1, H).double()
    fill(form.left_factor, torch.cat([w.wq, w.bq[:, None]], 1).mT / math.sqrt(w.wq.shape[-1]))
    fill(form.right_factor, torch.cat([w.wk, w.bk[:, None]], 1).mT)
    with torch.no_grad():
        matrix = form.matrix()
        by_matrix = torch.einsum("bid,hde,bje->bhij", lifted, matrix, lifted)
        by_factors = form.left(lifted) @ form.right(lifted).mT
    assert matrix.shape == (H, D + 1, D + 1)
    assert (by_matrix - w.scores(y)).abs().max() < 1e-12
    assert (by_factors - w.scores(y)).abs().max() < 1e-12


def rotation(count: int, rank: int, base: float = 10000.0) -> Tensor:
    """(count, r, r): R_p, plane k spanned by the coordinates k and k + r/2, angle p base^(-2k/r)."""
    out = torch.zeros(count, rank, rank, dtype=torch.float64)
    for p in range(count):
        for k in range(rank // 2):
            angle = p * base ** (-2 * k / rank)
            a, b = k, k + rank // 2
            out[p, a, a] = out[p, b, b] = math.cos(angle)
            out[p, b, a], out[p, a, b] = math.sin(angle), -math.sin(angle)
    return out


@pytest.mark.parametrize("groups", [3, 1])
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_with_rope_both_biases_rotate(seed, mask, groups):
    """Qwen's convention: b_Q and b_K are added before the rotation, and b_K matters."""
    w, y = draw(groups), cloud(N)
    layer = emf(w, mask=mask, positions=[RoPE()])
    fill(layer.biases.right, w.bk)
    pattern, out = w.run(y, mask.causal, rotation(N, R))
    ours, update = run(layer, y)
    assert (ours - pattern).abs().max() < 1e-12
    assert (update - out).abs().max() < 1e-12
    fill(layer.biases.right, 0 * w.bk)
    assert (run(layer, y)[0] - pattern).abs().max() > 1e-2


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_equals_torch_multihead_attention(seed, mask):
    """The same against a library: weights and all biases copied from `torch.nn.MultiheadAttention`."""
    theirs = nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
            bias.normal_()
    wq, wk, wv = theirs.in_proj_weight.detach().unflatten(0, (3, H, R))
    bq, _, bv = theirs.in_proj_bias.detach().unflatten(0, (3, H, R))
    wo, bo = theirs.out_proj.weight.detach(), theirs.out_proj.bias.detach()
    layer = attention(LowRank(rank=R), LowRank(rank=R), mask=mask, functional=Functional(), drift=Drift())
    fill(layer.form.left_factor, wq / math.sqrt(R))
    fill(layer.form.right_factor, wk)
    fill(layer.content.right_factor, wv)
    fill(layer.content.left_factor, wo.T.unflatten(0, (H, R)))
    fill(layer.biases.left, bq / math.sqrt(R))
    fill(layer.drift, wo @ bv.flatten() + bo)
    y = cloud(N)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1) if mask.causal else None
    out, pattern = theirs(y, y, y, attn_mask=hidden, average_attn_weights=False)
    ours, update = run(layer, y)
    assert (ours - pattern).abs().max() < 1e-12
    assert (update - out).abs().max() < 1e-12
