"""Clustering: how tokens gather along the depth, and how that changes with training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from emformer.figures.frames import Place, along, at, grid, pick, places, sample, steps, trained
from emformer.figures.style import (
    BLUE,
    GREEN,
    GREY,
    LABELS,
    NAVY,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    Shades,
    bars,
    blank,
    chance,
    depth_axis,
    depth_name,
    draw_null,
    finish,
    grey,
    heat,
    legend,
    note,
    thin,
    ticks,
    undefined,
)

NICE = (0.1, 0.2, 0.5, 1.0)  # ends of a scale of cosines; less than the first is as good as none
CLASSES = {"label=class": "class", "label=token": "token id"}
TITLES = {
    "clusters": ("how many in a prompt: pieces of the graph cos ≥ c", "prompts"),
    "silhouette": ("how distinct, over all prompts (0: no clusters)", "tokens"),
}
THRESHOLDS = {"c=0.9": SKY, "c=0.99": BLUE, "c=0.999": NAVY}
SILHOUETTES = {
    "clu.silhouette": ("k-means", VERMILION),
    "clu.density_silhouette": ("HDBSCAN", GREEN),
    "clu.best_silhouette": ("best k", PURPLE),
}


class Curve(NamedTuple):
    name: str
    rows: pd.DataFrame
    colour: str


@rc_context(STYLE)
def cosines(frame: pd.DataFrame) -> Figure | None:
    """The mean cosine between tokens by depth and training step, of the raw cloud and with the mean removed.

    Blue is below 0, red above; each scale is symmetric about 0 and ends at the least round number that holds its values.

    Returns None without `clu.mean_cos` of the raw cloud and `clu.mean_cos_centred`. Raises ValueError for several runs.
    """
    both = {"raw cloud": pick(frame, "clu.mean_cos"), "mean removed": pick(frame, "clu.mean_cos_centred", cloud="centred")}
    both = {name: rows for name, rows in both.items() if not rows.empty}
    if not both:
        return None
    recorded, where = steps(*both.values()), places(*both.values())
    figure, panels = blank(float(np.clip(1.8 + 0.3 * len(where), 4.0, 7.5)), 1, len(both), sharey=True)
    for axes, (name, rows) in zip(panels, both.items(), strict=True):
        own = steps(rows)
        values = grid(rows, where, own).T
        size = np.nanmax(np.abs(values), initial=0.0)
        end = next((nice for nice in NICE if size <= nice), 1.0)
        scale = "mean cosine" if axes is panels[-1] else ""
        heat(figure, axes, values, matplotlib.colormaps["RdBu_r"], (-end, end), scale)
        shown = thin(range(len(own)), 14 // len(both)) if trained(frame) else []
        axes.set_xticks(shown, [str(own[k]) for k in shown])
        axes.set(title=name + chance(rows["null"]), xlabel=grey(values, "training step" if trained(frame) else ""))
    panels[0].set_yticks(*ticks(where, LABELS))
    panels[0].set_ylabel(depth_name(where))
    return finish(figure, "Mean cosine between tokens", frame, recorded, sample("prompts", *both.values()))


@rc_context(STYLE)
def separation(frame: pd.DataFrame) -> Figure | None:
    """W/T, the share of the cloud's variance that lies within the labels' classes, by depth, a line a training step.

    In [0, 1]: lower is better separated. Labels are the true classes where they were recorded, else token ids. Dashed: the null
    of labels at random. The last training step carries 95 % intervals.

    Returns None without `clu.wt_ratio` of either. Raises ValueError for several runs in one frame.
    """
    by_label = {name: rows for param, name in CLASSES.items() if not (rows := pick(frame, "clu.wt_ratio", param=param)).empty}
    if not by_label:
        return None
    name, rows = next(iter(by_label.items()))
    recorded, where = steps(rows), places(rows)
    shades, x = Shades(recorded), np.arange(len(where))
    figure, (axes,) = blank(4.4)
    depth_axis(axes, where)
    axes.grid(axis="y")
    values = grid(rows, where, recorded)
    for step, y in zip(recorded[:-1], values[:-1], strict=True):
        axes.plot(x, y, "o-", color=shades[step], zorder=3)
    bars(axes, x, values[-1], along(rows, where, recorded[-1], "se"), color=shades[recorded[-1]])
    null = draw_null(axes, x, rows, where, recorded[-1])
    axes.set_ylabel("W/T: variance within classes, share of all\n(lower: better separated)")
    note(axes, undefined(values, "values"))
    legend(figure, where, [], "labels at random" if null else "")
    shades.bar(figure, [axes])
    return finish(figure, f"Label separation: tokens grouped by {name}", frame, recorded, sample("tokens", rows))


@rc_context(STYLE)
def clusters(frame: pd.DataFrame) -> Figure | None:
    """The number of clusters (connected components of the graph cos >= c) and the silhouette by depth.

    The last training step in full lines with 95 % intervals, the untrained model (step 0) in dotted ones; dashed: the null.
    Silhouettes: of k-means, of HDBSCAN, and the best of k-means over k.

    Returns None without `clu.components` at c = 0.9, 0.99 or 0.999 and without silhouettes. Raises ValueError for several runs.
    """
    panels = {
        "clusters": [Curve(c, pick(frame, "clu.components", param=c), colour) for c, colour in THRESHOLDS.items()],
        "silhouette": [Curve(name, pick(frame, key), colour) for key, (name, colour) in SILHOUETTES.items()],
    }
    panels = {name: kept for name, curves in panels.items() if (kept := [one for one in curves if len(one.rows)])}
    if not panels:
        return None
    rows = [curve.rows for curves in panels.values() for curve in curves]
    recorded, where = steps(*rows), places(*rows)
    figure, axes = blank(1.4 + 2.3 * len(panels), len(panels), sharex=True)
    null = False
    for one, (name, curves) in zip(axes, panels.items(), strict=True):
        depth_axis(one, where, named=one is axes[-1])
        one.grid(axis="y")
        null |= any([_draw(one, curve, where) for curve in curves])
        values = np.stack([along(curve.rows, where, steps(curve.rows)[-1]) for curve in curves])
        note(one, undefined(values, "values"))
        if name == "clusters" and np.isfinite(values).any():
            one.set_yscale("log")
            one.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
        handles = [Line2D([], [], marker="o", color=curve.colour, label=_name(curve, recorded[-1])) for curve in curves]
        one.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))
        heading, unit = TITLES[name]
        one.set(title=f"{heading}, {sample(unit, *(at(curve.rows, recorded[-1]) for curve in curves))}".rstrip(", "), ylabel=name)
    untrained = [Line2D([], [], color=GREY, linestyle=":", label="untrained (step 0)")] if recorded[0] == 0 < recorded[-1] else []
    legend(figure, where, untrained, "expected by chance" if null else "")
    return finish(figure, "Clusters along the depth", frame, recorded[-1:])


def _draw(axes: Axes, curve: Curve, where: Sequence[Place]) -> bool:
    x, recorded = np.arange(len(where)), steps(curve.rows)
    last = recorded[-1]
    bars(axes, x, along(curve.rows, where, last), along(curve.rows, where, last, "se"), color=curve.colour)
    if recorded[0] == 0 < last:
        axes.plot(x, along(curve.rows, where, 0), ":", color=curve.colour, linewidth=1.5, zorder=3)
    return draw_null(axes, x, curve.rows, where, last)


def _name(curve: Curve, step: int) -> str:
    own = steps(curve.rows)[-1]
    return curve.name + (f" (step {own})" if own != step else "")
