"""Jobs of a Slurm cluster, through submitit (the extra `sweep`)."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from emformer import parts
from emformer.files import replaced
from emformer.parts import UserError
from emformer.studies import jobs as jobs_module
from emformer.studies.engines import work
from emformer.studies.jobs import Event, Job, last_line

POLL = 0.2  # seconds between two looks at the files that jobs write
ASK_EVERY = 10.0  # seconds between two questions to Slurm


class Ticket(NamedTuple):
    """A job in the queue: its number there, and the file of what its process said of errors."""

    number: str
    said: str


@dataclass(frozen=True)
class Slurm(parts.Engine):
    """An array of jobs on a Slurm cluster, a cell each. Needs the extra `sweep`, and a folder that all machines see.

    A job that is preempted or has used up its minutes writes a checkpoint, goes back into the queue and goes on from there. The
    jobs outlive this process: called again, it finds those that are still queued and sends only the others. Should a job be sent
    twice all the same, the second waits for the first and finds nothing to do, as long as the file system keeps locks between
    machines (NFS does by default; Lustre when mounted with `flock`).

    Args:
        partition: of the cluster; null for its default.
        account: that pays; null for the default.
        minutes: a job may take before it is put back into the queue.
        cpus: of each job, which are its threads.
        gpus: of each job.
        memory_gb: of each job.
        at_once: jobs of one array that run side by side, at most. What is sent at a time is an array, of up to 1,000 jobs; what a
            later call sends is another.
        timeouts: how often a job may be put back because its minutes were up.
        cluster: "local" runs the jobs on this machine by submitit's own local executor, to try things out.
        more: further options of sbatch, as {qos: low, constraint: a100}.
    """

    partition: str | None = None
    account: str | None = None
    minutes: int = 60
    cpus: int = 1
    gpus: int = 0
    memory_gb: int = 4
    at_once: int = 64
    timeouts: int = 20
    cluster: Literal["slurm", "local"] = "slurm"
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"minutes": 1, "cpus": 1, "gpus": 0, "memory_gb": 1, "at_once": 1, "timeouts": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"Slurm: {name} is {getattr(self, name)}; choose at least {value}.")

    def run(self, jobs: Sequence[Job], tell: Callable[[Event], None]) -> None:
        waiting = [job for job in jobs if not job.done.exists()]
        if not waiting:
            return
        queue = (_Cluster if self.cluster == "slurm" else _Here)(self, _home(waiting))
        sent = queue.found()
        active = {job: sent[job.name] for job in waiting if job.name in sent}
        waiting = [job for job in waiting if job not in active]
        begun: set[Job] = set()
        try:
            while waiting or active:
                lot = waiting[: max(0, queue.room - len(active))]
                if lot:
                    active |= queue.submit(lot)
                    waiting = waiting[len(lot) :]
                for job, ticket in list(active.items()):
                    state = queue.state(ticket)
                    if state == "running" and job not in begun:
                        begun.add(job)
                        tell(Event("started", job.name))
                    if state == "gone":
                        os.listdir(job.done.parent)  # a file system of several machines then looks anew
                    if job.done.exists():
                        tell(Event("finished", job.name))
                    elif state == "gone":
                        tell(Event("failed", job.name, _why(job, ticket)))
                    else:
                        continue
                    del active[job]
                tell(Event("waiting"))
                if active:
                    time.sleep(POLL)
        finally:
            queue.leave(list(active.values()))

    def script(self, jobs: Sequence[Job]) -> str:
        if not jobs:
            return "# no jobs"
        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(_home(jobs)))}"
        make = _submitit().slurm.slurm._make_sbatch_string
        text = make(command=command, folder=_home(jobs), map_count=len(jobs), **self.parameters)
        return "\n".join(
            [text, "# where the task with number", *(f"# {k}: {' '.join(job.command)}" for k, job in enumerate(jobs))]
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """Of an executor of submitit for Slurm."""
        named = {"partition": self.partition, "account": self.account, "gpus_per_node": self.gpus or None}
        return {
            "job_name": "emformer",
            "time": self.minutes,
            "cpus_per_task": self.cpus,
            "array_parallelism": self.at_once,
            **{name: value for name, value in named.items() if value is not None},
            "additional_parameters": {"mem": f"{self.memory_gb}G", **self.more},
        }


class _Queue:
    """Jobs that submitit has been given. `room`: how many may be there at the same time."""

    room: int

    def __init__(self, engine: Slurm, home: Path, executor: Any):
        self._engine, self._home, self._executor = engine, home, executor
        for module in (jobs_module, work):
            _submitit().core.utils.cloudpickle.register_pickle_by_value(module)

    def submit(self, jobs: Sequence[Job]) -> dict[Job, Ticket]:
        here = os.getcwd()
        made = []
        with self._executor.batch():
            made += [self._executor.submit(work.Work(_absolute(job), here, self._engine.cpus)) for job in jobs]
        self.keep(made)
        return {job: Ticket(one.job_id, str(one.paths.stderr)) for job, one in zip(jobs, made, strict=True)}

    def keep(self, made: Sequence[Any]) -> None:
        """What is remembered of these jobs of submitit."""

    def found(self) -> dict[str, Ticket]:
        """Jobs by name that an earlier call has left in the queue."""
        return {}

    def state(self, ticket: Ticket) -> Literal["waiting", "running", "gone"]:
        raise NotImplementedError

    def leave(self, tickets: Sequence[Ticket]) -> None:
        """What becomes of jobs that are there when this process stops."""
        raise NotImplementedError


class _Here(_Queue):
    """submitit's local executor; its jobs end with this process."""

    def __init__(self, engine: Slurm, home: Path):
        executor = _submitit().LocalExecutor(home, max_num_timeout=engine.timeouts)
        executor.update_parameters(timeout_min=engine.minutes, gpus_per_node=engine.gpus)
        super().__init__(engine, home, executor)
        self.room = engine.at_once
        self._made: dict[str, Any] = {}

    def keep(self, made: Sequence[Any]) -> None:
        self._made |= {one.job_id: one for one in made}

    def state(self, ticket: Ticket) -> Literal["waiting", "running", "gone"]:
        return "gone" if self._made[ticket.number].done() else "running"

    def leave(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self._made[ticket.number]._process.kill()  # `cancel` interrupts it, which a process in the background may ignore


class _Cluster(_Queue):
    """Slurm. What was sent is remembered in queue.json, for a later call; whether it is still there is asked of Slurm alone."""

    room = 1000  # an array of Slurm holds no more, unless the cluster says otherwise

    def __init__(self, engine: Slurm, home: Path):
        try:
            executor = _submitit().SlurmExecutor(home, max_num_timeout=engine.timeouts)
        except RuntimeError as error:
            raise UserError(
                "Slurm: there is no srun here; start the study on the cluster, or try it with --engine.cluster local."
            ) from error
        executor.update_parameters(**engine.parameters)
        super().__init__(engine, home, executor)
        self._states: dict[str, str] = {}
        self._missed: dict[str, int] = {}
        self._asked = -ASK_EVERY

    @property
    def _file(self) -> Path:
        return self._home / "queue.json"

    def submit(self, jobs: Sequence[Job]) -> dict[Job, Ticket]:
        try:
            sent = super().submit(jobs)
        except (RuntimeError, OSError) as error:  # submitit's own are RuntimeErrors
            raise UserError(f"Slurm took no jobs: {' '.join(str(error).split())[-300:]}.") from error
        known = self._read() | {job.name: ticket for job, ticket in sent.items()}
        with replaced(self._file) as partial:
            partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        self._asked = -ASK_EVERY
        return sent

    def found(self) -> dict[str, Ticket]:
        known = self._read()
        if not known:
            return {}
        there = _squeue()
        if there is None:
            raise UserError("Slurm does not answer (squeue), and jobs of this study may be in its queue; try again later.")
        return {name: ticket for name, ticket in known.items() if ticket.number in there}

    def state(self, ticket: Ticket) -> Literal["waiting", "running", "gone"]:
        """As Slurm said a moment ago. A job is "gone" when two answers did not have it: one may come while it changes hands."""
        if time.monotonic() - self._asked >= ASK_EVERY:
            self._asked = time.monotonic()
            there = _squeue()
            if there is not None:
                missing = self._missed.keys() | self._states.keys()
                self._missed = {number: self._missed.get(number, 0) + 1 for number in missing if number not in there}
                self._states = there
        if ticket.number in self._states:
            return "running" if self._states[ticket.number] == "RUNNING" else "waiting"
        self._missed.setdefault(ticket.number, 0)
        return "gone" if self._missed[ticket.number] >= 2 else "waiting"

    def leave(self, tickets: Sequence[Ticket]) -> None:
        if tickets:
            arrays = " ".join(dict.fromkeys(ticket.number.partition("_")[0] for ticket in tickets))
            tqdm.write(f"the jobs stay in the queue, and the same command finds them; to end them: scancel {arrays}", sys.stderr)

    def _read(self) -> dict[str, Ticket]:
        try:
            return {name: Ticket(*one) for name, one in json.loads(self._file.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # none, or damaged: then a job may be sent twice, and waits
            return {}


def _squeue() -> dict[str, str] | None:
    """The state of every job of this user in the queue, by number, or None where Slurm does not answer."""
    command = ["squeue", "--user", str(os.getuid()), "--noheader", "--array", "--format", "%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if line.strip()}


def _home(jobs: Sequence[Job]) -> Path:
    """Where submitit keeps what it sends."""
    return jobs[0].log.parent / "slurm"


def _absolute(job: Job) -> Job:
    return job._replace(log=job.log.absolute(), done=job.done.absolute())


def _why(job: Job, ticket: Ticket) -> str:
    said = last_line(Path(ticket.said)).removeprefix("RuntimeError: ")
    return said or last_line(job.log) or f"the job {ticket.number} has left the queue without a word"


def _submitit() -> Any:
    try:
        import submitit  # only for those who ask
    except ModuleNotFoundError as error:
        raise UserError("the engine Slurm needs the package submitit: pip install 'emformer[sweep]'.") from error
    return submitit
