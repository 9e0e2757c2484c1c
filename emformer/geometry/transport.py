"""How far one token cloud is from another as a measure: optimal transport between clouds of equal size and uniform weights.

Every function takes clouds (..., N, d) of any floating type whose rows are tokens, computes in float64 on the CPU and returns
float64 of the batch shape there. Distances are lengths, in units of the stream, unless said otherwise. A cloud with a nan or an
infinity has distance nan; a cloud without tokens, or two of unequal shape, raise ValueError. Between any two clouds bures <=
wasserstein <= identity_coupling, and in expectation over directions sliced <= wasserstein / sqrt(d). A massive token carries
most of every one of them: compare with the clouds without it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from emformer.geometry.spectra import wide

Cloud = Float[Tensor, "*batch n d"]
Scalars = Float64[Tensor, "*batch"]

EPS = torch.finfo(torch.float64).eps


def identity_coupling(x: Cloud, y: Cloud) -> Scalars:
    """I = sqrt(mean_i |y_i - x_i|^2): the length of the displacement that takes every token to its own image.

    >= 0, and never below the exact distance. Cost N d. Source: math D.8.
    """
    x, y = _pair(x, y)
    return _rms(y - x).where(_defined(x, y), torch.nan)


class Coupling(NamedTuple):
    """The optimal coupling of two clouds."""

    w2: Scalars  # length
    identity: Scalars  # I >= w2, length
    ratio: Scalars  # w2 / I in [0, 1]; nan where nothing moved
    fixed: Scalars  # share of tokens coupled to their own image, in [0, 1]
    shape: Scalars  # w2 of the clouds without mean and scale, in [0, sqrt(2)]; nan for a constant cloud
    order: Int64[Tensor, "*batch n"]  # token i goes to y[order[i]]; -1 where undefined


@torch.no_grad()
def wasserstein(x: Cloud, y: Cloud) -> Coupling:
    """W2 = min over permutations s of sqrt(mean_i |x_i - y_s(i)|^2), exact, by assignment.

    For moderate steps in d >= 16 the identity is optimal: expect a ratio and a fixed share near 1 between consecutive layers;
    unrelated clouds fix 1/N. Translating or scaling a cloud leaves the optimal order alone, so the same order gives the
    distance of shapes, and w2^2 = |mean difference|^2 + (s_x - s_y)^2 + s_x s_y shape^2 with s the root mean square radius.
    Among optimal orders, of which duplicates make many, one is returned that no swap of two images takes closer to the
    identity.

    Cost N^2 d a pair where every token's own image is its nearest, as between consecutive layers, else up to N^3. Source: math
    D.8; Crouse 2016, "On implementing 2D rectangular assignment algorithms".
    """
    x, y = _pair(x, y)
    batch, n, d = x.shape[:-2], *x.shape[-2:]
    size = max(1, 2**17 // (n * max(n, d)))  # of a part of the batch that stays in the cache
    parts = zip(*(cloud.reshape(-1, n, d).split(size) for cloud in (x, y)), strict=True)
    couplings = zip(*(_coupling(*part) for part in parts), strict=True)
    return Coupling(*(torch.cat(field).unflatten(0, batch) if batch else torch.cat(field)[0] for field in couplings))


def _coupling(x: Tensor, y: Tensor) -> Coupling:
    defined = _defined(x, y)
    (mean_x, x, radius_x), (mean_y, y, radius_y) = _placed(x), _placed(y)
    drift = torch.linalg.vector_norm(mean_y - mean_x, dim=(-2, -1))
    own = torch.arange(x.shape[-2]).expand(x.shape[:-1])
    order = _assignment(x, y, defined)
    images = y if torch.equal(order, own) else y[torch.arange(len(y)).unsqueeze(-1), order]
    identity = torch.hypot(drift, _rms(y - x))
    w2 = torch.minimum(torch.hypot(drift, _rms(images - x)), identity)
    fixed = (order == own).double().mean(-1)
    bent = _rms((images / radius_y).sub_(x / radius_x))
    values = (value.where(defined, torch.nan) for value in (w2, identity, w2 / identity, fixed, bent))
    return Coupling(*values, order.where(defined.unsqueeze(-1), -1))


def shape(cloud: Cloud) -> Float64[Tensor, "*batch n d"]:
    """(X - mean) / root mean square radius: what is left of a cloud without its place and size.

    Distances between shapes see neither drift nor the growth of the norm, which dominate otherwise. nan for a constant cloud.
    Cost N d. Source: math D.8.
    """
    _, centred, radius = _placed(wide(cloud))
    return centred / radius


class Sliced(NamedTuple):
    distance: Scalars  # length
    error: Scalars  # standard error over the directions, length


@torch.no_grad()
def sliced(x: Cloud, y: Cloud, projections: int = 200, seed: int = 0) -> Sliced:
    """SW2 = sqrt(mean over directions of W2^2 of the projections on a line), uniform on the sphere, with its Monte-Carlo error.

    Translation by t: |t|/sqrt(d). The error is sd / (2 SW2 sqrt(projections)), sd of the squared distances over the directions
    (delta method); 0 where every one is 0, nan for one direction. The directions come from a generator of their own, so equal
    seeds compare clouds along equal directions. Cost projections N (d + log N). Raises ValueError for no direction. Source: math
    D.8; Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """
    if projections < 1:
        raise ValueError(f"sliced needs at least one projection, got {projections}")
    x, y = _pair(x, y)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(projections, x.shape[-1], dtype=torch.float64, generator=generator)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    batch, (n, d) = x.shape[:-2], x.shape[-2:]
    shadows = (directions @ cloud.reshape(-1, d).mT for cloud in (x, y))  # one product for all prompts
    ranked = [torch.from_numpy(np.sort(shadow.numpy().reshape(projections, -1, n), axis=-1)) for shadow in shadows]
    squares = torch.linalg.vector_norm(ranked[1] - ranked[0], dim=-1).square().mT.reshape(*batch, projections) / n
    distance = squares.mean(-1).sqrt()
    error = squares.std(-1) / (2 * distance * math.sqrt(projections)) if projections > 1 else distance * torch.nan
    defined = _defined(x, y)
    return Sliced(distance.where(defined, torch.nan), error.where(squares.amax(-1) > 0, 0.0).where(defined, torch.nan))


@torch.no_grad()
def bures(x: Cloud, y: Cloud) -> Scalars:
    """W2 of the Gaussians with the means and covariances (over N) of two clouds.

    >= 0 and <= W2, with equality for translations and for symmetric positive semidefinite linear maps. Its square is
    |mean difference|^2 + (|Xc|_F^2 + |Yc|_F^2 - 2 |Yc Xc^T|_*)/N, any N and d; needs no square root of a covariance. A covariance
    of N <= d tokens is singular and the value still falls with N: compare at equal N. Cost N d^2 + d^3, or N^2 d + N^3 for N < d.
    Source: math D.8; Bhatia et al. 2019, "On the Bures-Wasserstein distance between positive definite matrices".
    """
    x, y = _pair(x, y)
    n, d = x.shape[-2:]
    defined = _defined(x, y)
    if not defined.all():
        x, y = (cloud.where(defined[..., None, None], 0.0) for cloud in (x, y))
    drift = y.mean(-2) - x.mean(-2)
    x, y = _centred(x), _centred(y)
    if n > d:  # x = Q R: the orthonormal Q changes neither the norms nor the nuclear norm
        x, y = (torch.linalg.qr(cloud, mode="r").R for cloud in (x, y))
    product = y @ x.mT
    energy = sum(torch.linalg.vector_norm(cloud, dim=(-2, -1)).square() for cloud in (x, y))
    squared = energy - 2 * torch.linalg.svdvals(product).sum(-1)
    close = squared < 1e-4 * energy
    if close.any():  # the difference has lost digits: the same number is min over orthogonal O of |O x - y|^2, a sum of squares
        u, _, vh = torch.linalg.svd(product[close])
        squared[close] = (u @ (vh @ x[close]) - y[close]).square().sum((-2, -1))
    return (drift.square().sum(-1) + squared / n).sqrt().where(defined, torch.nan)


class Divergence(NamedTuple):
    value: Scalars  # squared length
    error: Scalars  # how far the couplings miss their marginals: the largest mean |N P 1 - 1| of the three


@torch.no_grad()
def sinkhorn_divergence(x: Cloud, y: Cloud, epsilon: float, tolerance: float = 1e-9, limit: int = 1000) -> Divergence:
    """S = OT(X, Y) - (OT(X, X) + OT(Y, Y))/2, OT the minimum over couplings P of <P, |x_i - y_j|^2> + epsilon KL(P | uniform).

    >= 0, 0 iff the clouds are equal as measures; a translation adds |t|^2 exactly. Limits: W2^2 for epsilon -> 0 and
    |mean difference|^2 for epsilon -> inf. OT is its dual value, entropy included; without the entropy S can be negative.
    `epsilon` is a squared length; far below the squared distance of neighbours the iteration crawls. It works on logarithms and
    stops after `limit` steps or once every marginal is met to `tolerance`; before that each OT is a lower bound. Cost limit N^2.
    Raises ValueError for epsilon <= 0. Source: math D.8; Feydy et al. 2019, "Interpolating between optimal transport and MMD
    using Sinkhorn divergences".
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"the entropic penalty epsilon must be positive and finite, got {epsilon}")
    x, y = _pair(x, y)
    defined = _defined(x, y)
    if not defined.all():
        x, y = (cloud.where(defined[..., None, None], 0.0) for cloud in (x, y))
    drift = (y.mean(-2) - x.mean(-2)).square().sum(-1)
    x, y = _centred(x), _centred(y)  # the terms that this drops from the cost average to zero under every coupling
    costs = [_squares(x, x), _squares(y, y), _squares(x, y)]
    potentials = [_own_potential(cost, epsilon, tolerance, limit) for cost in costs[:2]]
    potentials.append(_cross_potential(costs[2], potentials[1], epsilon, tolerance, limit))
    duals, errors = zip(*(_dual(*problem, epsilon) for problem in zip(costs, potentials, strict=True)), strict=True)
    value = drift + duals[2] - (duals[0] + duals[1]) / 2
    return Divergence(value.where(defined, torch.nan), torch.stack(errors).amax(0).where(defined, torch.nan))


