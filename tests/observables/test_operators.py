"""Family "operators": the diagnosis of the weights, with its nulls, once and whatever the prompts."""

from __future__ import annotations

import pytest
import torch
from builders import model, words
from scipy.stats import spearmanr

from emformer.block import Parallel
from emformer.circuits import compositions, growth, outlook
from emformer.diagnostics import diagnose, factors
from emformer.ffn import GELU
from emformer.geometry import spectra
from emformer.kernels import L2, SinkSoftmax, Softmax
from emformer.masks import Full
from emformer.model import Emformer
from emformer.norms import LayerNorm, RMSNorm
from emformer.observables import Row
from emformer.observables.directions import Directions, rank_correlation
from emformer.observables.operators import COLUMNS, GROWTH, Operators
from emformer.operators import PSD, Dense, LowRank, Skew, Tied
from emformer.parts import UserError
from emformer.settings import Drift, Functional
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
    assert {row.key for row in rows} == set(Operators.keys)
    # of a layer: each head and their mean; radius and rotation of both; growth, of which one has no heads; of a pair, the largest
    # of each head and of all, and the mean
    assert len(rows) == 2 * (3 * len(COLUMNS) + 3 * 4 + 3 * len(GROWTH) - 2) + 3 * 4
    assert only(rows, "compat", "sphere").null == 1 - 1 / 64
    for role in ("form", "content"):
        assert only(rows, "asym", role).null == 7 / 16 and only(rows, "attraction", role).null == 0.5
        assert only(rows, "norm", role).null is None


def test_rows_are_the_circuits():
    torch.manual_seed(0)
    net = model(dim=16, heads=4)
    rows = found(net)
    for one in compositions(net):
        param = f"{one.kind} from={one.source}"
        row = only(rows, "compose", param, None, 1)
        assert row.mean == pytest.approx(float(one.value.mean())) and row.null == pytest.approx(float(one.null.mean()))
        assert row.null_sd == pytest.approx(float(one.null_sd.mean()) / 4)
        top = only(rows, "compose_max", param, None, 1)
        assert top.mean == pytest.approx(float(one.value.max()), rel=1e-12) and top.null > row.null
        for head, value in enumerate(one.value.amax(1).tolist()):
            each = only(rows, "compose_max", param, head, 1)
            assert each.mean == pytest.approx(value, rel=1e-12) and row.null < each.null < top.null
    for layer in (0, 1):
        told = growth(net.layer(layer))
        for key, heads, whole in zip(GROWTH, outlook(told.heads), outlook(told.values), strict=True):
            assert only(rows, key.removeprefix("op."), None, None, layer).mean == float(whole)
            if key != "op.expanding":
                assert [only(rows, key.removeprefix("op."), None, head, layer).mean for head in range(4)] == heads.tolist()
        some = factors(net.layer(layer))
        turned = spectra.turning(some.form_left, some.form_right), spectra.turning(some.content_left, some.content_right)
        for role, one in zip(("form", "content"), turned, strict=True):
            for key, values in zip(("radius", "rotation"), one, strict=True):
                assert [only(rows, key, role, head, layer).mean for head in range(4)] == values.tolist()
                assert only(rows, key, role, None, layer).mean == pytest.approx(float(values.mean()))


def test_random_circuits_are_the_null():
    """Of 16 heads: means within four of the told standard deviations, where there are any; the largest near its expectation."""
    torch.manual_seed(0)
    net = model(dim=64, depth=2, heads=16, form=LowRank(rank=8), content=LowRank(rank=8), norm=RMSNorm(gain=False))
    rows = found(net, Operators(limit=1))
    for kind in "QKV":
        row, top = (only(rows, key, f"{kind} from=0", None, 1) for key in ("compose", "compose_max"))
        assert abs(row.mean - row.null) < 4 * row.null_sd < 0.05 * row.null
        assert top.mean == pytest.approx(top.null, rel=0.1)
    for role in ("form", "content"):
        for key in ("radius", "rotation"):
            row = only(rows, key, role)
            assert abs(row.mean - row.null) < 4 * 2**0.5 * row.null_sd  # both are draws
    assert only(rows, "expanding").mean == pytest.approx(only(rows, "expanding").null, abs=6) == pytest.approx(32, abs=6)
    assert only(rows, "expansion").mean == pytest.approx(0.5, abs=0.05)
    assert only(rows, "growth").mean == pytest.approx(only(rows, "growth").null, rel=0.25)
    assert only(rows, "blowup").mean == pytest.approx(1 / only(rows, "growth").mean)


def test_a_model_made_to_gather_or_to_spread_says_so():
    """F = -M M^T-like: all of B is negative, nothing grows and no time is told; F = M: the other way round."""
    torch.manual_seed(0)
    for scale, share in ((0.5, 1.0), (-0.5, 0.0)):
        net = model(form=PSD(rank=4), content=Tied(scale=scale), norm=RMSNorm(gain=False), heads=1)
        rows = found(net, Operators(limit=1, control=False))
        assert only(rows, "expansion").mean == pytest.approx(share, abs=1e-9)
        time = only(rows, "blowup", head=0)
        assert (time.mean is None) == (scale < 0) and time.n_dropped == int(scale < 0) and time.null is None
        assert only(rows, "expanding").mean == (4 if scale > 0 else 0)


