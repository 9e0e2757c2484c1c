"""Parts that other people's models need: slowed rotations, the exact GELU, a normed embedding, a head with a transform."""

from __future__ import annotations

import math

import pytest
import torch
from builders import fill, model, span, stir, words
from published import Wide
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from emformer import inspection
from emformer.ffn import GELU, ExactGELU, ReLU2, SwiGLU
from emformer.masks import All, Causal, Full, Window
from emformer.norms import LayerNorm, RMSNorm
from emformer.parts import UserError
from emformer.positions import InterpolatedRoPE, Llama3RoPE, RoPE
from emformer.settings import Embedding, Learned, Transform


def cloud(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# Rotations ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_interpolation_squeezes_positions(fraction):
    """The positions 0, 3, 6 … are those 0, 1, 2 … of the plain rotation."""
    plain = RoPE(base=100.0, fraction=fraction).build(8)
    slowed = InterpolatedRoPE(base=100.0, fraction=fraction, factor=3.0).build(8)
    u, v = cloud(2, 2, 9, 8), cloud(2, 2, 9, 8)
    for a, b in zip(slowed(u, v, 3 * span(9), 3 * span(9)), plain(u, v, span(9), span(9)), strict=True):
        assert (a - b).abs().max() < 1e-13
    assert (slowed(u, v, span(9), span(9))[0] - plain(u, v, span(9), span(9))[0]).abs().max() > 0.1


@pytest.mark.parametrize(("base", "rank", "original"), [(500_000.0, 128, 8192), (10_000.0, 64, 300), (50.0, 8, 20)])
def test_llama3_slows_the_slow_planes(base, rank, original):
    """The frequencies are the library's; planes of more than 4 turns in the original context stay, those below 1 turn are 8 times
    slower, and some are between."""
    rope = dict(rope_type="llama3", rope_theta=base, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config = LlamaConfig(
        hidden_size=rank,
        num_attention_heads=1,
        max_position_embeddings=10 * original,
        rope_parameters=rope | {"original_max_position_embeddings": original},
    )
    with Wide():
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = base ** (-torch.arange(0, rank, 2, dtype=torch.float64) / rank)
    found = Llama3RoPE(base=base, original=original).build(rank).slowed(plain)
    assert expected.dtype == torch.float64 and (found / expected - 1).abs().max() < 1e-13
    turns, ratio = original * plain / (2 * math.pi), found / plain
    assert (ratio[turns >= 4] == 1).all() and (ratio[turns <= 1] * 8 - 1).abs().max() < 1e-13
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) and (between > 1 / 8).all() and (between < 1).all()


def test_rotations_that_make_no_sense():
    for wrong, what in (
        (lambda: InterpolatedRoPE(factor=0.0), "InterpolatedRoPE: factor is 0.0"),
        (lambda: Llama3RoPE(factor=-1.0), "Llama3RoPE: factor is -1.0"),
        (lambda: Llama3RoPE(low=4.0), "high is 4.0 and low 4.0"),
        (lambda: Llama3RoPE(original=0), "original is 0"),
        (lambda: Llama3RoPE(base=math.inf), "Llama3RoPE: base is inf"),
        (lambda: InterpolatedRoPE(fraction=0.3).build(8), "InterpolatedRoPE: 0.3 of the rank 8 is 2.4"),
        (lambda: RoPE(fraction=1e-12).build(8), "is 0 coordinates"),
    ):
        with pytest.raises(UserError, match=what):
            wrong()


def test_a_share_that_binary_numbers_miss():
    """14/25 of 25 coordinates are 14, though their product is not."""
    assert 25 * (14 / 25) != 14
    for rank in range(2, 200):
        for width in range(2, rank + 1, 2):
            assert RoPE(fraction=width / rank).width(rank) == width


# Networks -------------------------------------------------------------------------------------------------------------


def test_the_exact_gelu():
    network = ExactGELU(hidden=5, bias=True).build(4).double()
    stir(network)
    x = 3 * cloud(2, 7, 4)
    inner = x @ network.up.weight.mT + network.up.bias
    phi = torch.tensor([(1 + math.erf(value / math.sqrt(2))) / 2 for value in inner.flatten().tolist()], dtype=x.dtype)
    expected = (inner * phi.view_as(inner)) @ network.down.weight.mT + network.down.bias
    assert (network(x) - expected).abs().max() < 1e-13
    twin = GELU(hidden=5, bias=True).build(4).double()
    twin.load_state_dict(network.state_dict())
    assert 1e-6 < (twin(x) - expected).abs().max() < 1e-2  # the tanh form is near, and another


@pytest.mark.parametrize("part", [GELU, ExactGELU, ReLU2, SwiGLU])
def test_a_width_that_is_no_multiple(part):
    assert part(hidden=13).build(8).up.weight.shape == (13, 8)
    assert part().build(8).up.weight.shape == (part().width(8), 8) and part().width(8) % 8 == 0
    with pytest.raises(UserError, match=f"{part.__name__}: hidden is 0"):
        part(hidden=0)


# Embedding and head ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_stands_around_the_states():
    """X^0 = norm(token + position), logits = U norm'(gelu(W x + b)) + c, written out."""
    around = Embedding(0.5, 0.3, positions=Learned(0.5), norm=LayerNorm(bias=True), transform=Transform(RMSNorm()), bias=True)
    net, tokens = model(embedding=around), words(9)
    fill(net.unembedding.bias, cloud(net.vocab))
    first = next(net.flow(tokens)).before
    raw = net.embedding.weight[tokens] + net.positions[:9]
    norm, head = net.embedding_norm, net.transform
    assert norm is not None and head is not None and head.norm is not None
    raw = raw - raw.mean(-1, keepdim=True)
    assert (raw / (raw.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.gain + norm.bias - first).abs().max() < 1e-12
    x = cloud(2, 9, 8)
    y = net.norm(x) @ head.dense.weight.mT + head.dense.bias
    y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * head.norm.gain
    assert (y @ net.unembedding.weight.mT + net.unembedding.bias - net.unembed(x)).abs().max() < 1e-12


def test_parts_that_are_absent_draw_nothing():
    """The initial weights of a model do not depend on what it could have had."""
    torch.manual_seed(0)
    plain = model()
    assert {name.split(".")[0] for name in plain.state_dict()} == {"embedding", "blocks", "norm", "unembedding"}
    assert plain.transform is None and plain.embedding_norm is None and plain.unembedding.bias is None


# Counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(size=7), All(masks=(Window(size=5), Causal()))], ids=repr)
def test_how_many_keys_a_query_sees(mask, monkeypatch):
    """By closed forms or in pieces: the mean over the whole table."""
    i = span(50)
    expected = float(mask.visible(i[:, None], i[None, :]).expand(50, 50).sum()) / 50
    for table in (2**24, 120, 1):
        monkeypatch.setattr(inspection, "TABLE", table)
        assert inspection._visible(mask, 50) == pytest.approx(expected, rel=1e-15)


def test_a_long_context_is_counted_without_its_table():
    settings = model(context=131_072).settings  # a table of 17 GB
    counted = inspection.costs(11, settings)
    assert counted.layers[0].visible == 65_536.5
    head = model(embedding=Embedding(transform=Transform())).settings
    assert inspection.costs(11, head).unembedding == 11 * 8 + 8 * 8
