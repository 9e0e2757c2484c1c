"""Signal propagation: moments of planted streams, and the context's variance against attention itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emformer.geometry.signals import context_variance, median_norm, score_std, stream_variance, token_correlation

B, H, N, D = 3, 2, 9, 16
CAUSAL = torch.ones(N, N).tril().bool()
FULL = torch.ones(N, N).bool()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(got: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> bool:
    assert got.dtype == torch.float64
    return bool(((got - expected).abs() < tolerance).all())


def test_variance_and_norm_of_the_stream(seed):
    x = normal(B, N, D)
    assert close(stream_variance(x), x.square().mean(-1) - x.mean(-1).square())
    assert close(stream_variance(3 * x + 5), 9 * stream_variance(x), 1e-10)
    assert close(stream_variance(torch.nn.functional.layer_norm(x, (D,), eps=0.0)), 1)
    unit = x / x.norm(dim=-1, keepdim=True)
    sizes = torch.tensor([9.0, 1, 8, 2, 7, 3, 6, 4, 5]).view(N, 1)
    assert close(median_norm(unit * sizes), 5) and close(median_norm((unit * sizes)[:, :-1]), 5)
    assert close(median_norm((unit * sizes)[:, :4]), 5)


def test_token_correlation_is_pearsons(seed):
    x = normal(B, N, D) + normal(B, N, 1)
    for b in range(B):
        pairs = torch.corrcoef(x[b])
        assert close(token_correlation(x)[b], (pairs.sum() - N) / (N * (N - 1)))
    assert close(token_correlation(x[:, :1] * torch.rand(B, N, 1) + normal(B, N, 1)), 1)  # same but for scale and mean
    assert close(token_correlation(torch.stack([x[0, 0], -x[0, 0]])), -1)
    tokens = torch.rand(B, N, 1).double() + 0.1
    assert close(token_correlation(tokens * x), token_correlation(x))


def test_token_correlation_of_planted_streams():
    torch.manual_seed(0)
    for r in (0.0, 0.3, 0.9):
        x = math.sqrt(r) * normal(2000, 1, 128) + math.sqrt(1 - r) * normal(2000, N, 128) + 2
        assert abs(token_correlation(x).mean() - r) < 0.005
    draws = token_correlation(normal(4000, N, D))
    sd = math.sqrt(2 / (N * (N - 1) * (D - 1)))
    assert abs(draws.mean()) < 4 * sd / math.sqrt(4000) and abs(draws.std() / sd - 1) < 0.06


def test_score_std(seed):
    s = normal(B, H, N, N)
    for visible in (CAUSAL, FULL):
        found = score_std(s, visible)
        assert close(found.total, s[..., visible].std(-1))
        rows = [s[..., i, visible[i]].var(-1) for i in range(N) if visible[i].sum() > 1]
        assert close(found.within, torch.stack(rows).mean(0).sqrt())
        hidden = score_std(s.masked_fill(~visible, torch.nan), visible)
        assert torch.equal(hidden.total, found.total) and torch.equal(hidden.within, found.within)
    rowwise = score_std(s[..., :1].expand_as(s), FULL)  # constant along rows
    assert close(rowwise.within, 0) and (rowwise.total > 0.1).all()


def test_scores_and_contexts_at_initialisation():
    # unit tokens of correlation r, scores of variance 1: spread of scores and variance of the contexts against their formulas
    torch.manual_seed(0)
    n = dim = 128
    for r in (0.0, 0.3, 0.8):
        y = math.sqrt(r) * normal(100, 1, dim) + math.sqrt(1 - r) * normal(100, n, dim)
        scores = y @ (normal(100, dim, dim) / dim) @ y.mT
        spread = score_std(scores, torch.ones(n, n).bool())
        assert abs(spread.total.square().mean() - (1 - r**2)) < 0.04 and abs(spread.within.square().mean() - (1 - r)) < 0.03
        variance = (scores.softmax(-1) @ y).square().mean((-2, -1))
        expected = context_variance(r, 1 - r, 1.0, n, dim)
        error = 4 * variance.std() / 10
        assert abs(variance.mean() - expected) < 0.08 * expected + error, (r, variance.mean(), expected)
    assert abs(context_variance(0.0, 1.0, 1.0, 256, 256) - 0.0145) < 5e-5
    assert abs(context_variance(0.3, 0.7, 1.0, 256, 256) - 0.3075) < 1e-4
    assert context_variance(1.0, 0.0, 1.0, 7, 3) == 1  # equal tokens
    assert context_variance(0.0, 0.0, 0.0, 5, 3) == 1 / 5  # plain average


def test_degenerate_clouds():
    torch.manual_seed(0)
    x = normal(B, N, D)
    zero, one, constant = torch.zeros(B, N, D), x[:, :1], x[:, :1].expand(B, N, D)
    flat = 0.1 * torch.rand(B, N, 1).expand(B, N, D)  # every token has equal features
    odd = normal(B, N, 1).expand(B, N, 13)  # and a mean that is rounded
    assert (odd != odd.mean(-1, keepdim=True)).any()
    assert close(stream_variance(zero), 0) and close(median_norm(zero), 0) and close(stream_variance(flat), 0)
    for cloud in (zero, one, flat, odd, odd.float()):
        assert token_correlation(cloud).isnan().all()
    assert close(token_correlation(constant), 1)
    mixed = torch.cat([x[:, :4], flat[:, :2].double()], 1)
    assert close(token_correlation(mixed), token_correlation(x[:, :4]))
    single = score_std(torch.randn(B, H, 1, 1), FULL[:1, :1])
    assert single.total.isnan().all() and single.within.isnan().all()
    broken = x.clone()
    broken[0, 0, 0] = torch.nan
    assert median_norm(broken).isnan().tolist() == [True, False, False] and stream_variance(broken).isnan().sum() == 1
