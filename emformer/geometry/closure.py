"""What attention does if what a query sees is Gaussian, from its scores alone; and how a cloud's covariance changes.

Let a token t = y_j drawn from what a query sees have the score s. If (s, t) is Gaussian, then tilting its law by e^{beta s} moves
the mean of t by beta Cov(s, t) (Stein's lemma), so

    sum_j a_ij y_j = alpha_i + beta Cov_j(s_ij, y_j) = sum_j (1 + beta (s_ij - mean_j s_ij))/n_i y_j,

over the n_i tokens j that query i sees, alpha_i their mean. Where the score is linear, s_ij = <r_i, y_j> + c_i, this is the
closure alpha_i + beta Sigma_i r_i of math E.6, with the moments of what the query sees. Weights of the closure are linear in the
scores: they sum to one, may be negative, and are what is left of softmax to first order in beta. Everything is float64. Source:
math E.6; Castin et al. 2025 (2501.18322).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from emformer.geometry.sinks import uniform
from emformer.geometry.spectra import wide

Scores = Float[Tensor, "B H T S"]
Table = Bool[Tensor, "T S"]
Cloud = Float[Tensor, "B N d"]
Prompts = Float64[Tensor, " B"]


class Tilted(NamedTuple):
    """`weights` (B, H, T, S) of the closure, rows of sum 1, exactly 0 where nothing is visible. `regime` (B, H, T) is
    beta^2 Var_j(s_ij) = beta^2 r_i^T Sigma_i r_i >= 0: e^{-regime} is the share of its tokens that a query effectively looks at
    (of a Gaussian cloud), and the error of the closure on n tokens grows as e^{regime}/n. It asks for <= 1."""

    weights: Float64[Tensor, "B H T S"]
    regime: Float64[Tensor, "B H T"]


def tilted(s: Scores, visible: Table, beta: float = 1.0) -> Tilted:
    """The Gaussian closure of softmax(beta s) over what is visible; what is constant along a row of scores is nothing to it.

    Cost H N^2. Source: math E.6.
    """
    even = uniform(visible)
    s = wide(s)
    s = s - (s * even).sum(-1, keepdim=True)
    return Tilted(even * (1 + beta * s), beta**2 * (even * s.square()).sum(-1))


def explained(actual: Float[Tensor, "*batch N d"], predicted: Float[Tensor, "*batch N d"]) -> Float64[Tensor, "*batch"]:
    """R^2 = 1 - sum_i |D_i - Dhat_i|^2 / sum_i |D_i - mean D|^2: the share of variance that a prediction explains.

    At most 1; 0 for a prediction as good as the mean, and without bound below. nan where D varies by no more than its rounding.
    Cost N d.
    """
    rounding = 16 * torch.finfo(actual.dtype).eps
    actual, predicted = wide(actual), wide(predicted)
    whole = (actual - actual.mean(-2, keepdim=True)).square().sum((-2, -1))
    known = whole > rounding**2 * actual.square().sum((-2, -1))
    return 1 - (actual - predicted).square().sum((-2, -1)) / whole.where(known, torch.nan)


def covariance_change(x: Cloud, step: Cloud) -> Prompts:
    """|Cov(x + step) - Cov(x)|_F of each cloud, covariances of its tokens (sums over N, not N - 1); nan of fewer than two.

    >= 0, units of x squared. From the factors of the difference, without its cancellation: it is P^T Q + Q^T P, P the centred
    step and Q the centred x + step/2, over N. Cost N d min(N, d). Source: math E.6.
    """
    x, step = wide(x), wide(step)
    count, dim = x.shape[1:]
    if count < 2:
        return x.new_full((len(x),), torch.nan)
    p, q = (w - w.mean(1, keepdim=True) for w in (step, x + step / 2))
    if dim <= count:
        across = p.mT @ q
        found = (across + across.mT).square().sum((-2, -1))
    else:  # the same norm, of N x N matrices
        across = q @ p.mT
        found = 2 * ((across * across.mT).sum((-2, -1)) + ((p @ p.mT) * (q @ q.mT)).sum((-2, -1)))
    return found.clamp(min=0).sqrt() / count
