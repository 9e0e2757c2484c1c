"""Points that move: their ways on the sphere, over the cone, in the circle or the plane, early pale and late dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import FuncNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from mpl_toolkits.mplot3d.axes3d import Axes3D

from emformer.figures.layout import ENTRIES, NAME, Look, foot, legend, looks, nothing, paged, plain, spread, tell
from emformer.figures.legible import legible
from emformer.figures.panels import Way, arced, grouped, kept, lost, pace, solid, ways
from emformer.figures.style import GREY, INK, PALE, shading
from emformer.theory.outcome import Paths

WAYS = 400  # of a panel
STEPS = 30_000  # of all ways of a panel
ELEVATION, AZIMUTH = 18.0, -58.0  # degrees: from where space is seen
BEHIND = 0.22  # opacity of what is behind the sphere


def draw_ways(chart: Paths, title: str = "") -> Figure:
    """The figure of `emformer.figures.charts.draw` for points that move."""
    found, left = paged(ways(chart))
    groups = grouped([way for own in found.values() for way in own])
    told = looks(groups) if 1 < len(groups) <= ENTRIES else {}
    drawn = {name: kept(own, WAYS) for name, own in found.items()}
    if chart.surface == "sphere":
        drawn = {name: [arced(way) for way in own] for name, own in drawn.items()}
    fewer = sum(map(len, found.values())) - sum(map(len, drawn.values()))
    facts = [title, lost(chart), left, f"{fewer:,} ways not drawn" if fewer else ""]
    handles = [Line2D([], [], color=look.colour, marker=look.mark, label=legible(name, NAME)) for name, look in told.items()]
    handles += [
        Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="", label="start"),
        Line2D([], [], color=INK, marker="o", linestyle="", label="end"),
    ]
    deep = solid(found)
    columns = {1: 1, 2: 2, 4: 2}.get(len(found), 3)
    height = {1: 5.6, 2: 3.9, 3: 2.6}[columns] * (0.8 if chart.surface == "cone" else 1.0)
    space: dict[str, Any] = {"subplot_kw": {"projection": "3d", "computed_zorder": False}} if deep else {}
    under = foot([str(handle.get_label()) for handle in handles])
    figure, places = spread(list(found), chart.caption, facts, columns, height, under, **space)
    clock = _clock([way for own in drawn.values() for way in own])
    for axes, own in zip(places, drawn.values(), strict=True):
        own = [way for way in own if np.isfinite(way.points[:, 0]).any()]
        if deep and isinstance(axes, Axes3D):
            _space(axes, own, chart, told, clock)
        else:
            _plane(axes, own, chart, told, clock)
    if not told and isinstance(clock.norm, FuncNorm):
        bar = figure.colorbar(clock, ax=places, label="time", aspect=35, pad=0.02, shrink=0.7)
        bar.outline.set_visible(False)
        ticks = np.asarray(clock.norm.inverse(np.linspace(0, 1, 7))).tolist()
        bar.set_ticks(ticks, labels=[plain(float(f"{time:.3g}")) for time in ticks])
    legend(figure, handles)
    return tell(figure, chart.caption, [*facts, "pale: early, dark: late" if told else ""])


def _clock(own: Sequence[Way]) -> ScalarMappable:
    """Shades of time that change as evenly as the points move: in what takes long, but where nothing moves, nothing is to see."""
    time, gone = pace(own)
    if len(time) < 2:
        return shading(0.0, 0.0)
    # a little of the even clock keeps every two times apart
    share = 0.95 * gone + 0.05 * (time - time[0]) / (time[-1] - time[0])
    norm = FuncNorm((lambda t: np.interp(t, time, share), lambda part: np.interp(part, share, time)), time[0], time[-1])
    return ScalarMappable(norm, shading(0.0, 1.0).cmap)


def _pieces(way: Way, look: Look | None, clock: ScalarMappable) -> tuple[np.ndarray, np.ndarray]:
    """The steps of a way (steps, 2, 3) from point to point, and their colours (steps, 4), by time."""
    known = np.flatnonzero(np.isfinite(way.points[:, 0]))
    points, time = way.points[known], way.time[known]
    pieces = np.stack([points[:-1], points[1:]], axis=1)
    middle = (time[:-1] + time[1:]) / 2
    if look is None:
        return pieces, np.asarray(clock.to_rgba(middle)).reshape(-1, 4)
    share = np.asarray(clock.norm(middle))[:, None]
    colour = np.array(to_rgb(look.colour))
    mixed = (1 - colour) * 0.7 * (1 - share) + colour
    return pieces, np.concatenate([mixed, np.ones_like(share)], axis=1)


def _thinned(own: Sequence[Way]) -> list[Way]:
    """The ways with fewer of their steps, where all together have too many to draw."""
    stride = -(-sum(len(way.time) for way in own) // STEPS)
    if stride < 2:
        return list(own)
    picked = [np.unique(np.append(np.arange(0, len(way.time), stride), len(way.time) - 1)) for way in own]
    return [way._replace(time=way.time[k], points=way.points[k]) for way, k in zip(own, picked, strict=True)]


def _ends(own: Sequence[Way], last: bool) -> np.ndarray:
    known = [way.points[np.isfinite(way.points[:, 0])] for way in own]
    return np.array([points[-1 if last else 0] for points in known])


def _split(own: Sequence[Way], told: Mapping[str, Look]) -> list[tuple[Look, list[Way]]]:
    """The ways of each look."""
    if not told:
        return [(Look(INK, "o"), list(own))]
    return [(look, mine) for name, look in told.items() if (mine := [way for way in own if way.group == name])]


def _plane(axes: Axes, own: Sequence[Way], chart: Paths, told: Mapping[str, Look], clock: ScalarMappable) -> None:
    axes.set(xlabel=legible(chart.axes[0], NAME), ylabel=legible(chart.axes[1], NAME))
    if not own:
        nothing(axes)
        return
    if chart.surface is not None:
        turn = np.linspace(0, 2 * np.pi, 181)
        axes.plot(np.cos(turn), np.sin(turn), color=PALE, linewidth=1.2, zorder=1)
    for way in _thinned(own):
        pieces, colours = _pieces(way, told.get(way.group), clock)
        axes.add_collection(LineCollection(list(pieces[..., :2]), colors=colours, linewidths=_width(own), zorder=2))
    size = _size(own)
    for look, mine in _split(own, told):
        axes.scatter(
            *_ends(mine, False)[:, :2].T, size, "white", marker=look.mark, edgecolors=[look.colour], linewidths=0.9, zorder=3
        )
        axes.scatter(
            *_ends(mine, True)[:, :2].T, size * 1.3, [look.colour], marker=look.mark, edgecolors="white", linewidths=0.4, zorder=4
        )
    if chart.surface is not None:
        reach = max(1.0, *(float(np.nanmax(np.abs(way.points[:, :2]))) for way in own))
        axes.set(xlim=(-1.08 * reach, 1.08 * reach), ylim=(-1.08 * reach, 1.08 * reach))
        axes.set_aspect("equal")
    else:
        axes.autoscale_view()
        axes.margins(0.06)
        axes.set_aspect("equal", "datalim")
    axes.locator_params(nbins=6)
    axes.grid(axis="both")


def _space(axes: Axes3D, own: Sequence[Way], chart: Paths, told: Mapping[str, Look], clock: ScalarMappable) -> None:
    axes.view_init(ELEVATION, AZIMUTH)
    if not own:
        axes.set_axis_off()
        axes.text2D(0.5, 0.5, "undefined throughout", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    ball = chart.surface == "sphere"
    everything = np.concatenate([way.points[np.isfinite(way.points[:, 0])] for way in own])
    if ball:
        _sphere(axes, [legible(name, 12) for name in chart.axes])
    elif chart.surface == "cone":
        _cone(axes, float(everything[:, 2].max()))
    for way in _thinned(own):
        pieces, colours = _pieces(way, told.get(way.group), clock)
        if not len(pieces):
            continue
        if ball:
            colours[:, 3] = np.where(_behind(pieces.mean(axis=1)), BEHIND, 1.0)
        axes.add_collection3d(Line3DCollection(list(pieces), colors=colours, linewidths=_width(own), zorder=4), autolim=False)
    size = _size(own)
    for look, mine in _split(own, told):
        for last, face, edge in ((False, "white", look.colour), (True, look.colour, "white")):
            ends = _ends(mine, last)
            hidden = _behind(ends) if ball else np.zeros(len(ends), bool)
            for here, alpha, zorder in ((hidden, BEHIND + 0.13, 3), (~hidden, 1.0, 5 + last)):
                if here.any():
                    axes.scatter(
                        *ends[here].T,
                        s=size * (1.3 if last else 1.0),
                        c=[face],
                        marker=look.mark,
                        edgecolors=[edge],
                        linewidths=0.4 if last else 0.9,
                        alpha=alpha,
                        depthshade=False,
                        zorder=zorder,
                    )
    if ball:
        axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
        axes.set_box_aspect((1, 1, 1), zoom=1.3)
        axes.set_axis_off()
        return
    _box(axes, everything, chart)


def _view() -> np.ndarray:
    """The direction from the origin to who looks."""
    up, round_ = np.radians([ELEVATION, AZIMUTH])
    return np.array([np.cos(up) * np.cos(round_), np.cos(up) * np.sin(round_), np.sin(up)])


def _behind(points: np.ndarray) -> np.ndarray:
    return points @ _view() < 0


def _sphere(axes: Axes3D, names: Sequence[str]) -> None:
    """A faint net of the unit sphere, its far half fainter, and where its axes come out."""
    turn = np.linspace(0, 2 * np.pi, 73)
    circles = [np.stack([np.cos(turn) * r, np.sin(turn) * r, np.full_like(turn, z)], 1) for z, r in _parallels()]
    half = np.linspace(-np.pi / 2, np.pi / 2, 37)
    circles += [
        np.stack([np.cos(half) * np.cos(a), np.cos(half) * np.sin(a), np.sin(half)], 1) for a in np.arange(12) * np.pi / 6
    ]
    pieces = np.concatenate([np.stack([one[:-1], one[1:]], axis=1) for one in circles])
    back = _behind(pieces.mean(axis=1))
    for here, colour, zorder in ((back, "#ededed", 0), (~back, "#cfcfcf", 1)):
        net = Line3DCollection(list(pieces[here]), colors=colour, linewidths=0.6, zorder=zorder)
        axes.add_collection3d(net, autolim=False)
    for k, name in enumerate(names):
        end = np.eye(3)[k]
        stick = Line3DCollection([np.stack([end, 1.16 * end])], colors=GREY, linewidths=0.8, zorder=2)
        axes.add_collection3d(stick, autolim=False)
        axes.text(*(1.24 * end), name, color=GREY, fontsize=8.5, ha="center", va="center")


def _parallels() -> list[tuple[float, float]]:
    return [(float(np.sin(up)), float(np.cos(up))) for up in np.radians(np.arange(-60, 61, 30))]


def _cone(axes: Axes3D, top: float) -> None:
    """A faint net of z = sqrt(x^2 + y^2) up to z = `top`."""
    turn = np.linspace(0, 2 * np.pi, 73)
    rings = [np.stack([np.cos(turn), np.sin(turn), np.ones_like(turn)], 1) * z for z in np.linspace(0, top, 6)[1:]]
    rays = [np.array([[0.0, 0, 0], [np.cos(a) * top, np.sin(a) * top, top]]) for a in np.arange(24) * np.pi / 12]
    axes.add_collection3d(Line3DCollection([*rings, *rays], colors=PALE, linewidths=0.6, zorder=1), autolim=False)


def _box(axes: Axes3D, everything: np.ndarray, chart: Paths) -> None:
    """Axes with names around what is drawn, of one scale."""
    low, high = everything.min(0), everything.max(0)
    if chart.surface == "cone":
        low, high = np.array([-high[2], -high[2], 0.0]), np.full(3, high[2])
    room = 0.04 * (float((high - low).max()) or 1.0)
    low, high = low - room * (low != 0), high + room
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    axes.set_box_aspect(tuple(high - low), zoom=1.08 if chart.surface == "cone" else 0.95)
    axes.set(xlabel=legible(chart.axes[0], NAME), ylabel=legible(chart.axes[1], NAME))
    # beside the axis, where matplotlib would write it, the next panel begins
    axes.text(high[0], high[1], high[2] + 3 * room, legible(chart.axes[2], NAME), ha="center", va="bottom")
    axes.tick_params(labelsize=7, pad=0)
    sides: list[Any] = [axes.xaxis, axes.yaxis, axes.zaxis]  # matplotlib's types know no axes of space
    for axis in sides:
        axis.pane.set_facecolor("white")
        axis.pane.set_edgecolor(PALE)
        axis.line.set_color(GREY)
        axis._axinfo["grid"].update(color="#eeeeee", linewidth=0.6)
    axes.locator_params(nbins=5)


def _width(own: Sequence[Way]) -> float:
    return float(np.clip(7 / max(1, len(own)) ** 0.5, 0.6, 1.6))


def _size(own: Sequence[Way]) -> float:
    return float(np.clip(120 / max(1, len(own)) ** 0.5, 8, 34))
