"""Processes on this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emformer import parts
from emformer.parts import UserError
from emformer.studies.jobs import Event, Job, killed, start, stop, why

POLL = 0.1  # seconds between two looks at the processes
RETRIES = 1  # of a job that was killed


@dataclass(frozen=True)
class Local(parts.Engine):
    """Processes on this machine, a few at a time.

    A job that was killed goes on where it was, once; one that failed is told, and the rest goes on. When this process is
    stopped its jobs write their checkpoints and stop, and when it is killed they do so too: nothing then goes on that a second
    call would begin again. All jobs share one GPU, if there is one.

    Args:
        processes: at once; null for as many as there are cores for their threads.
        threads: of each. The bits of a result depend on it, and not on how many processes there are.
    """

    processes: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1 or (self.processes is not None and self.processes < 1):
            raise UserError(f"Local: {self.processes} processes of {self.threads} threads are none; choose at least 1.")

    @property
    def at_once(self) -> int:
        """Processes that run side by side."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.processes if self.processes is not None else max(1, cores // self.threads)

    def run(self, jobs: Sequence[Job], tell: Callable[[Event], None]) -> None:
        waiting = [(job, RETRIES) for job in reversed(jobs) if not job.done.exists()]
        running: list[tuple[Job, int, subprocess.Popen]] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once:
                    job, retries = waiting.pop()
                    try:
                        running.append((job, retries, start(job, self.threads)))
                        tell(Event("started", job.name))
                    except OSError as error:
                        tell(Event("failed", job.name, f"it cannot be started: {error.strerror or error}"))
                for one in [one for one in running if one[2].poll() is not None]:
                    running.remove(one)
                    job, retries, process = one
                    assert process.stdin is not None
                    process.stdin.close()
                    if job.done.exists():
                        tell(Event("finished", job.name))
                    elif retries and killed(process.returncode):
                        waiting.append((job, retries - 1))
                    else:
                        tell(Event("failed", job.name, why(job, process.returncode)))
                tell(Event("waiting"))
                if running:
                    _pause(running[0][2])
        finally:
            stop([process for _, _, process in running])

    def script(self, jobs: Sequence[Job]) -> str:
        head = f"# {len(jobs)} processes, {self.at_once} at a time, {self.threads} thread{'s' * (self.threads > 1)} each"
        return "\n".join([head, *(" ".join(job.command) for job in jobs)])


def _pause(process: subprocess.Popen) -> None:
    """Wait a moment, or until this one ends."""
    try:
        process.wait(POLL)
    except subprocess.TimeoutExpired:
        return
