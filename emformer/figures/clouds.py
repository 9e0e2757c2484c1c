"""The token cloud of a scene along the depth, in one basis for all states: as small multiples, and as paths of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from emformer.figures.kinds import By, chosen, facts, kinds, lost, sample, state_name
from emformer.figures.legible import legible
from emformer.figures.staged import Scene
from emformer.figures.style import GREY, INK, KINDS, PALE, STYLE, blank, close, note, shading

PANELS = 9
PATHS = 8
MARGIN = 1.08  # of the limits over the farthest token


@rc_context(STYLE)
def cloud(scene: Scene, states: Sequence[int] | None = None, by: By = "cluster") -> Figure | None:
    """The cloud at some states, in the first two coordinates of the scene's one basis; all panels have one scale.

    Coordinates are of directions on the unit sphere, the mean direction of each state removed: a cloud that shrinks gathers.

    Args:
        states: places in `Scene.states`; default at most nine, evenly spaced.
        by: what colours tell: the cluster of the token at that state, its class, its position, or which token it is.

    Returns None where nothing has coordinates, or no classes are known. Raises ValueError for states that are not there.
    """
    places = chosen(scene, states, PANELS)
    found = kinds(scene, by)
    if not np.isfinite(scene.coords).any() or (not found and by != "position"):
        return None
    columns = 2 if len(places) == 4 else min(3, len(places))
    rows = -(-len(places) // columns)
    figure, axes = blank(1.7 + min(5.0, 8.1 / columns) * rows, rows, columns, sharex=True, sharey=True)
    end = MARGIN * float(np.nanmax(np.abs(scene.coords[places, ..., :2]))) or 1.0
    shades = shading(0, scene.ids.shape[1] - 1)
    for one, place in zip(axes, places, strict=False):
        x, y = scene.coords[place, ..., 0], scene.coords[place, ..., 1]
        if by == "position":
            where = np.broadcast_to(np.arange(x.shape[1]), x.shape)
            one.scatter(x, y, 11, shades.to_rgba(where.ravel()), linewidths=0, alpha=0.85)
        for kind in found if by != "position" else ():
            colour, marker = (PALE, "o") if kind.look is None else KINDS[kind.look]
            here = kind.members[place]
            one.scatter(x[here], y[here], 13, colour, marker=marker, linewidths=0.3, edgecolors="white", alpha=0.9)
        _ground(one, end)
        one.set_title(state_name(scene.states[place]))
    for one in axes[len(places) :]:
        one.remove()
    for one in axes[: len(places)]:
        one.tick_params(labelsize=8)
        one.locator_params(nbins=5)
    for row in range(rows):
        axes[row * columns].set_ylabel(_axis(scene, 1))
    for one in axes[max(0, len(places) - columns) : len(places)]:
        one.set_xlabel(_axis(scene, 0))
        one.tick_params(labelbottom=True)
    if by == "position":
        bar = figure.colorbar(
            shades, ax=axes[: len(places)], label="position in the prompt", location="bottom", aspect=60, shrink=0.6, pad=0.02
        )
        bar.outline.set_visible(False)
    else:
        handles = []
        for kind in sorted(found, key=lambda kind: kind.look is None):
            colour, marker = (PALE, "o") if kind.look is None else KINDS[kind.look]
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=kind.name))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2, handletextpad=0.3)
    names = {"cluster": "k-means clusters", "class": scene.class_name, "token": "tokens", "position": "position"}
    figure.set_layout_engine("compressed", h_pad=0.08)
    return close(figure, f"Token cloud, by {names[by]}", facts(scene, sample(scene), *lost(scene.coords[places])))


@rc_context(STYLE)
def trajectories(scene: Scene, tokens: Sequence[tuple[int, int]] | None = None) -> Figure | None:
    """The paths of some tokens through all states, in the scene's one basis, from the embedding (hollow) to the last (full).

    Grey: where all tokens end. Colours are those of the token's cluster at the end.

    Args:
        tokens: (prompt, position) of each; default, of prompt 0, the last token of each cluster at the end, eight at most.

    Returns None where none of them has coordinates throughout. Raises ValueError for a token that is not there.
    """
    prompts, length = scene.ids.shape
    if tokens is None:
        ends = scene.clusters[-1, 0]
        last = [int(np.flatnonzero(ends == k)[-1]) for k in np.unique(ends[ends >= 0])]
        tokens = [(0, t) for t in sorted(last[:PATHS])]
    if not all(0 <= p < prompts and 0 <= t < length for p, t in tokens):
        raise ValueError(f"tokens are (prompt, position) below ({prompts}, {length}), not {list(tokens)}")
    whole = [(p, t) for p, t in tokens if np.isfinite(scene.coords[:, p, t]).all()]
    if not whole:
        return None
    figure, (axes,) = blank(6.6)
    axes.scatter(*np.moveaxis(scene.coords[-1, ..., :2], -1, 0), 10, PALE, linewidths=0, zorder=1)
    ends = []
    for p, t in whole:
        path = scene.coords[:, p, t, :2]
        k = int(scene.clusters[-1, p, t])
        colour, marker = KINDS[k] if k >= 0 else (GREY, "o")
        axes.plot(*path.T, "-", color=colour, linewidth=1.3, alpha=0.9, zorder=3)
        axes.plot(*path[1:-1].T, ".", color=colour, markersize=4, zorder=3)
        axes.plot(*path[:1].T, marker, markerfacecolor="white", markeredgecolor=colour, markersize=6, zorder=4)
        axes.plot(*path[-1:].T, marker, color=colour, markeredgecolor="white", markersize=8, zorder=5)
        ends.append((path[-1], f"“{legible(scene.words[p][t], 14).strip(' ')}”  {p}:{t}", colour))
    axes.set(xlabel=_axis(scene, 0), ylabel=_axis(scene, 1))
    axes.set_aspect("equal", "datalim")
    axes.margins(0.06)
    _names(axes, ends)
    note(axes, "token  prompt:position")
    axes.set_title("○ embedded   ● last state   grey: all tokens at the last state")
    return close(figure, "Paths of tokens through the layers", facts(scene, f"{len(whole)} tokens, {len(scene.states)} states"))


def _names(axes: Axes, ends: Sequence[tuple[np.ndarray, str, str]]) -> None:
    """Names at the right of the axes, one a line from the highest end to the lowest, each with a thin line to its end."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda end: -end[0][1])
    step = 0.05
    places = [(float(place[1]) - low) / (high - low) for place, _, _ in order]
    for k in range(1, len(places)):
        places[k] = min(places[k], places[k - 1] - step)
    # pushed below the axes: back up, from the lowest on
    floor = 0.01
    for k in reversed(range(len(places))):
        places[k] = max(places[k], floor)
        floor = places[k] + step
    for (place, name, colour), y in zip(order, places, strict=True):
        axes.annotate(
            name,
            tuple(place),
            (1.02, y),
            textcoords=axes.transAxes,
            va="center",
            fontsize=9,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkB": 4},
            annotation_clip=False,
        )


def _ground(axes: Axes, end: float) -> None:
    axes.axhline(0, color=PALE, linewidth=0.7, zorder=0)
    axes.axvline(0, color=PALE, linewidth=0.7, zorder=0)
    axes.set(xlim=(-end, end), ylim=(-end, end), box_aspect=1)


def _axis(scene: Scene, axis: int) -> str:
    return f"PC {axis + 1} ({100 * scene.explained[axis]:.0f} %)"
