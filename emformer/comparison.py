"""Runs side by side: what was recorded of each, matched place by place, and how far it lies from the first, with intervals."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from emformer.parts import UserError
from emformer.recordings import Source, read_records

PLACE = ("key", "layer", "point", "head", "cloud", "param")
COLUMNS = (*PLACE, "run", "step", "mean", "se", "n_valid", "difference", "low", "high", "p", "q")
LEVEL = 0.05  # of a test, and of the rate of false discoveries


def compare(source: Iterable[Source] | pd.DataFrame, *, step: int | None = None) -> pd.DataFrame:
    """The same observables of several runs or analyses side by side, and the differences to the first, the baseline.

    Rows are of one place (`PLACE`) and one run. The interval holds the difference of expectations with 95 %, by Welch: the
    variances se² of both add up; means over n prompts have n - 1 degrees of freedom, estimates that bring an error of their own
    are taken as normal. Two runs that were recorded on the same prompts vary together, and their intervals are wider than they
    need be. What has no error (a single prompt, a share of undefined tokens) has no interval; where both errors are zero it is
    the difference itself, and nothing is tested.

    Args:
        source: what `read_records` takes, or a frame of it. The first run in it is the baseline.
        step: of training; default, of each key its last one in each run.

    Returns:
        `COLUMNS`: place, run, the `step` that was taken, `mean`, `se`, `n_valid`; `difference` to the baseline at this place and
        its interval `low`, `high`; `p` of no difference, two-sided; `q`, the same corrected for all tests in this frame
        (Benjamini and Hochberg 1995). Ordered by place as first recorded, then by run. Undefined is nan; all five are in rows of
        the baseline, and of places that it lacks.

    Raises:
        UserError: for fewer than two runs, or a run that has no rows of `step`.
    """
    frame = source if isinstance(source, pd.DataFrame) else read_records(source)
    runs = list(frame["run"].unique())
    if len(runs) < 2:
        raise UserError(f"a comparison takes at least two runs that have records; there is {runs[0] if runs else 'none'}.")
    rows = _taken(frame, runs, step).drop_duplicates([*PLACE, "run"], keep="last")
    rows["place"] = rows.groupby(list(PLACE), sort=False, dropna=False).ngroup()
    rows = rows.sort_values("place", kind="stable", ignore_index=True)  # within a place the runs stay in order
    base = rows[rows["run"] == runs[0]].set_index("place")
    other = rows["run"] != runs[0]

    def of_base(column: str) -> np.ndarray:
        return rows["place"].map(base[column]).where(other).to_numpy(float)

    difference = rows["mean"].to_numpy(float) - of_base("mean")
    squares = np.stack([rows["se"].to_numpy(float), of_base("se")]) ** 2
    freedom = np.stack([_freedom(rows["sd"].to_numpy(float), rows["n_valid"].to_numpy(float)), _freedom(*map(of_base, _SAMPLE))])
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(squares.sum(0))
        # Welch and Satterthwaite; of normal estimates the denominator is 0 and the degrees are infinite
        degrees = np.where(error > 0, squares.sum(0) ** 2 / (squares**2 / freedom).sum(0), np.inf)
        half = stats.t.ppf(1 - LEVEL / 2, degrees) * error
        p = np.where(error > 0, 2 * stats.t.sf(np.abs(difference) / error, degrees), np.nan)
    found = rows.assign(difference=difference, low=difference - half, high=difference + half, p=p, q=false_discoveries(p))
    return found[list(COLUMNS)]


_SAMPLE = ("sd", "n_valid")


def _taken(frame: pd.DataFrame, runs: list[str], step: int | None) -> pd.DataFrame:
    """The rows that are compared, runs in their order: of one step, or of each key its last in each run."""
    if step is None:
        when = frame["step"].fillna(-1)
        return frame[when == when.groupby([frame["run"], frame["key"]]).transform("max")].copy()
    found = frame[(frame["step"] == step).fillna(False)]
    for run in runs:
        if not (found["run"] == run).any():
            has = sorted(frame.loc[frame["run"] == run, "step"].dropna().unique())
            known = ", ".join(map(str, has if len(has) <= 12 else [*has[:5], "…", *has[-5:]])) or "no step"
            raise UserError(f"{run} has no records of step {step}; it has {known}.")
    return found.copy()


def _freedom(sd: np.ndarray, n: np.ndarray) -> np.ndarray:
    """n - 1 for a mean over n prompts; infinite for an estimate, which has no spread between prompts."""
    return np.where(np.isfinite(sd), n - 1, np.inf)


def false_discoveries(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their rate of false discoveries (Benjamini and Hochberg 1995). What is nan is no test."""
    known, q = np.isfinite(p), np.full_like(p, np.nan)
    if known.any():
        q[known] = stats.false_discovery_control(p[known], method="bh")
    return q


def remarks(found: pd.DataFrame) -> list[str]:
    """What is to be known of a frame of `compare`, a sentence each: how many differences, intervals and discoveries there are,
    what stands in one run only, and which steps differ."""
    runs = list(found["run"].unique())
    base, others = found[found["run"] == runs[0]], found[found["run"] != runs[0]]
    tested, apart = int(found["q"].notna().sum()), int((found["q"] <= LEVEL).sum())
    known = others["difference"].notna()
    without = int((known & others["low"].isna()).sum())
    said = [
        f"{int(known.sum()):,} differences to {runs[0]}, 95 % intervals (Welch); conservative where the prompts are the same",
        f"{apart:,} of {tested:,} tested differ at a false discovery rate of 5 % (Benjamini and Hochberg)",
    ]
    if without:
        said.append(f"{without:,} have no interval: a single prompt, or no standard error")
    places = _places(base)
    for run in runs[1:]:
        own = _places(others[others["run"] == run])
        for here, there, count in ((runs[0], run, len(places - own)), (run, runs[0], len(own - places))):
            if count:
                said.append(f"{count:,} rows are in {here} and not in {there}")
    steps = found.groupby("key", sort=False)["step"].nunique()
    if (steps > 1).any():
        keys = list(steps[steps > 1].index)
        said.append(f"the last steps differ between runs for {len(keys):,} keys, as {keys[0]}")
    return said


def _places(rows: pd.DataFrame) -> set[tuple]:
    return set(rows[list(PLACE)].astype(object).fillna("").itertuples(index=False, name=None))
