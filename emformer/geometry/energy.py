"""Attention as minimisation: the free energy of each query, how sharp and how far it looks, and what its keys push back.

Scores are s_ij = y_i^T M y_j + u^T y_j (B, H, N, N) without beta; `visible` (N, N) is true where query i may look at key j, None
if everywhere; a = softmax(beta s) over what is visible. What is said of each query can be asked of some, before all keys:
(B, H, T, S), visible (T, S). Functions of a take the weights of any kernel whose rows sum to one; for those of scores pass log a
at beta = 1 there (weights 0 may be -inf). All compute in float64 and return float64; entropies and gaps are in nats, free
energies in units of the score. What is not defined is nan.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from emformer.geometry.spectra import wide

Cloud = Float[Tensor, "B N d"]
Scores = Float[Tensor, "B H T S"]
Weights = Float[Tensor, "B H N N"]
Some = Float[Tensor, "B H T S"]
Table = Bool[Tensor, "T S"]
Forms = Float[Tensor, "H d d"]
Functionals = Float[Tensor, "H d"]
Temperature = float | Float[Tensor, ""]
Queries = Float64[Tensor, "B H T"]
HeadClouds = Float64[Tensor, "B H N d"]
Heads = Float64[Tensor, "B H"]

NEAR = 8  # the range of a query with fewer keys is not compared with its null: a few positions decide it


class Rows(NamedTuple):
    """Per query (B, H, N)."""

    free_energy: Queries
    free_energy0: Queries
    entropy: Queries
    entropy_norm: Queries
    divergence: Queries
    support: Queries
    ess: Queries
    gap: Queries


def scores(y: Cloud, form: Forms, functional: Functionals | None = None) -> Float64[Tensor, "B H N N"]:
    """s_ij = y_i^T M_h y_j + u_h^T y_j, masked entries too. Cost H N d (N + d). Source: math 0, A.2."""
    y = wide(y)
    gradients = torch.einsum("bnd,hde->bhne", y, wide(form))
    if functional is not None:
        gradients = gradients + wide(functional).unsqueeze(1)
    return (gradients.flatten(1, 2) @ y.mT).view(*gradients.shape[:-1], -1)


def weights(s: Scores, visible: Table | None = None, beta: Temperature = 1.0) -> Float64[Tensor, "B H N N"]:
    """a = softmax(beta s) over what is visible, exactly 0 elsewhere.

    Raises:
        ValueError: if a query sees nothing.
    """
    return (beta * _masked(s, visible)).softmax(-1)


def rows(s: Scores, visible: Table | None = None, beta: Temperature = 1.0) -> Rows:
    """What the scores of each query say, n = number of its visible keys.

    * free_energy F* = -(1/beta) log sum_j e^{beta s_j}, between -max s - (log n)/beta and -max s; it drifts with n;
    * free_energy0 F0* = -(1/beta) log mean_j e^{beta s_j}, in [-max s, -mean s]: the one to compare over positions;
    * entropy H = -sum a log a in [0, log n]; entropy_norm H/log n in [0, 1], 1 uniform, nan for n < 2;
    * divergence KL(a | uniform) = log n - H; support e^H and ess 1/sum a^2, 1 <= ess <= support <= n;
    * gap log(a_(1)/a_(2)) = beta (s_(1) - s_(2)) >= 0 of the two best keys; 0 for a tie, nan for n < 2 or a weight 0.

    nan in a row whose scores are not finite (-inf stands for weight 0). Differentiable in s and beta. Cost H N^2. Source: math B.

    Raises:
        ValueError: if a query sees nothing.
    """
    s = _masked(s, visible)
    count = _count(s, visible)
    top = s.detach().amax(-1, keepdim=True)
    absent = s == -torch.inf
    # 0 before -inf meets beta: its derivative there would be 0 times infinity
    z = beta * (s - top.where(top.isfinite(), torch.nan)).masked_fill(absent, 0)
    e = z.exp().masked_fill(absent, 0)
    total = e.sum(-1)
    entropy = total.log() - (e * z).sum(-1) / total
    # the sum of terms of one sign is 0 or more; from above rounding may pass log n
    entropy = entropy.minimum(count.log())
    free = -(top.squeeze(-1) + total.log() / beta).where(total > 0, torch.nan)
    # z is 0 at the best key; taking one key out leaves the second best
    gap = -z.masked_fill(absent, -torch.inf).scatter(-1, s.argmax(-1, keepdim=True), -torch.inf).amax(-1)
    return Rows(
        free_energy=free,
        free_energy0=free + count.log() / beta,
        entropy=entropy,
        entropy_norm=entropy / count.log(),  # 0/0 for one key
        divergence=count.log() - entropy,
        support=entropy.exp(),
        ess=total.square() / e.square().sum(-1),
        gap=gap.where(gap.isfinite(), torch.nan),
    )


def variational(p: Weights, s: Scores, beta: Temperature = 1.0) -> Queries:
    """F(p) = -<p, s> + (1/beta) sum_j p_j log p_j of any distribution p over the keys; F(p) >= F*, equal only at p = a.

    In units of the score. p must be 0 at keys that are not visible; nan where it has mass on a key of weight 0.
    Cost H N^2. Source: math B.
    """
    p = wide(p)
    taken = (p * wide(s).masked_fill(p == 0, 0)).sum(-1)
    return (torch.special.xlogy(p, p).sum(-1) / beta - taken).where(taken.isfinite(), torch.nan)


def excess(p: Weights, s: Scores, visible: Table | None = None, beta: Temperature = 1.0) -> Queries:
    """F(p) - F* = KL(p | a)/beta >= 0, without the difference of two large numbers.

    In units of the score. nan where p has mass on a key of weight 0, for which it is infinite. Cost H N^2. Source: math B.

    Raises:
        ValueError: if a query sees nothing.
    """
    p = wide(p)
    log_a = (beta * _masked(s, visible)).log_softmax(-1).masked_fill(p == 0, 0)
    divergence = (torch.special.xlogy(p, p) - p * log_a).sum(-1)
    return (divergence / beta).where(divergence.isfinite(), torch.nan)


class Range(NamedTuple):
    """Per query (B, H, N): positions, and two ratios to the null."""

    range: Queries
    normalised: Queries
    without_sink: Queries


def attention_range(a: Some, visible: Table | None = None, first: int = 0) -> Range:
    """R_i = sum_j a_ij |i - j| in positions, and R_i over its value for uniform weights on what is visible.

    The divisor is (i - 1)/2 under a causal mask, positions counted from 1. `without_sink` leaves the first key out and
    renormalises weights and null alike ((i - 2)/2). Ratios >= 0, null 1; nan for queries that see fewer than 8 keys, and where
    the sink has all. Cost H N^2. Source: math D.9.

    Args:
        first: the key that the first of the queries stands at.
    """
    a = wide(a)
    position = torch.arange(a.shape[-1], dtype=a.dtype, device=a.device)
    distance = (position[first : first + a.shape[-2], None] - position).abs()
    table = torch.ones_like(distance) if visible is None else visible.to(a)
    far = (table.sum(-1) >= NEAR) & (distance * table > 0).any(-1)

    def ratio(a: Tensor, distance: Tensor, table: Tensor) -> Tensor:
        mass = a.sum(-1)
        null = (distance * table).sum(-1) / table.sum(-1)
        found = (a * distance).sum(-1) / (mass * null)
        return found.where(far & (mass > 0), torch.nan)

    others = (a[..., 1:], distance[:, 1:], table[:, 1:])
    return Range((a * distance).sum(-1), ratio(a, distance, table), ratio(*others))


def attention_mean(a: Weights, y: Cloud) -> HeadClouds:
    """m_i = sum_j a_ij y_j, the minimiser of sum_j a_ij |z - y_j|^2 over z. Cost H N^2 d. Source: math B."""
    a = wide(a)
    return (a.flatten(1, 2) @ wide(y)).view(*a.shape[:-1], -1)


def residual(a: Weights, y: Cloud, content: Forms | None = None) -> Queries:
    """sum_j a_ij |y_j - m_i|^2 = tr Cov_{a_i}(y), of F_h y with a content: what is left at the minimum.

    In squared units of y, >= 0; 0 iff all of the weight lies on one point. Computed as 1/2 sum_jk a_ij a_ik |y_j - y_k|^2: terms
    of one sign, exact to the last digits however small. Cost N^2 (d + H N), times H for d with a content. Source: math B.
    """
    a, y = wide(a), wide(y).unsqueeze(1)
    if content is not None:
        y = y @ wide(content).mT
    distance = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (a @ distance).mul(a).sum(-1) / 2


def query_jacobian(
    a: Float[Tensor, "B H T N"], y: Cloud, form: Forms, content: Forms, beta: Temperature = 1.0
) -> Float64[Tensor, "B H T d d"]:
    """D Gamma = beta F Cov_{a_i}(y) M^T, the derivative of F_h m_i in the query y_i, keys held fixed.

    |D Gamma|_2 <= beta |F|_2 |M|_2 R^2 if all |y_j| <= R. Takes the rows of any T queries. Cost H T (N + d) d^2, memory
    H T d (N + d). Source: math E.5.
    """
    a, y = wide(a), wide(y).unsqueeze(1)
    spread = (y.unsqueeze(2) - (a @ y).unsqueeze(3)) * a.sqrt().unsqueeze(-1)
    operators = wide(content).unsqueeze(1), wide(form).mT.unsqueeze(1)
    return beta * operators[0] @ (spread.mT @ spread) @ operators[1]


class Forces(NamedTuple):
    action: HeadClouds
    reaction: HeadClouds


def forces(a: Weights, y: Cloud, form: Forms, functional: Functionals | None = None) -> Forces:
    """Action p_i = sum_j a_ij M y_j and reaction rho_i = sum_k a_ki (M^T y_k + u), in units of score per y.

    Summed over heads, p + rho = -grad G (see `total_free_energy`): p_i is the pull of the query's own free energy, rho_i of those
    that look at it. rho = p for symmetric M, symmetric doubly stochastic a and u = 0. Cost H N d (N + d). Source: math B.
    """
    y, form = wide(y), wide(form)
    pairs = [
        (m @ form[h].mT, _reaction(wide(a[:, h]), y, form[h], None if functional is None else wide(functional[h])))
        for h, m in enumerate(attention_mean(a, y).unbind(1))
    ]
    return Forces(*(torch.stack(pieces, 1) for pieces in zip(*pairs, strict=True)))


class Reaction(NamedTuple):
    """Per prompt and head (B, H), over the flattened cloud."""

    ratio: Heads
    cos_action: Heads
    cos_descent: Heads
    cos_reaction: Heads


def reaction(a: Weights, y: Cloud, form: Forms, content: Forms, functional: Functionals | None = None) -> Reaction:
    """How the update v_i = F m_i of a head stands to its `forces` p and rho.

    * ratio |rho|/|p| >= 0, about 1.0 to 1.1 for untrained operators: what a descent of each query's own energy leaves out;
    * cos_action cos(v, p), 1 for F = c M with c > 0; null (independent F) 0 with sd 1/sqrt(d PR), PR the participation ratio of
      the uncentred means m;
    * cos_descent cos(v, p + rho), against -grad G of the head;
    * cos_reaction cos(p, rho), 1 iff rho = c p with c > 0.

    nan where a force or the update is 0. Cost H N d (2 N + 3 d); no array larger than (B, H, N, d). Source: math B.
    """
    y, form, content = wide(y), wide(form), wide(content)
    dim, products = y.shape[-1], []
    for h in range(len(form)):  # a head at a time: what one needs stays in the cache
        some = wide(a[:, h])
        p, v = ((some @ y) @ torch.cat([form[h], content[h]]).mT).split(dim, -1)
        rho = _reaction(some, y, form[h], None if functional is None else wide(functional[h]))
        three = torch.stack([p, rho, v], 1).flatten(2)
        products.append(three @ three.mT)
    pp, pr, pv, _, rr, rv, _, _, vv = torch.stack(products, 1).flatten(-2).unbind(-1)
    return Reaction(
        ratio=(rr / pp.where(pp > 0, torch.nan)).sqrt(),
        cos_action=_cosine(pv, pp, vv),
        cos_descent=_cosine(pv + rv, pp + 2 * pr + rr, vv),
        cos_reaction=_cosine(pr, pp, rr),
    )


def total_free_energy(
    x: Cloud, form: Forms, visible: Table | None = None, beta: Temperature = 1.0, functional: Functionals | None = None
) -> Float64[Tensor, " B"]:
    """G(X) = sum over heads and queries of F*, with the read cloud X itself (no norm), in units of the score.

    -grad_{x_k} G = sum_h M m_k + M^T (A^T X)_k + (A^T 1)_k u, by autograd or by `forces`. Cost H N d (N + d). Source: math B.

    Raises:
        ValueError: if a query sees nothing.
    """
    return -(beta * _masked(scores(x, form, functional), visible)).logsumexp(-1).sum((-2, -1)) / beta


def _masked(s: Tensor, visible: Tensor | None) -> Tensor:
    """Scores in float64, -inf where nothing is seen."""
    s = wide(s)
    if visible is None:
        return s
    if not visible.any(-1).all():
        raise ValueError("a query that sees no key has no free energy: every row of `visible` needs a key")
    return s.masked_fill(~visible.to(s.device), -torch.inf)


def _count(s: Tensor, visible: Tensor | None) -> Tensor:
    """n of each query, as numbers (N,)."""
    return s.new_full(s.shape[-2:-1], s.shape[-1]) if visible is None else visible.sum(-1).to(s)


def _reaction(a: Tensor, y: Tensor, form: Tensor, functional: Tensor | None) -> Tensor:
    """rho of one head (B, N, d)."""
    rho = (a.mT @ y) @ form
    return rho if functional is None else rho + a.sum(-2).unsqueeze(-1) * functional


def _cosine(inner: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """From the inner product and both squared norms."""
    scale = first.sqrt() * second.sqrt()
    return (inner / scale.where(scale > 0, torch.nan)).clamp(-1, 1)
