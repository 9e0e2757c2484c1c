"""Studies that are killed, stopped, refused and added to; cells of one seed see the same batches."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from emformer import plans
from emformer.parts import UserError
from emformer.plans import Measure, Plan
from emformer.studies import cell, cells, progress
from emformer.studies.ablation import ablate
from emformer.studies.cell import alone
from emformer.studies.cells import Study, last_step, stoppable
from emformer.studies.engines.local import Local
from emformer.studies.jobs import Event
from emformer.training.data import Text, read_text

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def test_deaths_lose_nothing(tmp_path: Path):
    script = Path(__file__).with_name("deaths.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "2"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["struck"]["study"] >= 2 and found["struck"]["cell"] >= 1 and found["resumed"] >= 1, (
        f"that proves nothing: {found}"
    )
    assert found["lost"] == 0, "finished cells are as they were"
    assert found["orphans"] >= 1, "cells whose study has died stop with a checkpoint"
    assert found["table"], "the table is that of a study that was left alone"
    assert found["second"] == 2 and "is being worked on by another process" in done.stderr
    assert found["stopped"] == 143 and found["free"] and found["checkpoint"]
    assert found["other"] == 2 and "was begun with other settings" in done.stderr
    assert found["more"] == 0 and found["kept"] and found["finished"] == 6, "more seeds are added"
    assert found["failed"] == [f"position=lost,seed={seed}" for seed in range(3)]
    assert "cell position=lost,seed=0 failed: training.batch is 16 sequences" in done.stderr


def plan(tmp_path: Path, **changes) -> Plan:
    data = {"corpus": {"class_path": "Grammar", "init_args": {"sentences": 300}}, "cache": str(tmp_path / "cache")}
    fields = {
        "title": "what positions are for",
        "base": str(SMOKE),
        "settings": {"data": data, "training": {"max_steps": 100}},
        "factors": {"position": {"rope": {}, "none": {"model": {"positions": []}}}, "rate": {"high": {}, "low": {}}},
        "outcomes": {"loss": Measure(metric="val_loss")},
        "seeds": 2,
    }
    return Plan(**(fields | changes))


def test_cells_of_one_seed_see_the_same_batches(tmp_path: Path):
    def batches(cell: plans.Cell) -> np.ndarray:
        text = Text(read_text(cell.settings.data), cell.settings.model.context, cell.settings.training)
        loader = iter(text.train_dataloader())
        return np.stack([next(loader).inputs.numpy() for _ in range(3)])

    seen = {cell.name: batches(cell) for cell in plans.cells(plan(tmp_path))}
    assert len(seen) == 8
    for seed in ("seed=0", "seed=1"):
        own = [some for name, some in seen.items() if name.endswith(seed)]
        others = [some for name, some in seen.items() if not name.endswith(seed)]
        assert all(np.array_equal(own[0], one) for one in own) and not any(np.array_equal(own[0], one) for one in others)


def test_one_process_at_a_time(tmp_path: Path):
    lock = tmp_path / "new" / ".lock"
    with alone(lock, "wait for it"), pytest.raises(UserError, match="wait for it"), alone(lock, "wait for it"):
        raise AssertionError
    with alone(lock, "wait for it"):  # free again
        entered = threading.Event()
        other = threading.Thread(target=lambda: alone(lock).__enter__() or entered.set(), daemon=True)
        other.start()
        assert not entered.wait(0.2), "without a sentence it waits"
    assert entered.wait(5)


def test_where_there_are_no_locks_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cell, "fcntl", SimpleNamespace(flock=refuse, LOCK_EX=2, LOCK_NB=4))
    with alone(tmp_path / ".lock", "wait for it"):
        assert "has no locks" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on a Mac
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    found = importlib.util.find_spec(cell.__name__)
    assert found is not None and found.loader is not None
    found.loader.exec_module(other := importlib.util.module_from_spec(found))
    with other.alone(tmp_path / ".lock", "wait for it"), stoppable():
        assert other.fcntl is None and Local().at_once >= 1


def test_a_folder_of_something_else_is_left(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is no ablation study"), Study(tmp_path, plan(tmp_path)).begun():
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_whatever_stopped_it_before_it_trained_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed at each of its first writes, of the lock and of every file; nothing but what a study leaves may be there."""

    class Killed(BaseException):
        pass

    class Engine:
        def run(self, jobs, tell):
            for job in jobs:
                job.done.write_text("{}")

    found = plans.cells(one := plan(tmp_path, seeds=1))
    write = cells.write_atomically
    monkeypatch.setattr(Study, "_tokenise", lambda *_: None)  # nothing is trained

    def begin(path: Path, strike: int) -> Study:
        def struck(file: Path, content: str | bytes) -> None:
            nonlocal writes
            writes += 1
            if writes > strike:
                file.with_name(f".{file.name}.7.part").write_text("half")
                raise Killed
            write(file, content)

        writes = 0
        monkeypatch.setattr(cells, "write_atomically", struck)
        study = Study(path, one)
        study.engine = Engine()
        with study.begun():
            study.run(found)
        return study

    for strike in range(7):  # study.yaml, four configs, cells.json; environment.json is written elsewhere
        path = tmp_path / str(strike)
        if strike < 6:
            with pytest.raises(Killed):
                begin(path, strike)
        assert all(begin(path, 99).done(one.name).exists() for one in found)
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").touch()
    assert begin(tmp_path / "locked", 99).cells


