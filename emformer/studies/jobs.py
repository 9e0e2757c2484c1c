"""The work that an engine is given: commands that run in processes of their own, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple


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


def last_line(log: Path, most: int = 300) -> str:
    """The last line of a log that says something, shortened; "" where there is none."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1][-most:] if lines else ""


def environment(threads: int, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that may use so many threads, however many cores there are: the same bits everywhere."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {**base, **dict.fromkeys(names, str(threads)), "PYTHONUNBUFFERED": "1"}
