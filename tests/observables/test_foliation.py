"""Family "foliation": gradients against differences of scores, gaps against weights, tilts in closed form, nulls that are met."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from builders import bare, examples, fill, model, only, told, words

from emformer import parts
from emformer.block import Parallel, Step
from emformer.diagnostics import effective
from emformer.ffn import GELU
from emformer.kernels import L2, Hardmax, Linear, Sigmoid, SinkSoftmax, Softmax, TopK, Unnormalised
from emformer.masks import All, Causal, Full, Window
from emformer.norms import LayerNorm, RMSNorm
from emformer.observables import Row
from emformer.observables.foliation import Foliation, chance, gradients, queries
from emformer.observables.lens import Lens
from emformer.observables.sinks import Sinks
from emformer.observables.spectrum import Spectrum
from emformer.operators import Dense, Identity, LowRank, Preconditioned, Symmetric, Tied
from emformer.parts import UserError
from emformer.placements import PostNorm, SandwichNorm, Sphere
from emformer.positions import KeyNorm, QueryNorm, RoPE
from emformer.settings import Drift, Functional
from emformer.trajectory import Trajectory, capture

GIVEN: dict[str, Any] = {"functional": Functional(), "drift": Drift()}
GRADIENTS = {"fol.resolution", "fol.undirected", "fol.aniso", "fol.common_share", "fol.erank"}
TILT = {"fol.tilt", "fol.norm_ratio", "fol.coherence"}


def found(trajectories: Trajectory | Sequence[Trajectory], observable: parts.Observable | None = None) -> list[Row]:
    return told(observable or Foliation(), trajectories)


def names(rows: list[Row]) -> set[str]:
    return {row.key.removesuffix(".undefined") for row in rows}


# Gradients ------------------------------------------------------------------------------------------------------------


def test_gradients_are_the_slopes_of_the_score():
    """s_ij at two key clouds differs by <r_i(j - i), yhat_j - yhat'_j>: norms, groups, biases on both sides, any position."""
    torch.manual_seed(0)
    norms = [LayerNorm(bias=True), RMSNorm(), None]
    forms = [LowRank(rank=4), LowRank(rank=4, groups=1), Dense(), Symmetric(), Identity()]
    kinds: list[list[parts.Position]] = [
        [],
        [RoPE(base=20.0)],
        [QueryNorm(), RoPE(base=20.0, fraction=0.5, offset=3)],
        [QueryNorm()],
    ]
    pairs = [*itertools.product(norms[:1], forms), *itertools.product(norms[1:], forms[:1])]
    for (norm, form), positions in itertools.product(pairs, kinds):
        net = model(depth=1, norm=norm, form=form, positions=positions, heads=4, **GIVEN)
        seen = capture(net, words(6))
        layer, i, y = seen.block(0).attention, torch.arange(6), bare(seen, 0)
        assert layer.biases is not None and (layer.biases.right is not None) == bool(positions and positions[-1] != QueryNorm())
        other = y + torch.randn_like(y)
        a, b = (torch.eye(8), torch.zeros(8)) if norm is None else seen.block(0).read_attn.affine(8)
        keys = [
            layer.factors(cloud @ a.double().mT + b, i)[1].repeat_interleave(4 // layer.form.groups, 1) for cloud in (y, other)
        ]
        u = layer.factors(seen.steps[0].read, i)[0]
        slopes = (u.unsqueeze(-2) * (keys[1] - keys[0]).unsqueeze(-3)).sum(-1)
        field = gradients(seen, 0)
        assert field is not None and field.turned == any(isinstance(one, RoPE) for one in positions)
        for offset in range(-5, 6):
            r, core = field.at(offset), field.coefficients(offset) @ field.core
            assert r.shape == (2, 4, 6, 8) and r.dtype == torch.float64
            for q in range(max(0, -offset), min(6, 6 - offset)):
                expected = (r[:, :, q] * (other - y)[:, q + offset].unsqueeze(1)).sum(-1)
                assert (slopes[:, :, q, q + offset] - expected).abs().max() < 1e-10, (norm, form, positions)
            assert (r @ r.mT - core @ core.mT).abs().max() < 1e-9, "lengths and angles"
        if not positions:
            whole = effective(seen.block(0))
            assert (field.at() - (y.unsqueeze(1) @ whole.form + whole.functional.unsqueeze(1))).abs().max() < 1e-10


def test_gradients_against_loops(seed):
    net = model(norm=LayerNorm(bias=True), heads=2, form=LowRank(rank=4), functional=Functional())
    seen = capture(net, words(6, batch=3))
    rows, k = found(seen), 1
    field = gradients(seen, k)
    assert field is not None
    r, y, a = field.at().detach(), seen.steps[k].read, seen.pattern(k)
    values: dict[str, list[list[float]]] = {}
    for b, h in itertools.product(range(3), range(2)):
        one, size = r[b, h], r[b, h].norm(dim=-1)
        cosines = [float(one[i] @ one[j] / size[i] / size[j]) for i in range(6) for j in range(6) if i != j]
        s = np.linalg.svd(one.numpy(), compute_uv=False)
        p = s[s > 1e-12] / s.sum()
        common = y[b] @ seen.block(k).attention.form.pull(field.coefficients(0).mean(2, keepdim=True))[b, h, 0]
        weight = [float(a[b, h, j:, j].mean()) for j in range(6)]
        each = {
            "fol.resolution": float(size.mean()),
            "fol.undirected": 0.0,
            "fol.aniso": sum(cosines) / 30,
            "fol.common_share": float(one.mean(0).norm() ** 2 / size.square().mean()),
            "fol.erank": math.exp(-(p * np.log(p)).sum()),
            "fol.common_corr": float(np.corrcoef(common.detach().numpy(), weight)[0, 1]),
        }
        for key, value in each.items():
            values.setdefault(key, []).append([b, h, value])
    for key, triples in values.items():
        table = torch.tensor([value for _, _, value in triples]).view(3, 2)
        for head, column in [(None, table.mean(1)), *enumerate(table.unbind(1))]:
            row = only(rows, key, head, k)
            assert row.mean == pytest.approx(float(column.mean()), abs=1e-6), key
            assert row.sd == pytest.approx(float(column.std()), abs=1e-6) and row.n_valid == 3
    assert only(rows, "fol.common_share").null == 1 / 6 and only(rows, "fol.aniso").null == 0.0
    assert only(rows, "fol.common_corr", 0).null_sd == pytest.approx(1 / math.sqrt(5))


def test_the_anisotropy_of_independent_tokens_is_its_null():
    """Independent isotropic read clouds: mean 0 with the told sd, of every head and of the mean of heads that see them alike."""
    torch.manual_seed(0)
    draws, tokens = 2000, 5
    for form, positions in ((LowRank(rank=8, groups=1), []), (LowRank(rank=16), [RoPE()]), (Dense(), [])):
        net = model(dim=32, heads=4, depth=1, form=form, norm=RMSNorm(), positions=positions)
        x = torch.randn(draws, tokens, 32, dtype=torch.float64)
        block = net.layer(0)
        y = block.read_attn(x)
        z, update = block.attention.update(y, torch.arange(tokens))
        rows = found(Trajectory([Step(0, "attn", x, y, z, update, x + update)], model=net))
        for head in (None, 0, 1, 2, 3):
            row = only(rows, "fol.aniso", head)
            assert abs(row.mean) < 4.5 * row.null_sd / math.sqrt(draws)
            assert row.sd == pytest.approx(row.null_sd, rel=0.1), (form, head)


def test_chance_of_projectors_is_one_over_their_dimension():
    frame = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    core = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    each, whole = chance(frame[:4].repeat(3, 1, 1), core, None)
    assert [*each, whole] == pytest.approx([1 / 4] * 4, rel=0.05), "three heads that are one"
    each, whole = chance(frame.view(3, 4, 12), 2 * core, None)
    assert each == pytest.approx([1 / 4] * 3, rel=0.05)
    assert whole == pytest.approx(1 / 12, rel=0.05), "three heads with nothing in common"
    assert chance(frame.view(3, 4, 12), core, frame[:4].mT @ frame[:4])[0][0] == pytest.approx(1 / 4, rel=0.05)
    each, whole = chance(0 * frame[:4].unsqueeze(0), core, None)
    assert math.isnan(each[0]) and math.isnan(whole)


def test_gradients_that_are_alike():
    """M = 0 with a functional: every query slices the space in the same way."""
    net = model(depth=1, norm=RMSNorm(gain=False), functional=Functional())
    with torch.no_grad():
        net.layer(0).attention.form.left_factor.zero_()
    rows = found(capture(net, words(7)))
    for key, value in (("fol.aniso", 1), ("fol.common_share", 1), ("fol.erank", 1), ("fol.undirected", 0)):
        assert only(rows, key).mean == pytest.approx(value, abs=1e-9)
    fill(net.layer(0).attention.biases.left, torch.zeros(2, 4, dtype=torch.float64))
    rows = found(capture(net, words(7)))
    assert only(rows, "fol.undirected", 1).mean == 1
    for key in ("fol.aniso", "fol.common_share", "fol.erank", "fol.common_corr", "fol.gap_nats"):
        assert only(rows, key).mean is None and only(rows, key).n_dropped == 2


# Leaves ---------------------------------------------------------------------------------------------------------------


def test_the_gap_is_the_log_ratio_of_the_top_weights(seed):
    """math J 11, whatever positions, biases and mask; kernels that are exponential in the score."""
    near = All([Causal(), Window(size=5)])
    compositions: list[tuple[parts.Kernel, parts.Mask, list[parts.Position]]] = [
        (Softmax(beta=1.7), Causal(), [RoPE()]),
        (Softmax(beta=0.3), Full(), []),
        (SinkSoftmax(beta=0.6), near, []),
        (TopK(k=3, beta=1.3), Full(), [KeyNorm()]),
        (Unnormalised(clip=None, beta=0.5), near, [QueryNorm(), RoPE()]),
    ]
    for kernel, mask, positions in compositions:
        net = model(kernel=kernel, mask=mask, positions=positions, norm=LayerNorm(bias=True), depth=1, **GIVEN)
        seen = capture(net, torch.stack([torch.randperm(11)[:9] for _ in range(2)]))  # no token twice
        two = seen.pattern(0).topk(2, -1).values
        log_ratio = (two[..., 0] / two[..., 1]).log()
        log_ratio = log_ratio if mask == Full() else log_ratio[..., 1:]
        told = queries(seen, 0)
        assert (told["fol.gap_nats"] - log_ratio).abs().max() < 1e-10
        rows = found(seen)
        for head, mean in enumerate(log_ratio.mean((0, 2)).tolist()):
            assert only(rows, "fol.gap_nats", head).mean == pytest.approx(mean, abs=1e-10)
        assert only(rows, "fol.gap_nats").mean == pytest.approx(float(log_ratio.mean()), abs=1e-10)
        assert only(rows, "fol.multiplicity").mean == 1 == only(rows, "fol.multiplicity").null
        s, table = seen.scores(0), seen.visible(0)
        spread = torch.stack([s[:, :, i, table[i]].std(-1) for i in range(9) if table[i].sum() > 1], -1)
        assert only(rows, "fol.spread", 1).mean == pytest.approx(float(spread[:, 1].mean()), abs=1e-10)


def test_repeated_tokens_lie_on_one_leaf():
    net = model(depth=1, mask=Full(), kernel=Softmax(beta=2.0))
    tokens = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    once, twice = found(capture(net, tokens)), found(capture(net, tokens.repeat_interleave(3, 1)))
    for head in (None, 0, 1):
        assert only(twice, "fol.gap_nats", head).mean == pytest.approx(only(once, "fol.gap_nats", head).mean, abs=1e-9)
        assert only(twice, "fol.multiplicity", head).mean == 3
    alike = found(capture(net, torch.zeros(2, 6, dtype=torch.long)))
    assert only(alike, "fol.gap_nats").mean is None and only(alike, "fol.multiplicity").mean == 6
    half = found(capture(net, torch.stack([torch.zeros(4, dtype=torch.long), torch.arange(4)])))
    assert (only(half, "fol.gap_nats").n_valid, only(half, "fol.gap_nats").n_dropped) == (1, 1)


def test_queries_do_not_see_the_future(seed):
    """Gaps, leaves and gradients before a changed token stay bit for bit (math J 7)."""
    e, count = 7, 12
    for mask, positions in ((Causal(), [RoPE()]), (All([Causal(), Window(size=5)]), []), (Causal(), [KeyNorm()])):
        net = model(mask=mask, positions=positions, ffn=GELU(), **GIVEN)
        tokens = words(count)
        other = tokens.clone()
        other[:, e] = (tokens[:, e] + 1) % net.vocab
        one, two = capture(net, tokens), capture(net, other)
        for k in one.attentions:
            first, second = (queries(seen, k) for seen in (one, two))
            assert set(first) == {"fol.gap_nats", "fol.multiplicity", "fol.spread"} == set(second)
            for key, values in first.items():
                early = values[..., : e - 1].nan_to_num(7)  # the first query has no choice
                assert torch.equal(early, second[key][..., : e - 1].nan_to_num(7)), key
                assert key == "fol.multiplicity" or not torch.equal(values[..., e - 1 :], second[key][..., e - 1 :])
            fields = [gradients(seen, k) for seen in (one, two)]
            if positions != [KeyNorm()]:
                mine, his = (field.at(-2)[:, :, : e + 1] for field in fields if field is not None)
                assert torch.equal(mine[:, :, :e], his[:, :, :e]) and not torch.equal(mine, his)


# Tilt -----------------------------------------------------------------------------------------------------------------


def test_tilt_in_closed_form(seed):
    """V^T V = I: cos tau = sum |u_k|^2 cos(Delta w_k)/sum |u_k|^2, lengths stay; dense M turns planes of E."""
    base, rank, offsets = 50.0, 4, (-1, -2, -3, 5)
    for form in (LowRank(rank=rank), Dense()):
        net = model(depth=1, form=form, norm=None, positions=[RoPE(base=base)])
        layer = net.layer(0).attention.form
        if not layer.identity_right:
            with torch.no_grad():
                layer.right_factor.copy_(torch.linalg.qr(torch.randn(2, 8, rank, dtype=torch.float64)).Q.mT)
        seen = capture(net, words(6))
        rows, u = found(seen, Foliation(offsets)), layer.left(seen.steps[0].read).detach()
        planes = u.shape[-1] // 2
        w = base ** (-torch.arange(planes).double() / planes)
        energy = u[..., :planes].square() + u[..., planes:].square()
        cosines = torch.stack([(energy * (offset * w).cos()).sum(-1) / energy.sum(-1) for offset in offsets], -1)
        for column, offset in enumerate(offsets):
            for head in (0, 1):
                row = only(rows, "fol.tilt", head, param=f"delta={offset}")
                assert row.mean == pytest.approx(float(cosines[:, head, :, column].acos().mean()), abs=1e-7) and row.null == 0.0
            assert only(rows, "fol.norm_ratio", param=f"delta={offset}").mean == pytest.approx(1, abs=1e-12)
        short = cosines.mean(2)[..., :3] < 0.5
        lengths = torch.where(
            short.any(-1), short.double().argmax(-1) + 1, torch.where(cosines.mean(2)[..., 3] < 0.5, 5, math.nan)
        )
        for head, column in enumerate(lengths.unbind(1)):
            row, known = only(rows, "fol.coherence", head), column[~column.isnan()]
            assert row.n_valid == len(known) and row.n_dropped == 2 - len(known)
            assert not len(known) or row.mean == pytest.approx(float(known.mean()))


def test_a_general_form_stretches_what_it_tilts():
    torch.manual_seed(0)
    net = model(depth=1, norm=LayerNorm(bias=True), positions=[QueryNorm(), RoPE(base=20.0)], **GIVEN)
    seen = capture(net, words(9))
    rows, field = found(seen), gradients(seen, 0)
    assert field is not None
    for offset in (-1, -2, -4, -8):
        r, o = field.at(offset), field.at(0)
        angle = torch.cosine_similarity(r, o, dim=-1).acos()
        assert only(rows, "fol.tilt", param=f"delta={offset}").mean == pytest.approx(float(angle.mean()), abs=1e-6)
        ratio = r.norm(dim=-1) / o.norm(dim=-1)
        assert only(rows, "fol.norm_ratio", 1, param=f"delta={offset}").mean == pytest.approx(float(ratio[:, 1].mean()), abs=1e-9)
        assert (ratio - 1).abs().max() > 1e-3
    assert not any(row.param == "delta=-16" for row in rows), "longer than the prompt"
    assert names(rows) - names(found(seen, Foliation((-9, 9)))) == TILT, "no two of nine tokens are nine apart"


def test_only_positions_that_turn_keys_tilt():
    turned, keyed = GRADIENTS | TILT, GRADIENTS | {"fol.common_corr"}
    leaves = {"fol.gap_nats", "fol.multiplicity", "fol.spread"}
    for positions, keys in (
        ([], keyed),
        ([QueryNorm()], keyed),
        ([RoPE()], turned),
        ([KeyNorm()], set()),
        ([KeyNorm(), RoPE()], set()),
    ):
        assert names(found(capture(model(positions=positions), words(7)))) == leaves | keys, positions
    assert names(found(capture(model(positions=[RoPE()]), words(7)), Foliation(()))) == leaves | GRADIENTS
    for kernel, missing in (
        (Linear(), {"fol.gap_nats"}),
        (Hardmax(), {"fol.gap_nats"}),
        (Sigmoid(), set()),
        (L2(), leaves | keyed),
    ):
        assert names(found(capture(model(kernel=kernel), words(7)))) == (leaves | keyed) - missing
    assert leaves | keyed | turned == set(Foliation.keys)


# All parts ------------------------------------------------------------------------------------------------------------


LOW = {"fol.aniso": -1, "fol.common_corr": -1, "sink.value_cos": -1, "sink.unspent": -math.inf}
ONES = {"fol.aniso", "fol.common_corr", "fol.common_share", "fol.undirected", "attn.sink_rate", "sink.mass", "sink.argmax"}
HIGH = {"fol.tilt": math.pi} | dict.fromkeys(ONES | {"sink.unspent", "sink.value_cos", "lens.agreement"}, 1.0)


def check(rows: list[Row], observable: parts.Observable = Foliation()) -> None:  # noqa: B008  (it is immutable)
    for row in rows:
        assert row.key.removesuffix(".undefined") in observable.keys
        for value in (row.mean, row.sd, row.se, row.null, row.null_sd):
            assert value is None or math.isfinite(value), row
        if row.mean is not None:
            assert LOW.get(row.key, 0) - 1e-6 <= row.mean <= HIGH.get(row.key, math.inf) + 1e-6, row


def test_every_part_is_told_or_left_out():
    """Capture, update, rows for every example of every part, of this family and of those that share its instruments."""
    kinds = [(parts.Operator, ("form", "content")), (parts.Kernel, ("kernel",)), (parts.Position, ("positions",))]
    kinds += [(parts.Mask, ("mask",)), (parts.Norm, ("norm",)), (parts.Placement, ("placement",))]
    torch.manual_seed(0)
    count = 0
    for kind, fields in kinds:
        for example in examples(kind):
            part = example.values[0]
            change: dict[str, Any] = {field: [part] if field == "positions" else part for field in fields}
            if hasattr(part, "tolerance"):  # balanced weights have no causal form
                change["mask"] = Full()
            if isinstance(part, Tied | Preconditioned):  # a content alone
                del change["form"]
            try:
                net = model(dtype=torch.float32, depth=1, **(GIVEN | change))
            except UserError:  # a functional that the kernel does not notice
                net = model(dtype=torch.float32, depth=1, **change)
            seen = capture(net, words(9))
            for observable in (Foliation(), Sinks(), Spectrum(), Lens()):
                check(found(seen, observable), observable)
            count += 1
    assert count > 30


def test_other_kinds_of_blocks():
    torch.manual_seed(0)
    for change in ({"placement": PostNorm()}, {"placement": SandwichNorm()}, {"placement": Sphere()}, {"norm": None}):
        check(found(capture(model(**change), words(9))))
    rows = found(capture(model(arrangement=Parallel(), ffn=GELU()), words(9)))
    assert {row.point for row in rows} == {"block"} and {row.layer for row in rows} == {0, 1}
    assert found(Trajectory.from_clouds(torch.randn(3, 2, 5, 8))) == [], "no model, no queries"


def test_degenerate_prompts_are_undefined_not_wrong():
    for positions in ([], [RoPE()]):
        net = model(norm=LayerNorm(), positions=positions)
        lonely = found(capture(net, words(1)))
        check(lonely)
        for key in ("fol.gap_nats", "fol.spread", "fol.aniso"):
            assert only(lonely, key).mean is None and only(lonely, key).n_dropped == 2
        assert only(lonely, "fol.resolution").mean > 0
        check(found(capture(net, torch.zeros(2, 9, dtype=torch.long))))
        with torch.no_grad():
            net.embedding.weight.zero_()
        rows = found(capture(net, words(9)))
        check(rows)
        assert only(rows, "fol.undirected").mean == 1 and only(rows, "fol.aniso").mean is None


def test_settings():
    assert Foliation([-1, -3]).offsets == (-1, -3)  # as YAML gives it
    for offsets in ((0, -1), (-2, -2)):
        with pytest.raises(UserError, match="offsets"):
            Foliation(offsets)
