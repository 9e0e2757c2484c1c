"""Charts of the idealised models on paper: lines, grids of values and points that move.

    for name, chart in outcome.charts.items():
        save(draw(chart), folder / f"{name}.png")

What a chart is made of is defined in `emformer.theory.outcome`; `emformer.report.charts` draws the same on a page.
"""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.figure import Figure

from emformer.figures.curves import draw_curves
from emformer.figures.grids import draw_grids
from emformer.figures.style import STYLE
from emformer.figures.ways import draw_ways
from emformer.theory.outcome import Chart, Curves, Heat


@rc_context(STYLE)
def draw(chart: Chart, title: str = "") -> Figure:
    """The chart as a figure, its caption above it; below the caption `title` and what is left out or undefined, counted.

    What is undefined throughout is drawn as an empty panel that says so. The same chart gives the same bytes when saved.

    Args:
        chart: lines, a grid of values or points that move; text in it is drawn as it is, nothing in it is obeyed.
        title: of which simulation it is.

    Raises:
        ValueError: for a frame without rows, without one of its columns, or with two values for one cell.
    """
    if isinstance(chart, Curves):
        return draw_curves(chart, title)
    if isinstance(chart, Heat):
        return draw_grids(chart, title)
    return draw_ways(chart, title)
