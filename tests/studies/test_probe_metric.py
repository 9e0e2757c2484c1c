"""The study of noise on probe and metric: its noise, its theory, its gauges and its units (math H.1, J 25; S2 9.1)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from studied import VOCAB, small, subject

from emformer.geometry.disturbance import divergence
from emformer.kernels import L2, Sigmoid, Softmax
from emformer.masks import Full
from emformer.norms import LayerNorm
from emformer.operators import Dense, LowRank, Tied
from emformer.parts import UserError
from emformer.positions import KeyNorm, RoPE
from emformer.settings import Drift, Functional
from emformer.studies.claims import probe_metric
from emformer.studies.claims.probe_metric import ProbeMetric, designed, regauged, stirred, theory
from emformer.surgery import noise
from emformer.trajectory import capture

GQA = LowRank(rank=4, groups=2)
BIASED = dict(functional=Functional(), drift=Drift())
ZOO = {
    "rope": dict(positions=[RoPE()], norm=LayerNorm(bias=True), kernel=Softmax(beta=1.5), **BIASED),
    "grouped": dict(heads=4, form=GQA, content=GQA, positions=[RoPE(fraction=0.5, offset=3)], mask=Full()),
    "dense": dict(form=Dense(), content=Dense(), **BIASED),
    "tied, rope": dict(form=Dense(), content=Tied(), positions=[RoPE()]),
}
each = pytest.mark.parametrize("member", ZOO)
NAMES = ("M", "trained", "raw", "balanced", "relative", "tokens", "gauge", "dip", "slope")


def quiet(share: float, word: str) -> None:
    pass


def verdicts(*subjects, draws: int = 2):
    found = ProbeMetric(draws=draws).run(subjects, quiet)
    return dict(zip(NAMES, found.verdicts, strict=True)), found


def words(count: int = 12, batch: int = 3) -> torch.Tensor:
    return torch.randint(VOCAB - 1, (batch, count), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("member", ["rope", "grouped"])
def test_the_theory_is_what_small_noise_costs(member):
    """KL of attention's rows at sigma = .01, mean over rows and 12 draws a side, within 20 %: through RoPE, groups and biases."""
    net, draws, sigma = small(dtype=torch.float64, **(dict(depth=1) | ZOO[member])), 12, 1e-2
    net.layer(0).attention.form.left_rows().mul_(2)
    gauges, missing = probe_metric._gauges(net)
    assert not missing
    clean = capture(net, words())
    told = theory(clean, gauges)
    kinds = list(probe_metric._noises(gauges))
    assert told.keys() == {(pair, side) for pair, side, _ in kinds}
    a, y, i = clean.pattern(0), clean.steps[0].read, torch.arange(12)
    for pair, side, noisy in kinds:
        costs = [divergence(a, noisy(sigma, seed).layer(0).attention.weights(y, i)).mean() for seed in range(draws)]
        ratio = float(torch.stack(costs).mean()) / sigma**2 / told[pair, side].mean()
        assert abs(ratio - 1) < 0.2, (pair, side, ratio)


@torch.no_grad()
@each
def test_the_other_gauge_is_the_same_function(member):
    net, tokens = small(dtype=torch.float64, **ZOO[member]), words()
    other = regauged(net, 2.0)
    assert (other(tokens) - net(tokens)).abs().max() < 1e-12
    y, i = next(net.flow(tokens)).read, torch.arange(12)
    (u, v), (p, q) = net.layer(0).attention.factors(y, i), other.layer(0).attention.factors(y, i)
    assert (p - u / 2).abs().max() < 1e-12 and (q - 2 * v).abs().max() < 1e-12
    shared = net.layer(0).attention.form.identity_right  # heads that share a right factor share its noise: written out they do
    for side in ("left",) if shared else ("left", "right"):  # noise on M knows no gauge
        logits = [noise(one, 0.2, side, 5)(tokens) for one in (net, other)]
        assert (logits[0] - logits[1]).abs().max() < 1e-10 < (logits[0] - net(tokens)).abs().max()


def test_what_reads_the_factors_has_no_other_gauge():
    for fields in (dict(kernel=L2(), form=LowRank(rank=4, balanced=True)), dict(positions=[KeyNorm()])):
        net = small(**fields)
        with pytest.raises(UserError, match="no other gauge"):
            regauged(net, 2.0)


