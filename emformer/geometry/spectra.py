"""Operators as geometry: how symmetric, how attractive, how wide they are, and how two of them fit together.

Every function takes matrices (..., d, d), or factors as rows (..., r, d), of any floating type, computes in float64 and
returns float64 (or complex128) of the batch shape. All values are dimensionless unless a unit is given. A quotient 0/0 is nan,
never a number; matrices that are not finite make the decompositions raise `torch.linalg.LinAlgError`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Complex128, Float, Float64
from torch import Tensor

Square = Float[Tensor, "*batch d d"]
Scalars = Float64[Tensor, "*batch"]
One = Float[Tensor, "*#batch d d"]  # of a pair, whose batches broadcast
Pairs = Float64[Tensor, "..."]
LeftRows = Float[Tensor, "P r d"]  # of one operator a row L^T, and the other
RightRows = Float[Tensor, "P r d"]
OtherLeftRows = Float[Tensor, "H s d"]
OtherRightRows = Float[Tensor, "H s d"]


def wide(w: Float[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """In float64; on the CPU where the device has none."""
    return (w.cpu() if w.device.type == "mps" else w).double()


def asymmetry(w: Square) -> Scalars:
    """a = |K|_F^2 / |W|_F^2 with K = (W - W^T)/2.

    In [0, 1]: 0 symmetric, 1 skew. Null (iid entries): (d - 1)/(2d). nan for W = 0. Cost d^2. Source: math A.1.
    """
    w = wide(w)
    return _energy((w - w.mT) / 2) / _energy(w)


def attraction(w: Square) -> Scalars:
    """pi = sum lambda_i^+ / sum |lambda_i| over the eigenvalues of S = (W + W^T)/2.

    In [0, 1]: 1 positive semidefinite, 0 negative. Null (iid entries): 1/2. nan where S = 0 up to the rounding of the input's
    type. Cost d^3. Source: math A.1.
    """
    rounding = w.shape[-1] * torch.finfo(w.dtype).eps
    w = wide(w)
    symmetric = (w + w.mT) / 2
    values = torch.linalg.eigvalsh(symmetric)
    share = values.clamp(min=0).sum(-1) / values.abs().sum(-1)
    # a skew W that was computed as a product has a symmetric part of pure rounding, whose signs mean nothing
    return share.where(_energy(symmetric) > rounding**2 * _energy(w), torch.nan)


def singular_values(w: Square) -> Float64[Tensor, "*batch d"]:
    """The singular values of W, descending, in units of W. Cost d^3."""
    return torch.linalg.svdvals(wide(w))


def thin_singular_values(left: Float[Tensor, "*batch r d"], right: Float[Tensor, "*batch r d"]) -> Float64[Tensor, "*batch k"]:
    """The k = min(r, d) largest singular values of W = L R^T from the rows of L^T and R^T, descending; the others are 0.

    L = Q_L T_L and R = Q_R T_R give W = Q_L (T_L T_R^T) Q_R^T, a k x k problem. Cost d r^2. Source: math A.3.
    """
    return torch.linalg.svdvals(_core(left) @ _core(right).mT)


def eigenvalues(w: Square) -> Complex128[Tensor, "*batch d"]:
    """The eigenvalues of W by descending modulus, in units of W; conjugates stand side by side. Cost about 10 d^3."""
    values = torch.linalg.eigvals(wide(w))
    return values.gather(-1, values.abs().argsort(dim=-1, descending=True, stable=True))


def effective_rank(w: Square) -> Scalars:
    """exp H(p) of the singular values, see `effective_rank_of`. Null (iid entries, large d): .805 d. Cost d^3."""
    return effective_rank_of(singular_values(w))


def effective_rank_of(values: Float[Tensor, "*batch r"]) -> Scalars:
    """exp(-sum p_i log p_i), p_i = s_i / sum s, for singular values s >= 0.

    In [1, rank]; the rank itself for a multiple of a projector; nan when all are 0. Source: Roy and Vetterli 2007, "The
    effective rank".
    """
    values = wide(values)
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


def stable_rank(w: Square) -> Scalars:
    """|W|_F^2 / |W|_2^2: see `stable_rank_of`. Null (iid entries, large d): d/4. Cost d^3."""
    return stable_rank_of(singular_values(w))


def stable_rank_of(values: Float[Tensor, "*batch r"]) -> Scalars:
    """sum s_i^2 / max s_i^2 for singular values s >= 0.

    In [1, rank], never above `effective_rank_of`; nan when all are 0. Source: Rudelson and Vershynin 2007, "Sampling from large
    matrices".
    """
    values = wide(values)
    return (values / values.amax(-1, keepdim=True)).square().sum(-1)


def overlap(a: Float[Tensor, "*#batch p d"], b: Float[Tensor, "*#batch q d"]) -> Pairs:
    """|Q_a^T Q_b|_F^2 / min(rank a, rank b): the mean squared cosine between the spaces that the rows of a and of b span.

    In [0, 1]: 0 orthogonal, 1 one space contains the other. Null (random spaces): max(rank)/d. nan where a or b is 0. Invariant
    under every change of basis of the rows, hence under the gauge. Cost d (p + q)^2.
    """
    (basis_a, rank_a), (basis_b, rank_b) = _span(a), _span(b)
    return _energy(basis_a @ basis_b.mT) / torch.minimum(rank_a, rank_b)


def composition(m: One, f: One) -> Pairs:
    """|M F|_F / (|M|_F |F|_F): how much of what F writes is seen by the keys of M; for the queries of M pass M^T.

    In [0, 1]. Null: 1/sqrt(d), exactly so in mean square for independent isotropic operators of any rank. nan where either is 0.
    Cost d^3. Source: Elhage et al. 2021, "A mathematical framework for transformer circuits".
    """
    m, f = wide(m), wide(f)
    return (_energy(m @ f) / (_energy(m) * _energy(f))).sqrt()


class Composed(NamedTuple):
    """Of every pair (H', H): the composition, and its mean and standard deviation under the null."""

    value: Float64[Tensor, "P H"]
    null: Float64[Tensor, "P H"]
    null_sd: Float64[Tensor, "P H"]


def compositions(later: tuple[LeftRows, RightRows], earlier: tuple[OtherLeftRows, OtherRightRows]) -> Composed:
    """|W' W|_F / (|W'|_F |W|_F) of all pairs of H' later and H earlier operators, from the rows of their factors, W = L R^T.

    `composition` of the factors' widths. Null: independent random singular vectors, spectra as they are. The square then has the
    mean 1/d and, with p and q the squared singular values as shares of their sums, the variance
    2/((d - 1)(d + 2)) (sum p^2 - 1/d)(sum q^2 - 1/d): exactly so for Haar vectors; the root's moments are those to second order.
    nan where either is 0. Cost H' H r' r (d + r' + r), memory H r r' for one later operator at a time.
    """
    dim = later[0].shape[-1]
    (first, right), (left, last) = later, earlier
    ends = _core(first), _core(last)  # W' W = Q (T' R'^T L T^T) Q'^T
    spectra = [thin_singular_values(a, b).square() for a, b in (later, earlier)]
    sizes = [s.sum(-1) for s in spectra]
    values = []
    for end, rows in zip(ends[0], wide(right), strict=True):
        middle = torch.einsum("rd,hsd->hrs", rows, wide(left))
        values.append(_energy(end @ middle @ ends[1].mT))
    square = torch.stack(values) / (sizes[0].unsqueeze(1) * sizes[1])
    p, q = ((s / size.unsqueeze(-1)).square().sum(-1) - 1 / dim for s, size in zip(spectra, sizes, strict=True))
    # of the mean 1/d
    variation = 2 * dim**2 / ((dim - 1) * (dim + 2)) * p.unsqueeze(1) * q if dim > 1 else torch.zeros_like(square)
    return Composed(square.sqrt(), (1 - variation / 8) / dim**0.5, variation.sqrt() / (2 * dim**0.5))


class Turning(NamedTuple):
    radius: Scalars
    rotation: Scalars


def turning(left: Float[Tensor, "*batch r d"], right: Float[Tensor, "*batch r d"]) -> Turning:
    """Of W = L R^T, from the rows of L^T and R^T: the spectral radius max |lambda|, and the share of sum |lambda|^2 that lies in
    complex pairs, which turn the space, and not in real eigenvalues, which stretch it.

    `radius` in units of W, in [0, |W|_2]; null (random singular vectors): about 1.05 |W|_F/sqrt(d). `rotation` in [0, 1]: 0
    for symmetric, 1 for skew W; null: `random_turning`. nan where all eigenvalues are 0. An eigenvalue counts as real where its
    imaginary part is below 1e-8 of the radius: a double real one, computed, may come as a pair. Cost r^2 d + 10 r^3.
    """
    return _turning(wide(right) @ wide(left).mT)


def random_turning(values: Float[Tensor, "*batch r"], dim: int, seed: int = 0) -> Turning:
    """`turning` of one draw each of operators on R^d with these r <= d singular values and random (Haar) singular vectors.

    W = U S V^T has the nonzero eigenvalues of S V^T U, and V^T U is a corner of a random orthogonal matrix. Cost r^2 d.
    """
    values = wide(values)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*values.shape[:-1], dim, values.shape[-1], generator=generator, dtype=torch.float64)
    q, triangle = torch.linalg.qr(normal.to(values.device))
    q = q * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # without it the diagonal is one-sided
    return _turning(values.unsqueeze(-1) * q[..., : values.shape[-1], :])


