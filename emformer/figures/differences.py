"""What several runs differ in: a forest of differences with their intervals."""

from __future__ import annotations

from pathlib import PurePath

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from emformer.figures.frames import ORDER, Place, label
from emformer.figures.legible import legible
from emformer.figures.style import GREY, INK, KINDS, STYLE, blank, close, note, thin

KEYS = 9
PLACES = 26  # rows with names
LEVEL = 0.05
WHOLE: Place = (-1, "")  # of the whole flow


@rc_context(STYLE)
def difference(frame: pd.DataFrame, most: int = KEYS) -> Figure | None:
    """Differences to the first run with 95 % intervals, a panel a key, a row a layer; each panel has the scale of its key.

    Filled where the interval leaves out 0. Of all heads together, and of the plainest rows of a key: without parameters where it
    has such, of the raw cloud where it has one. The keys are those of which most rows differ.

    Args:
        frame: `emformer.comparison.compare`'s: columns key, layer, point, head, cloud, param, run, difference, low, high, and q,
            by which rows are counted as different where it is there.
        most: panels.

    Returns None without a difference.
    """
    rows = frame[frame["difference"].notna() & frame["head"].isna()]
    if rows.empty:
        return None
    plain = [_plainest(own) for _, own in rows.groupby("key", sort=False)]
    plain.sort(key=lambda own: (-_different(own).sum(), -len(own), str(own["key"].iloc[0])))
    shown = plain[:most]
    runs = list(dict.fromkeys(pd.concat(shown)["run"]))
    base = [str(run) for run in frame["run"].unique() if run not in set(rows["run"])]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    places = [len(set(_places(own))) for own in shown]
    heights = [max(places[line * columns : (line + 1) * columns]) for line in range(lines)]
    heights = [float(np.clip(0.8 + 0.16 * count * len(runs) ** 0.5, 1.3, 4.2)) for count in heights]
    figure, axes = blank(1.7 + sum(heights), lines, columns, height_ratios=heights)
    for one, own in zip(axes, shown, strict=False):
        _panel(one, own, runs)
    for one in axes[len(shown) :]:
        one.remove()
    handles = []
    for k, run in enumerate(runs):
        colour, marker = KINDS[k % len(KINDS)]
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=legible(PurePath(str(run)).name, 40)))
    handles.append(Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="", label="interval holds 0"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    to = f"to {PurePath(base[0]).name}" if base else "to the first run"
    left = f"; {len(plain) - len(shown)} more keys not drawn" if len(plain) > len(shown) else ""
    different = int(_different(rows).sum())
    rule = f"q ≤ {LEVEL:g}" if "q" in rows else "by their intervals"
    facts = f"{different} of {len(rows)} rows of all heads together differ ({rule}){left}"
    return close(figure, f"Differences {legible(to, 60)}, with 95 % intervals", facts)


def _plainest(own: pd.DataFrame) -> pd.DataFrame:
    """Of one key the rows of one cloud and parameter."""
    kinds = own[["cloud", "param"]].fillna("").drop_duplicates().to_dict("records")
    best = min(kinds, key=lambda kind: (kind["cloud"] != "raw", len(str(kind["param"])), str(kind["param"]), str(kind["cloud"])))
    return own[(own["cloud"].fillna("") == best["cloud"]) & (own["param"].fillna("") == best["param"])]


def _different(rows: pd.DataFrame) -> np.ndarray:
    """Whether each is counted as different: by its q where there is one, else by its interval."""
    low, high = (rows[name].to_numpy(float, na_value=np.nan) for name in ("low", "high"))
    outside = (low > 0) | (high < 0)
    if "q" not in rows:
        return outside
    q = rows["q"].to_numpy(float, na_value=np.nan)
    return np.where(np.isnan(q), outside, q <= LEVEL)


def _panel(axes: Axes, own: pd.DataFrame, runs: list[str]) -> None:
    where = sorted(set(_places(own)), key=lambda place: (place[0], ORDER.get(place[1], len(ORDER)), place[1]))
    at = {place: k for k, place in enumerate(where)}
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    unknown = 0
    for k, run in enumerate(runs):
        colour, marker = KINDS[k % len(KINDS)]
        rows = own[own["run"] == run]
        y = np.array([at[place] for place in _places(rows)], float)
        y += 0.5 * ((k + 0.5) / len(runs) - 0.5)  # runs a little apart
        x, low, high = (rows[name].to_numpy(float, na_value=np.nan) for name in ("difference", "low", "high"))
        axes.hlines(y, low, high, color=colour, linewidth=1.3, zorder=2)
        outside = (low > 0) | (high < 0)
        for sure, face in ((outside, colour), (~outside, "white")):
            axes.plot(x[sure], y[sure], marker, linestyle="", color=colour, markerfacecolor=face, markersize=4.5, zorder=3)
        unknown += int(np.isnan(low).sum())
    shown = thin(range(len(where)), PLACES)
    axes.set_yticks(shown, ["whole" if where[k] == WHOLE else label(where[k]) for k in shown], fontsize=8)
    axes.set_ylim(len(where) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x")
    cloud, param = own["cloud"].iloc[0], own["param"].iloc[0]
    more = [str(word) for word in (cloud, param) if not pd.isna(word) and word not in ("raw", "")]
    axes.set_title(" ".join([str(own["key"].iloc[0]), *more]), fontsize=9.5)
    note(axes, f"{unknown} without interval" if unknown else "")


def _places(rows: pd.DataFrame) -> list[Place]:
    layers, points = rows["layer"].to_numpy(float, na_value=np.nan), rows["point"].to_numpy(object, na_value="")
    return [WHOLE if np.isnan(layer) else (int(layer), str(point)) for layer, point in zip(layers, points, strict=True)]
