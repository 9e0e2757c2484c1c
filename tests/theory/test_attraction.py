"""What the experiments on the sphere, the circle, equal angles and long steps say of small cases that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from emformer.parts import UserError
from emformer.theory.experiments.ascent import Ascent
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
