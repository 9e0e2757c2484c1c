"""`emformer analyze` on the command line: what it prints and writes, and its mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest


def test_it_prints_what_it_measured_and_where_it_is(emformer, run: Path, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    words = ["analyze", run, "--text", text, "--out", out, "--observables", "flow,signal", "--tokens", "400", "--seed", "3"]
    found = emformer(*words, "--length", "8", "--batch", "9", "--device", "cpu", "--no-report")
    assert found.code == 0 and not found.err, found.err
    assert re.search(r"^flow\.speed +1 +0 ", found.out, re.MULTILINE) and "signal.norm" in found.out
    assert found.out.splitlines()[0].startswith(f"{out}: ")
    assert found.out.splitlines()[-1] == f"wrote {out}/records.jsonl, {out}/records.parquet, {out}/figures"
    asked = json.loads((out / "analysis.json").read_text())["request"]
    assert {name: asked[name] for name in ("tokens", "length", "batch", "seed", "device")} == {
        "tokens": 400,
        "length": 8,
        "batch": 9,
        "seed": 3,
        "device": "cpu",
    }
    # the same again is done already; something else is refused, until it may take the place
    assert emformer(*words, "--length", "8", "--batch", "9", "--device", "cpu", "--no-report").out == found.out
    emformer(*words, "--length", "4", "--batch", "9").refused("length 8, not 4", "--overwrite")
    other = emformer(*words, "--length", "4", "--checkpoints", "1,2", "--overwrite")
    assert other.code == 0 and f"{out}/report.html" in other.out and "at 2 steps, 1 to 2" in other.out
    listed = emformer("records", out, "--key", "flow.speed")
    assert listed.code == 0 and "layer 0 attn" in listed.out


def test_without_a_text_it_takes_the_runs_own_and_names_the_folder(
    emformer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    found = emformer("analyze", run, "--observables", "signal", "--no-report")
    assert found.code == 0 and (tmp_path / "analyses" / run.name / "records.jsonl").exists(), found
    found = emformer("analyze", run / "checkpoints" / "last.ckpt", "--corpus", "PythonDocs", "--tokens", "99", "--length", "9",
                     "--observables", "signal", "--no-report")  # fmt: skip
    assert found.code == 0 and (tmp_path / "analyses" / f"{run.name}-last-PythonDocs").is_dir(), found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--observables", "flwo"], ["flwo", "flow"]),
        (["--corpus", "Gramar"], ["Gramar", "Grammar"]),
        (["--text", "nowhere.txt"], ["nowhere.txt"]),
        (["--checkpoints", "77"], ["77", "last"]),
        (["--tokens", "3"], ["--tokens 3", "16"]),
        (["--tokens", "0"], ["--tokens"]),
        (["--device", "tpu"], ["tpu"]),
        (["--lenght", "8"], ["--lenght", "--length"]),
        (["--which", "best"], ["--which"]),
    ],
    ids=" ".join,
)
def test_mistakes(emformer, run: Path, tmp_path: Path, words: list[str], told: list[str]):
    emformer("analyze", run, "--out", tmp_path / "out", *words).refused(*told)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there(emformer, tmp_path: Path):
    emformer("analyze", tmp_path / "nowhere", "--out", tmp_path / "out").refused("nowhere")
    emformer("analyze").refused("RUN")
    assert not (tmp_path / "out").exists()
