"""Skew operators: pure direction. No token is relevant to itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from emformer import parts
from emformer.operators.base import FullRank, Sizes, full_rate
from emformer.parts import UserError
from emformer.types import Rows


@dataclass(frozen=True)
class Skew(Sizes, parts.Operator):
    """W = (B - B^T)/2: s_ii = 0 and s_ij = -s_ji. Source: math A.1.

    d(d-1)/2 free numbers a head (B is stored whole, and its symmetric part never moves). As a content, x moves at right angles
    to itself.
    """

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> SkewOperator:
        if dim < 2:
            raise UserError("Skew: in one dimension the only skew matrix is zero; choose dim >= 2.")
        draw = self.norm(role, dim, heads) / math.sqrt(dim * (dim - 1)) * torch.randn(heads, dim, dim)  # E|W|_F = norm
        return SkewOperator((draw - draw.mT) / math.sqrt(2), {"weight": full_rate(role, dim, heads)})


class SkewOperator(FullRank):
    """`weight` (H, d, d) is B."""

    claims = ("skew",)
    assignable = True

    def __init__(self, weight: torch.Tensor, rates: dict[str, float]):
        super().__init__(weight.shape[-1], len(weight), rates)
        self.weight = nn.Parameter(weight)

    def left_rows(self) -> Rows:
        return (self.weight.mT - self.weight) / 2

    @torch.no_grad()
    def assign(self, left: Rows) -> None:
        self.weight.add_((left - self.left_rows()).mT)
