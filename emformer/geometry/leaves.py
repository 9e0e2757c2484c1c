"""Foliation: each query slices the space into leaves of equal score, the planes across its relevance gradient.

Per head and query: r_i = M^T y_i (+ u) is the relevance gradient, s_ij = <r_i, y_j> the score; tokens of equal score lie on one
leaf. Tensors are gradients r (B, H, N, d), read clouds y (B, N, d), scores s (B, H, T, S) without beta, and visible (T, S), true
where a query may look; leading axes are free where the shapes say so. Everything is computed in float64 and returned as float64;
undefined is nan. All values are the same after (y, M) -> (O y, O M O^T) for orthogonal O. The angle between the foliations of two
queries, or of one query in two layers, is `paths.angle` of their gradients. Source: math C, A.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from emformer.geometry.retention import singular_values
from emformer.geometry.spectra import effective_rank_of, overlap, wide

TINY = 1e-12  # a gradient shorter than this has no direction

Gradients = Float[Tensor, "*batch N d"]
Scores = Float[Tensor, "*batch T S"]
Visible = Bool[Tensor, "T S"]
Scalars = Float64[Tensor, "*batch"]
PerQuery = Float64[Tensor, "*batch T"]


# gradients


def without_direction(gradients: Gradients) -> Int64[Tensor, "*batch"]:
    """How many of the N gradients are shorter than 1e-12 or not finite: what needs their direction is undefined. Cost N d."""
    return (~_inverse(wide(gradients))[0]).sum(-1)


def leaf_coordinate(gradients: Float[Tensor, "B H N d"], read: Float[Tensor, "B S d"]) -> Float64[Tensor, "B H N S"]:
    """l_ij = <r_i, y_j> / |r_i|: the signed distance from the origin to the leaf of token j under query i.

    In units of y; |l_ij| <= |y_j|. nan in the rows that `without_direction` counts. Cost H N S d.
    """
    gradients = wide(gradients)
    known, inverse = _inverse(gradients)
    # all heads meet the same tokens: one product
    scores = (gradients.flatten(1, 2) @ wide(read).mT).view(*gradients.shape[:-1], -1)
    return scores.mul_(inverse.where(known, torch.nan).unsqueeze(-1))


def anisotropy(gradients: Gradients) -> Scalars:
    """mean over i != k of cos(r_i, r_k) = (N |mean rhat|^2 - 1)/(N - 1), rhat_i = r_i/|r_i|.

    In [-1/(N - 1), 1]: 1 when all queries slice the space alike. Null (independent directions): 0, with the standard deviation
    that `anisotropy_sd` gives. Gradients shorter than 1e-12 are left out; nan when fewer than two are left or one is not finite.
    Cost N d.
    """
    gradients = wide(gradients)
    known, inverse = _inverse(gradients)
    count = known.sum(-1)
    total = (inverse.unsqueeze(-2) @ gradients).squeeze(-2)
    value = (total.square().sum(-1) / count - 1) / (count - 1)
    return value.where(count >= 2, torch.nan)


def anisotropy_sd(count: int, dim: int) -> float:
    """sqrt(2 / (N (N - 1) d)): standard deviation of `anisotropy` over N independent directions, uniform in d dimensions.

    The cosines of different pairs are uncorrelated, each of variance 1/d. For gradients in a subspace (M of rank r) d is r; for
    directions that are not uniform, 1/tr(C^2) with C = E rhat rhat^T. nan for N < 2 or d < 1.
    """
    return math.sqrt(2 / (count * (count - 1) * dim)) if count >= 2 and dim >= 1 else math.nan


def common_share(gradients: Gradients) -> Scalars:
    """|mean r|^2 / mean |r|^2: the share of the gradients that all queries have in common, a bias blind to the query.

    In [0, 1]: 1 for equal gradients. Null (independent, mean 0): 1/N. nan when their root mean square is below 1e-12. Cost N d.
    """
    gradients = wide(gradients)
    energy = gradients.norm(dim=-1).square().mean(-1)
    return gradients.mean(-2).square().sum(-1) / energy.where(energy >= TINY**2, torch.nan)


def common_correlation(
    gradients: Float[Tensor, "B H N d"], read: Float[Tensor, "B S d"], mass: Float[Tensor, "B H S"]
) -> Float64[Tensor, "B H"]:
    """Pearson correlation over the tokens j of <mean r, y_j> with the mass that they receive.

    In [-1, 1]: near 1 where the common gradient alone decides who is looked at, the direction of a sink. Null: 0, with standard
    deviation 1/sqrt(S - 1). `mass` is the column mass sum_i a_ij; under a causal mask it falls with j by itself, so there pass
    the mean over the queries that see j (`sinks.importance`) too. nan for fewer than two tokens or where either side is
    constant up to rounding. Cost H S d.
    """
    common, mass = (wide(gradients).mean(-2) @ wide(read).mT), wide(mass)
    return _correlation(common, mass)


def gradient_rank(gradients: Gradients) -> Scalars:
    """Effective rank exp H(p), p_k = sigma_k/sum sigma, of the matrix R of all gradients.

    In [1, min(N, rank M)], one more with a functional u. nan when all are 0 or one is not finite. Cost N d min(N, d).
    """
    return effective_rank_of(singular_values(gradients))


def head_overlap(rows: Float[Tensor, "H r d"]) -> Float64[Tensor, "H H"]:
    """Mean squared cosine between the gradients' subspaces range(M_a^T) and range(M_b^T), for every pair of heads.

    `rows` span range(M_h^T): those of M_h itself, or the r rows of its right factor V_h^T. In [0, 1], the diagonal 1. Null
    (random subspaces of dimension r): r/d. nan for a head of M = 0. Cost H r^2 d + H^2 r^2 d. See `spectra.overlap`.
    """
    return overlap(rows.unsqueeze(1), rows.unsqueeze(0))


# scores


def row_variance(scores: Scores, visible: Visible) -> PerQuery:
    """Var_j s_ij over the n tokens that query i sees, divided by n - 1; nan for n < 2. Units of s^2. Cost T S."""
    return _row_variance(wide(scores).where(visible, 0.0), visible)


def leaf_spread(scores: Scores, visible: Visible) -> PerQuery:
    """sigma_i = sqrt(Var_j s_ij): how far apart the leaves of query i are that tokens lie on; nan for n < 2. Units of s."""
    return row_variance(scores, visible).sqrt()


def within_row_variance(scores: Scores, visible: Visible) -> Scalars:
    """mean_i Var_j s_ij over the queries that see two tokens or more: what controls the softmax. Units of s^2.

    Null (scores of variance sigma^2 between tokens of correlation r): (1 - r) sigma^2, whatever the mask, for each row's variance
    is unbiased. nan if no query sees two tokens.
    """
    return row_variance(scores, visible).nanmean(-1)


class TopGap(NamedTuple):
    gap: Float64[Tensor, "*batch T"]
    multiplicity: Float64[Tensor, "*batch T"]


def top_gap(scores: Scores, visible: Visible, beta: float = 1.0) -> TopGap:
    """gamma_i = beta (s_(1) - s_(2)) in nats between the two highest distinct leaves, and how many tokens lie on the highest.

    Softmax weights on the two leaves have the ratio e^gamma exactly, and the m tokens of the highest have at least
    1/(m + (n - m) e^-gamma) each. Scores belong to one leaf up to 1e-6 of the row's standard deviation, or to the rounding of
    their type: repeated tokens are one leaf. gap > 0, nan where all that is visible lies on one leaf; multiplicity in 1 … n, 0
    where nothing is visible, nan where a visible score is not finite. Cost T S.
    """
    rounding = 4 * torch.finfo(scores.dtype).eps
    scores = wide(scores).where(visible, 0.0)
    spread = _row_variance(scores, visible).sqrt()
    size = torch.linalg.vector_norm(scores, torch.inf, dim=-1)
    finite = size.isfinite()
    scores.masked_fill_(~visible, -torch.inf)
    highest = scores.amax(-1)
    # a row of one leaf has a spread of pure rounding, which must not split it
    tolerance = torch.fmax(1e-6 * spread, rounding * size)
    on_top = visible & (scores >= (highest - tolerance).unsqueeze(-1))
    second = scores.masked_fill_(on_top, -torch.inf).amax(-1)
    gap = (beta * (highest - second)).where(finite & second.isfinite(), torch.nan)
    return TopGap(gap, on_top.sum(-1).double().where(finite, torch.nan))


# tilt


class Tilt(NamedTuple):
    """Means over the tokens that have a direction, at each of K offsets Delta = j - i; see `tilt`."""

    angle: Float64[Tensor, "*batch K"]
    cosine: Float64[Tensor, "*batch K"]
    norm_ratio: Float64[Tensor, "*batch K"]
    coherence: Float64[Tensor, "*batch"]
    undefined: Int64[Tensor, "*batch K"]


def tilt(gradient: Callable[[int], Tensor], offsets: Sequence[int]) -> Tilt:
    """How a position-dependent form turns its leaves: tau_i(Delta) = angle(r_i(Delta), r_i(0)), averaged over tokens.

    `angle` mean tau in [0, pi]; `cosine` mean cos tau; `norm_ratio` mean |r(Delta)|/|r(0)| >= 0; `coherence` Delta* =
    min{|Delta| >= 1: mean cos tau < 1/2} among the offsets given, nan if there is none, that is: longer than all of them;
    `undefined` how many tokens have no direction at Delta or at 0. Null: tau(0) = 0; without positions tau = 0 and norm_ratio = 1
    throughout. Under RoPE with V^T V = I, cos tau_i = sum_k |u_k|^2 cos(Delta w_k) / sum_k |u_k|^2 over the planes k of
    u = U^T y_i. Cost K times N d and one gradient. Source: math A.4.

    Args:
        gradient: Delta -> r(Delta) (*batch, N, d). Of a stack (K, …): dict(zip(offsets, stack)).__getitem__, 0 among the offsets.
        offsets: the Delta; 0 need not be one.
    """
    first = wide(gradient(0))
    (origin, known), size = _units(first), first.norm(dim=-1)
    angles, cosines, ratios, undefined = [], [], [], []
    for offset in offsets:
        turned = wide(gradient(offset))
        direction, has = _units(turned)
        both = known & has
        half = (direction - origin).norm(dim=-1)  # |ahat - bhat| = 2 sin(tau/2)
        angles.append((2 * torch.atan2(half, (direction + origin).norm(dim=-1))).where(both, torch.nan).nanmean(-1))
        cosines.append((1 - half.square() / 2).where(both, torch.nan).nanmean(-1))
        ratios.append((turned.norm(dim=-1) / size).where(known, torch.nan).nanmean(-1))
        undefined.append((~both).sum(-1))
    cosine = torch.stack(cosines, -1)
    distance = torch.tensor(offsets, dtype=torch.float64, device=cosine.device).abs()
    beyond = distance.expand_as(cosine).where((cosine < 0.5) & (distance >= 1), torch.inf).amin(-1)
    coherence = beyond.where(beyond.isfinite(), torch.nan)
    return Tilt(torch.stack(angles, -1), cosine, torch.stack(ratios, -1), coherence, torch.stack(undefined, -1))


def rope_gradients(
    u: Float[Tensor, "B H N r"], right_rows: Float[Tensor, "H r d"] | None, angles: Float[Tensor, " p"]
) -> Float64[Tensor, "B H N d"]:
    """r(Delta) = V R_{-Delta} u, the gradients under rotary positions, with s_ij = <r_i(j - i), y_j>.

    Plane k turns the coordinates k and k + p by -angles[k] = -Delta w_k; those from 2p on stay. Cost N r d a head.

    Args:
        u: U^T y_i with its bias, before any rotation.
        right_rows: V^T of each head; None for V = I, the dense form, where u = M^T y_i and d = r.
        angles: Delta w_k of the p <= r/2 planes.

    Raises:
        ValueError: more than r/2 planes.
    """
    planes, rank = len(angles), u.shape[-1]
    if 2 * planes > rank:
        raise ValueError(f"{planes} planes need {2 * planes} coordinates and u has {rank}")
    u, angles = wide(u), wide(angles)
    a, b, rest = u.split([planes, planes, rank - 2 * planes], -1)
    turned = torch.cat([a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin(), rest], -1)
    return turned if right_rows is None else turned @ wide(right_rows)


def rope_tilt(
    u: Float[Tensor, "B H N r"],
    right_rows: Float[Tensor, "H r d"] | None,
    frequencies: Float[Tensor, " p"],
    offsets: Sequence[int],
) -> Tilt:
    """`tilt` of `rope_gradients`, at the cost of N r^2 instead of N r d a head and offset.

    Lengths and angles of V x are those of T x, where V = Q T with orthonormal Q.

    Args:
        u, right_rows: as in `rope_gradients`.
        frequencies: w_k of the p planes, radians a token.
        offsets: the Delta = j - i.
    """
    core = None if right_rows is None else torch.linalg.qr(wide(right_rows).mT, mode="r").R.mT
    frequencies = wide(frequencies)
    return tilt(lambda offset: rope_gradients(u, core, offset * frequencies), offsets)


# ----------------------------------------------------------------------------------------------------------------------


def _inverse(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Where v is long enough to have a direction, and 1/|v|, 0 elsewhere."""
    size = vectors.norm(dim=-1)
    known = (size >= TINY) & size.isfinite()
    return known, (1 / size).where(known, 0.0)


def _units(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """v/|v|, 0 where v is too short to have a direction, and where it has one."""
    vectors = wide(vectors)
    known, inverse = _inverse(vectors)
    return vectors * inverse.unsqueeze(-1), known


def _row_variance(scores: Tensor, visible: Tensor) -> Tensor:
    """Of scores that are 0 where nothing is seen."""
    count = visible.sum(-1)
    mean = scores.sum(-1) / count
    deviation = (scores - mean.unsqueeze(-1)).masked_fill_(~visible, 0.0)
    return (deviation.norm(dim=-1).square() / (count - 1)).where(count >= 2, torch.nan)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson, along the last axis."""
    parts = []
    for x in (a, b):
        deviation = x - x.mean(-1, keepdim=True)
        size = deviation.norm(dim=-1, keepdim=True)
        # equal numbers differ from their mean by rounding
        varies = size > 4 * x.shape[-1] * torch.finfo(x.dtype).eps * x.norm(dim=-1, keepdim=True)
        parts.append((deviation / size).where(varies, torch.nan))
    return (parts[0] * parts[1]).sum(-1)
