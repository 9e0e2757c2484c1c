"""Effective operators are the layer on the bare cloud (math A.6), and what is told of them (math A.1, E.3, 0.1)."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from builders import attention, cloud, fill, model, span, stir
from torch import nn

from emformer import parts
from emformer.attention import Attention
from emformer.block import SequentialBlock
from emformer.diagnostics import ROWS, Diagnosis, _cores, diagnose, effective, spectra, table
from emformer.geometry.spectra import compatibility
from emformer.kernels import Sigmoid, SinkSoftmax, Softmax
from emformer.masks import Causal, Full
from emformer.model import Emformer
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import PSD, Dense, Identity, LowRank, Preconditioned, Skew, Split, Symmetric, Tied
from emformer.placements import PostNorm, PreNorm, SandwichNorm
from emformer.positions import RoPE
from emformer.settings import Drift, Functional

D, H, N = 12, 3, 9
GIVEN = {"functional": Functional(), "drift": Drift()}
NORMS = [LayerNorm(bias=True), LayerNorm(gain=False), LayerNorm(gain=False, bias=True), RMSNorm(), RMSNorm(gain=False)]
norms = pytest.mark.parametrize("norm", NORMS, ids=repr)


def block(layer: Attention, norm: parts.Norm | None, placement: parts.Placement | None = None) -> SequentialBlock:
    """The layer behind this norm, gain and bias drawn at random."""
    return stir(SequentialBlock(layer, None, norm, placement or PreNorm(), 1.0, 0.0)).double()


def bare(norm: parts.Norm, x: torch.Tensor) -> torch.Tensor:
    """Pi x / s(x), written here."""
    if isinstance(norm, LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


# The fold -------------------------------------------------------------------------------------------------------------


@norms
@pytest.mark.parametrize("mask", [Causal(), Full()], ids=repr)
@pytest.mark.parametrize("part", [LowRank(rank=4), LowRank(rank=4, groups=1), Dense()], ids=repr)
@torch.no_grad()
def test_effective_operators_are_the_layer_on_the_bare_cloud(seed, part, mask, norm):
    layer = attention(part, part, mask=mask, **GIVEN)
    whole = block(layer, norm)
    found = effective(whole)
    folded = attention(Dense(), Dense(), mask=mask, **GIVEN)
    fill(folded.form.left_factor, found.form.mT)
    fill(folded.content.left_factor, found.content.mT)
    fill(folded.biases.left, found.functional)
    fill(folded.drift, found.drift)
    raw = 3 * cloud(N) + 1
    y, seen = whole.read_attn(raw), bare(norm, raw)
    assert (folded.weights(seen, span(N)) - layer.weights(y, span(N))).abs().max() < 1e-11
    assert (folded.lift(folded(seen, span(N))) - layer.lift(layer(y, span(N)))).abs().max() < 1e-11


@pytest.mark.parametrize("kernel", [Sigmoid(), SinkSoftmax(learned=False)], ids=repr)
@pytest.mark.parametrize("part", [LowRank(rank=4), LowRank(rank=4, groups=1), Dense()], ids=repr)
@torch.no_grad()
def test_every_bias_is_told_where_the_kernel_notices_it(seed, part, kernel):
    """s = y^T M y + u.y_j + w.y_i + c0, and D = sum_h (F_h m_h - (1 - mass_h) shift_h) + g."""
    layer = attention(part, part, kernel=kernel, **GIVEN)
    norm = LayerNorm(bias=True)
    whole = block(layer, norm)
    assert layer.biases.right is not None and layer.value_bias is not None, "the test means nothing"
    found = effective(whole)
    raw = 3 * cloud(N) + 1
    y, seen = whole.read_attn(raw), bare(norm, raw)
    u, v = layer.factors(y, span(N))
    scores = u @ v.repeat_interleave(H // v.shape[1], 1).mT
    left = seen.unsqueeze(1) @ found.form @ seen.unsqueeze(1).mT
    column, row = (torch.einsum("bnd,hd->bhn", seen, x) for x in (found.functional, found.query))
    told = left + column.unsqueeze(-2) + row.unsqueeze(-1) + found.constant[:, None, None]
    assert (told - scores).abs().max() < 1e-11
    a = layer.weights(y, span(N))
    mass = a.sum(-1, keepdim=True)
    assert (1 - mass).abs().max() > 0.01
    heads = a @ seen.unsqueeze(1) @ found.content.mT - (1 - mass) * found.shift[:, None]
    assert (heads.sum(1) + found.drift - layer.lift(layer(y, span(N)))).abs().max() < 1e-11


@torch.no_grad()
def test_with_rope_it_is_the_form_of_offset_0(seed):
    layer = attention(LowRank(rank=4), LowRank(rank=4), positions=[RoPE()], **GIVEN)
    whole = block(layer, RMSNorm())
    found = effective(whole)
    raw = cloud(1)
    seen = bare(RMSNorm(), raw)[:, 0]
    u, v = layer.factors(whole.read_attn(raw), torch.tensor([5]))  # a token and itself
    own = torch.einsum("bd,hde,be->bh", seen, found.form, seen)
    own = own + seen @ (found.functional + found.query).mT + found.constant
    assert (own - (u * v).sum(-1)[..., 0]).abs().max() < 1e-12


@pytest.mark.parametrize("norm, placement", [(None, PreNorm()), (LayerNorm(), PostNorm())], ids=repr)
@torch.no_grad()
def test_what_is_read_raw_is_not_folded(norm, placement):
    layer = attention(LowRank(rank=4), Dense(), **GIVEN)
    found = effective(block(layer, norm, placement))
    assert torch.equal(found.form, layer.form.matrix()) and torch.equal(found.content, layer.content.matrix())
    assert (found.functional - layer.functional()).abs().max() < 1e-15 and torch.equal(found.drift, layer.drift)


@torch.no_grad()
def test_the_second_norm_of_a_sandwich_is_left_out(seed):
    layer = attention(Dense(), Dense())
    one, two = (block(copy.deepcopy(layer), LayerNorm(gain=False), place) for place in (PreNorm(), SandwichNorm()))
    assert torch.equal(effective(one).content, effective(two).content)


@torch.no_grad()
def test_the_gain_that_makes_m_lopsided_keeps_it_symmetric(seed):
    """A^T M A, not M A: a symmetric form stays one, a content does not."""
    for norm in (RMSNorm(), LayerNorm()):
        found = effective(block(attention(Symmetric(), Symmetric()), norm))
        assert (found.form - found.form.mT).abs().max() < 1e-14
        assert (found.content - found.content.mT).abs().max() > 1e-3
        assert torch.linalg.eigvalsh(effective(block(attention(PSD(rank=4), Dense()), norm)).form).min() > -1e-14


@torch.no_grad()
def test_nothing_is_lost_in_float32(seed):
    """Of a model in float32 the product of factors of width r has rank r in float64, and the model is left as it is."""
    net = model(norm=LayerNorm(), dtype=torch.float32)
    before = copy.deepcopy(net.state_dict())
    found = effective(net.layer(0))
    assert all(x.dtype == torch.float64 for x in found)
    values = torch.linalg.svdvals(found.form)
    assert (values[:, 4:] < 1e-14 * values[:, :1]).all()
    exact = effective(copy.deepcopy(net).double().layer(0))
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    diagnose(net)
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in net.state_dict().items())


# What is told ---------------------------------------------------------------------------------------------------------


def rows(form: parts.Operator, content: parts.Operator | None = None, **overrides) -> list[Diagnosis]:
    fields = {"dim": D, "heads": H, "norm": None, "form": form, "content": content or form} | overrides
    return diagnose(model(**fields))


@pytest.mark.parametrize(
    "part, asym, attraction",
    [
        (Identity(scale=0.7), 0, 1),
        (Identity(scale=-0.7), 0, 0),
        (PSD(rank=2), 0, 1),
        (Symmetric(), 0, None),
        (Symmetric(rank=2), 0, None),
        (Split(theta=0.0), 0, None),
        (Skew(), 1, math.nan),
    ],
    ids=repr,
)
def test_the_constraints_show(part, asym, attraction):
    for row in rows(part):
        for a, pi in ((row.asym_form, row.attraction_form), (row.asym_content, row.attraction_content)):
            assert a == pytest.approx(asym, abs=1e-14)
            if attraction is None:
                assert 0.1 < pi < 0.9
            else:
                assert pi == pytest.approx(attraction, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("form", [Dense(), LowRank(rank=2), LowRank(rank=4)], ids=repr)
def test_tied_contents_are_compatible(form, seed):
    for row in rows(form, Tied(scale=0.3, learned=False)):
        assert row.compat < 1e-3 and row.compat_sphere < 1e-12
        assert row.norm_content == pytest.approx(0.3 * row.norm_form)
    for row in rows(
        form, Tied(scale=-0.3, learned=False)
    ):  # backwards down the gradient: the sphere does not mind, the metric does
        assert row.compat > 0.3 and row.compat_sphere < 1e-12
    for row in rows(form, Preconditioned()):
        assert row.compat < 1e-3
    # F = c M with a gain: F_eff = c M G = (c G^-1) M_eff, still a metric, no longer a multiple
    for row in rows(form, Tied(scale=0.3, learned=False), norm=RMSNorm()):
        assert row.compat < 1e-3 and row.compat_sphere > 1e-3


@norms
@pytest.mark.parametrize("part", [LowRank(rank=2), LowRank(rank=1, groups=1), PSD(rank=2), Symmetric(rank=2)], ids=repr)
def test_the_subspace_tells_what_the_matrices_tell(seed, part, norm):
    """Narrow operators are looked at in the space that both live in; d = 12 > 4 r."""
    net = model(dim=D, heads=H, form=part, content=part, norm=norm, depth=1)
    found = effective(net.layer(0))
    m = _cores(net.layer(0))[0]
    assert m.shape[-1] < D
    assert (torch.linalg.svdvals(m) - torch.linalg.svdvals(found.form)[:, : m.shape[-1]]).abs().max() < 1e-12
    delta = compatibility(found.content, found.form).delta
    for row, w, other, expected in zip(diagnose(net), found.form, found.content, delta, strict=True):
        s, t = torch.linalg.svdvals(w), torch.linalg.svdvals(other)
        for x, asym, attraction in (
            (w, row.asym_form, row.attraction_form),
            (other, row.asym_content, row.attraction_content),
        ):
            assert asym == pytest.approx(float(((x - x.mT) / 2).norm() ** 2 / x.norm() ** 2), abs=1e-12)
            values = torch.linalg.eigvalsh((x + x.mT) / 2)
            assert attraction == pytest.approx(float(values.clamp(min=0).sum() / values.abs().sum()), abs=1e-12)
        assert row.compat == pytest.approx(float(expected), abs=2e-4) and row.compat_error <= 1e-4
        cosine = float((w * other).sum() / (w.norm() * other.norm()))
        assert row.compat_sphere == pytest.approx(1 - cosine**2, abs=1e-12)
        assert (row.norm_form, row.norm_content) == pytest.approx((float(w.norm()), float(other.norm())), rel=1e-12)
        assert (row.top_form, row.top_content) == pytest.approx((float(s[0]), float(t[0])), rel=1e-12)
        assert row.stable_form == pytest.approx(float((w.norm() / s[0]) ** 2), rel=1e-12)
        p = t[t > 1e-12] / t[t > 1e-12].sum()
        assert row.rank_content == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-9)


def test_a_rotation_of_the_space_changes_nothing(seed):
    """Of a model whose norm commutes with it: RMSNorm without gain."""
    net = model(dim=D, heads=H, form=LowRank(rank=4), content=LowRank(rank=4), norm=RMSNorm(gain=False))
    turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    turned = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in turned.named_parameters():
            if name.endswith("_factor"):
                p.copy_(p @ turn)
    for one, two in zip(diagnose(net), diagnose(turned), strict=True):
        for name, value in one._asdict().items():
            tolerance = 2e-4 if name.startswith("compat") and "sphere" not in name else 1e-10
            assert two._asdict()[name] == pytest.approx(value, abs=tolerance), name


def test_a_random_model_shows_the_null(seed):
    found = diagnose(model(dim=48, heads=4, form=Dense(), content=Dense(), norm=RMSNorm(gain=False)))
    for name, null, tolerance in (("asym", 47 / 96, 0.03), ("attraction", 0.5, 0.05)):
        for role in ("form", "content"):
            values = [getattr(row, f"{name}_{role}") for row in found]
            assert sum(values) / len(values) == pytest.approx(null, abs=tolerance)
    assert sum(row.compat for row in found) / len(found) == pytest.approx(0.84, abs=0.03)
    assert all(row.compat_sphere > 0.99 for row in found)


def test_what_is_too_wide_or_zero_is_nan():
    net = model(dim=D, heads=H, form=Dense(), content=LowRank(rank=2), depth=1)
    assert all(math.isnan(row.compat) and row.compat_sphere > 0 for row in diagnose(net, widest=D - 1))
    assert all(row.compat > 0 for row in diagnose(net, widest=D))
    nn.init.zeros_(net.layer(0).attention.content.left_factor)
    for row in diagnose(net):
        assert all(math.isnan(x) for x in (row.asym_content, row.attraction_content, row.compat, row.rank_content))
        assert row.norm_content == 0 and row.asym_form > 0


def test_spectra_of_every_layer(seed):
    net = model(norm=LayerNorm())
    found = spectra(net)
    assert len(found) == 2
    for layer, told in enumerate(found):
        exact = effective(net.layer(layer))
        assert told.singular_form.shape == told.eigen_content.shape == (2, 8) and told.eigen_form.is_complex()
        assert (told.singular_content.square().sum(-1).sqrt() - exact.content.norm(dim=(-2, -1))).abs().max() < 1e-12
        assert (told.eigen_form.sum(-1) - exact.form.diagonal(dim1=-2, dim2=-1).sum(-1)).abs().max() < 1e-12
        assert (told.singular_form.diff(dim=-1) <= 0).all()


def test_shared_blocks_are_told_once():
    net = model(shared=True, depth=3)
    assert [(row.layer, row.head) for row in diagnose(net)] == [(0, 0), (0, 1)] and len(spectra(net)) == 1
    assert [(row.layer, row.head) for row in diagnose(model(depth=2))] == [(0, 0), (0, 1), (1, 0), (1, 1)]


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_a_head_and_says_what_chance_gives():
    found = diagnose(model())
    lines = table(found).splitlines()
    assert any("null" in line and "(d-1)/2d" in line and "pi 1/2" in line for line in lines)
    body = [line.split() for line in lines if re.match(r"\d", line)]
    assert [line[:2] for line in body] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    for line, row in zip(body, found, strict=True):
        assert float(line[2]) == pytest.approx(row.asym_form, abs=6e-4)
        assert float(line[-1]) == pytest.approx(row.rank_content, abs=0.06)
    assert max(map(len, lines)) <= 130


def test_the_table_of_many_heads_has_three_lines_a_layer():
    first = diagnose(model(depth=1))[0]
    many = [first._replace(layer=k // 40, head=k % 40, asym_form=k / 80) for k in range(80)]
    many[3] = many[3]._replace(asym_form=math.nan)
    lines = [line.split() for line in table(many).splitlines() if re.match(r"\d +m", line)]
    assert [line[:2] for line in lines] == [[str(k), word] for k in (0, 1) for word in ("mean", "min", "max")]
    kept = [k / 80 for k in range(40) if k != 3]
    assert [float(line[2]) for line in lines[:3]] == pytest.approx([sum(kept) / 39, 0, 39 / 80], abs=6e-4)
    assert "1 of 800 values are nan" in table(many) and "nan" not in table(many[4:])
    assert len(table(many[:ROWS]).splitlines()) > ROWS


def test_the_table_says_how_far_delta_may_be_off():
    row = diagnose(model(depth=1))[0]
    assert "upper bound" not in table([row]) and "at most 0.020" in table([row._replace(compat_error=0.02)])


def test_a_model_of_every_norm_and_kernel_is_told():
    """Nothing is refused, whatever the parts: here those that are not scores of a form."""
    net = Emformer(
        9,
        dim=8,
        depth=1,
        heads=2,
        form=LowRank(rank=4),
        content=Tied(),
        kernel=SinkSoftmax(),
        mask=Full(),
        placement=PreNorm(),
        norm=None,
        positions=[RoPE()],
        functional=Functional(),
        drift=Drift(),
        layers={0: {"kernel": Softmax()}},
    )
    assert len(diagnose(net)) == 2
