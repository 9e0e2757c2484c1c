"""What the frame of a chart holds, panel by panel and as arrays: where drawing on paper and on a page both begin.

Numbers that cannot be drawn (nan, infinite, not above 0 on a logarithmic axis) are nan in all of them, and counted by `lost`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import numpy as np
import pandas as pd

from emformer.theory.outcome import Chart, Curves, Heat, Paths

COLUMNS = {"Curves": "panel line x y", "Heat": "panel x y value", "Paths": "panel path time x y z"}
NUMBERED = re.compile(r"(.*?)(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
THEORY = re.compile(r"theory[\s,:]*")


class Line(NamedTuple):
    """One line.

    Attributes:
        name: as in the frame.
        group: lines of one group differ by their seed alone and share a colour; one without a seed is their mean. Of a theory
            line, the group it speaks of; its own words where there is none of that name.
        theory: whether it was not measured.
        x, y, low, high: numbers, one a point; the ends of the band are nan where it is not known.
    """

    name: str
    group: str
    theory: bool
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def one_seed(self) -> bool:
        """Whether it is of one seed of its group; else it stands for the group: it is its mean, or its only line."""
        return not self.theory and self.name != self.group


class Grid(NamedTuple):
    """Values of cells (rows, columns), the first row that of the least y, and where the cells are."""

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray


class Way(NamedTuple):
    """The way of one point: the times (steps,) and where it was (steps, 3); z is nan in a plane."""

    name: str
    group: str
    time: np.ndarray
    points: np.ndarray


def lines(chart: Curves) -> dict[str, list[Line]]:
    """The lines of each panel, in the order of the frame. Raises ValueError for a frame without its columns, or without rows."""
    frame = _checked(chart)
    measured = {_group(name) for name in frame["line"].astype(str).unique() if not _theory(name)}
    found: dict[str, list[Line]] = {}
    for key, rows in frame.groupby(["panel", "line"], sort=False):
        panel, name = map(str, cast(tuple, key))
        x, y = (_numbers(rows, axis, log) for axis, log in (("x", chart.log_x), ("y", chart.log_y)))
        low, high = (_numbers(rows, side, False) if side in rows else np.full(len(x), np.nan) for side in ("low", "high"))
        group = _group(name)
        if _theory(name) and (spoken := THEORY.sub("", group, count=1)) in measured:
            group = spoken
        y = np.where(np.isnan(x), np.nan, y)
        found.setdefault(panel, []).append(Line(name, group, _theory(name), np.where(np.isnan(y), np.nan, x), y, low, high))
    return found


def grids(chart: Heat) -> dict[str, Grid]:
    """The grid of each panel. Raises ValueError as `lines` does, and for a cell with two values."""
    frame = _checked(chart)
    found = {}
    for panel, rows in frame.groupby("panel", sort=False):
        if rows.duplicated(["x", "y"]).any():
            raise ValueError(f"panel '{panel}' gives two values to one cell; a Heat has one row a cell")
        places = rows.assign(x=_numbers(rows, "x", chart.log_x), y=_numbers(rows, "y", chart.log_y)).dropna(subset=["x", "y"])
        cells = places.pivot(index="y", columns="x", values="value").sort_index().sort_index(axis="columns")
        values = cells.to_numpy(dtype=float)
        values = np.where(np.isfinite(values), values, np.nan)
        found[str(panel)] = Grid(cells.columns.to_numpy(dtype=float), cells.index.to_numpy(dtype=float), values)
    return found


def ways(chart: Paths) -> dict[str, list[Way]]:
    """The ways of each panel, in the order of the frame. Raises ValueError as `lines` does, and for points without a time."""
    found: dict[str, list[Way]] = {}
    frame = _checked(chart)
    axes = 3 if np.isfinite(_numbers(frame, "z", False)).any() else 2
    for key, rows in frame.groupby(["panel", "path"], sort=False):
        panel, name = map(str, cast(tuple, key))
        points = np.stack([_numbers(rows, axis, False) for axis in "xyz"], axis=1)
        # a point without one of its coordinates is nowhere
        points[np.isnan(points[:, :axes]).any(axis=1)] = np.nan
        if not np.isfinite(rows["time"]).all():
            raise ValueError(f"path '{name}' has no time at some of its points")
        found.setdefault(panel, []).append(Way(name, _group(name), _numbers(rows, "time", False), points))
    return found


def solid(moved: Mapping[str, Sequence[Way]]) -> bool:
    """Whether the points move in space, not in a plane."""
    return any(np.isfinite(way.points[:, 2]).any() for own in moved.values() for way in own)


def arced(way: Way) -> Way:
    """The way with its long steps (of a tenth of a turn about the origin and more) divided, so that they go around it."""
    known = np.isfinite(way.points).all(axis=1)
    time, points = way.time[known], way.points[known]
    size = np.linalg.norm(points, axis=1)
    parts = np.ceil(np.linalg.norm(np.diff(points, axis=0), axis=1) / (0.1 * np.maximum(size[1:], 1e-12))).astype(int)
    parts = np.where(parts < 6, 1, np.minimum(parts, 40))
    if not (parts > 1).any():
        return way
    where = np.append(np.repeat(np.arange(len(parts)), parts) + np.concatenate([np.arange(n) / n for n in parts]), len(parts))
    flat = np.stack([np.interp(where, np.arange(len(time)), axis) for axis in points.T], axis=1)
    radius = np.interp(where, np.arange(len(time)), size)
    flat *= (radius / np.maximum(np.linalg.norm(flat, axis=1), 1e-12))[:, None]
    return way._replace(time=np.interp(where, np.arange(len(time)), time), points=flat)


def pace(moved: Sequence[Way]) -> tuple[np.ndarray, np.ndarray]:
    """All times, and the share of their whole length that the ways have gone by then, from 0 to 1; even, where nothing moves."""
    time = np.unique(np.concatenate([way.time for way in moved]))
    gone = np.zeros(len(time))
    for way in moved:
        known = np.isfinite(way.points[:, 0])
        if known.any():
            steps = np.linalg.norm(np.diff(np.nan_to_num(way.points[known]), axis=0), axis=1)
            gone += np.interp(time, way.time[known], np.append(0.0, np.cumsum(steps)))
    if len(time) < 2 or gone[-1] == 0:
        return time, np.linspace(0, 1, len(time))
    return time, gone / gone[-1]


def lost(chart: Chart) -> str:
    """How many numbers cannot be drawn, as "3 of 61 points undefined"; nothing where all can."""
    if isinstance(chart, Curves):
        ys = [line.y for own in lines(chart).values() for line in own]
        log = " or not above 0" if chart.log_x or chart.log_y else ""
        return _count(ys, "points", log)
    if isinstance(chart, Heat):
        return _count([grid.values.ravel() for grid in grids(chart).values()], "cells")
    return _count([way.points[:, 0] for own in ways(chart).values() for way in own], "points")


def grouped(items: Iterable[Line] | Iterable[Way]) -> list[str]:
    """The groups of what is drawn, each once, in the order in which they come; those of theory that speak of no other, last."""
    own = list(items)
    return list(dict.fromkeys([one.group for one in own if not _theory(one.name)] + [one.group for one in own]))


def ranks(groups: Sequence[str]) -> list[int]:
    """The place of each group among all: by number where they differ in a number at their end alone, else as they come."""
    found = [NUMBERED.fullmatch(group) for group in groups]
    if not groups or any(one is None for one in found) or len({one[1] for one in found if one}) > 1:
        return list(range(len(groups)))
    return np.argsort(np.argsort([float(one[2]) for one in found if one], kind="stable"), kind="stable").tolist()


T = TypeVar("T")


def kept(items: Sequence[T], most: int) -> list[T]:
    """All, or `most` (at least two) of them evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[k] for k in np.unique(np.linspace(0, len(items) - 1, max(2, most)).round().astype(int))]


def _checked(chart: Chart) -> pd.DataFrame:
    kind = type(chart).__name__
    missing = [name for name in COLUMNS[kind].split() if name not in chart.frame]
    if missing:
        raise ValueError(f"the frame of {kind} has no column {', '.join(missing)}")
    if chart.frame.empty:
        raise ValueError(f"the frame of {kind} is empty: there is nothing to draw")
    return chart.frame


def _numbers(rows: pd.DataFrame, name: str, log: bool) -> np.ndarray:
    values = rows[name].to_numpy(dtype=float, copy=True)
    values[~np.isfinite(values)] = np.nan
    if log:
        values[~(values > 0)] = np.nan
    return values


def _theory(name: str) -> bool:
    return THEORY.match(str(name)) is not None


def _group(name: str) -> str:
    """The name without its seed, as "beta 4" of "beta 4, seed 3"."""
    return re.sub(r",? *seed \S+$", "", name)


def _count(values: Sequence[np.ndarray], what: str, why: str = "") -> str:
    whole = np.concatenate(values)
    missing = int(np.isnan(whole).sum())
    return f"{missing:,} of {whole.size:,} {what} undefined{why}" if missing else ""
