"""What positions, masks, norms, networks and placements promise, and what every part promises as plain data."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math

import pytest
import torch
from builders import cloud, examples, span, stir, variants
from torch import nn

from emformer import parts
from emformer.masks import All, Causal, Full, Visible, Window, visible
from emformer.norms import LayerNorm, Norm, RMSNorm
from emformer.placements import Shape
from emformer.positions import PositionMap

D, H, R, T = 8, 2, 4, 9
KINDS = [parts.Operator, parts.Kernel, parts.Position, parts.Mask, parts.Norm, parts.FFN, parts.Placement, parts.Arrangement]
PARTS = pytest.mark.parametrize("setting", [example for kind in KINDS for example in examples(kind)])
POSITIONS = pytest.mark.parametrize("setting", examples(parts.Position))
MASKS = pytest.mark.parametrize("mask", examples(parts.Mask))
NORMS = pytest.mark.parametrize("setting", examples(parts.Norm))
NETWORKS = pytest.mark.parametrize("setting", examples(parts.FFN))
PLACEMENTS = pytest.mark.parametrize("setting", examples(parts.Placement))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_has_variants_and_every_variant_examples(kind):
    assert variants(kind)
    for cls in variants(kind):
        assert cls.examples() and all(type(example) is cls for example in cls.examples())
        assert cls.__subclasses__() == [], f"{cls.__name__} is final"
        assert inspect.getdoc(cls) != inspect.getdoc(kind), f"{cls.__name__} has a contract of its own"


@PARTS
def test_a_setting_is_immutable_and_hashable(setting):
    assert dataclasses.is_dataclass(setting)
    twin = dataclasses.replace(setting)
    assert setting == twin and hash(setting) == hash(twin) and twin is not setting
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):  # a field, or anything else
        setting.__setattr__(next(iter(vars(setting)), "anything"), 1)
    assert all(not isinstance(value, list | dict | set) for value in vars(setting).values())


def revive(value):
    """The inverse of `parts.plain`, written here."""
    if isinstance(value, dict) and "class_path" in value:
        module, _, name = value["class_path"].rpartition(".")
        arguments = {key: revive(item) for key, item in value.get("init_args", {}).items()}
        return getattr(importlib.import_module(module), name)(**arguments)
    return tuple(map(revive, value)) if isinstance(value, list) else value


@PARTS
def test_a_setting_survives_as_plain_data(setting):
    plain = parts.plain(setting)
    assert_plain(plain)
    assert revive(plain) == setting
    assert parts.plain(revive(plain)) == plain


def assert_plain(value) -> None:
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or type(value) in (str, int, float, bool), value


# Positions ------------------------------------------------------------------------------------------------------------


def pair(dtype=torch.float64, groups: int = H) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, H, T, R, dtype=dtype), torch.randn(2, groups, T, R, dtype=dtype)


@POSITIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_position_keeps_shape_and_dtype(setting, dtype):
    position = setting.build(R).to(dtype)
    assert isinstance(position, PositionMap)
    u, v = pair(dtype, groups=1)
    a, b = position(u, v, span(T), span(T))
    assert (a.shape, a.dtype, b.shape, b.dtype) == (u.shape, dtype, v.shape, dtype)
    assert a.isfinite().all() and b.isfinite().all()


@POSITIONS
def test_a_position_that_leaves_keys_alone_returns_them(setting):
    position, (u, v) = setting.build(R).double(), pair()
    _, b = position(u, v, span(T), span(T))
    if position.acts_on_keys:
        assert (b - v).abs().max() > 1e-3
    else:
        assert b is v or torch.equal(b, v)


@POSITIONS
def test_only_differences_of_positions_count(setting):
    """Holds for rotations by their group law, for norms because they know no position."""
    position, (u, v) = setting.build(R).double(), pair()

    def score(start: int) -> torch.Tensor:
        a, b = position(u, v, span(T, start), span(T, start))
        return a @ b.mT

    assert max((score(start) - score(0)).abs().max() for start in (1, 7, 500)) < 1e-10


@POSITIONS
def test_rows_are_mapped_one_by_one(setting):
    """What a cache rests on: a row's image depends on this row and its position alone."""
    position, (u, v) = setting.build(R).double(), pair()
    a, b = position(u, v, span(T), span(T))
    for k in range(T):
        one, _ = position(u[:, :, [k]], v, span(1, k), span(T))
        _, other = position(u, v[:, :, [k]], span(T), span(1, k))
        assert (one - a[:, :, [k]]).abs().max() < 1e-12
        assert (other - b[:, :, [k]]).abs().max() < 1e-12