def _turning(core: Tensor) -> Turning:
    values = torch.linalg.eigvals(core)
    radius = values.abs().amax(-1)
    energy = values.abs().square()
    turns = values.imag.abs() > 1e-8 * radius.unsqueeze(-1)
    return Turning(radius, (energy * turns).sum(-1) / energy.sum(-1))


def growth(
    content: tuple[LeftRows, RightRows], form: tuple[OtherLeftRows, OtherRightRows]
) -> tuple[Float64[Tensor, "H k"], Float64[Tensor, "d d"]]:
    """B_h = F_h M_h^T + M_h F_h^T from the rows of the factors of F_h and M_h: for V = F and A = M^T, the map from a query to its
    relevance gradient, the V A + A^T V^T of math E.6.

    Softmax attention moves a Gaussian cloud of covariance Sigma with d Sigma/dt = sum_h F_h Sigma M_h^T Sigma + its transpose:
    at Sigma = I it grows along the eigenvectors of positive eigenvalues and collapses along those of negative ones.

    Returns:
        The eigenvalues of each B_h, ascending, k = min(d, r_F + r_M) of them (the others are 0), and sum_h B_h. In units of F M.
        Cost H (r d^2 + k^3).
    """
    (fl, fr), (ml, mr) = (tuple(map(wide, pair)) for pair in (content, form))
    inner = fr @ mr.mT
    basis = torch.linalg.qr(torch.cat([fl, ml], -2).mT, mode="r").R
    cl, cm = basis.split([fl.shape[-2], ml.shape[-2]], -1)
    half = cl @ inner @ cm.mT
    whole = (fl.mT @ inner @ ml).sum(0)
    return torch.linalg.eigvalsh(half + half.mT), whole + whole.mT


