"""Attention sinks: tokens that most queries look at, and what these queries get from them.

Patterns a (…, T, S) have rows of weights, visible (T, S) is true where a query may look: the lower triangle, everything, or any
other mask. Positions k are counted from 1, as in the literature. Everything is computed in float64 and returned as float64 of the
batch shape; undefined is nan. Source: math H.2; Gu et al. 2024, "When attention sink emerges in language models" (2410.10781).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from emformer.geometry.spectra import wide

Pattern = Float[Tensor, "*batch T S"]
Visible = Bool[Tensor, "T S"]
Scalars = Float64[Tensor, "*batch"]


def received(pattern: Pattern, visible: Visible) -> Float64[Tensor, "*batch S"]:
    """sum_i a_ik over the queries i that see token k: of some queries, what they add to the whole. Cost T S."""
    return wide(pattern).where(visible, 0.0).sum(-2)


def importance(pattern: Pattern, visible: Visible) -> Float64[Tensor, "*batch S"]:
    """alpha_k: the mean of a_ik over the queries i that see token k; causal: (1/(T - k + 1)) sum_{i >= k} a_ik.

    In [0, 1]. Null: `importance(uniform(visible), visible)`, causal (1/(T - k + 1)) sum_{i >= k} 1/i. In a causal mask the only
    token that query 1 sees is token 1, which adds 1/T to alpha_1; alpha_T has one query. nan where no query sees k. Cost T S.
    """
    return received(pattern, visible) / visible.sum(-2)


def uniform(visible: Visible) -> Float64[Tensor, "T S"]:
    """The pattern of no preference: 1/n on the n tokens that a query sees; a row that sees nothing is 0."""
    return visible.double() / visible.sum(-1, keepdim=True).clamp(min=1)


def sink_rate(pattern: Pattern, visible: Visible, position: int = 1, threshold: float = 0.3) -> Scalars:
    """Sink_k^eps = 1[alpha_k > eps], of every prompt and head: 0 or 1, and the published rate is its mean over them.

    Null: that of `uniform(visible)`. Causal, eps = .3: 0 for k = 1 from T = 10 on (alpha_1 = (1/T) sum 1/i, .074 at T = 64), for
    k = 2 from T = 6, for k = 3 from T = 4, for k >= 4 always; on shorter prompts uniform attention counts as a sink. Compare
    rates at one T only. nan where alpha_k is. Cost T S.

    Raises:
        ValueError: position outside 1 … S.
    """
    return sink_rate_of(importance(pattern, visible), position, threshold)


def sink_rate_of(alpha: Float[Tensor, "*batch S"], position: int = 1, threshold: float = 0.3) -> Scalars:
    """`sink_rate` from the `importance` alpha of every token."""
    alpha = alpha[..., _index(position, alpha.shape[-1])]
    return (alpha > threshold).double().where(~alpha.isnan(), torch.nan)


def sink_position(pattern: Pattern, visible: Visible, queries: int = 1) -> Scalars:
    """argmax_k alpha_k, from 1; the first of those that are equal to a millionth. Null (uniform, causal): 1.

    nan where no token is seen by enough queries, or a weight is nan. Cost T S.

    Args:
        queries: only tokens that at least so many queries see: in a causal mask the last ones have an alpha of few terms, which
            is large by chance.
    """
    return sink_position_of(importance(pattern, visible), visible.sum(-2), queries)


def sink_position_of(alpha: Float[Tensor, "*batch S"], seen: Int[Tensor, " S"], queries: int = 1) -> Scalars:
    """`sink_position` from the `importance` alpha of every token and how many queries see it."""
    enough = seen >= max(queries, 1)
    known = enough.any() & ~(alpha.isnan() & enough).any(-1)
    alpha = wide(alpha).where(enough, -torch.inf)
    top = alpha.amax(-1, keepdim=True)
    # which of two equal means is larger must not hang on how they were summed, or balanced
    best = (alpha >= top - 1e-6 * top.abs()).int().argmax(-1) + 1
    return best.double().where(known, torch.nan)


class SinkMass(NamedTuple):
    mass: Float64[Tensor, "*batch T"]
    mean: Float64[Tensor, "*batch"]
    sd: Float64[Tensor, "*batch"]
    variation: Float64[Tensor, "*batch"]


def sink_mass(pattern: Pattern, visible: Visible, position: int = 1) -> SinkMass:
    """lam_i = a_ik, what each query gives to token k, with its mean, standard deviation and sd/mean over the queries.

    `mass` in [0, 1], nan for queries that do not see k and for those that see nothing else and so have no choice; `sd` divides
    by n - 1. `variation` >= 0: 0 for a sink that is a constant bias. Null (uniform, causal, k = 1): lam_i = 1/i. nan where
    undefined: fewer than one (two) queries, a mean that is not positive. Cost T.

    Raises:
        ValueError: position outside 1 … S.
    """
    k = _index(position, pattern.shape[-1])
    return sink_mass_of(pattern[..., k], visible[:, k] & (visible.sum(-1) >= 2))


def sink_mass_of(mass: Float[Tensor, "*batch T"], chooses: Bool[Tensor, " T"]) -> SinkMass:
    """`sink_mass` from the column a_ik, and which queries see k and something else. Cost T."""
    mass = wide(mass).where(chooses, torch.nan)
    count = chooses.sum()
    kept = mass.where(chooses, 0.0)
    mean = kept.sum(-1) / count
    square = (kept - mean.unsqueeze(-1)).where(chooses, 0.0).square().sum(-1)
    sd = (square / (count - 1)).where(count >= 2, torch.nan).sqrt()
    return SinkMass(mass, mean, sd, sd / mean.where(mean > 0, torch.nan))


def sink_share(
    mass: Float[Tensor, "*batch T"], value: Float[Tensor, "*batch d"], update: Float[Tensor, "*batch T d"]
) -> Float64[Tensor, "*batch T"]:
    """|lam_i F y_k| / |D_i|: the sink's part of a head's update D_i = (1 - lam_i) F m_i^rest + lam_i F y_k.

    >= 0; 1 where the sink is all, above 1 where the rest works against it. nan where D_i = 0 or lam_i is undefined. Cost T d.

    Args:
        mass: lam, see `sink_mass`.
        value: F y_k of the head.
        update: D_i of the head.
    """
    size = wide(update).norm(dim=-1)
    return wide(mass).abs() * wide(value).norm(dim=-1, keepdim=True) / size.where(size > 0, torch.nan)


def value_ratio(contents: Float[Tensor, "*batch S d"], position: int = 1) -> Scalars:
    """|F y_k| / median over the other tokens of |F y_j|: below 1 the sink drains attention, it gives less than others do.

    >= 0. Null: 1. nan for one token or a median of 0. Cost S d.

    Args:
        contents: F y_j of a head.

    Raises:
        ValueError: position outside 1 … S.
    """
    k = _index(position, contents.shape[-2])
    size = wide(contents).norm(dim=-1)
    others = torch.cat([size[..., :k], size[..., k + 1 :]], -1)
    if not others.shape[-1]:
        return torch.full_like(size[..., 0], torch.nan)
    middle = others.quantile(0.5, dim=-1)
    return size[..., k] / middle.where(middle > 0, torch.nan)


def value_cosine(values: Float[Tensor, "P H d"], mean: Float[Tensor, "H d"] | None = None) -> Float64[Tensor, " H"]:
    """Mean cosine between the vectors V_sink = F_h y_k of different prompts, raw or with a mean removed.

    In [-1/(P - 1), 1]. Null (independent): 0, standard deviation sqrt(2/(P (P - 1) d)). It is no evidence of a constant bias by
    itself: in a causal model token 1 sees only itself, so prompts that begin with the same token have a cosine of exactly 1,
    with random weights too. Use different first tokens, a later position of the same statistics, and an untrained model beside
    it. Vectors without a direction are left out; nan when fewer than two are left. Cost P H d.

    Args:
        values: F y_k, one prompt a row.
        mean: removed from all of them: that of F y_j over all tokens, or over other positions. Their own mean would make the
            cosine -1/(P - 1) on average, whatever they are.
    """
    raw = wide(values)
    removed = torch.zeros_like(raw[0]) if mean is None else wide(mean)
    v = raw - removed
    length = v.norm(dim=-1)
    # a difference that is only rounding has no direction
    known = length > 16 * torch.finfo(values.dtype).eps * (raw.norm(dim=-1) + removed.norm(dim=-1))
    units = (v / length.unsqueeze(-1)).where(known.unsqueeze(-1), 0.0)
    count = known.sum(0)
    value = (units.sum(0).square().sum(-1) / count - 1) / (count - 1)
    return value.where(count >= 2, torch.nan)


# ----------------------------------------------------------------------------------------------------------------------


def _index(position: int, tokens: int) -> int:
    if not 1 <= position <= tokens:
        raise ValueError(f"position {position} is none of the tokens 1 … {tokens}")
    return position - 1
