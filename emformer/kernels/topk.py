"""Top-k softmax: attention to the k most relevant tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emformer import parts
from emformer.kernels.base import Direct, Tempered, scores
from emformer.kernels.softmax import masked_softmax
from emformer.masks import Visible
from emformer.parts import UserError
from emformer.types import Keys, Queries, Weights


@dataclass(frozen=True)
class TopK(Tempered, parts.Kernel):
    """Softmax over the k highest scores of the visible tokens, 0 elsewhere; scores equal to the k-th all stay.

    Args:
        k: tokens that a query takes from.
    """

    k: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"TopK: k is {self.k}; choose at least 1.")

    @classmethod
    def examples(cls) -> Sequence[TopK]:
        return [cls(k=3), cls(k=100)]

    def build(self, heads: int, dim: int) -> TopKKernel:
        return TopKKernel(self.k, self.beta)


class TopKKernel(Direct):
    normalised = True
    row_invariant = True
    sparse = True

    def __init__(self, k: int, beta: float):
        super().__init__()
        self.k, self.beta = k, beta

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        s = self.beta * scores(u, v)
        table = visible.dense(*s.shape[-2:], s.device)
        seen = s.detach().masked_fill(~table, float("-inf"))
        best = seen.topk(min(self.k, s.shape[-1]), -1).values
        # scores that are equal but for rounding are equal: which of them stay must not hang on how they were summed
        lowest = best[..., -1:] - 64 * torch.finfo(s.dtype).eps * best[..., :1].abs().clamp(min=1)
        return masked_softmax(s.masked_fill(seen < lowest, float("-inf")), visible)
