"""Sinks: what uniform attention looks like, planted sinks, and the cosine that proves nothing."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from emformer.geometry.sinks import (
    importance,
    sink_mass,
    sink_position,
    sink_rate,
    sink_share,
    uniform,
    value_cosine,
    value_ratio,
)

B, H, T, D = 3, 2, 16, 8


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens).tril().bool()


def full(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens).bool()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def attention(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def close(got: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> bool:
    assert got.dtype == torch.float64
    return bool(((got - expected).abs() < tolerance).all())


def harmonic(first: int, last: int) -> Fraction:
    return sum((Fraction(1, i) for i in range(first, last + 1)), Fraction(0))


def test_importance_is_the_mean_over_those_who_see(seed):
    a = attention(normal(B, H, T, T), causal(T))
    alpha = importance(a, causal(T))
    for k in range(1, T + 1):
        assert close(alpha[..., k - 1], sum(a[..., i - 1, k - 1] for i in range(k, T + 1)) / (T - k + 1))
    a = attention(normal(B, H, T, T), full(T))
    assert close(importance(a, full(T)), a.mean(-2)) and close(importance(a, full(T)).sum(-1), 1)
    band = causal(T) & ~causal(T).roll(3, 0).tril()  # the last three tokens
    a = attention(normal(B, H, T, T), band)
    assert close(importance(a, band)[..., 4], (a[..., 4, 4] + a[..., 5, 4] + a[..., 6, 4]) / 3)


def test_uniform_attention_has_no_sink_unless_the_prompt_is_short():
    # alpha_k is the mean of 1/k … 1/T, of falling terms: it falls with T, so the first T at which it is 3/10 or less settles
    # all longer ones; and 1/k bounds it, so that from k = 4 on it never passes 3/10
    for k, free in ((1, 10), (2, 6), (3, 4), (4, 4), (5, 5)):
        for tokens in range(k, 20):
            alpha = harmonic(k, tokens) / (tokens - k + 1)
            pattern = uniform(causal(tokens))
            assert close(importance(pattern, causal(tokens))[k - 1], float(alpha))
            assert (alpha > Fraction(3, 10)) == (tokens < free)
            assert sink_rate(pattern, causal(tokens), k) == float(tokens < free)
    for k in range(1, 65):
        assert sink_rate(uniform(causal(64)), causal(64), k) == 0
        assert sink_rate(uniform(full(64)), full(64), k) == 0
    assert close(importance(uniform(causal(64)), causal(64))[0], float(harmonic(1, 64) / 64))
    assert sink_position(uniform(causal(64)), causal(64)) == 1
    assert abs(float(harmonic(1, 64) / 64) - 0.074) < 5e-4


def test_planted_sinks_are_found(seed):
    for k in (1, 2, 5):
        a = torch.zeros(B, H, T, T, dtype=torch.float64)
        a[..., torch.arange(T), torch.arange(T).clamp(max=k - 1)] = 1  # everyone looks at k as soon as it is there
        assert close(importance(a, causal(T))[..., k - 1], 1)
        for j in range(1, T + 1):
            assert (sink_rate(a, causal(T), j) == float(j == k)).all()
        assert (sink_position(a, causal(T)) == k).all()
        scores = normal(B, H, T, T)
        scores[..., k - 1] += 8
        assert (sink_position(attention(scores, full(T)), full(T)) == k).all()
        assert (sink_rate(attention(scores, full(T)), full(T), k) == 1).all()
    # half of the heads, half of the rate
    mixed = torch.stack([a[:, 0], uniform(causal(T)).expand(B, T, T)], 1)
    assert close(sink_rate(mixed, causal(T), 5).mean(0), torch.tensor([1.0, 0.0]))


def test_threshold_is_strict_and_rows_count_once():
    a = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    assert sink_rate(a, causal(2), 1, threshold=0.75) == 0 and sink_rate(a, causal(2), 1, threshold=0.7499) == 1
    assert sink_rate(a, causal(2), 2, threshold=0.5) == 0 and sink_rate(a, causal(2), 2, threshold=0.4999) == 1
    for wrong in (0, 3, -1):
        with pytest.raises(ValueError, match="position"):
            sink_rate(a, causal(2), wrong)


def test_few_queries_make_no_sink(seed):
    a = attention(normal(B, H, T, T), causal(T))
    a[..., -1, :], a[..., -1, -1] = 0, 1
    assert (sink_position(a, causal(T)) == T).all() and (sink_position(a, causal(T), queries=2) < T).all()
    assert sink_position(a, causal(T), queries=T + 1).isnan().all()


def test_mass_of_a_constant_bias(seed):
    for k in (1, 3):
        a = attention(normal(B, H, T, T), causal(T))
        a[..., k - 1] = 0
        a = 0.6 * a / a.sum(-1, keepdim=True).clamp(min=1e-9)
        a[..., k - 1] = 0.4
        first = sink_mass(a.tril(), causal(T), k)
        assert close(first.mean, 0.4) and close(first.sd, 0) and close(first.variation, 0)
        assert first.mass[..., : max(k - 1, 1)].isnan().all() and close(first.mass[..., max(k - 1, 1) :], 0.4)
    a = attention(normal(B, H, T, T), causal(T))
    first = sink_mass(a, causal(T))
    assert close(first.mean, a[..., 1:, 0].mean(-1)) and close(first.sd, a[..., 1:, 0].std(-1))
    assert close(first.variation, first.sd / first.mean)
    # without the query that has no choice
    expected = torch.tensor([float(Fraction(1, i)) for i in range(2, T + 1)], dtype=torch.float64)
    assert close(sink_mass(uniform(causal(T)), causal(T)).mass[1:], expected)
    a = attention(normal(B, H, T, T), full(T))
    assert close(sink_mass(a, full(T), T).mean, a[..., -1].mean(-1)) and not sink_mass(a, full(T)).mass.isnan().any()


def test_share_of_the_update(seed):
    a, contents = attention(normal(B, H, T, T), causal(T)), normal(B, H, T, D)
    lam, value, update = sink_mass(a, causal(T)).mass, contents[..., 0, :], a @ contents
    share = sink_share(lam, value, update)
    rest = a.clone()
    rest[..., 0] = 0
    rest = rest @ contents / (1 - a[..., :1])
    # D = (1 - lam) F m_rest + lam F y_0
    split = (1 - a[..., 1:, :1]) * rest[..., 1:, :] + a[..., 1:, :1] * value.unsqueeze(-2)
    assert close(split, update[..., 1:, :])
    assert close(share[..., 1:] * update[..., 1:, :].norm(dim=-1), (update - (1 - a[..., :1]) * rest)[..., 1:, :].norm(dim=-1))
    # a head that reads the sink alone gets it all
    alone = torch.zeros_like(a)
    alone[..., 0] = 1
    assert close(sink_share(sink_mass(alone, causal(T)).mass, value, alone @ contents)[..., 1:], 1)
    assert sink_share(lam, value, 0 * update).isnan().all() and share[..., 0].isnan().all()


def test_value_ratio(seed):
    contents = normal(B, H, 6, D)
    contents = contents / contents.norm(dim=-1, keepdim=True) * torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 100.0]).view(6, 1)
    assert close(value_ratio(contents), 0.5 / 3)
    assert close(value_ratio(contents, 4), 3 / 2) and close(value_ratio(contents, 6), 100 / 2)
    assert close(value_ratio(contents[..., :5, :]), 0.5 / 2.5)  # the middle between the middle two
    assert value_ratio(contents[..., :1, :]).isnan().all()
    contents[..., 1:, :] = 0
    assert value_ratio(contents).isnan().all()


def test_equal_first_tokens_prove_nothing(seed):
    prompts, f = 40, normal(H, D, D)
    token = normal(D)
    same = (f @ token).expand(prompts, H, D)
    others = torch.einsum("hed,pd->phe", f, normal(prompts, D))
    assert close(value_cosine(same), 1)  # random operators, one first token
    mean = others.mean(0)
    assert close(value_cosine(same, mean), 1)
    assert value_cosine(same, same.mean(0)).isnan().all()  # nothing is left of them
    assert close(value_cosine(others, others.mean(0)), -1 / (prompts - 1), 0.02)
    # a constant in all contents looks like a sink until it is removed
    shifted = others + 20 * normal(H, D)
    assert (value_cosine(shifted) > 0.5).all()
    background = shifted + torch.einsum("hed,pd->phe", f, normal(prompts, D)) - others  # other tokens of the same kind
    assert (value_cosine(shifted, background.mean(0)).abs() < 0.25).all()
    unit = others / others.norm(dim=-1, keepdim=True)
    pairs = torch.einsum("phd,qhd->hpq", unit, unit)
    assert close(value_cosine(others), (pairs.sum((-2, -1)) - prompts) / (prompts * (prompts - 1)))


def test_cosine_of_independent_values():
    torch.manual_seed(0)
    draws = value_cosine(normal(10, 4000, D))
    sd = math.sqrt(2 / (10 * 9 * D))
    assert abs(draws.mean()) < 4 * sd / math.sqrt(4000) and abs(draws.std() / sd - 1) < 0.06
    values = normal(4, 1, D)
    values[1] = 0
    assert close(value_cosine(values), value_cosine(values[[0, 2, 3]])) and value_cosine(values[:2]).isnan()


def test_degenerate_patterns():
    one = torch.ones(B, H, 1, 1)
    assert (sink_rate(one, full(1)) == 1).all() and (sink_position(one, full(1)) == 1).all()
    mass = sink_mass(one, full(1))
    assert mass.mean.isnan().all() and mass.sd.isnan().all() and mass.mass.isnan().all()
    two = sink_mass(uniform(causal(2)), causal(2))
    assert close(two.mean, 0.5) and two.sd.isnan() and two.variation.isnan()
    nothing = sink_mass(torch.zeros(T, T), causal(T))
    assert close(nothing.mean, 0) and nothing.variation.isnan()
    assert sink_mass(-attention(normal(T, T), causal(T)), causal(T)).variation.isnan()  # a kernel of signed weights
    broken = uniform(causal(T)).expand(B, H, T, T).clone()
    broken[0, 0, 3, 0] = torch.nan
    for found in (sink_rate(broken, causal(T)), sink_position(broken, causal(T)), sink_mass(broken, causal(T)).mean):
        assert found[0, 0].isnan() and found.isnan().sum() == 1
    # what is hidden does not count, whatever stands there
    junk = uniform(causal(T)).masked_fill(~causal(T), torch.nan)
    assert close(importance(junk, causal(T)), importance(uniform(causal(T)), causal(T)))
    unseen = full(T)
    unseen[:, 2] = False
    assert importance(uniform(unseen), unseen)[2].isnan() and sink_rate(uniform(unseen), unseen, 3).isnan()
    assert sink_position(uniform(unseen), unseen) == 1
