"""GPT-2: pre-norm, learned positions, matrices (in, out), queries, keys and values in one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emformer.ffn import GELU, ExactGELU
from emformer.interop.config import Facts
from emformer.interop.weights import Entry, Weights, after, filled, rows, same, turned
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.model import Emformer
from emformer.norms import LayerNorm
from emformer.operators import LowRank
from emformer.parts import UserError
from emformer.placements import PreNorm
from emformer.settings import Drift, Embedding, Functional, Learned, Model

NETWORKS = {"gelu_new": GELU, "gelu_pytorch_tanh": GELU, "gelu": ExactGELU}
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # tables that older versions saved


def read(config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> Emformer:
    """The model of a GPT-2 checkpoint: M_h = W_Q W_K^T c with c = 1/sqrt(r) (1 with `scale_attn_weights` false), over the number
    of the layer from 1 with `scale_attn_by_inverse_layer_idx`; u and g of math A.2. Raises `UserError` for any other."""
    facts = Facts(config, f"{weights.where}: config.json")
    facts.refuse()
    vocab, dim, heads = facts.count("vocab_size"), facts.count("n_embd"), facts.count("n_head")
    depth, context = facts.count("n_layer"), facts.count("n_positions")
    if dim % heads:
        raise UserError(f"{facts.where}: n_head {heads} does not divide n_embd {dim}.")
    hidden = facts.count("n_inner", 4 * dim)
    network = NETWORKS[facts.word("activation_function", "gelu_new", NETWORKS)]
    norm = LayerNorm(bias=True, eps=facts.number("layer_norm_epsilon", 1e-5, zero=True))
    scale = (dim // heads) ** -0.5 if facts.flag("scale_attn_weights", True) else 1.0
    slower = facts.flag("scale_attn_by_inverse_layer_idx", False)

    weights = weights.renamed(_name)
    depth = weights.depth("n_layer", depth)
    tied, weights = weights.tied("wte.weight", "lm_head.weight", facts.flag("tie_word_embeddings", True))
    settings = Model(
        dim=dim,
        depth=depth,
        heads=heads,
        context=context,
        form=LowRank(rank=dim // heads),
        content=LowRank(rank=dim // heads),
        kernel=Softmax(),
        mask=Causal(),
        placement=PreNorm(),
        norm=norm,
        ffn=network(bias=True, hidden=hidden),
        functional=Functional(),
        drift=Drift(),
        embedding=Embedding(tied=tied, positions=Learned()),
    )
    entries = {
        "wte.weight": Entry((vocab, dim), {"embedding.weight": same}),
        "wpe.weight": Entry((context, dim), {"positions": same}),
        "ln_f.weight": Entry((dim,), {"norm.gain": same}),
        "ln_f.bias": Entry((dim,), {"norm.bias": same}),
    }
    if not tied:
        entries["lm_head.weight"] = Entry((vocab, dim), {"unembedding.weight": same})
    for k in range(depth):
        entries |= _layer(k, dim, heads, hidden, scale / (k + 1) if slower else scale)
    return filled(vocab, settings, dtype, weights, entries)


def _layer(k: int, dim: int, heads: int, hidden: int, scale: float) -> dict[str, Entry]:
    old, new, split = f"h.{k}", f"blocks.{k}", rows(heads)
    queries, values = rows(heads, scale), f"{new}.attention.value_bias"
    return {
        f"{old}.ln_1.weight": Entry((dim,), {f"{new}.read_attn.gain": same}),
        f"{old}.ln_1.bias": Entry((dim,), {f"{new}.read_attn.bias": same}),
        f"{old}.attn.c_attn.weight": Entry(
            (dim, 3 * dim),
            {
                f"{new}.attention.form.left_factor": after(turned, after(_third(0), queries)),
                f"{new}.attention.form.right_factor": after(turned, after(_third(1), split)),
                f"{new}.attention.content.right_factor": after(turned, after(_third(2), split)),
            },
        ),
        f"{old}.attn.c_attn.bias": Entry(
            (3 * dim,), {f"{new}.attention.biases.left": after(_third(0), queries), values: after(_third(2), split)}
        ),
        f"{old}.attn.c_proj.weight": Entry((dim, dim), {f"{new}.attention.content.left_factor": split}),
        f"{old}.attn.c_proj.bias": Entry((dim,), {f"{new}.attention.drift": same}),
        f"{old}.ln_2.weight": Entry((dim,), {f"{new}.read_ffn.gain": same}),
        f"{old}.ln_2.bias": Entry((dim,), {f"{new}.read_ffn.bias": same}),
        f"{old}.mlp.c_fc.weight": Entry((dim, hidden), {f"{new}.ffn.up.weight": turned}),
        f"{old}.mlp.c_fc.bias": Entry((hidden,), {f"{new}.ffn.up.bias": same}),
        f"{old}.mlp.c_proj.weight": Entry((hidden, dim), {f"{new}.ffn.down.weight": turned}),
        f"{old}.mlp.c_proj.bias": Entry((dim,), {f"{new}.ffn.down.bias": same}),
    }


def _third(which: int) -> Callable[[Tensor], Tensor]:
    """Rows of the queries (0), keys (1) or values (2)."""
    return lambda x: x.chunk(3)[which]


def _name(name: str) -> str | None:
    name = name.removeprefix("transformer.")
    return None if MASKS.fullmatch(name) else name
