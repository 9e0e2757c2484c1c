"""An Emformer as GPT-2: heads d/H wide, to which wider operators are cut; learned positions or none."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from emformer.ffn import GELU, ExactGELU
from emformer.interop.outward import (
    Family,
    Layer,
    Truncation,
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
    offset,
    padded,
    twin,
    typed,
)
from emformer.model import Emformer
from emformer.norms import LayerNorm

GPT2 = Family("GPT-2", "gpt2", LayerNorm, {GELU: "gelu_new", ExactGELU: "gelu"})


def write(model: Emformer, dtype: torch.dtype) -> Written:
    """The model as GPT-2. Raises `UserError` if it does not fit."""
    check(model, GPT2)
    settings, positions, closing = model.settings, model.positions, twin(model.norm)
    dim, heads, width = settings.dim, settings.heads, settings.dim // settings.heads
    for k, block in enumerate(blocks(model)):
        if block.attention.positions:
            names = ", ".join(name_of(position) for position in settings.layer(k).positions)
            GPT2.refuse(k, f"the positions {names or 'of a surgery'}", "learned ones alone")
    inner, reach = inner_width(model), settings.context if positions is None else len(positions)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab,
        "n_positions": reach,
        "n_embd": dim,
        "n_layer": settings.depth,
        "n_head": heads,
        "n_inner": inner,
        "activation_function": network_of(GPT2, model),
        "layer_norm_epsilon": eps_of(GPT2, model),
        "embd_pdrop": settings.dropout,
        "resid_pdrop": settings.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": is_tied(model),
    }
    tensors = typed(
        dtype,
        {
            "transformer.wte.weight": model.embedding.weight,
            "transformer.wpe.weight": torch.zeros(reach, dim) if positions is None else positions,
            "transformer.ln_f.weight": gain(closing, dim),
            "transformer.ln_f.bias": offset(closing, dim),
            **({} if is_tied(model) else {"lm_head.weight": model.unembedding.weight}),
        },
    )
    cuts: list[Truncation] = []
    for k, block in enumerate(blocks(model)):
        layer = _one_key_a_head(layer_of(block))
        if max(layer.left.shape[1], layer.out.shape[1]) > width:
            layer, form, content = _cut(layer, width)
            cuts.append(Truncation(k, form, content))
        at = f"transformer.h.{k}."
        tensors |= typed(dtype, {at + name: value for name, value in _written(layer, heads, width, inner).items()})
    folded = notes(model)
    if positions is None:
        folded.append("no positions: those of GPT-2 are 0")
    return Written(config, tensors, width, folded, cuts)


def _written(layer: Layer, heads: int, width: int, inner: int) -> dict[str, Tensor]:
    """Under GPT-2's names. Its Conv1D keeps weights as (in, out)."""
    dim, scale = heads * width, math.sqrt(width)  # which GPT-2 divides by
    left, right, out, value = (padded(x, width, -2) for x in (layer.left, layer.right, layer.out, layer.value))
    nothing = torch.zeros(dim, dtype=torch.float64)
    query = nothing if layer.query is None else scale * padded(layer.query, width, -1).flatten()
    one, two = layer.norms
    return {
        "ln_1.weight": gain(one, dim),
        "ln_1.bias": offset(one, dim),
        "attn.c_attn.weight": torch.cat([rows.flatten(0, 1) for rows in (scale * left, right, value)]).T,
        "attn.c_attn.bias": torch.cat([query, nothing, nothing]),
        "attn.c_proj.weight": layer.step * out.flatten(0, 1),
        "attn.c_proj.bias": nothing if layer.drift is None else layer.step * layer.drift,
        "ln_2.weight": gain(two, dim),
        "ln_2.bias": offset(two, dim),
        **{f"mlp.{name}": value for name, value in _plain_ffn(layer, dim, inner).items()},
    }


