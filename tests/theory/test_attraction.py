"""What the experiments on the sphere, the circle, equal angles and long steps say of small cases that are known."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from emformer.parts import UserError
from emformer.theory.experiments.ascent import Ascent, Climb, _down
from emformer.theory.experiments.circle import Circle, polygon_rate
from emformer.theory.experiments.equiangular import Equiangular
from emformer.theory.experiments.sphere import Sphere, in_hemisphere
from emformer.theory.particles import unit_vectors


def test_a_hemisphere_is_found_or_is_not_there():
    axes = torch.eye(3, dtype=torch.float64)
    assert in_hemisphere(axes)
    assert not in_hemisphere(torch.cat([axes, -axes]))
    assert not in_hemisphere(torch.cat([axes, -torch.ones(1, 3).double()]))  # 0 is inside their hull
    assert in_hemisphere(torch.cat([axes, torch.tensor([[-1.0, -1.0, 0.01]]).double()])[1:])
    assert all(in_hemisphere(x) for x in unit_vectors(20, 6, 6))  # d >= N
    assert sum(in_hemisphere(x) for x in unit_vectors(40, 30, 3)) == 0  # chance 1e-6 each


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("beta", [-1.5, -0.4, 1.0])
def test_the_rate_of_a_polygon_is_that_of_the_equation(count, beta):
    """Against the derivative of the angles' equation in each angle, by autograd; of three tokens by hand too."""
    rest = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count

    def turning(angles: torch.Tensor) -> torch.Tensor:
        apart = angles - angles.unsqueeze(1)
        weights = (beta * apart.cos()).softmax(-1)
        return (weights * apart.sin()).sum(-1)

    values = torch.linalg.eigvals(torch.func.jacrev(turning)(rest)).real.sort().values
    leaving = values[values.abs() > 1e-12] if count > 2 else values  # turning all together costs nothing
    assert polygon_rate(count, beta) == pytest.approx(float(leaving.max()), rel=1e-9)
    if count == 3:
        side = math.exp(-beta / 2)
        by_hand = 3 * side * (1 / 2 + 3 * beta / 4) / (math.exp(beta) + 2 * side)
        assert polygon_rate(3, beta) == pytest.approx(by_hand, rel=1e-12)
        assert polygon_rate(3, -2 / 3) == pytest.approx(0, abs=1e-14)


def test_the_triangle_is_pushed_and_returns():
    """All that the experiment claims of it, small: rates, signs, and starts that gather."""
    setting = Circle(tokens=(3,), betas=(1.0,), pushed=(-1.0, -0.3), seeds=2, time=15.0)
    outcome = setting.run(lambda share, word: None)
    rates = [s for s in outcome.statements if "at the rate" in s.claim]
    assert [np.sign(s.measured) for s in rates] == [-1, 1]
    assert all(s.held for s in outcome.statements)


def test_shares_of_the_theorem():
    """Every run climbs, however long its steps; the instrument sees the falls of the others."""
    setting = Ascent(tokens=8, dim=4, steps=(1.0, 100.0), betas=(1.0,), count=10, seeds=2, depth=6)
    theorem = [*setting._theorem(), *setting._lengths(), *setting._module()]
    assert len(theorem) == 6 and all(s.held for s in theorem)
    seen = setting._repulsion()
    assert seen[0].held and seen[1].measured > 0.1


def test_what_a_seed_draws_is_independent():
    """Operators, tokens and lengths of 200 seeds, number by number: all correlations are those of chance."""
    draws = [Ascent()._draw(seed) for seed in range(200)]
    drawn = torch.stack(
        [
            torch.cat(
                [one.matrices["general"].flatten(), one.other.flatten(), one.x[0, :8].flatten(), one.lengths.log().flatten()]
            )
            for one in draws
        ]
    )
    correlations = torch.corrcoef(drawn.mT).fill_diagonal_(0.0)
    assert correlations.abs().max() < 6.5 / math.sqrt(200)  # of 21,000 pairs one in 5e5 chances passes
    for one in draws:
        assert (torch.nn.functional.normalize(one.matrices["general"], dim=-1) - one.x[0, :8]).abs().max() > 0.1


def test_one_seed_is_one_run_whichever_comes_first():
    """The second of seeds that begin at 0 is the first of those that begin at 1."""
    runs = [Ascent(count=3, seed=first)._climb(1, 0.1, "general", "own") for first in (0, 1)]
    assert torch.equal(runs[0].logs, runs[1].logs)
    assert list(Ascent(seed=1, seeds=2)._seeds()) == [1, 2]


def test_errors_are_between_seeds():
    """Twice the same runs of each seed tell nothing more; the ratio of sums has the error of many repetitions."""

    def run(*change: float) -> Climb:
        return Climb(torch.tensor([0.0, *np.cumsum(change)], dtype=torch.float64), cast(Any, None))

    up, half = run(1.0, 1.0, 1.0, 1.0), run(1.0, -1.0, 3.0, -1.0)
    share, ratio = _down([[up], [half], [half]])
    assert share.value == pytest.approx(1 / 3) and share.error == pytest.approx(np.std([0, 0.5, 0.5], ddof=1) / math.sqrt(3))
    assert ratio.value == pytest.approx(4 / 16)
    again = _down([[up, up], [half, half], [half, half]])
    assert again[0] == pytest.approx(share) and again[1] == pytest.approx(ratio)
    generator = np.random.default_rng(0)

    def ratio_of_30() -> Any:
        return _down([[run(*generator.normal(0.3, 1.0, 20) * generator.uniform(0.2, 2))] for _ in range(30)])[1]

    found = [ratio_of_30() for _ in range(300)]
    spread = np.std([one.value for one in found], ddof=1)
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sphere(dim=2),
        lambda: Sphere(betas=[]),
        lambda: Sphere(betas=[1.0, -1.0]),
        lambda: Sphere(time=5.0),
        lambda: Circle(pushed=[-0.666]),
        lambda: Circle(tokens=[1]),
        lambda: Equiangular(tokens=9, dim=8),
        lambda: Equiangular(cosines=[1.0]),
        lambda: Equiangular(late=(50.0, 20.0)),
        lambda: Ascent(steps=[]),
        lambda: Ascent(betas=[0.0]),
        lambda: Ascent(count=1),
    ],
)
def test_settings_that_make_no_sense_are_told_in_a_sentence(make):
    with pytest.raises(UserError, match="choose"):
        make()
