"""Low-rank operators: the factors of multi-head, grouped-query and multi-query attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from emformer import parts
from emformer.operators.base import Factored, Sizes
from emformer.parts import UserError
from emformer.types import Rows


@dataclass(frozen=True)
class LowRank(Sizes, parts.Operator):
    """W_h = L_h R_{g(h)}^T with free factors. Source: math A.1, A.2, A.5.

    As the form M the factors are the query weights over sqrt(r) and the key weights; as the content F the output and value
    weights.

    Args:
        rank: width r of the factors.
        groups: number G of right factors, each shared by H/G heads: null for G = H (multi-head), 1 for multi-query.
        balanced: as a form, give each factor r^(-1/4) of the scale instead of 1/sqrt(r) to the left one. The same M; for what
            reads the factors themselves, as the kernel L2 does, queries and keys are then of one length.
    """

    rank: int
    groups: int | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"LowRank: rank is {self.rank}; choose at least 1.")
        if self.groups is not None and self.groups < 1:
            raise UserError(f"LowRank: groups is {self.groups}; choose at least 1, or null for one group a head.")

    @classmethod
    def examples(cls) -> Sequence[LowRank]:
        return [cls(rank=4), cls(rank=4, groups=1), cls(rank=2, groups=2), cls(rank=4, balanced=True)]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> LowRankOperator:
        groups = self.groups or heads
        if heads % groups:
            raise UserError(
                f"LowRank ({role}): {groups} groups do not divide {heads} heads; choose groups from the divisors of heads."
            )
        # U, V ~ N(0, 1/d) with 1/sqrt(r) gives Var(s) = 1 and |M|_F = 1; F_ij ~ N(0, 1/(dH)) (math I). The scale of a form
        # lives in its left factor, L = U/sqrt(r), which therefore learns at 1/sqrt(r) of the rate: U moves as if it were free.
        if role == "content":
            left, right = self.update_std / math.sqrt(self.rank * heads), dim**-0.5
            rates: dict[str, float] = {}
        else:
            std = math.sqrt(self.score_std / dim)
            share = 0.25 if self.balanced else 0.5
            left, right = self.rank**-share * std, self.rank ** (share - 0.5) * std
            rates = {"left_factor": self.rank**-share, "right_factor": self.rank ** (share - 0.5)}
        return LowRankOperator(left * torch.randn(heads, self.rank, dim), right * torch.randn(groups, self.rank, dim), rates)


class LowRankOperator(Factored):
    """`left_factor` (H, r, d) holds the rows of L_h^T, `right_factor` (G, r, d) those of R_g^T."""

    assignable = True

    def __init__(self, left_factor: torch.Tensor, right_factor: torch.Tensor, rates: dict[str, float]):
        heads, rank, dim = left_factor.shape
        super().__init__(dim, heads, len(right_factor), rank, rates)
        self.left_factor = nn.Parameter(left_factor)
        self.right_factor = nn.Parameter(right_factor)

    def left_rows(self) -> Rows:
        return self.left_factor

    @torch.no_grad()
    def assign(self, left: Rows) -> None:
        self.left_factor.copy_(left)

    def right_rows(self) -> Rows:
        return self.right_factor
