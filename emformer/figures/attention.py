"""Attention: how spread each head's pattern is, and how much of it goes to sinks."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from emformer.figures.frames import at, every, sample, steps
from emformer.figures.style import STYLE, blank, chance, finish, grey, heat


class Panel(NamedTuple):
    key: str
    title: str
    unit: str
    colours: str  # white where attention is uniform


PANELS = (
    Panel("attn.entropy_norm", "entropy of the pattern", "H / log n", "Blues_r"),
    Panel("attn.sink_rate", "sink rate", "share of prompts with a sink", "Oranges"),
)


@rc_context(STYLE)
def energy(frame: pd.DataFrame) -> Figure | None:
    """Normalised attention entropy and sink rate, layer by head, at the last training step; both in [0, 1].

    White is uniform attention: entropy 1, sink rate 0. Layer 0 is at the bottom.

    Returns None without `attn.entropy_norm` and `attn.sink_rate` of single heads. Raises ValueError for several runs.
    """
    found = {panel: rows for panel in PANELS if not (rows := _last(frame, panel.key)).empty}
    if not found:
        return None
    heads = 1 + max(int(rows["head"].max()) for rows in found.values())
    layers = 1 + max(int(rows["layer"].max()) for rows in found.values())
    figure, axes = blank(float(np.clip(1.9 + 0.45 * layers, 3.2, 7.5)), 1, len(found), sharey=True)
    step = steps(*found.values())[-1]
    for one, (panel, rows) in zip(axes, found.items(), strict=True):
        values = np.full((layers, heads), np.nan)
        values[rows["layer"].astype(int), rows["head"].astype(int)] = rows["mean"]
        heat(figure, one, values, matplotlib.colormaps[panel.colours], (0.0, 1.0), panel.unit)
        facts = [f", {param}" for param in rows["param"].unique() if param]
        facts += [f", step {own}" for own in steps(rows) if own != step]
        one.set(title=panel.title + "".join(facts) + chance(rows["null"], "uniform attention:"), xlabel=grey(values, "head"))
        one.set_xticks(range(0, heads, -(-heads // 16)))
        one.set_yticks(range(0, layers, -(-layers // 16)))
    axes[0].set_ylabel("layer")
    return finish(figure, "Attention by layer and head", frame, [step], sample("prompts", *found.values()))


def _last(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    rows = every(frame, key, heads=True)
    rows = rows[~rows["param"].str.contains("shuffled")]
    if rows.empty:
        return rows
    rows = at(rows, steps(rows)[-1])
    # of several params the plainest: one threshold is enough to see which heads have sinks
    return rows[rows["param"] == min(rows["param"], key=lambda param: (len(param), param))]
