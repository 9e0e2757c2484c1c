"""Trends over the layers: a profile that chance drew has none, however many prompts show it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from emformer.studies.flips import flips
from emformer.studies.lines import chance, draws, spearman, trend

ORDERS = 40


def test_spearman_is_scipys():
    rows = np.random.default_rng(0).normal(size=(2, 10, 7)).round(1)  # with ties
    expected = [stats.spearmanr(range(7), row).statistic for row in rows.reshape(20, 7)]
    assert spearman(rows).ravel() == pytest.approx(expected)
    assert np.isnan(spearman(np.ones((1, 5)))).all() and np.isnan(spearman(rows[..., :2])).all()


def test_an_order_by_chance_is_decided_as_often_as_it_may():
    """Of profiles that were drawn, and that each of 16 prompts shows, 5 % at most have a trend, up or down."""
    random, decided = np.random.default_rng(0), 0
    for _ in range(ORDERS):
        one, _ = trend([random.normal(size=6) + 0.01 * random.normal(size=(16, 6))])
        decided += one.enough and (one.low > 0 or one.high < 0)
    assert decided / ORDERS <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / ORDERS)


def test_a_trend_is_held_against_all_orders():
    def difference(rows: np.ndarray) -> np.ndarray:
        return spearman(rows[:, 0]) - spearman(rows[:, 1])

    up, random = np.arange(6.0), np.random.default_rng(0)
    rows = up + 0.01 * random.normal(size=(20, 6))
    found, why = trend([rows])
    assert found == (1.0, 1.0, 1.0, 20, "prompts") and "of all orders of 6 layers 0.0028 have" in why, 2 / 720
    found, why = trend([rows[:, :4]] * 5)
    assert found == (1.0, 1.0, 1.0, 5, "models") and not found.enough and "0.083" in why, "2 of 24"
    found, why = trend([rows[:, :4]] * 6)
    assert found == (1.0, 1.0, 1.0, 6, "models") and found.enough and why == ""
    found, why = trend([np.stack([rows, rows[:, ::-1]], 1)], difference)
    assert found[:3] == (2.0, 2.0, 2.0) and "0.0028" in why
    assert chance([np.stack([up, up])], difference) == 1.0
    found, why = trend([rows[:, :2]])
    assert math.isnan(found.value) and why == "a trend takes 3 layers, and there are 2"
    found, why = trend([rows[:, :0]])
    assert math.isnan(found.value) and "there are 0" in why
    assert chance([np.arange(9.0)]) == pytest.approx(2 / 5041)


def test_sign_flips_are_exact():
    assert flips(np.array([1.0, 1.0, math.nan, 1.0])) == 1 / 8
    assert flips(np.array([1.0, -1.0])) == 3 / 4
    assert flips(np.zeros(2)) == 1.0 and math.isnan(flips(np.array([])))
    many = np.r_[np.ones(9), -np.ones(7)]  # binomial, at most 7 tails of 16
    exact = sum(math.comb(16, k) for k in range(8)) / 2**16
    assert flips(many) == pytest.approx(exact, abs=4 * math.sqrt(exact / 4096)) and flips(many, 1) != flips(many)


def test_twins_of_few_models_are_few_draws():
    assert [draws(k) for k in (1, 3, 6)] == ["one draw of untrained weights", "3 draws of untrained weights", ""]
