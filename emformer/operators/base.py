"""The operator: H linear maps on the embedding space, each known by its two factors.

    W_h = L_h R_{g(h)}^T        L_h, R_g in R^{d x r},  g(h) = h G // H

The same object serves as the form M (QK circuit) and as the content F (OV circuit):

    score s_ij = x_i^T M_h x_j = left(x_i)_h . right(x_j)_{g(h)}
    update D_i = sum_h F_h m_i^h = lift(right(m_i))

Attention is linear in the content, so it mixes *between* `right` and `lift`: only the r-vector right(x_j) is averaged.

A variant says how its factors come from its parameters, and nothing else: it inherits from `Factored` and gives both, or from
`FullRank` (R = I) and gives W. What W is constrained to be holds by this construction, after any step of any optimiser.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from emformer import parts
from emformer.parts import UserError
from emformer.types import Cloud, HeadClouds, Keys, Matrices, Mixture, Queries, Rows


class Operator(nn.Module, ABC):
    """H maps in factored form. `dim` d, `heads` H, `groups` G (divides H), `rank` r.

    `identity_right`: R is the identity of E (G = 1 and r = d), so that the cloud itself is the key and the content, shared by
    all heads. `rates`: by parameter name, the factor on the global learning rate that lets one rate serve every
    parameterisation (math I); 1 where a name is missing. `claims`: what W is whatever its parameters are, among "symmetric",
    "psd", "skew", "orthogonal" (times a number), "scalar", and of a content "tied" (F = c M) or "metric" (F = P M, P positive
    definite). `assignable`: takes another left factor. Costs, in multiply-adds: `macs` a token, of `left` and `right` or of
    `right` and `lift`; `setup_macs` once a forward pass, to make the factors from the parameters, and `setup_back` in the
    backward pass (of a matrix exponential, one of twice the size).
    """

    identity_right: bool = False
    generators: tuple[str, ...] = ()  # parameters that are logarithms: weight decay would not shrink W but turn it towards I
    claims: tuple[str, ...] = ()
    setup_macs: int = 0
    setup_back: int = 0
    assignable: bool = False

    def __init__(self, dim: int, heads: int, groups: int, rank: int, rates: dict[str, float]):
        super().__init__()
        self.dim, self.heads, self.groups, self.rank, self.rates = dim, heads, groups, rank, rates

    @property
    @abstractmethod
    def macs(self) -> int: ...

    @abstractmethod
    def left_rows(self) -> Rows:
        """The rows of L_h^T: (H, r, d)."""

    @abstractmethod
    def right_rows(self) -> Rows | None:
        """The rows of R_g^T: (G, r, d). None: the identity."""

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

    def assign(self, left: Rows) -> None:
        """Make W_h = L_h R_{g(h)}^T with the rows (H, r, d) of another L_h^T and the right factor as it is, in place.

        W must be one that the operator can be; what is not part of W stays. Raises TypeError where it is not `assignable`.
        """
        raise TypeError(f"{type(self).__name__} takes no other left factor")


class Factored(Operator):
    """W_h = L_h R_{g(h)}^T from explicit factors. Cost a token: d r (H + G) multiply-adds."""

    @abstractmethod
    def right_rows(self) -> Rows: ...

    @property
    def macs(self) -> int:
        return self.dim * self.rank * (self.heads + self.groups)

    def left(self, x: Cloud) -> Queries:
        return _split(functional.linear(x, self.left_rows().flatten(0, 1)), self.heads)

    def right(self, x: Cloud) -> Keys:
        return _split(functional.linear(x, self.right_rows().flatten(0, 1)), self.groups)

    def pull(self, u: Queries) -> HeadClouds:
        if self.groups == self.heads:
            return u @ self.right_rows()
        return (u.unflatten(1, (self.groups, -1)) @ self.right_rows().unsqueeze(1)).flatten(1, 2)

    def project(self, m: HeadClouds) -> Mixture:
        if self.groups == self.heads:
            return m @ self.right_rows().mT
        return (m.unflatten(1, (self.groups, -1)) @ self.right_rows().mT.unsqueeze(1)).flatten(1, 2)

    def lift_heads(self, z: Mixture) -> HeadClouds:
        return z @ self.left_rows()

    def lift(self, z: Mixture) -> Cloud:
        return z.transpose(1, 2).flatten(2) @ self.left_rows().flatten(0, 1)

    def matrix(self) -> Matrices:
        return self.left_rows().mT @ self.right_rows().repeat_interleave(self.heads // self.groups, 0)


class IdentityRight(Operator):
    """R = I: the cloud itself is key and content, shared by all heads."""

    identity_right = True

    def __init__(self, dim: int, heads: int, rates: dict[str, float]):
        super().__init__(dim, heads, groups=1, rank=dim, rates=rates)

    def right_rows(self) -> None:
        return None

    def right(self, x: Cloud) -> Keys:
        return x.unsqueeze(1)

    def pull(self, u: Queries) -> HeadClouds:
        return u

    def project(self, m: HeadClouds) -> Mixture:
        return m


class FullRank(IdentityRight):
    """W_h as a d x d matrix: L = W, R = I. `left(q)` is the relevance gradient M^T q. Cost a token: H d^2 multiply-adds.

    `left_rows()` is W^T: row k gives coordinate k of the relevance gradient.
    """

    @property
    def macs(self) -> int:
        return self.heads * self.dim**2

    def left(self, x: Cloud) -> Queries:
        return _split(functional.linear(x, self.left_rows().flatten(0, 1)), self.heads)

    def lift_heads(self, z: Mixture) -> HeadClouds:
        return z @ self.left_rows()

    def lift(self, z: Mixture) -> Cloud:
        return z.transpose(1, 2).flatten(2) @ self.left_rows().flatten(0, 1)

    def matrix(self) -> Matrices:
        return self.left_rows().mT


class Bound(Operator):
    """A content with the right factor of its form, and another left one. Referred to, not owned: the form's parameters are in no
    content's state. `right`, and so what decoding remembers of a content, is the form's own."""

    def __init__(self, form: Operator, rates: dict[str, float]):
        super().__init__(form.dim, form.heads, form.groups, form.rank, rates)
        self.identity_right = form.identity_right
        self.setup_macs, self.setup_back = form.setup_macs, form.setup_back
        self._form = (form,)  # a tuple is no submodule

    @property
    def form(self) -> Operator:
        return self._form[0]

    def right_rows(self) -> Rows | None:
        return self.form.right_rows()

    def right(self, x: Cloud) -> Keys:
        return self.form.right(x)

    def pull(self, u: Queries) -> HeadClouds:
        return self.form.pull(u)

    def project(self, m: HeadClouds) -> Mixture:
        return self.form.project(m)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Size at initialisation, the same for every parameterisation: one Frobenius norm a head (math I).

    As a form |M_h|_F = score_std, so that scores of independent tokens of unit variance have this standard deviation; as a
    content |F_h|_F = update_std sqrt(d/H), so that H averages of such tokens make an update of that standard deviation.

    Args:
        score_std: as a form, standard deviation of the score on tokens of unit variance at initialisation.
        update_std: as a content, factor on the update at initialisation (1/sqrt(2 depth) keeps the stream's variance flat).
    """

    score_std: float = 1.0
    update_std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("score_std", "update_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{type(self).__name__}: {name} is {getattr(self, name)}; choose a positive number such as 1.")

    def norm(self, role: parts.Role, dim: int, heads: int) -> float:
        """|W_h|_F at initialisation."""
        return self.score_std if role == "form" else self.update_std * math.sqrt(dim / heads)


def full_rate(role: parts.Role, dim: int, heads: int) -> float:
    """Learning-rate multiplier of the entries of a d x d matrix: a sign step then moves scores and updates as far as one of
    factors as wide as QKV attention would have them, r = d/H (math I)."""
    return 2 * math.sqrt(max(1, dim // heads)) / dim if role == "form" else 1 / math.sqrt(heads)


def factor_rate(std: float, dim: int) -> float:
    """Multiplier of a factor with entries of standard deviation `std`: entries of 1/sqrt(d) learn at the global rate, others in
    proportion, so that the scale of W may stand in either factor."""
    return std * math.sqrt(dim)


def constant(module: nn.Module, name: str, value: Tensor, learned: bool) -> None:
    """Give `module` this tensor: as a parameter where it is learned, else as a buffer. Both are part of its state."""
    if learned:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


def per_head(x: Tensor) -> Tensor:
    """(H,) -> (H, 1, 1)."""
    return x.view(-1, 1, 1)


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * r) -> (B, heads, T, r), a view."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)
