"""Flow: how far and in which direction each layer moves the cloud."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from emformer.figures.frames import along, grid, pick, places, sample, steps
from emformer.figures.style import BANDS, GREY, STYLE, Shades, bars, blank, draw_null, finish, legend

KINDS = {"attn": "attention of layer", "ffn": "FFN of layer", "block": "block"}
GAP = 1.2  # between the layers of one kind and of the next
LABELS = 16  # layers named on the axis of one panel


class Panel(NamedTuple):
    key: str
    title: str
    unit: str
    factor: float = 1.0
    cloud: str = "raw"


PANELS = (
    Panel("flow.speed_rel", "relative speed", "|D| / |x|"),
    Panel("flow.angular", "angular speed, read cloud", "degrees", 180 / math.pi, "read"),
    Panel("flow.interference", "interference with the stream", "cos(x, D)"),
    Panel("flow.head_cancel", "cancellation between heads", "1 − |ΣD| / Σ|D|"),
)


@rc_context(STYLE)
def flow(frame: pd.DataFrame) -> Figure | None:
    """Relative and angular speed, interference and head cancellation of each layer, a line a training step.

    The steps of attention and of the FFN stand side by side, each in the order of the layers. Dashed: the null, where rows have
    one. The last training step carries 95 % intervals.

    Returns None without any of `flow.speed_rel`, `flow.angular`, `flow.interference`, `flow.head_cancel`; panels of missing ones
    are left out. Raises ValueError for several runs in one frame.
    """
    found = {panel: rows for panel in PANELS if not (rows := pick(frame, panel.key, cloud=panel.cloud)).empty}
    if not found:
        return None
    recorded, where = steps(*found.values()), places(*found.values())
    layers = max(layer for layer, _ in where) + 1
    kinds = [point for point in KINDS if any(p == point for _, p in where)]
    start = {point: k * (layers - 1 + GAP) for k, point in enumerate(kinds)}
    shades, lines = Shades(recorded), -(-len(found) // 2)
    figure, axes = blank(1.3 + 2.4 * lines, lines, min(2, len(found)), sharex=True)
    nulls = [_draw(one, panel, rows, start, shades) for one, (panel, rows) in zip(axes, found.items(), strict=False)]
    shown = range(0, layers, -(-layers * len(kinds) // LABELS))
    axes[0].set_xticks([start[p] + layer for p in kinds for layer in shown], [str(layer) for _ in kinds for layer in shown])
    axes[0].set_xlim(-GAP / 2, start[kinds[-1]] + layers - 1 + GAP / 2)
    for k, one in enumerate(axes):
        if k >= len(found):
            one.remove()
        elif k + 2 >= len(found):
            one.tick_params(labelbottom=True)
            for point, x in start.items():
                middle = (x + (layers - 1) / 2, 0)
                one.annotate(
                    KINDS[point],
                    middle,
                    (0, -20),
                    xycoords=one.get_xaxis_transform(),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                )
        for point, x in start.items():
            one.axvspan(x - GAP / 2, x + layers - 1 + GAP / 2, color=BANDS.get(point, "white"), linewidth=0, zorder=0)
    legend(figure, [], [], "expected by chance" if any(nulls) else "")
    shades.bar(figure, axes[: len(found)])
    return finish(figure, "Flow: how each layer moves the cloud", frame, recorded, sample("prompts", *found.values()))


def _draw(axes: Axes, panel: Panel, rows: pd.DataFrame, start: dict[str, float], shades: Shades) -> bool:
    recorded, nulls = steps(rows), False
    for point, first in start.items():
        where = [place for place in places(rows) if place[1] == point]
        if not where:
            axes.text(first, 0.5, "no heads", color=GREY, transform=axes.get_xaxis_transform(), clip_on=True)
            continue
        x = [first + layer for layer, _ in where]
        for step, y in zip(recorded[:-1], panel.factor * grid(rows, where, recorded[:-1]), strict=True):
            axes.plot(x, y, "o-", color=shades[step], markersize=3.5, linewidth=1.4)
        mean, se = (panel.factor * along(rows, where, recorded[-1], column) for column in ("mean", "se"))
        bars(axes, x, mean, se, color=shades[recorded[-1]])
        nulls |= draw_null(axes, x, rows, where, recorded[-1], panel.factor)
    lost = int(np.isnan(grid(rows, places(rows), recorded)).sum())
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set(title=panel.title + (f" ({lost} undefined)" if lost else ""), ylabel=panel.unit)
    return nulls
