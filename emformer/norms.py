"""Norms: what a sublayer reads instead of the raw stream. An absent norm is absent (`None`), not an identity with a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from emformer import parts


@dataclass(frozen=True)
class LayerNorm(parts.Norm):
    """y = Gamma sqrt(d) Pi x / |Pi x| + b, Pi = I - 11^T/d: the sphere of radius sqrt(d) in the plane of zero mean.

    Args:
        gain: learn the diagonal Gamma.
        bias: learn b.
        eps: added to the variance.
    """

    gain: bool = True
    bias: bool = False
    eps: float = 1e-5

    @classmethod
    def examples(cls) -> Sequence[LayerNorm]:
        return [cls(), cls(gain=False), cls(bias=True)]

    def build(self, dim: int) -> nn.Module:
        return _LayerNorm(dim, self.gain, self.bias, self.eps)


@dataclass(frozen=True)
class RMSNorm(parts.Norm):
    """y = Gamma sqrt(d) x / |x|: the sphere of radius sqrt(d). Without gain it commutes with rotations of E.

    Args:
        gain: learn the diagonal Gamma.
        eps: added to the mean square.
    """

    gain: bool = True
    eps: float = 1e-6

    @classmethod
    def examples(cls) -> Sequence[RMSNorm]:
        return [cls(), cls(gain=False)]

    def build(self, dim: int) -> nn.Module:
        return _RMSNorm(dim, self.gain, self.eps)


class _LayerNorm(nn.Module):
    def __init__(self, dim: int, gain: bool, bias: bool, eps: float):
        super().__init__()
        self.shape, self.eps = (dim,), eps
        self.gain = nn.Parameter(torch.ones(dim)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x, self.shape, self.gain, self.bias, self.eps)


class _RMSNorm(nn.Module):
    def __init__(self, dim: int, gain: bool, eps: float):
        super().__init__()
        self.shape, self.eps = (dim,), eps
        self.gain = nn.Parameter(torch.ones(dim)) if gain else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, self.shape, self.gain, self.eps)
