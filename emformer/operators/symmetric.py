"""Symmetric operators: relevance without direction, s_ij = s_ji."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from emformer import parts
from emformer.operators.base import Factored, FullRank, Sizes, factor_rate, full_rate
from emformer.parts import UserError
from emformer.types import Rows


@dataclass(frozen=True)
class Symmetric(Sizes, parts.Operator):
    """W = (B + B^T)/2, or W = U diag(s) U^T of rank r. Source: math A.1.

    d(d+1)/2 free numbers a head (B is stored whole, and its skew part never moves), or d r + r. Scores are symmetric before the
    mask; under RoPE only in the low-rank form, where both factors turn alike.

    Args:
        rank: width of U; null for the full matrix. s starts as +1, -1, +1 …: attraction index about 1/2.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise UserError(f"Symmetric: rank is {self.rank}; choose at least 1, or null for the full matrix.")

    @classmethod
    def examples(cls) -> Sequence[Symmetric]:
        return [cls(), cls(rank=4)]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> FullRank | Factored:
        norm = self.norm(role, dim, heads)
        if self.rank is None:
            draw = norm / math.sqrt(dim * (dim + 1)) * torch.randn(heads, dim, dim)  # E|W|_F = norm
            return _Full((draw + draw.mT) / math.sqrt(2), {"weight": full_rate(role, dim, heads)})
        signature = torch.ones(heads, self.rank)
        signature[:, 1::2] = -1
        # U ~ N(0, std^2): E|U diag(s) U^T|_F^2 = std^4 d (r (d+1) + (sum s)^2), and the sum is 0 or 1
        std = (norm**2 / (dim * (self.rank * (dim + 1) + self.rank % 2))) ** 0.25
        return _Factored(std * torch.randn(heads, self.rank, dim), signature, {"factor": factor_rate(std, dim)})


class _Full(FullRank):
    """`weight` (H, d, d) is B."""

    claims = ("symmetric",)
    assignable = True

    def __init__(self, weight: torch.Tensor, rates: dict[str, float]):
        super().__init__(weight.shape[-1], len(weight), rates)
        self.weight = nn.Parameter(weight)

    def left_rows(self) -> Rows:
        return (self.weight + self.weight.mT) / 2

    @torch.no_grad()
    def assign(self, left: Rows) -> None:
        self.weight.add_(left - self.left_rows())


class _Factored(Factored):
    """`factor` (H, r, d) is U^T, `signature` (H, r) is s."""

    claims = ("symmetric",)

    def __init__(self, factor: torch.Tensor, signature: torch.Tensor, rates: dict[str, float]):
        heads, rank, dim = factor.shape
        super().__init__(dim, heads, heads, rank, rates)
        self.factor, self.signature = nn.Parameter(factor), nn.Parameter(signature)

    def left_rows(self) -> Rows:
        return self.signature.unsqueeze(-1) * self.factor

    def right_rows(self) -> Rows:
        return self.factor
