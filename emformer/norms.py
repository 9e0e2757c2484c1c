"""Norms: what a sublayer reads instead of the raw stream. An absent norm is absent (`None`), not an identity with a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emformer import parts


class Norm(nn.Module, ABC):
    """y = Gamma Pi x / s(x) + b: a token is centred (Pi = I - 11^T/d, or I), divided by a scalar and stretched (math A.6).

    `centred`: whether Pi removes the mean. `gain` (d,) is the diagonal of Gamma, `bias` (d,) is b; None where not learned.
    """

    centred: bool
    gain: Tensor | None
    bias: Tensor | None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def size(self, x: Tensor) -> Tensor:
        """s(x) (…, 1), the root mean square of Pi x (with eps)."""

    @abstractmethod
    def affine(self, dim: int) -> tuple[Tensor, Tensor]:
        """(Gamma Pi, b): (d, d) and (d,). On the bare cloud Pi x / s(x) an operator W that reads y acts as W Gamma Pi and W b."""

    @abstractmethod
    def spread(self, x: Tensor, pieces: Tensor) -> Tensor:
        """Gamma Pi p / s(x) of `pieces` p (…, d): what each summand of x contributes to y, b apart."""


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
        return _Norm(dim, True, self.gain, self.bias, self.eps)


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
        return _Norm(dim, False, self.gain, False, self.eps)


class _Norm(Norm):
    def __init__(self, dim: int, centred: bool, gain: bool, bias: bool, eps: float):
        super().__init__()
        self.shape, self.centred, self.eps = (dim,), centred, eps
        self.gain = nn.Parameter(torch.ones(dim)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return torch.layer_norm(x, self.shape, self.gain, self.bias, self.eps)
        return torch.rms_norm(x, self.shape, self.gain, self.eps)

    def size(self, x: Tensor) -> Tensor:
        return (self._centre(x).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def affine(self, dim: int) -> tuple[Tensor, Tensor]:
        like = next((p for p in (self.gain, self.bias) if p is not None), torch.empty(0, dtype=torch.float64))
        matrix = self._centre(torch.eye(dim, dtype=like.dtype, device=like.device))
        bias = torch.zeros_like(matrix[0]) if self.bias is None else self.bias
        return matrix if self.gain is None else self.gain.unsqueeze(-1) * matrix, bias

    def spread(self, x: Tensor, pieces: Tensor) -> Tensor:
        pieces = self._centre(pieces) / self.size(x)
        return pieces if self.gain is None else self.gain * pieces

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x
