"""The interaction energy of tokens on the sphere, and how fast attention climbs it.

E_beta = (2 beta N^2)^{-1} sum_ij e^{beta <theta_i, theta_j>}, i = j included, of unit vectors theta and M = F = I. It is told as
2 beta e^{-beta} E_beta, which lies in (0, 1] at any temperature. Clouds are (B, N, d) of any length, whose directions are meant;
velocities are those of the directions in the time of the theory (a trajectory's update is sqrt(d) times it). Everything is
float64. Source: math E.1; Geshkovski et al. 2312.10794, section 3.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.special import gammaln, logsumexp
from torch import Tensor

from emformer.geometry.energy import scores
from emformer.geometry.integrability import energy_gradient, log_energy
from emformer.geometry.paths import direction
from emformer.geometry.spectra import wide

Cloud = Float[Tensor, "B N d"]
Prompts = Float64[Tensor, " B"]
PerToken = Float64[Tensor, "B N"]
Velocities = Float64[Tensor, "B N d"]
Real = int | float
Field = Literal["sa", "usa"]


def scaled_energy(x: Cloud, beta: Real) -> Prompts:
    """2 beta e^{-beta} E_beta, the mean of e^{-beta (1 - cos)} over all pairs and each token with itself.

    In [1/N, 1]: 1 iff all tokens point one way. Null, N independent uniform directions: 1/N + (1 - 1/N) `uniform_energy`. nan
    for a cloud with a token at 0. Cost N^2 d.
    """
    return (log_energy(x, _identity(x), beta)[:, 0] - beta - 2 * math.log(x.shape[1])).exp()


def uniform_energy(dim: int, beta: Real) -> float:
    """`scaled_energy` of the uniform law on the sphere: Gamma(d/2) (2/beta)^{d/2 - 1} I_{d/2 - 1}(beta) e^{-beta}, in (0, 1).

    By the series sum_k (beta/2)^{2k} / (k! (d/2)_k) of positive terms in logarithms, for Gamma, the power and the Bessel function
    each leave the range of floating point in a few hundred dimensions. Relative error 1e-11 up to beta 1000. Cost beta.

    Raises:
        ValueError: for dim < 2, or beta not positive and finite.
    """
    if dim < 2 or not 0 < beta < math.inf:
        raise ValueError(f"the uniform law has an energy for dim >= 2 and beta > 0, not for {dim} and {beta:g}")
    k = np.arange(math.ceil(beta) + 100)  # terms are largest before beta/2, and past beta each is below a quarter of the last
    terms = 2 * k * math.log(beta / 2) - gammaln(k + 1) - (gammaln(dim / 2 + k) - gammaln(dim / 2))
    return float(np.exp(logsumexp(terms) - beta))


def log_partition(x: Cloud, beta: Real) -> PerToken:
    """log Z_i = log sum_j e^{beta <theta_i, theta_j>}, in [beta, beta + log N]. Cost N^2 d."""
    return (beta * scores(direction(x), _identity(x)))[:, 0].logsumexp(-1)


def velocity(x: Cloud, beta: Real, field: Field = "sa") -> Velocities:
    """What SA or USA (in units of e^{-beta} of time) gives each direction, through the gradient of the energy.

    USA is N grad E_beta on the sphere, here times e^{-beta}, so N/(2 beta) times the gradient of `scaled_energy`; SA the same
    with the mobility N/Z_i of each token: softmax is in the metric. It is another way to what `simulate` integrates. Cost N^2 d.
    """
    count = x.shape[1]
    # grad E = E grad log E; logarithms, because e^beta overflows
    log_sum = log_energy(x, _identity(x), beta).unsqueeze(-1)
    gradient = energy_gradient(x, _identity(x), beta)[:, 0]
    scale = log_sum - math.log(2 * beta * count)
    mobility = math.log(count) - log_partition(x, beta).unsqueeze(-1) if field == "sa" else -beta
    return (scale + mobility).exp() * gradient


def dissipation(x: Cloud, velocity: Cloud, beta: Real, field: Field = "sa") -> Prompts:
    """The rate of `scaled_energy` under this velocity of the field: 2 beta e^{-beta} (1/N) sum_i w_i |theta'_i|^2 >= 0.

    w_i is the inverse mobility: Z_i/N for "sa"; for "usa", whose time is in units of e^{-beta}, e^beta. 0 iff nothing moves. With
    the content -I the energy falls as fast. Cost N^2 d.
    """
    count = x.shape[1]
    weight = log_partition(x, beta) - beta - math.log(count) if field == "sa" else wide(x[..., 0]).new_zeros(x.shape[:2])
    return 2 * beta * (weight.exp() * wide(velocity).square().sum(-1)).mean(-1)


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=torch.float64, device=x.device).unsqueeze(0)
