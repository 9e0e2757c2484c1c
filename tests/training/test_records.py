"""Records: no row is lost or written twice, whatever kills or cuts; Parquet, JSONL and the frame say the same."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import emformer
from emformer import recordings
from emformer.listing import by_layer, overview, select
from emformer.observables import COLUMNS, Row
from emformer.observables.frame import DTYPES, Key, frame
from emformer.parts import UserError
from emformer.recordings import Recordings, read_records, write_parquet
from emformer.records import Journal, Run, read_journal

SCHEMA = list(COLUMNS)


def rows(step: int, count: int = 3) -> list[Row]:
    """Rows of a step, no two alike, with everything that may be undefined, and numbers that are hard to write."""
    rng = random.Random(step)
    numbers = [rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300), 0.1 + 0.2, 5e-324, -0.0, 1e22, 2.0]
    return [
        Row(
            k if k % 3 else None,
            "attn" if k % 3 else None,
            f"test.κ{k}",
            rng.choice(numbers) if k % 4 != 3 else None,
            rng.random() if k % 2 else None,
            rng.random(),
            rng.randint(0, 99),
            k,
            head=k if k % 2 else None,
            param="k=4" if k % 2 else None,
            null=0.5 if k % 2 else None,
        )
        for k in range(count)
    ]


def record(path: Path, *steps: int, after: int = -1, count: int = 3) -> Path:
    path.mkdir(exist_ok=True)
    writer = Recordings(Run(path).records, after)
    for step in steps:
        writer.append(step, rows(step, count))
    writer.close()
    return path


def expected(*steps: int, run: str | Path, count: int = 3) -> pd.DataFrame:
    found = frame((step, row) for step in steps for row in rows(step, count))
    found.insert(0, "run", pd.array([str(run)] * len(found), dtype="string"))
    return found


def same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path):
    run = record(tmp_path / "run", 0, 5, 17, count=40)
    found = read_records(run)
    same(found, expected(0, 5, 17, run=run, count=40))
    assert found.columns.tolist() == ["run", *SCHEMA] and dict(found.dtypes.astype(str))["run"] == "string"
    assert {name: str(found[name].dtype) for name in SCHEMA} == dict(DTYPES)
    assert emformer.read_records is read_records
    same(read_records(str(Run(run).records)), found)


def test_lines_are_strict_json_with_every_column_in_order(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    odd = [
        Row(
            np.int64(1),
            "ffn",
            "test.a",
            math.nan,
            math.inf,
            -math.inf,
            np.int64(3),
            null=np.float32("nan"),
            null_sd=np.float64(0.5),
        ),
        Row(2, "ffn", "test.b", torch.tensor(0.25), torch.tensor(math.inf), np.float32(0.5), int(torch.tensor(4)), head=0),
    ]
    writer = Recordings(path, -1)
    for k, row in enumerate(odd):
        writer.append(3, [row])
        assert len(path.read_bytes().splitlines()) == k + 1  # at once

    def refuse(word: str) -> None:
        raise AssertionError(word)

    one, two = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert list(one) == list(two) == SCHEMA
    assert list(one.values()) == [3, 1, "ffn", None, "test.a", "raw", None, None, None, None, 3, 0, None, 0.5]
    assert list(two.values()) == [3, 2, "ffn", 0, "test.b", "raw", None, 0.25, None, 0.5, 4, 0, None, None]
    with pytest.raises(TypeError):
        writer.append(4, [Row(1, "ffn", "test.a", 0.0, n_valid=2.5)])  # type: ignore[arg-type]
    assert len(read_records(path)) == 2


def test_killed_at_any_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever a kill leaves of the last step, its rows are read whole or not; who resumes before it ends as if never killed."""
    monkeypatch.setattr(recordings, "read_journal", None)  # the slow way, for damage that no kill does
    run = record(tmp_path / "run", 0, 2, 4, count=2)
    path, other = Run(run).records, tmp_path / "other.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    complete = expected(0, 2, 4, run=other, count=2)
    other.write_bytes(whole)
    for size in range(len(whole), len(whole) - len(b"".join(lines[-2:])) - 1, -1):
        os.truncate(other, size)
        there = whole[:size].count(b"\n")
        if size % 7 == 0 or b"\n" in whole[size - 1 : size + 1]:
            same(read_records(other), complete.iloc[:there])
            Journal(other).close()  # as a run that has the checkpoint of step 4
            assert other.read_bytes() == b"".join(lines[:there])
            other.write_bytes(whole[:size])
        writer = Recordings(other, 2)
        assert other.read_bytes() == b"".join(lines[:4])
        writer.append(4, rows(4, 2))
        writer.close()
        assert other.read_bytes() == whole


