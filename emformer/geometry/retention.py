"""Spectral retention: how much of a cloud's spectrum survives a mixing of its tokens.

A pattern A (…, n, n) acts on the rows of a cloud X (…, n, d): alone, beside the residual stream as I + A, or averaged with it as
(I + A)/2. Everything is computed in float64 and returned as float64 of the batch shape; undefined, also for want of finite
numbers, is nan. Source: math H.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emformer.geometry.spectra import effective_rank_of, wide

Scalars = Float64[Tensor, "*batch"]
Pairs = Float64[Tensor, "..."]


def singular_values(x: Float[Tensor, "*batch n d"]) -> Float64[Tensor, "*batch k"]:
    """The k = min(n, d) singular values, descending, in units of x; all nan where x is not finite. Cost n d k."""
    x = wide(x)
    finite = x.isfinite().flatten(-2).all(-1)
    values = torch.linalg.svdvals(x.masked_fill(~finite[..., None, None], 0.0))
    return values.masked_fill(~finite.unsqueeze(-1), torch.nan)


def nuclear_norm(x: Float[Tensor, "*batch n d"]) -> Scalars:
    """||X||_* = sum of the singular values, >= 0, in units of x. Cost n d min(n, d)."""
    return singular_values(x).sum(-1)


def condition_number(op: Float[Tensor, "*batch n m"]) -> Scalars:
    """kappa = sigma_max/sigma_min over the min(n, m) singular values: see `condition_of`. Cost n m min(n, m)."""
    return condition_of(singular_values(op), max(op.shape[-2:]) * torch.finfo(op.dtype).eps)


def condition_of(values: Float[Tensor, "*batch k"], rounding: float) -> Scalars:
    """kappa = sigma_max/sigma_min of singular values, inf where sigma_min <= rounding * sigma_max.

    In [1, inf]: 1 for a multiple of an orthogonal map. nan when all are 0. Of random and of attention matrices it is heavy
    tailed: report the median and quartiles of log10 kappa, never one number. A causal pattern is triangular and its kappa is
    easily above 1e15: use rho and the effective rank there.

    Args:
        rounding: relative size of a singular value that is none: max(n, m) eps, of the type that the matrix was computed in.
    """
    values = wide(values)
    largest, least = values.amax(-1), values.amin(-1)
    kappa = (largest / least).where(least > rounding * largest, torch.inf)
    return kappa.where(largest > 0, torch.nan)


def retention(op: Float[Tensor, "*#batch n m"], x: Float[Tensor, "*#batch m d"]) -> Pairs:
    """rho(Op; X) = ||Op X||_* / ||X||_*.

    In [0, |Op|_2]: 1 for an orthogonal map or a permutation, sqrt(n) |pi^T X| / ||X||_* in the limit of long mixing by a
    stochastic matrix of stationary law pi, about 1.18/n for Gaussian X of n = d. nan where X = 0. Cost n d min(n, d).
    """
    return nuclear_norm(wide(op) @ wide(x)) / nuclear_norm(x)


class SignalRetention(NamedTuple):
    rho: Float64[Tensor, "*batch"]
    shape: Float64[Tensor, "*batch"]


def signal_retention(before: Float[Tensor, "*batch n d"], after: Float[Tensor, "*batch n d"]) -> SignalRetention:
    """Of a step X -> X' = X + D that the cloud really made: `rho` ||X'||_*/||X||_*, and `shape`, the same of X/|X|_F.

    Both > 0; a scaled, rotated or permuted cloud has shape 1 exactly, one that falls to rank 1 has |X|_F/||X||_* >= 1/sqrt(n).
    Retained is not unmoved: look at |D| beside it. nan where X = 0, shape also where X' = 0. Cost n d min(n, d).
    """
    old, new = singular_values(before), singular_values(after)
    rho = new.sum(-1) / _positive(old.sum(-1))
    return SignalRetention(rho, _spread(new) / _spread(old))


class Retention(NamedTuple):
    """Of one operator on one cloud: rho >= 0, kappa in [1, inf], log10 kappa, and the operator's effective rank in [1, n]."""

    rho: Float64[Tensor, "*batch"]
    kappa: Float64[Tensor, "*batch"]
    log_kappa: Float64[Tensor, "*batch"]
    erank: Float64[Tensor, "*batch"]


class Mixing(NamedTuple):
    """`mix` of A, `residual` of I + A, `average` of (I + A)/2, whose kappa and rank are those of I + A."""

    mix: Retention
    residual: Retention
    average: Retention


def mixing(pattern: Float[Tensor, "B H n n"], x: Float[Tensor, "B n d"]) -> Mixing:
    """`Retention` of each head's pattern on the cloud: alone, beside the residual stream, and averaged with it; all (B, H).

    The residual lifts kappa from about 1e3 to O(1). Null (n = 64, A softmax of N(0, 1) scores, Gaussian X of d = 128): rho .14
    for A and 1.02 for I + A, median kappa about 900 and 2.5. kappa is inf, not nan, below the rounding of the pattern's type.
    Cost a head: two decompositions n x n and two n x min(n, d).
    """
    rounding = pattern.shape[-1] * torch.finfo(pattern.dtype).eps
    a, x = wide(pattern), wide(x)
    # X = R^T Q^T: without the orthonormal factor every A X has n columns instead of d, and the same singular values
    core = torch.linalg.qr(x.mT, mode="r").R.mT if x.shape[-1] > x.shape[-2] else x
    before = nuclear_norm(core).unsqueeze(-1)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    found = []
    for op in (a, eye + a):
        values = singular_values(op)
        kappa = condition_of(values, rounding)
        rho = nuclear_norm(op @ core.unsqueeze(1)) / before
        found.append(Retention(rho, kappa, kappa.log10(), effective_rank_of(values)))
    mix, residual = found
    return Mixing(mix, residual, residual._replace(rho=residual.rho / 2))


# ----------------------------------------------------------------------------------------------------------------------


def _positive(size: Tensor) -> Tensor:
    """nan instead of 0: what it divides is undefined."""
    return size.where(size > 0, torch.nan)


def _spread(values: Tensor) -> Tensor:
    """||X||_*/|X|_F from singular values: 1 … sqrt(rank)."""
    values = values / _positive(values.amax(-1, keepdim=True))
    return values.sum(-1) / values.norm(dim=-1)
