"""Family "operators": the diagnosis of the weights, with its nulls, once and whatever the prompts."""

from __future__ import annotations

import pytest
import torch
from builders import model, words

from emformer.block import Parallel
from emformer.diagnostics import diagnose
from emformer.ffn import GELU
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.observables import Row
from emformer.observables.operators import COLUMNS, Operators
from emformer.operators import PSD, Dense, LowRank, Skew, Tied
from emformer.parts import UserError
from emformer.trajectory import Trajectory, capture


def found(net: Emformer, settings: Operators | None = None, chunks: int = 1) -> list[Row]:
    observation = (settings or Operators(limit=50)).begin()
    for _ in range(chunks):
        observation.update(capture(net, words(4)))
    return observation.rows()


def only(rows: list[Row], key: str, param: str | None = None, head: int | None = None, layer: int = 0) -> Row:
    (row,) = [r for r in rows if (r.key, r.param, r.head, r.layer) == (f"op.{key}", param, head, layer)]
    return row


def test_rows_are_the_diagnosis():
    torch.manual_seed(0)
    net = model()
    rows = found(net)
    told = diagnose(net, limit=50)
    for key, param, field in COLUMNS:
        for layer in (0, 1):
            mine = [head for head in told if head.layer == layer]
            for head in mine:
                row = only(rows, key.removeprefix("op."), param, head.head, layer)
                assert row.mean == getattr(head, field) and row.point == "attn"
                assert row[4:8] == (None, None, 1, 0)
            row = only(rows, key.removeprefix("op."), param, None, layer)
            assert row.mean == pytest.approx(sum(getattr(head, field) for head in mine) / 2) and row.n_valid == 1
    assert len(rows) == len(COLUMNS) * 2 * 3 and {row.key for row in rows} == set(Operators.keys)
    assert only(rows, "compat", "sphere").null == 1 - 1 / 64
    for role in ("form", "content"):
        assert only(rows, "asym", role).null == 7 / 16 and only(rows, "attraction", role).null == 0.5
        assert only(rows, "norm", role).null is None


def test_random_operators_are_the_null_and_tied_ones_are_not():
    torch.manual_seed(0)
    rows = found(model(dim=32, depth=1, heads=6, form=Dense(), content=Dense(), norm=RMSNorm(gain=False)))
    for key, param, tolerance in (
        ("asym", "form", 0.02),
        ("asym", "content", 0.02),
        ("attraction", "form", 0.05),
        ("attraction", "content", 0.05),
        ("compat", None, 0.02),
        ("compat", "sphere", 0.01),
    ):
        row = only(rows, key, param)
        assert row.mean == pytest.approx(row.null, abs=tolerance), key
    row = only(rows, "compat")
    assert row.null == pytest.approx(0.84, abs=0.02) and row.null_sd == pytest.approx(
        only(rows, "compat", head=0).null_sd / 6**0.5
    )
    rows = found(model(depth=1, form=PSD(rank=4), content=Tied(), norm=RMSNorm(gain=False)))
    row = only(rows, "compat", head=1)
    assert row.mean < 1e-3 < 0.5 < row.null
    assert only(rows, "compat", "sphere").mean < 1e-9
    assert only(rows, "asym", "form").mean < 1e-12 and only(rows, "attraction", "form").mean == pytest.approx(1)


def test_the_model_is_looked_at_once():
    torch.manual_seed(0)
    net = model()
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in net.state_dict().items()}
    observation = Operators(limit=20).begin()
    assert observation.rows() == []
    first, second = (Trajectory(capture(net, tokens).steps, model=net) for tokens in (words(4), words(5)))
    torch.set_rng_state(state)
    observation.update(first)
    rows = observation.rows()
    with torch.no_grad():
        net.layer(0).attention.form.left_factor.zero_()
    observation.update(second)
    assert observation.rows() == rows
    with torch.no_grad():
        net.load_state_dict(before)
    assert found(net, Operators(limit=20), chunks=2) == rows, "whatever the prompts"
    torch.set_rng_state(state)
    observation.update(first)
    assert torch.equal(torch.get_rng_state(), state) and net.surgery == ()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_settings():
    torch.manual_seed(0)
    net = model(form=Dense(), content=LowRank(rank=2))
    plain = found(net, Operators(limit=20, control=False))
    assert only(plain, "compat").null is None and only(plain, "compat").mean is not None
    narrow = only(found(net, Operators(widest=4)), "compat")
    assert narrow.mean is None and (narrow.n_valid, narrow.n_dropped, narrow.null) == (0, 1, None)
    other = only(found(net, Operators(limit=20, seed=1)), "compat"), only(found(net, Operators(limit=20)), "compat")
    assert other[0].mean == other[1].mean and other[0].null != other[1].null
    with pytest.raises(UserError, match="choose at least 0 and 1"):
        Operators(limit=0)


def test_blocks_and_models_of_other_kinds():
    torch.manual_seed(0)
    skew = only(found(model(form=Skew()), Operators(limit=5)), "attraction", "form", 0)
    assert skew.mean is None and skew.n_dropped == 1
    rows = found(model(arrangement=Parallel(), ffn=GELU()), Operators(limit=5))
    assert {row.point for row in rows} == {"attn"}
    assert {row.layer for row in found(model(shared=True, depth=3), Operators(limit=5))} == {0}
    observation = Operators().begin()
    observation.update(Trajectory.from_clouds(torch.randn(2, 1, 3, 4)))
    assert observation.rows() == []
