"""Signal propagation: how large the stream is, how alike its tokens are, and what that does to scores and contexts.

Clouds x (…, N, d), scores s (…, T, S) without beta, visible (T, S), true where a query may look. Everything is computed in
float64 and returned as float64 of the batch shape; undefined is nan. Source: math I; Kedia et al. 2024, "Transformers get stable"
(2403.09635).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from emformer.geometry.leaves import anisotropy, row_variance
from emformer.geometry.spectra import wide

Cloud = Float[Tensor, "*batch N d"]
Scalars = Float64[Tensor, "*batch"]


def stream_variance(x: Cloud) -> Float64[Tensor, "*batch N"]:
    """Var over the d features of each token, divided by d as norms do. >= 0, units of x^2; 1 after LayerNorm. Cost d a token."""
    return wide(x).var(-1, correction=0)


def median_norm(x: Cloud) -> Scalars:
    """The median over tokens of |x|, the mean of the two middle ones. >= 0, units of x; sqrt(d) after a norm. Cost N d."""
    return wide(x).norm(dim=-1).quantile(0.5, dim=-1)


def token_correlation(x: Cloud) -> Scalars:
    """r: the mean cosine between different tokens, each with its own mean along the features removed.

    In [-1/(N - 1), 1]: 1 when all tokens are the same up to scale, where attention has nothing left to tell apart. Null
    (independent tokens): 0, standard deviation sqrt(2/(N (N - 1) (d - 1))). Tokens of equal features are left out; nan when
    fewer than two are left. Cost N d.
    """
    rounding = 8 * torch.finfo(x.dtype).eps
    x = wide(x)
    size = x.norm(dim=-1, keepdim=True)
    centred = x - x.mean(-1, keepdim=True)
    # what is left of equal features is rounding, which has no direction
    left = centred.norm(dim=-1, keepdim=True)
    return anisotropy((centred / left).where(left > rounding * size, 0.0))


class ScoreStd(NamedTuple):
    total: Float64[Tensor, "*batch"]
    within: Float64[Tensor, "*batch"]


def score_std(scores: Float[Tensor, "*batch T S"], visible: Bool[Tensor, "T S"]) -> ScoreStd:
    """Standard deviation of the scores over all visible pairs, and within rows: sqrt(mean_i Var_j s_ij).

    Both >= 0, in units of s, with n - 1. Expected for scores of unit variance between tokens of correlation r: sqrt(1 - r^2), as
    what all pairs of a prompt share is in its mean, and sqrt(1 - r) within rows; softmax does not notice the rest. nan for fewer
    than two visible pairs; within also where no query sees two tokens. Cost T S.
    """
    return score_std_of([pair_moments(scores, visible)], row_variance(scores, visible))


class PairMoments(NamedTuple):
    """Of scores over some visible pairs: their number, mean, and sum of squared deviations from it."""

    count: Float64[Tensor, ""]
    mean: Float64[Tensor, "*batch"]
    square: Float64[Tensor, "*batch"]


def pair_moments(scores: Float[Tensor, "*batch T S"], visible: Bool[Tensor, "T S"]) -> PairMoments:
    """Those of any queries, to be put together by `score_std_of`. nan of no pair. Cost T S."""
    count = visible.sum().double()
    s = wide(scores).where(visible, 0.0)
    mean = s.sum((-2, -1), keepdim=True) / count
    square = (s - mean).masked_fill_(~visible, 0.0).flatten(-2).norm(dim=-1).square()
    return PairMoments(count, mean.squeeze(-1).squeeze(-1), square)


def score_std_of(parts: Sequence[PairMoments], variances: Float[Tensor, "*batch T"]) -> ScoreStd:
    """`score_std` from the moments of parts of the queries and the `leaves.row_variance` of all (Chan, Golub and LeVeque)."""
    whole, *others = parts
    for part in others:
        count, shift = whole.count + part.count, part.mean - whole.mean
        mean = whole.mean + shift * (part.count / count)
        square = whole.square + part.square + shift.square() * (whole.count * part.count / count)
        whole = PairMoments(count, mean, square)
    total = (whole.square / (whole.count - 1)).where(whole.count >= 2, torch.nan).sqrt()
    return ScoreStd(total, variances.nanmean(-1).sqrt())


def context_variance(correlation: float, row_variance: float, score_variance: float, tokens: int, dim: int) -> float:
    """Var(m) = r + (1 - r) e^{s_w^2}/N + (1 - r)^2 s_s^2/d, the variance of the context mean m_i = sum_j a_ij y_j.

    Expected at initialisation, in a full mask (causal: N the number of tokens that a query sees). The first term is what all
    tokens share, the second the noise of averaging e^{-s_w^2} N of them, the third the pull along the gradient. 5 % too high at
    r = 0, s_w = 1, N = d = 256. In units of Var(y) = 1. Source: math I.

    Args:
        correlation: r of the tokens, in [0, 1].
        row_variance: s_w^2, the scores' variance within rows, beta^2 included.
        score_variance: s_s^2, beta^2 d^2 Var(M_ij).
        tokens: N.
        dim: d.
    """
    rest = 1 - correlation
    return correlation + rest * math.exp(row_variance) / tokens + rest**2 * score_variance / dim
