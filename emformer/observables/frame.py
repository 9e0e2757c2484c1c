"""Rows as a pandas frame in the one schema, and trajectories straight to a frame."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from emformer import parts
from emformer.observables.base import COLUMNS, Look, Pass, Row
from emformer.parts import UserError
from emformer.trajectory import Trajectory

WHOLE = ("step", "layer", "head")  # may be undefined
COUNTS = ("n_valid", "n_dropped")
WORDS = ("point", "key", "cloud", "param")
DTYPES: Mapping[str, str] = {
    name: "Int64" if name in WHOLE else "int64" if name in COUNTS else "string" if name in WORDS else "float64"
    for name in COLUMNS
}


def frame(rows: Iterable[tuple[int | None, Row]]) -> pd.DataFrame:
    """Rows, each with the step it belongs to (None: of no training), as a frame of the columns `COLUMNS` and dtypes `DTYPES`.

    step, layer, head: nullable integers; n_valid, n_dropped: integers; point, key, cloud, param: nullable strings; the rest
    float64 with nan for what is undefined or not finite. Rows keep their order.
    """
    found = list(rows)
    columns: dict[str, list] = {"step": [step for step, _ in found]}
    columns |= {name: [getattr(row, name) for _, row in found] for name in Row._fields}
    return conform(columns)


def conform(columns: Mapping[str, Sequence] | pd.DataFrame) -> pd.DataFrame:
    """Columns of the schema by name, in its order and dtypes; one that is missing is undefined everywhere, others are dropped."""
    length = next((len(columns[name]) for name in COLUMNS if name in columns), 0)
    found = {}
    for name, dtype in DTYPES.items():
        values = columns[name] if name in columns else [None] * length
        if dtype == "float64":
            numbers = np.asarray(values, dtype=np.float64)  # None becomes nan
            found[name] = np.where(np.isfinite(numbers), numbers, np.nan)
        elif dtype == "int64":
            found[name] = pd.array(values, dtype="Int64").fillna(0).to_numpy(np.int64)
        else:
            found[name] = pd.array(values, dtype=dtype)
    return pd.DataFrame(found)


def observe(
    source: Trajectory | Iterable[Trajectory], observables: str | parts.Observable | Iterable[str | parts.Observable]
) -> pd.DataFrame:
    """What the observables find on the trajectories, in one frame; `step` is undefined.

        emformer.observe(emformer.capture(model, tokens), ["flow", "clustering"])

    Args:
        source: a trajectory, or several of one model and shape, taken one at a time: `emformer.trajectory.captures` makes many
            prompts fit into memory.
        observables: names of families, each meaning all its observables with their defaults, or settings of observables.

    Returns:
        The frame of `frame`. Observables that need what the trajectories lack (a model, labels …) are skipped: each is told in a
        warning and in `attrs["skipped"]`.

    Raises:
        UserError: for a family that does not exist, with the nearest that does.
        ValueError: without a trajectory.
    """
    wanted = [observables] if isinstance(observables, str | parts.Observable) else list(observables)
    settings: list[parts.Observable] = []
    for one in wanted:
        settings += [new for new in (family(one) if isinstance(one, str) else [one]) if new not in settings]
    measured, empty = Pass([Look(settings)]), True
    for trajectory in [source] if isinstance(source, Trajectory) else source:
        measured.update(trajectory)
        empty = False
    if empty:
        raise ValueError("observe takes at least one trajectory")
    for sentence in measured.skipped:
        warnings.warn(sentence, stacklevel=2)
    found = frame((None, row) for row in measured.rows())
    found.attrs["skipped"] = measured.skipped
    return found


class Key(NamedTuple):
    """What a key of the catalogue means: the family it belongs to, and its definition in one line."""

    family: str
    definition: str


def catalogue() -> dict[str, Key]:
    """Every key that a loaded observable may have in its rows."""
    found: dict[str, Key] = {}
    for one in _observables():
        for key, definition in one.keys.items():
            found.setdefault(key, Key(one.family, definition))
    return found


def defaults() -> list[parts.Observable]:
    """Every observable that is loaded and needs no argument, with its defaults, by family and by name of class."""
    return [one() for one in sorted(_observables(), key=lambda one: one.family) if _bare(one)]


def family(name: str) -> list[parts.Observable]:
    """The observables of this family that need no argument, with their defaults, by name of class.

    Raises:
        UserError: for a family that does not exist, with the nearest that does; and where all need arguments.
    """
    classes = _observables()
    families = sorted({one.family for one in classes})
    if name not in families:
        near = difflib.get_close_matches(name, families, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(families)}."
        raise UserError(f"'{name}' is no family of observables; {hint}")
    members = [one for one in classes if one.family == name]
    bare = [one() for one in members if _bare(one)]
    if not bare:
        raise UserError(f"'{name}' has no defaults; give its settings, as {members[0].__name__}(…).")
    return bare


def _bare(cls: type[parts.Observable]) -> bool:
    """Whether it needs no argument."""
    return all(p.default is not p.empty for p in inspect.signature(cls).parameters.values())


def _observables() -> list[type[parts.Observable]]:
    """Every concrete observable, of this package (whose modules are found, not listed) or loaded by the caller, by name."""
    for found in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."):
        importlib.import_module(found.name)
    loaded = (one for one in _below(parts.Observable) if not inspect.isabstract(one) and hasattr(one, "family"))
    classes = {(one.__name__, one.__module__): one for one in loaded}  # a class that is defined anew replaces the old one
    return [classes[place] for place in sorted(classes)]


def _below(base: type[parts.Observable]) -> Iterator[type[parts.Observable]]:
    for one in base.__subclasses__():
        yield one
        yield from _below(one)