def geodesic_ratio(clouds: Float[Tensor, "layers *batch n d"]) -> Scalars:
    """W2(X^0, X^L) / sum_k W2(X^k, X^(k+1)): how straight the cloud moves in the space of measures.

    In [0, 1]: 1 on a geodesic, 0 if the cloud returns; nan if it never moves. Cost L + 1 exact distances. Raises ValueError for
    fewer than two layers. Source: math D.8.
    """
    if len(clouds) < 2:
        raise ValueError(f"a path needs at least two layers, got {len(clouds)}")
    hops = wasserstein(clouds[:-1], clouds[1:]).w2.sum(0)
    return (wasserstein(clouds[0], clouds[-1]).w2 / hops).clamp(max=1)


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape:
        raise ValueError(f"the clouds must have equal shape (..., N, d), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.shape[-2]:
        raise ValueError("a cloud needs at least one token")
    return wide(x.detach().cpu()), wide(y.detach().cpu())


def _defined(x: Tensor, y: Tensor) -> Tensor:
    """(batch): whether all squared distances are finite."""
    size = torch.linalg.vector_norm(x, dim=(-2, -1)) + torch.linalg.vector_norm(y, dim=(-2, -1))
    return size.square().isfinite()


def _rms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=(-2, -1)) / math.sqrt(rows.shape[-2])


