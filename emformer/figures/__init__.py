"""Figures: a frame of rows in, a figure object out, one family a file; whoever asked saves it.

    for name, figure in draw_all(records).items():
        save(figure, folder / f"{name}.png")

Each takes the frame of one run and gives None where that lacks the keys. matplotlib's objects alone are used, never pyplot: no
window, no global figure, no changed setting.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from matplotlib.figure import Figure

from emformer.figures.attention import energy
from emformer.figures.breathing import sawtooth
from emformer.figures.clustering import clusters, cosines, separation
from emformer.figures.motion import flow
from emformer.figures.saving import save

__all__ = ["FIGURES", "clusters", "cosines", "draw_all", "energy", "flow", "save", "sawtooth", "separation"]

FIGURES: dict[str, Callable[[pd.DataFrame], Figure | None]] = {
    "sawtooth": sawtooth,
    "flow": flow,
    "cosines": cosines,
    "separation": separation,
    "clusters": clusters,
    "energy": energy,
}


def draw_all(frame: pd.DataFrame) -> dict[str, Figure]:
    """Every figure that the frame of one run has the keys for, by name. Raises ValueError for several runs in one frame."""
    drawn = {name: draw(frame) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
