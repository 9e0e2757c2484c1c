"""L2 attention: relevance is nearness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emformer import parts
from emformer.kernels.base import Affine, Kernel, Tempered, scores
from emformer.kernels.softmax import attend, fused_macs, masked_softmax
from emformer.masks import Visible
from emformer.types import Contents, Keys, Mixture, Queries, Rows, Weights


@dataclass(frozen=True)
class L2(Tempered, parts.Kernel):
    """a_ij proportional to exp(-beta |u_i - v_j|^2 / 2) over what is visible. Source: math A.8, S3.

    The cross term is beta u.v, the score of dot-product attention: with Q = L^T/sqrt(2) and K = R^T/sqrt(2) this is
    exp(-beta |Qx - Ky|^2). Leaves are ellipsoids. What differs from softmax is the bias -beta |v_j|^2/2 of the key, which
    depends on the factors and not on M alone; a form whose factors are of one size suits it (`LowRank(balanced=True)`).

    """

    @classmethod
    def examples(cls) -> Sequence[L2]:
        return [cls(), cls(beta=0.5)]

    def build(self, heads: int, dim: int) -> L2Kernel:
        return L2Kernel(self.beta)


class L2Kernel(Kernel):
    normalised = True
    row_invariant = True  # of u - v + (b_Q - b_K) only the difference of the biases is seen
    reads_factors = True
    fused = True

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def forward(self, u: Queries, v: Keys, c: Contents, visible: Visible) -> Mixture:
        return attend(*_lifted(u, v), c, visible, self.beta)

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        bias = v.square().sum(-1) / 2
        bias = bias.repeat_interleave(u.shape[1] // v.shape[1], 1).unsqueeze(2)
        return masked_softmax(self.beta * (scores(u, v) - bias), visible)

    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        return fused_macs(visible, rank + 1, width)

    def mean_field(self, left: Rows, right: Rows, mean: torch.Tensor, cov: torch.Tensor) -> Affine:
        # the bias of the key makes the cloud narrower, Sigma -> C Sigma with C = (1 + beta Sigma R R^T)^-1; what is left is
        # softmax's tilt of that cloud. All eigenvalues of what is inverted are at least 1.
        cov, mean = cov.unsqueeze(-3), mean.unsqueeze(-2).unsqueeze(-1)
        narrowed = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device) + self.beta * cov @ (right.mT @ right)
        tilt = self.beta * cov @ (right.mT @ left)
        solved = torch.linalg.solve(narrowed, torch.cat([mean.expand(*tilt.shape[:-1], 1), tilt], -1))
        return Affine(solved[..., 0], solved[..., 1:])


def _lifted(u: Queries, v: Keys) -> tuple[torch.Tensor, torch.Tensor]:
    """The bias of the key as one more coordinate: (u, 1) . (v, -|v|^2/2) = u.v - |v|^2/2."""
    bias = -v.square().sum(-1, keepdim=True) / 2
    return torch.cat([u, torch.ones_like(u[..., :1])], -1), torch.cat([v, bias.to(v.dtype)], -1)
