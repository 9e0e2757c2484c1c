"""The cells of an ablation study on the disk, and how they are run."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from emformer import parts, plans
from emformer.parts import UserError
from emformer.plans import Cell, Plan
from emformer.records import Run, read_settings, write_atomically
from emformer.studies.cell import alone
from emformer.studies.engines.local import Local
from emformer.studies.jobs import Event, Job
from emformer.studies.progress import sharing
from emformer.training.fit import read_text_visibly

LOOK_EVERY = 1.0  # seconds between two looks at how far cells have come


class Study:
    """The folder of an ablation study.

    Attributes:
        path: the folder.
        plan: what is varied and measured.
        failed: {cell: why} of those that did not end well in this call.
    """

    def __init__(self, path: Path, plan: Plan):
        self.path, self.plan, self.failed = path, plan, {}
        self.engine = plan.engine if plan.engine is not None else Local()

    def config(self, cell: str) -> Path:
        return self.path / "configs" / f"{cell}.yaml"

    def run_of(self, cell: str) -> Run:
        return Run(self.path / "cells" / cell)

    def done(self, cell: str) -> Path:
        return self.path / "finished" / f"{cell}.json"

    @property
    def cells(self) -> list[dict[str, Any]]:
        """{"name", "levels", "seed"} of every cell that was ever planned here, in their order."""
        path = self.path / "cells.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged: {error}; restore it, or choose another --out folder.") from error

    def begun(self) -> Any:
        """A context in which this process alone works on the folder. Raises `UserError` where another does, or for a folder that
        is no study."""
        marker = self.path / "study.yaml"
        if self.path.is_file() or (self.path.is_dir() and not marker.exists() and not all(map(_begun, self.path.iterdir()))):
            raise UserError(f"{self.path} exists and is no ablation study; choose another --out folder.")
        self.path.mkdir(parents=True, exist_ok=True)
        return alone(self.path / ".lock", f"{self.path} is being worked on by another process; wait for it, or stop it.")

    def run(self, cells: Sequence[Cell], modules: Sequence[str] = ()) -> None:
        """Run these cells, but for those that are finished. A cell that fails is told, and the rest goes on.

        Raises:
            UserError: for cells that were begun with other settings; with nothing written.
            SystemExit, KeyboardInterrupt: 143 after SIGTERM, with a checkpoint of every cell that was running.
        """
        self._write(cells)
        jobs = [self.job(cell.name, modules) for cell in cells]
        left = [job for job in jobs if not job.done.exists()]
        if not left:
            return
        self._tokenise([cell for cell in cells if not self.done(cell.name).exists()])
        watch = _Watch(self, {cell.name: cell.settings.training.max_steps for cell in cells})
        try:
            with stoppable(), sharing(f"{len(cells)} cells", watch.share) as tell:
                self.engine.run(left, lambda event: watch.told(event, tell))
        except (KeyboardInterrupt, SystemExit):
            tqdm.write(f"stopped; the same command goes on, and keeps what is in {self.path}", file=sys.stderr)
            raise

    def job(self, cell: str, modules: Sequence[str] = ()) -> Job:
        """What an engine is to do for a cell."""
        imported = [word for module in modules for word in ("--import", module)]
        command = (sys.executable, "-m", "emformer.studies.cell", str(self.path), cell, *imported)
        return Job(cell, command, self.path / "logs" / f"{cell}.txt", self.done(cell))

    def _write(self, cells: Sequence[Cell]) -> None:
        """Plan, cells and their settings. Raises `UserError`, with nothing written, where a cell has other settings now."""
        texts = {cell.name: yaml.safe_dump(parts.plain(cell.settings), sort_keys=False, allow_unicode=True) for cell in cells}
        for name, text in texts.items():
            if not _equal(self.config(name), text):
                raise UserError(
                    f"the cell {name} of {self.path} was begun with other settings; choose another --out, or remove that folder."
                )
        write_atomically(self.path / "study.yaml", plans.written(self.plan))  # first: by it a folder is known
        for part in ("configs", "cells", "logs", "finished"):
            (self.path / part).mkdir(exist_ok=True)
        for name, text in texts.items():
            if not self.config(name).exists():
                write_atomically(self.config(name), text)
        told = {one["name"]: one for one in self.cells}
        told |= {cell.name: {"name": cell.name, "levels": dict(cell.levels), "seed": cell.seed} for cell in cells}
        write_atomically(self.path / "cells.json", json.dumps(list(told.values()), indent=1) + "\n")
        Run(self.path).write_environment(0, cells=len(told))

    def _tokenise(self, cells: Sequence[Cell]) -> None:
        """Make every text that the cells read, once, so that no two of them do it at the same time."""
        seen: list[Any] = []
        for cell in cells:
            if cell.settings.data not in seen:
                seen.append(cell.settings.data)
                read_text_visibly(cell.settings.data)


class _Watch:
    """How far the cells of a study have come: in steps of all of them, those that failed counted whole."""

    def __init__(self, study: Study, total: Mapping[str, int]):
        self._study, self._total = study, total
        self._reached = {name: steps if study.done(name).exists() else self._step(name) for name, steps in total.items()}
        self._running: set[str] = set()
        self._looked = 0.0

    @property
    def share(self) -> float:
        return sum(self._reached.values()) / max(1, sum(self._total.values()))

    def told(self, event: Event, tell: Callable[[float, str], None]) -> None:
        if event.what == "started":
            self._running.add(event.job)
        elif event.what in ("finished", "failed"):
            self._running.discard(event.job)
            self._reached[event.job] = self._total[event.job]
        if event.what == "failed":
            self._study.failed[event.job] = event.why
            log = self._study.path / "logs" / f"{event.job}.txt"
            tqdm.write(f"cell {event.job} failed: {event.why.rstrip('.')}; its log is {log}", file=sys.stderr)
        now = time.monotonic()
        if event.what == "waiting" and now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        for name in self._running:
            self._reached[name] = max(self._reached[name], self._step(name))
        ended = sum(self._study.done(name).exists() for name in self._total)
        tell(self.share, f"{ended} done" + (f", {len(self._study.failed)} failed" if self._study.failed else ""))

    def _step(self, cell: str) -> int:
        return min(self._total[cell], last_step(self._study.run_of(cell).metrics))


@contextmanager
def stoppable() -> Generator[None]:
    """SIGTERM and SIGHUP leave the block by SystemExit, as Ctrl-C does by KeyboardInterrupt, so that it can stop what it has
    started. Signals that are ignored stay so (nohup)."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        known = []  # only the main thread is asked
    before = {number: signal.getsignal(number) for number in known if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _begun(path: Path) -> bool:
    """Whether a study that was stopped before it had a study.yaml has left this there."""
    return path.name == ".lock" or path.name.startswith(".study.yaml.")


def _equal(path: Path, text: str) -> bool:
    """Whether settings were not written yet, or are these; what an older version did not know is at its default."""
    if not path.exists() or path.read_text(encoding="utf-8") == text:
        return True
    try:
        return parts.plain(read_settings(path)) == yaml.safe_load(text)
    except UserError:
        return False


def last_step(metrics: Path) -> int:
    """The last step in the journal of a run that may be writing it; only its end is read. 0 where there is none."""
    try:
        with open(metrics, "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - 4096)
            file.seek(start)
            lines = file.read().split(b"\n")
        whole = lines[1 if start else 0 : -1]  # what follows the last newline is being written
        return max((int(json.loads(line).get("step") or 0) for line in whole), default=0)
    except (OSError, ValueError, AttributeError):
        return 0


def failed(folder: str | Path) -> list[str]:
    """The cells that failed in the last call, by the table of the study."""
    with open(Path(folder) / "table.csv", encoding="utf-8", newline="") as file:
        return list(dict.fromkeys(row["cell"] for row in csv.DictReader(file) if row["status"] == "failed"))
