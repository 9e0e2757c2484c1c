"""Leave out a sublayer or a head, or put its mean in its place (math H.4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from emformer.block import Block, Step
from emformer.geometry.spectra import wide
from emformer.model import Emformer
from emformer.operators import Operator
from emformer.parts import UserError
from emformer.surgery.copies import FromTheStart, Shifted, Which, bare, copied, known, maps, plain, rebuilt, shifted
from emformer.types import Cloud

Point = Literal["attn", "ffn"]


@dataclass(frozen=True)
class Means:
    """Means over `count` sequences of T tokens, by position, in float64.

    `heads[layer]` (H, T, d) are those of the updates D^h, `updates[layer, point]` (T, d) those of D = sum_h D^h + g and of the
    FFN's update, all as the sublayer makes them, before the placement shapes them; `reads[layer]` (T, d) is the mean cloud
    that attention reads.
    """

    count: int
    updates: dict[tuple[int, Point], Tensor]
    heads: dict[int, Tensor]
    reads: dict[int, Tensor]


@torch.no_grad()
def means(model: Emformer, tokens: Tensor | Iterable[Tensor]) -> Means:
    """The mean of every update at every position, for `mean_ablate`. In evaluation mode; the model stays as it is.

    Sums are in float64. Those of D^h are taken of the mixtures, from which they follow by linearity. Cost: a forward pass, and
    a second one of the FFNs where the placement shapes updates; memory H T (r + d) numbers a layer. Source: math H.4.

    Args:
        tokens: a batch (B, T), or several of one length T.

    Raises:
        UserError: no sequence, or sequences of several lengths.
    """
    sums: dict[tuple[int, str], Tensor] = {}
    count, length = 0, None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in [tokens] if isinstance(tokens, Tensor) else tokens:
            length = batch.shape[1] if length is None else length
            if batch.shape[1] != length:
                raise UserError(f"means: sequences of {length} and of {batch.shape[1]} tokens; cut all to one length.")
            count += len(batch)
            for step in model.flow(batch):
                for name, value in _outputs(model.layer(step.layer), step):
                    total = wide(value).sum(0)
                    sums[step.layer, name] = sums[step.layer, name] + total if (step.layer, name) in sums else total
    finally:
        for module, training in modes:
            module.training = training
    if count == 0:
        raise UserError("means: there is no sequence to take a mean of; give at least one.")
    updates: dict[tuple[int, Point], Tensor] = {}
    heads, reads = {}, {}
    for (layer, name), total in sums.items():
        mean = total / count
        if name == "ffn":
            updates[layer, "ffn"] = mean
        elif name == "read":
            reads[layer] = mean
        else:
            attention = model.layer(layer).attention
            old = attention.content.left_rows()
            heads[layer] = wide(attention.content.lift_heads(mean.to(old)[None])[0])
            drift = 0.0 if attention.drift is None else wide(attention.drift)
            updates[layer, "attn"] = heads[layer].sum(0) + drift
    return Means(count, updates, heads, reads)


def _outputs(block: Block, step: Step) -> Iterable[tuple[str, Tensor]]:
    if step.point != "ffn":
        assert step.mixture is not None
        yield "mixture", step.mixture
        yield "read", step.read
    if step.point != "attn" and block.ffn is not None:
        if block.shape_ffn is None:
            yield "ffn", step.update if step.ffn is None else step.ffn
        else:
            yield "ffn", block.ffn(step.before if block.read_ffn is None else block.read_ffn(step.before))


@torch.no_grad()
def skip(model: Emformer, point: Point, layers: Which = None, heads: Which = None) -> Emformer:
    """D = 0 for a sublayer, or F_h = 0 for some of its heads. Source: math H.4.

    The step stays in the flow, so that trajectories keep their length. All of attention (heads null) goes with its drift and
    value bias; heads alone leave the drift. What the placement does to an update of 0 it still does: a sandwich norm adds its
    bias, a norm after the sum and the retraction act on the state alone.

    Raises:
        UserError: for a layer or a head that is not there, a layer without FFN, or heads of an FFN.
    """
    copy, chosen, marked = copied(model, f"skip {point}", layers, heads)
    for layer in _places(copy, point, chosen, layers, heads):
        block = copy.layer(layer)
        if point == "ffn":
            block.ffn = Constant(None).train(block.training)
        else:
            block.attention = rebuilt(block.attention, content=_without(block.attention.content, marked), drift=heads is not None)
    return copy


@torch.no_grad()
def mean_ablate(model: Emformer, means: Means, point: Point, layers: Which = None, heads: Which = None) -> Emformer:
    """D, or D^h of some heads, replaced by its mean at that position, whatever the tokens. Source: math H.4.

    The mean stands before the placement's shape, so that updates still sum to what the stream takes in. Every layer has means
    of its own: a shared block becomes one a layer. Whole sequences of at most as many tokens as the means are for; decoding
    with a memory is refused.

    Raises:
        UserError: as for `skip`; means of another model, or without this layer.
    """
    copy, chosen, marked = copied(model, f"mean-ablate {point}", layers, heads, apart=True)
    for layer in _places(copy, point, chosen, layers, heads):
        block = copy.layer(layer)
        attention = block.attention
        old = attention.content.left_rows()
        if (layer, point) not in means.updates or means.heads[layer].shape[::2] != (len(marked), old.shape[-1]):
            raise UserError(f"mean_ablate: the means do not fit {point} of layer {layer}; take `means` of this model.")
        if point == "ffn":
            mean = means.updates[layer, "ffn"]
            block.ffn = Constant(mean.to(old)).train(block.training)
            block.attention = rebuilt(attention, positions=[*maps(attention), FromTheStart(len(mean))])
        else:
            mean = marked.view(-1, 1, 1) * means.heads[layer].to(old)
            content = _without(attention.content, marked)
            if isinstance(content, Shifted):
                length = min(mean.shape[1], content.mean.shape[1])
                mean = mean[:, :length] + content.mean[:, :length]
            guard = FromTheStart(mean.shape[1])
            new = Shifted(bare(content), mean)
            block.attention = rebuilt(attention, content=new, positions=[*maps(attention), guard])
    return copy


class Constant(nn.Module):
    """What stands for an FFN: `mean` (T, d) by position for every sequence, or 0."""

    mean: Tensor | None

    def __init__(self, mean: Tensor | None):
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, y: Cloud) -> Cloud:
        return torch.zeros_like(y) if self.mean is None else self.mean[: y.shape[1]].expand_as(y)


def _without(content: Operator, marked: Tensor) -> Operator:
    """The content with F_h = 0, and no constant, for the marked heads."""
    left, right = content.left_rows(), content.right_rows()
    rest = ~marked
    return shifted(plain(rest.view(-1, 1, 1) * left, right, bare(content)), content, rest)


def _places(copy: Emformer, point: Point, chosen: list[int], layers: Which, heads: Which) -> list[int]:
    """The layers to change; where none are named, those that have the point."""
    known("surgery", "point", point, ("attn", "ffn"))
    if point == "attn":
        return chosen
    if heads is not None:
        raise UserError("surgery: an FFN has no heads; leave them out, or name the point 'attn'.")
    there = [k for k in chosen if copy.layer(k).ffn is not None]
    lacking = set(chosen).difference(there)
    if lacking and (layers is not None or not there):
        raise UserError(f"surgery: layer {min(lacking)} has no FFN; choose layers that have one, or the point 'attn'.")
    return there
