"""The page of an experiment: its statements in words, its charts as numbers, nothing from outside, and points that move."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import HOSTILE, Opened
from playwright.sync_api import Browser
from test_report_page import Outline, data

from emformer.intervals import Interval
from emformer.parts import UserError
from emformer.report import charts
from emformer.report.charts import write
from emformer.report.text import visible
from emformer.theory.outcome import Chart, Curves, Heat, Outcome, Paths, Statement
from emformer.verdicts import Findings, Verdict

LIMIT = 6_000_000  # bytes of a page
TIMES = np.array([0.5, 1.0, 2.0, 4.0])
STATEMENTS = [
    Statement(HOSTILE[0], HOSTILE[2], "equals", 1.0, 1.0625, 0.125, 8, 0.03125),
    Statement("it stays below", "math E.9", "at most", 0.25, 0.75, n=12_000),
    Statement("it stays above", "math E.9", "at least", 0.25, 0.75),
    Statement("it is told", "math E.9", "measured", math.nan, 0.5),
    Statement("it is lost", "math E.9", "equals", 1.0, math.nan),
]


def curves(lines: int = 3, points: int = 4) -> Curves:
    t = np.linspace(0.5, 4, points) if points != 4 else TIMES
    rows = [("", f"{HOSTILE[2]}, seed {k}", x, 2.0 ** -(k + x), math.nan, math.nan) for k in range(lines) for x in t]
    rows += [("", "theory %{x}", x, 0.25, 0.125, 0.5) for x in t]
    frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y", "low", "high"])
    return Curves(frame, HOSTILE[0], HOSTILE[7], "%{y}", log_y=True)


def heat() -> Heat:
    rows = [(f"d = {d}", x, 10.0**y, math.nan if x + y == 0 else x * y + d) for d in (2, 3) for x in range(4) for y in range(3)]
    return Heat(pd.DataFrame(rows, columns=["panel", "x", "y", "value"]), "A map.", "beta", "time", "clusters", log_y=True)


def turned(count: int = 3, times: int = 5, surface: Any = "circle", panels: int = 1) -> Paths:
    """Each point turns once through a right angle, from its own longitude; those of space rise as well."""
    rows = [
        (
            f"p{p}",
            f"{HOSTILE[4]} {k}",
            t,
            math.cos(k + t / times),
            math.sin(k + t / times),
            t / times if surface != "circle" else math.nan,
        )
        for p in range(panels)
        for k in range(count)
        for t in range(times)
    ]
    return Paths(pd.DataFrame(rows, columns=["panel", "path", "time", "x", "y", "z"]), "Ways.", ("x", "<i>y</i>", "z"), surface)


def outcome(**own: Chart) -> Outcome:
    return Outcome(STATEMENTS, own, note=f"One thing.\n{HOSTILE[1]}")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = {HOSTILE[3]: curves(), "a_map": heat(), "circle": turned(), "space": turned(surface="sphere", panels=2)}
    return write(outcome(**own), tmp_path_factory.mktemp("page") / "page.html", title=HOSTILE[0], facts={HOSTILE[2]: HOSTILE[1]})


VERDICTS = [
    Verdict(
        HOSTILE[0], HOSTILE[2], HOSTILE[3], Interval(-0.0, -0.0, 0.25, 64, "prompts"), least=-1e-9, null=0.5, against=HOSTILE[5]
    ),
    Verdict("it falls", "S2 9.2", "slope", Interval(1.0625, 0.5, 1.5, 12_000, "prompts"), most=0.0, why="the control failed"),
    Verdict("it is even", "S3", "ratio", Interval(1.0, 0.75, 1.25, 8, "models"), least=0.9, most=1.1),
    Verdict("it is few", "S3", "ratio", Interval(1.0, 0.9, 1.1, 3, "models"), least=0.0),
    Verdict("it is lost", "S3", "ratio", Interval(math.nan, math.nan, math.nan, 0, "prompts"), least=0.0),
]


def test_the_verdicts_are_told_in_words_and_signs(tmp_path: Path):
    found = Findings(VERDICTS, {"a_chart": curves()}, note=f"One thing.\n{HOSTILE[1]}")
    file = write(found, tmp_path / "study.html", title=HOSTILE[0], facts={"models": HOSTILE[4]})
    text = file.read_text(encoding="utf-8")
    rows = re.findall(r"<tr class=\"(.*?)\">(.*?)</tr>", text)
    cells = [[re.sub(r"<.*?>", " ", cell).split() for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row)] for _, row in rows]
    assert [kind for kind, _ in rows] == ["held", "not", "undefined", "undefined", "undefined"]
    assert [cell[0] for cell in cells] == [["✓", "supported"], ["✗", "refuted"], *[["?", "undecided"]] * 3]
    assert [" ".join(word) for word in cells[0][3:6]] == ["0", "[0, 0.25]", "≥ -1e-09"], "no number is told as -0"
    assert [[" ".join(word) for word in cell[3:]] for cell in cells[1:]] == [
        ["1.062", "[0.5, 1.5]", "≤ 0", "–", "12,000 prompts"],
        ["1", "[0.75, 1.25]", "0.9 … 1.1", "–", "8 models"],
        ["1", "[0.9, 1.1]", "≥ 0", "–", "3 models"],
        ["–", "–", "≥ 0", "–", "0 prompts"],
    ]
    page = Outline(file)
    assert "5 claims: 1 supported, 1 refuted, 3 undecided." in page.words and "One thing." in page.words
    for word in (HOSTILE[0], HOSTILE[2], HOSTILE[3], visible(HOSTILE[4]), visible(HOSTILE[5])):
        assert word in page.words, word
    assert "slope; the control failed" in page.words and "undefined on these models" in page.words
    assert "too few models: 3, and an interval at 95 % takes 6" in page.words
    assert page.sections == ["verdicts", "chart0"] and page.loads == []
    alone = write(Findings(VERDICTS[:1]), tmp_path / "one.html", title="t", facts={})
    assert "1 claim: 1 supported." in Outline(alone).words and Outline(alone).sections == ["verdicts"]


def unpacked(told: dict[str, Any]) -> np.ndarray:
    """What emformer.report.packing packed, written anew."""
    codes = np.frombuffer(base64.b64decode(told["codes"]), "<u2").astype(float).reshape(told["shape"])
    low, high = float(told["low"]), float(told["high"])
    return np.where(codes == 0, math.nan, low + (codes - 1) * (high - low) / (2**16 - 2))


def test_the_statements_are_told_in_words(file: Path):
    text = file.read_text(encoding="utf-8")
    rows = re.findall(r"<tr class=\"(.*?)\">(.*?)</tr>", text)
    cells = [[re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row)] for _, row in rows]
    assert [kind for kind, _ in rows] == ["held", "not", "held", "told", "undefined"]
    assert [cell[0].split(maxsplit=1) for cell in cells] == [
        ["✓", "held"],
        ["✗", "not held"],
        ["✓", "held"],
        ["·", "told"],
        ["?", "undefined"],
    ]
    assert [cell[3:] for cell in cells] == [
        ["1 (0.12)", "1.062 ± 0.031", "8"],
        ["at most 0.25", "0.75", "12,000"],
        ["at least 0.25", "0.75", "1"],
        ["–", "0.5", "1"],
        ["1", "–", "1"],
    ]
    page = Outline(file)
    assert "5 statements: 2 held, 1 not held, 1 told, 1 undefined." in page.words
    assert HOSTILE[0] in page.words and HOSTILE[2] in page.words and "One thing." in page.words
    assert page.sections == ["statements", "chart0", "chart1", "chart2", "chart3"]


def test_nothing_is_loaded_and_only_our_scripts_run(file: Path):
    page = Outline(file)
    assert page.loads == []
    assert page.policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in page.policy
    code = [name for name in page.scripts if not name.startswith("data-")]
    assert len(code) == 2 and page.policy.count("'sha256-") == 2
    assert set(page.scripts) - set(code) == {f"data-chart{k}" for k in range(4)}


def test_the_numbers_of_the_charts_are_in_the_page(file: Path):
    lines = data(file, "chart0")
    (panel,) = lines["panels"]
    assert [one["theory"] for one in panel["lines"]] == [False, False, False, True]
    for k, one in enumerate(panel["lines"][:3]):
        assert one["x"] == TIMES.tolist() and one["y"] == pytest.approx(2.0 ** -(k + TIMES), rel=1e-4) and "low" not in one
    assert panel["lines"][3]["low"] == [0.125] * 4 and panel["lines"][3]["high"] == [0.5] * 4
    assert [(group["name"], group["shade"], group["theory"]) for group in lines["groups"]] == [
        (f"{HOSTILE[2]} (3 seeds)", 0, False),
        ("theory %{x}", 1, True),
    ]
    cells = data(file, "chart1")
    assert cells["limits"] == [2, 9] and [one["title"] for one in cells["panels"]] == ["d = 2", "d = 3"]
    assert cells["panels"][1]["values"] == [[None, 3, 3, 3], [3, 4, 5, 6], [3, 5, 7, 9]]
    assert "2 of 24 cells undefined." in Outline(file).words
    circle, space = data(file, "chart2"), data(file, "chart3")
    assert circle["times"] == ["0", "1", "2", "3", "4"] and circle["surface"] == "circle" and not circle["solid"]
    where = unpacked(circle["panels"][0]["points"])
    k, t = np.meshgrid(np.arange(3), np.arange(5))
    assert where == pytest.approx(np.stack([np.cos(k + t / 5), np.sin(k + t / 5)], axis=-1), abs=2e-5)
    assert space["solid"] and unpacked(space["panels"][1]["points"]).shape == (5, 3, 3)


def test_seeds_lie_behind_their_mean(tmp_path: Path):
    rows = [("", f"beta 4{seed}", x, float(x), math.nan, math.nan) for seed in (", seed 0", ", seed 1", "") for x in range(3)]
    frame = pd.DataFrame(rows, columns=["panel", "line", "x", "y", "low", "high"])
    told = data(write(outcome(c=Curves(frame, "", "x", "y")), tmp_path / "p.html", title="t", facts={}), "chart0")
    assert [group["name"] for group in told["groups"]] == ["beta 4 (2 seeds)"], "a mean is no seed"
    assert ["seed" in line for line in told["panels"][0]["lines"]] == [True, True, False]


def test_a_point_is_nowhere_before_its_time_and_stays_after_it(tmp_path: Path):
    rows = [("", "whole", 0.0, 0.0, 1.0), ("", "whole", 4.0, 8.0, 1.0), ("", "late", 1.0, 5.0, 2.0), ("", "late", 3.0, 7.0, 2.0)]
    frame = pd.DataFrame(rows, columns=["panel", "path", "time", "x", "y"]).assign(z=math.nan)
    told = data(write(outcome(p=Paths(frame, "", ("x", "y", "z"))), tmp_path / "p.html", title="t", facts={}), "chart0")
    assert told["times"] == ["0", "1", "3", "4"]
    where = unpacked(told["panels"][0]["points"])[..., 0]
    np.testing.assert_allclose(where, [[0, math.nan], [2, 5], [6, 7], [8, 7]], atol=1e-3)


def test_what_is_too_much_is_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(charts, "BUDGET", 60_000)
    own = {"lines": curves(60, 100), "ways": turned(100, 60, "sphere"), "small": curves()}
    file = write(outcome(**own), tmp_path / "page.html", title="t", facts={})
    held = sum(len(text) for name, text in Outline(file).scripts.items() if name.startswith("data-"))
    assert held < 1.1 * 60_000 and file.stat().st_size - held + 1.1 * 950_000 < LIMIT
    words = Outline(file).words
    lines, ways, small = (data(file, f"chart{k}") for k in range(3))
    drawn = lines["panels"][0]["lines"]
    points = len(drawn[0]["x"])
    assert f"Of every line at most {points} of 100 points drawn; {61 - len(drawn)} of 61 lines not drawn." in words
    assert drawn[0]["x"][0] == 0.5 and drawn[0]["x"][-1] == 4, "with its ends"
    shown = unpacked(ways["panels"][0]["points"])
    assert f"{100 - shown.shape[1]:,} of 100 points not drawn; {len(shown)} of 60 moments shown." in words
    assert ways["times"][0] == "0" and ways["times"][-1] == "59" and len(shown) == 40
    assert len(small["panels"][0]["lines"]) == 4, "a small chart gives nothing for a large one"


def test_equal_outcomes_give_equal_pages_and_a_failure_leaves_the_old_one(file: Path, tmp_path: Path):
    first, second = (
        write(outcome(a=curves(), b=turned()), tmp_path / f"{k}.html", title="t", facts={"a": "b"}) for k in range(2)
    )
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(UserError, match="cannot write"):
        write(outcome(), tmp_path / "none" / "page.html", title="t", facts={})
    with pytest.raises(ValueError, match="is empty"):
        write(outcome(a=Heat(heat().frame[:0], "", "x", "y", "v")), first, title="t", facts={})
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def opened(browser: Browser, file: Path) -> Iterator[Opened]:
    found = Opened(browser, file)
    yield found
    found.page.close()


def test_every_chart_is_drawn_in_the_browser(opened: Opened):
    assert opened.all_drawn() == [f"chart{k}" for k in range(4)]
    page = opened.page
    kinds = [
        json.loads(page.evaluate(f"JSON.stringify(document.getElementById('chart{k}-panel0')._fullData.map(t => t.type))"))
        for k in range(4)
    ]
    assert kinds[0] == ["scatter"] * 5 and kinds[1] == ["heatmap"]  # a band beside four lines
    assert kinds[2] == ["scatter"] * 3 and kinds[3] == ["mesh3d"] + ["scatter3d"] * 3  # surface, ways, points
    assert page.evaluate("document.getElementById('chart0-panel0')._fullLayout.yaxis.type") == "log"
    dashes = page.evaluate("document.getElementById('chart0-panel0')._fullData.map(t => t.line.dash).join()")
    assert dashes.split(",")[-1] == "dash" and dashes.split(",")[:3] == ["solid"] * 3
    np.testing.assert_allclose(opened.drawn("chart1-panel0", "y"), [-0.5, 0.5, 1.5, 2.5], atol=1e-12)  # of log10, by cell
    page.evaluate("Plotly.Fx.hover('chart0-panel0', [{curveNumber: 0, pointNumber: 1}])")
    opened.until("document.querySelector('#chart0 .hoverlayer').textContent.includes('0.5')")
    label = page.evaluate("document.querySelector('#chart0 .hoverlayer').textContent")
    assert visible(f"{HOSTILE[2]}, seed 0") in label and HOSTILE[7] in label and "%{y}" in label, "text is text"
    assert page.evaluate("typeof hacked") == "undefined" and page.locator("img, iframe, object").count() == 0
    assert opened.said == [] and opened.asked == [opened.address]


def test_the_legend_switches_lines_by_the_keyboard(opened: Opened):
    opened.near("chart0")
    first = opened.page.locator("#chart0 .legend button").first
    assert first.inner_text().endswith("(3 seeds)")
    seen = "document.getElementById('chart0-panel0')._fullData.map(t => t.visible).join()"
    first.focus()
    opened.page.keyboard.press("Enter")
    opened.until(f"{seen} === 'false,false,false,true,true'")
    assert first.get_attribute("aria-pressed") == "false"
    opened.page.keyboard.press("Space")
    opened.until(f"{seen} === 'true,true,true,true,true'")
    assert opened.said == []


@pytest.mark.parametrize(("chart", "trace", "axes"), [("chart2", 2, "xy"), ("chart3", 3, "xyz")], ids=["plane", "space"])
def test_play_moves_the_points(opened: Opened, chart: str, trace: int, axes: str):
    opened.near(chart)
    page, plot = opened.page, f"{chart}-panel0"
    spots = (
        f"[...document.querySelectorAll('#{plot} .trace:last-child .points path')].map(p => p.getAttribute('transform')).join()"
    )
    began, start = page.evaluate(spots), np.stack([opened.drawn(plot, axis, trace) for axis in axes])
    page.locator(f"#{chart} .controls button").click()
    opened.until(f"document.querySelector('#{chart} output').textContent.startsWith('4 ')")
    goal = unpacked(data(Path(opened.address.removeprefix("file://")), chart)["panels"][0]["points"])
    opened.until(f"Math.abs(document.getElementById('{plot}')._fullData[{trace}].y[0] - {goal[-1, 0, 1]}) < 1e-9")
    end = np.stack([opened.drawn(plot, axis, trace) for axis in axes])
    np.testing.assert_allclose(start, goal[0].T, atol=1e-9)
    np.testing.assert_allclose(end, goal[-1].T, atol=1e-9)
    if axes == "xy":
        now = page.evaluate(spots)
        shown = [
            np.array([[float(x) for x in one.split(",")] for one in re.findall(r"translate\((.*?)\)", text)])
            for text in (began, now)
        ]
        assert np.corrcoef(shown[1][:, 0], goal[-1][:, 0])[0, 1] > 0.9999 and not np.allclose(shown[0], shown[1])
    opened.until(f"document.querySelector('#{chart} .controls button').textContent.includes('play')")  # it stopped at the end
    if axes == "xyz":
        opened.choose(chart, "panel", "1")
        opened.choose(chart, "ways", "0")
        opened.until(f"document.getElementById('{plot}')._fullData.length === 3")
    assert opened.said == []


def test_a_narrow_window_shows_all_without_scrolling_sideways(opened: Opened):
    opened.all_drawn()
    opened.page.set_viewport_size({"width": 390, "height": 800})
    wide = "[...document.querySelectorAll('.plot, .main-svg')].filter(p => p.getBoundingClientRect().right > 391).length"
    opened.until(f"document.documentElement.scrollWidth <= 390 && {wide} === 0")
    assert opened.said == []