def test_a_resumed_run_cuts_what_it_writes_again(tmp_path: Path):
    for resumed in (-1, 0, 1, 3, 4, 9):
        run = record(tmp_path / str(resumed), 0, 1, 4, 8)
        with open(Run(run).records, "ab") as file:
            file.write(b'{"step": 0, "torn')
        Recordings(Run(run).records, resumed).close()
        same(read_records(run), expected(*(step for step in (0, 1, 4, 8) if step <= resumed), run=run))
        record(run, *(step for step in (0, 1, 4, 8) if step > resumed), after=resumed)
        same(read_records(run), expected(0, 1, 4, 8, run=run))


def test_a_damaged_line_costs_itself_alone(tmp_path: Path):
    """Not what a kill leaves: a disk or an editor. Rows behind it are never cut, and nobody reads over it in silence."""
    for damage in (b"####\n", b"\n", b"[1]\n", b"\x00" * 9 + b"\n", b'{"step": "x"}\n', b'{"step": 1}{"step": 1}\n', b"\xff\n"):
        run = record(tmp_path / "run", 0, 1, 2, 3)
        path = Run(run).records
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:4], damage, *lines[5:]]))
        wanted = expected(0, 1, 2, 3, run=run).drop(index=4).reset_index(drop=True)
        with pytest.warns(UserWarning, match=r"records\.jsonl: line 5 is damaged and left out") as told:
            same(read_records(run), wanted)
        assert len(told) == 1
        Journal(path, 2).close()
        assert path.read_bytes() == b"".join([*lines[:4], damage, *lines[5:9]])
        Journal(path, 0).close()
        assert path.read_bytes() == b"".join(lines[:3])


