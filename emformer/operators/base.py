"""The operator: H linear maps on the embedding space, each known by its two factors.

    W_h = L_h R_{g(h)}^T        L_h, R_g in R^{d x r},  g(h) = h G // H

The same object serves as the form M (QK circuit) and as the content F (OV circuit):

    score s_ij = x_i^T M_h x_j = left(x_i)_h . right(x_j)_{g(h)}
    update D_i = sum_h F_h m_i^h = lift(right(m_i))

Attention is linear in the content, so it mixes *between* `right` and `lift`: only the r-vector right(x_j) is averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from emformer.types import Cloud, HeadClouds, Keys, Matrices, Mixture, Queries


class Operator(nn.Module, ABC):
    """H maps in factored form. `dim` d, `heads` H, `groups` G (divides H), `rank` r.

    `identity_right`: R is the identity of E (dense operators, G = 1 and r = d), so that the cloud itself is the key and
    the content, shared by all heads. `rates`: by parameter name, the factor on the global learning rate that lets one
    rate serve every parameterisation (math I); 1 where a name is missing.
    """

    identity_right: bool = False

    def __init__(self, dim: int, heads: int, groups: int, rank: int, rates: dict[str, float]):
        super().__init__()
        self.dim, self.heads, self.groups, self.rank, self.rates = dim, heads, groups, rank, rates

    @abstractmethod
    def left(self, x: Cloud) -> Queries:
        """L_h^T x: (B, T, d) -> (B, H, T, r)."""

    @abstractmethod
    def right(self, x: Cloud) -> Keys:
        """R_g^T x: (B, T, d) -> (B, G, T, r)."""

    @abstractmethod
    def pull(self, u: Queries) -> HeadClouds:
        """R_{g(h)} u_h, the adjoint of `right`: (B, H, T, r) -> (B, H, T, d). On u = left(q): the relevance gradient M^T q."""

    @abstractmethod
    def project(self, m: HeadClouds) -> Mixture:
        """R_{g(h)}^T m_h for one cloud per head: (B, H, T, d) -> (B, H, T, r)."""

    @abstractmethod
    def lift_heads(self, z: Mixture) -> HeadClouds:
        """L_h z_h, head by head: (B, H, T, r) -> (B, H, T, d)."""

    @abstractmethod
    def lift(self, z: Mixture) -> Cloud:
        """sum_h L_h z_h in one product: (B, H, T, r) -> (B, T, d)."""

    @abstractmethod
    def matrix(self) -> Matrices:
        """W as (H, d, d), every scale included: `score = q @ matrix()[h] @ t`, `content = matrix()[h] @ t`."""
