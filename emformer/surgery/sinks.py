"""Sinks: the mass that goes nowhere, or to the first token, taken away or given another content (math H.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.kernels import Kernel, Softmax
from emformer.kernels.base import Direct
from emformer.kernels.sink import SinkSoftmaxKernel
from emformer.kernels.softmax import SoftmaxKernel
from emformer.masks import All, Shape, Visible
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.surgery.ablation import Means
from emformer.surgery.copies import Which, copied, rebuilt, retold
from emformer.surgery.swaps import claim, exchanged
from emformer.types import Contents, Keys, Mixture, Queries, Weights


@dataclass(frozen=True)
class Hidden(parts.Mask):
    """j != position or i = j: nobody but the token itself sees the one at `position`. Combine with another by `All`.

    Args:
        position: of the hidden token.
    """

    position: int

    @classmethod
    def examples(cls) -> Sequence[Hidden]:
        return [cls(position=100)]  # further than the contract suite looks: a mask that names a place knows more than i - j

    @property
    def causal(self) -> bool:
        return False

    @property
    def shape(self) -> Shape:
        return "table"

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j != self.position) | (i == j)


@torch.no_grad()
def remove_sink(model: Emformer, position: int | None = None, layers: Which = None, heads: Which = None) -> Emformer:
    """Attention without its sink: what is left of a row is what it would be had the sink never been. Source: math H.2.

    Position null takes away the sink of the kernel, learned or zero: Softmax of the same beta. A position takes away a token
    as a sink: no query but its own sees it, whose row must not be empty; every kernel divides among what it still sees. The
    token stays in the stream.

    Raises:
        UserError: for a kernel without sink, a position that is not there, or a kernel whose columns are balanced too.
    """
    what = "the kernel" if position is None else f"position {position}"
    copy, chosen, marked = copied(model, f"remove the sink of {what}", layers, heads)
    told = {}
    for layer in chosen:
        block = copy.layer(layer)
        attention = block.attention
        kernel = attention.kernel
        if position is None:
            if not isinstance(kernel, SinkSoftmaxKernel):
                raise UserError(
                    f"remove_sink: the kernel of layer {layer} is not one softmax with a sink; name the position of a token."
                )
            block.attention = exchanged(attention, SoftmaxKernel(kernel.beta).train(kernel.training), marked)
            told[layer] = {"kernel": Softmax(beta=kernel.beta)}
            continue
        _check(model, position)
        if not kernel.rowwise:
            raise UserError(
                f"remove_sink: the kernel of layer {layer} balances columns, and that of a hidden token would have one entry; "
                "swap the kernel first."
            )
        if heads is None:
            mask = All((attention.mask, Hidden(position)))
            block.attention = rebuilt(attention, mask=mask)
            told[layer] = {"mask": mask}
        else:
            block.attention = exchanged(attention, Blind(kernel, position), marked)
    if heads is None:
        retold(copy, told)
    return copy


@torch.no_grad()
def replace_sink(
    model: Emformer,
    value: Literal["zero"] | Tensor | Means,
    position: int | None = 0,
    layers: Which = None,
    heads: Which = None,
) -> Emformer:
    """The sink takes the same weight and gives another content: D_i = (1 - lam_i) F m_i^rest + lam_i F value. Source: math H.2.

    lam_i = a_i0 is what query i gives to the token at `position`; the other weights stay as they are, and that token reads
    itself as before. In the copy's patterns its column is 0, for the content it gave is now the kernel's `value`. Position null
    is the kernel's own sink and its vector. Where all first tokens are one token, its mean is that token: nothing changes.

    Args:
        value: "zero"; a vector (d,) or (H, d) of E, mapped by F as every read token is; or means, whose mean read token at the
            position is taken.

    Raises:
        UserError: for a kernel without sink, a position that is not there, a value of another size, or a kernel whose rows do
            not sum to one: the mass that its rows lack is not the sink's alone.
    """
    said = value if isinstance(value, str) else "a vector" if isinstance(value, Tensor) else "its mean"
    what = "the kernel" if position is None else f"position {position}"
    copy, chosen, marked = copied(model, f"replace the sink of {what} by {said}", layers, heads, apart=isinstance(value, Means))
    for layer in chosen:
        block = copy.layer(layer)
        kernel = block.attention.kernel
        if position is None:
            if kernel.value is None:
                raise UserError(
                    f"replace_sink: the kernel of layer {layer} has no sink with a vector; name the position of a token."
                )
            if isinstance(value, Means):
                raise UserError("replace_sink: means know tokens, and the kernel's sink is none; give a vector or 'zero'.")
            given = torch.zeros_like(kernel.value) if isinstance(value, str) else _vectors(value, kernel.value)
            kernel.value.copy_(torch.where(marked.unsqueeze(-1), given, kernel.value))
            continue
        _check(model, position)
        before = kernel if isinstance(kernel, Drained) and kernel.position == position else None
        kernel = kernel if before is None else before.inner
        if not kernel.normalised:
            raise UserError(
                f"replace_sink: the rows of layer {layer}'s kernel do not sum to one; swap the kernel for Softmax first."
            )
        like = block.attention.content.left_rows()
        vector, drained = like.new_zeros(len(marked), like.shape[-1]), marked
        if before is not None:  # of other heads, say
            drained = marked | before.marked
            vector = vector if before.value is None else before.value
        if isinstance(value, str):
            given = torch.zeros_like(vector)
        else:
            given = _vectors(value if isinstance(value, Tensor) else _mean(value, layer, position), vector)
        vector = torch.where(marked.unsqueeze(-1), given, vector)
        new = Drained(kernel, position, drained, vector if vector.any() else None)
        block.attention = rebuilt(block.attention, kernel=new.train(kernel.training))
    return copy


def _check(model: Emformer, position: int) -> None:
    if not 0 <= position < model.settings.context:
        raise UserError(f"surgery: there is no position {position}; choose from 0 … {model.settings.context - 1}.")


def _mean(means: Means, layer: int, position: int) -> Tensor:
    if layer not in means.reads or position >= len(means.reads[layer]):
        raise UserError(
            f"replace_sink: the means know no token at position {position} of layer {layer}; take them on longer text."
        )
    return means.reads[layer][position]


def _vectors(value: Tensor, like: Tensor) -> Tensor:
    if value.shape not in (like.shape, like.shape[1:]):
        raise UserError(f"replace_sink: the value is {tuple(value.shape)}; give a vector (d,) or (H, d) = {tuple(like.shape)}.")
    return value.to(like).expand_as(like)


def _others(position: int, queries: int, keys: int, visible: Visible, device: torch.device) -> Tensor:
    """(T, S), true but in the column of `position` for other queries than its own. Keys stand at 0, 1 …"""
    first = keys - queries if visible.first is None else visible.first
    i = torch.arange(first, first + queries, device=device).unsqueeze(-1)
    return Hidden(position).visible(i, torch.arange(keys, device=device))


class Blind(Kernel):
    """A kernel whose queries do not see the token at `position`, but for its own."""

    def __init__(self, inner: Kernel, position: int):
        super().__init__()
        self.inner, self.position = inner, position
        claim(self, inner)
        self.value = inner.value

    def forward(self, u: Queries, v: Keys, c: Contents, visible: Visible) -> Mixture:
        return self.inner(u, v, c, self._rest(u, v, visible))

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        return self.inner.weights(u, v, self._rest(u, v, visible))

    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        return self.inner.macs(keys, visible, rank, width)

    def _rest(self, u: Tensor, v: Tensor, visible: Visible) -> Visible:
        size = u.shape[-2], v.shape[-2]
        table = visible.dense(*size, u.device) & _others(self.position, *size, visible, u.device)
        return Visible(table, first=visible.first)


class Drained(Direct):
    """The weights of a kernel whose rows sum to one, without what other queries than its own give to the token at `position`.

    That mass goes to `value` (H, d), or nowhere. The rows of heads that are not marked stay whole.
    """

    marked: Tensor

    def __init__(self, inner: Kernel, position: int, marked: Tensor, value: Tensor | None):
        super().__init__()
        self.inner, self.position = inner, position
        claim(self, inner, normalised=False, fused=False)
        self.register_buffer("marked", marked, persistent=False)
        self.value = None if value is None else nn.Parameter(value)

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        a = self.inner.weights(u, v, visible)
        return a * (_others(self.position, *a.shape[-2:], visible, a.device) | ~self.marked.view(-1, 1, 1))

    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        return keys * (rank + width)
