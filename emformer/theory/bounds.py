"""How fast, how far and how steep: bounds on attention as a field, and what they bound.

For tokens in a ball of radius R, Gamma(x) = sum_h F_h m_h(x) with softmax weights (math E.5; Castin et al. 2025, 2501.18322):

    |Gamma| <= sum_h |F_h| R,      |D Gamma| <= beta sum_h |F_h||M_h| R^2 (keys frozen),      R(t) <= R(0) e^{t sum_h |F_h|},

|.| of matrices the largest singular value. Of two clouds whose tokens are paired, d/dt max_i |x_i - x'_i| <= L max_i |x_i - x'_i|
with L = sum_h |F_h| (1 + 2 beta |M_h| R^2): beta |M| R^2 for the query, 1 for what keys carry, beta |M| R^2 for where they stand.
As a map of n tokens into n tokens, in the norm of R^{nd}, attention has the Lipschitz constant of `lipschitz_bound`, which grows
as sqrt(n): all may look at one token (Castin et al. 2024, 2312.14820).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emformer.geometry.integrability import Field
from emformer.geometry.spectra import singular_values, wide

Cloud = Float[Tensor, "B N d"]
Forms = Float[Tensor, "H d d"]
Prompts = Float64[Tensor, " B"]


def radius(x: Cloud) -> Prompts:
    """R = max_i |x_i|, about the origin. Cost N d."""
    return wide(x).norm(dim=-1).amax(-1)


def speed_bound(content: Forms, reach: Prompts) -> Prompts:
    """sum_h |F_h| R >= |Gamma|, for weights that are convex (softmax, L2, hardmax, under any mask). Cost H d^3."""
    return _norms(content).sum() * reach


def steepness_bound(form: Forms, content: Forms, beta: float, reach: Prompts) -> Prompts:
    """beta sum_h |F_h||M_h| R^2 >= |D Gamma(x)|, keys frozen, of softmax: no covariance in the ball is above R^2. Cost H d^3."""
    return beta * (_norms(content) * _norms(form)).sum() * reach.square()


def support_bound(content: Forms, reach: Prompts, time: float) -> Prompts:
    """R(0) e^{time sum_h |F_h|} >= R(time) of the flow; its Euler steps stay below, as 1 + z <= e^z. Cost H d^3."""
    return reach * (time * _norms(content).sum()).exp()


def stability_bound(form: Forms, content: Forms, beta: float, reach: Prompts) -> Prompts:
    """L = sum_h |F_h| (1 + 2 beta |M_h| R^2): two clouds in the ball part no faster than e^{int L} in W_infinity. Cost H d^3."""
    f, m = _norms(content), _norms(form)
    return f.sum() + 2 * beta * (f * m).sum() * reach.square()


def parting_bound(
    form: Forms, content: Forms, beta: float, reach: Float64[Tensor, " K"], times: Float64[Tensor, " K"]
) -> Float64[Tensor, " K"]:
    """log of the factor by which two clouds can have parted at each time since the first: int L, L of `stability_bound`.

    Between two states R(t) is no more than `support_bound` from the earlier one, whose square has an integral: what lies between
    is bounded, however far apart the states are. Cost H d^3.

    Args:
        reach: R of both clouds at the times, ascending.
    """
    f, steep = _norms(content).sum(), (stability_bound(form, content, beta, reach) - _norms(content).sum())[:-1]
    gap, twice = times.diff(), 2 * f.clamp(min=torch.finfo(f.dtype).tiny)
    grown = f * gap + steep * torch.expm1(twice * gap) / twice
    return torch.cat([grown.new_zeros(1), grown.cumsum(0)])


def lipschitz_bound(form: Forms, content: Forms, beta: float, reach: Prompts, tokens: int) -> Prompts:
    """sum_h |F_h| (beta |M_h| R^2 + sqrt(n) (1 + 2 beta |M_h| R^2)) >= |J| of X -> Gamma_X(X) on n tokens, softmax.

    The first term is a token as query; the other its share in all means, whose weights have operator norm <= sqrt(n) as their
    rows sum to one. Cost H d^3.
    """
    f, m = _norms(content), _norms(form)
    steep = beta * (f * m).sum() * reach.square()
    return steep + tokens**0.5 * (f.sum() + 2 * steep)


def steepness(a: Float[Tensor, "B H T S"], y: Float[Tensor, "B S d"], form: Forms, content: Forms, beta: float) -> Tensor:
    """D Gamma (B, T, d, d) = beta sum_h F_h Cov_a(y) M_h^T at each query: of softmax weights a, keys frozen. math E.5, exact.

    Cost H T d^2 (S + d); memory T d^2 a head.
    """
    a, y = wide(a), wide(y)
    total: Tensor | float = 0.0
    for weights, m, f in zip(a.unbind(1), wide(form), wide(content), strict=True):
        mean = weights @ y
        second = torch.einsum("bts,bsd,bse->btde", weights, y, y)
        total = total + beta * f @ (second - mean.unsqueeze(-1) * mean.unsqueeze(-2)) @ m.mT
    assert isinstance(total, Tensor)
    return total


class Stretch(NamedTuple):
    """The largest singular value of a Jacobian by prompt, and how much of it the last iteration still changed, relatively."""

    value: Prompts
    change: Prompts


def stretch(field: Field, x: Cloud, iterations: int = 40, seed: int = 0) -> Stretch:
    """|J|, the local Lipschitz constant in the norm of R^{nd} of a field at x, by power iteration on J^T J from a random start.

    From below, and within `change` once that is small. Cost: about 4 calls of the field an iteration.

    Raises:
        ValueError: for no iteration.
    """
    if iterations < 1:
        raise ValueError("a power iteration takes at least one step")
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(x.shape[1:], generator=generator, dtype=torch.float64).to(x).expand_as(x)
    pull = torch.func.vjp(field, x)[1]
    before = value = x.new_zeros(len(x))
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)[:, None, None]
        pushed = torch.func.jvp(field, (x,), (v,))[1]
        before, value = value, pushed.flatten(1).norm(dim=1)
        v = pull(pushed)[0]
    return Stretch(wide(value), wide((value - before) / value.where(value > 0, torch.nan)))


def crowd(tokens: int, dim: int, reach: float) -> Float64[Tensor, "1 n d"]:
    """One token at the edge of the ball, and all others half as far out in the same direction: with M = I all look at the one, as
    long as beta R^2/4 is far above log n. Moving it moves all means: |J| ~ sqrt(n)."""
    x = torch.zeros(1, tokens, dim, dtype=torch.float64)
    x[..., 0] = reach / 2
    x[:, 0, 0] = reach
    return x


def torn(tokens: int, dim: int, reach: float, lean: float = 0.25) -> Float64[Tensor, "1 n d"]:
    """All tokens but two at one edge of the ball, torn between these two, which are almost as far apart as the ball is wide. With
    M = `turn` they see nothing else, as long as beta lean R^2 is far above log n, and a little more of one for a little less of
    the other moves them all: |J| is about beta R^2 sqrt(n/2), a third of `lipschitz_bound`."""
    x = torch.zeros(1, tokens, dim, dtype=torch.float64)
    x[..., 0] = reach
    x[:, :2, 0] = reach * (1 - lean**2) ** 0.5 * torch.tensor([1.0, -1.0], dtype=torch.float64)
    x[:, :2, 1] = reach * lean
    return x


def turn(dim: int) -> Float64[Tensor, "1 d d"]:
    """The quarter turn of the plane of the first two coordinates: what is at the edge of one asks for the other."""
    found = torch.zeros(1, dim, dim, dtype=torch.float64)
    found[0, 0, 1], found[0, 1, 0] = 1, -1
    return found


def seesaw(tokens: int, dim: int, reach: float) -> Float64[Tensor, "1 n d"]:
    """Half of the tokens at each end of the first axis, one at the origin if they are odd: at rest, Cov = R^2 for an even number.

    With M = m e_1 e_0^T and F = f e_1 e_0^T a lift delta of all along e_1 tips attention to one end, which lifts them further:
    sinh(k delta(t)) = sinh(k delta(0)) e^{k f R t}, k = beta m R; the rate beta f m R^2 is half of `stability_bound` for large m.
    """
    x = torch.zeros(1, tokens, dim, dtype=torch.float64)
    half = tokens // 2
    x[:, :half, 0], x[:, half : 2 * half, 0] = reach, -reach
    return x


class Growth(NamedTuple):
    """The exponent p of y ~ n^p, with its standard error over samples."""

    exponent: float
    error: float


def exponent(n: Float[Tensor, " K"], y: Float[Tensor, "samples K"]) -> Growth:
    """The least-squares slope of log y on log n for each sample, their mean and its standard error (nan of one)."""
    log_n, log_y = wide(n).log(), wide(y).log()
    log_n = log_n - log_n.mean()
    slopes = (log_y @ log_n) / log_n.square().sum()
    error = float(slopes.std() / len(slopes) ** 0.5) if len(slopes) > 1 else float("nan")
    return Growth(float(slopes.mean()), error)


def _norms(operators: Forms) -> Float64[Tensor, " H"]:
    return singular_values(operators).amax(-1)
