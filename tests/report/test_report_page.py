"""What stands in a report: everything that a folder holds, what is missing and why, within its size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import HOSTILE, STATES, recorded

from emformer.figures.scene import Scene
from emformer.observables import Row
from emformer.observables.frame import catalogue, frame
from emformer.parts import UserError
from emformer.recordings import read_records
from emformer.records import Run
from emformer.report import page as paging
from emformer.report import write
from emformer.report.page import page
from emformer.report.scenes import sections as scene_sections
from emformer.report.series import gathered
from emformer.report.series import sections as record_sections

LIMIT = 6_000_000  # bytes of a page
DRAWN = {"cloud", "paths", "cosines", "merges", "attention", "sinks", "spectra", "lens"}


class Outline(HTMLParser):
    """The ids of a page's sections, its text, its scripts, and every attribute that may load something."""

    def __init__(self, path: Path):
        super().__init__()
        self.sections: list[str] = []
        self.text: list[str] = []
        self.scripts: dict[str, str] = {}
        self.loads: list[str] = []
        self.policy = ""
        self._script = self._style = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self._style = tag == "style"
        self._script = (own.get("id") or f"code {len(self.scripts)}") if tag == "script" else ""
        if tag == "section":
            self.sections.append(own["id"] or "")
        if tag == "meta" and own.get("http-equiv") == "Content-Security-Policy":
            self.policy = own["content"] or ""
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "srcset", "data", "action")]
        self.loads += [f"{tag} {value}" for name, value in attrs if name == "href" and not (value or "").startswith("#")]

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif not self._style:
            self.text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._script = self._style = ""

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def data(path: Path, name: str) -> Any:
    return json.loads(Outline(path).scripts[f"data-{name}"])


def test_a_run_shows_everything_there_is_of_it(run: Path, tmp_path: Path):
    path = write(run, tmp_path / "report.html")
    outline = Outline(path)
    assert set(outline.sections) == DRAWN | {"loss", "breathing", "motion", "explorer", "numbers", "glossary"}
    assert path.stat().st_size <= LIMIT and outline.loads == []
    for words in (
        "2 layers of 2 heads in E = R^16",
        "LowRank(rank=16)",
        "RoPE",
        "4 of 4",
        "nats per token",
        "torch 2.",
        "Python 3.",
    ):
        assert words in outline.words, words
    parameters = json.loads(Run(run).environment.read_text())["parameters"]
    assert f"{parameters:,}" in outline.words
    curves = {one["kind"]: one for one in data(path, "loss")["curves"]}
    goal = Run(run).curve("val_loss")
    assert curves["validation"]["steps"] == list(goal)
    assert curves["validation"]["loss"] == pytest.approx(list(goal.values()), rel=1e-4)
    cloud = data(path, "cloud")
    assert len(cloud["words"]) == 8 and len(cloud["words"][0]) == 16 and len(cloud["states"]) == 5


def test_the_probe_that_is_drawn_is_the_recorders(run: Path, tmp_path: Path):
    """Its first prompts, as text: the validation part holds them."""
    text = (run.parent / "text.txt").read_bytes()
    words = data(write(run, tmp_path / "report.html"), "cloud")["words"]
    seen = "".join(words[0])
    plain = text.decode().replace("\n", "↵").replace("\u202e", "⟨U+202E⟩")
    ascii_parts = [part for part in re.split(r"[^ -~]+", seen) if len(part) > 6]
    assert ascii_parts and all(part in plain for part in ascii_parts)