def _one_key_a_head(layer: Layer) -> Layer:
    """With a right factor for every head. The key bias goes: without positions softmax does not notice it (math A.2)."""
    heads = len(layer.left)
    right, value = (x.repeat_interleave(heads // len(x), 0) for x in (layer.right, layer.value))
    return replace(layer, right=right, value=value, key=None)


def _plain_ffn(layer: Layer, dim: int, inner: int) -> dict[str, Tensor]:
    """The FFN under GPT-2's names, as (in, out), zeros up to the width of the widest; all zeros where there is none."""
    ffn = layer.ffn
    nothing = {"up.weight": (0, dim), "down.weight": (dim, 0), "up.bias": (0,), "down.bias": (dim,)}
    up, down, b, c = (ffn[name] if name in ffn else torch.zeros(*size, dtype=torch.float64) for name, size in nothing.items())
    return {
        "c_fc.weight": padded(up, inner, -2).T,
        "c_fc.bias": padded(b, inner, -1),
        "c_proj.weight": layer.step * padded(down, inner, -1).T,
        "c_proj.bias": layer.step * c,
    }


def _cut(layer: Layer, width: int) -> tuple[Layer, float, float]:
    """The layer with factors at most `width` wide, and the largest relative error over the heads of M and of F.

    On tokens yhat as they leave the norm, y = A yhat + b, the score is yhat_i^T A^T M A yhat_j + (M^T b + u)^T A yhat_j, and
    constants of its row. These two stand over each other as one (d+1, d) matrix, E = B (M; u^T) A with B = (A^T 0; b^T 1),
    whose best approximation of this rank (Eckart and Young) goes back by the pseudoinverses, as its range lies in that of B.
    The same for F A; what becomes of sum_h F_h b goes into the drift.
    """
    norm, dim = layer.norms[0], layer.left.shape[-1]
    a, b = norm.affine(dim)
    a, b = a.double(), b.double()
    back = torch.linalg.pinv(a)
    bottom = torch.cat([b, torch.ones(1, dtype=b.dtype)])[None]
    lifted = torch.cat([functional.pad(a.T, (0, 1)), bottom])
    unlifted = torch.linalg.pinv(lifted)
    worst = [0.0, 0.0]
    if layer.left.shape[1] > width:
        query = layer.left.new_zeros(layer.left.shape[:2]) if layer.query is None else layer.query
        lefts, rights, queries = [], [], []
        for left, right, one in zip(layer.left, layer.right, query, strict=True):
            joint = lifted @ torch.cat([left, one[:, None]], 1).T @ (right @ a)
            u, s, vh = _best(joint, width)
            worst[0] = max(worst[0], _relative(joint[:-1], (u * s @ vh)[:-1]))
            rows = (unlifted @ (u * s.sqrt())).T
            lefts.append(rows[:, :-1])
            queries.append(rows[:, -1])
            rights.append(s.sqrt()[:, None] * vh @ back)
        layer = replace(layer, left=torch.stack(lefts), right=torch.stack(rights), query=torch.stack(queries))
    if layer.out.shape[1] > width:
        outs, values = [], []
        drift = b.new_zeros(dim) if layer.drift is None else layer.drift
        for out, value in zip(layer.out, layer.value, strict=True):
            content = out.T @ (value @ a)
            u, s, vh = _best(content, width)
            worst[1] = max(worst[1], _relative(content, u * s @ vh))
            outs.append((u * s.sqrt()).T)
            values.append(s.sqrt()[:, None] * vh @ back)
            drift = drift + out.T @ (value @ b) - outs[-1].T @ (values[-1] @ b)
        layer = replace(layer, out=torch.stack(outs), value=torch.stack(values), drift=drift)
    return layer, worst[0], worst[1]


def _best(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, V^T) of the `rank` largest singular values."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def _relative(whole: Tensor, part: Tensor) -> float:
    """|whole - part|/|whole| in the Frobenius norm; 0 where the whole is 0."""
    norm = float(whole.norm())
    return float((whole - part).norm()) / norm if norm else 0.0
