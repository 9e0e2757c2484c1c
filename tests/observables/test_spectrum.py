"""Family "spectrum": permutations, uniform mixing and collapses whose spectra are known, and a model's own against numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from builders import model, told, words

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.kernels import Sigmoid
from emformer.masks import Causal, Full, Window
from emformer.norms import LayerNorm
from emformer.observables import Row
from emformer.observables.spectrum import Spectrum
from emformer.operators import Dense
from emformer.positions import RoPE
from emformer.trajectory import Trajectory, capture


def found(trajectories: Trajectory | Sequence[Trajectory]) -> list[Row]:
    return told(Spectrum(), trajectories)


def only(rows: list[Row], key: str, param: str | None, head: int | None = None, layer: int = 0, point: str | None = None) -> Row:
    places = [(row.key, row.param, row.head, row.layer) for row in rows if point in (None, row.point)]
    assert places.count((key, param, head, layer)) == 1
    kept = [row for row in rows if point in (None, row.point)]
    return kept[places.index((key, param, head, layer))]


def nuclear(x: torch.Tensor) -> float:
    return float(np.linalg.svd(x.detach().numpy(), compute_uv=False).sum())


def test_a_token_that_sees_itself_alone():
    """A = I: everything is kept, and twice as much beside the stream."""
    for dtype in (torch.float64, torch.float32):
        rows = found(capture(model(mask=Window(size=1), dtype=dtype), words(7)))
        for head in (None, 0, 1):
            for param, times in (("A", 1), ("I+A", 2)):
                assert only(rows, "spec.rho_A", param, head).mean == pytest.approx(times, abs=1e-9)
                row = only(rows, "spec.kappa_log10", param, head)
                assert row.mean == pytest.approx(0, abs=1e-6) == row.null
                row = only(rows, "spec.erank_A", param, head)
                assert row.mean == pytest.approx(7, abs=1e-5) == row.null


def test_uniform_attention_is_the_null():
    for mask in (Causal(), Full()):
        net = model(form=Dense(), mask=mask)
        with torch.no_grad():
            for block in net.blocks:
                block.attention.form.left_factor.zero_()
        rows = found(capture(net, words(10)))
        for param, head in itertools.product(("A", "I+A"), (None, 0, 1)):
            row = only(rows, "spec.erank_A", param, head)
            assert row.mean == pytest.approx(row.null, abs=1e-9) and row.sd == pytest.approx(0, abs=1e-9)
            row = only(rows, "spec.kappa_log10", param, head)
            if mask == Full() and param == "A":
                assert row.mean is row.null is None and (row.n_valid, row.n_dropped) == (0, 2), "rank 1"
            else:
                assert row.mean == pytest.approx(row.null, abs=1e-9) and row.n_valid == 2
        if mask == Full():
            assert only(rows, "spec.erank_A", "A").mean == pytest.approx(1, abs=1e-9)
            assert only(rows, "spec.kappa_log10", "I+A").mean == pytest.approx(math.log10(2))
            assert only(rows, "spec.erank_A", "I+A").mean == pytest.approx(11 * math.exp(-2 / 11 * math.log(2)))


def test_patterns_against_numpy(seed):
    count = 6 if seed % 2 else 11  # narrower and wider than the space
    net = model(norm=LayerNorm(bias=True), positions=[RoPE()], mask=Causal() if seed % 3 else Full())
    seen = capture(net, words(count, batch=3))
    rows, k = found(seen), 1
    a, y = seen.pattern(k).detach(), seen.steps[k].read.detach()
    values: dict[tuple[str, str], list[float]] = {}
    for b, h in itertools.product(range(3), range(2)):
        for param, op in (("A", a[b, h]), ("I+A", torch.eye(count) + a[b, h])):
            s = np.linalg.svd(op.numpy(), compute_uv=False)
            p = s / s.sum()
            told = {
                "spec.rho_A": nuclear(op @ y[b]) / nuclear(y[b]),
                "spec.kappa_log10": math.log10(s[0] / s[-1]),
                "spec.erank_A": math.exp(-(p * np.log(p)).sum()),
            }
            for key, value in told.items():
                values.setdefault((key, param), []).append(value)
    for (key, param), flat in values.items():
        table = torch.tensor(flat).view(3, 2)
        for head, column in [(None, table.mean(1)), *enumerate(table.unbind(1))]:
            row = only(rows, key, param, head, k)
            assert row.mean == pytest.approx(float(column.mean()), rel=1e-5), (key, param)
            assert row.sd == pytest.approx(float(column.std()), rel=1e-3, abs=1e-5)


def test_steps_whose_retention_is_known():
    x = torch.randn(4, 9, 6, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    flat = x.mean(-1, keepdim=True).expand_as(x)
    rows = found(Trajectory.from_clouds([x, 2 * x @ turn, 3 * x[:, torch.randperm(9)], flat, 0 * x, x]))
    for layer, rho in ((0, 2.0), (1, 1.5)):
        assert only(rows, "spec.rho_X", None, layer=layer).mean == pytest.approx(rho)
        assert only(rows, "spec.rho_X", "normalised", layer=layer).mean == pytest.approx(1)
    fallen = torch.tensor([float(one.norm()) / nuclear(one) for one in x])
    assert only(rows, "spec.rho_X", "normalised", layer=2).mean == pytest.approx(float(fallen.mean()), rel=1e-6)
    assert only(rows, "spec.rho_X", None, layer=3).mean == pytest.approx(0, abs=1e-12)
    for layer, param in ((3, "normalised"), (4, None), (4, "normalised")):
        row = only(rows, "spec.rho_X", param, layer=layer)
        assert row.mean is None and row.n_dropped == 4
    assert {row.key for row in rows} == {"spec.rho_X"}, "no model, no patterns"


def test_either_share_of_a_parallel_block():
    seen = capture(model(arrangement=Parallel(), ffn=GELU(), epsilon=0.5), words(9))
    rows, step = found(seen), seen.steps[1]
    halves = {"block": step.after, "attn": step.before + 0.5 * (step.update - step.ffn), "ffn": step.before + 0.5 * step.ffn}
    for point, after in halves.items():
        ratio = [nuclear(new) / nuclear(old) for old, new in zip(step.before, after, strict=True)]
        size = [float(old.detach().norm() / new.detach().norm()) for old, new in zip(step.before, after, strict=True)]
        alone = None if point == "block" else "parallel"
        assert only(rows, "spec.rho_X", alone, layer=1, point=point).mean == pytest.approx(sum(ratio) / 2)
        shape = only(rows, "spec.rho_X", f"{alone} normalised" if alone else "normalised", layer=1, point=point)
        assert shape.mean == pytest.approx(sum(r * s for r, s in zip(ratio, size, strict=True)) / 2)
    assert {row.point for row in rows if row.key != "spec.rho_X"} == {"block"}


def test_infinite_condition_numbers_are_counted():
    """A prompt of one repeated token under a full mask has a pattern of rank 1; others have not."""
    net = model(mask=Full(), depth=1)
    tokens = torch.stack([torch.zeros(5, dtype=torch.long), torch.arange(5)])
    alone, both = found(capture(net, tokens[1:])), found(capture(net, tokens))
    for head in (None, 0, 1):
        row = only(both, "spec.kappa_log10", "A", head)
        assert (row.n_valid, row.n_dropped) == (1, 1)
        assert row.mean == pytest.approx(only(alone, "spec.kappa_log10", "A", head).mean)
    assert only(both, "spec.erank_A", "A").n_dropped == 0


def test_weights_of_unknown_mass_have_no_null_beside_the_stream():
    rows = found(capture(model(kernel=Sigmoid()), words(7)))
    assert only(rows, "spec.erank_A", "A").null is not None and only(rows, "spec.erank_A", "I+A").null is None


def test_degenerate_prompts_are_undefined_not_wrong():
    net = model(norm=LayerNorm())
    lonely = found(capture(net, words(1)))
    assert only(lonely, "spec.rho_A", "A").mean == pytest.approx(1) and only(lonely, "spec.erank_A", "A").mean == 1
    found(capture(net, torch.zeros(2, 9, dtype=torch.long)))
    with torch.no_grad():
        net.embedding.weight.zero_()
    rows = found(capture(net, words(9)))
    assert only(rows, "spec.rho_A", "A").mean is None and only(rows, "spec.rho_X", None).mean is None
