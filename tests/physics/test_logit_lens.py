"""The logit lens: entropies and divergences in closed form, ranks against scipy, depths of planted trajectories."""

from __future__ import annotations

import math

import torch
from scipy.stats import entropy as kullback
from scipy.stats import rankdata
from torch import Tensor

from emformer.geometry import lens
from emformer.geometry.lens import caustic_depth, collapse_depth, entropy, read

B, T, V = 3, 5, 11


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(got: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> bool:
    assert got.dtype == torch.float64
    return bool(((got - expected).abs() < tolerance).all())


def test_closed_forms(seed):
    last = normal(B, T, V)
    flat = torch.full((B, T, V), 7.3, dtype=torch.float64)
    assert close(entropy(flat), math.log(V)) and close(read(flat, last).entropy, math.log(V))
    assert close(read(flat, last).rank, (V + 1) / 2)
    assert close(read(flat, last).divergence, math.log(V) - entropy(last))  # KL(p | uniform) = log V - H
    # two tokens: the binary entropy, and KL of Bernoulli laws
    p, q = 0.2, 0.7
    law = torch.tensor([[p, 1 - p], [q, 1 - q]], dtype=torch.float64).log()
    binary = torch.tensor([-(x * math.log(x) + (1 - x) * math.log(1 - x)) for x in (p, q)], dtype=torch.float64)
    assert close(entropy(law), binary)
    expected = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert close(read(law[:1], law[1:]).divergence, expected)
    # one token holds everything
    sure = torch.zeros(1, V, dtype=torch.float64)
    sure[0, 4] = 1e4
    assert close(entropy(sure), 0) and read(sure, last[0, :1]).top == 4
    assert close(read(sure, sure).divergence, 0) and (read(flat[0, :1], sure).divergence - math.log(V)).abs() < 1e-12


def test_against_scipy(seed):
    for scale in (0.1, 3.0, 100.0):
        s, last = scale * normal(B, T, V), scale * normal(B, T, V)
        found = read(s, last)
        p, q = last.softmax(-1), s.softmax(-1)
        assert close(found.entropy, torch.from_numpy(kullback(q.numpy(), axis=-1)), 1e-10) and torch.equal(
            found.entropy, entropy(s)
        )
        if scale < 10:  # q does not underflow
            assert close(found.divergence, torch.from_numpy(kullback(p.numpy(), q.numpy(), axis=-1)), 1e-10)
        assert (found.divergence >= 0).all() and found.divergence.isfinite().all()
        ranks = torch.from_numpy(rankdata(-s.numpy(), axis=-1))
        assert close(found.rank, ranks.gather(-1, last.argmax(-1, keepdim=True)).squeeze(-1))
        assert torch.equal(found.top, s.argmax(-1))
        # a constant in the logits is no part of the law, and log-probabilities are logits
        for same in (s + 50 * normal(B, T, 1), s.log_softmax(-1)):
            again = read(same, last.log_softmax(-1))
            assert close(again.entropy, found.entropy, 1e-9) and close(again.divergence, found.divergence, 1e-9)
            assert torch.equal(again.rank, found.rank)


def test_ties_share_their_rank(seed):
    s = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for top, rank in ((0, 1), (1, 3), (2, 3), (3, 3), (4, 5)):
        last = torch.zeros(1, 5)
        last[0, top] = 1
        assert close(read(s, last).rank, rank)


def test_the_last_layer_is_itself(seed):
    for dtype in (torch.float32, torch.float64):
        s = (5 * normal(B, T, V)).to(dtype)
        found = read(s, s)
        assert (found.divergence == 0).all() and (found.rank == 1).all() and torch.equal(found.top, s.argmax(-1))


def test_chunks_change_nothing(seed, monkeypatch):
    s, last = normal(B, T, V), normal(B, T, V)
    whole = *read(s, last), entropy(s)
    for chunk in (1, 2 * V, 4 * V + 1):
        monkeypatch.setattr(lens, "CHUNK", chunk)
        for a, b in zip(whole, (*read(s, last), entropy(s)), strict=True):
            assert torch.equal(a, b)
    assert read(s[0, 0], last[0, 0]).entropy.shape == () and read(s[:0], last[:0]).top.shape == (0, T)


def test_collapse_depth():
    tops = torch.tensor(
        [
            [5, 5, 1, 9, 5],
            [5, 1, 2, 5, 5],
            [5, 5, 3, 9, 5],
            [5, 5, 4, 5, 7],
        ]
    )
    assert collapse_depth(tops).tolist() == [0, 2, 3, 3, 3]
    # against its definition
    torch.manual_seed(0)
    tops = torch.randint(0, 2, (6, 40, 3))
    for where in torch.cartesian_prod(torch.arange(40), torch.arange(3)):
        column = tops[:, where[0], where[1]].tolist()
        expected = min(k for k in range(6) if all(top == column[-1] for top in column[k:]))
        assert collapse_depth(tops)[where[0], where[1]] == expected
    assert (collapse_depth(tops[:1]) == 0).all()
    # no top: never in agreement, and nothing to agree with
    assert collapse_depth(torch.tensor([[5, -1], [-1, 3], [5, -1]])).nan_to_num(-9).tolist() == [2, -9]
    # of V random tops most collapse at the end
    tops = torch.randint(0, 50, (8, 4000))
    assert abs((collapse_depth(tops) == 7).double().mean() - 0.98) < 0.01


def test_caustic_depth():
    h = torch.tensor([[3.0, 3.0, 3.0], [2.5, 1.0, 3.5], [0.5, 0.9, 3.6], [0.1, 0.8, 3.7]])
    assert caustic_depth(h).nan_to_num(-9).tolist() == [1, 0, -9]
    assert caustic_depth(h[:1]).isnan().all() and caustic_depth(torch.ones(4, 2)).isnan().all()
    h[2, 1] = torch.nan
    assert caustic_depth(h).nan_to_num(-9).tolist() == [1, -9, -9]
    torch.manual_seed(0)
    h = normal(6, 30)
    expected = [max(range(5), key=lambda k: h[k, i] - h[k + 1, i]) for i in range(30)]
    assert caustic_depth(h).tolist() == expected


def test_a_planted_decision_is_found(seed):
    target, depth, layers = torch.randint(0, V, (B, T)), torch.randint(0, 5, (B, T)), 6
    states = [torch.full((B, T, V), 0.01).scatter(-1, ((target + 1) % V).unsqueeze(-1), 0.1) for _ in range(layers)]
    for layer in range(layers):
        sure = torch.zeros(B, T, V).scatter(-1, target.unsqueeze(-1), 6.0)
        states[layer] = torch.where((depth < layer).unsqueeze(-1), sure, states[layer])
    found = [read(state, states[-1]) for state in states]
    assert torch.equal(collapse_depth(torch.stack([one.top for one in found])), depth + 1.0)
    assert torch.equal(caustic_depth(torch.stack([one.entropy for one in found])), depth.double())
    divergence = torch.stack([one.divergence for one in found])
    assert (divergence[-1] == 0).all() and (divergence.diff(dim=0) <= 0).all()


def test_degenerate_logits():
    torch.manual_seed(0)
    s, last = normal(4, V), normal(4, V)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = s.clone()
        broken[1, 2] = bad
        found = read(broken, last)
        assert all(x.isnan().tolist() == [False, True, False, False] for x in found[:3])
        assert entropy(broken)[1].isnan() and (found.top >= 0).tolist() == [True, bad == -torch.inf, True, True]
        reverse = read(last, broken)
        assert reverse.divergence.isnan().tolist() == reverse.rank.isnan().tolist() == [False, True, False, False]
        assert not reverse.entropy.isnan().any()
    zero = torch.zeros(4, V)
    found = read(s, zero)
    assert found.rank.isnan().all() and found.divergence.isfinite().all() and (read(zero, s).top == -1).all()
    single = read(torch.randn(4, 1), torch.randn(4, 1))
    assert close(single.entropy, 0) and close(single.divergence, 0)