def compatibility_sphere(f: One, m: One) -> Pairs:
    """1 - <F, M>_F^2 / (|F|_F^2 |M|_F^2): 0 iff F = c M, the only gradient structure on the sphere (c < 0 descends).

    In [0, 1]. Null (independent iid entries): 1 - 1/d^2. nan where either is 0. Cost d^2. Source: math E.3.
    """
    f, m = wide(f), wide(m)
    return (1 - (f * m).sum((-2, -1)).square() / (_energy(f) * _energy(m))).clamp(0, 1)


class Compatibility(NamedTuple):
    """`delta` is an upper bound on the defect, `delta - error` a proven lower bound (to rounding)."""

    delta: Pairs
    error: Pairs


@torch.no_grad()
def compatibility(f: One, m: One, tolerance: float = 1e-4, limit: int = 2000) -> Compatibility:
    """delta = min over symmetric P >= 0 of |F - P M|_F / |F|_F, the compatibility defect in space (a scale is part of P).

    In [0, 1]: 0 iff F = P M (for singular M: in the limit), 1 iff no P helps, that is sym(F M^T) <= 0. Null (independent iid
    entries): about .84 at full rank, .89 at rank d/4; compare with a shuffled F. nan where F = 0; 1 where M = 0. The rank of M
    counts singular values above d eps |M|_2, eps of m's type: delta jumps where the rank does, because a direction that M kills
    cannot be fitted and one that it nearly kills can. So pass M in the type it was computed in: rounding of a float32 product
    counts as rank once it is cast to float64. Not differentiable. Source: math E.3; Gillis and Sharma 2018, "A semi-analytical
    approach for the positive semidefinite Procrustes problem".

    Args:
        tolerance: stop when `error` is below it.
        limit: stop after so many steps of cost 10 r^3, r = rank M, whatever `error` is; 10 to 100 are typical.
    """
    rounding = torch.finfo(m.dtype).eps
    f, m = torch.broadcast_tensors(wide(f), wide(m))
    batch, shape = f.shape[:-2], f.shape[-2:]
    pairs = zip(f.reshape(-1, *shape), m.reshape(-1, *shape), strict=True)
    bounds = [_defect(*pair, rounding, tolerance, limit) for pair in pairs]
    upper, lower = torch.stack(bounds).unbind(-1) if bounds else (f.new_empty(0), f.new_empty(0))
    return Compatibility(upper.reshape(batch), (upper - lower).clamp(min=0).reshape(batch))


