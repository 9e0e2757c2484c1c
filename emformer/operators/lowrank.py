"""Low-rank operators: the factors of multi-head, grouped-query and multi-query attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from emformer import parts
from emformer.operators.base import Operator
from emformer.parts import UserError
from emformer.types import Cloud, HeadClouds, Keys, Matrices, Mixture, Queries


@dataclass(frozen=True)
class LowRank(parts.Operator):
    """W_h = L_h R_{g(h)}^T with free factors. Source: math A.1, A.2, A.5.

    As the form M the factors are the query weights over sqrt(r) and the key weights; as the content F the output and value
    weights.

    Args:
        rank: width r of the factors.
        groups: number G of right factors, each shared by H/G heads: null for G = H (multi-head), 1 for multi-query.
        score_std: as a form, standard deviation of the score on tokens of unit variance at initialisation.
        update_std: as a content, factor on the update at initialisation (1/sqrt(2 depth) keeps the stream's variance flat).
    """

    rank: int
    groups: int | None = None
    score_std: float = 1.0
    update_std: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LowRank: rank is {self.rank}; choose at least 1.")
        if self.groups is not None and self.groups < 1:
            raise UserError(f"LowRank: groups is {self.groups}; choose at least 1, or null for one group a head.")

    @classmethod
    def examples(cls) -> Sequence[LowRank]:
        return [cls(rank=4), cls(rank=4, groups=1), cls(rank=2, groups=2)]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> LowRankOperator:
        groups = self.groups or heads
        if heads % groups:
            raise UserError(
                f"LowRank ({role}): {groups} groups do not divide {heads} heads; choose groups from the divisors of heads."
            )
        # U, V ~ N(0, 1/d) with 1/sqrt(r) gives Var(s) = 1 and |M|_F = 1; F_ij ~ N(0, 1/(dH)) (math I). The scale of a form
        # lives in its left factor, L = U/sqrt(r), which therefore learns at 1/sqrt(r) of the rate: U moves as if it were free.
        if role == "form":
            std, scale = math.sqrt(self.score_std / dim), self.rank**-0.5
            return LowRankOperator(dim, heads, groups, self.rank, scale * std, std, {"left_factor": scale})
        left = self.update_std / math.sqrt(self.rank * heads)
        return LowRankOperator(dim, heads, groups, self.rank, left, dim**-0.5, {})


class LowRankOperator(Operator):
    """`left_factor` (H, r, d) holds the rows of L_h^T, `right_factor` (G, r, d) those of R_g^T."""

    def __init__(
        self, dim: int, heads: int, groups: int, rank: int, left_std: float, right_std: float, rates: dict[str, float]
    ) -> None:
        super().__init__(dim, heads, groups, rank, rates)
        self.left_factor = nn.Parameter(left_std * torch.randn(heads, rank, dim))
        self.right_factor = nn.Parameter(right_std * torch.randn(groups, rank, dim))

    def left(self, x: Cloud) -> Queries:
        return _split(functional.linear(x, self.left_factor.flatten(0, 1)), self.heads)

    def right(self, x: Cloud) -> Keys:
        return _split(functional.linear(x, self.right_factor.flatten(0, 1)), self.groups)

    def pull(self, u: Queries) -> HeadClouds:
        if self.groups == self.heads:
            return u @ self.right_factor
        return (u.unflatten(1, (self.groups, -1)) @ self.right_factor.unsqueeze(1)).flatten(1, 2)

    def project(self, m: HeadClouds) -> Mixture:
        if self.groups == self.heads:
            return m @ self.right_factor.mT
        return (m.unflatten(1, (self.groups, -1)) @ self.right_factor.mT.unsqueeze(1)).flatten(1, 2)

    def lift_heads(self, z: Mixture) -> HeadClouds:
        return z @ self.left_factor

    def lift(self, z: Mixture) -> Cloud:
        return z.transpose(1, 2).flatten(2) @ self.left_factor.flatten(0, 1)

    def matrix(self) -> Matrices:
        right = self.right_factor.repeat_interleave(self.heads // self.groups, 0)
        return self.left_factor.mT @ right


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, heads * r) -> (B, heads, T, r), a view."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)
