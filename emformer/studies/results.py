"""What the cells of an ablation study amount to: a tidy table, paired differences, verdicts."""

from __future__ import annotations

import io
import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emformer import effects, listing
from emformer.comparison import PLACE
from emformer.files import replaced
from emformer.parts import UserError
from emformer.plans import Measure
from emformer.recordings import read_records
from emformer.records import Run, read_journal
from emformer.studies.cells import Study
from emformer.studies.examination import frame, read_verdicts

COLUMNS = ("outcome", "value", "se", "n", "step")  # after cell, the factors, seed and status
RESULTS = ("effects.csv", "verdicts.csv", "observables.csv", "report.html", "figures/*.png")  # none where a control has failed
WHOLE = ("seed", "n", "step", "planned", "tests", "layer", "head")
FLOATS = ("value", "se", "mean", "of_baseline", "difference", "low", "high", "g", "p", "corrected", "q")
NAMED = 6  # cells that a summary names


def write_results(study: Study, report: bool = True) -> None:
    """Table, effects, verdicts and report of a study, from the run folders of its cells; all of them derived, and rewritten.

    Raises:
        UserError: where no cell has an outcome, or a control of the plan does not hold. The table is written even so, and no
            result beside it; older ones are removed.
    """
    found, plan = table(study), study.plan
    write_csv(found, study.path / "table.csv")
    with replaced(study.path / "table.parquet") as partial:
        found.to_parquet(partial, engine="pyarrow", index=False)
    broken = effects.failures(found, plan)
    if broken or found["value"].notna().sum() == 0:
        for old in [path for name in RESULTS for path in study.path.glob(name)]:
            old.unlink()
        if not broken:
            raise UserError(f"no cell of {study.path} ended with an outcome; {_known(study)}.")
        raise UserError(
            f"no result of {study.path} is shown, for a control does not hold: {'; '.join(broken)}. All numbers are in table.csv."
        )
    records = recorded(study)
    told = {
        "effects.csv": effects.effects(found, plan),
        "verdicts.csv": frame(effects.claims(found, plan)),
        "observables.csv": effects.observables(records, found, plan),
    }
    for name, rows in told.items():
        if len(rows):
            write_csv(rows, study.path / name)
        else:
            (study.path / name).unlink(missing_ok=True)


