"""Differences between runs: intervals against scipy and against what they promise, matching, and what is said of the rest."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from emformer.comparison import COLUMNS, compare, remarks
from emformer.listing import compared
from emformer.observables import Row
from emformer.observables.frame import frame
from emformer.parts import UserError
from emformer.recordings import Recordings


def told(**runs: list[tuple[int | None, Row]]) -> pd.DataFrame:
    """A frame of `read_records`: rows of each run, each with its step."""
    parts = [frame(rows) for rows in runs.values()]
    for name, part in zip(runs, parts, strict=True):
        part.insert(0, "run", pd.array([name] * len(part), dtype="string"))
    return pd.concat(parts, ignore_index=True)


def moments(values: np.ndarray, key: str = "flow.a", layer: int = 0, **place) -> Row:
    """The row that `Moments` makes of one value a prompt."""
    sd = float(values.std(ddof=1))
    return Row(layer, "attn", key, float(values.mean()), sd, sd / math.sqrt(len(values)), len(values), **place)


def test_means_over_prompts_have_welchs_interval(seed: int):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 1, 5 + seed), rng.normal(1, 3, 40)
    (base, other) = compare(told(a=[(1, moments(a))], b=[(1, moments(b))])).to_dict("records")
    oracle = stats.ttest_ind(b, a, equal_var=False)
    interval = oracle.confidence_interval(0.95)
    assert other["difference"] == pytest.approx(b.mean() - a.mean(), rel=1e-12)
    assert (other["low"], other["high"], other["p"]) == pytest.approx((interval.low, interval.high, oracle.pvalue), rel=1e-9)
    assert other["q"] == pytest.approx(other["p"]) and base["run"] == "a" and other["run"] == "b"
    assert all(math.isnan(base[name]) for name in ("difference", "low", "high", "p", "q"))


def test_estimates_with_an_error_of_their_own_are_normal():
    """A row without a spread between prompts: a bootstrap's error, of hundreds of points."""
    a, b = (Row(1, "ffn", "geo.id", mean, None, se, 512) for mean, se in ((5.0, 0.3), (6.0, 0.4)))
    other = compare(told(a=[(1, a)], b=[(1, b)])).iloc[1]
    assert (other["low"], other["high"]) == pytest.approx((1 - 1.959963985 * 0.5, 1 + 1.959963985 * 0.5), abs=1e-8)
    assert other["p"] == pytest.approx(math.erfc(2 / math.sqrt(2)), rel=1e-9), "two standard errors"


def test_intervals_hold_what_they_promise():
    """Of 4,000 differences of means over 6 and 9 prompts, of unequal spread and one expectation, 95 % hold 0."""
    rng = np.random.default_rng(0)
    rows = {
        name: [(1, moments(rng.normal(2, sd, n), layer=k)) for k in range(4000)] for name, n, sd in (("a", 6, 1.0), ("b", 9, 4.0))
    }
    found = compare(told(**rows)).query("run == 'b'")
    held = ((found["low"] <= 0) & (found["high"] >= 0)).mean()
    assert held == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))
    assert (found["q"] <= 0.05).sum() <= 3, "nothing differs"


def test_q_is_benjamini_and_hochbergs_over_all_tests_in_the_frame():
    errors = [0.1, 0.4, 0.45, 0.5, 1.0, 2.0]
    rows = {
        name: [(1, Row(k, "attn", "flow.a", mean, None, se, 99)) for k, se in enumerate(errors)]
        for name, mean in (("a", 0.0), ("b", 1.0), ("c", 0.5))
    }
    found = compare(told(**rows)).query("run != 'a'")
    p = found["p"].to_numpy()
    order = np.argsort(p)
    expected = np.empty(len(p))
    least = 1.0
    for rank in range(len(p), 0, -1):
        least = min(least, p[order[rank - 1]] * len(p) / rank)
        expected[order[rank - 1]] = least
    assert found["q"].to_numpy() == pytest.approx(expected, rel=1e-12)
    assert (found["q"] > found["p"]).any()


