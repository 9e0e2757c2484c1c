"""Intervals by resampling against closed forms, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from emformer.intervals import FEWEST, LEVEL, RESAMPLES, bootstrap, bootstrap_each, over_models, percentiles


def tail(n: int) -> float:
    """The lower level of the percentiles, written here."""
    return stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.isf(LEVEL / 2, n - 1))


@pytest.mark.parametrize("n", [6, 20, 200])
def test_normal_draws_give_students_interval(n: int):
    """The bootstrap distribution of a mean has the standard deviation s sqrt((n-1)/n)/sqrt(n). Were it normal, the ends would lie
    at m -+ t s/sqrt(n) exactly."""
    m, s = 2.0, 3.0
    draws = stats.norm.ppf((np.arange(400_000) + 0.5) / 400_000) * s * math.sqrt((n - 1) / n) / math.sqrt(n) + m
    half = stats.t.ppf(1 - LEVEL / 2, n - 1) * s / math.sqrt(n)
    assert percentiles(draws, n) == pytest.approx((m - half, m + half), rel=1e-3)


@pytest.mark.parametrize("n", [6, 15])
def test_two_values_give_the_binomial_distribution(n: int):
    """The mean of n draws from k ones and n - k zeros is binomial."""
    values = (np.arange(n) < n // 3).astype(float)
    found = bootstrap(values, resamples=200_000)
    law = stats.binom(n, (n // 3) / n)
    for level, end in ((tail(n), found.low), (1 - tail(n), found.high)):
        steps = [law.ppf(min(1.0, max(0.0, level + shift))) / n for shift in (-3e-4, 3e-4)]  # of 200,000 draws
        assert min(steps) - 1e-12 <= end <= max(steps) + 1e-12
    assert found.value == pytest.approx(values.mean()) and found.n == n


def test_few_units():
    nothing, one = bootstrap(np.array([])), bootstrap(np.array([3.0]))
    assert nothing.n == 0 and all(map(math.isnan, nothing[:3]))
    assert one[:1] == (3.0,) and one.n == 1 and math.isnan(one.low) and math.isnan(one.high) and not one.enough
    two = bootstrap(np.array([1.0, 5.0]))
    assert two[:4] == (3.0, 1.0, 5.0, 2)  # nothing beyond what there is to draw from
    assert [bootstrap(np.arange(float(n))).enough for n in (2, FEWEST - 1, FEWEST)] == [False, False, True]
    assert 1 - 2.0 ** (1 - FEWEST) >= 1 - LEVEL > 1 - 2.0 ** (2 - FEWEST)
    assert all(map(math.isnan, percentiles(np.array([]), 9)))


def test_equal_values_and_scale():
    assert bootstrap(np.full(9, 2.0))[:3] == (2.0, 2.0, 2.0)
    x = np.random.default_rng(0).normal(size=12)
    one, other = bootstrap(x), bootstrap(-3 * x + 1)
    assert (other.low, other.high) == pytest.approx((1 - 3 * one.high, 1 - 3 * one.low), rel=0.05)  # tails of the same draws
    assert bootstrap(x) == one and bootstrap(x, seed=1) != one


def test_what_is_not_finite_is_left_out():
    x = np.random.default_rng(1).normal(size=(10, 2))
    spoilt = np.insert(x, [2, 5, 5], [[np.nan, 1.0], [1.0, np.inf], [-np.inf, np.nan]], axis=0)

    def ratio(means: np.ndarray) -> np.ndarray:
        return means[:, 0] / means[:, 1]

    assert bootstrap(spoilt, ratio) == bootstrap(x, ratio)
    assert bootstrap(x, ratio).value == pytest.approx(x[:, 0].mean() / x[:, 1].mean())


def test_groups_are_drawn_together():
    """Copies of a unit bring no knowledge: the interval is that of the units. Of unequal groups the mean is of all rows."""
    x = np.random.default_rng(2).normal(size=8)
    whole = bootstrap(np.repeat(x, 5), groups=np.repeat(np.arange(8), 5))
    assert whole[:4] == pytest.approx(bootstrap(x)[:4], abs=1e-12)
    alone = bootstrap(np.repeat(x, 5))
    assert alone.n == 40 and alone.high - alone.low < 0.5 * (whole.high - whole.low)
    uneven = bootstrap(np.array([0.0, 0.0, 0.0, 4.0]), groups=np.array([7, 7, 7, 3]))
    assert uneven[:4] == (1.0, 0.0, 4.0, 2)


def test_models_are_the_units_from_six_on():
    random = np.random.default_rng(3)
    prompts = [random.normal(k, 1, size=20 + k) for k in range(FEWEST)]
    means = np.array([one.mean() for one in prompts])
    assert over_models(prompts) == bootstrap(means, of="models")
    few = over_models(prompts[:-1])
    assert few.of == "prompts" and few.n == 20 and few.value == pytest.approx(means[:-1].mean())
    # five models that differ widely: prompts say nothing of that, and the interval is narrow
    assert few.high - few.low < 0.5 * np.ptp(means)
    spread = math.sqrt(sum(one.var(ddof=1) / len(one) for one in prompts[:-1])) / 5
    assert (few.high - few.low) / 2 == pytest.approx(stats.t.ppf(1 - LEVEL / 2, 19) * spread, rel=0.1)
    only = over_models(prompts[:1])
    assert only[:4] == pytest.approx(bootstrap(prompts[0])[:4])
    lost = over_models([*prompts[:-1], np.array([np.nan, np.nan])])
    assert lost.of == "models" and lost.n == FEWEST - 1 and not lost.enough
    assert over_models([]).n == 0


def test_columns_side_by_side_are_each_as_alone():
    random = np.random.default_rng(4)
    values = random.normal(size=(9, 6))
    values[2, 1] = values[0, 2] = values[5, 2] = np.nan
    values[:, 3] = np.inf
    values[1:, 4] = np.nan
    found = bootstrap_each(values, of="seeds", seed=3)
    for k, one in enumerate(found):
        alone = bootstrap(values[:, k], of="seeds", seed=3)
        assert one[3:] == alone[3:] and one[:3] == pytest.approx(alone[:3], abs=1e-14, nan_ok=True)
    assert [one.n for one in found] == [9, 8, 7, 0, 1, 9]


def test_random_numbers_are_its_own():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    bootstrap(np.arange(9.0))
    assert (np.random.get_state()[1] == before).all()


# what the docstring of the module says
@pytest.mark.parametrize(
    ("law", "shares"),
    [
        ("normal", {2: 0.50, 4: 0.874, 6: 0.934, 8: 0.942, 12: 0.948}),
        ("symmetric", {6: 0.931, 8: 0.936, 12: 0.939}),
        ("exponential", {6: 0.890, 12: 0.912}),
    ],
    ids=["normal", "symmetric", "exponential"],
)
def test_how_often_the_truth_is_held(law: str, shares: dict[int, float]):
    random, samples = np.random.default_rng(5), 2000
    for n, share in shares.items():
        x = random.normal(size=(n, samples)) if law == "normal" else random.exponential(size=(n, samples)) - 1
        if law == "symmetric":
            x -= random.exponential(size=x.shape) - 1
        held = np.mean([one.low <= 0 <= one.high for one in bootstrap_each(x, resamples=RESAMPLES // 2)])
        assert abs(held - share) < 3.5 * math.sqrt(share * (1 - share) / samples) + 0.002, (n, held)
