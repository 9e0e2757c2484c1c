"""Family "energy": forces against closed forms and autograd, nulls that are met, and query rows that never see the future."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from builders import bare, examples, model, only, stir, told, words
from torch import Tensor

from emformer import parts
from emformer.block import Parallel
from emformer.diagnostics import effective
from emformer.ffn import GELU
from emformer.geometry import energy
from emformer.kernels import L2, Hardmax, Linear, Sigmoid, SinkSoftmax, Softmax, TopK
from emformer.masks import All, Causal, Full, Window
from emformer.model import Emformer
from emformer.norms import LayerNorm, RMSNorm
from emformer.observables import Row
from emformer.observables.energy import Energy, bounds, forces, queries, temperature
from emformer.observables.operators import Operators
from emformer.observables.signal import Signal
from emformer.observables.wgf import GradientFlow
from emformer.operators import Dense, Identity, LowRank, Preconditioned, Symmetric, Tied
from emformer.parts import UserError
from emformer.placements import PostNorm, SandwichNorm, Sphere
from emformer.positions import KeyNorm, QueryNorm, RoPE
from emformer.settings import Drift, Functional
from emformer.trajectory import Trajectory, capture

NORMED = ((2, LayerNorm(bias=True)), (None, RMSNorm()))
GIVEN: dict[str, Any] = {"functional": Functional(), "drift": Drift()}


# Forces ---------------------------------------------------------------------------------------------------------------


def found(trajectories: Trajectory | Sequence[Trajectory]) -> list[Row]:
    return told(Energy(), trajectories)


def test_forces_are_the_closed_form_where_no_position_acts():
    """On the bare cloud with effective operators: geometry's own p, rho and cosines, for every kind of norm and factors."""
    torch.manual_seed(0)
    cases = [(norm, LowRank(rank=4, groups=1)) for norm in (LayerNorm(bias=True), LayerNorm(gain=False), RMSNorm(), None)]
    cases += [(LayerNorm(bias=True), form) for form in (LowRank(rank=4), Dense(), Symmetric(), Identity())]
    for norm, form in cases:
        mask = Full() if isinstance(form, Dense) else Causal()
        net = model(norm=norm, form=form, mask=mask, content=Tied() if norm is None else LowRank(rank=3), **GIVEN)
        seen = capture(net, words(9))
        rows = found(seen)
        for k, layer in enumerate(seen.attentions):
            told, y, a = effective(seen.block(layer)), bare(seen, layer), seen.pattern(layer)
            exact = energy.forces(a, y, told.form, told.functional)
            pull = forces(seen, layer)
            assert (pull.action - exact.action).abs().max() < 1e-10
            assert (pull.reaction - exact.reaction).abs().max() < 1e-10
            assert (pull.velocity - (a @ y.unsqueeze(1)) @ told.content.mT).abs().max() < 1e-10
            known = energy.reaction(a, y, told.form, told.content, told.functional)
            keys = ("attn.reaction_ratio", "attn.cos_action", "attn.cos_force", "attn.cos_reaction")
            for key, values in zip(keys, known, strict=True):
                for head, value in enumerate(values.mean(0).tolist()):
                    assert only(rows, key, head, k).mean == pytest.approx(value, abs=1e-10)
                values = values.detach()
                assert only(rows, key, None, k).mean == pytest.approx(float(values.mean()), abs=1e-10)
                assert only(rows, key, None, k).sd == pytest.approx(float(values.mean(1).std()), abs=1e-10)


