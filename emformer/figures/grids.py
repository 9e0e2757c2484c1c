"""Values on a grid as colours: undefined cells grey, few cells with their numbers."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FixedLocator, NullLocator

from emformer.figures.layout import NAME, logarithmic, nothing, paged, spread, tell
from emformer.figures.legible import legible
from emformer.figures.panels import Grid, grids, lost
from emformer.figures.style import CELLS, INK, LUMINANCE, PALE
from emformer.theory.outcome import Heat

TICKS = 9  # of an axis; cells of more are named by even numbers


def draw_grids(chart: Heat, title: str = "") -> Figure:
    """The figure of `emformer.figures.charts.draw` for values on a grid; all panels have one scale of colours."""
    found, left = paged(grids(chart))
    values = np.concatenate([grid.values.ravel() for grid in found.values()])
    gone, low, high = lost(chart), *limits(chart, values)
    rounding = 1e-9 * (high - low)
    beyond = int(((values < low - rounding) | (values > high + rounding)).sum())
    facts = [title, left, f"grey: {gone}" if gone else "", f"{beyond} cells are beyond the scale" if beyond else ""]
    columns = {1: 1, 2: 2, 4: 2}.get(len(found), 3)
    figure, places = spread(list(found), chart.caption, facts, columns, {1: 3.6, 2: 2.9, 3: 2.4}[columns], 0.0)
    colours = colour_map(low, high).with_extremes(bad=PALE)
    norm = Normalize(low, high)
    shades = ScalarMappable(norm, colours)
    for k, (axes, grid) in enumerate(zip(places, found.values(), strict=True)):
        axes.set_xlabel(legible(chart.x, NAME))
        axes.set_ylabel(legible(chart.y, NAME) if k % columns == 0 else "")
        if not np.isfinite(grid.values).any():
            nothing(axes)
            continue
        _panel(axes, grid, chart, colours, norm)
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = ends[bool((values < low - rounding).any()), bool((values > high + rounding).any())]
    bar = figure.colorbar(shades, ax=places, label=legible(chart.value, NAME), aspect=28, pad=0.02, extend=extend)
    bar.outline.set_edgecolor(PALE)
    return tell(figure, chart.caption, facts)


def limits(chart: Heat, values: np.ndarray) -> tuple[float, float]:
    """The ends of the scale of colours: those of the chart, else of the values; never one number."""
    known = values[np.isfinite(values)]
    low, high = chart.limits or ((float(known.min()), float(known.max())) if known.size else (0.0, 1.0))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def colour_map(low: float, high: float) -> Colormap:
    """White in the middle where the scale is even about 0, from dark to light elsewhere."""
    return matplotlib.colormaps["RdBu_r" if np.isclose(low, -high) else "viridis"]


def edges(centres: np.ndarray, log: bool) -> np.ndarray:
    """Where cells end: halfway to the next (of logarithms, on such an axis); the outer ones as wide as their neighbours."""
    x = np.log(centres) if log else centres
    if len(x) == 1:
        found = np.array([x[0] - 0.5, x[0] + 0.5])
    else:
        middle = (x[1:] + x[:-1]) / 2
        found = np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])
    return np.exp(found) if log else found


def written(value: float, whole: bool) -> str:
    """A number for a cell."""
    if np.isnan(value):
        return "?"
    text = f"{value:.0f}" if whole else f"{value:.2f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.1e}"
    return text.replace("-", "−")


def _panel(axes: Axes, grid: Grid, chart: Heat, colours: Colormap, norm: Normalize) -> None:
    for axis, log, own in ((axes.xaxis, chart.log_x, grid.x), (axes.yaxis, chart.log_y, grid.y)):
        ends = edges(own, log)
        axis.set_view_interval(ends[0], ends[-1], ignore=True)
        if log:
            logarithmic(axis)
        if len(own) <= TICKS:
            axis.set_major_locator(FixedLocator(own.tolist()))
            axis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("-", "−"))
            axis.set_minor_locator(NullLocator())
    mesh = axes.pcolormesh(
        edges(grid.x, chart.log_x),
        edges(grid.y, chart.log_y),
        np.ma.masked_invalid(grid.values),
        cmap=colours,
        norm=norm,
        rasterized=grid.values.size > 10_000,
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2.5, color=PALE)
    if grid.values.size <= CELLS:
        _numbers(axes, grid, mesh)


def _numbers(axes: Axes, grid: Grid, mesh: QuadMesh) -> None:
    known = grid.values[np.isfinite(grid.values)]
    whole = bool((known == known.round()).all())
    font = FontProperties(size=8 if len(grid.x) <= 7 else 7)
    bright = np.asarray(mesh.cmap(mesh.norm(np.ma.masked_invalid(grid.values))))[..., :3] @ LUMINANCE
    for (row, column), value in np.ndenumerate(grid.values):
        colour = INK if bright[row, column] > 0.5 else "white"
        place = grid.x[column], grid.y[row]
        axes.text(*place, written(value, whole), color=colour, ha="center", va="center", fontproperties=font, clip_on=True)
