"""Lines over x: seeds of one setting in one colour, theory dashed, bands where the error is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from emformer.figures.layout import (
    ENTRIES,
    NAME,
    Look,
    foot,
    legend,
    logarithmic,
    looks,
    nothing,
    paged,
    seeded,
    spread,
    tell,
    unnamed,
)
from emformer.figures.legible import legible
from emformer.figures.panels import Line, grouped, kept, lines, lost
from emformer.figures.style import INK
from emformer.theory.outcome import Curves

POINTS = 12  # a line of more shows none of its points
DASHES = ((0, (5, 2.5)), (0, (1, 1.6)), (0, (7, 2, 1, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5)))


def draw_curves(chart: Curves, title: str = "") -> Figure:
    """The figure of `emformer.figures.charts.draw` for lines."""
    found, left = paged(lines(chart))
    own = [line for panel in found.values() for line in panel]
    measured = looks(grouped([line for line in own if not line.theory]))
    told = {name: DASHES[k % len(DASHES)] for k, name in enumerate(_spoken(own, measured))}
    handles = [_handle(group, look, own) for group, look in measured.items() if look.named]
    if any(line.theory and line.group in measured for line in own):
        handles.append(Line2D([], [], color=INK, linestyle=DASHES[0], linewidth=1.6, label="theory, in the colour of its line"))
    named = kept(list(told), ENTRIES)
    handles += [Line2D([], [], color=INK, linestyle=told[name], linewidth=1.6, label=legible(name, NAME)) for name in named]
    facts = [title, lost(chart), left, unnamed(measured, "lines")]
    facts += [f"{len(told) - len(named)} of {len(told)} lines of theory not named"] if len(named) < len(told) else []
    names, columns = list(found), 1 if len(found) == 1 else 2
    under = foot([str(handle.get_label()) for handle in handles])
    figure, places = spread(names, chart.caption, facts, columns, 3.4 if columns == 1 else 2.6, under)
    for axes, panel in zip(places, found.values(), strict=True):
        axes.set(xlabel=legible(chart.x, NAME), ylabel=legible(chart.y, NAME))
        if not any(np.isfinite(line.y).any() for line in panel):
            nothing(axes)
            continue
        _panel(axes, panel, measured, told, chart.log_y)
        for axis in [axes.xaxis] * chart.log_x + [axes.yaxis] * chart.log_y:
            logarithmic(axis)
        axes.grid(axis="both")
    legend(figure, handles)
    return tell(figure, chart.caption, facts)


def _spoken(own: Sequence[Line], measured: dict[str, Look]) -> list[str]:
    """Names of the lines of theory that are in the colour of no other."""
    return list(dict.fromkeys(line.name for line in own if line.theory and line.group not in measured))


def _handle(group: str, look: Look, own: Sequence[Line]) -> Line2D:
    mine = [line for line in own if line.group == group and not line.theory]
    seeds = len({line.name for line in mine if line.one_seed})
    return Line2D([], [], color=look.colour, marker=look.mark if _marked(mine) else "", label=seeded(group, seeds))


def _marked(own: Sequence[Line]) -> bool:
    return max(len(line.x) for line in own) <= POINTS


def _panel(axes: Axes, panel: Sequence[Line], measured: dict[str, Look], told: dict[str, tuple], log: bool) -> None:
    crowd = {group: sum(line.group == group and line.one_seed for line in panel) for group in measured}
    led = {line.group for line in panel if not line.theory and not line.one_seed}  # by the mean of their seeds
    for line in panel:
        if line.theory:
            known = measured.get(line.group)
            colour = INK if known is None else tuple(0.6 * part for part in to_rgb(known.colour))
            axes.plot(line.x, line.y, linestyle=told.get(line.name, DASHES[0]), color=colour, linewidth=1.6, zorder=4)
            _band(axes, line, colour, log)
            continue
        look, many = measured[line.group], line.one_seed and crowd[line.group] > 1
        alone, behind = np.isfinite(line.y).sum() == 1, many and line.group in led
        axes.plot(
            line.x,
            line.y,
            color=look.colour,
            marker=look.mark if alone or (_marked([line]) and not behind) else "",
            markersize=4 if many else 5,
            markeredgecolor="white",
            markeredgewidth=0.4,
            linewidth=0.9 if many else 1.8,
            alpha=0.35 if behind else max(0.35, 0.85 - 0.05 * crowd[line.group]) if many else 1.0,
            zorder=3,
        )
        _band(axes, line, look.colour, log)


def _band(axes: Axes, line: Line, colour: Any, log: bool) -> None:
    if np.isfinite(line.low).any() and np.isfinite(line.high).any():
        # a band that reaches 0 goes down as far as the eye does
        low = np.maximum(line.low, np.nanmin(line.y) / 10) if log else line.low
        axes.fill_between(line.x, low, line.high, color=colour, alpha=0.16, linewidth=0, zorder=2)