def slots(trajectory: Trajectory, k: int, query: Tensor, key: Tensor) -> Tensor:
    """G (H,), the free energies of the queries `query` over the keys `key`, each a bare cloud of its own."""
    attention, norm = trajectory.block(k).attention, trajectory.block(k).read_attn
    i = torch.arange(query.shape[1])
    if norm is not None:
        a, b = (x.double() for x in norm.affine(query.shape[-1]))
        query, key = query @ a.mT + b, key @ a.mT + b
    u, v = attention.factors(query, i)[0], attention.factors(key, i)[1]
    s = u @ v.repeat_interleave(u.shape[1] // v.shape[1], 1).mT
    return energy.rows(s, trajectory.visible(k), attention.kernel.beta).free_energy.sum((0, 2))


def test_forces_are_gradients_of_the_free_energy_in_either_slot():
    """Full autograd through norms, biases and whatever positions there are, head by head."""
    torch.manual_seed(0)
    positions: list[list[parts.Position]] = [[RoPE()], [KeyNorm()], [QueryNorm(), RoPE(fraction=0.5)], [KeyNorm(), RoPE()]]
    cases = [(given, LowRank(rank=4, groups=groups), norm) for given in positions for groups, norm in NORMED]
    for given, form, norm in cases:
        net = model(heads=4, form=form, norm=norm, positions=given, kernel=Softmax(beta=0.7), **GIVEN)
        seen = capture(net, words(7))
        y = bare(seen, 0)
        query, key = y.clone().requires_grad_(), y.clone().requires_grad_()
        total = slots(seen, 0, query, key)
        pull = forces(seen, 0)
        assert (seen.block(0).read_attn(seen.steps[0].before) - seen.steps[0].read).abs().max() < 1e-12
        for head, one in enumerate(total):
            action, reaction = torch.autograd.grad(one, [query, key], retain_graph=True)
            assert (pull.action[:, head] + action).abs().max() < 1e-10
            assert (pull.reaction[:, head] + reaction).abs().max() < 1e-10


def test_what_is_constant_along_a_row_is_no_force_where_the_kernel_does_not_notice_it():
    """QueryNorm turns no key: with and without the constant the gradient differs, the weights do not."""
    torch.manual_seed(0)
    net = model(norm=LayerNorm(bias=True), positions=[QueryNorm()], functional=Functional())
    seen = capture(net, words(7))
    y = bare(seen, 0)
    query, pull = y.clone().requires_grad_(), forces(seen, 0)
    norm = seen.block(0).read_attn
    b = norm.affine(8)[1].double()
    attention, i = seen.block(0).attention, torch.arange(7)

    def free(gauged: bool) -> Tensor:
        u = attention.factors(norm.spread(query, query) * norm.size(query) + b, i)[0]  # A query + b
        constant = u @ attention.form.right(b[None, None]).mT
        return slots(seen, 0, query, y).sum() + (constant.sum() if gauged else 0)

    (whole,) = torch.autograd.grad(free(True), query)
    assert (pull.action.sum(1) + whole).abs().max() < 1e-10
    (other,) = torch.autograd.grad(free(False), query)
    assert (pull.action.sum(1) + other).abs().max() > 1e-3


def test_tied_content_moves_along_the_force():
    torch.manual_seed(0)
    rows = found(capture(model(content=Tied(scale=0.5), norm=RMSNorm(gain=False)), words(9)))
    for head in (None, 0, 1):
        assert only(rows, "attn.cos_action", head).mean == pytest.approx(1, abs=1e-12)
    even = model(form=Identity(scale=0.0, learned=False), mask=Full(), norm=None)  # every weight is 1/N, and there is no force
    rows = found(capture(even, words(9)))
    assert only(rows, "attn.reaction_ratio").mean is None and only(rows, "attn.cos_action").n_dropped == 2
    assert only(rows, "attn.cos_action").null_sd is None


def test_the_cosine_of_random_contents_is_its_null():
    """Contents of independent entries on the same clouds: mean 0 with the told sd, of the heads and of their mean."""
    torch.manual_seed(0)
    draws = 150
    net = model(dim=32, heads=3, depth=1, form=LowRank(rank=6), content=Dense(), positions=[RoPE()])
    seen = capture(net, words(12, batch=1))
    told, pulls = found(seen), [forces(seen, 0)]
    factor = net.layer(0).attention.content.left_factor
    drawn: dict[str, list[Tensor]] = {"attn.cos_action": [], "attn.cos_force": []}
    for _ in range(draws):
        with torch.no_grad():
            factor.copy_(torch.randn_like(factor))
        for key, values in drawn.items():
            cosines = []
            for pull in pulls:
                target = pull.action if key == "attn.cos_action" else pull.action + pull.reaction
                velocity = pull.mean @ factor  # the rows of a dense left factor are those of F^T
                cosines.append(torch.cosine_similarity(velocity.flatten(2), target.flatten(2), dim=-1))
            values.append(torch.cat(cosines).mean(0).detach())
    for key, values in drawn.items():
        cosines = torch.stack(values)
        for head, column in ((None, cosines.mean(1)), *enumerate(cosines.unbind(1))):
            row = only(told, key, head)
            assert row.null == 0.0
            assert column.mean().abs() < 4 * row.null_sd / math.sqrt(draws)
            assert column.std() == pytest.approx(row.null_sd, rel=0.2)


def test_the_null_of_one_prompt_is_that_of_the_catalogue():
    """1/sqrt(d PR), PR of the uncentred means, for a form of independent entries."""
    torch.manual_seed(0)
    net = model(dim=64, heads=8, depth=1, form=Dense(), norm=RMSNorm(gain=False), mask=Full())
    seen = capture(net, words(20, batch=1))
    m = energy.attention_mean(seen.pattern(0), bare(seen, 0))
    values = torch.linalg.svdvals(m).square()
    ratio = values.sum(-1).square() / values.square().sum(-1)
    told = torch.tensor([only(found(seen), "attn.cos_action", head).null_sd for head in range(8)])
    torch.testing.assert_close(told.double(), (64 * ratio[0]).rsqrt(), rtol=0.1, atol=0)


# Queries --------------------------------------------------------------------------------------------------------------


def test_query_rows_do_not_see_the_future(seed):
    """A changed token changes nothing of any query before it, bit for bit, through a whole model (math J 7)."""
    e, count = 9, 14
    near, far = All([Causal(), Window(size=5)]), All([Causal(), Window(size=12)])
    compositions: list[tuple[parts.Mask, list[parts.Position], parts.Kernel]] = [
        (Causal(), [RoPE()], Softmax(beta=2.0)),
        (near, [RoPE()], Softmax(beta=2.0)),
        (far, [], Softmax()),
        (far, [], SinkSoftmax()),
        (Causal(), [RoPE()], TopK(k=3)),
    ]
    for mask, positions, kernel in compositions:
        net = model(mask=mask, positions=positions, kernel=kernel, ffn=GELU(), **GIVEN)
        tokens = words(count)
        other = tokens.clone()
        other[:, e] = (tokens[:, e] + 1) % net.vocab
        one, two = capture(net, tokens), capture(net, other)
        defined = set()
        for k in one.attentions:
            first, second = (per_query(seen, k) for seen in (one, two))
            assert first.keys() == second.keys()
            for key, values in first.items():
                early = values[:, :, :e]
                assert torch.equal(early.nan_to_num(7), second[key][:, :, :e].nan_to_num(7)), (mask, kernel, key)
                defined |= {key} if early.isfinite().any() else set()
                if isinstance(kernel, Softmax) and values[:, :, e:].isfinite().any():
                    assert not torch.equal(values[:, :, e:], second[key][:, :, e:]), "the test means nothing"
        ranges = {("attn.range_norm", None), ("attn.range_norm", "nosink")}
        assert defined == set(first) - (ranges if mask == near else set()), "five keys are too few for a range"


def per_query(trajectory: Trajectory, k: int) -> dict[Any, Tensor]:
    """What the family tells of queries, and the other query-row quantities of the same pattern."""
    a, y = trajectory.pattern(k), trajectory.steps[k].read
    told = queries(trajectory, k) | {
        "m": energy.attention_mean(a, y),
        "velocity": forces(trajectory, k).velocity,
        "range": energy.attention_range(a, trajectory.visible(k)).range,
    }
    beta = temperature(trajectory.block(k).attention.kernel)
    if beta is not None:
        rows = energy.rows(trajectory.scores(k), trajectory.visible(k), beta)
        told |= {f"rows.{name}": values for name, values in rows._asdict().items()} | {"bound": bounds(trajectory, k)}
    return told


def test_uniform_attention_is_the_null():
    """M = 0: entropy, support and range are 1, the free energy that of the mean score, with a functional too."""
    torch.manual_seed(0)
    for kernel in (Softmax(beta=0.5), L2(), Sigmoid(), SinkSoftmax(learned=False)):
        net = model(form=Dense(), kernel=kernel, norm=LayerNorm(gain=False))
        with torch.no_grad():
            for block in net.blocks:
                block.attention.form.left_factor.zero_()
        rows = found(capture(net, words(12)))
        tolerance = 1e-2 if isinstance(kernel, L2) else 1e-9  # keys of a norm with eps are not quite of one size
        for head, key in itertools.product((None, 0, 1), ("attn.entropy_norm", "attn.support", "attn.range_norm")):
            row = only(rows, key, head)
            assert row.mean == pytest.approx(1, abs=tolerance) and row.null == 1.0
        assert only(rows, "attn.range_norm", 0, param="nosink").mean == pytest.approx(1, abs=tolerance)
    net = model(form=LowRank(rank=4), functional=Functional())
    rows = found(capture(net, words(12)))
    for head in (None, 0, 1):
        row = only(rows, "attn.free_energy0", head)
        assert row.mean < row.null and row.null_sd is None
    with torch.no_grad():
        for block in net.blocks:
            block.attention.form.left_factor.zero_()
            block.attention.biases.left.zero_()
    row = only(found(capture(net, words(12))), "attn.free_energy0")
    assert row.mean == pytest.approx(row.null, abs=1e-9)


def test_queries_against_loops():
    torch.manual_seed(0)
    beta = 1.7
    net = model(kernel=Softmax(beta=beta), mask=All([Causal(), Window(size=10)]))
    seen = capture(net, words(13))
    rows, a, s = found(seen), seen.pattern(0), seen.scores(0)
    h, t = a.shape[1], a.shape[2]
    expected: dict[tuple[str, int, str | None], list[list[float]]] = {}
    weight = energy_weights(seen)
    ranges = torch.full(a.shape[:3], math.nan, dtype=torch.float64)
    for head, b in itertools.product(range(h), range(len(a))):
        one: dict[tuple[str, str | None], list[float]] = {}
        for i in range(t):
            js = range(max(0, i - 9), i + 1)
            n, w = len(js), [float(a[b, head, i, j]) for j in js]
            scores = [float(s[b, head, i, j]) for j in js]
            entropy = -sum(x * math.log(x) for x in w)
            free = -math.log(sum(math.exp(beta * x) for x in scores) / n) / beta
            one.setdefault(("attn.free_energy0", None), []).append(free)
            if n > 1:
                one.setdefault(("attn.entropy_norm", None), []).append(entropy / math.log(n))
                one.setdefault(("attn.support", None), []).append(math.exp(entropy) / n)
                first, second = sorted(w)[:-3:-1]
                one.setdefault(("attn.top_gap", None), []).append(math.log(first / second))
            if n >= 8:
                far = sum(x * (i - j) for x, j in zip(w, js, strict=True)) / ((n - 1) / 2)
                one.setdefault(("attn.range_norm", None), []).append(far)
                ranges[b, head, i] = far
                rest = [(x, i - j) for x, j in zip(w, js, strict=True) if j > 0]
                mean = sum(distance for _, distance in rest) / len(rest)
                far = sum(x * distance for x, distance in rest) / sum(x for x, _ in rest) / mean
                one.setdefault(("attn.range_norm", "nosink"), []).append(far)
        for (key, param), values in one.items():
            expected.setdefault((key, head, param), []).append(values)
    for (key, head, param), values in expected.items():
        told = [sum(x) / len(x) for x in values]
        assert only(rows, key, head, param=param).mean == pytest.approx(sum(told) / len(told), abs=1e-10), key
    # heads count for their range as much as they move the token
    known = ~ranges.isnan().any(1)
    mean = (weight * ranges.nan_to_num()).sum(1) / weight.sum(1)
    each = torch.stack([values[keep].mean() for values, keep in zip(mean, known, strict=True)])
    assert only(rows, "attn.range_norm").mean == pytest.approx(float(each.mean()), abs=1e-10)


def energy_weights(trajectory: Trajectory) -> Tensor:
    """|D^h_i| of the first step: without biases what the heads add to the stream."""
    return trajectory.heads(0)[0].norm(dim=-1)


# All parts ------------------------------------------------------------------------------------------------------------


def test_every_part_is_told_or_left_out():
    """Every example of every part, through this family and the others that ask for operators and patterns.

    Rows are finite or undefined, and within what the catalogue says; only what has no field has no rows of one.
    """
    families = [Energy(), GradientFlow(probes=1, prompts=1), Signal(), Operators(limit=3, control=False)]
    kinds = [(parts.Operator, ("form", "content")), (parts.Kernel, ("kernel",)), (parts.Position, ("positions",))]
    kinds += [(parts.Mask, ("mask",)), (parts.Norm, ("norm",)), (parts.Placement, ("placement",))]
    torch.manual_seed(0)
    told, silent, placed = 0, set(), set()
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
            for family in families:
                observation = family.begin()
                observation.update(seen)
                rows = observation.rows()
                if not rows:
                    silent.add((family.family, repr(part)))
                if kind is parts.Position:
                    placed.add(repr(part))
                check(rows, family)
            told += 1
    assert told > 30
    assert {name for name, _ in silent} == {"wgf"}
    assert {part for _, part in silent} == placed | {repr(kernel) for kernel in (L2(), L2(beta=0.5), Hardmax())}


def check(rows: list[Row], family: parts.Observable | None = None) -> None:
    low = {"attn.cos_action": -1, "attn.cos_force": -1, "attn.cos_reaction": -1, "attn.free_energy0": -math.inf}
    low |= {"wgf.dissip_slope": -math.inf, "signal.correlation": -1, "op.growth": -math.inf}
    high = {"attn.entropy_norm": 1, "attn.support": 1, "attn.cos_action": 1, "attn.cos_force": 1, "attn.cos_reaction": 1}
    assert rows or family is not None
    for row in rows:
        assert row.key.removesuffix(".undefined") in (family or Energy).keys
        for value in (row.mean, row.sd, row.se, row.null, row.null_sd):
            assert value is None or math.isfinite(value), row
        if row.mean is not None and not row.key.endswith("undefined"):
            assert low.get(row.key, 0) - 1e-6 <= row.mean <= high.get(row.key, math.inf) + 1e-6, row
            assert not row.key.startswith(("op.asym", "op.attr", "op.compat", "wgf.omega", "wgf.r2", "wgf.v")) or row.mean <= 1, (
                row
            )


def test_what_a_kernel_does_not_define_is_left_out():
    every = {"attn.reaction_ratio", "attn.cos_action", "attn.cos_force", "attn.cos_reaction"}
    shape = {"attn.entropy_norm", "attn.support", "attn.top_gap", "attn.range_norm"}
    known = {
        Softmax(): every | shape | {"attn.free_energy0"},
        Linear(): every,
        L2(): shape,
        Hardmax(): every | shape,
        TopK(k=3): every | shape,
        Sigmoid(): every | shape,
    }
    for kernel, keys in known.items():
        rows = found(capture(model(kernel=kernel, depth=1), words(9)))
        assert {row.key.removesuffix(".undefined") for row in rows} == keys, kernel
    assert set(Energy.keys) == known[Softmax()]


def test_other_kinds_of_blocks():
    torch.manual_seed(0)
    for change in ({"placement": PostNorm()}, {"placement": SandwichNorm()}, {"placement": Sphere()}, {"norm": None}):
        check(found(capture(model(**change), words(9))))
    rows = found(capture(model(arrangement=Parallel(), ffn=GELU()), words(9)))
    assert {row.point for row in rows} == {"block"} and {row.layer for row in rows} == {0, 1}
    check(rows)
    cloudy = Trajectory.from_clouds(torch.randn(3, 2, 5, 8))
    assert found(cloudy) == [], "no model, no heads"


def test_degenerate_prompts_are_undefined_not_wrong():
    """One token, tokens that are all the same, an embedding of zeros."""
    net = model(norm=LayerNorm())
    for tokens in (words(1), torch.zeros(2, 9, dtype=torch.long)):
        check(found(capture(net, tokens)))
    lonely = only(found(capture(net, words(1))), "attn.entropy_norm")
    assert lonely.mean is None and lonely.n_dropped == 2
    with torch.no_grad():
        net.embedding.weight.zero_()
    rows = found(capture(net, words(9)))
    check(rows)
    same = model(norm=RMSNorm(gain=False))
    with torch.no_grad():
        same.embedding.weight.zero_()
    row = only(found(capture(same, words(9))), "attn.cos_action")
    assert row.mean is None and row.null_sd is None


def test_shared_blocks_have_rows_of_their_own():
    net = stir(Emformer(7, **{**model().settings.__dict__, "shared": True})).double().eval()
    rows = found(capture(net, words(9, vocab=7)))
    assert {row.layer for row in rows} == {0, 1}
    assert only(rows, "attn.cos_action", layer=0).mean != only(rows, "attn.cos_action", layer=1).mean
