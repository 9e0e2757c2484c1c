"""What is on disk stays whole: torn lines, full disks, writers that fail half-way."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from emformer.parts import UserError
from emformer.records import Journal, disk_error, read_journal, write_atomically


def write(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_come_back(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    found = [{"step": 1, "loss": 0.1 + 0.2, "name": "π"}, {"step": 2, "loss": -1e-300}]
    for row in found:
        journal.append(row)
        assert list(read_journal(path))[-1] == row  # at once: one unbuffered write a row
    journal.close()
    assert list(read_journal(path)) == found


@pytest.mark.parametrize("tail", [b"{", b'{"step": 3, "loss": 1.0}', b"\x00\x00\x00", b"nonsense\n", b"[1, 2]\n", b"\xff\n"])
def test_a_torn_tail_is_dropped(tmp_path: Path, tail: bytes):
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1}, {"step": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert list(read_journal(path)) == [{"step": 1}, {"step": 2}]
    journal = Journal(path)
    assert path.read_bytes() == whole
    journal.append({"step": 3})
    assert list(read_journal(path)) == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("resumed", [0, 1, 5, 6, 9])
def test_rows_after_the_resumed_step_are_cut(tmp_path: Path, resumed: int):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "kind": kind} for step in (1, 5, 6, 8) for kind in "ab"]
    write(path, *rows)
    Journal(path, resumed).close()
    assert list(read_journal(path)) == [row for row in rows if row["step"] <= resumed]


def test_reopening_appends(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        journal = Journal(path, step)
        journal.append({"step": step + 1})
        journal.close()
    assert [row["step"] for row in read_journal(path)] == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path: Path, value: float):
    path = tmp_path / "metrics.jsonl"
    Journal(path).append({"step": 1, "loss": value})
    assert path.read_text() == '{"step": 1, "loss": null}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal._file.close()
    journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full; .*--resume") as caught:
        journal.append({"step": 1})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("code", "word"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EACCES, "permission")])
def test_a_write_that_failed_says_why(code: int, word: str):
    told = str(disk_error(OSError(code, os.strerror(code)), Path("runs/x")))
    assert word in told and "runs/x" in told and "\n" not in told


def test_an_atomic_write_replaces(tmp_path: Path):
    path = tmp_path / "config.yaml"
    write_atomically(path, "one")
    write_atomically(path, "zwö")
    assert path.read_text(encoding="utf-8") == "zwö" and [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def limited(code: str, *arguments: str) -> str:
    """Run code in a process that may write no file beyond 4 kB, from the call of `limit()` on."""
    head = """
        import resource, signal, sys
        from pathlib import Path
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    told = limited(
        """
        from emformer.records import UserError, write_atomically
        limit()
        try:
            write_atomically(Path(sys.argv[1]), "new" * 10_000)
        except UserError as error:
            print(error)
        """,
        str(path),
    )
    assert "cannot write" in told and "config.yaml" in told and len(told.splitlines()) == 1
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path: Path):
    """Half-way through a run the disk fills up. The run ends with one sentence, and resumes when there is room."""
    told = limited(
        """
        import pytorch_lightning as pl
        from small import settings
        from emformer.parts import UserError
        from emformer.training import fit

        class Full(pl.Callback):
            def on_train_batch_end(self, trainer, learner, outputs, batch, batch_idx):
                if trainer.global_step == 12:
                    limit()

        try:
            fit(settings(Path(sys.argv[1])), Path(sys.argv[1]) / "run", callbacks=[Full()])
        except UserError as error:
            print(error)
        """,
        str(tmp_path),
    )
    assert "cannot write" in told and "last.ckpt" in told and "--resume" in told and len(told.splitlines()) == 1
    import torch
    from small import settings, weights

    from emformer.training import fit

    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 7  # save_every is 7, and the writing at 14 failed
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith(".part")]
    fit(settings(tmp_path), tmp_path / "run", resume=True)
    fit(settings(tmp_path), tmp_path / "whole")
    a, b = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(a[key], b[key]) for key in b)
