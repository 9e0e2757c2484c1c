"""`emformer compare` and `emformer report`: what they print, write and refuse."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from emformer.observables import Row
from emformer.recordings import Recordings


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of records: of the second all means lie 0.5 higher, and a row is missing."""
    for name, shift in (("one", 0.0), ("two", 0.5)):
        (tmp_path / name).mkdir()
        writer = Recordings(tmp_path / name / "records.jsonl", -1)
        for step in (0, 20):
            rows = [Row(k, "ffn", "flow.speed_rel", k + shift, 0.1, 0.0125, 64) for k in (0, 1)]
            rows += [Row(1, "attn", "clu.silhouette", shift, None, 0.4, 64), Row(1, "attn", "clu.ari_next", shift, n_valid=64)]
            writer.append(step, rows + ([] if shift else [Row(2, "ffn", "flow.speed_rel", 3.0, 0.1, 0.0125, 64)]))
        writer.close()
    return tmp_path / "one", tmp_path / "two"


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def test_runs_stand_side_by_side(emformer, pair: tuple[Path, Path]):
    found = emformer("compare", *pair)
    assert found.code == 0 and not found.err
    lines = [cells(line) for line in found.out.splitlines()]
    assert lines[0] == ["key", "at", str(pair[0]), str(pair[1]), "difference", "95 %"]
    assert lines[1] == ["flow.speed_rel", "layer 1 ffn", "1", "1.5", "+0.5", "[0.47, 0.53]", "*"]
    assert lines[2] == ["clu.silhouette", "layer 1 attn", "0", "0.5", "+0.5", "[-0.61, 1.6]"]
    assert lines[3] == ["clu.ari_next", "layer 1 attn", "0", "0.5", "+0.5"]
    for words in ("4 differences to", "2 of 3 tested", "1 have no interval", f"1 rows are in {pair[0]} and not in {pair[1]}"):
        assert words in found.out, words


def test_keys_families_and_steps_are_chosen(emformer, pair: tuple[Path, Path], tmp_path: Path):
    found = emformer("compare", *pair, "--key", "flow.speed_rel", "--step", "0", "--csv", tmp_path / "out.csv")
    assert found.code == 0 and found.out.startswith("|D|/|x|") and "clu." not in found.out
    assert len([line for line in found.out.splitlines() if line.startswith("flow.speed_rel")]) == 3
    assert found.out.endswith(f"wrote {tmp_path / 'out.csv'}\n")
    csv = pd.read_csv(tmp_path / "out.csv")
    assert set(csv["step"]) == {0} and csv["difference"].dropna().tolist() == [0.5, 0.5]
    family = emformer("compare", *pair, "--family", "clustering").out
    assert "clu.silhouette" in family and "flow." not in family


def test_mistakes_get_one_sentence(emformer, pair: tuple[Path, Path], tmp_path: Path):
    emformer("compare", pair[0]).refused("at least two runs")
    emformer("compare", *pair, "--step", "7").refused("no records of step 7", "0, 20")
    emformer("compare", *pair, "--key", "flow.sped_rel").refused("did you mean 'flow.speed_rel'?")
    emformer("compare", pair[0], tmp_path / "none").refused("does not exist")
    emformer("compare", *pair, "--csv", pair[1] / "records.jsonl").refused("name it .csv")
    emformer("compare", *pair, "--stp", "7").refused("did you mean --step?")
    emformer("report", tmp_path / "none").refused("does not exist", "runs/default")
    emformer("report", tmp_path).refused("is no folder of a run")
    emformer("report", pair[0] / "records.jsonl").refused("is no folder of a run")
    emformer("report", pair[0], "--out", tmp_path / "report.pdf").refused("name it .html")


def test_reports_are_written(emformer, pair: tuple[Path, Path], run: Path, tmp_path: Path):
    """Of records alone, of a run whose model is drawn, and of a comparison, by either command."""
    found = emformer("report", pair[0])
    assert found.code == 0 and found.out == f"wrote {pair[0] / 'report.html'}\n"
    assert "nothing is known of the model" in (pair[0] / "report.html").read_text(encoding="utf-8")
    found = emformer("report", run, "--out", tmp_path / "run.html")
    assert found.code == 0 and 'id="cloud"' in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert emformer("report", *pair, "--out", tmp_path / "both.html").code == 0
    found = emformer("compare", *pair, "--report", tmp_path / "same.html")
    assert found.code == 0 and found.out.endswith(f"wrote {tmp_path / 'same.html'}\n")
    assert (tmp_path / "same.html").read_bytes() == (tmp_path / "both.html").read_bytes()
    assert 'id="forest"' in (tmp_path / "both.html").read_text(encoding="utf-8")
