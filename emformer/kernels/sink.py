"""Softmax with a sink: attention that may look at nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from emformer import parts
from emformer.kernels.base import Kernel, Tempered, scores
from emformer.kernels.softmax import attend, fused_macs, masked_softmax
from emformer.masks import Visible
from emformer.types import Contents, Keys, Mixture, Queries, Weights


@dataclass(frozen=True)
class SinkSoftmax(Tempered, parts.Kernel):
    """a_ij = exp(beta s_ij) / (exp(beta b_h) + sum_{j' visible} exp(beta s_ij')): one more key for each head, of score b_h.

    The mass that it takes goes to its value, a vector of E mapped by the content as every token is. Rows of a sum to less than
    1, so key and value biases count (math A.2). The zero form (`learned: false`) has score 0 and value 0.

    Args:
        learned: learn b_h and the value of each head; both start at 0.
    """

    learned: bool = True

    @classmethod
    def examples(cls) -> Sequence[SinkSoftmax]:
        return [cls(), cls(beta=0.5, learned=False)]

    def build(self, heads: int, dim: int) -> SinkSoftmaxKernel:
        return SinkSoftmaxKernel(heads, dim, self.beta, self.learned)


class SinkSoftmaxKernel(Kernel):
    """`score` (H,) is b, `value` (H, d) the sink's vector; both None in the zero form."""

    normalised = False
    row_invariant = False
    fused = True

    def __init__(self, heads: int, dim: int, beta: float, learned: bool):
        super().__init__()
        self.beta = beta
        self.score = nn.Parameter(torch.zeros(heads)) if learned else None
        self.value = nn.Parameter(torch.zeros(heads, dim)) if learned else None

    def forward(self, u: Queries, v: Keys, c: Contents, visible: Visible) -> Mixture:
        # The sink is key 0, with value 0 here. Its score is one more coordinate, b for every query and 1 for that key alone;
        # without it a key of zeros has score 0. An idle query 0 keeps a causal pattern a triangle.
        if self.score is not None:
            u = torch.cat([u, self.score.to(u.dtype).view(-1, 1, 1).expand(*u.shape[:-1], 1)], -1)
            v = functional.pad(functional.pad(v, (0, 1)), (0, 0, 1, 0))
            first = torch.zeros_like(v[:, :, :1])
            first[..., -1] = 1
            v = torch.cat([first, v[:, :, 1:]], 2)
        else:
            v = functional.pad(v, (0, 0, 1, 0))
        c = functional.pad(c, (0, 0, 1, 0))
        if visible.triangle:
            return attend(functional.pad(u, (0, 0, 1, 0)), v, c, visible, self.beta)[:, :, 1:]
        table = None if visible.table is None else functional.pad(visible.table, (1, 0), value=True)
        return attend(u, v, c, Visible(table), self.beta)

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        s = scores(u, v)
        sink = s.new_zeros(1) if self.score is None else self.score.to(s.dtype)
        s = torch.cat([sink.view(-1, 1, 1).expand(*s.shape[:2], s.shape[2], 1), s], -1)
        table = functional.pad(visible.dense(s.shape[-2], s.shape[-1] - 1, s.device), (1, 0), value=True)
        return masked_softmax(self.beta * s, Visible(table))[..., 1:]

    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        return fused_macs(visible + 1, rank + (self.score is not None), width)
