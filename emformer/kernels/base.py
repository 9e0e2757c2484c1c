"""The kernel: how relevance becomes weights."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from emformer.masks import Visible
from emformer.types import Contents, Keys, Mixture, Queries, Weights


class Kernel(nn.Module, ABC):
    """(u, v, c, visible) -> mixture z_i = sum_j a_ij c_j, fused; `weights` is the reference a_ij that it must equal.

    Capabilities, asked by everything else: `normalised` (rows of a sum to 1, so a constant value is a constant drift);
    `row_invariant` (adding a constant to a row of scores changes nothing, so key biases are pure gauge without RoPE);
    `rowwise` (row i depends on query i alone, so that a cache and chunks of queries are possible); `differentiable`;
    `reads_factors` (not a function of the score alone).
    """

    normalised: bool
    row_invariant: bool
    rowwise: bool = True
    differentiable: bool = True
    reads_factors: bool = False

    @abstractmethod
    def forward(self, u: Queries, v: Keys, c: Contents, visible: Visible) -> Mixture:
        """z (B, H, T, c). Groups of v and c need not agree; each divides H."""

    @abstractmethod
    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        """a (B, H, T, S), masked entries exactly 0. Memory B H T S."""
