"""Dense operators: one free d x d matrix a head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from emformer import parts
from emformer.operators.base import Operator
from emformer.types import Cloud, HeadClouds, Keys, Matrices, Mixture, Queries


@dataclass(frozen=True)
class Dense(parts.Operator):
    """W_h in R^{d x d}, free. L = W, R = I: keys and contents are the cloud itself. Source: math A.1, I.

    `left(q)` is the relevance gradient M^T q. Decoding caches d numbers a token and layer (the cloud), shared by all heads.

    Args:
        init: "normal" draws independent entries (form: std score_std/d, content: std update_std/sqrt(dH));
            "qkv_product" multiplies two factors of width d/heads (the law of QKV attention, spectra included);
            "symmetric" draws (B + B^T)/sqrt(2), entries of the same variance off the diagonal.
        score_std: as a form, standard deviation of the score on tokens of unit variance at initialisation.
        update_std: as a content, factor on the update at initialisation (1/sqrt(2 depth) keeps the stream's variance flat).
    """

    init: Literal["normal", "qkv_product", "symmetric"] = "normal"
    score_std: float = 1.0
    update_std: float = 1.0

    @classmethod
    def examples(cls) -> Sequence[Dense]:
        return [cls(), cls(init="qkv_product"), cls(init="symmetric")]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> DenseOperator:
        rank = max(1, dim // heads)  # the width that QKV attention would have
        if role == "form":
            std, rate = self.score_std / dim, 2 * math.sqrt(rank) / dim
        else:
            std, rate = self.update_std / math.sqrt(dim * heads), 1 / math.sqrt(heads)
        return DenseOperator(_draw(self.init, heads, dim, rank, std), {"left_factor": rate})


class DenseOperator(Operator):
    """`left_factor` (H, d, d) holds L_h^T = W_h^T: row k gives coordinate k of the relevance gradient."""

    identity_right = True

    def __init__(self, left_factor: torch.Tensor, rates: dict[str, float]):
        heads, dim, _ = left_factor.shape
        super().__init__(dim, heads, groups=1, rank=dim, rates=rates)
        self.left_factor = nn.Parameter(left_factor)

    def left(self, x: Cloud) -> Queries:
        u = functional.linear(x, self.left_factor.flatten(0, 1))
        return u.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def right(self, x: Cloud) -> Keys:
        return x.unsqueeze(1)

    def pull(self, u: Queries) -> HeadClouds:
        return u

    def project(self, m: HeadClouds) -> Mixture:
        return m

    def lift_heads(self, z: Mixture) -> HeadClouds:
        return z @ self.left_factor

    def lift(self, z: Mixture) -> Cloud:
        return z.transpose(1, 2).flatten(2) @ self.left_factor.flatten(0, 1)

    def matrix(self) -> Matrices:
        return self.left_factor.mT


def _draw(init: str, heads: int, dim: int, rank: int, std: float) -> torch.Tensor:
    if init == "qkv_product":
        return std / math.sqrt(rank) * torch.randn(heads, dim, rank) @ torch.randn(heads, rank, dim)
    draw = std * torch.randn(heads, dim, dim)
    return (draw + draw.mT) / math.sqrt(2) if init == "symmetric" else draw
