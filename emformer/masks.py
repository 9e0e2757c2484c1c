"""Masks: predicates on pairs of positions; `All` is their conjunction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from emformer import parts
from emformer.parts import UserError
from emformer.types import Index, Table

Shape = Literal["full", "triangle", "table"]


class Visible(NamedTuple):
    """What a kernel is told: `table` (T, S), true where the query may look; without a table, all or the lower triangle.

    `first`: the key that the first query stands at; None: the last queries stand at the last keys.
    """

    table: Table | None
    triangle: bool = False
    first: int | None = None

    def dense(self, queries: int, keys: int, device: torch.device) -> Table:
        """The table, made if need be. A triangle has as many queries as keys."""
        if self.table is not None:
            return self.table
        ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
        return ones.tril() if self.triangle else ones


def visible(mask: parts.Mask, i: Index, keys: int) -> Visible:
    """The pattern of `mask` for queries at positions `i`: as many keys stand at `i` too, more at 0, 1, … up to the last i."""
    if mask.shape == "full":
        return Visible(None)
    if mask.shape == "triangle":
        if len(i) == keys:
            return Visible(None, triangle=True)
        if len(i) == 1:  # one new token sees everything before it
            return Visible(None)
    j = i if len(i) == keys else torch.arange(keys, device=i.device)
    return Visible(mask.visible(i[:, None], j[None, :]))


@dataclass(frozen=True)
class Causal(parts.Mask):
    """j <= i: a token sees itself and what stands before it."""

    @property
    def causal(self) -> bool:
        return True

    @property
    def shape(self) -> Shape:
        return "triangle"

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return j <= i


@dataclass(frozen=True)
class Full(parts.Mask):
    """Every token sees every token. Not with the next-token objective: position i would see its own target (math A.8)."""

    @property
    def causal(self) -> bool:
        return False

    @property
    def shape(self) -> Shape:
        return "full"

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(i == j)


@dataclass(frozen=True)
class Window(parts.Mask):
    """|i - j| < size: a band around the token itself. Combine with `Causal` for a sliding window over the past.

    Args:
        size: tokens seen on each side, the token itself included; at least 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"Window: size is {self.size}; a token must at least see itself, so choose 1 or more.")

    @classmethod
    def examples(cls) -> Sequence[Window]:
        return [cls(size=3)]

    @property
    def causal(self) -> bool:
        return self.size == 1

    @property
    def shape(self) -> Shape:
        return "table"

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i - j).abs() < self.size


@dataclass(frozen=True)
class All(parts.Mask):
    """The conjunction: visible where every one of `masks` lets the query look, as in All([Causal(), Window(32)])."""

    masks: Sequence[parts.Mask]

    def __post_init__(self) -> None:
        if not self.masks:
            raise UserError("All: the list of masks is empty; name at least one, or use Full.")
        object.__setattr__(self, "masks", tuple(self.masks))  # YAML gives a list

    @classmethod
    def examples(cls) -> Sequence[All]:
        return [cls(masks=(Causal(), Window(size=3)))]

    @property
    def causal(self) -> bool:
        return any(mask.causal for mask in self.masks)

    @property
    def shape(self) -> Shape:
        shapes = {mask.shape for mask in self.masks} - {"full"}
        return "full" if not shapes else shapes.pop() if len(shapes) == 1 else "table"

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        seen = self.masks[0].visible(i, j)
        for mask in self.masks[1:]:
            seen = seen & mask.visible(i, j)
        return seen
