"""Multiples of the identity: the model of the theory, in which tokens attract the tokens that they resemble."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.operators.base import IdentityRight, Sizes, constant, per_head
from emformer.parts import UserError
from emformer.types import Cloud, HeadClouds, Matrices, Mixture, Queries, Rows


@dataclass(frozen=True)
class Identity(Sizes, parts.Operator):
    """W = c I, one c a head. Source: math A.1, E.1 (SA with M = F = I). Cost a token: H d multiply-adds.

    Args:
        scale: c at the start; null for the size that every form or content starts with.
        learned: learn c.
    """

    scale: float | None = None
    learned: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and not abs(self.scale) <= 1e6:
            raise UserError(f"Identity: scale is {self.scale}; choose a number of modest size.")

    @classmethod
    def examples(cls) -> Sequence[Identity]:
        return [cls(), cls(scale=0.5, learned=False)]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> IdentityOperator:
        start = self.norm(role, dim, heads) / math.sqrt(dim)
        return IdentityOperator(dim, heads, start if self.scale is None else self.scale, self.learned, {"scale": start})


class IdentityOperator(IdentityRight):
    """`scale` (H,) is c: a parameter where it is learned, else a buffer."""

    claims = ("symmetric", "orthogonal", "scalar")

    scale: Tensor

    def __init__(self, dim: int, heads: int, scale: float, learned: bool, rates: dict[str, float]):
        super().__init__(dim, heads, rates if learned else {})
        constant(self, "scale", torch.full((heads,), scale), learned)

    @property
    def macs(self) -> int:
        return self.heads * self.dim

    def left_rows(self) -> Rows:
        return per_head(self.scale) * torch.eye(self.dim, dtype=self.scale.dtype, device=self.scale.device)

    def left(self, x: Cloud) -> Queries:
        return per_head(self.scale) * x.unsqueeze(1)

    def lift_heads(self, z: Mixture) -> HeadClouds:
        return per_head(self.scale) * z

    def lift(self, z: Mixture) -> Cloud:
        return (per_head(self.scale) * z).sum(1)

    def matrix(self) -> Matrices:
        return self.left_rows()
