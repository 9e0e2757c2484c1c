"""An Emformer as Llama: heads as wide as they need to be, always exact; RoPE."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from emformer import parts
from emformer.ffn import SwiGLU
from emformer.interop.outward import (
    Family,
    Layer,
    Written,
    blocks,
    check,
    eps_of,
    gain,
    inner_width,
    is_tied,
    layer_of,
    name_of,
    network_of,
    notes,
    padded,
    twin,
    typed,
)
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.positions import InterpolatedRoPE, Llama3RoPE, RoPE

WIDEST_BASE = 1e37  # transformers forms RoPE's frequencies in float32, and a base beyond its range would stop every plane

LLAMA = Family("Llama", "llama", RMSNorm, {SwiGLU: "silu"})


def write(model: Emformer, dtype: torch.dtype) -> Written:
    """The model as Llama. Raises `UserError` if it does not fit."""
    check(model, LLAMA)
    settings, closing = model.settings, twin(model.norm)
    dim, heads = settings.dim, settings.heads
    if model.positions is not None:
        LLAMA.refuse(None, "learned positions", "RoPE alone")
    attentions = [block.attention for block in blocks(model)]
    width = max(max(attention.form.rank, attention.content.rank) for attention in attentions)
    width += width % 2
    counts = {(attention.form.groups, attention.content.groups) for attention in attentions}
    groups = math.lcm(*(count for pair in counts for count in pair))
    shape = _Sizes(
        heads,
        groups,
        width,
        inner_width(model),
        biased=any(attention.biases is not None or attention.drift is not None for attention in attentions),
        ffn_biased=any("up.bias" in block.ffn.state_dict() for block in blocks(model) if block.ffn is not None),
    )
    rope = _rope(model, width)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab,
        "hidden_size": dim,
        "intermediate_size": shape.inner,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "hidden_act": network_of(LLAMA, model),
        "max_position_embeddings": settings.context,
        "rms_norm_eps": eps_of(LLAMA, model),
        **rope,
        "attention_bias": shape.biased,
        "mlp_bias": shape.ffn_biased,
        "tie_word_embeddings": is_tied(model),
    }
    tensors = typed(
        dtype,
        {
            "model.embed_tokens.weight": model.embedding.weight,
            "model.norm.weight": gain(closing, dim),
            **({} if is_tied(model) else {"lm_head.weight": model.unembedding.weight}),
        },
    )
    for k, block in enumerate(blocks(model)):
        at = f"model.layers.{k}."
        tensors |= typed(dtype, {at + name: value for name, value in _written(layer_of(block), dim, shape).items()})
    folded = notes(model)
    if any(attention.form.rank < width for attention in attentions):
        folded.append(f"factors of M into heads {width} wide, with the base {rope['rope_theta']:g}: the same angles")
    if counts != {(groups, groups)}:
        folded.append(f"keys and contents into {groups} groups")
    return Written(config, tensors, width, folded, [])


class _Sizes(NamedTuple):
    """The sizes of a Llama, the same in all layers."""

    heads: int
    groups: int
    width: int
    inner: int
    biased: bool
    ffn_biased: bool


def _written(layer: Layer, dim: int, shape: _Sizes) -> dict[str, Tensor]:
    """Under Llama's names."""
    heads, groups, width, scale = shape.heads, shape.groups, shape.width, math.sqrt(shape.width)  # which Llama divides by
    left, right = _planes(layer.left, width), _spread(_planes(layer.right, width), groups)
    found = {
        "input_layernorm.weight": gain(layer.norms[0], dim),
        "post_attention_layernorm.weight": gain(layer.norms[1], dim),
        "self_attn.q_proj.weight": scale * left.flatten(0, 1),
        "self_attn.k_proj.weight": right.flatten(0, 1),
        "self_attn.v_proj.weight": _spread(padded(layer.value, width, -2), groups).flatten(0, 1),
        "self_attn.o_proj.weight": layer.step * padded(layer.out, width, -2).flatten(0, 1).T,
    }
    if shape.biased:
        query = torch.zeros(heads, width) if layer.query is None else _planes(layer.query[..., None], width)
        key = torch.zeros(groups, width) if layer.key is None else _spread(_planes(layer.key[..., None], width), groups)
        found |= {
            "self_attn.q_proj.bias": scale * query.flatten(),
            "self_attn.k_proj.bias": key.flatten(),
            "self_attn.v_proj.bias": torch.zeros(groups * width),
            "self_attn.o_proj.bias": torch.zeros(dim) if layer.drift is None else layer.step * layer.drift,
        }
    return found | {f"mlp.{name}": value for name, value in _gated_ffn(layer, dim, shape).items()}


