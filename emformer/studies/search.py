"""A search over continuous settings with optuna (the extra `sweep`): every trial is a few cells like any other, one a seed.

search.csv holds a row a trial: its settings, the mean over seeds of the first outcome, which is minimised, and what became of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emformer import plans
from emformer.parts import UserError
from emformer.plans import Cell, Plan, Range
from emformer.studies.cells import Study
from emformer.studies.results import measured, write_csv

TOGETHER = 4  # trials that are chosen at the same time, whatever the engine: what is chosen shall not depend on the machine
ASKED = 100  # suggestions for one new trial, before the ranges count as exhausted
NAME = "search.csv"

Levels = Mapping[str, str]  # {setting: its value as text}


def run(study: Study, modules: Sequence[str] = ()) -> None:
    """Run the plan's trials, a few together: the first ten at random, later ones where optuna's TPE expects most.

    A choice is a function of the trials before it and of their outcomes, so equal searches are equal bit by bit. Trials that were
    chosen stay chosen (cells.json has them): stopped or killed, the search goes on with them; with more `trials` it is continued.
    A trial one of whose seeds fails or ends without a number is told to optuna as failed.

    Raises:
        UserError: for settings that do not exist, a folder with another search, and without optuna.
    """
    chosen = trials(study)
    if chosen:
        study.run([cell for levels in chosen for cell in cells(study.plan, levels)], modules)
        _write(study)
    while len(chosen) < study.plan.trials:
        new = suggest(study, chosen, min(TOGETHER, study.plan.trials - len(chosen)))
        if not new:
            break  # every value of the ranges was tried
        study.run([cell for levels in new for cell in cells(study.plan, levels)], modules)
        chosen += new
        _write(study)


def trials(study: Study) -> list[Levels]:
    """The trials that were chosen so far, in their order. Raises `UserError` for a folder that holds something else."""
    found: list[Levels] = []
    for one in study.cells:
        if one["levels"].keys() != study.plan.search.keys():
            raise UserError(f"{study.path} varies {', '.join(one['levels'])}; choose another --out folder for another search.")
        if one["levels"] not in found:
            found.append(one["levels"])
    return found


def cells(plan: Plan, levels: Levels) -> list[Cell]:
    """The cells of a trial. Raises `UserError` for settings that are none."""
    try:
        settings = plans.resolve(plan, {}, _values(plan, levels))
    except UserError as error:
        told = ", ".join(f"{name}={text}" for name, text in levels.items())
        raise UserError(f"the search cannot try {told}: {str(error).removeprefix('the base: ')}") from error
    return [Cell(levels, seed, replace(settings, training=replace(settings.training, seed=seed))) for seed in range(plan.seeds)]


def suggest(study: Study, chosen: Sequence[Levels], count: int) -> list[Levels]:
    """Up to `count` new trials, given the outcomes of those before; fewer where optuna comes to no other values."""
    optuna = _optuna()
    ranges = {name: _distribution(optuna, one) for name, one in study.plan.search.items()}
    states, trial = optuna.trial.TrialState, optuna.trial.create_trial
    known = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=len(chosen)), direction="minimize")
    for levels in chosen:
        values = _values(study.plan, levels)
        if any(not one.low <= values[name] <= one.high for name, one in study.plan.search.items()):
            continue  # the ranges were others then
        value = outcome(study, levels)
        told = {"state": states.FAIL} if np.isnan(value) else {"state": states.COMPLETE, "value": value}
        known.add_trial(trial(params=values, distributions=ranges, **told))
    found: list[Levels] = []
    for _ in range(ASKED):
        if len(found) == count:
            break
        params = known.ask(ranges).params
        levels = {name: _text(params[name], one) for name, one in study.plan.search.items()}
        if levels not in found and levels not in chosen:
            found.append(levels)
    return found


def outcome(study: Study, levels: Levels) -> float:
    """The mean over seeds of the first outcome of a trial; nan where any of them is missing."""
    measure = next(iter(study.plan.outcomes.values()))
    own = [one["name"] for one in study.cells if one["levels"] == levels and one["seed"] < study.plan.seeds]
    ended = [measured(study.run_of(name), measure)["value"] for name in own if study.done(name).exists()]
    return float(np.mean(ended)) if len(ended) == study.plan.seeds else float("nan")


def table(study: Study) -> pd.DataFrame:
    """One row a trial: its number, its settings, the mean of the first outcome, and whether it "finished" or "failed"."""
    rows = []
    for k, levels in enumerate(trials(study)):
        value = outcome(study, levels)
        rows.append({"trial": k, **levels, "value": value, "status": "failed" if np.isnan(value) else "finished"})
    return pd.DataFrame(rows, columns=["trial", *study.plan.search, "value", "status"])


def best(folder: str | Path) -> str:
    """The best trial of a search's folder, in a sentence; "" where there is none."""
    path = Path(folder) / NAME
    found = pd.read_csv(path, dtype=str).astype({"value": float}) if path.exists() else pd.DataFrame({"value": []})
    if not found["value"].notna().any():
        return ""
    row = found.loc[found["value"].idxmin()]
    told = ", ".join(f"{name} = {row[name]}" for name in found.columns if name not in ("trial", "value", "status"))
    return f"the best of {len(found)} trials is trial {row['trial']}: {told}, with {row['value']:.5g}"


def _write(study: Study) -> None:
    write_csv(table(study), study.path / NAME)


def _text(value: float | int, one: Range) -> str:
    """A value as text, of four digits where that lies in its range: the folder's name and the setting are the same number."""
    if one.whole:
        return str(int(value))
    text = f"{value:.4g}"
    return text if one.low <= float(text) <= one.high else repr(float(value))


def _values(plan: Plan, levels: Levels) -> dict[str, float | int]:
    return {name: int(float(text)) if plan.search[name].whole else float(text) for name, text in levels.items()}


def _distribution(optuna: Any, one: Range) -> Any:
    if one.whole:
        low, high = int(np.ceil(one.low)), int(np.floor(one.high))
        if low > high:
            raise UserError(f"there is no whole number from {one.low:g} to {one.high:g}; choose another range.")
        return optuna.distributions.IntDistribution(low, high, log=one.log)
    return optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)


def _optuna() -> Any:
    try:
        import optuna  # only for those who ask
    except ModuleNotFoundError as error:
        raise UserError("a search needs the package optuna: pip install 'emformer[sweep]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