def test_later_rows_are_cut_wherever_they_stand(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    steps = [0, 7, 1, 1, 9, 8, 2, None, 7]
    path.write_text("".join(json.dumps({"step": step, "k": k}) + "\n" for k, step in enumerate(steps)) + '{"k": 9}\n{"k": 1')
    Journal(path, 2).close()
    assert [row["k"] for row in read_journal(path)] == [0, 2, 3, 6, 7, 9]  # without a step: of step 0
    assert [file.name for file in tmp_path.iterdir()] == ["records.jsonl"]
    Journal(path, -1).close()
    assert path.read_bytes() == b""


def test_a_disk_that_takes_half_a_row_has_none_of_it(tmp_path: Path):
    """A write that meets the end of the disk is short, without an error; the next row must not be glued to what it left."""
    run = record(tmp_path / "run", 0, 1)
    path = Run(run).records
    whole = path.read_bytes()
    writer = Recordings(path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, hard))
        with pytest.raises(UserError, match=r"cannot write .*records\.jsonl: .*--resume"):
            writer.append(2, rows(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
    writer.append(2, rows(2))
    same(read_records(run), expected(0, 1, 2, run=run))


def test_it_is_read_while_it_is_written(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    steps, done = range(60), threading.Event()
    writer = Recordings(Run(run).records, -1)

    def write() -> None:
        for step in steps:
            writer.append(step, rows(step, 20))
        done.set()

    complete = expected(*steps, run=run, count=20)
    thread, sizes = threading.Thread(target=write), []
    thread.start()
    while not done.is_set():
        found = read_records(run)
        sizes.append(len(found))
        same(found, complete.iloc[: len(found)])
    thread.join()
    assert sizes == sorted(sizes)
    same(read_records(run), complete)


def test_parquet_says_the_same(tmp_path: Path):
    for count in (0, 3, 40):
        run = record(tmp_path / str(count), 0, 5, count=count)
        assert write_parquet(run) == Run(run).parquet == write_parquet(str(run))  # again: replaced
        wanted = expected(0, 5, run=run, count=count)
        same(pd.read_parquet(Run(run).parquet), wanted[SCHEMA])
        same(read_records(Run(run).parquet), wanted)
        Run(run).records.unlink()  # kept without its truth, it is read
        same(read_records(run), wanted)
    with pytest.raises(UserError, match="no records; train with callbacks"):
        write_parquet(tmp_path / "0")


def test_a_parquet_that_cannot_be_written_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = record(tmp_path / "run", 0)
    write_parquet(run)
    old = Run(run).parquet.read_bytes()

    def full(self: pd.DataFrame, path: Path, **_) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(UserError, match=r"records\.parquet: the disk is full"):
        write_parquet(run)
    assert Run(run).parquet.read_bytes() == old and sorted(path.name for path in run.iterdir()) == [
        "records.jsonl",
        "records.parquet",
    ]


def test_many_runs_are_one_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    a, b = record(Path("runs/a"), 0, 1), record(Path("runs/b"), 0, 1, 2)
    wanted = pd.concat([expected(0, 1, run="runs/a"), expected(0, 1, 2, run="runs/b")], ignore_index=True)
    Path("runs/notes.txt").write_text("no run")
    write_parquet(b)
    for source in ("runs/*", Path("runs/*"), ["runs/a", "runs/b"], [a, "runs/*"], "runs/*/records.*", ["runs/a", "runs/*", a]):
        same(read_records(source), wanted)
    same(read_records(["runs/b", a]), pd.concat([wanted[6:], wanted[:6]], ignore_index=True))
    same(read_records("runs/[b]"), wanted[6:].reset_index(drop=True))
    record(Path("runs/[b]"), 4)
    same(read_records("runs/[b]"), expected(4, run="runs/[b]"))  # what exists is no glob
    bare = Run("runs/c")
    bare.path.mkdir()
    with warnings.catch_warnings():  # a folder that is no run is no news
        warnings.simplefilter("error")
        assert read_records("runs/*")["run"].unique().tolist() == ["runs/[b]", "runs/a", "runs/b"]
    bare.config.write_text("{model: {}, data: {}, training: {}}")
    with pytest.warns(UserWarning, match="without records, and left out: runs/c"):
        read_records("runs/*")


def test_records_that_are_not_there(tmp_path: Path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "note.txt").write_text("x")
    for source, told in (
        ("nowhere", r"nowhere does not exist; give a run folder"),
        ("no*", r"no\* does not exist|no\* has no records"),
        ("hollow", "hollow has no records; train with callbacks"),
        ("hol*", r"hol\* has no records; train with callbacks"),
        ("note.txt", r"note\.txt is no file of records"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            read_records(tmp_path / source)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no records are named"):
        read_records([])
    (tmp_path / "bad.parquet").write_text("PAR1")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read"):
        read_records(tmp_path / "bad.parquet")
    (tmp_path / "bad.jsonl").write_text('{"step": 1, "mean": "much"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl holds something other than records"):
        read_records(tmp_path / "bad.jsonl")
    (tmp_path / "begun.jsonl").write_text("")
    assert len(read_records(tmp_path / "begun.jsonl")) == 0


def test_what_a_run_writes_it_removes(tmp_path: Path):
    run = Run(record(tmp_path / "run", 0))
    write_parquet(run.path)
    run.report.write_text("x")
    run.figures.mkdir()
    (run.figures / "flow.png").write_bytes(b"x")
    (run.path / "mine.txt").write_text("mine")
    run.remove()
    assert [path.name for path in run.path.iterdir()] == ["mine.txt"]


def test_listings_choose_by_family_and_fit_the_screen(tmp_path: Path):
    known = {"attn.rate": Key("sinks", "share of heads, in [0, 1], null 0"), "flow.w2": Key("flow", "W2")}
    keys = ["attn.rate", "attn.rate.undefined", "sinks.other", "attn.range", "flow.w2"]
    writer = Recordings(tmp_path / "records.jsonl", -1)
    assert overview(read_records(tmp_path), known) == by_layer(read_records(tmp_path), known) == "no rows yet"
    numbers = [999.4, 999.6, 0.00012345, 1e12, -12345.678]
    writer.append(3, [Row(layer, "attn", key, mean) for layer in (1, 0) for key, mean in zip(keys, numbers, strict=True)])
    records = read_records(tmp_path)
    for families, wanted, chosen in (
        (["sinks"], [], keys[:3]),
        (["attn"], [], [*keys[:2], keys[3]]),
        (["flow"], ["sinks.other"], [keys[2], keys[4]]),
        ([], [], keys),
    ):
        assert select(records, wanted, families, known)["key"].unique().tolist() == chosen
    told = overview(records, known)
    assert told.endswith("W2") and "null 0" in told and "share of tokens for which attn.rate is undefined" in told
    assert all(f" {number} " in told for number in ("999", "1,000", "0.000123", "1e+12", "-12,346"))
    assert {len(line) for line in overview(records, known, 50).splitlines()[2:] if line.endswith("…")} == {50}
    places = [line.split("  ")[0] for line in by_layer(select(records, ["flow.w2"], [], known), known).splitlines()]
    assert places == ["flow.w2", f"{tmp_path}, by step", "", "", "layer 0 attn", "layer 1 attn"]
    plain = Row(1, "ffn", "attn.range", 7.25)
    changes = [{"layer": 0}, {}, {"param": "shuffled"}, {"cloud": "read"}, {"head": 1}]
    writer.append(4, [plain._replace(mean=8.0, **change) if change else plain for change in changes])
    told = overview(select(read_records(tmp_path), ["attn.range"], [], known), known)
    assert " 7.25 " in told and told.endswith("layer 1 ffn")
    writer.append(4, [Row(None, None, "attn.range", 9.5, param="k=4"), Row(None, None, "attn.range", 10.5)])
    told = overview(select(read_records(tmp_path), ["attn.range"], [], known), known)
    assert " 10.5 " in told and told.endswith("all layers")
