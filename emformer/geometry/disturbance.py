"""Disturbed rows of attention: what small noise on scores costs in nats, and what becomes of the order of keys.

Weights a (…, T, S) are softmax(beta s) over what a query sees, 0 elsewhere. Noise changes s_ij by d_ij, Gaussian with mean 0; to
second order the row then loses KL(a || a') = (beta^2/2) Var_a(d_i), the variance over keys j with probabilities a_ij. So a shift
of a whole row costs nothing, and no formula here knows a gauge: sizes of q and of k come from the factors that are given, and
under (q, k) -> (q/c, ck) the ratio of key noise to query noise goes as c^-4, though no weight changes (math A.3, H.1).

Everything is computed in float64 and returned so, in nats, one number a row (…, T): 0 or more, and 0 where a query sees one key.
Formulas err by the next order, sigma^4 in expectation. Source: math H.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from emformer.geometry.spectra import wide

Pattern = Float[Tensor, "*batch T S"]
Rows = Float64[Tensor, "*batch T"]
Visible = Bool[Tensor, "T S"]
ROUNDING = 1e-9  # of the largest |score| of a row: scores that differ by less are one


def divergence(pattern: Pattern, other: Pattern) -> Rows:
    """KL(a || b) = sum_j a_ij log(a_ij/b_ij). Rows must sum to one and be positive where a is; inf where b is 0 there.

    Differences of weights below 1e-16/KL are lost: for small noise let both come from float64. Cost T S.
    """
    a, b = wide(pattern), wide(other)
    return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1).clamp(min=0)


def query_noise(pattern: Pattern, keys: Float[Tensor, "*#batch S r"], sigma: float = 1.0, beta: float = 1.0) -> Rows:
    """KL_Q = (beta^2 sigma^2/2) tr Cov_a(k): q_i + sigma n, n ~ N(0, I_r) shared by the row i, where s_ij = q_i . k_j.

    With the scale outside, s = q . k/sqrt(r), it is sigma^2/2r: give k/sqrt(r). Only k - sum_j a_ij k_j counts: what all keys
    have in common shifts the row. Cost T S r.
    """
    a, k = wide(pattern), wide(keys)
    k = k - k.mean(-2, keepdim=True)  # less to cancel
    mean = a @ k
    spread = (a @ k.square().sum(-1, keepdim=True)).squeeze(-1) - mean.square().sum(-1)
    return (beta * sigma) ** 2 / 2 * spread.clamp(min=0)


def key_noise(pattern: Pattern, queries: Float[Tensor, "*batch T r"], sigma: float = 1.0, beta: float = 1.0) -> Rows:
    """KL_K = (beta^2 sigma^2/2) |q_i|^2 (1 - sum_j a_ij^2): k_j + sigma n_j, n_j ~ N(0, I_r) independent, where s_ij = q_i . k_j.

    With the scale outside, s = q . k/sqrt(r), give q/sqrt(r). Cost T (S + r).
    """
    return independent_noise(pattern, sigma**2 * wide(queries).square().sum(-1, keepdim=True), beta)


def noise_ratio(pattern: Pattern, queries: Float[Tensor, "*batch T r"], keys: Float[Tensor, "*#batch S r"]) -> Rows:
    """KL_K/KL_Q = |q_i|^2 (1 - sum_j a_ij^2)/tr Cov_a(k) at equal sigma: a number of the gauge. Under (q/c, ck) it is c^-4 times
    as large, and so takes every positive value. nan where a query sees one key."""
    return key_noise(pattern, queries) / query_noise(pattern, keys)


def form_noise(
    pattern: Pattern,
    left: Float[Tensor, "*batch T m"],
    right: Float[Tensor, "*#batch S n"],
    sigma: float = 1.0,
    beta: float = 1.0,
) -> Rows:
    """KL_M = (beta^2 sigma^2/2) |x_i|^2 tr Cov_a(z): d_ij = sigma x_i^T E z_j, E (m, n) with entries N(0, 1). Cost T S n.

    left = right = y: noise sigma E on M itself. left = y, right = M y: (I + sigma E) M, the probe; left = M^T y, right = y:
    M (I + sigma E), the metric; math H.1 has sigma/sqrt(d) there, so that sigma is a relative size. None depends on a gauge of
    the factors. The last two are equal where M is a multiple of an orthogonal matrix; the null of their ratio is 1.
    """
    return wide(left).square().sum(-1) * query_noise(pattern, right, sigma, beta)


def score_noise(pattern: Pattern, covariance: Float[Tensor, "*#batch T S S"], beta: float = 1.0) -> Rows:
    """(beta^2/2) [sum_j a_j C_jj - sum_jk a_j C_jk a_k]: Gaussian noise on the scores of row i, of covariance C_i between keys.

    What the others are special cases of: query noise has C = sigma^2 K K^T, key noise C_i = sigma^2 |q_i|^2 I. Cost T S^2.
    """
    a, c = wide(pattern), wide(covariance)
    total = (a * c.diagonal(dim1=-2, dim2=-1)).sum(-1) - (a.unsqueeze(-2) @ c).squeeze(-2).mul(a).sum(-1)
    return beta**2 / 2 * total.clamp(min=0)


def independent_noise(pattern: Pattern, variance: Float[Tensor, "*#batch T #S"], beta: float = 1.0) -> Rows:
    """(beta^2/2) sum_j a_ij (1 - a_ij) v_ij: noise of variance v_ij on s_ij, independent between keys. Cost T S."""
    a = wide(pattern)
    return beta**2 / 2 * (a * (1 - a) * wide(variance)).sum(-1)


# Order ----------------------------------------------------------------------------------------------------------------


def overturned(before: Pattern, after: Pattern, visible: Visible) -> Rows:
    """1 where the key of the highest score is another one than before, 0 where it is not, nan where a query sees fewer than two.

    Scores that differ by less than 1e-9 of the largest |score| of the row are one. Null: 0 under s -> c_i s with c_i > 0, a
    temperature of the row; 1 - 1/n for scores that know nothing of each other, n keys seen. Cost T S.
    """
    s, t, nothing = wide(before).masked_fill(~visible, -torch.inf), wide(after).masked_fill(~visible, -torch.inf), ~visible
    kept = t.gather(-1, s.argmax(-1, keepdim=True)).squeeze(-1)
    changed = (t.amax(-1) - kept > _least(after, nothing)).double()
    return changed.where(visible.sum(-1) > 1, torch.nan)


def reversed_pairs(before: Pattern, after: Pattern, visible: Visible) -> Rows:
    """Share, among the pairs of keys that a query sees and that both scores tell apart, of those in the opposite order.

    In [0, 1]: Kendall's tau is 1 - 2 of it. Null: 0 under s -> c_i s with c_i > 0, 1/2 for scores that know nothing of each
    other. Rounding as in `overturned`; nan where no pair is left. Cost T S^2, memory S^2 a batch.
    """
    s, t, nothing = wide(before), wide(after), ~visible
    least = [_least(x, nothing) for x in (s, t)]
    shares = []
    for row in range(s.shape[-2]):
        seen = visible[row]
        x, y = (_order(z[..., row, seen], bound[..., row]) for z, bound in zip((s, t), least, strict=True))
        agree = x * y
        shares.append((agree < 0).sum((-2, -1)).double() / (agree != 0).sum((-2, -1)))
    return torch.stack(shares, -1)


def _least(scores: Tensor, hidden: Tensor) -> Tensor:
    """The difference (…, T) from which on two scores of a row are two."""
    return ROUNDING * wide(scores).masked_fill(hidden, 0.0).abs().amax(-1)


def _order(scores: Tensor, least: Tensor) -> Tensor:
    """(…, S) -> (…, S, S): the sign of s_j - s_k, 0 where they are one."""
    gap = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    return torch.where(gap.abs() > least[..., None, None], gap.sign(), 0.0)
