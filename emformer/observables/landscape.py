"""Family "wgf", across layers: does the next layer climb the energy of this one, or another?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from scipy.linalg import helmert
from torch import Tensor

from emformer import parts
from emformer.geometry import landscape
from emformer.geometry.spectra import wide
from emformer.observables.base import Observation, Row, estimate
from emformer.observables.directions import FEWEST, rank_correlation
from emformer.observables.fields import FirstPrompts, Layer, joined, of, weights_of_one
from emformer.parts import UserError
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Landscape(parts.Observable):
    """The energies that two consecutive attention steps climb (`GradientFlow`), against each other; rows of the later one.

    Forms are those of the energy, symmetric and effective, their mean over heads: heads of different layers have no common names.
    Behind a norm that removes the mean they are forms on the plane of mean 0, of d' = d - 1 dimensions (d' = d otherwise): the
    direction that all of them lack makes none alike. Cosines and overlaps are read off the weights, once: `n_valid` is 1 (of a
    shared block they are 1); an overlap is undefined where the k-th eigenvalue and the next are one. The rank correlation is over
    prompts: do those that are high up in one landscape stand high in the next. The same layers have rows as in `GradientFlow`, if
    both are in the same space. Cost: d^3 once, and H N d (N + d) a prompt and step; a prompt whose H N^2 scores are beyond the
    trajectory's budget has no energy. Source: math K (6).

    Args:
        prompts: how many are looked at, the first ones.
        directions: k, dimension of the space of the largest eigenvalues, into which a cloud gathers; at most d'.
    """

    prompts: int = 512
    directions: int = 4

    family: ClassVar[str] = "wgf"
    keys: ClassVar[Mapping[str, str]] = {
        "wgf.form_cos": "<S, S'>/(|S||S'|) of the symmetric forms of this attention step and of the one before; [-1, 1]; 1 the "
        "same landscape; null random eigenvectors, tr S tr S'/(d' |S||S'|)",
        "wgf.form_overlap": "mean squared cosine of the principal angles between the spaces of the k largest eigenvalues of S "
        "and S'; [0, 1]; null k/d'; param 'k'",
        "wgf.energy_rank": "rank correlation over prompts of log E of this step at its cloud with that of the one before at its "
        "own; [-1, 1]; null 0, sd 1/sqrt(n - 1)",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.directions < 1:
            raise UserError(f"Landscape: prompts is {self.prompts} and directions {self.directions}; choose at least 1 of each.")

    def begin(self) -> Observation:
        return _Landscape(self.prompts, self.directions)


class _Landscape(FirstPrompts):
    def __init__(self, prompts: int, directions: int):
        super().__init__(prompts)
        self._directions = directions
        self._forms: list[Row] = []
        self._energies: dict[tuple[int, str, str | None], list[Tensor]] = {}

    def _take(self, trajectory: Trajectory, count: int) -> None:
        told = [(k, of(trajectory.block(k))) for k in trajectory.attentions]
        first = not self._energies
        for (k, one), (later, two) in pairwise(told):
            if one is None or two is None or one.space != two.space:
                continue
            step = trajectory.steps[later]
            at = step.layer, step.point, two.param
            if first:
                self._forms += self._compared(one, two, at)
            energies = torch.stack([_energy(trajectory, k, one, count), _energy(trajectory, later, two, count)])
            self._energies.setdefault(at, []).append(energies.cpu())

    def _compared(self, one: Layer, two: Layer, at: tuple[int, str, str | None]) -> Iterator[Row]:
        forms = [w.beta * w.forms.mean(0) for w in (one, two)]
        if one.space == "centred":
            plane = torch.from_numpy(helmert(len(forms[0]))).to(forms[0])
            forms = [plane @ w @ plane.mT for w in forms]
        if not len(forms[0]):
            return  # the plane of mean 0 of a line is a point
        k = min(self._directions, len(forms[0]))
        for key, param, found in (
            ("wgf.form_cos", at[2], landscape.cosine(*forms)),
            ("wgf.form_overlap", joined(f"k={k}", at[2]), landscape.overlap(*forms, k)),
        ):
            known = not math.isnan(found.value)
            yield estimate(
                at[:2], key, found.value, int(known), int(not known), null=found.null, null_sd=found.null_sd, param=param
            )

    def rows(self) -> list[Row]:
        found = list(self._forms)
        for (layer, point, param), kept in self._energies.items():
            before, after = torch.cat(kept, 1)
            known = before.isfinite() & after.isfinite()
            n, value = int(known.sum()), math.nan
            before, after = before[known], after[known]
            # prompts that are all alike have no order
            if n >= FEWEST and bool(before.amin() < before.amax()) and bool(after.amin() < after.amax()):
                value = float(rank_correlation(before, after.unsqueeze(0)))
            sd = 1 / math.sqrt(n - 1) if n > 1 else math.nan
            counted = (n, len(known) - n) if value == value else (0, len(known))
            found.append(estimate((layer, point), "wgf.energy_rank", value, *counted, null=0.0, null_sd=sd, param=param))
        return found


def _energy(trajectory: Trajectory, k: int, one: Layer, count: int) -> Tensor:
    """log E (B,) of the layer of step k at its own cloud; nan where that is beyond the budget."""
    x = wide(trajectory.steps[k].before[:count])
    if weights_of_one(trajectory, k) > trajectory.budget:
        return x.new_full((count,), torch.nan)
    return one.total(x)