@POSITIONS
def test_whether_it_reads_factors(setting):
    """(u G, v G^-T) has the same scores before; after a map that reads the factors it has others."""
    torch.manual_seed(0)
    position, (u, v) = setting.build(R).double(), pair()
    g = torch.randn(R, R, dtype=torch.float64) + 2 * torch.eye(R, dtype=torch.float64)
    a, b = position(u, v, span(T), span(T))
    c, d = position(u @ g, v @ torch.linalg.inv(g).mT, span(T), span(T))
    assert ((a @ b.mT - c @ d.mT).abs().max() > 1e-3) == position.reads_factors


@POSITIONS
def test_gradients_of_a_position(setting):
    position = setting.build(R).double()
    u, v = (x.requires_grad_() for x in pair())
    assert torch.autograd.gradcheck(lambda u, v: position(u, v, span(T), span(T)), (u, v))


# Masks ----------------------------------------------------------------------------------------------------------------


def table(mask: parts.Mask, count: int = T, start: int = 0) -> torch.Tensor:
    i = span(count, start)
    return mask.visible(i[:, None], i[None, :])


@MASKS
def test_claims_of_a_mask_agree_with_its_table(mask):
    seen = table(mask)
    assert seen.shape == (T, T) and seen.dtype == torch.bool
    lower = torch.ones(T, T, dtype=torch.bool).tril()
    assert mask.causal == (not (seen & ~lower).any())
    assert {"full": seen.all(), "triangle": torch.equal(seen, lower), "table": True}[mask.shape]
    assert seen.diagonal().all(), "a token sees itself, so that no row is empty"


@MASKS
def test_a_mask_knows_differences_of_positions_alone(mask):
    assert torch.equal(table(mask), table(mask, start=5))


@MASKS
@pytest.mark.parametrize("queries", [T, 4, 1])
def test_what_a_kernel_is_told(mask, queries):
    """`visible` and `Visible.dense` say what the predicate says, for all queries and for the last few."""
    j = span(T)
    i = j[T - queries :]
    seen = visible(mask, i, T)
    assert not (seen.triangle and seen.table is not None)
    assert torch.equal(seen.dense(queries, T, j.device), mask.visible(i[:, None], j[None, :]))
    if mask.shape in ("full", "triangle") and queries in (T, 1):
        assert seen.table is None  # no table where a fused kernel needs none


def test_dense_patterns():
    cpu = torch.device("cpu")
    assert Visible(None).dense(2, 3, cpu).tolist() == [[True] * 3] * 2
    assert Visible(None, triangle=True).dense(2, 2, cpu).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("first", examples(parts.Mask))
@pytest.mark.parametrize("second", examples(parts.Mask))
def test_all_is_and(first, second):
    both = All(masks=(first, second))
    assert torch.equal(table(both), table(first) & table(second))
    assert torch.equal(table(All(masks=(both, Causal()))), table(both) & table(Causal()))
    test_claims_of_a_mask_agree_with_its_table(both)


