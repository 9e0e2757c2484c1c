"""How operators work on each other, read off the weights: what later layers read of what earlier ones wrote, and along which
directions attention stretches and gathers a cloud.

Operators are effective ones (math A.6, `emformer.diagnostics.effective`): M and F with the norm that they read through, in
float64, positions at offset 0. Layers that share a block are told once, as layer 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emformer.block import Block
from emformer.diagnostics import factors
from emformer.geometry import spectra
from emformer.model import Emformer
from emformer.norms import Norm

Kind = Literal["Q", "K", "V"]


class Composition(NamedTuple):
    """What the heads of `layer` read of what the heads of the earlier layer `source` write: `value` (H, H), a row for each head
    that reads, in [0, 1], with the mean `null` and the standard deviation `null_sd` of random singular vectors."""

    layer: int
    source: int
    kind: Kind
    value: Tensor
    null: Tensor
    null_sd: Tensor


@torch.no_grad()
def compositions(model: Emformer) -> list[Composition]:
    """Q-, K- and V-composition of every head with every head of every earlier layer, M' and F' those of the later one:

        Q  |M'^T F|/(|M'| |F|)      what the earlier head wrote, as a query
        K  |M' F|/(|M'| |F|)        … as a key
        V  |F' F|/(|F'| |F|)        … as a content, carried on

    in Frobenius norms. Compare with the null, 1/sqrt(d), and not with 0. A block that all layers share is told against itself.
    Cost a pair of layers and kind: H^2 r^2 d. Source: Elhage et al. 2021, "A mathematical framework for transformer circuits".
    """
    count = len(model.blocks)
    told = [factors(model.layer(layer)) for layer in range(count)]
    pairs = [(layer, source) for layer in range(count) for source in range(layer)]
    if count == 1 < model.settings.depth:
        pairs = [(0, 0)]
    found = []
    for layer, source in pairs:
        late, early = told[layer], told[source]
        reads: dict[Kind, tuple[Tensor, Tensor]] = {
            "Q": (late.form_right, late.form_left),
            "K": (late.form_left, late.form_right),
            "V": (late.content_left, late.content_right),
        }
        for kind, operator in reads.items():
            values = spectra.compositions(operator, (early.content_left, early.content_right))
            found.append(Composition(layer, source, kind, *values))
    return found


class Growth(NamedTuple):
    """The symmetric forms B_h of a layer, what its attention does to a cloud of covariance I: `heads` (H, k) the eigenvalues of
    each, ascending, but for those that are 0 by rank; of their sum over heads all `values` (d,), ascending, and the directions
    that belong to them, `vectors` (d, d), a column each."""

    heads: Tensor
    values: Tensor
    vectors: Tensor


@torch.no_grad()
def growth(block: Block) -> Growth:
    """B = beta (F M^T + M F^T), which is Sigma' of the bare cloud's covariance at Sigma = I, in steps of the size s(x) of a token
    (the norm divides by it). What the norm does not see of what F writes, its mean, is left out.

    The sign: the sources have V A + A^T V^T with <A x, y> the score of the query x; that is V = F and A = M^T, for here the query
    stands on the left of M. Positive eigenvalues are directions in which the cloud spreads, at first at this rate (where F and
    M^T commute with B it is infinitely wide at 1/lambda_max; else there is no closed form); along negative ones it collapses:
    there tokens gather. It is the law of softmax attention on Gaussian clouds; other
    kernels have others. Cost H r d^2 + d^3. Source: math E.6; S3 (Castin et al. 2025, 2501.18322).
    """
    told, norm = factors(block), block.read_attn
    left = told.content_left
    if isinstance(norm, Norm) and norm.centred:
        left = left - left.mean(-1, keepdim=True)
    heads, whole = spectra.growth((left, told.content_right), (told.form_left, told.form_right))
    beta = float(getattr(block.attention.kernel, "beta", 1.0))
    values, vectors = torch.linalg.eigh(beta * whole)
    return Growth(beta * heads, values, vectors)


class Outlook(NamedTuple):
    """What the eigenvalues of B say: `share` sum of the positive ones over that of all by size, in [0, 1], null 1/2 (random
    singular vectors); `count` of positive ones; `top` the largest, in units of F M; `time` 1/top, the time scale of the
    fastest growth of a cloud of covariance I: when it is infinitely wide if operators commute (math E.6), and but a scale if
    they do not; nan where nothing grows."""

    share: Tensor
    count: Tensor
    top: Tensor
    time: Tensor


def outlook(values: Tensor) -> Outlook:
    """Of the nonzero eigenvalues (…, k); what is below 1e-10 of the largest is 0. All nan where B = 0."""
    size = values.abs().amax(-1, keepdim=True)
    positive = values > 1e-10 * size
    whole = values.abs().sum(-1)
    share = values.where(positive, 0.0).sum(-1) / whole.where(whole > 0, torch.nan)
    known = ~share.isnan()
    count = positive.sum(-1).double().where(known, torch.nan)
    top = values.amax(-1).where(known, torch.nan)
    return Outlook(share, count, top, (1 / top).where(count > 0, torch.nan))
