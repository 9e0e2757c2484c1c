"""Only M and F mean anything: (U, V) -> (U G, V G^-T) changes nothing (math A.3, J 3)."""

import pytest
import torch
from builders import attention, cloud, model, span, words

from emformer.masks import Causal, Full
from emformer.operators import LowRank
from emformer.operators.lowrank import LowRankOperator
from emformer.positions import QueryNorm
from emformer.settings import Drift, Functional


def general(rank: int, condition: float = 10.0) -> torch.Tensor:
    """A random G in GL(r) with singular values spread evenly (in log) over [1/sqrt(condition), sqrt(condition)]."""
    left, right = (torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q for _ in range(2))
    values = torch.logspace(-0.5, 0.5, rank, base=condition, dtype=torch.float64)
    return left @ values.diag() @ right


@torch.no_grad()
def regauge(operator: LowRankOperator) -> list[torch.Tensor]:
    """Change the gauge of every group of an operator, in place; the matrices G."""
    share, used = operator.heads // operator.groups, []
    for group in range(operator.groups):
        g = general(operator.rank)
        assert torch.linalg.cond(g) < 10 + 1e-9
        operator.right_factor[group] = torch.linalg.inv(g) @ operator.right_factor[group]  # rows of (V G^-T)^T
        for head in range(group * share, (group + 1) * share):
            operator.left_factor[head] = g.T @ operator.left_factor[head]
        used.append(g)
    return used


@pytest.mark.parametrize("mask", [Causal(), Full()], ids=repr)
@pytest.mark.parametrize("groups", [None, 1, 2])
def test_a_general_gauge_leaves_the_layer_unchanged(seed, groups, mask):
    part = LowRank(rank=4, groups=groups)
    layer = attention(part, part, heads=4, mask=mask, functional=Functional(), drift=Drift())
    y, i = cloud(9), span(9)
    with torch.no_grad():
        before = layer.weights(y, i), layer.lift(layer(y, i)), *layer.matrices()
        old = layer.form.left_factor.clone()
        share = layer.form.heads // layer.form.groups
        for group, g in enumerate(regauge(layer.form)):  # b_Q lives in the factor's space and turns with it
            heads = slice(group * share, (group + 1) * share)
            layer.biases.left[heads] = layer.biases.left[heads] @ g
        regauge(layer.content)
        after = layer.weights(y, i), layer.lift(layer(y, i)), *layer.matrices()
    assert (layer.form.left_factor - old).abs().max() > 0.1
    for was, now in zip(before, after, strict=True):
        assert (was - now).abs().max() < 1e-10


def test_a_general_gauge_leaves_the_logits_unchanged(seed):
    net, tokens = model(), words(12)
    with torch.no_grad():
        before = net(tokens)
        for block in net.blocks:
            regauge(block.attention.form)
            regauge(block.attention.content)
        assert (net(tokens) - before).abs().max() < 1e-10


def test_only_the_inverse_transpose_will_do(seed):
    """The test can fail: G on both sides is seen, and so is any G once a position reads the factors."""
    y, i = cloud(9), span(9)
    layer = attention(LowRank(rank=4), LowRank(rank=4), positions=[QueryNorm()])
    with torch.no_grad():
        before = layer.weights(y, i)
        regauge(layer.form)
        assert (layer.weights(y, i) - before).abs().max() > 1e-3
    layer = attention(LowRank(rank=4), LowRank(rank=4))
    with torch.no_grad():
        before = layer.weights(y, i)
        g = general(4)
        layer.form.left_factor.copy_(g.T @ layer.form.left_factor)
        layer.form.right_factor.copy_(g.T @ layer.form.right_factor)
        assert (layer.weights(y, i) - before).abs().max() > 1e-3
