"""GPT-NeoX: attention and network side by side or in turn, heads of which a part turns, one matrix of [q, k, v] by head."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emformer.block import Parallel
from emformer.ffn import GELU, ExactGELU
from emformer.interop.config import Facts
from emformer.interop.rope import position
from emformer.interop.weights import Entry, Weights, columns, filled, same
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.model import Emformer
from emformer.norms import LayerNorm
from emformer.operators import LowRank
from emformer.parts import UserError
from emformer.placements import PreNorm
from emformer.settings import Drift, Embedding, Functional, Model

NETWORKS = {"gelu": ExactGELU, "gelu_new": GELU, "gelu_pytorch_tanh": GELU}
TABLES = re.compile(r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)")  # that older versions saved


def read(config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> Emformer:
    """The model of a GPT-NeoX (Pythia) checkpoint: M_h at the distance D is W_Q R_D W_K^T/sqrt(r), where R_D turns the first of r
    coordinates; b_Q and b_K stay, b_V and b_O are the drift (math A.2, A.4). Raises `UserError` for any other."""
    facts = Facts(config, f"{weights.where}: config.json")
    facts.refuse()
    vocab, dim, heads = facts.count("vocab_size"), facts.count("hidden_size"), facts.count("num_attention_heads")
    depth, hidden = facts.count("num_hidden_layers"), facts.count("intermediate_size")
    context = facts.count("max_position_embeddings")
    if dim % heads:
        raise UserError(f"{facts.where}: num_attention_heads {heads} does not divide hidden_size {dim}.")
    rank = dim // heads
    network = NETWORKS[facts.word("hidden_act", "gelu", NETWORKS)]
    turning = position(facts, rank, context, share=0.25)
    norm = LayerNorm(bias=True, eps=facts.number("layer_norm_eps", 1e-5, zero=True))
    biased, parallel = facts.flag("attention_bias", True), facts.flag("use_parallel_residual", True)

    weights = weights.renamed(_name)
    depth = weights.depth("num_hidden_layers", depth)
    tied, weights = weights.tied("embed_in.weight", "lm_head.weight", facts.flag("tie_word_embeddings", False))
    settings = Model(
        dim=dim,
        depth=depth,
        heads=heads,
        context=context,
        form=LowRank(rank=rank),
        content=LowRank(rank=rank),
        kernel=Softmax(),
        mask=Causal(),
        placement=PreNorm(),
        positions=[turning],
        norm=norm,
        ffn=network(bias=True, hidden=hidden),
        arrangement=Parallel() if parallel else None,
        functional=Functional() if biased else None,
        drift=Drift() if biased else None,
        embedding=Embedding(tied=tied),
    )
    entries = {
        "embed_in.weight": Entry((vocab, dim), {"embedding.weight": same}),
        "final_layer_norm.weight": Entry((dim,), {"norm.gain": same}),
        "final_layer_norm.bias": Entry((dim,), {"norm.bias": same}),
    }
    if not tied:
        entries["lm_head.weight"] = Entry((vocab, dim), {"unembedding.weight": same})
    for k in range(depth):
        entries |= _layer(k, dim, heads, hidden, biased)
    return filled(vocab, settings, dtype, weights, entries)


def _layer(k: int, dim: int, heads: int, hidden: int, biased: bool) -> dict[str, Entry]:
    old, new = f"layers.{k}", f"blocks.{k}"
    own, scale = f"{new}.attention", (dim // heads) ** -0.5
    found = {
        f"{old}.input_layernorm.weight": Entry((dim,), {f"{new}.read_attn.gain": same}),
        f"{old}.input_layernorm.bias": Entry((dim,), {f"{new}.read_attn.bias": same}),
        f"{old}.attention.query_key_value.weight": Entry(
            (3 * dim, dim),
            {
                f"{own}.form.left_factor": _each(0, heads, scale),
                f"{own}.form.right_factor": _each(1, heads),
                f"{own}.content.right_factor": _each(2, heads),
            },
        ),
        f"{old}.attention.dense.weight": Entry((dim, dim), {f"{own}.content.left_factor": columns(heads)}),
        f"{old}.post_attention_layernorm.weight": Entry((dim,), {f"{new}.read_ffn.gain": same}),
        f"{old}.post_attention_layernorm.bias": Entry((dim,), {f"{new}.read_ffn.bias": same}),
        f"{old}.mlp.dense_h_to_4h.weight": Entry((hidden, dim), {f"{new}.ffn.up.weight": same}),
        f"{old}.mlp.dense_h_to_4h.bias": Entry((hidden,), {f"{new}.ffn.up.bias": same}),
        f"{old}.mlp.dense_4h_to_h.weight": Entry((dim, hidden), {f"{new}.ffn.down.weight": same}),
        f"{old}.mlp.dense_4h_to_h.bias": Entry((dim,), {f"{new}.ffn.down.bias": same}),
    }
    if biased:
        found |= {
            f"{old}.attention.query_key_value.bias": Entry(
                (3 * dim,),
                {
                    f"{own}.biases.left": _each(0, heads, scale),
                    f"{own}.biases.right": _each(1, heads),
                    f"{own}.value_bias": _each(2, heads),
                },
            ),
            f"{old}.attention.dense.bias": Entry((dim,), {f"{own}.drift": same}),
        }
    return found


def _each(which: int, heads: int, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Queries (0), keys (1) or values (2) of every head: (heads 3 r, …) -> (heads, r, …), times the scale."""
    return lambda x: scale * x.unflatten(0, (heads, 3, -1))[:, which]


def _name(name: str) -> str | None:
    name = name.removeprefix("gpt_neox.")
    if name == "embed_out.weight":  # what files call it
        return "lm_head.weight"
    return None if TABLES.fullmatch(name) else name
