"""Feed-forward networks: what moves a token by itself. Absent means `None`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from emformer import parts
from emformer.parts import UserError


@dataclass(frozen=True)
class _Sizes:
    """Fields that all networks share.

    Args:
        expansion: width of the hidden layer in units of d, rounded up to a multiple of 8.
        bias: learn biases.
        update_std: factor on the output at initialisation (1/sqrt(2 depth) keeps the stream's variance flat).
        hidden: the width itself, instead of an expansion; null for none.
    """

    expansion: float = 4.0
    bias: bool = False
    update_std: float = 1.0
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.expansion <= 0:
            raise UserError(f"{type(self).__name__}: expansion is {self.expansion}; choose a positive number such as 4.")
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"{type(self).__name__}: hidden is {self.hidden}; choose at least 1, or null for an expansion.")

    def width(self, dim: int) -> int:
        return self.hidden or 8 * math.ceil(round(self.expansion * dim, 6) / 8)


@dataclass(frozen=True)
class GELU(_Sizes, parts.FFN):
    """W_2 gelu(W_1 x), the tanh form of GPT-2."""

    @classmethod
    def examples(cls) -> Sequence[GELU]:
        return [cls(), cls(bias=True, hidden=13)]

    def build(self, dim: int) -> nn.Module:
        return _Plain(dim, self.width(dim), self.bias, self.update_std, _gelu)


@dataclass(frozen=True)
class ExactGELU(_Sizes, parts.FFN):
    """W_2 gelu(W_1 x) with gelu(x) = x Phi(x) itself, Phi the normal distribution's, as in BERT and NeoX."""

    @classmethod
    def examples(cls) -> Sequence[ExactGELU]:
        return [cls(), cls(bias=True, hidden=13)]

    def build(self, dim: int) -> nn.Module:
        return _Plain(dim, self.width(dim), self.bias, self.update_std, functional.gelu)


@dataclass(frozen=True)
class ReLU2(_Sizes, parts.FFN):
    """W_2 relu(W_1 x)^2."""

    def build(self, dim: int) -> nn.Module:
        return _Plain(dim, self.width(dim), self.bias, self.update_std, _relu2)


@dataclass(frozen=True)
class SwiGLU(_Sizes, parts.FFN):
    """W_2 (silu(W_g x) * W_1 x). Three matrices: expansion 8/3 has the parameters of the others at 4."""

    expansion: float = 8 / 3

    @classmethod
    def examples(cls) -> Sequence[SwiGLU]:
        return [cls(), cls(bias=True, hidden=13)]

    def build(self, dim: int) -> nn.Module:
        return _Gated(dim, self.width(dim), self.bias, self.update_std)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x).square()


def _linear(inputs: int, outputs: int, bias: bool, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class _Plain(nn.Module):
    def __init__(self, dim: int, width: int, bias: bool, gain: float, activation) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.down = _linear(dim, width, bias), _linear(width, dim, bias, gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


class _Gated(nn.Module):
    def __init__(self, dim: int, width: int, bias: bool, gain: float):
        super().__init__()
        self.gate, self.up = _linear(dim, width, bias), _linear(dim, width, bias)
        self.down = _linear(width, dim, bias, gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))
