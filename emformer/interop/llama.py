"""Llama: pre-norm (RMS), rotary positions, groups of heads that share keys and values, a gated network."""

from __future__ import annotations

from typing import Any

import torch

from emformer.ffn import SwiGLU
from emformer.interop.config import Facts
from emformer.interop.rope import position
from emformer.interop.weights import Entry, Weights, columns, filled, rows, same
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.operators import LowRank
from emformer.parts import UserError
from emformer.placements import PreNorm
from emformer.settings import Drift, Embedding, Functional, Model


def read(config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> Emformer:
    """The model of a Llama checkpoint: M_h at the distance D is W_Q R_D W_K^T/sqrt(r); with `attention_bias` b_Q and b_K stay, as
    positions turn them, and b_V and b_O are the drift (math A.2, A.4, A.5). Raises `UserError` for any other."""
    facts = Facts(config, f"{weights.where}: config.json")
    facts.refuse()
    vocab, dim, heads = facts.count("vocab_size"), facts.count("hidden_size"), facts.count("num_attention_heads")
    depth, hidden = facts.count("num_hidden_layers"), facts.count("intermediate_size")
    context, groups = facts.count("max_position_embeddings"), facts.count("num_key_value_heads", heads)
    if heads % groups:
        raise UserError(f"{facts.where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}.")
    if facts.content.get("head_dim") is None and dim % heads:
        raise UserError(f"{facts.where}: num_attention_heads {heads} does not divide hidden_size {dim}.")
    rank = facts.count("head_dim", dim // heads)
    facts.word("hidden_act", "silu", ("silu", "swish"))
    turning = position(facts, rank, context)
    norm = RMSNorm(eps=facts.number("rms_norm_eps", 1e-6, zero=True))
    biased, mlp_biased = facts.flag("attention_bias", False), facts.flag("mlp_bias", False)

    weights = weights.renamed(_name)
    depth = weights.depth("num_hidden_layers", depth)
    tied, weights = weights.tied("embed_tokens.weight", "lm_head.weight", facts.flag("tie_word_embeddings", False))
    operator = LowRank(rank=rank, groups=None if groups == heads else groups)
    settings = Model(
        dim=dim,
        depth=depth,
        heads=heads,
        context=context,
        form=operator,
        content=operator,
        kernel=Softmax(),
        mask=Causal(),
        placement=PreNorm(),
        positions=[turning],
        norm=norm,
        ffn=SwiGLU(bias=mlp_biased, hidden=hidden),
        functional=Functional() if biased else None,
        drift=Drift() if biased else None,
        embedding=Embedding(tied=tied),
    )
    entries = {
        "embed_tokens.weight": Entry((vocab, dim), {"embedding.weight": same}),
        "norm.weight": Entry((dim,), {"norm.gain": same}),
    }
    if not tied:
        entries["lm_head.weight"] = Entry((vocab, dim), {"unembedding.weight": same})
    for k in range(depth):
        old, new = f"layers.{k}", f"blocks.{k}"
        attn, mlp, own = f"{old}.self_attn", f"{old}.mlp", f"{new}.attention"
        queries, keys = rows(heads, rank**-0.5), rows(groups)
        entries |= {
            f"{old}.input_layernorm.weight": Entry((dim,), {f"{new}.read_attn.gain": same}),
            f"{attn}.q_proj.weight": Entry((heads * rank, dim), {f"{own}.form.left_factor": queries}),
            f"{attn}.k_proj.weight": Entry((groups * rank, dim), {f"{own}.form.right_factor": keys}),
            f"{attn}.v_proj.weight": Entry((groups * rank, dim), {f"{own}.content.right_factor": keys}),
            f"{attn}.o_proj.weight": Entry((dim, heads * rank), {f"{own}.content.left_factor": columns(heads)}),
            f"{old}.post_attention_layernorm.weight": Entry((dim,), {f"{new}.read_ffn.gain": same}),
            f"{mlp}.gate_proj.weight": Entry((hidden, dim), {f"{new}.ffn.gate.weight": same}),
            f"{mlp}.up_proj.weight": Entry((hidden, dim), {f"{new}.ffn.up.weight": same}),
            f"{mlp}.down_proj.weight": Entry((dim, hidden), {f"{new}.ffn.down.weight": same}),
        }
        if biased:
            entries |= {
                f"{attn}.q_proj.bias": Entry((heads * rank,), {f"{own}.biases.left": queries}),
                f"{attn}.k_proj.bias": Entry((groups * rank,), {f"{own}.biases.right": keys}),
                f"{attn}.v_proj.bias": Entry((groups * rank,), {f"{own}.value_bias": keys}),
                f"{attn}.o_proj.bias": Entry((dim,), {f"{own}.drift": same}),
            }
        if mlp_biased:
            entries |= {
                f"{mlp}.gate_proj.bias": Entry((hidden,), {f"{new}.ffn.gate.bias": same}),
                f"{mlp}.up_proj.bias": Entry((hidden,), {f"{new}.ffn.up.bias": same}),
                f"{mlp}.down_proj.bias": Entry((dim,), {f"{new}.ffn.down.bias": same}),
            }
    return filled(vocab, settings, dtype, weights, entries)


def _name(name: str) -> str | None:
    name = name.removeprefix("model.")
    return None if name.endswith("rotary_emb.inv_freq") else name