def _known(study: Study) -> str:
    """What there is in place of the outcomes of a plan: what finished cells have, or what failed ones said."""
    ended = [study.run_of(one["name"]) for one in study.cells if study.done(one["name"]).exists()]
    if not ended:
        return f"what they said is in {study.path / 'logs'}"
    rows = read_journal(ended[0].metrics) if ended[0].metrics.exists() else []
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    if ended[0].records.exists() or ended[0].parquet.exists():
        keys |= dict.fromkeys(read_records(ended[0].path)["key"].astype(str))
    asked = ", ".join(str(one.metric or one.record) for one in study.plan.outcomes.values())
    near = [key for one in study.plan.outcomes.values() for key in get_close_matches(str(one.metric or one.record), keys, 1)]
    return f"those that finished have no {asked}" + (f"; did you mean {', '.join(near)}?" * bool(near)).removesuffix("?")


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """A frame as CSV, at once, with the same bytes on every system."""
    text = io.StringIO()
    frame.to_csv(text, index=False, lineterminator="\n")
    with replaced(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8", newline="")


def table(study: Study) -> pd.DataFrame:
    """One row a cell and outcome: cell, the level of every factor, seed, status ("finished", "failed", "missing"), outcome,
    value, its standard error within the cell (nan where it has none), n prompts (0: of no prompts) and the step it is of. A cell
    that lacks a number at a place, as a layer, where another seed of its levels has one has no value: its average would be of
    other places.

    Nothing in it depends on where or when the study ran: equal studies give equal bytes.
    """
    rows: list[dict[str, Any]] = []
    for one in study.cells:
        run = study.run_of(one["name"])
        finished = study.done(one["name"]).exists()
        status = "finished" if finished else "failed" if one["name"] in study.failed else "missing"
        for name, measure in study.plan.outcomes.items():
            value = measured(run, measure) if finished else {"value": np.nan, "se": np.nan, "n": 0, "step": -1, "places": 0}
            rows.append({"cell": one["name"], **one["levels"], "seed": one["seed"], "status": status, "outcome": name, **value})
    factors = list(study.plan.factors or study.plan.search)
    found = pd.DataFrame(rows, columns=["cell", *factors, "seed", "status", *COLUMNS, "places"])
    most = found.groupby([*factors, "outcome"])["places"].transform("max")
    found.loc[found["places"] < most, ["value", "se"]] = np.nan
    return found.drop(columns="places")


def measured(run: Run, measure: Measure) -> dict[str, Any]:
    """{"value", "se", "n", "step", "places"} of one outcome of a run: nan where it has none. Of a record it is the mean over the
    places that have a number at its step, so many."""
    nothing = {"value": np.nan, "se": np.nan, "n": 0, "step": -1, "places": 0}
    if measure.metric is not None:
        curve = run.curve(measure.metric) if run.metrics.exists() else {}
        known = curve if measure.at == "last" else {step: value for step, value in curve.items() if math.isfinite(value)}
        if not known:
            return nothing
        step = max(known) if measure.at == "last" else min(known, key=lambda step: known[step])
        return nothing | {"value": float(curve[step]), "step": step}
    try:
        rows = _rows(read_records(run.path), measure)
    except UserError:
        return nothing
    if not len(rows):
        return nothing
    step, rows = int(rows["step"].iloc[0]), rows[rows["mean"].notna()]
    if not len(rows):
        return nothing | {"step": step}
    # an average over rows of the same prompts: their errors do not average out
    se = float(rows["se"].mean()) if rows["se"].notna().all() else np.nan
    return {"value": float(rows["mean"].mean()), "se": se, "n": int(rows["n_valid"].min()), "step": step, "places": len(rows)}


def _rows(records: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """The rows that an outcome is the mean of: all of one step, those without a number too."""
    rows = records[records["key"] == measure.record]
    for place, wanted in measure.where.items():
        wanted = rows["layer"].max() if (place, wanted) == ("layer", "last") else wanted
        if wanted != "any":
            rows = rows[rows[place].isna() if wanted is None else (rows[place] == wanted).fillna(False)]
    for place in ("head", "param"):
        if place not in measure.where:
            rows = rows[rows[place].isna()]
    if not len(rows):
        return rows
    step = rows["step"].max() if measure.at == "last" else rows["step"].min()
    return rows[rows["step"] == step]


def recorded(study: Study) -> pd.DataFrame:
    """What the finished cells recorded, of each key at its last step: a row a cell and place, "cell", `PLACE`, "mean"."""
    found = [pd.DataFrame(columns=["cell", *PLACE, "mean"])]
    for one in study.cells:
        run = study.run_of(one["name"])
        if study.done(one["name"]).exists() and (run.records.exists() or run.parquet.exists()):
            rows = read_records(run.path)
            rows = rows[(rows["step"] == rows.groupby("key")["step"].transform("max")) & rows["mean"].notna()]
            found.append(rows[[*PLACE, "mean"]].assign(cell=one["name"]))
    return pd.concat(found[1:] or found, ignore_index=True)


def read(path: str | Path) -> pd.DataFrame:
    """A CSV of a study with the types it was written from: levels stay text, whatever they look like, and numbers lose no bit."""
    found = pd.read_csv(path, dtype=str, keep_default_na=False)
    for name in found:
        if name in WHOLE:
            found[name] = pd.array([int(value) if value else None for value in found[name]], dtype="Int64")
        elif name in FLOATS:
            found[name] = [float(value or "nan") for value in found[name]]
    return found


def summary(folder: str | Path) -> str:
    """What a study's folder says, for a terminal: how its outcomes differ, what became of its claims, and what is lacking. Of a
    study without comparisons, its cells, the least of the first outcome first."""
    folder = Path(folder)
    found = read(folder / "table.csv")
    compared = (folder / "effects.csv").exists()
    told = [listing.effects(read(folder / "effects.csv")) if compared else listing.cells(found)]
    if (folder / "verdicts.csv").exists():
        told.append(listing.claims(read_verdicts(folder)))
    if (folder / "observables.csv").exists():
        rows = read(folder / "observables.csv")
        apart, tests = int((rows["word"] == effects.DIFFERS).sum()), int(rows["tests"].iloc[0])
        least = "at least " * (apart == effects.MOST)
        told.append(
            f"of {tests:,} differences in what was recorded {least}{apart:,} are found at a false discovery rate of 5 %, "
            "to look around: observables.csv"
        )
    return "\n\n".join([*told, *_lacking(found)])


def _lacking(found: pd.DataFrame) -> list[str]:
    """A sentence for each way in which cells have no outcome, with their names."""
    cells = found.drop_duplicates("cell")
    gone = {status: list(cells.loc[cells["status"] == status, "cell"]) for status in ("failed", "missing")}
    blank = found[(found["status"] == "finished") & ~np.isfinite(found["value"])]
    gone |= {f"finished without a number for {name}": list(rows["cell"]) for name, rows in blank.groupby("outcome", sort=False)}
    return [
        f"{len(names)} of {len(cells)} cells {what}: {', '.join(names[:NAMED])}{' …' * (len(names) > NAMED)}"
        for what, names in gone.items()
        if names
    ]