def _spread(x: Tensor, groups: int) -> Tensor:
    """The same factors for `groups` groups, a multiple of what there are."""
    return x.repeat_interleave(groups // len(x), 0)


def _planes(x: Tensor, width: int) -> Tensor:
    """(G, r, n) -> (G, width, n): both halves of the planes where RoPE finds them in wider heads, zeros between."""
    return torch.cat([padded(half, width // 2, -2) for half in x.chunk(2, -2)], -2)


def _rope(model: Emformer, width: int) -> dict[str, Any]:
    """The settings of RoPE for heads `width` wide. A plane k turns by base^(-2k/r): in wider heads, by another base."""
    settings = model.settings
    found, bases, kinds = [], [], []
    for k in range(settings.depth):
        positions, rank = settings.layer(k).positions, model.layer(k).attention.form.rank
        kind = _turning(positions[0]) if len(positions) == len(model.layer(k).attention.positions) == 1 else None
        if kind is None:
            names = ", ".join(name_of(position) for position in positions)
            LLAMA.refuse(k, f"the positions {names}" if names else "no positions", "RoPE, and nothing else")
        rope = cast(RoPE, positions[0])
        if rope.fraction != 1:
            LLAMA.refuse(k, f"{name_of(rope)} on {rope.fraction} of its factors", "RoPE on all of them")
        found.append(rank)
        kinds.append(kind)
        bases.append(rope.base if rank == width else math.exp(math.log(rope.base) * width / rank))
    if max(bases) - min(bases) > 1e-9 * max(bases) or any(kind != kinds[0] for kind in kinds):
        LLAMA.refuse(None, "layers that turn at different rates", "one RoPE for all")
    if max(bases) > WIDEST_BASE:
        what = f"a form of rank {min(found)} in heads {width} wide, which needs the base {max(bases):.0e}"
        LLAMA.refuse(None, what, f"bases up to {WIDEST_BASE:.0e}")
    turning = {**kinds[0], "rope_theta": min(bases)}
    scaled = {} if turning["rope_type"] == "default" else {"rope_scaling": turning}  # where older versions look for it
    return {"rope_theta": min(bases), "rope_parameters": turning, **scaled}


def _turning(position: parts.Position) -> dict[str, Any] | None:
    """The kind of RoPE as Llama's config.json says it; None for what it does not know."""
    if isinstance(position, RoPE):
        return {"rope_type": "default"}
    if isinstance(position, InterpolatedRoPE):
        return {"rope_type": "linear", "factor": position.factor}
    if isinstance(position, Llama3RoPE):
        return {
            "rope_type": "llama3",
            "factor": position.factor,
            "low_freq_factor": position.low,
            "high_freq_factor": position.high,
            "original_max_position_embeddings": position.original,
        }
    return None


def _gated_ffn(layer: Layer, dim: int, shape: _Sizes) -> dict[str, Tensor]:
    """The FFN under Llama's names, zeros up to the width of the widest; all zeros where there is none."""
    ffn, inner = layer.ffn, shape.inner
    wide, flat = torch.zeros(0, dim, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    found = {}
    for name in ("gate", "up"):
        found[f"{name}_proj.weight"] = padded(ffn.get(f"{name}.weight", wide), inner, -2)
        found[f"{name}_proj.bias"] = padded(ffn.get(f"{name}.bias", flat), inner, -1)
    found["down_proj.weight"] = layer.step * padded(ffn.get("down.weight", wide.T), inner, -1)
    found["down_proj.bias"] = layer.step * ffn.get("down.bias", torch.zeros(dim, dtype=torch.float64))
    return {name: value for name, value in found.items() if shape.ffn_biased or name.endswith("weight")}
