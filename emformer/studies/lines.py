"""Lines of a study: many values at each point, of which the mean is drawn, and what trend they have over the layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from emformer.intervals import FEWEST, LEVEL, Interval, over_models
from emformer.studies.subjects import Subject

LAYERS = 3  # that a trend takes: two are in order whatever they are
ENUMERATED = 7  # layers whose orders are all gone through; of more so many random ones
STREAM = 37  # sets these random numbers apart from others


def points(panel: str, line: str, x: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    """Rows of all values (P, K) at x (K,), some of which may be equal: of heads in one layer, say."""
    return pd.DataFrame({"panel": panel, "line": line, "x": np.tile(x, len(values)).astype(float), "y": values.ravel()})


def averaged(rows: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One row for each point: the mean of its values over prompts, heads and models; undefined ones left out, nan for none."""
    return pd.concat(rows).groupby(["panel", "line", "x"], sort=False, as_index=False)["y"].mean()


def spearman(profiles: np.ndarray) -> np.ndarray:
    """(…, L) -> (…): Spearman's correlation of a layer's number with its value, in [-1, 1], null 0; nan for fewer than 3 layers,
    where all are equal, and where one is undefined."""
    layers = profiles.shape[-1]
    if layers < LAYERS:
        return np.full(profiles.shape[:-1], math.nan)
    ranks = stats.rankdata(profiles, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    place = np.arange(layers) - (layers - 1) / 2
    size = np.sqrt((ranks**2).sum(-1) * (place**2).sum())
    return np.divide(ranks @ place, size, out=np.full(size.shape, math.nan), where=size > 0)


def trend(
    profiles: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray] = spearman,
    *,
    groups: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> tuple[Interval, str]:
    """The interval of a trend over the layers, and why it decides nothing, or what it was held against.

    From six models on it is an interval over models, each with a profile of its own. Prompts of fewer models all show the
    same profile, and make the interval of its trend as narrow as one likes whether the layers know of their order or not. So the
    trend is also held against all orders of the layers, p = 2 min(share with as much, share with as little), the same order in
    all models: with p > .05, which is always so up to 4 layers, there are too few models to tell, and the interval, still over
    prompts, counts them.

    Args:
        profiles: of each model (P, …, L), prompts first and layers last.
        statistic: of mean profiles, vectorised: (R, …, L) -> (R,).
    """
    shape = profiles[0].shape[1:]

    def flat(means: np.ndarray) -> np.ndarray:
        return statistic(means.reshape(len(means), *shape))

    whole = [one.reshape(len(one), -1) for one in profiles]
    measured = over_models(whole, flat, groups=groups, seed=seed)
    if shape[-1] < LAYERS:
        return measured, f"a trend takes {LAYERS} layers, and there are {shape[-1]}"
    if measured.of == "models" or not math.isfinite(measured.value):
        return measured, ""
    means = [one[np.isfinite(one).all(1)].mean(0).reshape(shape) for one in whole]
    p = chance(means, statistic)
    told = f"of all orders of {shape[-1]} layers {p:.2g} have as much of a trend"
    if p <= LEVEL:
        return measured, told
    return measured._replace(n=len(profiles), of="models"), f"{told}; the interval is over prompts"


def chance(means: Sequence[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray] = spearman) -> float:
    """Two-sided p of the mean over models of the statistic of a profile (…, L), under all orders of the layers: exact up to 7
    layers, else from 5040 random ones. 1 where the layers cannot be told apart."""
    layers = means[0].shape[-1]
    if layers <= ENUMERATED:
        orders = np.array(list(itertools.permutations(range(layers))))  # the first is the one there is
    else:
        orders = np.tile(np.arange(layers), (math.factorial(ENUMERATED) + 1, 1))
        orders[1:] = np.random.default_rng(STREAM).permuted(orders[1:], axis=1)
    values = np.mean([statistic(np.moveaxis(one[..., orders], -2, 0)) for one in means], axis=0)
    values = values[np.isfinite(values)]
    above, below = np.mean(values >= values[0] - 1e-9), np.mean(values <= values[0] + 1e-9)
    return float(min(1.0, 2 * min(above, below)))


def draws(models: int) -> str:
    """What an interval over the prompts of so few models does not know of their untrained twins; "" from six models on."""
    if models >= FEWEST:
        return ""
    return "one draw of untrained weights" if models == 1 else f"{models} draws of untrained weights"


def unlike(subjects: Sequence[Subject]) -> str:
    """What a study of models that came without a run must say of their twins; "" where all are runs of ours."""
    if all(one.loaded.family == "emformer" for one in subjects):
        return ""
    return (
        "A converted model's untrained twin has our initial weights, which need not be those that it began with: an unlike null."
    )


def mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Over what is defined; nan where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis)
    return np.asarray(np.where(known, values, 0.0).sum(axis) / np.where(count > 0, count, math.nan))


BAND = ["panel", "line", "x", "y", "low", "high"]


def band(
    panel: str, line: str, values: np.ndarray, groups: np.ndarray, start: int = 0
) -> list[tuple[str, str, int, float, float, float]]:
    """Rows of `BAND`: the mean over prompts of the columns of values (P, K), with its interval, at start, start + 1 …"""
    found = [over_models([column], groups=[groups]) for column in values.T]
    return [(panel, line, start + k, one.value, one.low, one.high) for k, one in enumerate(found)]
