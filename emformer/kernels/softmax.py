"""Softmax attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from emformer import parts
from emformer.kernels.base import Affine, Kernel, Tempered, scores
from emformer.masks import Visible
from emformer.types import Contents, Keys, Mixture, Queries, Rows, Weights


@dataclass(frozen=True)
class Softmax(Tempered, parts.Kernel):
    """a_ij = exp(beta s_ij) / sum_{j' visible} exp(beta s_ij'). Source: math 0, B (minimiser of the free energy)."""

    @classmethod
    def examples(cls) -> Sequence[Softmax]:
        return [cls(), cls(beta=0.5)]

    def build(self, heads: int, dim: int) -> SoftmaxKernel:
        return SoftmaxKernel(self.beta)


class SoftmaxKernel(Kernel):
    normalised = True
    row_invariant = True
    fused = True

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def forward(self, u: Queries, v: Keys, c: Contents, visible: Visible) -> Mixture:
        return attend(u, v, c, visible, self.beta)

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        # beta goes to the queries: there are fewer of their numbers than of the scores
        return masked_softmax(scores(u if self.beta == 1 else self.beta * u, v), visible)

    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        return fused_macs(visible, rank, width)

    def mean_field(self, left: Rows, right: Rows, mean: Tensor, cov: Tensor) -> Affine:
        # tilting a Gaussian by e^{beta <M^T x, y>} moves its mean by beta Sigma M^T x (math E.6)
        gain = self.beta * cov.unsqueeze(-3) @ (right.mT @ left)
        return Affine(mean.unsqueeze(-2).expand(gain.shape[:-1]), gain)


def attend(u: Queries, v: Keys, c: Contents, visible: Visible, beta: float) -> Mixture:
    """softmax(beta u v^T) c by torch's fused attention: the weights are never held."""
    heads, width = u.shape[1], c.shape[-1]
    if v.shape[1] == c.shape[1] == 1 < heads and visible.table is None and not visible.triangle:
        # heads that share all keys and see all of them are just more queries: nothing is expanded or read H times
        return _fused(u.flatten(1, 2).unsqueeze(1), v, c, visible, beta).view(*u.shape[:-1], width)
    return _fused(u, _expand(v, heads), _expand(c, heads), visible, beta)


def masked_softmax(scores: Weights, visible: Visible) -> Weights:
    """Softmax over what is visible; exactly 0 elsewhere."""
    table = visible.dense(*scores.shape[-2:], scores.device)
    return scores.masked_fill(~table, float("-inf")).softmax(-1)


def fused_macs(visible: float, rank: int, width: int) -> int:
    """Multiply-adds a query and head of `attend`: both products at the wider of the two widths (see `_fused`)."""
    return round(visible * 2 * max(rank, width))


def _fused(u: Queries, v: Keys, c: Contents, visible: Visible, beta: float) -> Mixture:
    # The flash kernels take one head count and one width for all three, and fall back silently to the quadratic
    # path otherwise. Zero columns change neither scores nor mixtures.
    rank, width = u.shape[-1], c.shape[-1]
    if rank < width:
        u, v = _widen(u, width), _widen(v, width)
    elif width < rank:
        c = _widen(c, rank)
    z = functional.scaled_dot_product_attention(u, v, c, attn_mask=visible.table, is_causal=visible.triangle, scale=beta)
    return z if z.shape[-1] == width else z[..., :width]


def _expand(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, G, S, r) -> (B, H, S, r), each group repeated for its heads. A view for one group (stride 0), else a copy."""
    groups = x.shape[1]
    if groups == heads:
        return x
    return x.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    """Zero columns up to `width`."""
    return functional.pad(x, (0, width - x.shape[-1]))
