"""Noise on M, which no gauge can change, and on queries and keys, which any gauge can (math H.1)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from emformer.attention import Attention
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.positions import PositionMap
from emformer.surgery.copies import Which, copied, each, free, generator, known, maps, multiplied, plain, rebuilt
from emformer.types import Index, KeyIndex, Keys, Queries


@torch.no_grad()
def noise(
    model: Emformer,
    sigma: float,
    on: Literal["left", "right", "query", "key"],
    seed: int,
    relative: bool = True,
    layers: Which = None,
    heads: Which = None,
) -> Emformer:
    """Noise on the form. Source: math H.1.

        left   M <- (I + E) M, the probe       E iid N(0, sigma^2/d), so that |E M|_F / |M|_F is about sigma
        right  M <- M (I + E), the metric      one draw a layer and head; right: a group of heads that shares its keys
        query  u_i <- u_i + sigma |u_i|/sqrt(r) n      n iid N(0, 1), shared by the row i of scores
        key    v_j <- v_j + sigma |v_j|/sqrt(r) n      one draw for each token, head (key: group) and coordinate

    Left and right are the same in every gauge and are done on the factors, so that what reads these is not rebalanced; a
    content tied to M keeps its F. Query and key noise depends on the gauge: put the model into its `canonical` one, or do not
    compare the two. It acts at run time, before all positions, and is a function of (seed, layer, position) and of the size of
    the batch: it is the same in every pass over as many sequences, and in decoding. Where only some heads of a group get noisy
    keys, all of that layer get keys of their own. A block that all layers share stays shared under left and right, with one draw.

    Args:
        sigma: size, 0 or more.
        seed: of the draws; the global generator is left alone.
        relative: query and key: in units of the root mean square of that very vector's coordinates, else absolute.

    Raises:
        UserError: for a negative sigma, or a layer or a head that is not there.
    """
    known("noise", "on", on, ("left", "right", "query", "key"))
    if not 0 <= sigma < math.inf:
        raise UserError(f"noise: sigma is {sigma}; choose a finite size of 0 or more.")
    at_run_time = on in ("query", "key")
    copy, chosen, marked = copied(model, f"noise {sigma:g} on {on}, seed {seed}", layers, heads, apart=at_run_time)
    for layer in chosen:
        block = copy.layer(layer)
        attention = block.attention
        if at_run_time:
            mask = marked
            if on == "key":
                attention, mask = _apart(attention, marked)
            first = Jitter(sigma, on == "key", seed, layer, relative, None if marked.all() else mask)
            block.attention = rebuilt(attention, positions=[first, *maps(attention)])
            continue
        size = attention.form.heads, attention.form.dim, attention.form.dim
        draw = torch.randn(size, generator=generator("noise", on, seed, layer), dtype=torch.float64)
        factor = torch.eye(size[-1], dtype=torch.float64) + sigma / math.sqrt(size[-1]) * draw
        a, b = (factor, None) if on == "left" else (None, factor)
        block.attention = multiplied(attention, "form", a, b, marked)
    return copy


def _apart(attention: Attention, marked: Tensor) -> tuple[Attention, Tensor]:
    """(attention, keys): a mask (G,) of the keys of the marked heads, which share none with other heads any more."""
    form = attention.form
    group = marked.view(form.groups, -1)
    if bool((group.any(1) == group.all(1)).all()):
        return attention, group.all(1)
    return rebuilt(attention, form=plain(*each(form), form), content=free(attention.content)), marked


class Jitter(PositionMap):
    """x + sigma |x|/sqrt(r) n on queries or on keys x; n is a function of the position, so that a pass and a decoding agree.

    `marked` (H,) or (G,): the heads, or groups of keys, that it acts on; null for all.
    """

    reads_factors = True
    marked: Tensor | None

    def __init__(self, sigma: float, on_keys: bool, seed: int, layer: int, relative: bool, marked: Tensor | None):
        super().__init__()
        self.acts_on_keys = on_keys
        self.sigma, self.seed, self.layer, self.relative = sigma, seed, layer, relative
        self.register_buffer("marked", marked, persistent=False)

    def forward(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]:
        return (u, self._jolted(v, j)) if self.acts_on_keys else (self._jolted(u, i), v)

    def _jolted(self, x: Tensor, index: Tensor) -> Tensor:
        size = self.sigma * (torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) if self.relative else 1.0)
        noisy = x + size * self._draw(x, index)
        return noisy if self.marked is None else torch.where(self.marked.view(-1, 1, 1), noisy, x)

    def _draw(self, x: Tensor, index: Tensor) -> Tensor:
        """n for `x` (B, heads or groups, T, r): standard normal, one generator a position."""
        side = "key" if self.acts_on_keys else "query"
        shape = *x.shape[:2], x.shape[-1]
        rows = [
            torch.randn(shape, generator=generator("noise", side, self.seed, self.layer, position), dtype=torch.float64)
            for position in index.tolist()
        ]
        return torch.stack(rows, 2).to(x)
