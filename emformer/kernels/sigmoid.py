"""Sigmoid attention: every token is judged by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emformer import parts
from emformer.kernels.base import Direct, Tempered, scores
from emformer.masks import Visible
from emformer.types import Keys, Queries, Weights


@dataclass(frozen=True)
class Sigmoid(Tempered, parts.Kernel):
    """a_ij = sigma(beta s_ij - log n), n the number of visible tokens. Rows do not sum to 1, but are near it at s = 0."""

    @classmethod
    def examples(cls) -> Sequence[Sigmoid]:
        return [cls(), cls(beta=0.5)]

    def build(self, heads: int, dim: int) -> SigmoidKernel:
        return SigmoidKernel(self.beta)


class SigmoidKernel(Direct):
    normalised = False
    row_invariant = False

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        s = self.beta * scores(u, v)
        table = visible.dense(*s.shape[-2:], s.device)
        count = table.sum(-1, keepdim=True).to(s.dtype)
        return (s - count.log()).sigmoid().masked_fill(~table, 0.0)
