"""The analysis of the obstructions experiment finds what was planted in made-up tables, and nothing else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from emformer.observables import Row
from emformer.parts import UserError
from emformer.recordings import Recordings
from emformer.records import Run
from emformer.studies.obstructions import FLOOR, anova, matched, stopped

LEVELS = {"Z": ("un", "soft"), "C": ("tied", "metric", "free"), "K": ("full", "causal")}


def table(logits: dict[str, float], noise: float = 0.1, seeds: int = 6, seed: int = 0) -> pd.DataFrame:
    """Every combination of levels; logit(omega) = -2 + what is planted for each level + seed + noise."""
    random = np.random.default_rng(seed)
    offsets = random.normal(0, 1, seeds)
    rows = []
    for k in range(seeds):
        for one in itertools.product(*LEVELS.values()):
            logit = -2 + sum(logits.get(level, 0.0) for level in one) + offsets[k] + noise * random.normal()
            value = 1 / (1 + np.exp(-logit))
            rows.append(
                {"cell": str((k, one)), **dict(zip(LEVELS, one, strict=True)), "seed": k, "outcome": "omega", "value": value}
            )
    return pd.DataFrame(rows)


def test_planted_effects_have_their_squares():
    """In a balanced design a factor's squares are n sum (mean of level - mean)^2, and eta^2 is their share beside the noise."""
    found = anova(table({"soft": 0.5, "free": 3.0, "metric": 1.0}, noise=0.2), list(LEVELS)).set_index("source")
    frame = table({"soft": 0.5, "free": 3.0, "metric": 1.0}, noise=0.2)
    y = np.log(frame["value"] / (1 - frame["value"]))
    for name in (*LEVELS, "seed"):
        means = y.groupby(frame[name]).transform("mean")
        assert found.loc[name, "ss"] == pytest.approx(float(((means - y.mean()) ** 2).sum()), rel=1e-9)
    assert found["ss"].sum() == pytest.approx(float(((y - y.mean()) ** 2).sum()), rel=1e-9)  # they add up
    assert list(found["df"]) == [1, 2, 1, 5, 72 - 10]
    # 72 rows: a third at 0, 1 and 3 each, so 72 times the variance of these
    assert found.loc["C", "ss"] == pytest.approx(72 * np.var([0, 1, 3]), rel=0.1)
    assert found.loc["Z", "ss"] == pytest.approx(72 * 0.25**2, rel=0.4)
    assert found.loc["C", "eta2"] > 0.95 and found.loc["Z", "p"] < 1e-6 and found.loc["K", "eta2"] < 0.15


def test_one_factor_without_blocks_is_the_usual_test():
    frame = table({"metric": 0.05}, seeds=8, noise=0.3, seed=3).assign(seed=0)
    (row,) = [one for one in anova(frame, ["C"]).to_dict("records") if one["source"] == "C"]
    y = np.log(frame["value"] / (1 - frame["value"]))
    told = stats.f_oneway(*[y[frame["C"] == level] for level in LEVELS["C"]])
    assert row["f"] == pytest.approx(told.statistic) and row["p"] == pytest.approx(told.pvalue)


def test_nothing_is_found_where_nothing_is_at_the_stated_rate():
    found = [anova(table({"soft": 1.0}, seeds=3, seed=k), list(LEVELS)).set_index("source")["p"] for k in range(200)]
    p = np.array([[one["C"], one["K"]] for one in found])
    assert 0.02 < (p < 0.05).mean() < 0.09  # of 400; sd 0.011
    assert stats.kstest(p.ravel(), "uniform").pvalue > 1e-3


def test_of_a_corner_only_its_neighbours_count():
    """What the factors do together lies far from the corner and is not seen from it."""
    frame = table({"soft": 1.0}, noise=0.0)
    far = (frame["Z"] == "soft") & (frame["K"] == "causal")
    frame.loc[far, "value"] = 0.999
    found = anova(frame, list(LEVELS), around={"Z": "un", "C": "tied", "K": "full"}).set_index("source")
    assert found.loc["Z", "ss"] > 1 and found.loc["K", "ss"] == pytest.approx(0, abs=1e-12)
    assert found.loc["residual", "df"] == 6 * 5 - 10 and np.isnan(found.loc["Z", "f"]), "no noise to divide by"


