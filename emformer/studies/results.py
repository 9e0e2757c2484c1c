"""What the cells of an ablation study amount to: a tidy table, paired differences, verdicts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emformer.files import replaced
from emformer.parts import UserError
from emformer.plans import Measure
from emformer.recordings import read_records
from emformer.records import Run
from emformer.studies.cells import Study

COLUMNS = ("outcome", "value", "se", "n", "step")  # after cell, the factors, seed and status


def write_results(study: Study, report: bool = True) -> None:
    """Table, effects, verdicts and report of a study, from the run folders of its cells; all of them derived, and rewritten."""
    found = table(study)
    write_csv(found, study.path / "table.csv")
    with replaced(study.path / "table.parquet") as partial:
        found.to_parquet(partial, engine="pyarrow", index=False)
    if found["value"].notna().sum() == 0:
        raise UserError(f"no cell of {study.path} ended with an outcome; what they said is in {study.path / 'logs'}.")


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """A frame as CSV, at once, with the same bytes on every system."""
    text = io.StringIO()
    frame.to_csv(text, index=False, lineterminator="\n")
    with replaced(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8", newline="")


def table(study: Study) -> pd.DataFrame:
    """One row a cell and outcome: cell, the level of every factor, seed, status ("finished", "failed", "missing"), outcome,
    value, its standard error within the cell (nan where it has none), n prompts (0: of no prompts) and the step it is of.

    Nothing in it depends on where or when the study ran: equal studies give equal bytes.
    """
    rows: list[dict[str, Any]] = []
    for one in study.cells:
        run = study.run_of(one["name"])
        finished = study.done(one["name"]).exists()
        status = "finished" if finished else "failed" if one["name"] in study.failed else "missing"
        for name, measure in study.plan.outcomes.items():
            value = measured(run, measure) if finished else {"value": np.nan, "se": np.nan, "n": 0, "step": -1}
            rows.append({"cell": one["name"], **one["levels"], "seed": one["seed"], "status": status, "outcome": name, **value})
    factors = list(study.plan.factors or study.plan.search)
    return pd.DataFrame(rows, columns=["cell", *factors, "seed", "status", *COLUMNS])


def measured(run: Run, measure: Measure) -> dict[str, Any]:
    """{"value", "se", "n", "step"} of one outcome of a run; nan where it has none."""
    nothing = {"value": np.nan, "se": np.nan, "n": 0, "step": -1}
    if measure.metric is not None:
        curve = run.curve(measure.metric) if run.metrics.exists() else {}
        if not curve:
            return nothing
        step = max(curve) if measure.at == "last" else min(curve, key=lambda step: curve[step])
        return nothing | {"value": float(curve[step]), "step": step}
    try:
        rows = _rows(read_records(run.path), measure)
    except UserError:
        return nothing
    if not len(rows):
        return nothing
    # an average over rows of the same prompts: their errors do not average out
    se = float(rows["se"].mean()) if rows["se"].notna().all() else np.nan
    return {"value": float(rows["mean"].mean()), "se": se, "n": int(rows["n_valid"].min()), "step": int(rows["step"].iloc[0])}


def _rows(records: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    rows = records[(records["key"] == measure.record) & records["mean"].notna()]
    for place, wanted in measure.where.items():
        if wanted != "any":
            rows = rows[rows[place].isna() if wanted is None else (rows[place] == wanted).fillna(False)]
    for place in ("head", "param"):
        if place not in measure.where:
            rows = rows[rows[place].isna()]
    if not len(rows):
        return rows
    step = rows["step"].max() if measure.at == "last" else rows["step"].min()
    return rows[rows["step"] == step]


def summary(folder: str | Path) -> str:
    """What a study's folder says, for a terminal."""
    found = pd.read_csv(Path(folder) / "table.csv")
    return found.groupby("outcome")["value"].describe().to_string()
