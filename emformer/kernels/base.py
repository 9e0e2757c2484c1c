"""The kernel: how relevance becomes weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from emformer.masks import Visible
from emformer.parts import UserError
from emformer.types import Contents, Keys, Mixture, Queries, Rows, Weights


class Affine(NamedTuple):
    """The context mean as a function of the query: m_h(x) = offset_h + gain_h x, (…, H, d) and (…, H, d, d)."""

    offset: Tensor
    gain: Tensor


class Kernel(nn.Module, ABC):
    """(u, v, c, visible) -> mixture z_i = sum_j a_ij c_j; `weights` is the reference a_ij that it must equal.

    `value` (H, d), or None: a vector of E for each head that takes the mass 1 - sum_j a_ij which the tokens leave (a sink).

    Capabilities, asked by everything else:

    * `normalised`: rows of a sum to 1, so that a constant value is a constant drift;
    * `row_invariant`: adding a constant to a row of scores changes nothing, so that key biases are gauge without RoPE;
    * `column_invariant`: the same for columns, so that a functional of the key is gauge too;
    * `rowwise`: row i depends on query i alone, so that a causal mask, a cache and chunks of queries are possible;
    * `differentiable`: can be trained;
    * `reads_factors`: not a function of the score alone;
    * `fused`: never holds the T x S weights; `sparse`: visible tokens may have weight 0; `signed`: weights may be negative.
    """

    normalised: bool
    row_invariant: bool
    column_invariant: bool = False
    rowwise: bool = True
    differentiable: bool = True
    reads_factors: bool = False
    fused: bool = False
    sparse: bool = False
    signed: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.value: nn.Parameter | None = None

    @abstractmethod
    def forward(self, u: Queries, v: Keys, c: Contents, visible: Visible) -> Mixture:
        """z (B, H, T, c), the sink's share left out. Groups of v and c need not agree; each divides H."""

    @abstractmethod
    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        """a (B, H, T, S), masked entries exactly 0. Memory B H T S."""

    @abstractmethod
    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        """Multiply-adds a query and head: scores of rank r, mixtures of the given width, of `keys` keys so many visible."""

    def mean_field(self, left: Rows, right: Rows, mean: Tensor, cov: Tensor) -> Affine | None:
        """m_h(x) = sum_j a(x, y_j) y_j of a query x, all of the cloud visible, in the limit of many tokens y ~ N(mean, cov); None
        where that is not affine in x, or not known.

        Args:
            left, right: rows (H, r, d) of L_h^T and R_h^T, M_h = L_h R_h^T.
            mean: (…, d). cov: (…, d, d), positive semidefinite.
        """
        return None


class Direct(Kernel):
    """A kernel without a fused form: its mixture is made from its weights. Cost: keys (r + c) multiply-adds a query and head,
    masked or not, and the B H T S weights in memory."""

    def forward(self, u: Queries, v: Keys, c: Contents, visible: Visible) -> Mixture:
        return mix(self.weights(u, v, visible), c)

    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        return keys * (rank + width)


@dataclass(frozen=True, kw_only=True)
class Tempered:
    """What kernels of a score share.

    Args:
        beta: inverse temperature, positive; to turn relevance round, turn the sign of M. The score's own scale is inside M.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"{type(self).__name__}: beta is {self.beta}; choose a positive number such as 1.")


def scores(u: Queries, v: Keys) -> Weights:
    """s_ij = u_i . v_j (B, H, T, S). Heads of a group go through one product; nothing is repeated for them."""
    groups = v.shape[1]
    return (u.reshape(len(u), groups, -1, u.shape[-1]) @ v.mT).view(*u.shape[:-1], v.shape[-2])


def mix(a: Weights, c: Contents) -> Mixture:
    """sum_j a_ij c_j."""
    return (a.reshape(len(a), c.shape[1], -1, a.shape[-1]) @ c).view(*a.shape[:-1], c.shape[-1])
