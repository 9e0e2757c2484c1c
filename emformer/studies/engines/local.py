"""Processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emformer import parts
from emformer.parts import UserError
from emformer.studies.jobs import Event, Job, environment, last_line

POLL = 0.1  # seconds between two looks at the processes
GRACE = 60.0  # seconds that a process has to write its checkpoint when the study is stopped
RETRIES = 1  # of a job that a signal has killed: it goes on where it was; one that fails by itself would fail again


@dataclass(frozen=True)
class Local(parts.Engine):
    """Processes on this machine, a few at a time.

    A job holds the read end of a pipe whose other end is this process: if this one dies, whatever way, its jobs see the end of
    it, write their checkpoints and stop. Nothing then goes on that a second call would begin again.

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
                    running.append((job, retries, self._start(job)))
                    tell(Event("started", job.name))
                for one in [one for one in running if one[2].poll() is not None]:
                    running.remove(one)
                    job, retries, process = one
                    assert process.stdin is not None
                    process.stdin.close()
                    if process.returncode == 0 and job.done.exists():
                        tell(Event("finished", job.name))
                    elif retries and (process.returncode < 0 or process.returncode == 128 + signal.SIGTERM):
                        waiting.append((job, retries - 1))
                    else:
                        tell(Event("failed", job.name, _why(job, process.returncode)))
                tell(Event("waiting"))
                if running:
                    _pause([process for _, _, process in running])
        finally:
            _stop([process for _, _, process in running])

    def script(self, jobs: Sequence[Job]) -> str:
        head = f"# {len(jobs)} processes, {self.at_once} at a time, {self.threads} thread{'s' * (self.threads > 1)} each"
        return "\n".join([head, *(" ".join(job.command) for job in jobs)])

    def _start(self, job: Job) -> subprocess.Popen:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log:
            return subprocess.Popen(
                [*job.command, "--with-parent"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.threads, os.environ),
                start_new_session=True,  # Ctrl-C is for the study, which then stops its jobs itself
            )


def _pause(processes: Sequence[subprocess.Popen]) -> None:
    """Wait a moment, or until the first ends."""
    try:
        processes[0].wait(POLL)
    except subprocess.TimeoutExpired:
        return


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """End what still runs: first with time to write a checkpoint."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    until = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _why(job: Job, code: int) -> str:
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return last_line(job.log) or f"exit code {code}"
