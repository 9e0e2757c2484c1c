"""Lines through points, against scipy, and bit by bit wherever the points lie in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import linregress

from emformer.geometry.lines import line


@pytest.mark.parametrize("count", [3, 10, 1000])
def test_it_is_the_least_squares_line(count):
    draw = np.random.default_rng(count)
    x = draw.normal(size=count) + 100
    y = 3 * x + draw.normal(size=count)
    found, known = line(x, y), linregress(x, y)
    assert found.slope == pytest.approx(known.slope, rel=1e-9) and found.error == pytest.approx(known.stderr, rel=1e-9)
    assert found.intercept == pytest.approx(known.intercept, rel=1e-6)


def test_where_the_points_lie_changes_no_bit():
    x, y = np.random.default_rng(0).normal(size=(2, 257))
    raw = np.empty(8 * 258, dtype=np.uint8)
    for shift in range(8):
        moved = raw[shift : shift + 8 * 257].view(float)
        moved[:] = x
        assert line(moved, y) == line(x, y)


def test_few_points():
    assert line(np.array([1.0, 3.0]), np.array([2.0, 6.0]))[::2] == (2.0, 0.0)
    assert math.isnan(line(np.array([1.0, 3.0]), np.array([2.0, 6.0])).error)
    assert all(map(math.isnan, line(np.ones(4), np.arange(4.0)))) and all(map(math.isnan, line(np.ones(1), np.ones(1))))
