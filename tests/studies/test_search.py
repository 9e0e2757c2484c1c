"""A search over continuous settings, with an engine that writes the outcome of a cell in place of training it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from emformer import parts, plans
from emformer.parts import UserError
from emformer.plans import Measure, Plan, Range
from emformer.settings import Settings
from emformer.studies import search
from emformer.studies.cells import Study
from emformer.studies.jobs import Event, Job

RATE, WARMUP = "training.optimizer.rate", "training.schedule.warmup"


@dataclass(frozen=True)
class Bowl(parts.Engine):
    """The outcome of a cell is (log10 rate + 2)^2 + (warmup - 30)^2 / 1000 + seed / 100. Cells in `fails` fail, `stops` after so
    many cells leaves as Ctrl-C does."""

    fails: tuple[int, ...] = ()
    stops: int | None = None
    ran: list[str] = field(default_factory=list)

    def run(self, jobs: Sequence[Job], tell: Callable[[Event], None]) -> None:
        for job in jobs:
            if len(self.ran) == self.stops:
                raise KeyboardInterrupt
            self.ran.append(job.name)
            if len(self.ran) - 1 in self.fails:
                tell(Event("failed", job.name, "the moon is full"))
                continue
            given = dict(word.split("=") for word in job.name.split(","))
            value = (math.log10(float(given[RATE])) + 2) ** 2 + (int(given[WARMUP]) - 30) ** 2 / 1000 + int(given["seed"]) / 100
            value = value if given["seed"] != "2" else 10 - 3 * value  # this seed turns the mean upside down
            run = job.done.parents[1] / "cells" / job.name
            run.mkdir(parents=True, exist_ok=True)
            (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": value}) + "\n")
            job.done.write_text(json.dumps({"step": 1, "seconds": 0.0}))
            tell(Event("finished", job.name))

    def script(self, jobs: Sequence[Job]) -> str:
        return ""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a small run, with a cache of its own."""
    folder = tmp_path_factory.mktemp("base")
    settings = yaml.safe_load((Path(__file__).parents[2] / "configs" / "smoke.yaml").read_text())
    settings["data"] |= {"corpus": {"class_path": "Grammar", "init_args": {"sentences": 300}}, "cache": str(folder / "cache")}
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    return folder / "base.yaml"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Generator[None]:
    """Settings are resolved once: these searches do so hundreds of times. And no text is read."""
    known: dict[str, Settings] = {}
    slow = plans.resolve

    def resolve(plan: Plan, levels: Mapping[str, str], *more: Mapping[str, Any]) -> Settings:
        key = str((plan.base, plan.settings, plan.factors, levels, more))
        return known[key] if key in known else known.setdefault(key, slow(plan, levels, *more))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "resolve", resolve)
        patch.setattr(Study, "_tokenise", lambda *_: None)  # for nothing is trained
        yield


def study(base: Path, folder: Path, engine: Bowl, trials: int = 12, **changes) -> Study:
    ranges = {RATE: Range(low=1e-4, high=1.0, log=True), WARMUP: Range(low=1.0, high=100.0, whole=True)}
    plan = Plan(
        title="which rate",
        base=str(base),
        search=ranges,
        trials=trials,
        seeds=2,
        outcomes={"loss": Measure(metric="val_loss")},
        engine=engine,
    )
    return Study(folder, replace(plan, **changes))


