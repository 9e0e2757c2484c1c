"""How the panels of a chart share a figure: their number and places, its words, its legend."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from emformer.figures.legible import legible
from emformer.figures.panels import kept, ranks
from emformer.figures.style import GREY, KINDS, blank, close, shading

PANELS = 12
ENTRIES = 8  # of a legend, beside those of theory
TITLE = 84  # characters of the titles of panels side by side
NAME = 60  # characters of a name in a legend
WORDS = 88  # characters of a line above the axes
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

T = TypeVar("T")


class Look(NamedTuple):
    """How a group is drawn: a colour for who sees colours, a mark for who does not, and whether the legend has room for it."""

    colour: Any
    mark: str
    named: bool = True


def looks(groups: Sequence[str]) -> dict[str, Look]:
    """A look for each group: few are told apart, many are shades in the order of their `ranks`, of which some are named."""
    if len(groups) <= ENTRIES:
        return {group: Look(*look) for group, look in zip(groups, KINDS, strict=False)}
    shades, named = shading(0, len(groups) - 1), set(kept(range(len(groups)), ENTRIES))
    ordered = sorted(zip(ranks(groups), groups, strict=True))
    return {group: Look(tuple(shades.to_rgba(np.array([k]))[0]), "o", k in named) for k, group in ordered}


def seeded(group: str, seeds: int) -> str:
    """The name of a group in a legend, and how many of its lines differ by their seed alone."""
    told = legible(group, NAME)
    return told if seeds < 2 else f"{told} ({seeds} seeds)" if told else f"{seeds} seeds"


def unnamed(found: Mapping[str, Look], what: str) -> str:
    """How many groups the legend leaves out, as "12 of 20 lines not named"."""
    left = sum(not look.named for look in found.values())
    return f"{left} of {len(found)} {what} not named" if left else ""


def paged(panels: Mapping[str, T]) -> tuple[dict[str, T], str]:
    """The panels that are drawn, evenly spaced, and how many are not."""
    shown = {name: panels[name] for name in kept(list(panels), PANELS)}
    left = len(panels) - len(shown)
    return shown, f"{left} of {len(panels)} panels not drawn" if left else ""


def spread(
    names: Sequence[str], caption: str, facts: Sequence[str], columns: int, height: float, foot: float, **axes: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with a titled panel for each name, `columns` in a row, each `height` inches high; `foot`: for what is below."""
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    head = 0.3 + 0.2 * (len(words(caption)) + len(words(said(facts))))
    figure, places = blank(head + foot + height * rows, rows, columns, **axes)
    for extra in places[len(names) :]:
        extra.remove()
    for one, name in zip(places, names, strict=False):
        if len(names) > 1 or name:
            one.set_title("\n".join(textwrap.wrap(legible(name, NAME), TITLE // columns)), loc="left")
    return figure, places[: len(names)]


def tell(figure: Figure, caption: str, facts: Sequence[str]) -> Figure:
    """The caption and what there is to say beside it, each in lines that fit."""
    told = "\n".join(words(caption))
    # `close` shows line ends of the facts as signs, so they come after it
    return close(figure, "\n".join([told, *words(said(facts))]), "")


def said(facts: Sequence[str]) -> str:
    return "; ".join(fact for fact in facts if fact)


def words(text: str) -> list[str]:
    """Text as lines that fit above the axes, legible."""
    return textwrap.wrap(legible(" ".join(text.split())), WORDS)


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """The legend below the axes, in as many columns as its longest name leaves room for."""
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        figure.legend(handles=list(handles), loc="outside lower center", ncols=max(1, min(4, 110 // (longest + 8))))


def foot(names: Sequence[str]) -> float:
    """Inches that a legend of these names needs."""
    if not names:
        return 0.0
    columns = max(1, min(4, 110 // (max(map(len, names)) + 8)))
    return 0.15 + 0.19 * -(-len(names) // columns)


def plain(value: float | int, _: float | int | None = None) -> str:
    """A number on an axis that spans little, as 0.02 and 500."""
    return f"{value:.10g}".replace("-", "−")


def power(value: float | int, _: float | int | None = None) -> str:
    """A power of ten on an axis that spans much, in signs that need no formula: 10⁻⁷, 1, 10, 10²."""
    exponent = round(float(np.log10(value)))
    return plain(value) if value in (1.0, 10.0) else f"10{str(exponent).translate(RAISED)}"


def logarithmic(axis: Axis) -> None:
    """Make the axis logarithmic, with names at powers of 10, and between them where it spans few."""
    axes = axis.axes
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    wide = high / low
    axis.set_major_locator(
        MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]) if wide < 5 else LogLocator(subs=(1, 2, 5) if wide < 30 else (1,), numticks=8)
    )
    axis.set_major_formatter(power if wide > 3e4 else plain)
    axis.set_minor_formatter(NullFormatter())


def nothing(axes: Axes) -> None:
    """Say in an empty panel that it is."""
    axes.set(xticks=[], yticks=[])
    axes.annotate("undefined throughout", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color=GREY)
