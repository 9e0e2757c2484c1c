"""Split operators: symmetric and skew part with a dial between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.operators.base import FullRank, Sizes, constant, full_rate, per_head
from emformer.parts import UserError
from emformer.types import Rows


@dataclass(frozen=True)
class Split(Sizes, parts.Operator):
    """W = S + theta K with S = (B + B^T)/2 and K = (B - B^T)/2. Source: math A.1.

    theta = 0 takes away the asymmetry and leaves S and its d(d+1)/2 numbers as they are; theta = 1 is the free matrix B.

    Args:
        theta: weight of the skew part (at the start, if learned).
        learned: learn one theta a head.
    """

    theta: float = 1.0
    learned: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(self.theta) <= 1e6:
            raise UserError(f"Split: theta is {self.theta}; choose a number of modest size.")

    @classmethod
    def examples(cls) -> Sequence[Split]:
        return [cls(), cls(theta=0.0), cls(theta=0.5, learned=True)]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> SplitOperator:
        # B iid N(0, std^2): E|W|_F^2 = std^2 (d (d+1) + theta^2 d (d-1))/2
        std = self.norm(role, dim, heads) / math.sqrt((dim * (dim + 1) + self.theta**2 * dim * (dim - 1)) / 2)
        rates = {"weight": full_rate(role, dim, heads)}
        return SplitOperator(std * torch.randn(heads, dim, dim), self.theta, self.learned, rates)


class SplitOperator(FullRank):
    """`weight` (H, d, d) is B; `theta` (H,) is a parameter where it is learned, else a buffer."""

    theta: Tensor
    assignable = True

    def __init__(self, weight: torch.Tensor, theta: float, learned: bool, rates: dict[str, float]):
        super().__init__(weight.shape[-1], len(weight), rates)
        self.weight = nn.Parameter(weight)
        self.claims = ("symmetric",) if theta == 0 and not learned else ()
        constant(self, "theta", torch.full((len(weight),), theta), learned)

    def left_rows(self) -> Rows:
        return ((self.weight + self.weight.mT) + per_head(self.theta) * (self.weight.mT - self.weight)) / 2

    @torch.no_grad()
    def assign(self, left: Rows) -> None:
        change, theta = left - self.left_rows(), per_head(self.theta)  # a small theta then magnifies no rounding of S
        skew = torch.where(theta == 0, 0, (change.mT - change) / theta)
        self.weight.add_((change + change.mT + skew) / 2)
