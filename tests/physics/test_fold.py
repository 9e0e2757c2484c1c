"""Gain, bias and mean of a LayerNorm fold into the operators (math A.6, J 6)."""

from __future__ import annotations

import pytest
import torch
from builders import attention, cloud, fill, span, stir
from torch import Tensor

from emformer.attention import Attention
from emformer.masks import Causal, Full
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import Dense, LowRank
from emformer.positions import RoPE
from emformer.settings import Drift, Functional

D, H, R, N = 12, 3, 4, 9
GIVEN = {"functional": Functional(), "drift": Drift()}


def run(layer: Attention, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return layer.weights(y, span(N)), layer.lift(layer(y, span(N)))


def norms(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A raw cloud, what the affine norm and the bare norm make of it, and Pi Gamma and b of the affine one."""
    raw = 3 * cloud(N) + 1
    pi = torch.eye(D, dtype=torch.float64)
    if kind == "layer":
        affine, bare = LayerNorm(bias=True).build(D), LayerNorm(gain=False).build(D)
        pi = pi - 1 / D
    else:
        affine, bare = RMSNorm().build(D), RMSNorm(gain=False).build(D)
    affine = stir(affine).double()
    bias = affine.bias.detach() if kind == "layer" else torch.zeros(D, dtype=torch.float64)
    with torch.no_grad():
        return raw, affine(raw), bare(raw), pi @ affine.gain.detach().diag(), bias


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("mask", [Causal(), Full()], ids=repr)
@pytest.mark.parametrize("part", [LowRank(rank=R), LowRank(rank=R, groups=1), Dense()], ids=repr)
def test_effective_operators_on_the_bare_cloud(seed, part, mask, kind):
    """M_eff = Pi G M G Pi, u_eff = Pi G (M^T b + u), F_eff = F G Pi, g_eff = g + sum_h F_h b."""
    layer = attention(part, part, mask=mask, **GIVEN)
    _, read, bare, pg, b = norms(kind)
    with torch.no_grad():
        m, f = layer.matrices()
        u = layer.functional()
    effective = attention(Dense(), Dense(), mask=mask, **GIVEN)
    fill(effective.form.left_factor, (pg @ m @ pg.mT).mT)  # a dense operator keeps W^T
    fill(effective.content.left_factor, (f @ pg.mT).mT)
    fill(effective.biases.left, (m.mT @ b + u) @ pg.mT)
    fill(effective.drift, layer.drift.detach() + (f @ b).sum(0))
    for ours, expected in zip(run(effective, bare), run(layer, read), strict=True):
        assert (ours - expected).abs().max() < 1e-12


@pytest.mark.parametrize("mask", [Causal(), Full()], ids=repr)
@pytest.mark.parametrize("groups", [3, 1])
@pytest.mark.parametrize("positions", [[RoPE()], [RoPE(base=100.0, fraction=0.5)]], ids=repr)
def test_with_rope_by_the_factor_rule(seed, positions, groups, mask):
    """U -> Pi G U, V -> Pi G V, b_Q -> b_Q + U^T b, b_K -> b_K + V^T b."""
    parts_ = LowRank(rank=R, groups=groups), LowRank(rank=R, groups=groups)
    layer = attention(*parts_, mask=mask, positions=positions, **GIVEN)
    folded = attention(*parts_, mask=mask, positions=positions, **GIVEN)
    _, read, bare, pg, b = norms("layer")
    with torch.no_grad():
        form, content = layer.form, layer.content
        f = content.matrix()
        fill(folded.form.left_factor, form.left_factor @ pg.mT)
        fill(folded.form.right_factor, form.right_factor @ pg.mT)
        fill(folded.content.left_factor, content.left_factor)
        fill(folded.content.right_factor, content.right_factor @ pg.mT)
        # the score's scale sits on the left factor, and so on what b_Q takes from it
        fill(folded.biases.left, layer.biases.left + form.left_factor @ b)
        fill(folded.biases.right, layer.biases.right + form.right_factor @ b)
        fill(folded.drift, layer.drift + (f @ b).sum(0))
    for ours, expected in zip(run(folded, bare), run(layer, read), strict=True):
        assert (ours - expected).abs().max() < 1e-12