def test_masks_by_hand():
    assert table(Window(size=2), 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert table(Causal(), 3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert table(Full(), 2).all()
    assert All(masks=(Full(), Causal())).shape == "triangle" and All(masks=(Full(), Full())).shape == "full"
    for wrong in (lambda: Window(size=0), lambda: All(masks=())):
        with pytest.raises(parts.UserError):
            wrong()


# Norms ----------------------------------------------------------------------------------------------------------------


@NORMS
def test_a_norm_puts_rows_on_the_sphere(setting):
    """|y| = sqrt(d), before any gain or bias is learned, whatever the length of x."""
    norm = setting.build(D).double()
    torch.manual_seed(0)
    for size in (1.0, 100.0):
        y = norm(size * (cloud(T, D) + 1))
        assert (y.norm(dim=-1) / math.sqrt(D) - 1).abs().max() < 1e-4  # what eps takes


@NORMS
def test_a_norm_forgets_length(setting):
    norm, x = stir(setting.build(D)).double(), cloud(T, D)
    assert (norm(1000 * x) - norm(100 * x)).abs().max() < 1e-4
    assert (norm(-100 * x) - norm(100 * x)).abs().max() > 0.1


@NORMS
def test_a_norm_acts_on_tokens_one_by_one(setting):
    norm, x = stir(setting.build(D)).double(), cloud(T, D)
    order = torch.randperm(T)
    assert torch.equal(norm(x[:, order]), norm(x)[:, order])
    assert torch.autograd.gradcheck(norm, cloud(2, D, 1).requires_grad_())


@NORMS
def test_what_a_norm_says_of_itself(setting):
    """y = Gamma Pi x / s(x) + b: as a matrix on the bare cloud, and summand by summand (math A.6)."""
    norm, x = stir(setting.build(D)).double(), cloud(T, D) + 1
    assert isinstance(norm, Norm)
    y, (matrix, bias) = norm(x), norm.affine(D)
    centred = x - x.mean(-1, keepdim=True) if norm.centred else x
    bare = centred / norm.size(x)
    assert (bare @ matrix.mT + bias - y).abs().max() < 1e-12
    summands = torch.randn(3, *x.shape, dtype=x.dtype)
    summands[0] += x - summands.sum(0)
    shares = norm.spread(x, summands)
    assert (shares.sum(0) + bias - y).abs().max() < 1e-12
    assert (norm.spread(x, 2 * summands[1]) - 2 * shares[1]).abs().max() < 1e-12


# Networks -------------------------------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_network_is_finite(setting, dtype):
    network, x = stir(setting.build(D)).to(dtype), 10 * cloud(T, D, dtype=dtype)
    y = network(x)
    assert y.shape == x.shape and y.dtype == dtype and y.isfinite().all()
    assert y.abs().max() > 0


@NETWORKS
def test_a_network_acts_on_tokens_one_by_one(setting):
    network, x = stir(setting.build(D)).double(), cloud(T, D)
    order = torch.randperm(T)
    assert (network(x[:, order]) - network(x)[:, order]).abs().max() < 1e-12
    other = x.clone()
    other[:, 3] += 1
    change = (network(other) - network(x)).abs().amax((0, 2))
    assert change[3] > 1e-3 and change[torch.arange(T) != 3].max() < 1e-12
    assert torch.autograd.gradcheck(network, cloud(2, D, 1).requires_grad_())


# Placements -----------------------------------------------------------------------------------------------------------


@PLACEMENTS
@pytest.mark.parametrize("norm", [None, RMSNorm(), LayerNorm(bias=True)], ids=repr)
def test_a_placement_is_three_token_wise_maps(setting, norm):
    x, update, order = cloud(T, D), cloud(T, D), torch.randperm(T)
    read, shape, place = (module if module is None else stir(module).double() for module in setting.build(norm, D))
    for module in (module for module in (read, place, setting.enter(D)) if module is not None):
        assert isinstance(module, nn.Module)
        assert module(x).shape == x.shape
        assert (module(x[:, order]) - module(x)[:, order]).abs().max() < 1e-12
    if shape is None:
        return
    assert isinstance(shape, Shape)
    shaped = shape(x, update)
    assert shaped.shape == x.shape
    assert (shape(x[:, order], update[:, order]) - shaped[:, order]).abs().max() < 1e-12
    # it distributes over summands, here three heads
    summands = torch.randn(2, 3, T, D, dtype=torch.float64)
    summands[:, 0] += update - summands.sum(1)
    shares = shape.pieces(x.unsqueeze(1), update.unsqueeze(1), summands)
    assert (shares.sum(1) + shape.rest(D) - shaped).abs().max() < 1e-12
    twice = shape.pieces(x.unsqueeze(1), update.unsqueeze(1), 2 * summands)
    assert (twice - 2 * shares).abs().max() < 1e-12


@PLACEMENTS
def test_a_placement_that_does_not_close_leaves_states_normalised(setting):
    norm = RMSNorm(gain=False)
    _, _, place = setting.build(norm, D)
    x = 5 * cloud(T, D)
    placed = x if place is None else place(x)
    distance = (norm.build(D)(placed) - placed).abs().max()
    assert distance > 1e-2 if setting.closes else distance < 1e-5
    enter = setting.enter(D)
    if enter is not None:  # what the states live on, the embedding is put on
        assert (enter(placed) - placed).abs().max() < 1e-12
