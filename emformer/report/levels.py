"""Level by level: the loss curves of an ablation study, and everything that its cells recorded."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from scipy import stats

from emformer.figures.frames import label, places
from emformer.intervals import LEVEL
from emformer.listing import definition
from emformer.observables.frame import catalogue
from emformer.plans import Plan
from emformer.recordings import read_records
from emformer.records import Run
from emformer.report.charts import chart_sections
from emformer.report.section import Section
from emformer.theory.outcome import Curves

LOSS = "val_loss"
NUMBERS = 45_000  # of everything recorded, some seven characters each
CURVES = 250_000  # bytes of all curves
SERIES = ["key", "cloud", "param"]
LINE = ["panel", "line", "x", "y", "low", "high"]


SeedCurves = Mapping[int, Mapping[int, float]]  # {seed: {step: value}}


class View(NamedTuple):
    """Combinations that are looked at together, {name: the level of every factor}: where one factor alone differs, its levels."""

    title: str
    levels: dict[str, dict[str, Any]]


def losses(folder: str | Path, plan: Plan) -> dict[str, Curves]:
    """The validation loss, and every other metric that is an outcome, of the finished cells: a chart a view, a panel a metric and
    one of its differences to the first level, paired by seed; a line a level: the mean over seeds with Student's 95 % interval,
    and behind it each seed. What has no number is not there."""
    metrics = dict.fromkeys([LOSS, *(one.metric for one in plan.outcomes.values() if one.metric is not None)])
    finished = _finished(Path(folder))
    found = {name: {metric: Run(Path(folder) / "cells" / name).curve(metric) for metric in metrics} for name in finished}
    charts = {}
    for view in views(plan, finished.values()):
        frames = []
        for metric in metrics:
            curves = {
                level: {one["seed"]: found[name][metric] for name, one in finished.items() if one["levels"] == levels}
                for level, levels in view.levels.items()
            }
            first = next(iter(view.levels))
            for level, own in curves.items():
                frames += _lines(metric, level, own)
            for level, own in curves.items() if plan.factors else ():
                if level != first:
                    frames += _lines(f"{metric}, difference to {first}", level, _paired(own, curves[first]))
        if frames:
            caption = "Finished cells: the mean over seeds with its 95 % interval, and each seed; differences are of one seed."
            charts[view.title] = Curves(pd.concat(frames), caption, "training step", "")
    return charts


def views(plan: Plan, cells: Iterable[Mapping[str, Any]] = ()) -> list[View]:
    """What is looked at side by side: of each factor its levels, everything else at its baseline; with the design "corners" the
    same from the opposite corner; and all combinations where there are more. Of a search the trials, which are the `cells`."""
    if plan.search:
        trials = list({spelt(one["levels"]): dict(one["levels"]) for one in cells}.values())
        short = [spelt({name: f"{float(value):.4g}" for name, value in one.items()}) for one in trials]
        return [View("trials", {f"{k}: {name}": one for k, (name, one) in enumerate(zip(short, trials, strict=True), 1)})]
    combinations, found = plan.combinations(), []
    corners = {"": plan.whole({})}
    if plan.design == "corners":
        corners[" from the opposite corner"] = {name: list(known)[-1] for name, known in plan.factors.items()}
    for where, corner in corners.items():
        for factor, known in plan.factors.items():
            found.append(View(factor + where, {level: corner | {factor: level} for level in known}))
    shown = [levels for view in found for levels in view.levels.values()]
    if any(one not in shown for one in combinations):
        found.append(View("all combinations", {spelt(one): one for one in combinations}))
    return found


def student(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, half width of its 95 % interval by Student, n) of values (n, …) over the first axis, without nan, which n does not
    count. The half width is nan for n < 2."""
    known = np.isfinite(values)
    n = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0.0).sum(0) / n
        squares = (np.where(known, values - mean, 0.0) ** 2).sum(0)
        half = stats.t.ppf(1 - LEVEL / 2, n - 1) * np.sqrt(squares / (n - 1) / n)
    return mean, np.where(n > 1, half, np.nan), n


def curve_section(charts: Mapping[str, Curves]) -> Iterator[Section]:
    """The curves of one view at a time, which the reader chooses."""
    if not charts:
        return
    found = chart_sections(charts, CURVES)
    plots = max((one.plots for one in found), key=len)
    data = {"charts": [{"title": title, "data": one.data} for title, one in zip(charts, found, strict=True)]}
    caption = next(iter(dict.fromkeys(one.caption for one in found)))
    yield Section("losses", "Loss by level", caption, data, plots=plots, kind="views")


