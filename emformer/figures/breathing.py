"""Breathing: the intrinsic dimension of the cloud from state to state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from emformer.figures.frames import Place, along, at, every, pick, places, sample, steps, trained
from emformer.figures.style import (
    BLUE,
    GREY,
    INK,
    PURPLE,
    STYLE,
    VERMILION,
    bars,
    blank,
    depth_axis,
    finish,
    legend,
    note,
    undefined,
)

DIMENSION = "geo.id_twonn"
CLOUDS = {"raw": "raw stream", "read": "read cloud"}
COUNTS = {"attn": "breath.counts_attn", "ffn": "breath.counts_mlp"}
UP: dict[str, Any] = {"marker": "^", "color": VERMILION}
DOWN: dict[str, Any] = {"marker": "v", "color": BLUE}
TRIANGLE: dict[str, Any] = {"linestyle": "", "markersize": 8, "markeredgewidth": 1.4}


class Control(NamedTuple):
    name: str
    rows: pd.DataFrame
    step: int
    look: dict[str, Any]


@rc_context(STYLE)
def sawtooth(frame: pd.DataFrame, step: int | None = None) -> Figure | None:
    """The TwoNN dimension of each state, with 95 % intervals, of the raw cloud and the read one.

    Beside the training step asked for (default: the last one recorded) stand the untrained model (step 0) and the shuffled
    prompts, as near before that step as they were recorded. A triangle shows whether the step to a state raised or lowered the
    dimension; it is hollow where `breath.counts_attn` or `breath.counts_mlp` says that the change does not count. In a sawtooth
    every triangle has the colour of its ground. Undefined states are gaps, marked at the bottom.

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
        handles |= _draw(axes, frame, cloud, some, where, step)
        for name, shown, when, look in _controls(frame, cloud, some, step):
            y, se = (along(shown, where, when, column) for column in ("mean", "se"))
            bars(axes, np.arange(len(where)), y, se, fmt="", elinewidth=1, capsize=0, alpha=0.85, zorder=3, **look)
            handles[name] = Line2D([], [], **look)
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # an interval may reach below; a dimension does not
        axes.set_ylabel("dimension (TwoNN)")
        axes.set_title(CLOUDS[cloud] + _verdict(frame, cloud, step))
        note(axes, undefined(along(some, where, step), "states"))
    handles |= {
        "rose": Line2D([], [], **UP, **TRIANGLE),
        "fell (hollow: not confirmed)": Line2D([], [], **DOWN, **TRIANGLE),
    }
    for name, handle in handles.items():
        handle.set_label(name)
    legend(figure, where, list(handles.values()))
    size = sample("prompts", *(at(some, step) for some in rows.values()))
    return finish(figure, "Breathing: intrinsic dimension from state to state", frame, [step], size)


def _draw(
    axes: Axes, frame: pd.DataFrame, cloud: str, rows: pd.DataFrame, where: Sequence[Place], step: int
) -> dict[str, Line2D]:
    y = along(rows, where, step)
    bars(axes, np.arange(len(where)), y, along(rows, where, step, "se"), fmt="-", color=INK, linewidth=2)
    change = np.diff(y, prepend=np.nan)
    counts = np.ones(len(where), bool)
    for point, key in COUNTS.items():
        # a change that nobody has tested is not held to be void
        counts &= along(pick(frame, key, cloud=cloud).assign(point=point), where, step) != 0
    for look, moved in ((UP, change > 0), (DOWN, change < 0)):
        for k, face in ((moved & counts, look["color"]), (moved & ~counts, "white")):
            axes.plot(np.flatnonzero(k), y[k], markerfacecolor=face, zorder=5, **look, **TRIANGLE)
    still = np.isfinite(y) & ~(change > 0) & ~(change < 0)
    axes.plot(np.flatnonzero(still), y[still], "o", markersize=6, color=INK, zorder=5)
    lost = np.flatnonzero(np.isnan(y))
    axes.plot(lost, np.full(len(lost), 0.04), "x", color=GREY, transform=axes.get_xaxis_transform(), zorder=5)
    return {f"step {step}" if trained(frame) else "prompts": Line2D([], [], color=INK, linewidth=2)}


def _controls(frame: pd.DataFrame, cloud: str, rows: pd.DataFrame, step: int) -> list[Control]:
    found = [Control("untrained (step 0)", rows, 0, {"color": GREY, "linestyle": "--"})] if step and 0 in steps(rows) else []
    shuffled = pick(frame, DIMENSION, cloud=cloud, param="shuffled")
    before = [when for when in steps(shuffled) if when <= step]
    if before:
        name = "shuffled prompts" + (f" (step {before[-1]})" if before[-1] != step else "")
        found.append(Control(name, shuffled, before[-1], {"color": PURPLE, "linestyle": ":"}))
    return found


def _verdict(frame: pd.DataFrame, cloud: str, step: int) -> str:
    """ ": sawtooth 0.75 (null 0.25, p = 0.05), untrained 0.25, shuffled 0.50", as far as rows tell."""
    found = every(frame, "breath.sawtooth", cloud=cloud, total=True)
    own = at(found, step)
    own = own[~own["param"].str.contains("shuffled")]
    if own.empty:
        return ""
    share, null, param = own[["mean", "null", "param"]].iloc[0]
    p = at(pick(frame, "breath.p_value", cloud=cloud, param=param, total=True), step)["mean"]
    facts = [f"null {null:.2f}"] if np.isfinite(null) else []
    facts += [f"p = {value:.2g}" for value in p if np.isfinite(value)]
    name = "sawtooth of the halves" if param == "parallel" else "sawtooth"
    text = f": {name} {share:.2f}" if np.isfinite(share) else f": {name} undefined"
    text += f" ({', '.join(facts)})" if facts else ""
    before = found[found["step"] <= step]
    beside = {
        "untrained": found[(found["step"] == 0) & (found["param"] == param)] if step else found[:0],
        "shuffled": before[before["param"] == f"{param} shuffled".strip()].sort_values("step"),
    }
    for name, rows in beside.items():
        value = rows["mean"].iloc[-1] if len(rows) else np.nan
        text += f", {name} {value:.2f}" if np.isfinite(value) else ""
    return text
