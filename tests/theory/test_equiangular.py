"""Tokens at equal angles: real particles against the scalar equation, and its own closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from emformer.kernels import Softmax, Unnormalised
from emformer.theory.equiangular import cloud, crossing_time, layer_cosine, long_context, solve, speed
from emformer.theory.experiments.equiangular import Equiangular, _decoded_cosine, cloud_in_float
from emformer.theory.particles import idealised, simulate

N, D, BETA = 5, 8, 4.0


def modelled(motion: str, beta: float = BETA, dim: int = D):
    kernel = Unnormalised(beta=beta, clip=None) if motion == "usa" else Softmax(beta=beta)
    return idealised(dim, kernel=kernel, space="preln" if motion == "preln" else "sphere")


def cosines(x: torch.Tensor) -> torch.Tensor:
    """Of all pairs of one cloud."""
    theta = torch.nn.functional.normalize(x[0], dim=-1)
    i, j = torch.triu_indices(len(theta), len(theta), 1)
    return (theta @ theta.mT)[i, j]


@pytest.mark.parametrize("motion, rho", [*itertools.product(["sa", "usa", "preln"], [0.0, 0.5]), ("preln", -0.2)])
def test_particles_are_the_scalar_equation(motion, rho):
    """J17: n = 5, d = 8, beta = 4, t = 1, dt = .01, to 1e-8; USA as e^-beta times the field."""
    pace = math.exp(-BETA) if motion == "usa" else 1.0
    x = cloud(N, D, rho)
    if motion == "preln":
        x = 1.3 * x
    found = simulate(modelled(motion), x, [0, 0.4 * pace, pace], step=0.01 * pace)
    expected = solve(motion, N, BETA, rho, [0, 0.4, 1], radius=1.3 if motion == "preln" else 1.0)
    for y, gap, radius in zip(found.clouds, expected.gap, expected.radius, strict=True):
        assert (cosines(y) - (1 - gap)).abs().max() < 1e-8
        if motion == "preln":
            assert (y[0].norm(dim=-1) - radius).abs().max() < 1e-8
    assert expected.gap[-1] < expected.gap[0] or rho == -0.2


def test_the_equation_by_hand():
    """math E.1 as it is written, d rho/dt = -d(1 - rho)/dt, for several N: a wrong N in either shows."""
    for n in (2, 5, 33):
        for rho in (-0.02, 0.3, 0.9):
            top = 2 * math.exp(BETA * rho) * (1 - rho) * ((n - 1) * rho + 1)
            sa = top / (math.exp(BETA) + (n - 1) * math.exp(BETA * rho))
            assert (1 - rho) * speed(1 - rho, n, BETA) == pytest.approx(sa, rel=1e-12)
            assert (1 - rho) * speed(1 - rho, n, BETA, "usa") == pytest.approx(math.exp(-BETA) * top / n, rel=1e-12)
            assert (1 - rho) * speed(1 - rho, n, BETA, "preln", 3.0) == pytest.approx(sa / 3, rel=1e-12)


def test_an_equiangular_cloud_is_one():
    for rho in (-0.25, 0.0, 0.7, 1.0):
        x = cloud(N, D, rho, prompts=2)
        gram = x @ x.mT
        expected = torch.full((N, N), rho, dtype=torch.float64).fill_diagonal_(1.0)
        torch.testing.assert_close(gram, expected.expand(2, N, N), rtol=0, atol=1e-14)
    single = cloud_in_float(40, 0.5)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), cloud(40, 40, 0.5), rtol=0, atol=1e-7)


def test_rates_at_the_end():
    """2 for SA, 2 e^beta for USA, of particles; and t^-2 for Pre-LN."""
    for motion in ("sa", "usa"):
        pace = math.exp(-BETA) if motion == "usa" else 1.0
        found = simulate(modelled(motion), cloud(N, D, 0.9999), [0, pace, 2 * pace], step=0.05 * pace)
        gaps = [float(1 - cosines(x).mean()) for x in found.clouds]
        assert math.log(gaps[1] / gaps[2]) / pace == pytest.approx(2 / pace, rel=1e-3)
        times = np.linspace(0, 8, 9)
        late = solve(motion, N, BETA, 0.9999, times.tolist()).gap[4:]
        np.testing.assert_allclose(-np.diff(np.log(late)), 2, rtol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_pre_ln_closes_as_a_power(rho):
    """J20: exponent 2.00 +- .02 on [500, 2000], n = 5, beta = 1, r = 1 at the start: the equation, and the real Pre-LN block."""
    times = np.geomspace(500, 2000, 8)
    gap = solve("preln", N, 1.0, rho, [0, *times.tolist()]).gap[1:]
    assert -np.polyfit(np.log(times), np.log(gap), 1)[0] == pytest.approx(2, abs=0.02)
    x, begin, found = cloud(N, D, rho), 0.0, []
    for end in (*np.geomspace(1, 500, 14).tolist(), 1000.0, 2000.0):
        x = simulate(modelled("preln", 1.0), x, [0, end - begin], step=0.2 * max(1.0, begin)).clouds[-1]
        begin = end
        found.append(float(1 - cosines(x).mean()))
    assert math.log(found[-3] / found[-1]) / math.log(4) == pytest.approx(2, abs=0.02)
    assert found[-1] == pytest.approx(gap[-1], rel=1e-4)
    post = solve("sa", N, 1.0, rho, [0, 10, 20]).gap
    assert post[2] / post[1] == pytest.approx(math.exp(-20), rel=1e-3)  # no power


def test_two_tokens_wait():
    """Known to 1 %: 8.39, 194.1, 6886 at beta 4, 8, 12; the equation and, at beta 4, particles get there then."""
    for beta, known in ((4, 8.39), (8, 194.1), (12, 6886)):
        time = crossing_time(0.0, 0.9, beta)
        assert time == pytest.approx(known, rel=0.01)
        assert 1 - solve("sa", 2, beta, 0.0, [0, time]).gap[-1] == pytest.approx(0.9, abs=1e-7)
    time = crossing_time(0.0, 0.9, BETA)
    found = simulate(modelled("sa", dim=2), cloud(2, 2, 0.0), [0, time], step=0.1)
    assert float(cosines(found.clouds[-1])) == pytest.approx(0.9, abs=1e-5)
    for motion in ("sa", "usa"):
        time = crossing_time(-0.1, 0.99, 2.0, tokens=7, motion=motion)
        assert 1 - solve(motion, 7, 2.0, -0.1, [0, time]).gap[-1] == pytest.approx(0.99, abs=1e-8)
    assert crossing_time(0.3, 0.3, 2.0) == 0


def test_long_context():
    """.9999, .8000 and .5001 at N = 10,000 (rho = 1/2, beta = gamma log N), and the limits; through attention at N = 300."""
    count = 10_000
    for gamma, known, limit in ((1.0, 0.9999, 1.0), (2.0, 0.8, 0.8), (4.0, 0.5001, 0.5)):
        beta = gamma * math.log(count)
        assert layer_cosine(count, 0.5, beta) == pytest.approx(known, abs=6e-5)
        assert long_context(0.5, gamma) == pytest.approx(limit, abs=1e-12)
        huge = 10**60
        assert layer_cosine(huge, 0.5, gamma * math.log(huge)) == pytest.approx(limit, abs=1e-9)
    assert [long_context(0.2, gamma) for gamma in (1.2, 1.25, 1.3)] == pytest.approx([1, 0.8 / 1.6, 0.2])
    count = 300
    for gamma in (1.0, 2.0, 3.0):
        beta = gamma * math.log(count)
        x = cloud(count, count, 0.5)
        made = next(
            idealised(count, kernel=Softmax(beta=beta), space="flat").layer(0).flow(x, torch.arange(count), None, 0)
        ).update
        assert (cosines(made) - layer_cosine(count, 0.5, beta)).abs().max() < 1e-12
        assert _decoded_cosine(cloud_in_float(count, 0.5), beta) == pytest.approx(layer_cosine(count, 0.5, beta), abs=1e-5)


def test_the_most_that_tokens_can_part():
    """At rho = -1/(N - 1) they rest; under Pre-LN they grow meanwhile."""
    for motion in ("sa", "usa", "preln"):
        found = solve(motion, N, 1.0, -1 / (N - 1), [0, 1, 2])
        np.testing.assert_allclose(found.gap, 1 + 1 / (N - 1), rtol=1e-12)
        assert (found.radius[-1] > 1) == (motion == "preln")


def test_one_run_is_counted_once_a_time():
    """All pairs of equiangular tokens tell one number: n is of times, and not of pairs."""
    setting = Equiangular(step=0.1)
    assert setting._against_theory("sa", 0.5, [], {}).n == 21


def test_mistakes():
    with pytest.raises(ValueError, match="need as many dimensions, not 4"):
        cloud(5, 4, 0.0)
    for rho in (-0.26, 1.1):
        with pytest.raises(ValueError, match="lies in"):
            cloud(5, 8, rho)
    with pytest.raises(ValueError, match="do not move"):
        solve("sa", 5, 1.0, 1.0, [0, 1])
    for times in ([0], [0, 0], [1, 2]):
        with pytest.raises(ValueError, match="ascend from 0"):
            solve("sa", 5, 1.0, 0.5, times)
    with pytest.raises(ValueError, match="solve it"):
        crossing_time(0.0, 0.5, 1.0, motion="preln")
    for pair in ((0.5, 0.4), (0.0, 1.0), (-1.0, 0.5)):
        with pytest.raises(ValueError, match=r"there is no time|lies in"):
            crossing_time(*pair, 1.0)