@torch.no_grad()
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("member", ["rope", "tied, rope"])
def test_noise_on_what_a_token_is_read_as(member, side):
    net, tokens = small(dtype=torch.float64, **ZOO[member]), words(batch=40)
    copy, y = stirred(net, side, 0.1, 4), next(net.flow(tokens)).read
    old, new = net.layer(0).attention, copy.layer(0).attention
    was, now = (old.queries(y), old.keys(y)), (new.queries(y), new.keys(y))
    assert torch.equal(was[1 - side], now[1 - side]) and torch.equal(old.content.right(y), new.content.right(y))
    n = torch.randn(y.shape, generator=probe_metric.generator("noise", "tokens", side, 4, 0), dtype=torch.float64)
    assert abs(n.std() - 1) < 0.05
    moved = y + 0.1 * y.square().mean(-1, keepdim=True).sqrt() * n
    assert (now[side] - (old.queries(moved), old.keys(moved))[side]).abs().max() < 1e-12
    assert torch.equal(copy(tokens), copy(tokens)) and not torch.equal(copy(tokens), stirred(net, side, 0.1, 5)(tokens))
    assert not torch.equal(copy.layer(1).attention.form._noisy(y), new.form._noisy(y))


def test_each_text_is_seen_by_one_draw():
    groups = np.array([5, 5, 2, 9, 9, 1, 0, 3])  # six texts
    lots, by = designed(groups, 4)
    assert by == "draws" and [unit for unit, _ in lots] == [0, 1, 2, 3]
    assert sorted(np.concatenate([prompts for _, prompts in lots])) == list(range(8))
    seen = [set(groups[prompts]) for _, prompts in lots]
    assert all(not a & b for k, a in enumerate(seen) for b in seen[:k]) and min(map(len, seen)) == 1
    lots, by = designed(groups, 13)
    assert by == "prompts" and len(lots) == 13
    for unit, prompts in lots:
        texts = set(groups[prompts])
        assert len(texts) == 1 and all(texts == set(groups[other]) for one, other in lots if one == unit)
    assert {unit for unit, _ in lots} == set(range(6))


@torch.no_grad()
def planted(size: float):
    """M = I + size w e_0^T, where e_0 is what all keys have in common: a shift of each row, which no weight notices, but a
    metric that is bent turns it into much else."""
    net = small(depth=1, heads=1, norm=None, form=Dense(), content=Dense())
    net.embedding.weight[:, 0] = 1.0
    m = torch.eye(8)
    m[1:, 0] += size
    net.layer(0).attention.form.left_factor[0] = m.mT
    return net


def test_a_planted_asymmetry_is_found(monkeypatch):
    """And beside it: outputs in another gauge are the same, K/Q goes as c^-4, small noise costs as its square."""
    monkeypatch.setattr(probe_metric, "SIGMAS", (0.01, 0.05, 0.1))  # for speed
    with torch.no_grad():
        none = planted(0.0).double()
        told = theory(capture(none, words()), {"raw": none})
    assert np.allclose(told["M", 0], told["M", 1], rtol=1e-9)  # M = I: left is right
    found, findings = verdicts(subject(planted(2.5), prompts=14, length=7), draws=7)
    assert found["M"].word == found["trained"].word == "supported" and found["M"].measured.of == "draws"
    assert found["gauge"].word == "holds" and abs(found["gauge"].measured.value + 4 * math.log(2)) < 0.1
    assert found["gauge"].measured.n == 7 and "at most 0 nats" in found["gauge"].why
    assert abs(found["slope"].measured.value - 2) < 0.15
    assert set(findings.charts) == {"output", "attention", "ratio"}
    panels = findings.charts["attention"].frame
    assert len(set(panels.panel)) == 7 and set(panels.line) == {"probe", "metric", "theory probe", "theory metric"}
    frame = findings.charts["ratio"].frame.set_index(["panel", "line", "x"]).loc["rows of attention"]
    assert frame.low["(I + E) M, M (I + E)", 0.01] > 2
    for line in ("(I + E) M, M (I + E)", "raw q, k", "raw q/2, 2k", "balanced q, k", "relative q, k"):
        assert 0.5 < frame.y[line, 0.01] / frame.y[f"theory {line}", 0.01] < 2, line
    assert abs(frame.y["theory raw q, k", 0.01] / frame.y["theory raw q/2, 2k", 0.01] / 16 - 1) < 1e-9


def test_other_models_and_what_it_says_of_them(monkeypatch):
    monkeypatch.setattr(probe_metric, "SIGMAS", (0.01, 0.05, 0.1))  # for speed

    def short(net, **fields):
        return subject(net, prompts=2, length=5, **fields)

    read, findings = verdicts(short(small(positions=[KeyNorm()], depth=1, heads=1)))
    assert math.isnan(read["gauge"].measured.value) and math.isnan(read["balanced"].measured.value)
    assert "no other gauge" in read["gauge"].reason and "undefined here" in findings.note and "not drawn" in findings.note
    assert math.isfinite(read["raw"].measured.value) and "theory probe" not in set(findings.charts["attention"].frame.line)
    free, findings = verdicts(short(small(kernel=Sigmoid(), depth=1, heads=1)), draws=3)
    assert math.isfinite(free["M"].measured.value) and "attention" not in findings.charts and "no KL here" in findings.note
    assert free["M"].measured.of == "prompts" and free["M"].measured.n == 2 and free["M"].word == "undecided"
    with pytest.raises(UserError, match="draws is 1"):
        ProbeMetric(draws=1)