def test_zeros_are_taken_at_the_floor():
    frame = table({})
    frame["value"] = np.where(frame["K"] == "full", 1e-32, 0.5)
    found = anova(frame, ["K"]).set_index("source")
    gap = np.log((1 - FLOOR) / FLOOR)
    assert found.loc["K", "ss"] == pytest.approx(72 * (gap / 2) ** 2) and found.loc["K", "eta2"] == pytest.approx(1)
    assert frame["value"].min() == 1e-32, "the table is left as it is"


def test_what_cannot_be_analysed_is_said():
    frame = table({})
    with pytest.raises(UserError, match="no factor 'Q'"):
        anova(frame, ["Q"])
    with pytest.raises(UserError, match="no value of 'loss'"):
        anova(frame, ["Z"], "loss")
    with pytest.raises(UserError, match="'K' has one level"):
        anova(frame[frame["K"] == "full"], list(LEVELS))
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        anova(frame.assign(value=frame["value"] + 1), ["Z"])
    with pytest.raises(UserError, match="apart"):
        anova(frame[(frame["Z"] == "soft") == (frame["K"] == "causal")], ["Z", "K"])


def test_a_run_is_stopped_where_its_loss_meets_the_other():
    losses = {10: 6.0, 20: 5.0, 40: 4.0}
    values = {0: 0.1, 15: 0.2, 30: 0.3, 40: 0.4}
    assert stopped(5.4, losses, values) == (15, 5.5, 0.2)  # a loss on the line between 10 and 20
    assert stopped(4.6, losses, values) == (30, 4.5, 0.3)
    assert stopped(5.0, losses, values) == (15, 5.5, 0.2), "of two as near the earlier"
    assert stopped(1.0, losses, values) == (40, 4.0, 0.4), "never so good: its end"
    assert stopped(5.4, losses, values | {15: np.nan}).step == 30
    for nothing in (stopped(np.nan, losses, values), stopped(5.0, {}, values), stopped(5.0, losses, {0: 0.1})):
        assert nothing.step == -1 and np.isnan(nothing.loss) and np.isnan(nothing.value)


def test_runs_are_matched_seed_by_seed(tmp_path: Path):
    runs: dict[int, tuple[Run, Run]] = {}
    for seed in range(2):
        pair = []
        for name, losses in (("ideal", {10: 6.0, 20: 5.5 - seed}), ("real", {10: 5.6, 20: 4.4, 40: 4.0})):
            run = Run(tmp_path / f"{name}{seed}")
            run.path.mkdir()
            run.metrics.write_text("".join(json.dumps({"step": k, "val_loss": v}) + "\n" for k, v in losses.items()))
            with_heads = Recordings(run.records, -1)
            for step in (0, 10, 20, 40):
                rows = [Row(layer, "attn", "wgf.omega", step / 100 + layer, n_valid=4) for layer in range(2)]
                rows += [Row(0, "attn", "wgf.omega", 9.0, n_valid=4, param="shuffled")]
                rows += [Row(0, "attn", "wgf.omega", 9.0, n_valid=4, head=0)]
                with_heads.append(step, rows)
            with_heads.close()
            pair.append(run)
        runs[seed] = (pair[0], pair[1])
    found = matched(runs, ["wgf.omega", "wgf.r2"])
    assert list(found["seed"]) == [0, 0, 1, 1]
    first, second = found[found["key"] == "wgf.omega"].to_dict("records")
    assert (first["target"], first["step"], first["loss"], first["value"]) == (5.5, 10, 5.6, pytest.approx(0.6))
    assert (second["target"], second["step"], second["loss"], second["value"]) == (4.5, 20, 4.4, pytest.approx(0.7))
    assert first["last"] == pytest.approx(0.9)  # mean over layers, no heads, no controls
    assert found[found["key"] == "wgf.r2"]["value"].isna().all()
