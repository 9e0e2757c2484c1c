"""Paths of tokens: lines, circles and random walks, whose speed, bend and length are known, and splits that must add up."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from emformer.geometry.paths import (
    angle,
    angular_speed,
    autocorrelation,
    cosine,
    direction,
    head_cancellation,
    head_shares,
    interference,
    interference_kind,
    path,
    permuted_turning,
    random_tortuosity,
    sphere_path,
    split,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def real(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(found: Tensor, expected: float, tolerance: float = 1e-10) -> bool:
    """Everywhere, nan nowhere."""
    return bool(((found - expected).abs() < tolerance).all())


def walk(steps: Tensor) -> Tensor:
    """States from steps (T, ..., d), starting anywhere."""
    start = normal(*steps.shape[1:])
    return torch.cat([start[None], start + steps.cumsum(0)])


def circle(count: int, radius: float, turns: float = 1.0) -> Tensor:
    """`count` + 1 states on a circle in a random plane of R^7, shape (count + 1, 1, 1, 7)."""
    plane = torch.linalg.qr(normal(7, 2)).Q
    phase = torch.arange(count + 1, dtype=torch.float64) * (2 * math.pi * turns / count)
    return (radius * torch.stack([phase.cos(), phase.sin()], -1) @ plane.mT).view(-1, 1, 1, 7)


def test_straight_line(seed):
    heading = normal(2, 3, 16)
    found = path(walk(heading * (torch.rand(9, 1, 1, 1, dtype=torch.float64) + 0.1)))
    assert found.turning.max() < 1e-7
    assert near(found.tortuosity, 1)
    torch.testing.assert_close(found.length, found.chord, atol=1e-10, rtol=0)
    back = path(walk(torch.stack([heading, -2 * heading])))
    assert near(back.turning, math.pi, 1e-7)
    assert near(back.tortuosity, 3.0)


def test_circle(seed):
    states = circle(100, radius=2)
    found = path(states)
    assert (found.curvature - 0.5).abs().max() < 1e-3
    assert near(found.turning, 2 * math.pi / 100)
    assert near(found.speed, 4 * math.sin(math.pi / 100), 1e-12)
    torch.testing.assert_close(found.relative, found.speed / 2, atol=1e-12, rtol=0)
    assert found.tortuosity.isnan().all(), "a closed path has no chord to compare its length with"
    assert found.chord.max() < 1e-12
    half = path(circle(50, radius=2, turns=0.5))
    assert float(half.tortuosity) == pytest.approx(50 * math.sin(math.pi / 100), abs=1e-10)
    assert near(autocorrelation(states, 25), 0)
    assert near(autocorrelation(states, 50), -1)


def test_angle_is_accurate_at_both_ends():
    for size in (1e-12, 1e-9, 1e-6, 1e-3, 1.0):
        for base in (0.0, math.pi):
            u = real([3.0, 0, 0])
            v = real([math.cos(base) * math.cos(size), math.sin(size), 0]) * 1e-3
            expected = size if base == 0 else math.pi - size
            assert float(angle(u, v)) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_random_walk(seed):
    """The null of tortuosity, measured on steps and drawn without them."""
    units = direction(normal(12, 8, 100, 128))
    states = walk(units)
    found = path(states)
    assert found.tortuosity.mean() == pytest.approx(3.49, abs=0.05)
    assert found.tortuosity.std() == pytest.approx(0.21, abs=0.03)
    assert found.turning.mean() == pytest.approx(math.pi / 2, abs=0.005)
    assert found.turning.cos().std() == pytest.approx(1 / math.sqrt(128), rel=0.05)
    assert autocorrelation(states, 5).mean().abs() < 0.005
    drawn = random_tortuosity(found.speed, 128, draws=2, seed=seed)
    assert drawn.shape == (2, 8, 100)
    assert ks_2samp(drawn.flatten(), found.tortuosity.flatten()).pvalue > 1e-3


def test_random_tortuosity_has_the_law_of_random_steps():
    torch.manual_seed(0)
    for dim, sizes in ((1, [1.0, 2.0, 0.5]), (2, [1.0, 2.0, 0.5, 3.0]), (5, [0.1, 4.0, 4.0]), (3, [2.0])):
        speed = real(sizes).view(-1, 1, 1).expand(-1, 40, 50)
        drawn = random_tortuosity(speed, dim, draws=2, seed=1)
        shown = path(walk(direction(normal(len(sizes), 40, 100, dim)) * speed[:, :1, :1].unsqueeze(-1))).tortuosity
        assert ks_2samp(drawn.flatten().numpy().round(9), shown.flatten().numpy().round(9)).pvalue > 1e-3, dim
        assert (drawn >= 1 - 1e-12).all()
    assert torch.equal(drawn, random_tortuosity(speed, dim, draws=2, seed=1))


def test_permuted_turning(seed):
    states = walk(normal(4, 2, 3, 6) * torch.rand(4, 1, 3, 1, dtype=torch.float64))
    steps = states.diff(dim=0)
    orders = [path(walk(steps[list(order)])) for order in permutations(range(4))]
    found = permuted_turning(states, draws=4000, seed=seed)
    torch.testing.assert_close(found.expected, torch.stack([p.turning.mean(0) for p in orders]).mean(0), atol=1e-7, rtol=0)
    means = torch.stack([p.turning.mean(0) for p in orders])
    assert (found.draws.mean(0) - found.expected).abs().max() < 0.05
    assert (found.draws.std(0) / means.std(0, correction=0) - 1).abs().max() < 0.1
    nearest = (found.draws[:50, None] - means[None]).abs().amin(1)
    assert nearest.max() < 1e-7, "each draw is one of the orders"
    for shuffled in orders:
        torch.testing.assert_close(shuffled.tortuosity, orders[0].tortuosity)


def test_sphere_path():
    quarter = circle(30, radius=5, turns=0.25)
    found = sphere_path(quarter)
    assert float(found.length) == pytest.approx(math.pi / 2, abs=1e-10)
    assert float(found.chord) == pytest.approx(math.pi / 2, abs=1e-10)
    assert float(found.tortuosity) == pytest.approx(1, abs=1e-10)
    assert float(sphere_path(circle(30, 5, turns=0.75)).tortuosity) == pytest.approx(3, abs=1e-10)
    assert sphere_path(circle(30, 5)).tortuosity.isnan().all()
    sizes = torch.rand(31, 1, 1, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(angular_speed(quarter * sizes), found.speed)
    torch.manual_seed(0)
    states = normal(5, 2, 3, 8)
    normed = torch.nn.functional.layer_norm(states, (8,), eps=0.0)
    torch.testing.assert_close(angular_speed(states + 3.7, centred=True), angle(normed[:-1], normed[1:]))
    assert (sphere_path(states).tortuosity >= 1).all()


def test_split_adds_up(seed):
    for scale in (1e-6, 1.0, 1e3):
        x, update = normal(4, 9, 24) + 0.3, normal(4, 9, 24) * scale
        for centred in (False, True):
            parts = split(x, update, centred)
            whole = update.square().sum(-1)
            total = parts.mean.square() + parts.radial.square() + parts.tangential.square()
            torch.testing.assert_close(total, whole, rtol=1e-10, atol=0)
            torch.testing.assert_close(parts.invisible, 1 - parts.tangential.square() / whole, rtol=0, atol=1e-10)
            step = 1e-5 / scale
            turned = angle(direction(x, centred), direction(x + step * update, centred)) / step
            torch.testing.assert_close(turned, parts.tangential * parts.mobility, rtol=1e-3, atol=0)
        c = interference(x, update)
        size, length = x.norm(dim=-1), update.norm(dim=-1)
        torch.testing.assert_close(
            (x + update).square().sum(-1), size**2 + length**2 + 2 * c * size * length, rtol=1e-10, atol=1e-10
        )


def test_what_a_norm_cannot_see():
    torch.manual_seed(0)
    x = normal(2, 5, 12)
    assert split(x, 3 * x, False).tangential.max() < 1e-12
    assert (split(x, 3 * x, False).radial - 3 * x.norm(dim=-1)).abs().max() < 1e-12
    shifted = split(x, torch.full_like(x, 2.0), True)
    assert near(shifted.invisible, 1)
    assert near(shifted.mean, 2 * math.sqrt(12))
    d = 16
    x, update = normal(40, 500, d), normal(40, 500, d)
    for centred, null in ((False, 1 / d), (True, 2 / d)):
        assert split(x, update, centred).invisible.mean() == pytest.approx(null, rel=0.03)


def test_interference_kinds():
    torch.manual_seed(0)
    d = 400
    c = interference(normal(20, 500, d), normal(20, 500, d))
    assert c.std() == pytest.approx(1 / math.sqrt(d), rel=0.03)
    kind = interference_kind(c, d)
    for value, share in ((1, 0.0228), (-1, 0.0228), (0, 0.9545)):
        assert (kind == value).double().mean() == pytest.approx(share, abs=0.006)
    given = real([0.11, -0.11, 0.1, 0.0, math.nan])
    torch.testing.assert_close(interference_kind(given, d), real([1.0, -1, 0, 0, math.nan]), equal_nan=True)
    e = normal(3, 7)
    assert near(cosine(e, -2 * e), -1)


def test_heads(seed):
    heads, drift = normal(3, 5, 4, 10), normal(10)
    for constant in (0.0, drift, normal(3, 4, 10)):
        shares = head_shares(heads, constant)
        assert shares.shape == (3, 6, 4)
        assert near(shares.sum(1), 1)
        update = heads.sum(1) + constant
        expected = torch.einsum("bnd,bnd->bn", heads[:, 2], update) / update.square().sum(-1)
        torch.testing.assert_close(shares[:, 2], expected)
    assert not head_shares(heads)[:, -1].any()
    same = heads[:, :1].expand(-1, 5, -1, -1) * torch.rand(1, 5, 1, 1, dtype=torch.float64)
    assert head_cancellation(same).max() < 1e-12
    opposed = torch.cat([heads, -heads], 1)
    assert near(head_cancellation(opposed), 1)
    many = direction(normal(40, 4, 100, 256))
    assert head_cancellation(many).mean() == pytest.approx(1 - 1 / math.sqrt(4), abs=0.01)


def test_sequences_stacks_and_types_agree():
    torch.manual_seed(0)
    states = normal(6, 2, 3, 8)
    for one, other in zip(path(states), path(list(states)), strict=True):
        assert torch.equal(one, other)
    narrow = path(states.float())
    assert all(x.dtype == torch.float64 for x in narrow)
    torch.testing.assert_close(narrow.tortuosity, path(states).tortuosity, rtol=1e-5, atol=0)
    speeds = [(b - a).norm(dim=-1) for a, b in pairwise(states)]
    torch.testing.assert_close(path(states).speed, torch.stack(speeds))
    assert path(states[:2]).turning.shape == (0, 2, 3)
    assert near(path(states[:2]).tortuosity, 1)
    assert path(states[:, 0, 0]).length.shape == ()


def test_undefined_is_nan_and_nothing_else():
    """A token that stands still, one at the origin, one constant over features: nan where something is missing, only there."""
    torch.manual_seed(0)
    states = normal(5, 1, 4, 8)
    states[:, 0, 0] = states[0, 0, 0]  # still
    states[2, 0, 1] = 0
    states[:, 0, 2] = real([1.0, 2, 4, 7, 9])[:, None]  # constant over features
    found = path(states)
    assert not found.speed[:, 0, 0].any()
    assert not found.length[0, 0]
    assert found.turning[:, 0, 0].isnan().all()
    assert found.tortuosity.isnan().tolist() == [[True, False, False, False]]
    assert found.relative.isnan().nonzero().tolist() == [[2, 0, 1]]
    assert angular_speed(states).isnan().sum((0, 1)).tolist() == [0, 2, 0, 0]
    assert angular_speed(states, centred=True).isnan().sum((0, 1)).tolist() == [0, 2, 4, 0]
    assert autocorrelation(states).isnan().sum((0, 1)).tolist() == [3, 0, 0, 0]
    sphere = sphere_path(states)
    assert sphere.speed[:, 0, 0].max() == 0
    assert sphere.tortuosity.isnan().tolist() == [[True, True, True, False]]
    assert permuted_turning(states, 3, 0).expected.isnan().tolist() == [[True, False, False, False]]
    assert random_tortuosity(found.speed, 8, 3, 0).isnan().sum((0, 1)).tolist() == [3, 0, 0, 0]
    assert random_tortuosity(found.speed, 8, 3, 0)[:, 0, 1:].isfinite().all()
    update = states.diff(dim=0)[1]  # token 1 goes to the origin, so its update is not 0
    assert interference(states[2], update).isnan().tolist() == [[True, True, False, False]]
    parts = split(states[2], update, True)
    assert parts.invisible.isnan().tolist() == [[True, True, True, False]]
    assert parts.tangential.isnan().tolist() == [[False, True, True, False]]
    assert parts.mobility.isnan().tolist() == [[False, True, True, False]]
    for values in (*found, *sphere, *parts):
        assert not values.isinf().any()
    flat = path(torch.full((4, 2, 1, 8), 3.0))
    assert all(not x.isinf().any() for x in flat)
    assert flat.tortuosity.isnan().all()
    heads = torch.zeros(1, 3, 2, 8)
    assert head_cancellation(heads).isnan().all()
    assert head_shares(heads).isnan().all()
    assert not head_shares(heads, torch.ones(8)).isnan().any()


def test_a_constant_token_is_undefined_up_to_rounding():
    constants = torch.arange(1, 40).double().view(-1, 1, 1) / 7
    odd = (torch.arange(100) % 2).double()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        eps = torch.finfo(dtype).eps
        for wiggle in (0.0, eps):
            token = (constants * (1 + wiggle * odd)).to(dtype)
            assert direction(token, centred=True).isnan().all()
            assert direction(token).isfinite().all()
        assert direction((constants * (1 + 40 * eps * odd)).to(dtype), centred=True).isfinite().all()


def test_mistakes():
    states = normal(4, 2, 3, 8)
    for call in (path, sphere_path, lambda s: permuted_turning(s, 1, 0)):
        with pytest.raises(ValueError, match="at least 2 states, not 1"):
            call(states[:1])
    for lag in (0, 3):
        with pytest.raises(ValueError, match=f"no two steps {lag} apart"):
            autocorrelation(states, lag)
    assert autocorrelation(states, 2).shape == (1, 2, 3)


def test_no_global_generator_moves():
    states = normal(4, 2, 3, 8)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    random_tortuosity(path(states).speed, 8, 5, 3)
    permuted_turning(states, 5, 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
