"""One attention, computed in several ways: projected, absorbed, decoded with a cache, cut short (math A.7, J 5, 7)."""

from __future__ import annotations

import pytest
import torch
from builders import LEGIBLE, attention, cloud, model, span, words

from emformer.block import Parallel
from emformer.ffn import GELU, SwiGLU
from emformer.kernels import L2, Sigmoid, Sinkhorn, SinkSoftmax, TopK, Unnormalised
from emformer.masks import All, Causal, Full, Window
from emformer.norms import LayerNorm
from emformer.operators import PSD, Dense, Identity, LowRank, Preconditioned, ScaledOrthogonal, Skew, Tied
from emformer.placements import PostNorm, SandwichNorm, Sphere
from emformer.positions import KeyNorm, QueryNorm, RoPE
from emformer.settings import Drift, Embedding, Functional, Learned

SLIDING = All(masks=(Causal(), Window(size=4)))
GROUPED = LowRank(rank=4, groups=2)
LEARNED = Embedding(unembed_std=LEGIBLE.unembed_std, positions=Learned(std=0.5))
TIED = Embedding(std=0.35, tied=True)

# name: (fields of the model, numbers that layer 0 caches for a token; d = 8)
MODELS = {
    "low-rank": ({}, 8),  # 2Hr = 16 > d: absorbed
    "wide": (dict(form=LowRank(rank=2), content=LowRank(rank=1)), 6),  # 2*2 + 2*1 < d: projected
    "unequal widths": (dict(form=LowRank(rank=2), content=LowRank(rank=6)), 8),
    "multi-query": (dict(form=LowRank(rank=2, groups=1), content=LowRank(rank=2, groups=1)), 4),
    "grouped": (dict(heads=4, form=LowRank(rank=2, groups=2), content=LowRank(rank=2, groups=1)), 6),
    "grouped, absorbed": (dict(heads=4, form=LowRank(rank=4, groups=2), content=LowRank(rank=2)), 8),
    "rope": (dict(positions=[RoPE()]), 16),
    "rope, grouped": (
        dict(heads=4, form=LowRank(rank=4, groups=2), content=LowRank(rank=4, groups=2), positions=[RoPE()]),
        16,
    ),
    "rope, part of the plane": (dict(positions=[RoPE(base=100.0, fraction=0.5, offset=3)]), 16),
    "dense": (dict(form=Dense(), content=Dense()), 8),
    "dense, rope": (dict(form=Dense(), content=Dense(), positions=[RoPE()]), 8),
    "dense form": (dict(form=Dense()), 8),
    "dense form, rope": (dict(form=Dense(), positions=[RoPE()]), 8),
    "dense content": (dict(content=Dense()), 8),
    "dense content, rope": (dict(content=Dense(), positions=[RoPE()]), 16),
    "window": (dict(mask=SLIDING), 8),
    "window, rope": (dict(mask=SLIDING, positions=[RoPE()]), 16),
    "window, dense": (dict(mask=SLIDING, form=Dense(), content=Dense(), positions=[RoPE()]), 8),
    "query norm": (dict(positions=[QueryNorm()]), 8),
    "key norm": (dict(positions=[KeyNorm()]), 16),
    "both norms, rope": (dict(positions=[QueryNorm(), KeyNorm(), RoPE()]), 16),
    "key norm, dense": (dict(form=Dense(), content=Dense(), positions=[KeyNorm(), RoPE()]), 8),
    "functional and drift": (dict(functional=Functional(), drift=Drift()), 8),
    "functional, rope": (dict(functional=Functional(), positions=[RoPE()]), 16),
    "functional, dense, rope": (
        dict(functional=Functional(), positions=[RoPE()], form=Dense(), content=Dense(), drift=Drift()),
        8,
    ),
    "post-norm": (dict(placement=PostNorm(), ffn=GELU()), 8),
    "layer norm": (dict(norm=LayerNorm(bias=True), ffn=SwiGLU(bias=True)), 8),
    "no norm": (dict(norm=None, epsilon=0.5), 8),
    "sink, functional": (dict(kernel=SinkSoftmax(), functional=Functional(), drift=Drift()), 16),
    "sink": (dict(kernel=SinkSoftmax(), drift=Drift()), 8),
    "unnormalised, drift": (dict(kernel=Unnormalised(), drift=Drift()), 8),
    "l2": (dict(kernel=L2()), 16),
    "l2, dense": (dict(kernel=L2(), form=Dense(), content=Dense()), 8),
    "top-k, orthogonal": (dict(kernel=TopK(k=3), form=ScaledOrthogonal(), content=ScaledOrthogonal()), 8),
    "psd, tied, rope": (dict(form=PSD(rank=4), content=Tied(), positions=[RoPE()]), 16),
    "skew, metric": (dict(form=Skew(), content=Preconditioned(), functional=Functional()), 8),
    "sphere, identity": (dict(form=Identity(), content=Identity(), placement=Sphere(), epsilon=0.5), 8),
    "sandwich, parallel": (dict(placement=SandwichNorm(), arrangement=Parallel(), ffn=GELU()), 8),
    "shared": (dict(shared=True, depth=3, ffn=GELU(), epsilon=1 / 3), 8),
    "learned positions": (dict(embedding=LEARNED), 8),
    "tied": (dict(embedding=TIED), 8),
    "mixed layers": (
        dict(
            depth=4,
            form=Dense(),
            content=Dense(),
            ffn=GELU(),
            layers={
                1: {"form": LowRank(rank=2), "content": LowRank(rank=1), "positions": [RoPE()], "ffn": None},
                2: {"mask": SLIDING, "norm": LayerNorm(bias=True), "drift": Drift()},
                3: {"content": LowRank(rank=4), "epsilon": 0.5, "placement": PostNorm()},
            },
        ),
        8,
    ),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def build(name: str, **more):
    return model(**(MODELS[name][0] | more))


def per_token(a: torch.Tensor, b: torch.Tensor) -> float:
    """max over tokens of |a - b| / |b|."""
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


@torch.no_grad()
def decode(net, tokens: torch.Tensor, cuts: list[int]) -> tuple[torch.Tensor, list]:
    """Last states of the tokens, given piece by piece to one memory, and that memory."""
    memory, states = net.memory(), []
    for piece in tokens.split(cuts, 1):
        *_, step = net.flow(piece, memory)
        states.append(step.after)
    return torch.cat(states, 1), memory


@torch.no_grad()
def last(net, tokens: torch.Tensor) -> torch.Tensor:
    *_, step = net.flow(tokens)
    return step.after


@EVERY
def test_decoding_equals_the_full_forward(seed, name):
    """Token by token, after a prompt, and in pieces of several tokens."""
    net, tokens = build(name), words(12)
    full, logits = last(net, tokens), net(tokens)
    for cuts in ([1] * 12, [5] + [1] * 7, [1, 4, 7], [6, 1, 5], [12]):
        states, memory = decode(net, tokens, cuts)
        assert (states - full).abs().max() < 1e-10
        assert (net.unembed(states) - logits).abs().max() < 1e-10
        assert [layer.length for layer in memory] == [12] * net.settings.depth


@EVERY
def test_decoding_in_single_precision(seed, name):
    net, tokens = build(name, dtype=torch.float32), words(12)
    if net.layer(0).attention.kernel.sparse:
        pytest.skip("which tokens are taken hangs on the last bit of a score")
    for cuts in ([1] * 12, [5] + [1] * 7):
        assert per_token(decode(net, tokens, cuts)[0], last(net, tokens)) < 1e-5


@EVERY
def test_the_cache_has_the_numbers_it_promises(name):
    net, numbers = build(name), MODELS[name][1]
    _, memory = decode(net, words(5), [2, 1, 1, 1])
    assert memory[0].numbers == numbers
    for index, layer in enumerate(memory):
        assert layer.numbers == net.layer(index).attention.cache_numbers


def test_the_cache_of_mixed_layers():
    _, memory = decode(build("mixed layers"), words(5), [3, 1, 1])
    assert [layer.numbers for layer in memory] == [8, 6, 8, 8]


ABSORBABLE = {
    "low-rank": (LowRank(rank=4), LowRank(rank=4), {}),
    "unequal widths": (LowRank(rank=2), LowRank(rank=6), {}),
    "multi-query": (LowRank(rank=4, groups=1), LowRank(rank=4, groups=1), {}),
    "grouped": (LowRank(rank=4, groups=2), LowRank(rank=4, groups=1), {}),
    "window": (LowRank(rank=4), LowRank(rank=4), dict(mask=SLIDING)),
    "full": (LowRank(rank=4), LowRank(rank=4), dict(mask=Full())),
    "query norm": (LowRank(rank=4), LowRank(rank=4), dict(positions=[QueryNorm()])),
    "functional": (LowRank(rank=4), LowRank(rank=4), dict(functional=Functional(), drift=Drift())),
    "dense": (Dense(), Dense(), {}),
    "dense, rope": (Dense(), Dense(), dict(positions=[RoPE()])),
    "dense, functional, rope": (Dense(), Dense(), dict(functional=Functional(), positions=[RoPE()])),
    "dense form": (Dense(), LowRank(rank=4), dict(positions=[KeyNorm(), RoPE()])),
    "dense content": (LowRank(rank=4), Dense(), {}),
    "psd, tied": (PSD(rank=4), Tied(), {}),
    "identity, metric": (Identity(), Preconditioned(), {}),
    "sink": (LowRank(rank=4), LowRank(rank=4, groups=2), dict(kernel=SinkSoftmax())),
    "sink, drift": (LowRank(rank=4), LowRank(rank=6), dict(kernel=SinkSoftmax(beta=0.5), drift=Drift())),
    "sink, dense, drift": (Dense(), Dense(), dict(kernel=SinkSoftmax(), drift=Drift(), functional=Functional())),
    "sigmoid, drift": (LowRank(rank=4), LowRank(rank=4, groups=1), dict(kernel=Sigmoid(), drift=Drift())),
    "l2, dense": (Dense(), LowRank(rank=4), dict(kernel=L2())),
    "sinkhorn": (LowRank(rank=4), LowRank(rank=4), dict(kernel=Sinkhorn(), mask=Full())),
}


@pytest.mark.parametrize("name", ABSORBABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_projected_equals_absorbed(seed, name, dtype):
    form, content, more = ABSORBABLE[name]
    layer = attention(form, content, heads=4, dtype=dtype, **more)
    y, i = cloud(10, dtype=dtype), span(10)
    assert layer.absorbable
    with torch.no_grad():
        projected, absorbed = layer.lift(layer.projected(y, i)), layer.lift(layer.absorbed(y, i))
    if dtype == torch.float64:
        assert (projected - absorbed).abs().max() < 1e-10
    assert per_token(absorbed, projected) < 1e-5


@pytest.mark.parametrize("more", [{"positions": [RoPE()]}, {"positions": [KeyNorm()]}], ids=repr)
def test_what_cannot_be_absorbed_says_so(more):
    layer = attention(LowRank(rank=4), LowRank(rank=4), **more)
    assert not layer.absorbable and not layer.absorbs
    with pytest.raises(ValueError, match="absorbed"):
        layer.absorbed(cloud(4), span(4))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_the_past_does_not_feel_the_future(seed, name, dtype):
    """Another token at e: every state, update and pattern of the positions before e stays, bit for bit."""
    net, tokens, e = build(name, dtype=dtype), words(20), 13
    other = tokens.clone()
    other[:, e] = (tokens[:, e] + 1) % net.vocab
    with torch.no_grad():
        for a, b in zip(net.flow(tokens), net.flow(other), strict=True):
            assert torch.equal(a.after[:, :e], b.after[:, :e])
            assert torch.equal(a.update[:, :e], b.update[:, :e])
            if a.mixture is not None:
                read = net.layer(a.layer).attention
                wa, wb = read.weights(a.read, span(20)), read.weights(b.read, span(20))
                assert torch.equal(wa[:, :, :e], wb[:, :, :e])
        assert not torch.equal(a.after[:, e], b.after[:, e])
        assert torch.equal(net(tokens)[:, :e], net(other)[:, :e])


@EVERY
def test_a_prefix_gives_the_same_states(seed, name):
    """The same positions in a shorter text: close, not equal, because products are blocked by shape."""
    tokens = words(20)
    net = build(name)
    assert (last(net, tokens)[:, :13] - last(net, tokens[:, :13])).abs().max() < 1e-10
    net = net.float()
    assert per_token(last(net, tokens[:, :13]), last(net, tokens)[:, :13]) < 1e-5


def test_without_the_mask_the_future_is_felt(seed):
    """The instrument sees a leak."""
    net, tokens = model(mask=Full()), words(20)
    other = tokens.clone()
    other[:, 13] = (tokens[:, 13] + 1) % net.vocab
    assert (last(net, tokens)[:, :13] - last(net, other)[:, :13]).abs().max() > 1e-3


def test_a_window_bounds_how_far_a_token_sees(seed):
    """Two layers of a window of 4: position p reads 2 * 3 tokens back and no further."""
    net, tokens = build("window"), words(20)
    other = tokens.clone()
    other[:, 5] = (tokens[:, 5] + 1) % net.vocab
    a, b = last(net, tokens), last(net, other)
    assert torch.equal(a[:, 12:], b[:, 12:])
    assert all(not torch.equal(a[:, p], b[:, p]) for p in range(5, 12))