def observable_section(folder: Path, plan: Plan) -> Iterator[Section]:
    """Everything recorded of all heads together, by depth, at the last step of each key: mean over seeds by combination."""
    finished = _finished(folder)
    shown = views(plan, finished.values())
    combinations: list[dict[str, Any]] = []
    for view in shown:
        combinations += [one for one in view.levels.values() if one not in combinations]
    rows = _records(folder, {name: one for name, one in finished.items() if one["levels"] in combinations}, combinations)
    if rows.empty:
        return
    known = catalogue()
    groups = [(tuple(map(str, cast(tuple, name))), own) for name, own in rows.groupby(SERIES, sort=False)]
    # the plainest first: without parameters, so of no control; of the raw cloud
    groups.sort(key=lambda one: (len(one[0][2].split()), one[0][1] not in ("raw", ""), one[0][0]))
    series, numbers = [], 0
    for (key, cloud, param), own in groups:
        one = _series(own, key, cloud, param, len(combinations))
        numbers += 2 * sum(map(len, one["mean"]))
        if series and numbers > NUMBERS:
            break
        series.append(one)
    keys = list(dict.fromkeys(one["key"] for one in series))
    left = f" {len(groups) - len(series):,} of {len(groups):,} series are not drawn." if len(series) < len(groups) else ""
    caption = (
        "Any key that was recorded, of all heads together at its last step, by depth: the mean over the seeds of finished cells, "
        "with Student's 95 % interval where there are two. What is of the whole flow is a point a level."
        f'{left} <span class="meaning"></span>'
    )
    series.sort(key=lambda one: keys.index(one["key"]))
    asked = [one.record for one in plan.outcomes.values() if one.record in keys]
    data = {
        "series": series,
        "first": asked[0] if asked else keys[0],
        "groups": [
            {"title": view.title, "names": list(view.levels), "rows": [combinations.index(one) for one in view.levels.values()]}
            for view in shown
        ],
        "definitions": {key: definition(key, known) for key in keys},
    }
    yield Section("observables", "Everything recorded, by level", caption, data, kind="levels")


def spelt(levels: Mapping[str, Any]) -> str:
    """As "position=none, ffn=GELU"."""
    return ", ".join(f"{name}={value}" for name, value in levels.items())


# ----------------------------------------------------------------------------------------------------------------------


def _paired(curves: SeedCurves, first: SeedCurves) -> SeedCurves:
    """Differences where both have the seed and the step."""
    return {
        seed: {step: value - first[seed][step] for step, value in curve.items() if step in first[seed]}
        for seed, curve in curves.items()
        if seed in first
    }


def _lines(panel: str, level: str, curves: SeedCurves) -> Iterator[pd.DataFrame]:
    """Frames of one level: a line a seed, then their mean at the steps that all of them have."""
    curves = {seed: curve for seed, curve in curves.items() if curve}
    for seed, curve in curves.items() if len(curves) > 1 else ():
        steps = np.array(list(curve), dtype=float)
        yield _frame(panel, f"{level}, seed {seed}", steps, np.array(list(curve.values()), dtype=float))
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values()))) if curves else []
    if steps:
        mean, half, _ = student(np.array([[curve[step] for step in steps] for curve in curves.values()], dtype=float))
        yield _frame(panel, level, np.array(steps, dtype=float), mean, half)


def _frame(panel: str, line: str, x: np.ndarray, y: np.ndarray, half: np.ndarray | float = math.nan) -> pd.DataFrame:
    return pd.DataFrame(dict(zip(LINE, (panel, line, x, y, y - half, y + half), strict=True)))


def _records(folder: Path, cells: Mapping[str, Mapping[str, Any]], combinations: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows of the last step of each key in each cell, of all heads together, with `combination` and `seed`."""
    frames = []
    for name, one in cells.items():
        run = Run(folder / "cells" / name)
        if not (run.records.exists() or run.parquet.exists()):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged rows, of which the table has told
            rows = read_records(run.path)
        rows = rows[rows["head"].isna() & rows["step"].notna()]
        rows = rows[rows["step"] == rows.groupby(SERIES, dropna=False)["step"].transform("max")]
        words = {word: rows[word].astype(object).fillna("") for word in ("key", "cloud", "param", "point")}
        numbers = {word: rows[word].to_numpy(float, na_value=np.nan) for word in ("layer", "step", "mean")}
        frames.append(pd.DataFrame(words | numbers).assign(combination=combinations.index(one["levels"]), seed=one["seed"]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _series(rows: pd.DataFrame, key: str, cloud: str, param: str, combinations: int) -> dict[str, Any]:
    """What page.js draws of one key: for each combination and place the mean over seeds, the half width of its interval and n."""
    layered = rows.dropna(subset=["layer"])
    where = places(layered) if len(layered) else [(-1, "")]
    own = layered if len(layered) else rows
    rank = {place: k for k, place in enumerate(where)}
    at = [rank[int(layer), point] for layer, point in zip(own["layer"], own["point"], strict=True)] if len(layered) else 0
    seeds = sorted(own["seed"].unique())
    values = np.full((len(seeds), combinations, len(where)), np.nan)
    values[own["seed"].map(seeds.index), own["combination"], at] = own["mean"]
    mean, half, n = student(values)
    return {
        "key": key,
        "cloud": cloud,
        "param": param,
        "step": int(own["step"].max()),
        "places": [label(place) for place in where] if len(layered) else ["all"],
        "points": [point for _, point in where],
        "mean": _rounded(mean, 4),
        "half": _rounded(half, 2),
        "n": int(n.flat[0]) if (n == n.flat[0]).all() else n,
    }


def _rounded(values: np.ndarray, digits: int) -> list[Any]:
    """Numbers to so many digits, which keeps the page small."""
    return [_rounded(one, digits) if one.ndim else float(f"{one:.{digits}g}") for one in values]


def _finished(folder: Path) -> dict[str, dict[str, Any]]:
    """{name: its levels and seed} of the cells that ended well."""
    told = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
    return {one["name"]: one for one in told if (folder / "finished" / f"{one['name']}.json").exists()}
