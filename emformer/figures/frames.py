"""What a figure takes from a frame of rows: one key of one run, by training step and place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
import pandas as pd

Place = tuple[int, str]  # (layer, point): a state, or the step that led to it

NUMBERS = ("step", "layer", "head", "mean", "se", "n_valid", "null", "null_sd")
WORDS = ("point", "key", "cloud", "param")
STUDY = ("run", "config", "seed")
ORDER = {"embed": 0, "attn": 1, "block": 2, "ffn": 3}
LETTERS = {"attn": "a", "ffn": "f", "block": "b"}


def pick(
    frame: pd.DataFrame, key: str, *, cloud: str = "raw", param: str | None = None, heads: bool = False, total: bool = False
) -> pd.DataFrame:
    """The rows of one key at one cloud and param; of undefined statistics the numbers are nan.

    Args:
        frame: rows in the one schema; columns it lacks count as empty.
        param: the very one; None takes the rows without.
        heads: the rows of single heads, instead of those of all together.
        total: the rows of the whole flow (no layer), instead of those of its states and steps.

    Raises:
        ValueError: if the frame mixes runs, configurations or seeds.
    """
    found = every(frame, key, cloud=cloud, heads=heads, total=total)
    return found[found["param"] == (param or "")]


def every(frame: pd.DataFrame, key: str, *, cloud: str = "raw", heads: bool = False, total: bool = False) -> pd.DataFrame:
    """`pick` without regard to `param`, which is "" where there is none."""
    _one_run(frame)
    if "key" not in frame:
        return pd.DataFrame(columns=[*NUMBERS, *WORDS])
    found = frame[(frame["key"] == key).fillna(False).to_numpy(bool)].reindex(columns=[*NUMBERS, *WORDS])
    columns = {name: found[name].to_numpy(float, na_value=np.nan) for name in NUMBERS}
    words = {name: found[name].to_numpy(object, na_value="") for name in WORDS}
    known = pd.DataFrame(columns | words)
    known["step"] = known["step"].fillna(0)
    return known[(known["cloud"] == cloud) & (known["head"].notna() == heads) & (known["layer"].isna() == total)]


def _one_run(frame: pd.DataFrame) -> None:
    for name in STUDY:
        if name in frame and frame[name].nunique() > 1:
            raise ValueError(f"a figure shows one run, and the frame holds several (column '{name}'): select one first")


def steps(*rows: pd.DataFrame) -> list[int]:
    """The training steps at which any of the rows were recorded, ascending; rows of no training count as step 0."""
    return sorted({int(step) for some in rows for step in some["step"]})


def places(*rows: pd.DataFrame) -> list[Place]:
    """The states or steps of any of the rows, in the order of the flow."""
    found = {(int(layer), str(point)) for some in rows for layer, point in zip(some["layer"], some["point"], strict=True)}
    return sorted(found, key=lambda place: (place[0], ORDER.get(place[1], len(ORDER)), place[1]))


def at(rows: pd.DataFrame, step: int) -> pd.DataFrame:
    """The rows of one training step."""
    return rows[rows["step"] == step]


def along(rows: pd.DataFrame, where: Sequence[Place], step: int, column: str = "mean") -> np.ndarray:
    """A number at each place, at one training step; nan where it is undefined or there is none."""
    return grid(rows, where, [step], column)[0]


def grid(rows: pd.DataFrame, where: Sequence[Place], when: Sequence[int], column: str = "mean") -> np.ndarray:
    """A number for each training step and place; nan where it is undefined or there is none."""
    columns = (rows[name].tolist() for name in ("step", "layer", "point", column))
    known = {(step, layer, point): value for step, layer, point, value in zip(*columns, strict=True)}
    return np.array([[known.get((step, *place), np.nan) for place in where] for step in when], dtype=float)


def label(place: Place) -> str:
    """X⁰, and by layer 0a (after attention), 0f (after the FFN), 0b (after a block of both)."""
    layer, point = place
    return "X⁰" if point == "embed" else f"{layer}{LETTERS.get(point, point)}"


def trained(frame: pd.DataFrame) -> bool:
    """Whether the rows belong to training steps."""
    return "step" in frame and bool(frame["step"].notna().any())


def sample(unit: str, *rows: pd.DataFrame) -> str:
    """How many the rows are means over: "n = 64 prompts", or from the fewest to the most."""
    n = pd.concat([some["n_valid"] for some in rows]).dropna()
    if n.empty:
        return ""
    return f"n = {n.max():.0f} {unit}" if n.min() == n.max() else f"n = {n.min():.0f} to {n.max():.0f} {unit}"


def origin(frame: pd.DataFrame, when: Sequence[int], size: str = "") -> str:
    """Whose rows they are: the last part of the run's path, the training steps and the sample, as far as the frame tells."""
    runs = frame["run"].dropna() if "run" in frame else ()
    known = [PurePath(str(runs.iloc[0])).name] if len(runs) else []
    if trained(frame):
        known.append(f"step {when[-1]}" if len(when) == 1 else f"steps {when[0]} to {when[-1]}")
    return ", ".join([*known, size] if size else known)
