"""What a job of a cluster does: it runs the command of a cell, and lets it write its checkpoint before the job is taken away.

Sent by value, with what it uses of `emformer.studies.jobs`: the process that waits for a cell need not load torch to do so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field

from emformer.studies.jobs import Job, killed, start, stop, why

LOOK_EVERY = 0.2  # seconds


@dataclass
class Work:
    """A job as a function that submitit calls; raises RuntimeError where the job fails.

    A cluster signals all processes of a job that it takes away, so the command may have stopped before submitit hears of it. Then
    `patience` seconds are waited to be taken away, before the command is started once more, which goes on where it was.
    """

    job: Job
    folder: str  # where it runs: paths in settings are relative to it
    threads: int
    patience: float = 60.0
    process: subprocess.Popen | None = field(default=None, repr=False)

    def __call__(self) -> None:
        os.chdir(self.folder)
        parent = os.getppid()
        for again in (True, False):
            self.process = start(self.job, self.threads)
            while self.process.poll() is None:
                time.sleep(LOOK_EVERY)
                if os.getppid() != parent:  # submitit's own process was ended
                    stop([self.process])
            if self.job.done.exists():
                return
            if not (again and killed(self.process.returncode)):
                break
            time.sleep(self.patience)
        raise RuntimeError(why(self.job, self.process.returncode))

    def checkpoint(self) -> object:
        """Called by submitit before it puts the job back into the queue: what is to be called when its turn comes again."""
        if self.process is not None:
            stop([self.process])
        return sys.modules["submitit"].helpers.DelayedSubmission(Work(self.job, self.folder, self.threads, self.patience))
