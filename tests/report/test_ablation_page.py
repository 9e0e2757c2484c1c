"""The page of an ablation study: what its tables and cells hold in words and numbers, nothing from outside, and what it draws."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from pages import HOSTILE, Opened, rows
from playwright.sync_api import Browser
from scipy import stats
from test_report_page import Outline, data

from emformer.effects import claims, effects
from emformer.figures.effects import draw_effects
from emformer.parts import UserError
from emformer.plans import Claim, Control, Measure, Plan, Range
from emformer.recordings import Recordings
from emformer.report import ablation, levels
from emformer.report.ablation import write
from emformer.report.text import visible

LIMIT = 6_000_000  # bytes of a page
STEPS = (0, 10, 20)
PLAN = Plan(
    title=HOSTILE[0],
    base=[HOSTILE[1], "base.yaml"],
    settings={"training": {HOSTILE[2]: 1}},
    factors={"position": {"rope": {}, "none": {}, "null": {}}, "ffn": {"with": {}, "without": {}}},
    design="single",
    seeds=6,
    outcomes={"loss": Measure(metric="val_loss"), HOSTILE[3]: Measure(record="flow.speed_rel", where={"layer": 0})},
    controls={"learns": Control(outcome="loss", most=7.0)},
    claims={HOSTILE[5]: Claim(source=HOSTILE[2], outcome="loss", levels={"position": "none"}, least=0.0)},
)
SHIFT = {"rope": 0.0, "none": 0.5, "null": 0.0, "with": 0.0, "without": -0.25}
NOISE = np.random.default_rng(0).normal(size=(6, 3, 3, 2))  # seed, step, position, ffn


class Made(NamedTuple):
    """A study on the disk and what its tables would be."""

    path: Path
    plan: Plan
    table: pd.DataFrame
    failed: dict[str, str]

    def write(self) -> Path:
        found = effects(self.table, self.plan) if self.plan.factors else pd.DataFrame()
        said = claims(self.table, self.plan) if self.plan.factors else []
        return write(self.path, self.plan, self.table, found, said, self.failed)


def loss(levels_: dict[str, str], seed: int, step: int) -> float:
    noise = NOISE[seed, STEPS.index(step), list(SHIFT).index(levels_["position"]), int(levels_["ffn"] != "with")]
    return 3 - step / 20 + seed / 10 + step / 20 * sum(SHIFT[level] for level in levels_.values()) + noise / 50


def made(path: Path, plan: Plan = PLAN, lost: tuple[str, ...] = (), records: bool = True) -> Made:
    """The folder of a study in which the cells `lost` have failed."""
    found, told = [], []
    for seed in range(plan.seeds):
        for one in plan.combinations():
            name = ",".join(f"{factor}={level}" for factor, level in one.items()) + f",seed={seed}"
            told.append({"name": name, "levels": one, "seed": seed})
            cell = path / "cells" / name
            cell.mkdir(parents=True)
            journal = [{"step": step, "val_loss": loss(one, seed, step), "train_loss": 1.0} for step in STEPS]
            (cell / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in journal))
            values = {"loss": loss(one, seed, STEPS[-1]), HOSTILE[3]: float(seed)}
            status = "failed" if name in lost else "finished"
            found += [
                {"cell": name, **one, "seed": seed, "status": status, "outcome": outcome, "value": value}
                for outcome, value in ({} if status == "failed" else values).items()
            ] or [
                {"cell": name, **one, "seed": seed, "status": status, "outcome": outcome, "value": math.nan} for outcome in values
            ]
            if status == "finished":
                (path / "finished").mkdir(exist_ok=True)
                (path / "finished" / f"{name}.json").write_text("{}")
                if records:
                    writer = Recordings(cell / "records.jsonl", -1)
                    for step in (0, 100):
                        writer.append(step, rows(step, seed / 8 + sum(SHIFT[level] for level in one.values())))
                    writer.close()
    (path / "cells.json").write_text(json.dumps(told))
    return Made(path, plan, pd.DataFrame(found), dict.fromkeys(lost, HOSTILE[4]))


LOST = ("position=none,ffn=with,seed=2", "position=rope,ffn=without,seed=5")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of which two cells failed; no test may change it."""
    return made(tmp_path_factory.mktemp("study") / "study", lost=LOST)


