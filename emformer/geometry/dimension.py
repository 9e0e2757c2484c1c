"""How many dimensions a cloud of tokens fills: estimates from neighbour distances, and from the spectrum.

`nearest` searches once, in float64; every estimator by distances reads its result, so a whole curve over scales costs one
search. The estimators by spectrum take the cloud itself. All compute in float64, an estimate is dimensionless, and undefined is
nan. Only differences at equal N mean something: at N = 1024 a Gaussian of 20 dimensions reads 16.7, one of 128 reads 55. The
answer also depends on the scale: of 2000 points on a plane, with noise .02 in 50 dimensions, the first neighbours read 14, the
32nd 2.9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from scipy.special import gammaincinv
from torch import Tensor

from emformer.geometry.neighbours import Neighbours, log_ratios, require
from emformer.geometry.spectra import effective_rank_of, wide

Cloud = Float[Tensor, "*batch n d"]
Scalars = Float64[Tensor, "*batch"]

SCALES = (1, 2, 4, 8, 16, 32)  # of `gride`
REMOVED = 0.1  # a cloud that loses a larger share of its points has no estimate


class Estimate(NamedTuple):
    """A dimension, its standard error and 95 % interval, and how many points it rests on.

    `se`, `low` and `high` take the points as independent. They are not: points share distances (of a mutual nearest pair both
    have the same r_1), so that the variance over Gaussian clouds is 1.2 (16 dimensions) to 1.8 times (2 dimensions) as large at
    the first neighbour, and up to 2.6 times at further ones. `breathing.contrasts` measures the excess.
    """

    value: float
    se: float
    low: float
    high: float
    n: int  # points with a finite ratio
    dropped: int  # points without one: duplicates


def twonn(neighbours: Neighbours) -> Estimate:
    """(N - 1) / sum l, l = log(r_2 / r_1): the unbiased TwoNN estimate. The default.

    Needs k >= 2. SE = d / sqrt(N - 2); exact interval: 2 d sum l is chi-squared with 2N degrees. nan where l is 0 throughout or
    more than a tenth of the points are duplicates. Source: Facco et al. 2017, "Estimating the intrinsic dimension of datasets by
    a minimal neighborhood information".
    """
    ratios = _ratios(neighbours)
    return _of_total(len(ratios), float(ratios.sum()), 1, len(ratios), neighbours.points)


def twonn_mle(neighbours: Neighbours) -> Estimate:
    """N / sum l: maximum likelihood, too large by the factor N / (N - 1). Otherwise as `twonn`."""
    ratios = _ratios(neighbours)
    return _of_total(len(ratios), float(ratios.sum()), 0, len(ratios), neighbours.points)


def twonn_censored(neighbours: Neighbours) -> Estimate:
    """(m - 1) / (sum of the m smallest l + (N - m) times the m-th), m = .9 N: `twonn` without the size of the largest tenth.

    Unbiased, and robust against points without a dense neighbourhood. SE = d / sqrt(m - 2); exact interval with 2m degrees.
    """
    ratios = _ratios(neighbours)
    n = len(ratios)
    m = 9 * n // 10
    smallest = ratios.sort().values[:m]
    total = float(smallest.sum() + (n - m) * smallest[-1:].sum())
    return _of_total(m, total, 1, n, neighbours.points)


def twonn_fit(neighbours: Neighbours) -> Estimate:
    """The slope through 0 of -log(1 - k/N) over the k-th smallest l, k <= .9 N: the fit of Facco et al.

    Robust like `twonn_censored`, but biased at small N (N = 20, d = 7: 7.7). The SE, a tenth above that of `twonn`, is that of
    the linearised slope under exponential l; the interval is normal.
    """
    ratios = _ratios(neighbours)
    n = len(ratios)
    m = 9 * n // 10
    smallest = ratios.sort().values[:m]
    rank = torch.arange(1, m + 1, dtype=torch.float64, device=ratios.device)
    target = -torch.log1p(-rank / n)
    slope = float((smallest * target).sum() / smallest.square().sum())
    # the k-th smallest of n exponentials is the sum of the first k gaps, independent with standard errors 1/(n - k + 1)
    behind = target.flip(0).cumsum(0).flip(0) / (n - rank + 1)
    spread = float(behind.norm() / target.square().sum())
    return _normal(slope, slope * spread, n, neighbours.points)


def gride(neighbours: Neighbours, scales: Sequence[int] = SCALES) -> tuple[Estimate, ...]:
    """The dimension at the distance of the k-th neighbour, one estimate a scale k: maximum likelihood of l = log(r_2k / r_k).

    Solves N/d + (k - 1) sum l/(1 - exp(-d l)) = (2k - 1) sum l; k = 1 is `twonn_mle`. Needs 2k neighbours. SE = 1/sqrt(observed
    information), interval normal. nan at a scale with fewer than 2k other points, where l is 0 throughout, or where more than a
    tenth of the points are duplicates. Cost: some ten passes over the ratios. Source: Denti et al. 2022, "The generalized ratios
    intrinsic dimension estimator".
    """
    for k in scales:
        require(neighbours, 2 * k)
    columns = [_ratios(neighbours, k) for k in scales]
    counts = [len(column) for column in columns]
    if not max(counts, default=0):
        return tuple(_normal(math.nan, math.nan, 0, neighbours.points) for _ in scales)
    # a missing ratio is padding of zero weight
    ratios = torch.nn.utils.rnn.pad_sequence(columns, padding_value=math.nan)
    present = ratios.isfinite()
    ratios = ratios.nan_to_num(0)
    k = torch.tensor(list(scales), dtype=torch.float64, device=ratios.device)
    n, total = present.sum(0), ratios.sum(0)
    # The score is convex and falls. It is not negative at the start, because x/(1 - exp(-x)) >= 1: Newton's steps only rise and
    # never pass the root, which is at most N / sum l, twice the start.
    d = k * n / ((2 * k - 1) * total)
    for _ in range(60):
        x = d * ratios
        fall = -torch.expm1(-x)
        first = torch.where(present, torch.where(x > 0, x / fall, 1), 0).sum(0)
        second = torch.where(present, torch.where(x > 0, x.square() * (-x).exp() / fall.square(), 1), 0).sum(0)
        information = n + (k - 1) * second
        step = (n + (k - 1) * first - (2 * k - 1) * d * total) / information
        d = d * (1 + step)
        if not (step.abs() > 1e-15 * n.clamp(min=1).sqrt()).any():
            break
    errors = d / information.sqrt()
    rows = zip(d.tolist(), errors.tolist(), counts, strict=True)
    return tuple(_normal(value, se, count, neighbours.points) for value, se, count in rows)


def levina_bickel(neighbours: Neighbours, scales: Sequence[int] = range(10, 21)) -> Estimate:
    """The mean over k of N (k - 1) / sum_i sum_j<k log(r_k / r_j): per point maximum likelihood, averaged harmonically.

    Needs max k neighbours. The SE is that of the points' terms, linearised; interval normal. nan for N <= max k, or where more
    than a tenth of the points are duplicates. Source: Levina and Bickel 2004, "Maximum likelihood estimation of intrinsic
    dimension", with the aggregation of MacKay and Ghahramani 2005. Raises ValueError for k < 2.
    """
    k = torch.tensor(list(scales), device=neighbours.distances.device)
    if not len(k) or k.min() < 2:
        raise ValueError("the scales of levina_bickel must be at least 2")
    require(neighbours, int(k.max()))
    logs = neighbours.distances.log()
    inverse = logs[:, k - 1] - (logs.cumsum(1)[:, k - 2] / (k - 1))
    inverse = inverse[inverse.isfinite().all(1)]
    n = len(inverse)
    at_scale = 1 / inverse.mean(0)
    influence = (at_scale - at_scale.square() * inverse).mean(1)
    return _normal(float(at_scale.mean()), float(influence.norm()) / n if n else math.nan, n, neighbours.points)


def participation_ratio(cloud: Cloud) -> Scalars:
    """(sum lambda)^2 / sum lambda^2 over the eigenvalues of the covariance.

    In [1, min(N - 1, d)]. Null (isotropic): N d / (N + d). One token of huge norm brings it to 1. nan for a constant cloud and
    for one with an entry that is not finite. Cost N d min(N, d). Source: math F.
    """
    x = _centred(cloud)
    gram = x @ x.mT if x.shape[-2] < x.shape[-1] else x.mT @ x
    return x.square().sum((-2, -1)).square() / gram.square().sum((-2, -1))


def erank_eigen(cloud: Cloud) -> Scalars:
    """exp H(p), p the eigenvalues of the covariance over their sum.

    In [1, min(N - 1, d)], never below `participation_ratio` nor above `erank_sv`. nan as there. Cost N d min(N, d).
    """
    return _effective_rank(torch.linalg.svdvals(_centred(cloud)).square())


def erank_sv(cloud: Cloud) -> Scalars:
    """exp H(p), p the singular values of the centred cloud over their sum: see `spectra.effective_rank_of`.

    In [1, min(N - 1, d)]. nan as `participation_ratio`. Cost N d min(N, d).
    """
    return _effective_rank(torch.linalg.svdvals(_centred(cloud)))


def rank_residual(cloud: Cloud) -> Scalars:
    """|X - 1 mean^T|_F / |X|_F: the share of the cloud that is not one common vector.

    In [0, 1]: 0 all tokens equal (rank collapse), 1 mean 0. Null (iid entries of mean 0): sqrt(1 - 1/N). nan for the zero cloud
    and for one with an entry that is not finite. Cost N d. Source: Dong et al. 2021, "Attention is not all you need".
    """
    return _centred(cloud).square().sum((-2, -1)).sqrt() / _finite(cloud).square().sum((-2, -1)).sqrt()


def _finite(cloud: Tensor) -> Tensor:
    """In float64; a cloud with an entry that is not finite becomes 0, which every quotient here turns into nan."""
    w = wide(cloud)
    return w.where(w.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), 0)


def _centred(cloud: Tensor) -> Tensor:
    w = _finite(cloud)
    # from the first token, then from the mean: the mean of equal numbers is not always that number, and its rounding has a rank
    w = w - w[..., :1, :]
    return w - w.mean(-2, keepdim=True)


def _effective_rank(values: Tensor) -> Tensor:
    return effective_rank_of(values).where(values.sum(-1) > 0, torch.nan)


def _ratios(neighbours: Neighbours, k: int = 1) -> Tensor:
    ratios = log_ratios(neighbours, k)
    return ratios[ratios.isfinite()]


def _of_total(m: int, total: float, less: int, n: int, points: int) -> Estimate:
    """(m - less) / total, where d times the total is a sum of m unit exponentials."""
    if not _defined(n, points) or total <= 0 or m < 2:
        return Estimate(math.nan, math.nan, math.nan, math.nan, n, points - n)
    value = (m - less) / total
    low, high = (float(gammaincinv(m, p)) / total for p in (0.025, 0.975))
    return Estimate(value, value / math.sqrt(m - 2) if m > 2 else math.nan, low, high, n, points - n)


def _normal(value: float, se: float, n: int, points: int) -> Estimate:
    if not _defined(n, points) or not math.isfinite(value):
        return Estimate(math.nan, math.nan, math.nan, math.nan, n, points - n)
    return Estimate(value, se, value - 1.96 * se, value + 1.96 * se, n, points - n)


def _defined(n: int, points: int) -> bool:
    return n > 1 and points - n <= REMOVED * points
