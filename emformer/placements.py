"""Where the norm stands around a sublayer, and on what space the stream lives.

A placement gives three maps, each absent (None) where it does nothing:

    y = read(x),   D = sublayer(y),   x <- place(x + eps shape(x, D))

`shape` is linear in D once D is known, so that it distributes over the heads of which D is the sum.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from emformer import parts
from emformer.norms import Norm
from emformer.types import Cloud


class Shape(nn.Module, ABC):
    """What becomes of an update before it enters the stream."""

    @abstractmethod
    def forward(self, x: Cloud, update: Cloud) -> Cloud:
        """The update that is added to the state x."""

    @abstractmethod
    def pieces(self, x: Tensor, update: Tensor, pieces: Tensor) -> Tensor:
        """The share of each of `pieces` (…, d), summands of `update`; x and update broadcast against them."""

    @abstractmethod
    def rest(self, dim: int) -> Tensor | float:
        """What `forward` adds that belongs to no summand: a constant vector, or 0."""


@dataclass(frozen=True)
class PreNorm(parts.Placement):
    """x + eps D(norm(x)): the raw stream is a plain sum of updates. Closed by one more norm before the unembedding."""

    @property
    def closes(self) -> bool:
        return True

    def build(self, norm: parts.Norm | None, dim: int) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
        return (None if norm is None else norm.build(dim)), None, None

    def enter(self, dim: int) -> nn.Module | None:
        return None


@dataclass(frozen=True)
class PostNorm(parts.Placement):
    """norm(x + eps D(x)): every state lies on the norm's sphere."""

    @property
    def closes(self) -> bool:
        return False

    def build(self, norm: parts.Norm | None, dim: int) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
        return None, None, (None if norm is None else norm.build(dim))

    def enter(self, dim: int) -> nn.Module | None:
        return None


@dataclass(frozen=True)
class SandwichNorm(parts.Placement):
    """x + eps norm'(D(norm(x))): a sublayer reads a normalised token and writes a normalised update."""

    @property
    def closes(self) -> bool:
        return True

    def build(self, norm: parts.Norm | None, dim: int) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
        if norm is None:
            return None, None, None
        return norm.build(dim), NormedUpdate(norm.build(dim)), None

    def enter(self, dim: int) -> nn.Module | None:
        return None


@dataclass(frozen=True)
class Sphere(parts.Placement):
    """Tokens on the sphere of radius sqrt(d): x <- sqrt(d) (x + eps P_x D)/|x + eps P_x D|, P_x D = D - <x, D> x/d.

    The embedding is put on the sphere first. A step is a projected Euler step followed by the retraction, so eps -> 0 gives the
    flow of the theory (math E.1), in which tokens are unit vectors and M is d times ours. A norm, if any, acts on what a
    sublayer reads; without gain it would be the identity (RMSNorm) or remove the mean (LayerNorm).
    """

    @property
    def closes(self) -> bool:
        return False

    def build(self, norm: parts.Norm | None, dim: int) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
        return (None if norm is None else norm.build(dim)), Tangent(), Retraction()

    def enter(self, dim: int) -> nn.Module | None:
        return Retraction()


class NormedUpdate(Shape):
    """The update through a norm of its own."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        assert isinstance(norm, Norm)
        self.norm = norm

    def forward(self, x: Cloud, update: Cloud) -> Cloud:
        return self.norm(update)

    def pieces(self, x: Tensor, update: Tensor, pieces: Tensor) -> Tensor:
        return self.norm.spread(update, pieces)

    def rest(self, dim: int) -> Tensor | float:
        return 0.0 if self.norm.bias is None else self.norm.bias


class Tangent(Shape):
    """The part of the update at right angles to the token."""

    def forward(self, x: Cloud, update: Cloud) -> Cloud:
        return self.pieces(x, update, update)

    def pieces(self, x: Tensor, update: Tensor, pieces: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        return pieces - (x * pieces).sum(-1, keepdim=True) / square * x

    def rest(self, dim: int) -> Tensor | float:
        return 0.0


class Retraction(nn.Module):
    """sqrt(d) x/|x|."""

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(x.shape[-1]) * functional.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)