@pytest.fixture(scope="module")
def file(study: Made) -> Path:
    return study.write()


def cells_of(file: Path, section: str) -> list[list[str]]:
    """The cells of each row in the body of a section's table, as text."""
    part = file.read_text(encoding="utf-8").split(f'<section id="{section}">')[1].split("</table>")[0]
    lines = re.findall(r"<tr.*?>(.*?)</tr>", part.split("<tbody>")[1])
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", line)] for line in lines]


def test_it_says_what_was_varied_and_what_is_lacking(study: Made, file: Path):
    page = Outline(file)
    assert page.sections == ["effects", "verdicts", "losses", "observables", "differences", "failed"]
    assert page.loads == [] and file.stat().st_size < LIMIT
    for word in ("24: 22 finished, 2 failed", "rope (baseline), none, null", "with (baseline), without", "val_loss, last"):
        assert word in page.words, word
    assert "loss is in [-∞, 7]" in page.words and "flow.speed_rel at layer=0, last" in page.words
    for hostile in HOSTILE[:6]:
        assert visible(hostile) in page.words, hostile
    assert "2 of 24 cells failed" in page.words
    assert "Too few seeds: 4 of 6 differences rest on fewer than 6 (as few as 5)" in page.words
    assert cells_of(file, "failed") == [[name, visible(HOSTILE[4])] for name in LOST]


def test_its_table_is_that_of_the_effects(study: Made, file: Path):
    found = effects(study.table, study.plan)
    told = cells_of(file, "differences")
    assert [[cell[0], cell[2]] for cell in told] == found[["word", "contrast"]].to_numpy().tolist()
    assert [cell[9] for cell in told] == ["5 of 6", "6", "5 of 6"] * 2
    assert [float(cell[5]) for cell in told] == pytest.approx(found["difference"].tolist(), rel=1e-2, abs=1e-12)
    drawn = data(file, "effects")["rows"]
    assert [row["at"] for row in drawn] == found["contrast"].tolist()
    assert [row["sure"] for row in drawn] == (found["word"] == "differs").tolist()
    for name in ("difference", "low", "high", "mean"):
        assert [row[name] for row in drawn] == pytest.approx(found[name].tolist(), rel=1e-4, abs=1e-12)


def test_its_curves_are_means_over_seeds_with_students_interval(study: Made, file: Path):
    charts = {one["title"]: one["data"] for one in data(file, "losses")["charts"]}
    assert list(charts) == ["position", "ffn"]
    panels = charts["position"]["panels"]
    assert [panel["title"] for panel in panels] == ["val_loss", "val_loss, difference to rope"]
    assert [group["name"] for group in charts["position"]["groups"]] == ["rope (6 seeds)", "none (5 seeds)", "null (6 seeds)"]
    lines = {line["name"]: line for line in panels[0]["lines"]}
    seeds = [seed for seed in range(6) if seed != 2]
    values = np.array([[loss({"position": "none", "ffn": "with"}, seed, step) for step in STEPS] for seed in seeds])
    mean = lines["none"]
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean["x"] == list(STEPS) and "seed" not in mean
    for name, wanted in (("y", values.mean(0)), ("low", known.low), ("high", known.high)):
        assert mean[name] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert lines["none, seed 3"]["seed"] and "none, seed 2" not in lines
    base = np.array([[loss({"position": "rope", "ffn": "with"}, seed, step) for step in STEPS] for seed in seeds])
    paired = {line["name"]: line for line in panels[1]["lines"]}
    assert paired["none"]["y"] == pytest.approx((values - base).mean(0).tolist(), rel=1e-3, abs=1e-6)
    assert not any(name.startswith("rope") for name in paired)


def test_everything_recorded_is_there_by_level(study: Made, file: Path):
    told = data(file, "observables")
    assert told["first"] == "flow.speed_rel", "what the plan asks for is seen first"
    assert [(one["title"], one["names"]) for one in told["groups"]] == [
        ("position", ["rope", "none", "null"]),
        ("ffn", ["with", "without"]),
    ]
    series = {(one["key"], one["cloud"], one["param"]): one for one in told["series"]}
    keys = {(row.key, row.cloud, row.param or "") for row in rows(100) if row.head is None}
    assert set(series) == {(visible(key), cloud or "", visible(param)) for key, cloud, param in keys}
    speed = series["flow.speed_rel", "raw", ""]
    assert speed["places"] == ["0a", "0f", "1a", "1f"] and speed["step"] == 100
    row = told["groups"][0]["rows"][1]  # position=none, of which a seed is lost
    for at, k in enumerate((1, 2, 3, 4)):
        values = [100 + 10 * k + seed / 8 + 0.5 for seed in range(6) if seed != 2]
        known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert speed["mean"][row][at] == pytest.approx(np.mean(values), rel=1e-3)
        assert speed["half"][row][at] == pytest.approx((known.high - known.low) / 2, rel=0.05)
        assert speed["n"][row][at] == 5
    assert series["breath.sawtooth", "raw", ""]["places"] == ["all"]