def _centred(cloud: Tensor) -> Tensor:
    return cloud - cloud.mean(-2, keepdim=True)


def _placed(cloud: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean (B, 1, d), the cloud without it, and its root mean square radius (B, 1, 1), nan where that is rounding."""
    mean = cloud.mean(-2, keepdim=True)
    centred = cloud - mean
    radius = _rms(centred)[..., None, None]
    return mean, centred, radius.where(radius > 32 * EPS * torch.linalg.vector_norm(mean, dim=-1, keepdim=True), torch.nan)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """(..., N, N): |x_i - y_j|^2, to the rounding of |x_i|^2 + |y_j|^2."""
    return x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - 2 * (x @ y.mT)


def _half_squares(x: Tensor, y: Tensor) -> Tensor:
    """(B, N, N): |x_i - y_j|^2 / 2 less what depends on i alone, in one pass."""
    return torch.baddbmm(y.square().sum(-1).unsqueeze(-2) / 2, x, y.mT, alpha=-1)


def _assignment(x: Tensor, y: Tensor, defined: Tensor) -> Tensor:
    """(B, N): the optimal orders of centred clouds, without whose drift a greedy reduction comes close to the optimum."""
    order = torch.arange(x.shape[-2]).repeat(len(x), 1)
    open_ = (defined & ~_nearest_own(x, y)).nonzero()[:, 0]
    if not len(open_):
        return order
    x, y = x[open_], y[open_]
    for row, cost, a, b in zip(open_.tolist(), _half_squares(x, y), x.numpy(), y.numpy(), strict=True):
        if _reduced(cost).diagonal().any():
            # of smaller problems the solver is done before better potentials are
            best = linear_sum_assignment(_warmed(cost) if len(cost) >= 256 else cost)[1]
            order[row] = torch.from_numpy(_untangled(a, b, cost.numpy(), best))
    return order


def _nearest_own(x: Tensor, y: Tensor) -> Tensor:
    """(B): proof, from products in float32, that every token's own image is its nearest, hence the identity optimal.

    With h_j = |y_j|^2/2 the claim is h_i - x_i y_i <= h_j - x_i y_j. The float32 product is off by less than
    share |x_i| |y_j| <= share (|x_i|^2/2 + h_j), however it is summed.
    """
    d = x.shape[-1]
    share = 1.01 * (d + 16) * 2.0**-24
    norms = [torch.linalg.vector_norm(cloud, dim=-1) for cloud in (x, y)]
    scale = 1 / torch.maximum(*(norm.amax(-1) for norm in norms)).clamp(min=1e-300)[:, None]  # neither overflow nor underflow
    # products that someone has allowed to be coarser than float32 prove nothing
    dtype = torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    narrow = [torch.mul(cloud, scale[..., None], out=torch.empty_like(cloud, dtype=dtype)) for cloud in (x, y)]
    energy, h = ((norm * scale).square() / 2 for norm in norms)
    # not by numpy: its threads and those of torch, which wait for work by spinning, would take the cores from each other
    gain = narrow[0] @ narrow[1].mT
    gain -= ((1 - share) * h).to(dtype).unsqueeze(-2)
    gain.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    own = torch.linalg.vecdot(x, y) * scale.square() - h
    return (own - gain.amax(-1) > share * energy + d * 1e-36).all(-1)


def _reduced(cost: Tensor) -> Tensor:
    """The costs minus row and then column minima, in place. No optimum changes, and a diagonal of zeros proves the identity."""
    cost -= cost.amin(-1, keepdim=True)
    cost -= cost.amin(-2, keepdim=True)
    return cost


def _warmed(cost: Tensor) -> Tensor:
    """The costs minus potentials of a smoothed problem: the solver starts its own from zero, so good ones save most of its work.

    Any finite potentials leave the optimum alone, hence float32 and so few steps.
    """
    scale = cost.mean() / 20
    kernel = (cost / -scale).float().clamp_(min=-60).exp_()
    columns = kernel.new_ones(len(cost))
    for _ in range(8):
        rows = 1 / (kernel @ columns)
        columns = 1 / (rows @ kernel)
    potentials = ((scale * side.double().log()).nan_to_num(0, 0, 0) for side in (rows, columns))
    return _reduced(cost - next(potentials).unsqueeze(-1) - next(potentials))


def _untangled(x: np.ndarray, y: np.ndarray, cost: np.ndarray, order: np.ndarray) -> np.ndarray:
    """An order as good or better in which no free swap gives a token its own image back.

    Duplicates leave their images to chance, and for twins closer than the rounding of the costs chance picks the optimum. Where
    the costs cannot tell, the distances themselves decide.
    """
    tokens, source = np.arange(len(order)), np.argsort(order)
    norms = np.square(x).sum(-1) + np.square(y).sum(-1)
    rounding = 4 * EPS * (2 * norms + norms[order] + norms[source])
    gain = cost[tokens, order] + cost[source, tokens] - cost[tokens, tokens] - cost[source, order]

    def squares(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.square(x[i] - y[j]).sum(-1)

    for i in np.flatnonzero((order != tokens) & (gain >= -rounding)):
        j, k = order[i], source[i]
        own, now = squares(np.array([i, k]), np.array([i, j])).sum(), squares(np.array([i, k]), np.array([j, i])).sum()
        if j != i and own <= now:  # an earlier swap may have changed the partners
            order[i], order[k], source[i], source[j] = i, j, i, k
    return order


def _own_potential(cost: Tensor, epsilon: float, tolerance: float, limit: int) -> Tensor:
    """(B, N): between a cloud and itself both potentials are equal, and the mean of old and new contracts by more than a half."""
    f = torch.zeros_like(cost[..., 0])
    for _ in range(limit):
        answer = _softmin(cost, f, epsilon)
        if bool((_miss(f, answer, epsilon) <= tolerance).all()):
            break
        f = (f + answer) / 2
    return f


def _cross_potential(cost: Tensor, g: Tensor, epsilon: float, tolerance: float, limit: int) -> Tensor:
    """(B, N): the potential of the rows, from that of the columns alone with themselves, which is close if the clouds are."""
    f = _softmin(cost, g, epsilon)
    for _ in range(limit):
        # steps beyond the answer pay where the iteration is slow: Thibault et al. 2021, "Overrelaxed Sinkhorn-Knopp"
        g = g + 1.5 * (_softmin(cost.mT, f, epsilon) - g)
        answer = _softmin(cost, g, epsilon)
        if bool((_miss(f, answer, epsilon) <= tolerance).all()):
            break
        f = f + 1.5 * (answer - f)
    return f


def _dual(cost: Tensor, f: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The dual value of f and its best answer, a lower bound on OT, and how far their coupling misses the marginal of f."""
    g = _softmin(cost.mT, f, eps)
    return f.mean(-1) + g.mean(-1), _miss(f, _softmin(cost, g, eps), eps)


def _miss(f: Tensor, answer: Tensor, eps: float) -> Tensor:
    return ((f - answer) / eps).expm1().abs().mean(-1)


def _softmin(cost: Tensor, potential: Tensor, eps: float) -> Tensor:
    """-eps log mean_j exp((g_j - c_ij)/eps)."""
    return -eps * (((potential.unsqueeze(-2) - cost) / eps).logsumexp(-1) - math.log(cost.shape[-1]))
