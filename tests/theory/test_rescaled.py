"""Rescaled tokens z = e^{-tV} x: against the tokens themselves, closed forms, and an integrator that is not ours."""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import Tensor

from emformer.kernels import L2, Softmax
from emformer.masks import Causal, Full
from emformer.theory import idealised, simulate, unit_vectors
from emformer.theory.limits import support
from emformer.theory.rescaled import patterns, rescaled

module = sys.modules[rescaled.__module__]  # the package has a function of this name


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_they_are_the_tokens_of_the_flow_in_space(seed):
    """V and M have nothing to do with each other, and V is not symmetric."""
    kernel, mask = [Softmax(beta=1.5), L2()][seed % 2], [Full(), Causal()][seed // 2 % 2]
    content = draw(3, 3, seed=seed) / 2
    model = idealised(3, draw(3, 3, seed=seed + 10), content, kernel, mask, space="flat")
    times = [0.0, 0.2, 0.5]
    x = unit_vectors(2, 7, 3, seed)
    plain, seen = (flow(model, x, times, step=0.02) for flow in (simulate, rescaled))
    for time, a, b in zip(times, plain.clouds, seen.clouds, strict=True):
        assert (a @ torch.linalg.matrix_exp(-time * content).mT - b).abs().max() < 1e-8
    last = seen.states[-1].read
    assert last is not None and (last - plain.clouds[-1]).abs().max() < 1e-8  # what they read is x
    for a, b in zip(patterns(plain), patterns(seen), strict=True):
        assert (a - b).abs().max() < 1e-8
    assert len(patterns(seen)) == 3 and torch.equal(patterns(seen)[1], seen.pattern(1))


def by_hand(time: float, z: np.ndarray, form: np.ndarray, content: np.ndarray) -> np.ndarray:
    """V sum_j P_ij (z_j - z_i), written out."""
    grow, out = expm(time * content), np.zeros_like(z)
    for i, one in enumerate(z):
        scores = np.array([one @ grow.T @ form @ grow @ other for other in z])
        weights = np.exp(scores - scores.max())
        out[i] = content @ ((weights / weights.sum()) @ (z - one))
    return out


def test_every_stage_has_its_own_weights_and_time():
    """The error against another integrator falls with the fourth power of the step."""
    form, content, z = draw(2, 2, seed=1), draw(2, 2, seed=2), draw(5, 2, seed=3)
    arguments = form.numpy(), content.numpy()
    exact = solve_ivp(
        lambda t, y: by_hand(t, y.reshape(5, 2), *arguments).ravel(), (0, 1), z.numpy().ravel(), "DOP853", rtol=1e-12, atol=1e-13
    ).y[:, -1]
    model = idealised(2, form, content, space="flat")

    def error(step: float, method) -> float:
        found = rescaled(model, z.unsqueeze(0), [0, 0.5, 1], step=step, method=method)
        return float((found.clouds[-1].flatten() - torch.from_numpy(exact)).abs().max())

    errors = [error(step, "rk4") for step in (0.25, 0.125, 0.0625)]
    assert errors[-1] < 1e-4
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(orders) > 3.7 and max(orders) < 4.4, (errors, orders)
    assert math.log2(error(0.05, "euler") / error(0.025, "euler")) == pytest.approx(1, abs=0.15)


def test_equal_weights_bring_all_to_the_mean():
    """M = 0: z_i = m + e^{-tV} (z_i(0) - m), in closed form."""
    content, z = draw(3, 3, seed=4), draw(2, 6, 3, seed=5)
    found = rescaled(idealised(3, 0.0, content, space="flat"), z, [0.0, 1.0, 2.0], step=0.1)
    mean = z.mean(1, keepdim=True)
    for time, cloud in zip((0.0, 1.0, 2.0), found.clouds, strict=True):
        assert (cloud - mean - (z - mean) @ torch.linalg.matrix_exp(-time * content).mT).abs().max() < 1e-4


def test_the_hull_never_grows_for_an_identity(seed):
    """V = I, M > 0, also where weights have become hard; what RK4 makes are convex combinations."""
    root, z = draw(3, 3, seed=seed), draw(2, 24, 3, seed=seed + 20)
    found = rescaled(idealised(3, root @ root.mT, space="flat"), z, [0.5 * k for k in range(17)], step=0.5)
    u = torch.nn.functional.normalize(draw(200, 3, seed=seed + 30), dim=-1)
    reach = torch.stack([support(cloud, u) for cloud in found.clouds])
    assert reach.diff(dim=0).max() < 2e-15 * float(z.norm(dim=-1).max())
    assert (reach[-1] < reach[0] - 1e-3).double().mean() > 0.5


def test_growth_is_cut_off_where_it_no_longer_matters(monkeypatch):
    """At t = 60 scores are e^120; cut at e^80 they choose the same tokens. Uncut, they would overflow at 355."""
    model, z = idealised(2, space="flat"), draw(3, 12, 2, seed=6)
    cut = rescaled(model, z, [0.0, 30.0, 60.0], step=0.8)
    monkeypatch.setattr(module, "GROWTH", 300.0)
    whole = rescaled(model, z, [0.0, 30.0, 60.0], step=0.8)
    far, near = (one.states[-1].read for one in (whole, cut))
    assert far is not None and near is not None and far.abs().max() > 1e20 > near.abs().max()
    assert (whole.clouds[-1] - cut.clouds[-1]).abs().max() < 1e-12
    means = [patterns(one)[-1][:, 0] @ one.clouds[-1] for one in (whole, cut)]
    assert (means[0] - means[1]).abs().max() < 1e-12


def test_a_trajectory_like_any_other():
    told = []
    model, z = idealised(2, draw(2, 2), space="flat"), draw(2, 5, 2, seed=7)
    found = rescaled(model, z, [0.0, 0.2, 1.0], tell=told.append)
    assert told[-1] == 1.0 and told == sorted(told)
    assert found.epsilon == pytest.approx((0.2, 0.8)) and found.model is model
    for k, step in enumerate(found.steps):
        assert (step.before + found.epsilon[k] * step.update - step.after).abs().max() < 1e-14
    found.assert_closure()


@pytest.mark.parametrize(
    "model", [idealised(2), idealised(2, heads=2, space="flat"), idealised(2, space="preln")], ids=["sphere", "heads", "norm"]
)
def test_refuses_what_has_no_such_tokens(model):
    with pytest.raises(ValueError, match="one head"):
        rescaled(model, draw(1, 3, 2), [0.0, 1.0])


def test_says_when_it_is_no_longer_finite():
    with pytest.raises(ArithmeticError, match="finite"):
        rescaled(idealised(1, -1.0, -40.0, space="flat"), draw(1, 4, 1), [0.0, 10.0, 400.0])