def searched(one: Study) -> pd.DataFrame:
    with one.begun():
        search.run(one)
    return pd.read_csv(one.path / "search.csv")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of twelve trials that nothing disturbed."""
    folder = tmp_path_factory.mktemp("search") / "whole"
    searched(study(base, folder, Bowl()))
    return folder


def test_a_search_finds_the_bottom_of_a_bowl(whole: Path):
    found = pd.read_csv(whole / "search.csv")
    assert list(found.columns) == ["trial", RATE, WARMUP, "value", "status"] and len(found) == 12
    assert found[RATE].between(1e-4, 1).all() and found[WARMUP].between(1, 100).all()
    assert (found["status"] == "finished").all()
    expected = (found[RATE].map(math.log10) + 2) ** 2 + (found[WARMUP] - 30) ** 2 / 1000 + 0.005
    assert (found["value"] - expected).abs().max() < 1e-12, "the mean over two seeds"
    best = found["value"].idxmin()
    assert search.best(whole).startswith(f"the best of 12 trials is trial {best}: {RATE} = ")


def test_a_choice_follows_from_the_outcomes_before_it(whole: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    one = study(base, whole, Bowl())
    chosen = search.trials(one)
    assert search.suggest(one, chosen, 4) == (found := search.suggest(one, chosen, 4)) and len(found) == 4
    monkeypatch.setattr(search, "outcome", lambda study, levels: float(levels[RATE]))
    assert search.suggest(one, chosen, 4) != found
    assert search.suggest(one, chosen[:8], 4) == list(chosen[8:]), "the first ten are drawn at random"


def test_cells_have_the_settings_of_their_trial(whole: Path, base: Path):
    one = study(base, whole, Bowl())
    for levels in search.trials(one)[:2]:
        for cell in search.cells(one.plan, levels):
            assert cell.settings.training.optimizer.rate == float(levels[RATE])
            assert cell.settings.training.schedule.warmup == int(levels[WARMUP]) and cell.settings.training.seed == cell.seed
            assert one.config(cell.name).exists()


def test_equal_searches_are_equal_and_a_stopped_one_goes_on_the_same(base: Path, tmp_path: Path, whole: Path):
    expected = (whole / "search.csv").read_bytes()
    for stops in (3, 17, None):  # cells, of eight that are chosen together
        engine = Bowl(stops=stops)
        try:
            searched(study(base, tmp_path, engine))
        except KeyboardInterrupt:
            assert len(engine.ran) == stops
    assert (tmp_path / "search.csv").read_bytes() == expected
    again = Bowl()
    searched(study(base, tmp_path, again))
    assert not again.ran and (tmp_path / "search.csv").read_bytes() == expected


def test_more_trials_and_more_seeds_add(base: Path, tmp_path: Path, whole: Path):
    searched(study(base, tmp_path, Bowl(), trials=4))
    engine = Bowl()
    found = searched(study(base, tmp_path, engine))
    assert len(engine.ran) == 16 and found.equals(pd.read_csv(whole / "search.csv"))
    searched(study(base, tmp_path, Bowl(), trials=16))
    engine = Bowl()
    searched(study(base, tmp_path, engine, trials=16, seeds=3))  # with other outcomes, of trials that stay as they were
    assert len(engine.ran) == 16 and all(name.endswith("seed=2") for name in engine.ran)


def test_a_trial_that_fails_does_not_stop_the_rest(base: Path, tmp_path: Path):
    one = study(base, tmp_path, Bowl(fails=(3,)), trials=8)
    found = searched(one)
    assert list(found["status"]) == ["finished", "failed", *["finished"] * 6] and math.isnan(found["value"][1])
    assert len(one.failed) == 1
    engine = Bowl()
    searched(study(base, tmp_path, engine, trials=8))
    assert len(engine.ran) == 1, "only what failed is run again"


def test_few_whole_numbers_are_tried_once_each(base: Path, tmp_path: Path):
    ranges = {RATE: Range(low=0.01, high=0.01000001), WARMUP: Range(low=3.0, high=5.0, whole=True)}
    found = searched(study(base, tmp_path, Bowl(), search={RATE: ranges[RATE], WARMUP: ranges[WARMUP]}, trials=30))
    assert not found.duplicated([RATE, WARMUP]).any() and found[WARMUP].between(3, 5).all()


def test_what_cannot_be_searched_is_told(base: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    other = {"training.rate": Range(low=0.1, high=0.9)}
    with pytest.raises(UserError, match=r"varies training\.optimizer\.rate, .* choose another --out"):
        searched(study(base, whole, Bowl(), search=other))
    with pytest.raises(UserError, match=r"the search cannot try training\.rate=0\.\d+: 'rate' exists, but not"):
        searched(study(base, tmp_path / "a", Bowl(), search=other))
    with pytest.raises(UserError, match=r"no whole number from 1\.2 to 1\.8"):
        searched(study(base, tmp_path / "b", Bowl(), search={WARMUP: Range(low=1.2, high=1.8, whole=True)}))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"emformer\[sweep\]"):
        searched(study(base, tmp_path / "c", Bowl()))
    assert search.best(tmp_path / "c") == ""


def test_a_plan_with_a_search_is_read_from_a_file(base: Path, tmp_path: Path):
    file = tmp_path / "plan.yaml"
    file.write_text(
        f"title: which rate\nbase: {base}\noutcomes: {{loss: {{metric: val_loss}}}}\ntrials: 7\n"
        f"search: {{{RATE}: {{low: 0.001, high: 0.1, log: true}}}}\n"
    )
    plan = plans.read_plan(file)
    assert plan.search == {RATE: Range(low=0.001, high=0.1, log=True)} and plan.trials == 7
