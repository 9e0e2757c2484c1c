"""Scaled orthogonal operators: every singular value the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from emformer import parts
from emformer.operators.base import FullRank, Sizes, full_rate, per_head
from emformer.types import Rows


@dataclass(frozen=True)
class ScaledOrthogonal(Sizes, parts.Operator):
    """W = c Q, Q orthogonal: Q = exp(K), or the Cayley map Q = (I - K)(I + K)^{-1}, K = (A - A^T)/2. Source: math A.1.

    d(d-1)/2 + 1 free numbers a head. Both maps reach det Q = +1 alone, and Cayley misses rotations by pi; `reflect` multiplies
    by diag(1, …, 1, -1) and so gives the other half of O(d).

    A starts as Gaussian as makes the eigenvalues of Q spread over the circle with mean zero, so that a token is no more
    relevant to itself than to others: by the semicircle law of K, entries of 3.8317/(2 sqrt(d)) (first zero of the Bessel
    function J_1) for exp, sqrt(8)/(2 sqrt(d)) for Cayley.

    Args:
        map: "exp" (about six d x d products a head and pass) or "cayley" (one solve).
        reflect: det Q = -1 instead of +1.
    """

    map: Literal["exp", "cayley"] = "exp"
    reflect: bool = False

    @classmethod
    def examples(cls) -> Sequence[ScaledOrthogonal]:
        return [cls(), cls(map="cayley"), cls(reflect=True)]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> ScaledOrthogonalOperator:
        scale = self.norm(role, dim, heads) / math.sqrt(dim)
        radius = 3.8317 if self.map == "exp" else math.sqrt(8)
        draw = radius / (2 * math.sqrt(dim)) * torch.randn(heads, dim, dim)
        # dW = c dQ: what moves W as far as a free matrix would move it, and c in proportion to itself
        rates = {"generator": full_rate(role, dim, heads) / scale, "scale": scale}
        return ScaledOrthogonalOperator((draw - draw.mT) / math.sqrt(2), scale, self.map, self.reflect, rates)


class ScaledOrthogonalOperator(FullRank):
    """`generator` (H, d, d) is A, `scale` (H,) is c."""

    claims = ("orthogonal",)
    generators = ("generator",)

    def __init__(self, generator: torch.Tensor, scale: float, map_: str, reflect: bool, rates: dict[str, float]):
        heads, dim, _ = generator.shape
        super().__init__(dim, heads, rates)
        self.map, self.reflect = map_, reflect
        self.generator, self.scale = nn.Parameter(generator), nn.Parameter(torch.full((heads,), scale))
        cube = heads * dim**3
        self.setup_macs, self.setup_back = (6 * cube, 48 * cube) if map_ == "exp" else (4 * cube // 3, 2 * cube)

    def left_rows(self) -> Rows:
        k = (self.generator.mT - self.generator) / 2  # of Q^T
        if self.map == "exp":
            q = torch.linalg.matrix_exp(k)
        else:
            one = torch.eye(self.dim, dtype=k.dtype, device=k.device)
            q = torch.linalg.solve(one + k, one - k)
        if self.reflect:
            q = torch.cat([q[:, :-1], -q[:, -1:]], 1)
        return per_head(self.scale) * q
