"""Dense operators: one free d x d matrix a head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from emformer import parts
from emformer.operators.base import FullRank, Sizes, full_rate
from emformer.types import Rows


@dataclass(frozen=True)
class Dense(Sizes, parts.Operator):
    """W_h in R^{d x d}, free. L = W, R = I: keys and contents are the cloud itself. Source: math A.1, I.

    Decoding caches d numbers a token and layer (the cloud), shared by all heads.

    Args:
        init: "normal" draws independent entries (form: std score_std/d, content: std update_std/sqrt(dH));
            "qkv_product" multiplies two factors of width d/heads (the law of QKV attention, spectra included);
            "symmetric" draws (B + B^T)/sqrt(2), entries of the same variance off the diagonal.
    """

    init: Literal["normal", "qkv_product", "symmetric"] = "normal"

    @classmethod
    def examples(cls) -> Sequence[Dense]:
        return [cls(), cls(init="qkv_product"), cls(init="symmetric")]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> DenseOperator:
        std = self.norm(role, dim, heads) / dim
        return DenseOperator(_draw(self.init, heads, dim, std), {"left_factor": full_rate(role, dim, heads)})


class DenseOperator(FullRank):
    """`left_factor` (H, d, d) holds W_h^T."""

    assignable = True

    def __init__(self, left_factor: torch.Tensor, rates: dict[str, float]):
        super().__init__(left_factor.shape[-1], len(left_factor), rates)
        self.left_factor = nn.Parameter(left_factor)

    def left_rows(self) -> Rows:
        return self.left_factor

    @torch.no_grad()
    def assign(self, left: Rows) -> None:
        self.left_factor.copy_(left)


def _draw(init: str, heads: int, dim: int, std: float) -> torch.Tensor:
    if init == "qkv_product":
        rank = max(1, dim // heads)
        return std / math.sqrt(rank) * torch.randn(heads, dim, rank) @ torch.randn(heads, rank, dim)
    draw = std * torch.randn(heads, dim, dim)
    return (draw + draw.mT) / math.sqrt(2) if init == "symmetric" else draw
