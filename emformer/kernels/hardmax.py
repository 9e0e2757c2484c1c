"""Hardmax: the limit of softmax at zero temperature."""

from __future__ import annotations

from dataclasses import dataclass

from emformer import parts
from emformer.kernels.base import Direct, scores
from emformer.masks import Visible
from emformer.types import Keys, Queries, Weights


@dataclass(frozen=True)
class Hardmax(parts.Kernel):
    """a_ij = 1/m on the m visible tokens of the highest score, 0 elsewhere: softmax at beta -> infinity. Source: math B.

    Its derivative in the scores is 0 where it exists, so it is not trained: it is for simulations and surgery.
    """

    def build(self, heads: int, dim: int) -> HardmaxKernel:
        return HardmaxKernel()


class HardmaxKernel(Direct):
    normalised = True
    row_invariant = True
    differentiable = False
    sparse = True

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        s = scores(u, v)
        s = s.masked_fill(~visible.dense(*s.shape[-2:], s.device), float("-inf"))
        highest = (s == s.amax(-1, keepdim=True)).to(s.dtype)
        return highest / highest.sum(-1, keepdim=True)
