"""Over training: how breathing and motion change from one recorded step to the next, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from emformer.figures.frames import along, every, grid, pick, places, sample, steps
from emformer.figures.style import BANDS, BLUE, INK, NULL_STYLE, PURPLE, STEPS, STYLE, bars, blank, finish, shading, thin

HALVES = ("", "parallel")  # params of breathing: sublayers one after the other, or the halves of a parallel block
CLOUDS = {"raw": ("raw stream", INK), "read": ("read cloud", BLUE)}
SHUFFLED = "shuffled prompts"
BREATHS = {"breath.b_attn": ("b at attention", "attn"), "breath.b_mlp": ("b at the FFN", "ffn")}
MOTIONS = {"flow.speed_rel": ("relative speed", "|D| / |x|"), "flow.w2": ("W₂ distance", "W₂ (units of the stream)")}
NAMES = STEPS | {"block": "block"}
DODGE = 0.012  # of the axis, between layers at one step


@rc_context(STYLE)
def breathing(frame: pd.DataFrame) -> Figure | None:
    """The sawtooth's amplitude over training, of the raw cloud and the read one, and below it, layer by layer of the raw cloud,
    the log ratio b of the dimension after a sublayer to that before it. 95 % intervals; dashed: the null 0.

    A sawtooth has b > 0 at attention and b < 0 at the FFN; its amplitude is the mean of (b_attn - b_mlp)/2 over the blocks. The
    shuffled prompts stand at the step at which they were recorded.

    Returns None where `breath.amplitude` was recorded at fewer than two steps. Raises ValueError for several runs in one frame.
    """
    params = set(every(frame, "breath.amplitude", total=True)["param"])
    param = next((name for name in HALVES if name in params), "")
    found = {cloud: pick(frame, "breath.amplitude", cloud=cloud, param=param, total=True) for cloud in CLOUDS}
    recorded = steps(*found.values())
    if len(recorded) < 2:
        return None
    layered = {key: rows for key in BREATHS if not (rows := pick(frame, key, param=param)).empty}
    depth = 1 + max((layer for rows in layered.values() for layer, _ in places(rows)), default=0)
    figure, axes = blank(1.9 + 2.2 * (1 + bool(layered)), 2 if layered else 1, max(1, len(layered)))
    top = axes[0]
    if layered:
        for one in axes[1 : len(layered)]:
            one.remove()
        whole = top.get_gridspec()
        assert whole is not None
        top.set_subplotspec(whole[0, :])
    handles = []
    for side, (cloud, rows) in zip((-1, 1), found.items(), strict=True):
        name, colour = CLOUDS[cloud]
        if rows.empty:
            continue
        rows = rows.assign(layer=0, point="")
        _line(top, rows, (0, ""), recorded, colour, side * DODGE / 2)
        handles.append(Line2D([], [], marker="o", color=colour, label=name))
        control = pick(frame, "breath.amplitude", cloud=cloud, param=f"{param} shuffled".strip(), total=True)
        if not control.empty:
            control = control.assign(layer=0, point="")
            face = "white" if cloud == "read" else PURPLE
            _line(top, control, (0, ""), recorded, PURPLE, side * DODGE, fmt="d", markerfacecolor=face)
            if not any(handle.get_label() == SHUFFLED for handle in handles):
                handles.append(Line2D([], [], marker="d", color=PURPLE, linestyle="", label=SHUFFLED))
    _steps(top, recorded)
    top.axhline(0, **NULL_STYLE)
    lost = int(sum(rows["mean"].isna().sum() for rows in found.values()))
    top.set(title="amplitude of the sawtooth, all blocks" + _lost(lost), ylabel="nats")
    lower = axes[len(axes) - len(layered) :]
    for one, (key, rows) in zip(lower, layered.items(), strict=True):
        title, point = BREATHS[key]
        _layers(one, rows, point, recorded, depth, title)
        one.axhline(0, **NULL_STYLE)
        one.set_xlabel("training step")
    if layered:
        lower[0].set_ylabel("b, raw stream (nats)")
        _bar(figure, lower, depth)
    else:
        top.set_xlabel("training step")
    handles.append(Line2D([], [], label="no breathing", **NULL_STYLE))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return finish(figure, "Breathing over training", frame, recorded, sample("blocks", *found.values()))


@rc_context(STYLE)
def motion(frame: pd.DataFrame) -> Figure | None:
    """How far each layer moves the cloud over training: relative speed, and the 2-Wasserstein distance of a step, a line a layer
    with 95 % intervals; attention and FFN in columns.

    Returns None where neither `flow.speed_rel` nor `flow.w2` was recorded at two steps. Raises ValueError for several runs.
    """
    found = {key: rows for key in MOTIONS if len(steps(rows := pick(frame, key))) > 1}
    if not found:
        return None
    points = [point for point in NAMES if any((rows["point"] == point).any() for rows in found.values())]
    recorded, depth = steps(*found.values()), 1 + max(layer for rows in found.values() for layer, _ in places(rows))
    figure, axes = blank(1.6 + 2.3 * len(found), len(found), len(points), sharex=True, sharey="row")
    for row, (key, rows) in enumerate(found.items()):
        title, unit = MOTIONS[key]
        for column, point in enumerate(points):
            one = axes[row * len(points) + column]
            _layers(one, rows[rows["point"] == point], point, recorded, depth, f"{title}, {NAMES[point]}")
            if row == len(found) - 1:
                one.set_xlabel("training step")
        axes[row * len(points)].set_ylabel(unit)
        axes[row * len(points)].set_ylim(bottom=0)
    _bar(figure, axes, depth)
    return finish(figure, "Motion over training", frame, recorded, sample("prompts", *found.values()))


def _layers(axes: Axes, rows: pd.DataFrame, point: str, recorded: Sequence[int], depth: int, title: str) -> None:
    """A line a layer, the layers a little apart so that their intervals can be told from each other."""
    where = [place for place in places(rows) if place[1] == point]
    lost = int(np.isnan(grid(rows, where, steps(rows))).sum()) if where else 0
    axes.set_title(title + _lost(lost))
    if where:
        shades = shading(0, depth - 1)
        for k, place in enumerate(where):
            shift = DODGE * (k - (len(where) - 1) / 2) if len(where) < 9 else 0.0
            _line(axes, rows, place, recorded, shades.to_rgba(np.array(place[0])), shift)
    axes.set_facecolor(BANDS.get(point, "white"))
    _steps(axes, recorded)


def _line(
    axes: Axes, rows: pd.DataFrame, place: tuple[int, str], recorded: Sequence[int], colour: Any, shift: float, **look: Any
) -> None:
    own = steps(rows)
    y, se = (np.array([along(rows, [place], step, column)[0] for step in own]) for column in ("mean", "se"))
    x = _x(own) + shift * (_x(recorded)[-1] - _x(recorded)[0])
    bars(axes, x, y, se, color=colour, markersize=4, linewidth=1.5, **look)


def _lost(count: int) -> str:
    return f" ({count} undefined)" if count else ""


def _x(when: Sequence[int]) -> np.ndarray:
    return np.log1p(np.asarray(when, float))


def _steps(axes: Axes, recorded: Sequence[int]) -> None:
    """The recorded steps along x, even in log(1 + step); labels where there is room."""
    x, shown = _x(recorded), []
    for k in range(len(recorded) - 1, -1, -1):
        if not shown or x[shown[-1]] - x[k] > 0.09 * (x[-1] - x[0]):
            shown.append(k)
    axes.set_xticks(x[shown], [str(recorded[k]) for k in shown])
    margin = 0.05 * (x[-1] - x[0])
    axes.set_xlim(x[0] - margin, x[-1] + margin)
    axes.grid(axis="y")


def _bar(figure: Figure, axes: Sequence[Axes], depth: int) -> None:
    if depth < 2:
        return
    bar = figure.colorbar(shading(0, depth - 1), ax=list(axes), label="layer", aspect=35, pad=0.015)
    bar.set_ticks(thin(range(depth), 12))
    bar.outline.set_visible(False)
