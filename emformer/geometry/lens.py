"""The logit lens: what the model would predict if it stopped at a layer.

p^l = softmax(W_U LN_f(x^l)) is read one layer at a time against the last; only a few numbers a token stay behind, and what needs
all layers works on their stacks (L, …), layer first. Early layers are not trained to be read so, those of untied models least of
all. Everything is computed in float64, in chunks of rows; undefined is nan. Source: math H.4; nostalgebraist 2020, "interpreting
GPT: the logit lens".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from emformer.geometry.spectra import wide

CHUNK = 2**16  # logits that are worked on at once: half a MiB in float64, which stays in the cache

PerToken = Float64[Tensor, "*batch"]
Tops = Int64[Tensor, "L *batch"]
Entropies = Float[Tensor, "L *batch"]


class Reading(NamedTuple):
    """One layer: `entropy` H(p^l), `divergence` KL(p^L || p^l), `rank` of the last layer's top token, `top` token; see `read`."""

    entropy: Float64[Tensor, "*batch"]
    divergence: Float64[Tensor, "*batch"]
    rank: Float64[Tensor, "*batch"]
    top: Int64[Tensor, "*batch"]


def read(logits: Float[Tensor, "*batch V"], final: Float[Tensor, "*batch V"]) -> Reading:
    """One layer's logits (or log-probabilities) against those of the last layer; of the last layer, against itself.

    * entropy in nats, [0, log V]; null log V.
    * divergence KL(p^L || p^l) = sum_v p^L log(p^L/p^l) in nats, >= 0, exactly 0 for the last layer itself.
    * rank of argmax p^L in p^l, from 1, the mean rank among equal ones; null (V + 1)/2.
    * top argmax p^l, the first of equal ones, and -1 where all logits are equal or one is not finite: no token is meant.

    nan where a logit that it needs is not finite, the rank also where the last layer has no top. Cost: two passes over V a token.
    """
    vocabulary = logits.shape[-1]
    rows = max(1, CHUNK // vocabulary)
    flat, last = logits.reshape(-1, vocabulary), final.reshape(-1, vocabulary)
    found = [_read(*pair) for pair in zip(flat.split(rows), last.split(rows), strict=True)]
    return Reading(*(torch.cat(column).reshape(logits.shape[:-1]) for column in zip(*found, strict=True)))


def entropy(logits: Float[Tensor, "*batch V"]) -> PerToken:
    """H = log Z - sum_v p_v s_v in nats, in [0, log V]; null log V. nan where a logit is not finite. Cost V a token."""
    vocabulary = logits.shape[-1]
    chunks = logits.reshape(-1, vocabulary).split(max(1, CHUNK // vocabulary))
    return torch.cat([_softmax(wide(chunk)).entropy for chunk in chunks]).reshape(logits.shape[:-1])


def collapse_depth(tops: Tops) -> PerToken:
    """min{l: the top token is that of the last layer at all l' >= l}, of `Reading.top` stacked over the layers.

    In [0, L - 1], a layer. Null: near L - 1, for layers that know nothing agree with the last by 1/V each. A layer without a top
    agrees with none; nan where the last layer has none. Cost L.
    """
    differs = tops != tops[-1]
    layer = torch.arange(1, len(tops) + 1, device=tops.device).view(-1, *[1] * (tops.ndim - 1))
    return (layer * differs).amax(0).double().where(tops[-1] >= 0, torch.nan)


def caustic_depth(entropies: Entropies) -> PerToken:
    """argmax_l (H^l - H^{l+1}): the layer whose step focuses the prediction most, of entropies stacked over the layers.

    In [0, L - 2], the first of equal ones. nan for one layer, where an entropy is nan, and where none falls: nothing is focused.
    Cost L.
    """
    falls = -wide(entropies).diff(dim=0)
    if not len(falls):
        return torch.full_like(wide(entropies[0]), torch.nan)
    most = falls.max(0)
    return most.indices.double().where(most.values > 0, torch.nan)


# ----------------------------------------------------------------------------------------------------------------------


class _Softmax(NamedTuple):
    shifted: Tensor  # s - max s
    p: Tensor
    log_z: Tensor
    entropy: Tensor


def _softmax(s: Tensor) -> _Softmax:
    shifted = s - s.amax(-1, keepdim=True)
    p = shifted.exp()
    z = p.sum(-1, keepdim=True)
    p = p / z
    log_z = z.squeeze(-1).log()
    # one exponential a logit; log p itself is never needed
    return _Softmax(shifted, p, log_z, (log_z - (p * shifted).sum(-1)).clamp(min=0))


def _read(logits: Tensor, final: Tensor) -> Reading:
    s, last = wide(logits), wide(final)
    here, there = _softmax(s), _softmax(last)
    divergence = (there.p * (there.shifted - here.shifted)).sum(-1) - there.log_z + here.log_z
    known = here.entropy.isfinite() & there.entropy.isfinite()
    goal = _top(last)
    score = s.gather(-1, goal.clamp(min=0).unsqueeze(-1))
    rank = 0.5 + (s > score).sum(-1) + 0.5 * (s == score).sum(-1).double()
    return Reading(
        here.entropy,
        divergence.clamp(min=0).where(known, torch.nan),
        rank.where(known & (goal >= 0), torch.nan),
        _top(s),
    )


def _top(s: Tensor) -> Tensor:
    highest, lowest = s.max(-1), s.amin(-1)
    return highest.indices.where(highest.values.isfinite() & (lowest < highest.values), -1)
