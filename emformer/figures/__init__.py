"""Figures: rows or a scene in, a figure object out, one family a file; whoever asked saves it.

    for name, figure in draw_all(records).items():
        save(figure, folder / f"{name}.png")
    for name, figure in draw_scene(Scene.load("scene.safetensors")).items():
        save(figure, folder / f"{name}.svg")

`FIGURES` take the frame of one run, `SCENES` a scene (what is drawn of a model on a few prompts and is no row of records, see
`emformer.figures.scene.stage`), `difference` the frame of a comparison. Each gives None where that lacks what it is made of.
`emformer.figures.charts` draws what an experiment of the theory or a study found, `effects` what the factors of an ablation study
change.
matplotlib's objects alone are used, never pyplot: no window, no global figure, no changed setting. A notebook shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from emformer.figures.attention import energy
from emformer.figures.breathing import sawtooth
from emformer.figures.clouds import cloud, trajectories
from emformer.figures.clustering import clusters, cosines, separation
from emformer.figures.differences import difference
from emformer.figures.foliation import attention
from emformer.figures.heads import sink_map, spectra
from emformer.figures.logits import lens
from emformer.figures.motion import flow
from emformer.figures.saving import save, svg
from emformer.figures.similarity import cosine_matrices, merges
from emformer.figures.staged import Scene
from emformer.figures.training import breathing, motion

__all__ = [
    "FIGURES",
    "SCENES",
    "Scene",
    "attention",
    "breathing",
    "cloud",
    "clusters",
    "cosine_matrices",
    "cosines",
    "difference",
    "draw_all",
    "draw_scene",
    "energy",
    "flow",
    "lens",
    "merges",
    "motion",
    "save",
    "sawtooth",
    "separation",
    "sink_map",
    "spectra",
    "svg",
    "trajectories",
]

FIGURES: dict[str, Callable[[pd.DataFrame], Figure | None]] = {
    "sawtooth": sawtooth,
    "flow": flow,
    "cosines": cosines,
    "separation": separation,
    "clusters": clusters,
    "energy": energy,
    "breathing": breathing,
    "motion": motion,
}
SCENES: dict[str, Callable[[Scene], Figure | None]] = {
    "cloud": cloud,
    "cloud_classes": partial(cloud, by="class"),
    "cloud_positions": partial(cloud, by="position"),
    "trajectories": trajectories,
    "cosine_matrices": cosine_matrices,
    "merges": merges,
    "attention": attention,
    "sink_map": sink_map,
    "spectra": spectra,
    "lens": lens,
}


def draw_all(frame: pd.DataFrame) -> dict[str, Figure]:
    """Every figure that the frame of one run has the keys for, by name. Raises ValueError for several runs in one frame."""
    drawn = {name: draw(frame) for name, draw in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def draw_scene(scene: Scene) -> dict[str, Figure]:
    """Every figure that the scene has what is needed for, by name."""
    drawn = {name: draw(scene) for name, draw in SCENES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
