"""Straight lines through points."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Line(NamedTuple):
    """y = intercept + slope x; `error` is the slope's standard error for independent residuals of one variance, nan of two
    points."""

    slope: float
    error: float
    intercept: float


def line(x: np.ndarray, y: np.ndarray) -> Line:
    """The least-squares line through points (x, y), (n,) each. All nan for fewer than two different x.

    By sums: what LAPACK's least squares give in the last digits depends on where in memory their input lies, and the same numbers
    shall give the same bits.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 2 or not x.min() < x.max():
        return Line(math.nan, math.nan, math.nan)
    across = x - x.mean()
    square = float((across * across).sum())
    slope = float((across * (y - y.mean())).sum()) / square
    intercept = float(y.mean()) - slope * float(x.mean())
    left = y - intercept - slope * x
    error = math.sqrt(float((left * left).sum()) / (len(x) - 2) / square) if len(x) > 2 else math.nan
    return Line(slope, error, intercept)