def test_a_place_is_undefined_where_every_seed_is(tmp_path: Path):
    mean, half, n = levels.student(np.array([[1.0, math.nan, math.nan], [3.0, 5.0, math.nan]]))
    np.testing.assert_allclose(mean, [2, 5, math.nan])
    np.testing.assert_allclose(half, [stats.t.ppf(0.975, 1), math.nan, math.nan], rtol=1e-12)
    assert n.tolist() == [2, 1, 0]


def test_what_is_looked_at_together():
    single = levels.views(PLAN)
    assert [view.title for view in single] == ["position", "ffn"]
    assert single[1].levels["without"] == {"position": "rope", "ffn": "without"}
    full = levels.views(replace(PLAN, design="full"))
    assert [view.title for view in full] == ["position", "ffn", "all combinations"] and len(full[2].levels) == 6
    corners = levels.views(replace(PLAN, design="corners"))
    assert [view.title for view in corners] == [
        "position",
        "ffn",
        "position from the opposite corner",
        "ffn from the opposite corner",
    ]
    assert corners[2].levels["none"] == {"position": "none", "ffn": "without"}
    shown = [one for view in corners for one in view.levels.values()]
    assert all(one in shown for one in replace(PLAN, design="corners").combinations())


def test_few_seeds_are_said_and_nothing_is_found(tmp_path: Path):
    few = made(tmp_path / "few", replace(PLAN, seeds=2), records=False).write()
    page = Outline(few)
    assert "Too few seeds: 6 of 6 differences rest on fewer than 6 (as few as 2)" in page.words
    assert {cell[0] for cell in cells_of(few, "differences")} == {"too few seeds"}
    assert not any(row["sure"] for row in data(few, "effects")["rows"])
    assert "undecided" in cells_of(few, "verdicts")[0][0] and page.sections == ["effects", "verdicts", "losses", "differences"]


