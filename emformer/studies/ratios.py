"""Statistics of a study whose numbers are costs in nats: how many times one is the other, as a logarithm."""

from __future__ import annotations

import math

import numpy as np

ROUNDING = 1e-12  # nats: what a KL of float64 may be though nothing has changed


def log_ratio(means: np.ndarray) -> np.ndarray:
    """log of the second column over the first, (R, 2) -> (R,); nan where both are rounding."""
    log = np.log(np.maximum(means, ROUNDING))
    return np.where(means.max(1) > ROUNDING, log[:, 1] - log[:, 0], math.nan)


def log_difference(means: np.ndarray) -> np.ndarray:
    """(R, 4) -> (R,): `log_ratio` of the first two columns less that of the others."""
    return log_ratio(means[:, :2]) - log_ratio(means[:, 2:])
