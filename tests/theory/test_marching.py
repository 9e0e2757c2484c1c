"""Steps that are chosen, and starts that run together, change nothing but the cost."""

import math
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from emformer.kernels import Softmax, Unnormalised
from emformer.masks import Causal
from emformer.theory import idealised, marching, simulate, unit_vectors
from emformer.theory.ensembles import ensemble
from emformer.theory.marching import crossing, march
from emformer.trajectory import Trajectory


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def meeting(beta: float, start: float, end: float) -> float:
    """The time of two tokens under softmax from one cosine to another (math E.1)."""
    return quad(lambda rho: (1 + math.exp(beta * (1 - rho))) / (2 * (1 - rho**2)), start, end, epsrel=1e-12)[0]


def cosine(cloud: Tensor) -> float:
    return float(cloud[0] @ cloud[1] / cloud[0].norm() / cloud[1].norm())


def test_marching_is_simulating():
    model, x = idealised(3, kernel=Softmax(beta=4.0)), unit_vectors(2, 8, 3)
    times = [0.0, 0.5, 1.0, 2.0]
    plain = simulate(model, x, times, step=0.05)
    found, miss = march(model, x, times, tolerance=1e-7, step=0.8)
    assert max(float((a - b).abs().max()) for a, b in zip(plain.clouds, found.clouds, strict=True)) < 1e-6
    assert 0 < miss < 3e-7
    assert found.epsilon == plain.epsilon and [step.layer for step in found.steps] == [0, 1, 2]
    assert (found.pattern(2) - plain.pattern(2)).abs().max() < 1e-6


def test_steps_grow_while_nothing_moves():
    """Two tokens at beta 10 wait for a time of e^10/20; the first 100 of it in steps of 0.05 would be 8,000 calls."""
    calls = []
    model = idealised(2, kernel=Softmax(beta=10.0))
    model.layer(0).attention.kernel.register_forward_pre_hook(lambda *_: calls.append(1))
    times = [0.0, *(0.5 * 1.4**k for k in range(17))]
    found, _ = march(model, torch.eye(2, dtype=torch.float64).unsqueeze(0), times)
    assert times[-1] > 100 and 100 < len(calls) < 1000
    assert cosine(found.clouds[-1][0]) == pytest.approx(_after(10.0, times[-1]), abs=1e-8)


def _after(beta: float, time: float) -> float:
    """The cosine of two tokens at a right angle after this time, by bisection of the closed form."""
    low, high = 0.0, 0.9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if meeting(beta, 0, middle) < time else (low, middle)
    return low


def test_a_step_that_is_unstable_is_found_out():
    """USA at beta 3 acts at rates of e^3: a step of 2 overflows, and shrinks until it does well."""
    model = idealised(3, kernel=Unnormalised(beta=3.0, clip=None))
    x = unit_vectors(1, 6, 3)
    found, _ = march(model, x, [0.0, 0.05, 0.2], step=2.0, tolerance=1e-7)
    assert (found.clouds[-1] - simulate(model, x, [0.0, 0.2], step=2e-3).clouds[-1]).abs().max() < 1e-6


def test_what_cannot_be_met_is_said(monkeypatch):
    model, x = idealised(3), unit_vectors(1, 4, 3)
    monkeypatch.setattr(marching, "SHORTEST", 0.01)
    with pytest.raises(ArithmeticError, match="still err"):
        march(idealised(3, content=5.0), x, [0.0, 0.2], tolerance=1e-14)
    with pytest.raises(ArithmeticError, match="is rounded by 3e-15; allow more than 1e-16"):
        march(model, x, [0.0, 0.2], tolerance=1e-16)
    with pytest.raises(ValueError, match="tolerance"):
        march(model, x, [0.0, 1.0], tolerance=0.0)
    with pytest.raises(ValueError, match="ascend"):
        march(model, x, [0.0, 1.0, 0.5])


def test_below_rounding_a_tolerance_is_refused():
    model, x = idealised(3, dtype=torch.float32), unit_vectors(1, 5, 3, dtype=torch.float32)
    with pytest.raises(ArithmeticError, match="at time 0 the cloud is rounded by"):
        march(model, x, [0.0, 0.5, 1.0])
    found = march(model, x, [0.0, 0.5, 1.0], tolerance=1e-5).trajectory
    assert found.clouds[-1].dtype == torch.float32
    with pytest.raises(ArithmeticError, match=r"at time 0\.5 the cloud is rounded by"):  # in R^d it grows
        march(idealised(3, content=4.0, dtype=torch.float32, space="flat"), x, [0.0, 0.5, 0.6], tolerance=4e-6)


