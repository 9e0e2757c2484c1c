"""Family "lens": planted predictions, chance, and a model's own states read in one go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from builders import model, told, words
from torch import Tensor
from torch.nn import functional

from emformer.block import Step
from emformer.ffn import GELU
from emformer.model import Emformer
from emformer.norms import LayerNorm
from emformer.observables import Row
from emformer.observables import lens as family
from emformer.observables.lens import Lens
from emformer.placements import PostNorm, SandwichNorm, Sphere
from emformer.trajectory import Trajectory, capture


def found(trajectories: Trajectory | Sequence[Trajectory]) -> list[Row]:
    return told(Lens(), trajectories)


def only(rows: list[Row], key: str, layer: int | None = None, point: str | None = None) -> Row:
    (row,) = [r for r in rows if (r.key, r.layer, r.point) == (key, layer, point)]
    return row


def legible(size: int) -> Emformer:
    """A model whose logits are the state itself."""
    net = model(vocab=size, dim=size, heads=1, norm=None, depth=1)
    with torch.no_grad():
        net.unembedding.weight.copy_(torch.eye(size))
    return net


def planted(net: Emformer, logits: Sequence[Tensor], points: Sequence[tuple[int, str]]) -> Trajectory:
    """A trajectory of a legible model through these logits (B, T, V)."""
    pairs = zip(points, logits, logits[1:], strict=False)
    return Trajectory([Step(layer, point, a, a, None, b - a, b) for (layer, point), a, b in pairs], model=net)


def test_a_model_is_read_as_all_logits_at_once_say(seed):
    net = model(ffn=GELU(), norm=LayerNorm(bias=True))
    seen = capture(net, words(7, batch=4))
    rows, final = found(seen), net(seen.tokens).log_softmax(-1)
    goal = final.argmax(-1)
    for state in seen.states:
        log_p = net.unembed(state.x).log_softmax(-1)
        at = state.layer, state.point
        values = {
            "lens.entropy": -(log_p.exp() * log_p).sum(-1),
            "lens.kl": functional.kl_div(log_p, final, reduction="none", log_target=True).sum(-1),
            "lens.rank": 1.0 + (log_p > log_p.gather(-1, goal.unsqueeze(-1))).sum(-1).double(),
            "lens.agreement": (log_p.argmax(-1) == goal).double(),
        }
        for key, value in values.items():
            row, each = only(rows, key, *at), value.detach().mean(1)
            assert row.mean == pytest.approx(float(each.mean()), abs=1e-9), key
            assert row.sd == pytest.approx(float(each.std()), abs=1e-9) and row.n_valid == 4
    last = 1, "ffn"
    assert only(rows, "lens.kl", *last).mean == 0 and only(rows, "lens.rank", *last).mean == 1
    assert only(rows, "lens.agreement", *last).mean == 1
    assert only(rows, "lens.entropy", *last).null == math.log(11) and only(rows, "lens.rank", *last).null == 6
    assert only(rows, "lens.agreement", *last).null == 1 / 11 and only(rows, "lens.kl", *last).null is None
    # whole layers alone: X^0, X^1, X^2
    whole = [net.unembed(seen.clouds[k]).log_softmax(-1) for k in (0, 2, 4)]
    tops = torch.stack([one.argmax(-1) for one in whole])
    entropies = torch.stack([-(one.exp() * one).sum(-1) for one in whole])
    depths, steps = [], []
    for b in range(4):
        depths.append([min(k for k in range(3) if all(tops[m, b, t] == tops[2, b, t] for m in range(k, 3))) for t in range(7)])
        falls = (entropies[:-1, b] - entropies[1:, b]).tolist()
        steps.append([0 if falls[0][t] >= falls[1][t] else 1 for t in range(7) if max(falls[0][t], falls[1][t]) > 0])
    assert only(rows, "lens.collapse_depth").mean == pytest.approx(sum(sum(d) / 7 for d in depths) / 4)
    told = [sum(one) / len(one) for one in steps if one]
    assert only(rows, "lens.caustic_depth").mean == pytest.approx(sum(told) / len(told))
    assert only(rows, "lens.caustic_depth").n_valid == len(told)


def test_a_planted_decision_is_found():
    """Four layers of attention and FFN: the third layer decides, its half step already; a detour before does not count."""
    net = legible(5)
    none, right, wrong = (torch.zeros(2, 3, 5, dtype=torch.float64) for _ in range(3))
    right[..., 2], wrong[..., 4] = 9.0, 3.0
    points = [(layer, point) for layer in range(4) for point in ("attn", "ffn")]
    logits = [wrong, right, right, wrong, none, right, right, 1.01 * right, 1.02 * right]
    rows = found(planted(net, logits, points))
    assert only(rows, "lens.collapse_depth").mean == 3 and only(rows, "lens.caustic_depth").mean == 2
    assert [only(rows, "lens.agreement", *at).mean for at in [(0, "embed"), *points]] == [0, 1, 1, 0, 0, 1, 1, 1, 1]
    assert only(rows, "lens.rank", 1, "ffn").mean == 3, "the mean rank of five equal ones"
    assert only(rows, "lens.entropy", 1, "ffn").mean == pytest.approx(math.log(5))
    assert only(rows, "lens.rank", 0, "embed").mean == 3.5
    assert only(rows, "lens.kl", 0, "ffn").mean == pytest.approx(0, abs=1e-3)
    grown = found(planted(net, [right, right, wrong], points[1::2][:2]))
    assert only(grown, "lens.caustic_depth").mean is None and only(grown, "lens.caustic_depth").n_dropped == 2
    silent = found(planted(net, [right, right, none], points[1::2][:2]))
    for key, at in (("lens.rank", (0, "embed")), ("lens.agreement", (1, "ffn")), ("lens.collapse_depth", (None, None))):
        assert only(silent, key, *at).mean is None, "the model means no token"


def test_states_that_know_nothing_are_the_null():
    torch.manual_seed(0)
    net, points = legible(3), [(0, "block"), (1, "block"), (2, "block")]
    rows = found(planted(net, list(torch.randn(4, 400, 6, 3, dtype=torch.float64)), points))
    row = only(rows, "lens.collapse_depth")
    assert row.null == pytest.approx(3 - 1 / 3 - 1 / 9 - 1 / 27) and abs(row.mean - row.null) < 4 * row.se
    for at in ((0, "embed"), (0, "block"), (1, "block")):
        for key in ("lens.agreement", "lens.rank"):
            row = only(rows, key, *at)
            assert abs(row.mean - row.null) < 4 * row.se
    flat = model()
    with torch.no_grad():
        flat.unembedding.weight.zero_()
    row = only(found(capture(flat, words(5))), "lens.entropy", 1, "attn")
    assert row.mean == pytest.approx(row.null) == math.log(11)


def test_logits_are_made_some_tokens_at_a_time(monkeypatch):
    net, sizes = model(ffn=GELU(), dtype=torch.float32), []
    tokens, unembed = words(9, batch=5), net.unembed
    whole = found(capture(net, tokens))

    def watched(x: Tensor) -> Tensor:
        logits = unembed(x)
        sizes.append(logits.numel() * logits.element_size())
        return logits

    monkeypatch.setattr(net, "unembed", watched)
    for bytes_, calls in ((44, 45), (44 * 7 + 5, 7), (1, 45), (1 << 26, 1)):
        sizes.clear()
        monkeypatch.setattr(family, "BYTES", bytes_)
        for one, two in zip(whole, found(capture(net, tokens)), strict=True):
            assert one[:3] == two[:3] and one.n_valid == two.n_valid == 5
            assert one.mean == pytest.approx(two.mean, rel=1e-4, abs=1e-5)
        assert max(sizes) <= max(bytes_, 44) and len(sizes) == 5 * calls, "one state at a time, each once"


def test_other_kinds_of_models_and_prompts():
    torch.manual_seed(0)
    for change in ({"placement": PostNorm()}, {"placement": SandwichNorm()}, {"placement": Sphere()}, {"norm": None}):
        net = model(**change)
        seen = capture(net, words(5))
        final = net(seen.tokens).log_softmax(-1).detach()
        told = only(found(seen), "lens.entropy", 1, "attn").mean
        assert told == pytest.approx(float(-(final.exp() * final).sum(-1).mean()), abs=1e-9)
    net = model(norm=LayerNorm())
    found(capture(net, words(1)))
    with torch.no_grad():
        net.embedding.weight.zero_()
    rows = found(capture(net, words(5)))
    assert only(rows, "lens.agreement", 1, "attn").mean is None and only(rows, "lens.collapse_depth").mean is None
