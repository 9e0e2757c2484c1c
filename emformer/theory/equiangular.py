"""Tokens at equal angles: one number instead of a cloud, and with it times and rates in closed form.

If all <theta_i, theta_j> are rho, i != j, they stay equal under attention with M = F = I, and rho solves an ordinary differential
equation. It is told through the gap 1 - rho, whose logarithm is integrated: near the cluster, where rho is 1 to all digits, the
gap still has all of its own. Times of "usa" are in units of e^{-beta}, for the field is of the size e^beta. Source: math E.1;
Geshkovski et al. 2312.10794, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from scipy.integrate import quad, solve_ivp
from torch import Tensor

Real = int | float
Motion = Literal["sa", "usa", "preln"]
Times = Float64[np.ndarray, " times"]

RATES = {"sa": 2.0, "usa": 2.0}  # at which the gap closes in the end; of Pre-LN, whose gap falls as t^-2, there is none
POWER = 2.0  # of Pre-LN


class Solution(NamedTuple):
    """The gap 1 - rho and the length r of every token, at the times asked for. On the sphere r is 1."""

    gap: Times
    radius: Times


def cloud(tokens: int, dim: int, rho: Real, prompts: int = 1) -> Float64[Tensor, "B N d"]:
    """Unit vectors with all cosines rho, in the first N coordinates.

    Raises:
        ValueError: for fewer dimensions than tokens, or rho outside [-1/(N - 1), 1].
    """
    _check(tokens, rho)
    if dim < tokens:
        raise ValueError(f"{tokens} equiangular tokens need as many dimensions, not {dim}")
    apart = math.sqrt(1 - rho)
    common = (math.sqrt(max(0.0, 1 + (tokens - 1) * rho)) - apart) / tokens  # the root of (1 - rho) I + rho 11^T
    found = torch.zeros(prompts, tokens, dim, dtype=torch.float64)
    found[..., :tokens] = common + apart * torch.eye(tokens, dtype=torch.float64)
    return found


def speed(gap: Real, tokens: int, beta: Real, motion: Motion = "sa", radius: Real = 1.0) -> float:
    """-(d/dt) log(1 - rho) = 2 ((N - 1) rho + 1) a with a the weight of each of the others.

    With w = e^{-beta (1 - rho)}, a = w/(1 + (N - 1) w) for softmax and w/N for "usa"; for "preln" it is that of softmax over r: a
    direction turns the slower the longer its token is.
    """
    other = math.exp(-beta * gap)
    whole = tokens if motion == "usa" else 1 + (tokens - 1) * other
    return 2 * ((tokens - 1) * (1 - gap) + 1) * other / (whole * radius)


def solve(motion: Motion, tokens: int, beta: Real, rho: Real, times: Sequence[Real], radius: Real = 1.0) -> Solution:
    """The gap and the length at `times` (from 0) of tokens that start with cosines rho and, for "preln", length `radius`.

    For "preln" r' = (1 + (N - 1) rho w)/(1 + (N - 1) w), w = e^{-beta (1 - rho)}, what attention adds along the token. Relative
    error 1e-10 and less. Cost: some hundred calls of the right side.

    Raises:
        ValueError: for rho outside [-1/(N - 1), 1), at whose lower end cosines stay, or times that do not ascend from 0.
    """
    _check(tokens, rho)
    if not rho < 1:
        raise ValueError("tokens that are all alike do not move")
    if len(times) < 2 or times[0] != 0 or not np.all(np.diff(times) > 0):
        raise ValueError("times ascend from 0 and are at least two")

    def right(_: float, state: np.ndarray) -> list[float]:
        gap, r = math.exp(state[0]), float(state[1])
        other = (tokens - 1) * math.exp(-beta * gap)
        outward = (1 + other * (1 - gap)) / (1 + other) if motion == "preln" else 0.0
        return [-speed(gap, tokens, beta, motion, r), outward]

    found = solve_ivp(
        right, (0.0, times[-1]), [math.log1p(-rho), radius], "DOP853", t_eval=np.asarray(times), rtol=1e-12, atol=1e-13
    )
    return Solution(np.exp(found.y[0]), found.y[1])


def crossing_time(rho: Real, until: Real, beta: Real, tokens: int = 2, motion: Motion = "sa") -> float:
    """The time from cosine rho to `until` on the sphere, by quadrature; for two tokens and softmax the integral of
    (1 + e^{beta (1 - rho)})/(2 (1 - rho^2)).

    About e^{beta (1 - rho)}/beta: pairs that are far apart wait. Relative error 1e-9.

    Raises:
        ValueError: unless -1/(N - 1) < rho <= until < 1; for "preln", whose time hangs on the lengths.
    """
    if motion == "preln":
        raise ValueError("the time of Pre-LN depends on the lengths too: solve it")
    _check(tokens, rho)
    if not -1 / (tokens - 1) < rho <= until < 1:
        raise ValueError(f"there is no time from cosine {rho:g} to {until:g}")
    found = quad(lambda g: 1 / (g * speed(g, tokens, beta, motion)), 1 - until, 1 - rho, epsabs=0, epsrel=1e-9, limit=400)
    return float(found[0])


def layer_cosine(tokens: int, rho: Real, beta: Real) -> float:
    """The cosine of what one softmax layer (no residual, M = F = I) makes of two tokens of an equiangular cloud.

    With the weight a on the token itself, b on each of the others, the outputs have inner products from a, b and rho alone. In
    [rho, 1]. With beta = gamma log N it tends to `long_context`. Source: math E.1; 2312.10794 and its sequels on long contexts.
    """
    _check(tokens, rho)
    other = math.exp(-beta * (1 - rho))
    mean = tokens * other / (1 + (tokens - 1) * other)  # output = (1 - mean) x_i + mean (average of all)
    average = rho + (1 - rho) / tokens  # <x_i, average> = |average|^2
    own = 1 - mean
    inner = own**2 * rho + (1 - own**2) * average
    return inner / (own**2 + (1 - own**2) * average)


def long_context(rho: Real, gamma: Real) -> float:
    """The limit of `layer_cosine` for many tokens and beta = gamma log N: 1, 4 rho/(1 + 3 rho) or rho as gamma is below, at or
    above 1/(1 - rho). Below, attention is flat and all tokens become the mean; above, each sees itself alone."""
    _check(2, rho)
    edge = gamma * (1 - rho)
    if math.isclose(edge, 1, rel_tol=1e-12):
        return 4 * rho / (1 + 3 * rho)
    return 1.0 if edge < 1 else rho


def _check(tokens: int, rho: Real) -> None:
    if tokens < 2 or not -1 / (tokens - 1) <= rho <= 1:
        raise ValueError(f"the cosine of N >= 2 equiangular tokens lies in [-1/(N - 1), 1], not {rho:g} for {tokens}")
