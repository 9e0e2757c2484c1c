"""Breathing: the intrinsic dimension of the cloud from state to state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from emformer.figures.frames import Place, along, at, pick, places, steps, trained
from emformer.figures.style import (
    BLUE,
    GREY,
    INK,
    PURPLE,
    STYLE,
    VERMILION,
    Z95,
    bars,
    blank,
    depth_axis,
    finish,
    key,
    note,
    undefined,
)

DIMENSION = "geo.id_twonn"
CLOUDS = {"raw": "raw stream", "read": "as the next sublayer reads it"}
CHANGES = {"attn": "breath.b_attn", "ffn": "breath.b_mlp"}
UP, DOWN = ("^", VERMILION), ("v", BLUE)


@rc_context(STYLE)
def sawtooth(frame: pd.DataFrame, step: int | None = None) -> Figure | None:
    """The TwoNN dimension of each state, with 95 % intervals, of the raw cloud and the read one.

    Beside the training step asked for (default: the last one recorded) stand the untrained model (step 0) and the shuffled
    prompts, as near before that step as they were recorded. A triangle shows whether the step to a state raised or lowered the
    dimension, hollow where the paired change (`breath.b_attn`, `breath.b_mlp`) lies within 1.96 of its standard errors. In a
    sawtooth every triangle has the colour of its ground. Undefined states are gaps.

    Returns None without `geo.id_twonn` at that step. Raises ValueError for several runs in one frame.
    """
    rows = {cloud: pick(frame, DIMENSION, cloud=cloud) for cloud in CLOUDS}
    recorded = steps(*rows.values())
    step = recorded[-1] if step is None and recorded else step
    rows = {cloud: some for cloud, some in rows.items() if step in steps(some)}
    if step is None or not rows:
        return None
    where = places(*rows.values())
    figure, panels = blank(1.5 + 2.4 * len(rows), len(rows), sharex=True)
    handles: dict[str, Line2D] = {}
    for axes, (cloud, some) in zip(panels, rows.items(), strict=True):
        depth_axis(axes, where, named=axes is panels[-1])
        axes.grid(axis="y")
        handles |= _trained(axes, frame, cloud, some, where, step)
        handles |= _controls(axes, frame, cloud, some, where, step)
        axes.set_ylabel("dimension (TwoNN)")
        axes.set_title(CLOUDS[cloud] + _verdict(frame, cloud, step))
        note(axes, undefined(along(some, where, step), "states"))
    handles |= {
        "rose": Line2D([], [], marker=UP[0], color=UP[1], linestyle="", markersize=8),
        "fell (hollow: within 1.96 se)": Line2D([], [], marker=DOWN[0], color=DOWN[1], linestyle="", markersize=8),
    }
    for name, handle in handles.items():
        handle.set_label(name)
    key(figure, where, list(handles.values()))
    return finish(figure, "Breathing: intrinsic dimension from state to state", frame, [step])


def _trained(
    axes: Axes, frame: pd.DataFrame, cloud: str, rows: pd.DataFrame, where: Sequence[Place], step: int
) -> dict[str, Line2D]:
    y, change = along(rows, where, step), np.zeros(len(where))
    bars(axes, np.arange(len(where)), y, along(rows, where, step, "se"), fmt="-", color=INK, linewidth=2)
    change[1:] = np.diff(y)
    sure = np.ones(len(where), bool)
    for key_of_change in CHANGES.values():
        paired = pick(frame, key_of_change, cloud=cloud)
        b, se = (along(paired, where, step, column) for column in ("mean", "se"))
        sure &= ~(np.abs(b) <= Z95 * se)  # nan: nothing known against it
    for (marker, colour), moved in ((UP, change > 0), (DOWN, change < 0)):
        for filled, face in ((True, colour), (False, "white")):
            k = np.flatnonzero(moved & (sure == filled))
            axes.plot(
                k, y[k], marker, markersize=8, color=colour, markerfacecolor=face, markeredgewidth=1.4, linestyle="", zorder=5
            )
    # neither rose nor fell, as far as is known
    k = np.flatnonzero(np.isfinite(y) & ~(change != 0) | np.isfinite(y) & np.isnan(change))
    axes.plot(k, y[k], "o", markersize=6, color=INK, zorder=5)
    k = np.flatnonzero(np.isnan(y))
    axes.plot(k, np.full(len(k), 0.04), "x", color=GREY, transform=axes.get_xaxis_transform(), zorder=5)
    n = at(rows, step)["n_valid"]
    size = f"{n.max():.0f}" if n.min() == n.max() else f"{n.min():.0f} to {n.max():.0f}"
    name = f"step {step}, n = {size}" if trained(frame) else f"n = {size}"
    return {name: Line2D([], [], color=INK, linewidth=2)}


def _controls(
    axes: Axes, frame: pd.DataFrame, cloud: str, rows: pd.DataFrame, where: Sequence[Place], step: int
) -> dict[str, Line2D]:
    shuffled = pick(frame, DIMENSION, cloud=cloud, param="shuffled")
    before = [s for s in steps(shuffled) if s <= step]
    controls = {"untrained (step 0)": (rows, 0, GREY, "--")} if step and 0 in steps(rows) else {}
    if before:
        when = "" if before[-1] == step else f" (step {before[-1]})"
        controls[f"shuffled prompts{when}"] = shuffled, before[-1], PURPLE, ":"
    for some, when, colour, line in controls.values():
        y, se = (along(some, where, when, column) for column in ("mean", "se"))
        bars(axes, np.arange(len(where)), y, se, fmt=line, color=colour, elinewidth=1, capsize=0, alpha=0.85, zorder=3)
    return {name: Line2D([], [], color=colour, linestyle=line) for name, (_, _, colour, line) in controls.items()}


def _verdict(frame: pd.DataFrame, cloud: str, step: int) -> str:
    found = at(pick(frame, "breath.sawtooth", cloud=cloud, total=True), step)
    if found.empty:
        return ""
    share, null = found[["mean", "null"]].iloc[0]
    if not np.isfinite(share):
        return ": sawtooth undefined"
    p = at(pick(frame, "breath.p_value", cloud=cloud, total=True), step)["mean"]
    facts = [f"null {null:.2f}"] if np.isfinite(null) else []
    facts += [f"p = {value:.2g}" for value in p if np.isfinite(value)]
    return f": sawtooth fraction {share:.2f}" + (f" ({', '.join(facts)})" if facts else "")
