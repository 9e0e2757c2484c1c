"""How figures look: their canvas, colours, axes of depth and training, nulls and titles. No pyplot, so no global state.

Colours are those of Okabe and Ito (2008) and perceptually ordered maps, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from emformer.figures.frames import Place, along, label, origin
from emformer.figures.legible import FONT, legible

WIDTH = 8.2  # inches: 902 pixels at
DPI = 110
STYLE: dict[Any, Any] = {
    "font.family": FONT,
    "text.parse_math": False,  # a corpus may be full of $
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # fixed, or every drawing measures all ticks to find it
    "axes.labelsize": 10,
    "axes.edgecolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.formatter.useoffset": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.hashsalt": "emformer",  # or the names inside an SVG change with every writing
}
INK, GREY, PALE = "#222222", "#8a8a8a", "#d9d9d9"
SKY, BLUE, NAVY = "#56B4E9", "#0072B2", "#12355B"
GREEN, PURPLE, VERMILION = "#009E73", "#CC79A7", "#D55E00"
# of kinds that have no order: those of Okabe and Ito, the yellow darkened, and a mark each for print and who sees no colours
KINDS = (
    (BLUE, "o"),
    (VERMILION, "s"),
    (GREEN, "^"),
    (PURPLE, "D"),
    (SKY, "v"),
    ("#E69F00", "P"),
    (INK, "X"),
    ("#7A6A00", "*"),
)
STEPS = {"attn": "attention step", "ffn": "FFN step"}
BANDS = {"attn": "#fdf0dd", "ffn": "#e9f2f9"}
NULL_STYLE: dict[Any, Any] = {"color": "#555555", "linestyle": (0, (4, 3)), "linewidth": 1.3, "zorder": 3.5}
Z95 = 1.96  # half width of a 95 % interval in standard errors
LABELS = 20  # of a depth axis as wide as the figure
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green, blue
CELLS = 80  # a heat map of more is read by its colours alone


class Drawing(Figure):
    """A figure that a notebook shows by itself, which those made without pyplot do not."""

    @rc_context(STYLE)
    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=self.dpi)
        return file.getvalue()


def blank(height: float, rows: int = 1, columns: int = 1, **axes: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of one width, and its axes by rows."""
    figure = Drawing(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **axes).flat)


def finish(figure: Figure, text: str, frame: pd.DataFrame, when: Sequence[int], size: str = "") -> Figure:
    """Say what the figure shows, of which run, at which training steps, from how many, and lay it out for good."""
    return close(figure, text, origin(frame, when, size))


def close(figure: Figure, text: str, facts: str) -> Figure:
    """Say what the figure shows, below that where it is from, and lay it out for good."""
    figure.suptitle(f"{text}\n{legible(facts)}".rstrip(), x=0.01, ha="left", fontsize=12)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    # left on, it would draw the figure once more at every writing, and move it a little
    figure.set_layout_engine("none")
    return figure


def note(axes: Axes, text: str) -> None:
    """A small remark above the right end of the axes."""
    if text:
        axes.set_title(text, loc="right", fontsize=8.5, color="#555555")


def undefined(values: np.ndarray, what: str) -> str:
    """How many values are lost, as "2 of 9 states undefined"; nothing where all are known."""
    lost = int((~np.isfinite(values)).sum())
    return f"{lost} of {values.size} {what} undefined" if lost else ""


def depth_axis(axes: Axes, where: Sequence[Place], *, named: bool = True) -> None:
    """States along x, the steps of attention and FFN between them tinted; `named`: with labels, of few layers where many."""
    for point, colour in BANDS.items():
        # the step that leads to state k fills what lies between it and the state before
        bars = [(k - 1, 1) for k, place in enumerate(where) if k and place[1] == point]
        if bars:
            axes.broken_barh(bars, (0, 1), transform=axes.get_xaxis_transform(), color=colour, linewidth=0, zorder=0)
    axes.set_xlim(-0.35, max(len(where) - 1, 1) + 0.35)
    axes.set_xticks(*ticks(where, LABELS) if named else ([], []))
    if named:
        axes.set_xlabel(depth_name(where))


def depth_name(where: Sequence[Place]) -> str:
    """What the labels of states mean."""
    has = {point for _, point in where}
    said = {"embed": "X⁰ embedded", "attn": "a after attention", "ffn": "f after FFN", "block": "b after a block"}
    return f"state ({', '.join(text for point, text in said.items() if point in has)})"


def ticks(where: Sequence[Place], most: int) -> tuple[list[int], list[str]]:
    """Positions and labels of states: all, or of every few layers the last one."""
    kept = list(range(len(where)))
    if len(where) > most:
        ends = [k for k in kept if k + 1 == len(where) or where[k + 1][0] != where[k][0]]
        kept = [0, *thin(ends, most - 1)]
    return kept, [label(where[k]) for k in kept]