def test_default_places(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert write(copy) == Run(copy).report and Run(copy).report.exists()
    assert not [path for path in copy.iterdir() if path.name.startswith(".")], "nothing half is left"
    first = Run(copy).report.read_bytes()
    assert write(copy).read_bytes() == first, "equal folders give equal bytes"
    monkeypatch.chdir(tmp_path)
    assert write([copy, run]) == Path("report.html")


@pytest.mark.parametrize(
    ("lost", "said", "without"),
    [
        (["checkpoints"], "Nothing is drawn of the model: .* has no checkpoint", DRAWN),
        (
            ["records.jsonl", "records.parquet"],
            "Nothing recorded is shown: .* has no records",
            {"breathing", "motion", "numbers"},
        ),
        (["metrics.jsonl"], "The loss is not shown", {"loss"}),
        (["environment.json"], "", set()),
        (["tokenizer.json"], "", set()),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_shown(run: Path, tmp_path: Path, lost: list[str], said: str, without: set[str]):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for name in lost:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    outline = Outline(write(copy))
    assert re.search(said, outline.words)
    whole = DRAWN | {"loss", "breathing", "motion", "numbers"}
    assert whole & set(outline.sections) == whole - without


def test_a_text_that_is_gone_is_said(run: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = Run(copy).config
    config.write_text(
        config.read_text().replace(str(run.parent / "text.txt"), "gone.txt").replace(str(run.parent / "cache"), "c")
    )
    outline = Outline(write(copy))
    assert "Nothing is drawn of the model: " in outline.words and "gone.txt" in outline.words
    assert not DRAWN & set(outline.sections) and "numbers" in outline.sections


def test_a_damaged_scene_or_checkpoint_is_said(analysis: Path, run: Path, tmp_path: Path):
    for source, name in ((analysis, "scene.safetensors"), (run, "checkpoints/last.ckpt")):
        copy = tmp_path / source.name
        shutil.copytree(source, copy)
        (copy / name).write_bytes((copy / name).read_bytes()[:500])
        outline = Outline(write(copy))
        assert "Nothing is drawn of the model: " in outline.words and "numbers" in outline.sections


def test_an_analysis_is_shown(analysis: Path, scene: Scene, tmp_path: Path):
    path = write(analysis, tmp_path / "report.html")
    outline = Outline(path)
    assert set(outline.sections) >= DRAWN and "loss" not in outline.sections
    for words in ("model of<script>hacked=1</script>", "data<img src=x onerror=hacked=1>", "tokens4,800", "checkpoints0, 100"):
        assert words in outline.words, words
    assert data(path, "cloud")["words"][0][0] == scene.words[0][0].replace("\x00", "␀").replace("\n", "↵")
    told = data(path, "explorer")
    keys = {one["key"] for one in told["series"]}
    assert {"flow.w2", "breath.sawtooth", HOSTILE[2]} <= keys and "attn.sink_rate" not in keys  # of single heads only
    table = re.search(r'<section id="numbers">.*?</section>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert table is not None and "attn.sink_rate" in table[0], "the table has every key"
    assert table[0].count("<tr>") == 1 + read_records(analysis)["key"].nunique()


def test_only_the_two_scripts_may_run(analysis: Path, tmp_path: Path):
    outline = Outline(write(analysis, tmp_path / "report.html"))
    code = [text for name, text in outline.scripts.items() if name.startswith("code ")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    assert len(code) == 2
    rules = dict(rule.strip().split(" ", 1) for rule in outline.policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["script-src"].split() == [f"'sha256-{one}'" for one in hashes]
    assert not {"connect-src", "font-src", "frame-src"} & rules.keys() and "http" not in outline.policy
    assert outline.loads == []


def big(scene: Scene) -> Scene:
    """A scene of GPT-2's shape: 25 states, 12 layers of 12 heads, 64 tokens, as large as `stage` makes any."""
    rng = np.random.default_rng(0)
    depth, heads, tokens, prompts, compared, rank = 12, 12, 64, 8, 96, 64
    states = [(0, "embed"), *((k, point) for k in range(depth) for point in ("attn", "ffn"))]
    count = len(states)
    words = [[f" token{rng.integers(10**6)}" for _ in range(tokens)] for _ in range(prompts)]
    spectra = (rng.normal(size=(depth, heads, rank)) + 1j * rng.normal(size=(depth, heads, rank))).astype(np.complex64)
    pairs = np.stack(np.divmod(np.arange(compared), tokens), -1)
    return replace(
        scene,
        words=words,
        ids=rng.integers(0, 50257, (prompts, tokens)),
        classes=None,
        states=states,
        coords=rng.normal(size=(count, prompts, tokens, 3)).astype(np.float32),
        clusters=rng.integers(0, 8, (count, prompts, tokens)),
        order=np.arange(compared),
        cosine_tokens=pairs,
        cosines=rng.uniform(-1, 1, (count, compared, compared)).astype(np.float32),
        merges=rng.integers(0, compared, (count, compared)),
        steps=[(k, "attn") for k in range(depth)],
        pattern=rng.uniform(size=(depth, heads, tokens, tokens)).astype(np.float16),
        scores=rng.normal(size=(depth, heads, tokens, tokens)).astype(np.float16),
        beta=np.ones(depth),
        leaf_axis=rng.normal(size=(depth, tokens)).astype(np.float32),
        tilt=rng.uniform(size=(depth, heads, 12)).astype(np.float32),
        tilt_offsets=-np.arange(1, 13),
        spectra_form=spectra,
        spectra_content=spectra,
        sinks=rng.uniform(size=(depth, heads)),
        lens_words=[[[f" word{rng.integers(10**6)}" for _ in range(5)] for _ in range(tokens)] for _ in states],
        lens_prob=rng.uniform(size=(count, tokens, 5)).astype(np.float32),
        lens_entropy=rng.uniform(size=(count, tokens)).astype(np.float32),
    )


def test_a_page_stays_within_its_size(scene: Scene):
    """GPT-2's shape with 200 keys at 40 training steps and all 25 states, far more than any run records."""
    rng = np.random.default_rng(0)
    rows = [
        (step, Row(k, "attn", f"family{key % 9}.key_{key}", *rng.normal(size=3), 64, 0, rng.normal(), 0.1))
        for key in range(200)
        for step in range(40)
        for k in range(25)
    ]
    records = frame(rows)
    records.insert(0, "run", pd.array(["run"] * len(records), dtype="string"))
    sections = [*scene_sections(big(scene)), *record_sections(records, {})]
    told = page("big", "", [], sections, {})
    size = len(told.encode())
    assert 5_200_000 < size <= LIMIT, size
    for name, section in ((one.name, one) for one in sections):
        left_out = {"cosines": "states are left out", "attention": "Shown for the size", "spectra": "for the size"}.get(name, "")
        assert left_out in section.caption, name


def test_thinning_keeps_the_first_and_the_last_step(monkeypatch: pytest.MonkeyPatch, analysis: Path):
    from emformer.report import series

    records = read_records(analysis)
    whole = {(one["key"], one["cloud"]): one for one in gathered(records)}
    monkeypatch.setattr(series, "NUMBERS", 1)
    for one in gathered(records):
        full = whole[one["key"], one["cloud"]]
        assert one["steps"] == [full["steps"][0], full["steps"][-1]]
        np.testing.assert_array_equal(one["mean"], full["mean"][[0, -1]])


def test_series_hold_what_was_recorded(analysis: Path):
    found = {(one["key"], one["cloud"]): one for one in gathered(read_records(analysis))}
    one = found["flow.w2", "raw"]
    assert one["places"] == ["0a", "0f", "1a", "1f"] and one["steps"] == [0, 1, 10, 100] and one["n"] == [64, 64]
    assert one["mean"].tolist() == [[2.0 * (step + 10 * k) for k in range(1, len(STATES))] for step in (0, 1, 10, 100)]
    assert (one["se"] == 0.125).all() and (one["null"] == 1).all()
    assert found["breath.sawtooth", "raw"]["places"] == ["all"] and np.isnan(found["breath.sawtooth", "raw"]["se"]).all()


def test_several_are_compared(tmp_path: Path):
    folders = [recorded(tmp_path / name, shift) for name, shift in (("a", 0.0), ("b", 1.0), ("<i>c", 0.0))]
    path = write(folders, tmp_path / "all.html")
    outline = Outline(path)
    assert outline.sections == ["forest", "numbers", "glossary"] and outline.loads == []
    told = data(path, "forest")
    assert told["base"] == "a" and told["runs"] == ["b", "<i>c"]
    row = next(one for one in told["rows"] if one["key"] == "flow.speed_rel" and one["at"] == "layer 1 ffn" and one["run"] == 0)
    half = 1.979 * 0.125 * 2**0.5  # t at 126 degrees of freedom
    assert (row["difference"], row["high"] - row["low"]) == pytest.approx((1, 2 * half), rel=1e-3) and row["q"] < 1e-4
    same = [one for one in told["rows"] if one["run"] == 1]
    assert same and all(one["difference"] == 0 for one in same)
    assert "/a " not in outline.words, "runs have their short names"


def test_without_plotly_it_says_what_to_install(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paging, "get_plotlyjs", None)
    with pytest.raises(UserError, match=re.escape("pip install 'emformer[report]'")):
        write(run, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_reported_is_refused(run: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for source, words in (
        (tmp_path / "empty", "is no folder of a run"),
        (tmp_path / "none", "does not exist"),
        ([], "at least one"),
    ):
        with pytest.raises(UserError, match=words):
            write(source, tmp_path / "x.html")
    with pytest.raises(UserError, match=r"name it \.html"):
        write(run, tmp_path / "report.txt")
    with pytest.raises(UserError, match="nowhere does not exist; make it"):
        write(run, tmp_path / "nowhere" / "report.html")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write(run, tmp_path / "taken.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "taken.html"]


def test_every_key_of_the_catalogue_can_be_explained():
    """The glossary has a definition of all that observables may record."""
    from emformer.report.glossary import anchors, glossary

    known = catalogue()
    ids = anchors([*known, "foreign.<b>", "flow.speed.undefined"])
    told = glossary(known, ids).before
    assert told.count("<dt ") == len(ids) == len(set(ids.values()))
    assert "foreign.&lt;b&gt;" in told and "share of tokens for which flow.speed is undefined" in told
    assert told.count("recorded by an observable that is not loaded here") == 1
