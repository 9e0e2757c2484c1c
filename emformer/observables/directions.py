"""Family "operators", on data: does a cloud spread along the directions that M and F predict?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from emformer import parts
from emformer.circuits import Growth, growth
from emformer.geometry.spectra import wide
from emformer.observables.base import Moments, Observation, Row
from emformer.observables.energy import temperature
from emformer.parts import UserError
from emformer.trajectory import Trajectory

FEWEST = 3  # directions of a rank correlation


@dataclass(frozen=True)
class Directions(parts.Observable):
    """The predicted growth of a cloud, read off the weights (`emformer.circuits.growth`), against the growth that text shows.

    Of each attention step and prompt: the rank correlation (Spearman) over eigenvectors of B = sum_h F M^T + M F^T, half of them
    with the largest and half with the least eigenvalues, none with eigenvalue 0, of the eigenvalue with the logarithm of variance
    after the attention step over variance before it, of the prompt's tokens along that direction. The law holds for softmax
    attention in a cloud that is Gaussian and round; real ones are neither, and what positions add is left out: whether the
    prediction is worth something is the question. The ranks may be right where every variance grows, so the signs are told too:
    does the cloud shrink along the directions that gather. Kernels that are no softmax of the score have no rows. Cost: d^3 a
    layer once, and N d `directions` a prompt and step.

    Args:
        directions: at most so many.
        skip: tokens at the beginning of each prompt that are left out: a first token that is a sink has most of the variance.
    """

    directions: int = 64
    skip: int = 1

    family: ClassVar[str] = "operators"
    keys: ClassVar[Mapping[str, str]] = {
        "op.directions_rank": "rank correlation of the eigenvalues of B = F M^T + M F^T with the growth of log variance along "
        "their directions in an attention step; [-1, 1]; 1 the cloud spreads and gathers as predicted; null 0, sd "
        "1/sqrt(directions - 1)",
        "op.directions_sign": "share of the directions with a negative eigenvalue of B along which variance falls in an "
        "attention step (param 'gathers'), with a positive one along which it grows ('spreads'); [0, 1]; null the share of all "
        "directions along which it falls (grows)",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if self.skip < 0 or self.directions < FEWEST:
            raise UserError(
                f"Directions: skip is {self.skip} and directions {self.directions}; choose at least 0, and at least {FEWEST}."
            )

    def begin(self) -> Observation:
        return _Directions(self.directions, self.skip)


class _Directions(Observation):
    def __init__(self, directions: int, skip: int):
        self._directions, self._skip, self._moments = directions, skip, Moments()
        self._predicted: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        for k in trajectory.attentions:
            step, block = trajectory.steps[k], trajectory.block(k)
            if temperature(block.attention.kernel) is None:
                continue
            if k not in self._predicted:
                self._predicted[k] = _extremes(growth(block), self._directions)
            values, vectors = self._predicted[k]
            # of a parallel block the attention's share alone
            after = step.after if step.ffn is None else trajectory.halves(k)[0]
            before, after = (_variance(x[:, self._skip :], vectors) for x in (step.before, after))
            known = len(values) >= FEWEST
            found_rank = rank_correlation(values, (after / before).log()) if known else torch.full_like(before[:, 0], torch.nan)
            sd = 1 / math.sqrt(len(values) - 1) if known else None
            self._moments.add(found_rank, step.layer, step.point, "op.directions_rank", null=0.0, null_sd=sd)
            grown = (after / before).log()
            for sign, param in ((-1, "gathers"), (1, "spreads")):
                right = (sign * grown > 0).double().where(grown.isfinite(), torch.nan)
                mine = sign * values > 0
                shares = right[:, mine].nanmean(1), right.nanmean(1)
                self._moments.add(shares[0], step.layer, step.point, "op.directions_sign", param=param, null=shares[1])

    def rows(self) -> list[Row]:
        return self._moments.rows()


def _extremes(found: Growth, count: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues (n,) and eigenvectors (d, n) of both ends of the spectrum, n <= count."""
    size = found.values.abs()
    places = (size > 1e-10 * size.max()).nonzero().squeeze(-1)
    if len(places) > count:
        places = torch.cat([places[: count // 2], places[len(places) - (count + 1) // 2 :]])
    return found.values[places], found.vectors[:, places]


def rank_correlation(values: Tensor, others: Tensor) -> Tensor:
    """Spearman's correlation (B,) of values (n,) with each row of others (B, n), all different; nan where a row is not finite."""
    finite = others.isfinite().all(-1)
    ranks = [x.argsort(-1).argsort(-1).double() for x in (values, others.nan_to_num())]
    a, b = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    return ((a * b).sum(-1) / (a.norm() * b.norm(dim=-1))).where(finite, torch.nan)


def _variance(x: Tensor, vectors: Tensor) -> Tensor:
    """Of the tokens of each prompt along each direction (B, n); nan of one token or where it is rounding."""
    along = wide(x) @ vectors.to(wide(x))
    if along.shape[1] < 2:
        return along.new_full((along.shape[0], along.shape[2]), torch.nan)
    rounding = 16 * torch.finfo(x.dtype).eps
    variance, size = along.var(1), along.abs().amax(1)
    return variance.where(variance > (rounding * size).square(), torch.nan)
