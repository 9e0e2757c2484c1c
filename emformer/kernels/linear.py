"""Linear attention: the score itself is the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from emformer import parts
from emformer.kernels.base import Affine, Kernel, Tempered, mix, scores
from emformer.masks import Visible
from emformer.types import Contents, Keys, Mixture, Queries, Rows, Weights


@dataclass(frozen=True)
class Linear(Tempered, parts.Kernel):
    """a_ij = beta s_ij / n, n the number of visible tokens: weights of either sign. Source: math A.2, S3.

    Where every token sees every other the keys and contents are summed first, at a cost without N^2.

    """

    @classmethod
    def examples(cls) -> Sequence[Linear]:
        return [cls(), cls(beta=0.5)]

    def build(self, heads: int, dim: int) -> LinearKernel:
        return LinearKernel(self.beta)


class LinearKernel(Kernel):
    normalised = False
    row_invariant = False
    signed = True

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def forward(self, u: Queries, v: Keys, c: Contents, visible: Visible) -> Mixture:
        if visible.table is None and not visible.triangle and u.shape[-2] > 1:
            if v.shape[1] != c.shape[1]:
                v, c = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (v, c))
            memory = v.mT @ c * (self.beta / v.shape[-2])  # (B, G, r, c)
            return mix(u, memory)
        return mix(self.weights(u, v, visible), c)

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        s = self.beta * scores(u, v)
        table = visible.dense(*s.shape[-2:], s.device)
        return (s / table.sum(-1, keepdim=True)).masked_fill(~table, 0.0)

    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        return 2 * rank * width if visible == keys else keys * (rank + width)

    def mean_field(self, left: Rows, right: Rows, mean: Tensor, cov: Tensor) -> Affine:
        # beta E[y y^T] M^T x, of any law with these moments
        moment = cov + mean.unsqueeze(-1) * mean.unsqueeze(-2)
        gain = self.beta * moment.unsqueeze(-3) @ (right.mT @ left)
        return Affine(gain.new_zeros(gain.shape[:-1]), gain)
