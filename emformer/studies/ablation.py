"""An ablation study, as a folder.

study.yaml         the plan, every field in it
cells.json         the cells: levels and seed of each
configs/           settings of each cell, resolved; cells/CELL/ its run folder, logs/CELL.txt what it said
finished/          a file for each cell that has ended well: its steps and seconds
table.csv          one row a cell and outcome; table.parquet the same. effects.csv: differences between cells of one seed
verdicts.csv       of the claims that the plan makes
report.html        all of that to look at, with loss curves and everything recorded; figures/ what is drawn of it, as pictures
environment.json   versions of what the numbers depend on
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from emformer import figures, plans
from emformer.figures import charts as drawing
from emformer.figures.effects import draw_effects
from emformer.parts import UserError
from emformer.plans import Plan
from emformer.report import ablation as page
from emformer.report.levels import losses
from emformer.studies import search
from emformer.studies.cells import Study, failed
from emformer.studies.examination import read_verdicts
from emformer.studies.jobs import last_line
from emformer.studies.results import read, write_results

HOME = "ablations"


def ablate(
    plan: Plan | str | Path,
    *,
    out: str | Path | None = None,
    scale: str | None = None,
    report: bool = True,
    modules: Sequence[str] = (),
) -> Path:
    """Run every cell of an ablation study, compare them, and return the study's folder.

        emformer.ablate("configs/ablations/position.yaml")
        pandas.read_csv("ablations/position/effects.csv")

    A cell is an ordinary run in a process of its own, and cells of one seed see the same batches in the same order. Stopped or
    killed at any moment, the same call goes on: finished cells are kept, others resumed. A plan that has since got more seeds,
    levels, outcomes or claims adds to the folder. A cell that fails is told, and the rest goes on.

    Args:
        plan: or the YAML file of one.
        out: the folder; by default `ablations/NAME` by the plan's file.
        scale: one of the plan's sizes; only with a file.
        report: write report.html at the end.
        modules: to import in every cell, where your own parts are.

    Raises:
        UserError: for a plan that cannot be, a folder that holds something else or is being worked on, and where no cell of a
            comparison ended well.
    """
    if isinstance(plan, Plan):
        if scale is not None or out is None:
            raise UserError("a plan that is no file has its own scale and needs a folder: give out.")
        folder = Path(out)
    else:
        file, plan = Path(plan), plans.read_plan(plan, scale=scale)
        folder = Path(out) if out is not None else default(file, scale)
    study, found = Study(folder, plan), [] if plan.search else plans.cells(plan)  # a setting that is none leaves no folder
    with study.begun():
        if plan.search:
            search.run(study, modules)
        else:
            study.run(found, modules)
        write_results(study, report)
        if report:
            _show(study)
    return folder


def _show(study: Study) -> None:
    """The page and the pictures of a study, from its tables and the run folders of its cells."""
    path, plan = study.path, study.plan
    table, effects = (read(file) if file.exists() else pd.DataFrame() for file in (path / "table.csv", path / "effects.csv"))
    verdicts = read_verdicts(path) if (path / "verdicts.csv").exists() else []
    why = {name: last_line(path / "logs" / f"{name}.txt") for name in failed(path)}
    try:
        page.write(path, plan, table, effects, verdicts, why)
    except UserError as error:  # all else is there, and can be read without it
        tqdm.write(f"no page: {error}", file=sys.stderr)
    pictures = {f"loss {name}": drawing.draw(chart, plan.title) for name, chart in losses(path, plan).items()}
    if len(effects) and (forest := draw_effects(effects, plan.title)) is not None:
        pictures["effects"] = forest
    (path / "figures").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        figures.save(picture, path / "figures" / f"{name}.png")


def preview(study: Study, modules: Sequence[str] = ()) -> str:
    """What would be run, as text: the cells with how many of them are finished, and the engine's own script."""
    if study.plan.search:
        told = ", ".join(f"{name} in [{one.low:g}, {one.high:g}]" for name, one in study.plan.search.items())
        return f"a search of {study.plan.trials} trials over {told}"
    found = plans.cells(study.plan)
    jobs = [study.job(cell.name, modules) for cell in found]
    ended = sum(job.done.exists() for job in jobs)
    lines = [f"{len(found)} cells in {study.path}, {ended} of them finished", ""]
    lines += [f"  {cell.name}{'   (finished)' * job.done.exists()}" for cell, job in zip(found, jobs, strict=True)]
    return "\n".join([*lines, "", study.engine.script([job for job in jobs if not job.done.exists()])])


def default(file: Path, scale: str | None) -> Path:
    """ablations/NAME, or ablations/NAME-SCALE."""
    return Path(HOME) / (file.stem if scale is None else f"{file.stem}-{scale}")