def test_what_halving_does_not_improve_is_given_up(monkeypatch):
    """Steps whose rounding is above the tolerance, and does not fall: a few are tried, and not all down to 1e-6."""
    generator, tried = torch.Generator().manual_seed(0), []

    def rounded(model, x, times, step):
        tried.append(step)
        found = simulate(model, x, times, step=0.1)
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        return Trajectory([found.steps[0]._replace(after=found.clouds[-1] + 1e-13 * noise)], model=model)

    monkeypatch.setattr(marching, "simulate", rounded)
    with pytest.raises(ArithmeticError, match="still err"):
        march(idealised(3), unit_vectors(1, 5, 3), [0.0, 0.1], tolerance=2e-14)
    assert 3 <= len(tried) <= 8


def test_misses_add_up():
    """Of steps that neither grow nor shrink, interval by interval."""
    model, x = idealised(3, kernel=Softmax(beta=4.0)), unit_vectors(1, 8, 3)
    whole = march(model, x, [0.0, 0.5, 1.0, 2.0], step=0.1, longest=0.1, tolerance=1e-3)
    alone = []
    for before, gap in zip(whole.trajectory.clouds, whole.trajectory.epsilon, strict=False):
        alone.append(march(model, before, [0.0, gap], step=0.1, longest=0.1, tolerance=1e-3).miss)
    assert min(alone) > 0 and whole.miss == pytest.approx(sum(alone), rel=1e-6)


def test_a_state_at_the_level_has_reached_it():
    """Following the flow again with other steps ends a hair below or above the state that was recorded."""
    model, x = idealised(2, kernel=Softmax(beta=4.0)), torch.eye(2, dtype=torch.float64).unsqueeze(0)
    found, _ = march(model, x, [0.0, 1.0, 2.0, 4.0, 6.0, 8.0], tolerance=1e-3)
    for time, cloud in zip((1.0, 2.0, 4.0, 6.0, 8.0), found.clouds[1:], strict=True):
        assert crossing(found, cosine, cosine(cloud[0])) == pytest.approx(time, abs=0.02)


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_the_time_of_a_crossing(beta):
    """Coarse times tell a fine one: the closed form of two tokens."""
    found = simulate(
        idealised(2, kernel=Softmax(beta=beta)), torch.eye(2, dtype=torch.float64).unsqueeze(0), [0.0, 2.0, 8.0], step=0.2
    )
    assert crossing(found, cosine, 0.9) == pytest.approx(meeting(beta, 0, 0.9), abs=1e-3)
    assert crossing(found, cosine, -0.5) == 0.0
    assert math.isnan(crossing(found, cosine, 1.1))


def test_each_start_has_its_own_form():
    """Together as one by one, patterns included; nothing of the others is left in a trajectory."""
    forms, x = draw(3, 4, 4), unit_vectors(3, 6, 4)
    parts: dict[str, Any] = {"mask": Causal(), "kernel": Softmax(beta=2.0), "content": draw(4, 4, seed=9)}
    times = [0.0, 0.1, 0.3]
    for form, cloud, one in zip(forms, x, ensemble(forms, x, times, **parts), strict=True):
        alone = simulate(idealised(4, form, **parts), cloud.unsqueeze(0), times)
        assert (one.clouds[-1] - alone.clouds[-1]).abs().max() < 1e-12
        a, b = one.steps[1].mixture, alone.steps[1].mixture
        assert a is not None and b is not None and (a - b).abs().max() < 1e-12
        assert (one.pattern(1) - alone.pattern(1)).abs().max() < 1e-12
        assert one.epsilon == alone.epsilon and one.prompts == 1 and not one.block(0).attention.positions


def test_an_ensemble_may_march():
    forms, x = 4 * torch.eye(3, dtype=torch.float64).expand(2, 3, 3), unit_vectors(2, 6, 3)
    plain, marched = (ensemble(forms, x, [0.0, 0.5, 1.5], step=0.05, tolerance=some) for some in (None, 1e-8))
    assert (plain[1].clouds[-1] - marched[1].clouds[-1]).abs().max() < 1e-7


@pytest.mark.parametrize("count", [1, 4])
def test_each_cloud_needs_a_form(count):
    with pytest.raises(ValueError, match=f"there are {count} forms for 2 clouds"):
        ensemble(draw(count, 3, 3), unit_vectors(2, 5, 3), [0.0, 0.5])