def thin(values: Sequence[int], most: int) -> list[int]:
    """Every n-th so that at most `most` are left, the last one among them."""
    stride = -(-len(values) // most)
    return list(values[::-1][::stride][::-1])


def bars(axes: Axes, x: Sequence[float] | np.ndarray, y: np.ndarray, se: np.ndarray, **line: Any) -> None:
    """A line with 95 % intervals; where the standard error is not known, without."""
    look: dict[str, Any] = {"fmt": "o-", "elinewidth": 1.2, "capsize": 2.5, "zorder": 4} | line
    axes.errorbar(x, y, Z95 * se if np.isfinite(se).any() else None, **look)


def draw_null(
    axes: Axes, x: Sequence[float] | np.ndarray, rows: pd.DataFrame, where: Sequence[Place], step: int, factor: float = 1.0
) -> bool:
    """The null of the rows as a dashed line, with a band of ± 1.96 of its standard deviation; whether there is one."""
    null, sd = (factor * along(rows, where, step, column) for column in ("null", "null_sd"))
    if not np.isfinite(null).any():
        return False
    # of a single place a line has no length
    wide = np.array([x[0] - 0.3, x[0] + 0.3]) if len(x) == 1 else x
    axes.plot(wide, np.broadcast_to(null, len(wide)), **NULL_STYLE)
    if np.isfinite(sd).any():
        low, high = (np.broadcast_to(null + sign * Z95 * sd, len(wide)) for sign in (-1, 1))
        axes.fill_between(wide, low, high, color=GREY, alpha=0.2, linewidth=0, zorder=1)
    return True


def legend(figure: Figure, where: Sequence[Place], handles: Sequence[Artist], nulls: str = "") -> None:
    """The legend below the axes: handles, what a dashed line is, and the tints of the steps there are."""
    shown = [*handles]
    if nulls:
        shown.append(Line2D([], [], label=nulls, **NULL_STYLE))
    shown += [Patch(color=colour, label=STEPS[point]) for point, colour in BANDS.items() if any(p == point for _, p in where)]
    if shown:
        figure.legend(handles=shown, loc="outside lower center", ncols=4)


def shading(low: float | int, high: float | int) -> ScalarMappable:
    """Colours from pale at `low` to dark at `high` (of an empty range, dark), all of them legible on white."""
    return ScalarMappable(Normalize(low if high > low else high - 1, high), _pale_to_dark())


def _pale_to_dark() -> ListedColormap:
    whole = matplotlib.colormaps["viridis_r"]
    # the palest tenth cannot be read on white
    return ListedColormap([whole(share) for share in np.linspace(0.12, 1.0, 256)])


class Shades:
    """A colour for each training step, pale to dark, even in log(1 + step)."""

    def __init__(self, steps: Sequence[int]):
        self.steps = list(steps)
        self.map = _pale_to_dark()
        first, last = np.log1p(self.steps[0]), np.log1p(self.steps[-1])
        self.norm = Normalize(first if last > first else last - 1, last)

    def __getitem__(self, step: int) -> tuple[float, ...]:
        return self.map(self.norm(np.log1p(step)))

    def bar(self, figure: Figure, axes: Sequence[Axes]) -> None:
        """The legend of the colours, if there is more than one."""
        if len(self.steps) < 2:
            return
        bar = figure.colorbar(ScalarMappable(self.norm, self.map), ax=list(axes), label="training step", aspect=35, pad=0.015)
        shown: list[int] = []
        for step in self.steps[::-1]:
            if not shown or abs(self.norm(np.log1p(shown[-1])) - self.norm(np.log1p(step))) > 0.06:
                shown.append(step)
        bar.set_ticks([np.log1p(step) for step in shown], labels=[str(step) for step in shown])
        bar.minorticks_off()
        bar.outline.set_visible(False)


def heat(figure: Figure, axes: Axes, values: np.ndarray, colours: Colormap, limits: tuple[float, float], name: str) -> None:
    """Values (rows, columns) as colours, the first row at the bottom; undefined cells grey, few cells with their numbers."""
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colours.with_extremes(bad=PALE),
        norm=Normalize(*limits),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, label=name, aspect=25, pad=0.02, ticks=np.linspace(*limits, 5))
    bar.outline.set_edgecolor(PALE)
    if values.size > CELLS:
        return
    font = FontProperties(size=8.5 if values.shape[1] <= 7 else 7)  # one for all: matplotlib is slow to make them
    shades = np.asarray(image.cmap(image.norm(np.ma.masked_invalid(values))))[..., :3] @ LUMINANCE
    for (row, column), value in np.ndenumerate(values):
        text = f"{value:.2f}".replace("-", "−") if np.isfinite(value) else "?"
        colour = INK if shades[row, column] > 0.5 else "white"
        text = "0.00" if text == "−0.00" else text
        axes.text(column, row, text, color=colour, ha="center", va="center", fontproperties=font, clip_on=True)


def grey(values: np.ndarray, name: str) -> str:
    """The name of an axis below a heat map, and how many of its cells are undefined."""
    lost = undefined(values, "cells")
    return f"{name}  (grey: {lost})".strip() if lost else name


def chance(null: pd.Series, name: str = "by chance") -> str:
    """What chance alone would give, as a remark in brackets; nothing where no row has a null."""
    known = null.dropna()
    return f" ({name} {known.mean():.2g})".replace("-", "−") if len(known) else ""
