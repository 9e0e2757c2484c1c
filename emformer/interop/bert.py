"""BERT: post-norm, every token sees every other, a normed embedding, a head that transforms a state before it is unembedded."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from emformer.ffn import ExactGELU
from emformer.interop.config import Facts
from emformer.interop.weights import Entry, Weights, columns, filled, rows, same
from emformer.kernels import Softmax
from emformer.masks import Full
from emformer.model import Emformer
from emformer.norms import LayerNorm
from emformer.operators import LowRank
from emformer.parts import UserError
from emformer.placements import PostNorm
from emformer.settings import Drift, Embedding, Functional, Learned, Model, Transform

HEAD = "cls.predictions."
UNUSED = re.compile(r"embeddings\.position_ids|pooler\..*|cls\.seq_relationship\..*")  # no part of masked-language modelling


def read(config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> Emformer:
    """The model of a BERT checkpoint with its masked-language head; all tokens are of type 0, whose vector goes into the
    positions. M, u, F and g as in math A.2. Raises `UserError` for any other."""
    facts = Facts(config, f"{weights.where}: config.json")
    facts.refuse("is_decoder")
    vocab, dim, heads = facts.count("vocab_size"), facts.count("hidden_size"), facts.count("num_attention_heads")
    depth, hidden = facts.count("num_hidden_layers"), facts.count("intermediate_size")
    context, kinds = facts.count("max_position_embeddings"), facts.count("type_vocab_size", 2)
    if dim % heads:
        raise UserError(f"{facts.where}: num_attention_heads {heads} does not divide hidden_size {dim}.")
    facts.word("hidden_act", "gelu", ("gelu",))
    facts.word("position_embedding_type", "absolute", ("absolute",))
    norm = LayerNorm(bias=True, eps=facts.number("layer_norm_eps", 1e-12, zero=True))

    weights = weights.renamed(_name)
    depth = weights.depth("num_hidden_layers", depth)
    if not any(name.startswith(HEAD) for name in weights.places):
        raise UserError(f"{weights.where}: this BERT has no masked-language head ({HEAD}…), so that it predicts no token.")
    word, decoder = "embeddings.word_embeddings.weight", f"{HEAD}decoder.weight"
    tied, weights = weights.tied(word, decoder, facts.flag("tie_word_embeddings", True))
    bias, twin = f"{HEAD}bias", f"{HEAD}decoder.bias"
    if twin in weights.places:  # what the decoder adds; `bias` is the same one, or of no use
        weights = weights.renamed(lambda name: {bias: None, twin: bias}.get(name, name))
    settings = Model(
        dim=dim,
        depth=depth,
        heads=heads,
        context=context,
        form=LowRank(rank=dim // heads),
        content=LowRank(rank=dim // heads),
        kernel=Softmax(),
        mask=Full(),
        placement=PostNorm(),
        norm=norm,
        ffn=ExactGELU(bias=True, hidden=hidden),
        functional=Functional(),
        drift=Drift(),
        embedding=Embedding(tied=tied, positions=Learned(), norm=norm, transform=Transform(norm=norm), bias=True),
    )
    entries = {
        word: Entry((vocab, dim), {"embedding.weight": same}),
        "embeddings.position_embeddings.weight": Entry((context, dim), {"positions": same}),
        "embeddings.token_type_embeddings.weight": Entry((kinds, dim), {}, {"positions": _first}),
        "embeddings.LayerNorm.weight": Entry((dim,), {"embedding_norm.gain": same}),
        "embeddings.LayerNorm.bias": Entry((dim,), {"embedding_norm.bias": same}),
        f"{HEAD}transform.dense.weight": Entry((dim, dim), {"transform.dense.weight": same}),
        f"{HEAD}transform.dense.bias": Entry((dim,), {"transform.dense.bias": same}),
        f"{HEAD}transform.LayerNorm.weight": Entry((dim,), {"transform.norm.gain": same}),
        f"{HEAD}transform.LayerNorm.bias": Entry((dim,), {"transform.norm.bias": same}),
        bias: Entry((vocab,), {"unembedding.bias": same}),
    }
    if not tied:
        entries[decoder] = Entry((vocab, dim), {"unembedding.weight": same})
    for k in range(depth):
        entries |= _layer(k, dim, heads, hidden)
    return filled(vocab, settings, dtype, weights, entries)


def _layer(k: int, dim: int, heads: int, hidden: int) -> dict[str, Entry]:
    old, new = f"encoder.layer.{k}", f"blocks.{k}"
    attn, own, split = f"{old}.attention", f"{new}.attention", rows(heads)
    queries = rows(heads, (dim // heads) ** -0.5)
    return {
        f"{attn}.self.query.weight": Entry((dim, dim), {f"{own}.form.left_factor": queries}),
        f"{attn}.self.query.bias": Entry((dim,), {f"{own}.biases.left": queries}),
        f"{attn}.self.key.weight": Entry((dim, dim), {f"{own}.form.right_factor": split}),
        f"{attn}.self.key.bias": Entry((dim,), {}),  # gauge: the same number on a whole row of scores
        f"{attn}.self.value.weight": Entry((dim, dim), {f"{own}.content.right_factor": split}),
        f"{attn}.self.value.bias": Entry((dim,), {f"{own}.value_bias": split}),
        f"{attn}.output.dense.weight": Entry((dim, dim), {f"{own}.content.left_factor": columns(heads)}),
        f"{attn}.output.dense.bias": Entry((dim,), {f"{own}.drift": same}),
        f"{attn}.output.LayerNorm.weight": Entry((dim,), {f"{new}.place_attn.gain": same}),
        f"{attn}.output.LayerNorm.bias": Entry((dim,), {f"{new}.place_attn.bias": same}),
        f"{old}.intermediate.dense.weight": Entry((hidden, dim), {f"{new}.ffn.up.weight": same}),
        f"{old}.intermediate.dense.bias": Entry((hidden,), {f"{new}.ffn.up.bias": same}),
        f"{old}.output.dense.weight": Entry((dim, hidden), {f"{new}.ffn.down.weight": same}),
        f"{old}.output.dense.bias": Entry((dim,), {f"{new}.ffn.down.bias": same}),
        f"{old}.output.LayerNorm.weight": Entry((dim,), {f"{new}.place_ffn.gain": same}),
        f"{old}.output.LayerNorm.bias": Entry((dim,), {f"{new}.place_ffn.bias": same}),
    }


def _first(x: Tensor) -> Tensor:
    return x[0]


def _name(name: str) -> str | None:
    name = name.removeprefix("bert.")
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))  # of 2018
    return None if UNUSED.fullmatch(name) else name
