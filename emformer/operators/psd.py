"""Positive semidefinite operators: the attractive case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from emformer import parts
from emformer.operators.base import Factored, Sizes, factor_rate
from emformer.parts import UserError
from emformer.types import Rows


@dataclass(frozen=True)
class PSD(Sizes, parts.Operator):
    """W = U U^T, U in R^{d x r}: s_ii >= 0 and s_ij = s_ji. Source: math A.1; the energy of E.4 grows at any step.

    d r numbers a head. As a content, F contracts nothing to below zero: it moves tokens along themselves.

    Args:
        rank: width r of U; at least the dimension for every PSD matrix.
    """

    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"PSD: rank is {self.rank}; choose at least 1.")

    @classmethod
    def examples(cls) -> Sequence[PSD]:
        return [cls(rank=4)]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> PSDOperator:
        # U ~ N(0, std^2): E|U U^T|_F^2 = std^4 d r (d + r + 1)
        std = (self.norm(role, dim, heads) ** 2 / (dim * self.rank * (dim + self.rank + 1))) ** 0.25
        return PSDOperator(std * torch.randn(heads, self.rank, dim), {"factor": factor_rate(std, dim)})


class PSDOperator(Factored):
    """`factor` (H, r, d) is U^T: both factors of W."""

    claims = ("symmetric", "psd")
    assignable = True

    def __init__(self, factor: torch.Tensor, rates: dict[str, float]):
        heads, rank, dim = factor.shape
        super().__init__(dim, heads, heads, rank, rates)
        self.factor = nn.Parameter(factor)

    def left_rows(self) -> Rows:
        return self.factor

    def right_rows(self) -> Rows:
        return self.factor

    @torch.no_grad()
    def assign(self, left: Rows) -> None:
        # L = U C with C >= 0: W = U C U^T = (U C^1/2) (U C^1/2)^T
        factor = self.factor.to(left)
        c = left @ torch.linalg.pinv(factor)
        values, vectors = torch.linalg.eigh((c + c.mT) / 2)
        self.factor.copy_((vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT @ factor)
