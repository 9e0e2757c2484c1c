"""Family "sinks": what uniform attention looks like, planted sinks, and the cosine that proves nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from builders import model, only, told, words
from torch import Tensor

from emformer import parts
from emformer.block import Parallel
from emformer.diagnostics import effective
from emformer.ffn import GELU
from emformer.kernels import Linear, Sigmoid, SinkSoftmax, Softmax, Unnormalised
from emformer.masks import All, Causal, Full, Window
from emformer.norms import LayerNorm, RMSNorm
from emformer.observables import Row
from emformer.observables.sinks import Sinks, contents
from emformer.operators import Dense, LowRank
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Drift, Functional
from emformer.trajectory import Trajectory, capture

GIVEN: dict[str, Any] = {"functional": Functional(), "drift": Drift()}
WEIGHTS = {"attn.sink_rate", "sink.mass", "sink.variation", "sink.argmax"}
CONTENTS = {"sink.share", "sink.drain", "sink.value_cos"}


def found(trajectories: Trajectory | Sequence[Trajectory], observable: Sinks | None = None) -> list[Row]:
    return told(observable or Sinks(), trajectories)


def rate(rows: list[Row], head: int | None = None, layer: int | None = 0) -> Row:
    return only(rows, "attn.sink_rate", head, layer, "k=1")


def keys(rows: list[Row]) -> set[str]:
    return {row.key.removesuffix(".undefined") for row in rows}


def written(trajectory: Trajectory, k: int) -> Tensor:
    """F_eff yhat_j (B, H, T, d), written here."""
    x, norm = trajectory.steps[k].before, trajectory.block(k).read_attn
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    y = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return torch.einsum("btd,hed->bhte", y, effective(trajectory.block(k)).content)


def planted(size: float, **change: Any) -> Any:
    """Token 0 is read as the first axis by every head, and others are not: s_ij = size for token 0."""
    net = model(form=Dense(), content=Dense(), functional=Functional(), norm=RMSNorm(gain=False), depth=1, **change)
    with torch.no_grad():
        net.embedding.weight[:, 0] = 0
        net.embedding.weight[0] = torch.eye(8)[0]
        net.layer(0).attention.form.left_factor.zero_()
        net.layer(0).attention.biases.left.copy_(size / math.sqrt(8) * torch.eye(8)[:1].expand(2, 8))
    return net


# Weights --------------------------------------------------------------------------------------------------------------


def test_uniform_attention_is_the_null():
    """M = 0, whatever the mask: no sink on a long prompt, one on a short prompt, and the null says the same."""
    torch.manual_seed(0)
    masks = [Causal(), Full(), Window(size=4), All([Causal(), Window(size=3)])]
    kernels: list[parts.Kernel] = [Softmax(), Sigmoid(), SinkSoftmax(learned=False)]
    for mask, kernel in [*itertools.product(masks, kernels[:1]), *itertools.product(masks[:1], kernels[1:])]:
        net = model(form=Dense(), mask=mask, kernel=kernel)
        with torch.no_grad():
            for block in net.blocks:
                block.attention.form.left_factor.zero_()
        for tokens in (20, 6):
            rows = found(capture(net, words(tokens)))
            for key, head in itertools.product(WEIGHTS, (None, 0, 1)):
                row = only(rows, key, head, param="k=1" if key == "attn.sink_rate" else None)
                assert row.mean == pytest.approx(row.null, abs=1e-9), (mask, kernel, key)
            assert rate(rows, layer=None).mean == pytest.approx(rate(rows, layer=None).null, abs=1e-9)
            if mask == Causal():
                assert rate(rows).mean == rate(rows, layer=None).mean == (0 if tokens == 20 else 1)
                assert only(rows, "sink.mass").null == pytest.approx(sum(1 / i for i in range(2, tokens + 1)) / (tokens - 1))
                assert only(rows, "sink.argmax").null == 1, "uniform causal attention looks at the first token most"
            if mask == Full():
                assert only(rows, "sink.variation").mean == pytest.approx(0, abs=1e-9)


def test_a_planted_sink_is_found():
    tokens = words(20, batch=6)
    tokens[tokens == 0] = 1
    tokens[:, 0] = 0
    net = planted(12.0)
    rows = found(capture(net, tokens))
    for head in (None, 0, 1):
        assert rate(rows, head).mean == 1 and rate(rows, head).null == 0
        assert only(rows, "sink.mass", head).mean > 0.99 and only(rows, "sink.variation", head).mean < 0.01
        assert only(rows, "sink.argmax", head).mean == 1
        assert only(rows, "sink.share", head).mean == pytest.approx(1, abs=0.02)
    assert rate(rows, layer=None).mean == 1
    with torch.no_grad():  # a drain: what is read of the first token is written nowhere
        net.layer(0).attention.content.left_factor[:, 0] = 0
    drained = found(capture(net, tokens))
    assert only(drained, "sink.drain").mean == pytest.approx(0, abs=1e-12) == only(drained, "sink.share").mean
    assert only(drained, "sink.mass").mean == only(rows, "sink.mass").mean
    away = found(capture(planted(-12.0), tokens))
    assert only(away, "sink.mass").mean < 1e-4 and rate(away).mean == only(away, "sink.argmax").mean == 0


def test_against_loops(seed):
    count, mask = 12, [Causal(), Full(), All([Causal(), Window(size=9)])][seed % 3]
    net = model(norm=LayerNorm(bias=True), mask=mask, positions=[RoPE()], content=LowRank(rank=3), **GIVEN)
    seen = capture(net, words(count, batch=3))
    rows, k = found(seen, Sinks(threshold=0.15)), 1
    a, table, c = seen.pattern(k), seen.visible(k), written(seen, k)
    assert (contents(seen, k).norm(dim=-1) - c.norm(dim=-1)).abs().max() < 1e-9
    values: dict[str, Tensor] = {key: torch.zeros(3, 2) for key in (*WEIGHTS, "sink.share", "sink.drain")}
    for b, h in itertools.product(range(3), range(2)):
        w = a[b, h]
        alpha = [float(sum(w[i, j] for i in range(count) if table[i, j]) / table[:, j].sum()) for j in range(count)]
        lam = torch.stack([w[i, 0] for i in range(count) if table[i, 0] and table[i].sum() > 1])
        rest = [j for j in range(count) if table[:, j].sum() >= table.sum(0).max() / 2]
        size = c[b, h].norm(dim=-1)
        parts_of = [w[i, 0] * size[0] / (w[i] @ c[b, h]).norm() for i in range(count) if table[i, 0] and table[i].sum() > 1]
        each = {
            "attn.sink_rate": float(alpha[0] > 0.15),
            "sink.mass": float(lam.mean()),
            "sink.variation": float(lam.std() / lam.mean()),
            "sink.argmax": float(max(rest, key=lambda j: alpha[j]) == 0),
            "sink.share": float(sum(parts_of) / len(parts_of)),
            "sink.drain": float(size[0] / size[1:].sort().values[5]),
        }
        assert count == 12 and len(size[1:]) == 11, "the median of eleven is the sixth"
        for key, value in each.items():
            values[key][b, h] = value
    for key, table_of in values.items():
        for head, column in [(None, table_of.mean(1)), *enumerate(table_of.unbind(1))]:
            row = only(rows, key, head, k, "k=1" if key == "attn.sink_rate" else None)
            assert row.mean == pytest.approx(float(column.mean()), abs=1e-6), key
            assert row.sd == pytest.approx(float(column.std()), abs=1e-6) and row.n_valid == 3
    layers = [rate(rows, layer=layer).mean for layer in (0, 1)]
    assert rate(rows, layer=None).mean == pytest.approx(sum(layers) / 2)


def test_weights_that_do_not_sum_to_one():
    torch.manual_seed(0)
    for kernel in (SinkSoftmax(), Sigmoid(), Unnormalised()):
        seen = capture(model(kernel=kernel), words(12))
        rows, a = found(seen), seen.pattern(0)
        assert only(rows, "sink.unspent", 1).mean == pytest.approx(float((1 - a[:, 1].sum(-1)).mean()), abs=1e-9)
        lam = (a / a.sum(-1, keepdim=True))[..., 1:, 0]
        assert only(rows, "sink.mass", 1).mean == pytest.approx(float(lam[:, 1].mean()), abs=1e-9)
    assert keys(found(capture(model(kernel=Softmax()), words(12)))) == WEIGHTS | CONTENTS
    signed = found(capture(model(kernel=Linear()), words(12)))
    assert keys(signed) == CONTENTS, "negative weights are no shares"
    assert WEIGHTS | CONTENTS | {"sink.unspent"} == set(Sinks.keys)


# Contents -------------------------------------------------------------------------------------------------------------


def test_the_same_first_token_has_the_same_content_by_causality(seed):
    """math J 25: cosine 1 on an untrained causal model, at every layer and head, raw and with the mean removed."""
    for dtype, positions in ((torch.float64, []), (torch.float32, [RoPE()])):
        net = model(vocab=40, dtype=dtype, depth=3, positions=positions, ffn=GELU(), norm=LayerNorm(bias=True), **GIVEN)
        tokens = words(9, batch=20, vocab=40)
        tokens[:12, 0] = 7
        rows = found(capture(net, tokens))
        for layer, head, cloud in itertools.product(range(3), (None, 0, 1), ("raw", "centred")):
            row = only(rows, "sink.value_cos", head, layer, "same", cloud)
            assert row.mean == pytest.approx(1, abs=1e-6) and row.null == 1.0 and row.n_valid >= 12
            other = only(rows, "sink.value_cos", head, layer, "different", cloud)
            assert abs(other.mean) < 0.9 and other.null == 0.0
            assert other.n_valid == len(tokens[:, 0].unique()) and other.n_valid + other.n_dropped == 20
    for mask in (Full(), Window(size=3)):
        seen = capture(model(vocab=40, depth=3, mask=mask), tokens)
        rows = found(seen)
        assert only(rows, "sink.value_cos", layer=0, param="same").mean == pytest.approx(1, abs=1e-6), "it saw nothing yet"
        assert only(rows, "sink.value_cos", layer=0, param="same").null == 1.0
        assert only(rows, "sink.value_cos", layer=2, param="same").mean < 1 - 1e-6, "without causality it knows its context"
        assert only(rows, "sink.value_cos", layer=2, param="same").null is None


def test_cosines_between_prompts_against_loops(seed):
    net = model(vocab=6, content=LowRank(rank=3), mask=Full(), norm=LayerNorm(bias=True))
    tokens = words(7, batch=14, vocab=6)
    seen = capture(net, tokens)
    rows, k = found(seen, Sinks(control=3)), 1
    c = written(seen, k)
    mean = c[:, :, 1:].mean((0, 2))
    for cloud, param in itertools.product(("raw", "centred"), ("same", "different", "control")):
        place = 2 if param == "control" else 0
        ids, v = tokens[:, place].tolist(), c[:, :, place] - (mean if cloud == "centred" else 0)
        u = v / v.norm(dim=-1, keepdim=True)
        if param == "same":
            pairs = [(p, q) for p in range(14) for q in range(p) if ids[p] == ids[q]]
            used = {p for pair in pairs for p in pair}
        else:
            used = {ids.index(token) for token in ids}
            pairs = [(p, q) for p in used for q in used if q < p]
        each = torch.stack([(u[p] * u[q]).sum(-1) for p, q in pairs]).mean(0)
        for head, value in [(None, each.mean()), *enumerate(each)]:
            row = only(rows, "sink.value_cos", head, k, param, cloud)
            assert row.mean == pytest.approx(float(value), abs=1e-9), (cloud, param)
            assert (row.n_valid, row.n_dropped) == (len(used), 14 - len(used)) and row.sd is None is row.se


def test_the_null_of_independent_contents():
    """Tokens drawn anew, contents as the model writes them: the mean cosine over pairs has the told sd, for each head and all."""
    torch.manual_seed(0)
    net = model(vocab=30, dim=32, heads=4, depth=1, content=LowRank(rank=8, groups=2), norm=RMSNorm(), form=LowRank(rank=8))
    seen = capture(net, torch.arange(30)[:, None].expand(30, 2).contiguous())
    rows, content = found(seen, Sinks(control=2)), effective(seen.block(0)).content
    written = torch.randn(2000, 1, 30, 32, dtype=torch.float64) @ content.mT
    units = written / written.norm(dim=-1, keepdim=True)
    cosines = (units.sum(-2).square().sum(-1) - 30) / (30 * 29)
    for head, drawn in [(None, cosines.mean(1)), *enumerate(cosines.unbind(1))]:
        for param in ("different", "control"):
            row = only(rows, "sink.value_cos", head, param=param)
            assert row.null_sd == pytest.approx(float(drawn.std()), rel=0.08)
            assert abs(drawn.mean()) < 4 * row.null_sd / math.sqrt(2000)


def test_memory_is_bounded():
    net, prompts = model(vocab=40), words(8, batch=60, vocab=40)
    observation = Sinks(prompts=10).begin()
    for some in prompts.split(6):
        observation.update(capture(net, some))
    rows = observation.rows()
    for param in ("same", "different", "control"):
        row = only(rows, "sink.value_cos", param=param)
        assert row.n_valid + row.n_dropped == 10
    assert only(rows, "sink.mass").n_valid == 60


# Everything -----------------------------------------------------------------------------------------------------------


def test_degenerate_prompts_are_undefined_not_wrong():
    torch.manual_seed(0)
    net = model(norm=LayerNorm())
    lonely = found(capture(net, words(1)))
    for key in ("sink.mass", "sink.variation", "sink.share", "sink.drain"):
        assert only(lonely, key).mean is None and only(lonely, key).n_dropped == 2
    assert {row.param for row in lonely if row.key == "sink.value_cos"} == {"same", "different"}, "no fifth token"
    assert {row.cloud for row in lonely if row.key == "sink.value_cos"} == {"raw"}, "no other token to take a mean of"
    alike = found(capture(net, torch.zeros(3, 9, dtype=torch.long)))
    assert only(alike, "sink.value_cos", param="same").n_valid == 3
    assert only(alike, "sink.value_cos", param="different").mean is None
    assert only(alike, "sink.value_cos", param="different").n_dropped == 3
    with torch.no_grad():
        net.layer(0).attention.content.left_factor[0] = 0
    rows = found(capture(net, words(9)))
    for key, param in (("sink.drain", None), ("sink.share", None), ("sink.value_cos", "different")):
        assert only(rows, key, 0, param=param).mean is None
        assert only(rows, key, param=param).mean == pytest.approx(only(rows, key, 1, param=param).mean), "of those that have one"
    with torch.no_grad():
        net.embedding.weight.zero_()
    rows = found(capture(net, words(9)))
    assert only(rows, "sink.drain").mean is None and only(rows, "sink.value_cos", param="different").mean is None


def test_other_kinds_of_trajectories():
    torch.manual_seed(0)
    rows = found(capture(model(arrangement=Parallel(), ffn=GELU()), words(9)))
    assert {row.point for row in rows} == {"block", None} and {row.layer for row in rows} == {0, 1, None}
    assert found(Trajectory.from_clouds(torch.randn(3, 2, 5, 8))) == [], "no model, no patterns"
    seen = capture(model(), words(9))
    seen.tokens = None
    assert keys(found(seen)) == (WEIGHTS | CONTENTS) - {"sink.value_cos"}


def test_settings():
    for wrong in ({"threshold": 0.0}, {"prompts": 1}, {"control": 1}, {"seed": -1}):
        with pytest.raises(UserError, match="cannot be measured"):
            Sinks(**wrong)