# Directions -----------------------------------------------------------------------------------------------------------


def spread(
    net: Emformer, observable: Directions | None = None, batch: int = 3, tokens: int = 300, key: str = "directions_rank"
) -> list[Row]:
    observation = (observable or Directions()).begin()
    observation.update(capture(net, words(tokens, batch=batch, vocab=net.vocab)))
    return [row for row in observation.rows() if row.key == f"op.{key}"]


def round_net(**changes) -> Emformer:
    """A layer on a cloud of independent isotropic tokens, the law's own."""
    fields = dict(vocab=400, dim=16, heads=2, depth=1, context=400, form=Dense(score_std=0.3), content=Dense(), mask=Full())
    return model(**(fields | {"norm": RMSNorm(gain=False)} | changes))


def test_round_clouds_spread_as_predicted():
    """Over 0.9 on average of five draws, with biases too; the other order of the factors, F M + M^T F^T, and a shuffled F say
    nothing of where the cloud goes."""
    ranks: dict[str, list[float]] = {"told": [], "biased": [], "other": [], "shuffled": []}
    for seed in range(5):
        torch.manual_seed(seed)
        net = round_net()
        ranks["told"].append(spread(net)[0].mean)
        ranks["biased"].append(spread(round_net(norm=LayerNorm(bias=True), functional=Functional(), drift=Drift()))[0].mean)
        turned, seen = round_net(), capture(net, words(300, batch=3, vocab=400))
        for name in ("other", "shuffled"):
            turned.load_state_dict(net.state_dict())
            attention = turned.layer(0).attention
            with torch.no_grad():
                if name == "other":  # left factors of a dense operator hold W^T
                    attention.form.left_factor.copy_(net.layer(0).attention.form.left_factor.mT)
                else:
                    attention.content.left_factor.copy_(torch.randn_like(attention.content.left_factor))
            observation = Directions().begin()
            observation.update(Trajectory(seen.steps, model=turned))
            ranks[name].append(observation.rows()[0].mean)
    mean = {name: sum(values) / 5 for name, values in ranks.items()}
    assert mean["told"] > 0.9 and mean["biased"] > 0.8
    assert abs(mean["other"]) < 0.5 and abs(mean["shuffled"]) < 0.5


def test_directions_in_rows():
    torch.manual_seed(0)
    (row,) = spread(round_net())
    assert row[:3] == (0, "attn", "op.directions_rank") and (row.n_valid, row.null) == (3, 0.0)
    assert row.null_sd == pytest.approx(1 / 15**0.5)
    (few,) = spread(round_net(), Directions(directions=8))
    assert few.null_sd == pytest.approx(1 / 7**0.5)
    assert spread(round_net(kernel=L2())) == [] == spread(round_net(kernel=SinkSoftmax()))
    assert len(spread(round_net(kernel=Softmax(beta=0.5), depth=3, shared=True))) == 3
    (block,) = spread(round_net(arrangement=Parallel(), ffn=GELU()))
    assert block.point == "block" and block.mean > 0.8
    (alone,) = spread(round_net(), tokens=2)
    assert alone.mean is None and alone.n_dropped == 3
    with pytest.raises(UserError, match="at least 3"):
        Directions(directions=2)


def test_signs_of_the_directions():
    """Variance falls along what gathers and grows along what spreads, where half of all directions do either. F = -M on a round
    cloud gathers everywhere, F = M nowhere."""
    shares: dict[str, list[float]] = {"gathers": [], "spreads": [], "null": []}
    for seed in range(3):
        torch.manual_seed(seed)
        told = {row.param: row for row in spread(round_net(epsilon=0.05), key="directions_sign")}
        for param, row in told.items():
            shares[param].append(row.mean)
            shares["null"].append(row.null)
    mean = {name: sum(values) / len(values) for name, values in shares.items()}
    assert mean["gathers"] > 0.8 and mean["spreads"] > 0.8 and 0.3 < mean["null"] < 0.7
    for scale, falls in ((-1.0, 1.0), (1.0, 0.0)):
        net = round_net(form=PSD(rank=16, score_std=0.3), content=Tied(scale=scale, learned=False), epsilon=0.05)
        told = {row.param: row for row in spread(net, key="directions_sign")}
        assert told["gathers"].null == pytest.approx(falls, abs=0.1) and told["spreads"].null == pytest.approx(1 - falls, abs=0.1)
        right, none = told["gathers" if falls else "spreads"], told["spreads" if falls else "gathers"]
        assert right.mean > 0.9 and none.mean is None and none.n_dropped == 3


def test_rank_correlation_is_scipy_s():
    torch.manual_seed(0)
    x, y = torch.randn(20).double(), torch.randn(3, 20).double()
    told = rank_correlation(x, y)
    for one, row in zip(told, y, strict=True):
        assert float(one) == pytest.approx(spearmanr(x, row).statistic, abs=1e-12)
    y[1, 3] = torch.nan
    assert rank_correlation(x, y).isnan().tolist() == [False, True, False]


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