def test_a_misspelt_setting_leaves_no_folder(tmp_path: Path):
    wrong = plan(tmp_path, settings={"training": {"max_stepz": 7}})
    with pytest.raises(UserError, match="max_steps"):
        ablate(wrong, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_an_older_version_did_not_know_are_at_their_default(tmp_path: Path):
    """A cell's file without a field is the same cell, unless the field is not at its default."""
    one = Study(
        tmp_path / "out", plan(tmp_path, factors={"position": {"rope": {}, "none": {"model": {"positions": []}}}}, seeds=1)
    )
    found = plans.cells(one.plan)
    with one.begun():
        one._write(found)
        file = one.config(found[0].name)
        text = file.read_text()
        for name, refused in (("penalties", False), ("max_steps", True)):  # the second is set to 100
            settings = yaml.safe_load(text)
            del settings["training"][name]
            file.write_text(yaml.safe_dump(settings))
            with pytest.raises(UserError, match="other settings") if refused else nullcontext():
                one._write(found)
        file.write_text(text + "later: 1\n")
        with pytest.raises(UserError, match="other settings"):
            one._write(found)


def test_signals_leave_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving, stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert leaving.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "as nohup asks"
    finally:
        signal.signal(signal.SIGHUP, old)


def test_the_last_step_of_a_journal_that_is_being_written(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    assert last_step(path) == 3
    path.write_text("".join(json.dumps({"step": k, "loss": 1.0}) + "\n" for k in range(1000)) + '{"step": 1000')
    assert last_step(path) == 999
    path.write_text("damaged\n")
    assert last_step(path) == 0


def test_the_time_left_follows_from_what_this_call_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = iter([0.0, 40.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.sharing("8 cells", 0.5) as tell:
        tell(0.6, "4 done")
        tell(0.7, "5 done, 1 failed")
    assert capsys.readouterr().err.splitlines() == [
        "8 cells: 4 done, 60%, 02:40 left",
        "8 cells: 5 done, 1 failed, 70%, 02:00 left",
    ]


def test_how_far_a_study_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """One cell of four is done and another half, when it begins: shares are of steps, and failures count whole."""
    told: list[tuple[float, str]] = []

    class Engine:
        def run(self, jobs, tell):
            names = [job.name for job in jobs]
            for event in (Event("started", names[0]), Event("started", names[1]), Event("failed", names[0], "it is cold.")):
                tell(event)
            jobs[1].done.write_text("{}")
            tell(Event("finished", names[1]))

    class sharing:
        def __init__(self, what: str, start: float):
            told.append((start, what))

        def __enter__(self):
            return lambda share, word: told.append((share, word))

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("emformer.studies.cells.sharing", sharing)
    study = Study(tmp_path / "study", plan(tmp_path, seeds=1))
    study.engine = Engine()
    found = plans.cells(study.plan)
    for one, steps in ((found[0], 100), (found[1], 50)):
        study.run_of(one.name).path.mkdir(parents=True)
        study.run_of(one.name).metrics.write_text(json.dumps({"step": steps}) + "\n")
    (study.path / "finished").mkdir()
    study.done(found[0].name).write_text("{}")
    study.run(found)
    assert told == [
        (0.375, "4 cells"),
        (0.375, "1 done"),
        (0.375, "1 done"),
        (0.5, "1 done, 1 failed"),
        (0.75, "2 done, 1 failed"),
    ]
    assert study.failed == {found[1].name: "it is cold."}
    assert f"cell {found[1].name} failed: it is cold; its log is {study.path}/logs" in capsys.readouterr().err