def _defect(f: Tensor, m: Tensor, rounding: float, tolerance: float, limit: int) -> Tensor:
    """(2,): the upper and the lower bound on delta for one pair."""
    if not f.any():
        return f.new_full((2,), torch.nan)
    u, s, vh = torch.linalg.svd(m)
    rank = int((s > len(s) * rounding * s[0]).sum())
    b = u.mT @ (f / f.norm()) @ vh.mT
    # With P in the basis of U: |F - P M|^2 = |B11 - P11 S|^2 + |B21 - P21 S|^2 + |B[:, rank:]|^2. The columns behind the rank
    # meet a zero of S and stay. P21 = B21 S^-1 is free to fit its block: P11 + epsilon and a large P22 keep P >= 0, and
    # epsilon -> 0 costs nothing. What remains is P11, with S > 0.
    lost = b[:, rank:].norm()
    b, s = b[:rank, :rank], s[:rank]
    # P11 = S^-1/2 Q S^-1/2 keeps P >= 0 and turns the problem into the nearest Q >= 0 to a symmetric X in the norm with weights
    # w_ij = (s_i/s_j + s_j/s_i)/2 between 1 and about (s_1/s_r)/2. Those of P itself span (s_1/s_r)^2, and no diagonal scaling
    # does better than this one: w_ij^2 / (w_ii w_jj) is the same for all of them.
    t = (s / s[:, None]).sqrt()  # P11 S = Q * t
    w = (t.square() + t.mT.square()) / 2
    x = (t * b + (t * b).mT) / (2 * w)
    lost = torch.hypot(lost, (x * t - b).norm())  # what no symmetric P can fit, semidefinite or not
    upper, lower = _distance_to_semidefinite(x, w, lost, tolerance, limit)
    return torch.stack([torch.hypot(upper, lost), torch.hypot(lower, lost)]).clamp(max=1)


def _distance_to_semidefinite(x: Tensor, w: Tensor, lost: Tensor, tolerance: float, limit: int) -> tuple[Tensor, Tensor]:
    """Bounds (upper, lower) on D = min over Q >= 0 of |Q - X|_w, |A|_w^2 = sum w_ij A_ij^2, until hypot(., lost) are close.

    Splitting into a Q without the cone and a Z without the weights (ADMM, Boyd et al. 2011), both in closed form; projected
    gradient, even accelerated, needs a hundred times the steps at s_1/s_r = 1e4. Weak duality gives the lower bound: every
    Y >= 0 has D |Y/sqrt(w)| >= -<Y, X>, with equality at the multiplier of Q = Z, which is >= 0 at every step.
    """
    upper, lower = x.new_tensor(torch.inf), x.new_tensor(0.0)
    if not x.numel():
        return lower, lower
    tiny = torch.finfo(x.dtype).tiny
    rho = w.max() ** 0.25
    z = _positive_part(x)
    y = _positive_part(w * (z - x))
    for count in range(limit + 1):
        if count % 8 == 0 or count == limit:
            upper = torch.minimum(upper, (w.sqrt() * (z - x)).norm())
            dual = _positive_part(y)  # where no constraint is felt y is rounding, of either sign, and proves nothing
            bound = -(dual * x).sum() / (dual / w.sqrt()).norm()
            lower = torch.fmax(lower, torch.minimum(bound, upper))  # fmax: Y = 0 gives 0/0, which proves nothing
            if torch.hypot(upper, lost) - torch.hypot(lower, lost) <= tolerance:
                break
        q = (w * x + rho * z + y) / (w + rho)
        target = 1.6 * q - 0.6 * z - y / rho  # over-relaxed
        before, z = z, _positive_part(target)
        y = rho * (z - target)
        if count % 10 == 9 and count < 200:  # both residuals should fall alike; a step that changes for ever need not converge
            primal = (q - z).norm() * y.norm()
            dual = (rho * (z - before)).norm() * torch.maximum(q.norm(), z.norm())
            rho = rho * ((primal + tiny) / (dual + tiny)).sqrt().clamp(0.2, 5)
    return upper, lower


def _positive_part(a: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix to a symmetric one."""
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT


def _span(rows: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the span as rows, padded with zero rows, and its dimension."""
    rounding = max(rows.shape[-2:]) * torch.finfo(rows.dtype).eps
    _, s, vh = torch.linalg.svd(wide(rows), full_matrices=False)
    kept = s > rounding * s[..., :1]
    return vh * kept.unsqueeze(-1), kept.sum(-1)


def _core(rows: Tensor) -> Tensor:
    """T (…, k, r) with R = Q T for rows of R^T, Q of orthonormal columns."""
    return torch.linalg.qr(wide(rows).mT, mode="r").R


def _energy(w: Tensor) -> Tensor:
    """|W|_F^2."""
    return w.square().sum((-2, -1))
