"""A test by sign flips: whether values that chance would give either sign have more of one."""

from __future__ import annotations

import itertools
import math

import numpy as np

EXACT = 12  # values of which all signs are gone through
FLIPS = 4096
STREAM = 31  # sets these random numbers apart from others of the seed


def flips(values: np.ndarray, seed: int = 0) -> float:
    """p of a sum at least as large if each value (n,) had either sign with equal chance. Null: uniform, at least 2^-n.

    Exact for few, else from random signs, which no p below 1/4097 comes from. What is not finite is left out; nan for nothing.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return math.nan
    least = known.sum() - 1e-12
    if len(known) <= EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=len(known))))
        return float(np.mean(signs @ known >= least))
    signs = np.random.default_rng((STREAM, seed)).choice((1, -1), size=(FLIPS, len(known)))
    return float((1 + np.sum(signs @ known >= least)) / (1 + FLIPS))
