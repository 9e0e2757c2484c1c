"""A block: attention and FFN as steps of the flow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from emformer import parts
from emformer.attention import Attention, Memory
from emformer.parts import UserError
from emformer.placements import PostNorm, PreNorm  # checkpoints name them here
from emformer.types import Cloud, HeadClouds, Index, Mixture

__all__ = ["Block", "Parallel", "ParallelBlock", "PostNorm", "PreNorm", "SequentialBlock", "Step"]

Point = Literal["attn", "ffn", "block"]


class Step(NamedTuple):
    """One step of the flow: `after = place(before + eps * update)` in eval mode (dropout thins the update on its way
    into the stream), the update computed from `read`, what the sublayer sees of `before`.

    `point` "attn" leads from X^l to X^{l+1/2}, "ffn" on to X^{l+1}; "block" does both at once, and `ffn` is then the FFN's share
    of the update. `mixture` z (B, H, T, r) belongs to attention alone, and is None where a small model decodes with a memory;
    `Block.pieces` tells the update's summands by head.
    """

    layer: int
    point: Point
    before: Cloud
    read: Cloud
    mixture: Mixture | None
    update: Cloud
    after: Cloud
    ffn: Cloud | None = None


class Block(nn.Module, ABC):
    """Attention and the FFN, if there is one, added to the stream with step size `epsilon`.

    Around each sublayer stand the maps of the placement (`emformer.placements`): `read_*`, `shape_*`, `place_*`, None where there
    is nothing to do. Dropout acts on the updates, in training mode only.
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
        self.shape_attn: Any
        self.read_attn, self.shape_attn, self.place_attn = placement.build(norm, attention.form.dim)
        self.attention = attention
        self.ffn = ffn
        if ffn is not None:
            self.read_ffn, self.shape_ffn, self.place_ffn = placement.build(norm, attention.form.dim)

    @abstractmethod
    def flow(self, x: Cloud, i: Index, memory: Memory | None, layer: int) -> Iterator[Step]:
        """The block's steps from the state x at positions i."""

    def pieces(self, step: Step) -> tuple[HeadClouds, Tensor | float]:
        """(D^h (B, H, T, d), g): what each head, and the constant drift, adds to `step.update`, as it enters the stream.

        `step.update` is the sum of all of them (and of `step.ffn`). Raises ValueError for a step without heads.
        """
        if step.mixture is None:
            raise ValueError(f"layer {step.layer}: the step at '{step.point}' has no heads; take one of attention")
        heads = self.attention.content.lift_heads(step.mixture)
        drift = self.attention.drift
        if self.shape_attn is None:
            return heads, 0.0 if drift is None else drift
        update = heads.sum(1) if drift is None else heads.sum(1) + drift
        wide = step.before.unsqueeze(1), update.unsqueeze(1)
        rest = self.shape_attn.rest(update.shape[-1])
        if drift is not None:
            rest = rest + self.shape_attn.pieces(step.before, update, drift.expand_as(update))
        return self.shape_attn.pieces(*wide, heads), rest

    def _attend(self, x: Cloud, i: Index, memory: Memory | None) -> tuple[Cloud, Mixture | None, Cloud]:
        """(read, mixture, update) of attention at the state x."""
        y = x if self.read_attn is None else self.read_attn(x)
        z, update = self.attention.update(y, i, memory)
        return y, z, update if self.shape_attn is None else self.shape_attn(x, update)

    def _feed(self, x: Cloud, ffn: nn.Module) -> tuple[Cloud, Cloud]:
        """(read, update) of the FFN at the state x."""
        y = x if self.read_ffn is None else self.read_ffn(x)
        update = ffn(y)
        return y, update if self.shape_ffn is None else self.shape_ffn(x, update)

    def _add(self, x: Tensor, update: Tensor, place: nn.Module | None) -> Tensor:
        if self.dropout is not None:
            update = self.dropout(update)
        raw = x + update if self.epsilon == 1.0 else x + self.epsilon * update
        return raw if place is None else place(raw)


class SequentialBlock(Block):
    """Attention, then the FFN on what attention left."""

    def flow(self, x: Cloud, i: Index, memory: Memory | None, layer: int) -> Iterator[Step]:
        y, z, update = self._attend(x, i, memory)
        after = self._add(x, update, self.place_attn)
        yield Step(layer, "attn", x, y, z, update, after)
        if self.ffn is not None:
            x = after
            y, update = self._feed(x, self.ffn)
            after = self._add(x, update, self.place_ffn)
            yield Step(layer, "ffn", x, y, None, update, after)


@dataclass(frozen=True)
class Parallel(parts.Arrangement):
    """Attention and FFN side by side: x + eps (D_attn(norm(x)) + D_ffn(norm'(x))), each with a norm of its own, as in NeoX.

    A block is then one step of the flow, at point "block". What the placement does after the sum it does once.
    """

    def build(
        self,
        attention: nn.Module,
        ffn: nn.Module | None,
        norm: parts.Norm | None,
        placement: parts.Placement,
        epsilon: float,
        dropout: float,
    ) -> ParallelBlock:
        if ffn is None:
            raise UserError("the arrangement Parallel sets an FFN beside attention, and model.ffn is null: name one.")
        assert isinstance(attention, Attention)
        return ParallelBlock(attention, ffn, norm, placement, epsilon, dropout)


class ParallelBlock(Block):
    """Attention and FFN read the same state."""

    def __init__(
        self,
        attention: Attention,
        ffn: nn.Module,
        norm: parts.Norm | None,
        placement: parts.Placement,
        epsilon: float,
        dropout: float,
    ):
        super().__init__(attention, ffn, norm, placement, epsilon, dropout)
        self.place_ffn = None  # the sum is placed once, by attention's

    def flow(self, x: Cloud, i: Index, memory: Memory | None, layer: int) -> Iterator[Step]:
        y, z, update = self._attend(x, i, memory)
        assert self.ffn is not None
        _, beside = self._feed(x, self.ffn)
        update = update + beside
        yield Step(layer, "block", x, y, z, update, self._add(x, update, self.place_attn), beside)