def test_what_has_no_error_has_no_interval():
    """One prompt has no standard error, nor has a share of undefined tokens; equal constants differ by exactly nothing."""
    single = Row(0, "attn", "flow.a", 1.0, None, None, 1)
    constant = Row(0, "attn", "clu.n", 64.0, 0.0, 0.0, 64)
    undefined = Row(0, "attn", "flow.b", None, None, None, 0, 64)
    rows = [(1, single), (1, constant), (1, undefined)]
    found = compare(told(a=rows, b=[(1, single._replace(mean=3.0)), *rows[1:]])).query("run == 'b'").set_index("key")
    assert found.loc["flow.a", "difference"] == 2 and found.loc["flow.a", ["low", "high", "p", "q"]].isna().all()
    assert found.loc["clu.n", ["difference", "low", "high"]].tolist() == [0, 0, 0] and math.isnan(found.loc["clu.n", "p"])
    assert found.loc["flow.b", ["mean", "difference", "low", "p"]].isna().all()
    said = remarks(compare(told(a=rows, b=[(1, single._replace(mean=3.0)), *rows[1:]])))
    assert any(one.startswith("2 differences to a") for one in said) and any(one.startswith("1 have no interval") for one in said)


def test_rows_meet_at_the_same_place_only():
    """Layer, point, head, cloud and param, undefined ones too; what stands in one run only is counted."""
    base = Row(None, None, "flow.a", 1.0, None, 0.1, 9)
    places = [
        base,
        base._replace(layer=0),
        base._replace(layer=0, head=0),
        base._replace(layer=0, head=1),
        base._replace(layer=0, cloud="read"),
        base._replace(layer=0, param="k=4"),
        base._replace(layer=0, point="ffn"),
    ]
    a = [(8, row._replace(mean=float(k))) for k, row in enumerate(places)]
    b = [(8, row._replace(mean=float(k) + 2**k)) for k, row in reversed(list(enumerate(places)))][:-2]
    found = compare(told(a=a, b=[*b, (8, base._replace(layer=9))]))
    assert list(found.columns) == list(COLUMNS)
    matched = found[found["difference"].notna()]
    assert matched["difference"].tolist() == [2.0**k for k in range(2, 7)], "in the order in which the first recorded"
    said = " ".join(remarks(found))
    assert "2 rows are in a and not in b" in said and "1 rows are in b and not in a" in said
    alone = found[(found["layer"] == 9).fillna(False)]
    assert len(alone) == 1 and math.isnan(alone["difference"].iloc[0])


def test_the_last_step_of_each_key_or_the_one_asked_for():
    row = Row(0, "attn", "flow.a", 0.0, None, 0.1, 9)
    rare = row._replace(key="geo.b")
    a = [(step, row._replace(mean=float(step))) for step in (0, 10, 20)] + [(10, rare)]
    b = [(step, row._replace(mean=100.0 + step)) for step in (0, 10, 30)] + [(10, rare)]
    frame = told(a=a, b=b)
    found = compare(frame).query("run == 'b'").set_index("key")
    assert found["difference"].tolist() == [110.0, 0.0] and found["step"].tolist() == [30, 10]
    assert any("1 keys, as flow.a" in one for one in remarks(compare(frame)))
    assert compare(frame, step=10).query("run == 'b'")["difference"].tolist() == [100.0, 0.0]
    with pytest.raises(UserError, match=r"b has no records of step 20; it has 0, 10, 30"):
        compare(frame, step=20)
    untrained = told(a=[(None, row)], b=[(None, row._replace(mean=1.0))])
    assert compare(untrained)["difference"].tolist()[1] == 1.0


def test_folders_are_read(tmp_path: Path):
    for name, mean in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        writer = Recordings(tmp_path / name / "records.jsonl", -1)
        writer.append(4, [Row(0, "attn", "flow.a", mean, 0.5, 0.1, 25)])
        writer.close()
    assert compare([tmp_path / "a", tmp_path / "b"])["difference"].tolist()[1] == 0.5
    with pytest.raises(UserError, match="at least two runs"):
        compare([tmp_path / "a", tmp_path / "a"])


def test_a_table_for_the_terminal():
    rows = [Row(k, "attn", "flow.a", 1.0 + k, 0.1, 0.02, 25) for k in range(2)]
    other = [row._replace(mean=row.mean + 0.5) for row in rows]
    found = compare(told(base=[(1, row) for row in rows], other=[(1, row) for row in other]))
    whole = compared(found, {}, whole=True).splitlines()
    assert len([line for line in whole if line.startswith("flow.a")]) == 2
    (line,) = [line for line in compared(found, {}, whole=False).splitlines() if line.startswith("flow.a")]
    assert line.split()[:7] == ["flow.a", "layer", "1", "attn", "2", "2.5", "+0.5"] and line.endswith("*")
