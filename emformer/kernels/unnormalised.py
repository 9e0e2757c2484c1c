"""Unnormalised self-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emformer import parts
from emformer.kernels.base import Direct, Tempered, scores
from emformer.masks import Visible
from emformer.parts import UserError
from emformer.types import Keys, Queries, Weights


@dataclass(frozen=True)
class Unnormalised(Tempered, parts.Kernel):
    """a_ij = exp(clip(beta s_ij)) / n, n the number of visible tokens (USA). Source: math E.1, K; S3.

    With M symmetric and F = M, attention is then exactly a gradient.

    Args:
        clip: beta s is cut to [-clip, clip], so that no weight leaves [e^-clip, e^clip]/n; null for no cut.
    """

    clip: float | None = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"Unnormalised: clip is {self.clip}; choose a positive number, or null for none.")

    @classmethod
    def examples(cls) -> Sequence[Unnormalised]:
        return [cls(), cls(beta=0.5, clip=1.0), cls(clip=None)]

    def build(self, heads: int, dim: int) -> UnnormalisedKernel:
        return UnnormalisedKernel(self.beta, self.clip)


class UnnormalisedKernel(Direct):
    normalised = False
    row_invariant = False

    def __init__(self, beta: float, clip: float | None):
        super().__init__()
        self.beta, self.clip = beta, clip

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        s = self.beta * scores(u, v)
        if self.clip is not None:
            s = s.clamp(-self.clip, self.clip)
        table = visible.dense(*s.shape[-2:], s.device)
        return s.masked_fill(~table, float("-inf")).exp() / table.sum(-1, keepdim=True)
