"""A block: attention and FFN as two steps of the flow, and where the norm stands around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from emformer import parts
from emformer.attention import Attention, Memory
from emformer.types import Cloud, Index, Mixture

Point = Literal["attn", "ffn"]


class Step(NamedTuple):
    """One step of the flow: `after = place(before + eps * update)` in eval mode (dropout thins the update on its way
    into the stream), the update computed from `read = read(before)`.

    `point` "attn" leads from X^l to X^{l+1/2}, "ffn" on to X^{l+1}. `mixture` z (B, H, T, r) belongs to attention alone, and is
    None where a small model decodes with a memory; the update of head h is `content.lift_heads(z)[:, h]`.
    """

    layer: int
    point: Point
    before: Cloud
    read: Cloud
    mixture: Mixture | None
    update: Cloud
    after: Cloud


@dataclass(frozen=True)
class PreNorm(parts.Placement):
    """x + eps D(norm(x)): the raw stream is a plain sum of updates. Closed by one more norm before the unembedding."""

    @property
    def closes(self) -> bool:
        return True

    def build(self, norm: parts.Norm | None, dim: int) -> tuple[nn.Module | None, nn.Module | None]:
        return (None if norm is None else norm.build(dim)), None


@dataclass(frozen=True)
class PostNorm(parts.Placement):
    """norm(x + eps D(x)): every state lies on the norm's sphere."""

    @property
    def closes(self) -> bool:
        return False

    def build(self, norm: parts.Norm | None, dim: int) -> tuple[nn.Module | None, nn.Module | None]:
        return None, (None if norm is None else norm.build(dim))


class Block(nn.Module):
    """Attention, then the FFN if there is one, each added to the stream with step size `epsilon`.

    Dropout acts on the updates, in training mode only.
    """

    def __init__(
        self,
        attention: Attention,
        ffn: nn.Module | None,
        norm: parts.Norm | None,
        placement: parts.Placement,
        epsilon: float,
        dropout: float,
    ):
        super().__init__()
        self.epsilon, self.dropout = epsilon, nn.Dropout(dropout) if dropout else None
        self.read_attn, self.place_attn = placement.build(norm, attention.form.dim)
        self.attention = attention
        self.ffn = ffn
        if ffn is not None:
            self.read_ffn, self.place_ffn = placement.build(norm, attention.form.dim)

    def flow(self, x: Cloud, i: Index, memory: Memory | None, layer: int) -> Iterator[Step]:
        """The block's steps from the state x at positions i."""
        y = x if self.read_attn is None else self.read_attn(x)
        z, update = self.attention.update(y, i, memory)
        after = self._add(x, update)
        if self.place_attn is not None:
            after = self.place_attn(after)
        yield Step(layer, "attn", x, y, z, update, after)
        if self.ffn is not None:
            x = after
            y = x if self.read_ffn is None else self.read_ffn(x)
            update = self.ffn(y)
            after = self._add(x, update)
            if self.place_ffn is not None:
                after = self.place_ffn(after)
            yield Step(layer, "ffn", x, y, None, update, after)

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        if self.dropout is not None:
            update = self.dropout(update)
        return x + update if self.epsilon == 1.0 else x + self.epsilon * update