def test_what_is_too_much_is_left_out_and_counted(study: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(levels, "NUMBERS", 150)
    monkeypatch.setattr(ablation, "ROWS", 4)
    file = study.write()
    whole = {(row.key, row.cloud, row.param) for row in rows(100) if row.head is None}
    told = data(file, "observables")["series"]
    assert 0 < len(told) < len(whole) and sum(2 * np.size(one["mean"]) for one in told) <= 150
    assert f"{len(whole) - len(told)} of {len(whole)} series are not drawn." in Outline(file).words
    assert all(one["param"] == "" for one in told), "controls go first"
    assert len(cells_of(file, "differences")) == 4 and "The table shows 4 of 6; effects.csv has all." in Outline(file).words
    monkeypatch.undo()
    study.write()


def test_equal_studies_give_equal_pages_and_a_failure_leaves_the_old_one(study: Made, file: Path, tmp_path: Path):
    before = file.read_bytes()
    assert study.write().read_bytes() == before
    with pytest.raises(UserError, match="cannot write"):
        (tmp_path / "cells.json").write_text("[]")
        (tmp_path / "report.html").mkdir()
        write(tmp_path, PLAN, study.table, pd.DataFrame(), [], {})
    assert file.read_bytes() == before


def test_a_search_tells_its_trials_the_least_first(tmp_path: Path):
    plan = Plan(
        title="rates",
        base="base.yaml",
        outcomes={"loss": Measure(metric="val_loss")},
        search={"training.optimizer.rate": Range(low=0.001, high=0.1, log=True)},
    )
    rates, found = ("0.01", "0.002", "0.05"), []
    told = [
        {"name": f"rate={rate},seed={seed}", "levels": {"training.optimizer.rate": rate}, "seed": seed}
        for rate in rates
        for seed in range(2)
    ]
    for one in told:
        value = 3.0 - rates.index(one["levels"]["training.optimizer.rate"]) + one["seed"] / 4
        (tmp_path / "cells" / one["name"]).mkdir(parents=True)
        (tmp_path / "finished").mkdir(exist_ok=True)
        (tmp_path / "finished" / f"{one['name']}.json").write_text("{}")
        (tmp_path / "cells" / one["name"] / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": value}) + "\n")
        row = {"cell": one["name"], **one["levels"], "seed": one["seed"], "status": "finished", "outcome": "loss", "value": value}
        found.append(row)
    (tmp_path / "cells.json").write_text(json.dumps(told))
    file = write(tmp_path, plan, pd.DataFrame(found), pd.DataFrame(), [], {})
    assert cells_of(file, "trials") == [["0.05", "1.125"], ["0.002", "2.125"], ["0.01", "3.125"]]
    groups = [group["name"] for group in data(file, "losses")["charts"][0]["data"]["groups"]]
    assert groups == [f"{k}: training.optimizer.rate={rate} (2 seeds)" for k, rate in enumerate(rates, 1)]
    assert Outline(file).sections == ["trials", "losses"] and "0.001 to 0.1, evenly in the logarithm" in Outline(file).words


def test_the_forest_on_paper(study: Made):
    found = effects(study.table, study.plan)
    figure = draw_effects(found, HOSTILE[0])
    assert figure is not None and len(figure.axes) == 2
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == found["contrast"].unique().tolist()
    filled = [line for line in figure.axes[0].lines if line.get_marker() == "o" and line.get_markerfacecolor() != "white"]
    assert sum(len(line.get_xdata()) for line in filled) == ((found["outcome"] == "loss") & (found["word"] == "differs")).sum()
    assert draw_effects(found.assign(difference=math.nan)) is None


@pytest.fixture(scope="module")
def opened(browser: Browser, file: Path) -> Iterator[Opened]:
    found = Opened(browser, file)
    yield found
    found.page.close()


def traces(opened: Opened, plot: str) -> Any:
    return json.loads(opened.page.evaluate(f"JSON.stringify(document.getElementById('{plot}')._fullData.map(t => t.name))"))


def test_it_is_drawn_and_chosen_from(opened: Opened, study: Made, file: Path):
    assert opened.all_drawn() == ["effects", "losses", "observables"]
    found = effects(study.table, study.plan)
    for outcome in study.plan.outcomes:
        opened.choose("effects", "outcome", visible(outcome))
        own = found[found["outcome"] == outcome]
        assert opened.drawn("effects-plot", "x") == pytest.approx(own["difference"].tolist(), rel=1e-4, abs=1e-12)
        up = (own["high"] - own["difference"]).fillna(0)
        assert opened.drawn("effects-plot", "error_x.array") == pytest.approx(up.tolist(), rel=1e-2, abs=1e-4)
    assert opened.page.locator("#losses .plot:visible").count() == 2
    opened.choose("losses", "factor", "1")
    assert opened.page.locator("#losses .legend button").all_inner_texts() == ["━●━with (6 seeds)", "━■━without (5 seeds)"]
    opened.choose("observables", "key", "geo.id_twonn")
    opened.choose("observables", "factor", "1")
    assert traces(opened, "observables-plot") == ["\u2068with\u2069", "\u2068without\u2069"]
    opened.choose("observables", "key", "breath.sawtooth")
    assert opened.drawn("observables-plot", "x") == [0] and opened.drawn("observables-plot", "x", 1) == [1]
    first = opened.page.locator("#observables .legend button").first
    first.click()
    opened.until("document.getElementById('observables-plot')._fullData[0].visible === false")
    assert opened.page.evaluate("typeof hacked") == "undefined" and opened.page.locator("img, iframe, object").count() == 0
    assert opened.said == [] and opened.asked == [opened.address]


def test_a_phone_shows_all_of_it_without_scrolling_sideways(opened: Opened):
    opened.all_drawn()
    opened.page.set_viewport_size({"width": 390, "height": 800})
    wide = "[...document.querySelectorAll('.plot, .main-svg')].filter(p => p.getBoundingClientRect().right > 391).length"
    opened.until(f"document.documentElement.scrollWidth <= 390 && {wide} === 0")
    assert opened.said == []
