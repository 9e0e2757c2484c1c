"""The work that an engine is given: commands that run in processes of their own, and what became of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

GRACE = 60.0  # seconds that a process has to write its checkpoint when it is asked to stop
FULL = 2**20  # bytes that are left where a log may not hold what went wrong
TAIL = 65536  # bytes of a log that are read


class Job(NamedTuple):
    """A command. `log`: the file that its output is appended to. `done`: the file that it writes when, and only when, it has
    ended well; an engine that is asked to run a job whose `done` is there already does nothing."""

    name: str
    command: tuple[str, ...]
    log: Path
    done: Path


What = Literal["started", "finished", "failed", "waiting"]


class Event(NamedTuple):
    """What happened to a job: `why` it failed, in a word or a sentence. "waiting" says only that time has passed."""

    what: What
    job: str = ""
    why: str = ""


def start(job: Job, threads: int) -> subprocess.Popen:
    """The process of a job.

    It holds the read end of a pipe whose other end is this process: if this one dies, whatever way, the job sees the end of it,
    writes its checkpoint and stops. Ctrl-C does not reach it: who started it stops it.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            [*job.command, "--with-parent"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(threads, os.environ),
            start_new_session=True,
        )


def stop(processes: Sequence[subprocess.Popen], grace: float = GRACE) -> None:
    """End what still runs: first with time to write a checkpoint, then at once."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + grace
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)  # what it holds is free only then


def killed(code: int) -> bool:
    """Whether a process that ended with this code was ended from outside, so that it may go on where it was. One that failed by
    itself would fail again."""
    return code < 0 or code in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def why(job: Job, code: int) -> str:
    """Why a job failed: the signal, or the last line that it said."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    said = last_line(job.log) or f"exit code {code}"
    return f"{said} (the disk is full)" if shutil.disk_usage(job.log.parent).free < FULL else said


def last_line(log: Path, most: int = 300) -> str:
    """The last line of a log that says something, shortened; "" where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("emformer: ")[-most:] if lines else ""


def environment(threads: int, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that may use so many threads, however many cores there are: the same bits everywhere. Without
    what a cluster tells its tasks: a cell is a run of its own, not a rank of the job that has started it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    kept = {name: value for name, value in base.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    return {**kept, **dict.fromkeys(names, str(threads)), "PYTHONUNBUFFERED": "1"}
