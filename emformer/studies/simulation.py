"""An experiment with an idealised model, as a folder.

config.yaml        the recipe, every field in it: `emformer simulate FOLDER/config.yaml` gives the same numbers again
statements.csv     what theory says, what was measured, and whether it held; note.txt what else is to be known of it
charts/            what is drawn, as numbers; figures/ as pictures
simulation.html    the statements and all charts on one page
observed/NAME/     of each trajectory: records.jsonl as of a run (its layers are times, see times.csv)
environment.json   versions of what the numbers depend on
"""

from __future__ import annotations

import csv
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import pandas as pd
from tqdm import tqdm

from emformer import figures, parts, recipes
from emformer.figures import charts as drawing
from emformer.files import replaced_folder
from emformer.observables import Look, Pass
from emformer.observables.clustering import Clustering
from emformer.observables.energy import Energy
from emformer.observables.flow import Flow
from emformer.parts import UserError
from emformer.recordings import Recordings
from emformer.records import Run
from emformer.report import charts as page
from emformer.studies.looks import WHO_SEES, named
from emformer.studies.outputs import check_free, save, unwritable
from emformer.studies.progress import sharing
from emformer.theory import times_of
from emformer.theory.outcome import How, Outcome, Statement
from emformer.trajectory import Trajectory

OBSERVED = (Flow(), Clustering(), Energy())  # what costs no more than most simulations do
WRITTEN = {"config.yaml", "statements.csv", "note.txt", "charts", "figures", "simulation.html", "observed", "environment.json"}


def perform(
    experiment: parts.Experiment | str,
    *,
    out: str | Path | None = None,
    observables: str | parts.Observable | Iterable[str | parts.Observable] | None = OBSERVED,
    overwrite: bool = False,
) -> Path:
    """Run an experiment with an idealised model, write what it found into a folder, and return that folder.

        from emformer.theory.experiments.sphere import Sphere

        emformer.perform(Sphere(betas=(1.0, 8.0)), out="simulations/hot-and-cold")
        emformer.read_records("simulations/hot-and-cold/observed/*")

    The folder appears whole, or not at all. The same experiment gives the same bytes on the same machine, but for the time that
    environment.json tells.

    Args:
        experiment: one of `emformer.theory.experiments`, your own `parts.Experiment`; or a name, for its
            defaults, or a recipe's file.
        out: the folder; by default `simulations/NAME`.
        observables: what is measured on the trajectories of the experiment: "all", names of families, settings of observables;
            None for nothing. What is costly sees the first prompts only, as in `emformer.analyze`. By default how tokens move and
            cluster, and how attention spreads.
        overwrite: replace the folder, if it holds a simulation and nothing else.

    Raises:
        UserError: for a folder that is taken, and for settings with which the simulation cannot be carried through.
    """
    if isinstance(experiment, str):
        experiment = recipes.EXPERIMENTS.choose([experiment])
    folder = Path(out) if out is not None else recipes.EXPERIMENTS.folder((), experiment)
    check_free(folder, overwrite, WRITTEN, "statements.csv", "simulation")
    with unwritable(folder):  # which shall be known before anything is simulated
        tempfile.TemporaryDirectory(dir=next(one for one in folder.resolve().parents if one.exists())).cleanup()
    wanted = [] if observables is None else _looks(observables)
    begun = time.monotonic()
    outcome = _run(experiment)
    seconds = time.monotonic() - begun
    with unwritable(folder), replaced_folder(folder) as partial:
        _write(partial, experiment, outcome, wanted, seconds)
    return folder


def read_statements(folder: str | Path) -> list[Statement]:
    """What a simulation's folder says of its claims. Raises `UserError` where there is none."""
    path = Path(folder) / "statements.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [_statement(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _statement(row: Mapping[str, str]) -> Statement:
    """Numbers by `float`, which loses no bit; what is undefined is empty."""
    how = next(one for one in get_args(How) if one == row["how"])
    predicted, measured, error = (float(row[name] or "nan") for name in ("predicted", "measured", "error"))
    tolerance = float(row["tolerance"] or 0.0)
    return Statement(row["claim"], row["source"], how, predicted, measured, tolerance, int(row["n"]), error)


def _run(experiment: parts.Experiment) -> Outcome:
    try:
        with sharing(experiment.name) as tell:
            return experiment.run(tell)
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{experiment.name}: {str(error).rstrip('.')}.") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error) and "memory" not in str(error):
            raise
        raise UserError(f"{experiment.name}: there is not enough memory for so many numbers; make it smaller.") from error


def _write(folder: Path, experiment: parts.Experiment, outcome: Outcome, wanted: Sequence[Look], seconds: float) -> None:
    (folder / "config.yaml").write_text(recipes.EXPERIMENTS.written(experiment), encoding="utf-8")
    rows = [one._asdict() | {"held": one.held} for one in outcome.statements]
    for row in rows:
        if row["how"] == "measured":  # nothing is predicted, and so nothing allowed
            row |= {"predicted": math.nan, "tolerance": math.nan}
    if outcome.note:
        (folder / "note.txt").write_text(outcome.note + "\n", encoding="utf-8")
    save(pd.DataFrame(rows, columns=[*Statement._fields, "held"]), folder / "statements.csv")
    for name in ("charts", "figures"):
        (folder / name).mkdir()
    for name, chart in outcome.charts.items():
        save(chart.frame, folder / "charts" / f"{name}.csv")
        figures.save(drawing.draw(chart, experiment.title), folder / "figures" / f"{name}.png")
    facts = {name: str(value) for name, value in recipes.EXPERIMENTS.plain(experiment).items()}
    try:
        page.write(outcome, folder / "simulation.html", title=experiment.title, facts=facts)
    except UserError as error:  # all else is there, and can be read without it
        tqdm.write(f"no page: {error}", file=sys.stderr)
    if wanted:
        _observe(folder / "observed", outcome.trajectories, wanted)
    Run(folder).write_environment(0, experiment=experiment.name, seconds=round(seconds, 3))


def _observe(folder: Path, trajectories: Mapping[str, Trajectory], wanted: Sequence[Look]) -> None:
    """Records of each trajectory, in a folder of its own that reads like a run."""
    skipped = []
    with sharing("observing") as tell:
        for k, (name, trajectory) in enumerate(trajectories.items()):
            tell(k / len(trajectories), name)
            own = folder / called(name)
            own.mkdir(parents=True)
            measured = Pass(wanted)
            measured.update(trajectory)
            recordings = Recordings(own / "records.jsonl", -1)
            recordings.append(0, measured.rows())
            recordings.close()
            states = [(state.layer, state.point, at) for state, at in zip(trajectory.states, times_of(trajectory), strict=True)]
            save(pd.DataFrame(states, columns=["layer", "point", "time"]), own / "times.csv")
            skipped += measured.skipped
    for sentence in dict.fromkeys(skipped):
        tqdm.write(f"  {sentence}", file=sys.stderr)


def called(name: str) -> str:
    """The folder of a trajectory of this name: without spaces and what else is no good in a path."""
    return re.sub(r"[^\w=.+-]+", "-", name).strip("-.")


def _looks(observables: str | parts.Observable | Iterable[str | parts.Observable]) -> list[Look]:
    given = [observables] if isinstance(observables, str | parts.Observable) else list(observables)
    found: list[parts.Observable] = []
    for one in given:
        found += [new for new in ([one] if isinstance(one, parts.Observable) else named(one)) if new not in found]
    if not found:
        raise UserError("no observable is named; choose all, or families as flow,clustering, or --no-observe.")
    return [Look((one,), WHO_SEES.get(type(one).__name__)) for one in found]
