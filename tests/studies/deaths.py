"""Run a study in child processes, kill them and their cells at random moments, run it again, and compare with one that was left
alone.

Run as a script, so that the parent is a process that has imported everything and computed nothing: its forks start at once, those
of cells too. Everything else of a cell's process is as it is otherwise: its pipe, its lock, its log.

    python deaths.py FOLDER KILLS

Prints one JSON line: how often whom the kills struck, and what was equal.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml

from emformer.parts import UserError
from emformer.plans import Measure, Plan
from emformer.studies import ablation, cell, jobs
from emformer.studies.cells import failed
from emformer.studies.engines import local

HOME = Path(__file__).parents[2]
STEPS, CELLS = 40, 4
DONE, LAST = "finished/*.json", "*/checkpoints/last.ckpt"


class Forked:
    """Looks like a Popen of a cell, and is a fork that runs the same main function with the same words, pipe, log and session."""

    def __init__(self, command, stdin, stdout, stderr, env, start_new_session):
        read, write = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.dup2(read, 0)
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                os.closerange(3, 256)
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                sys.argv = list(command)[2:]
                torch.set_num_threads(1)
                cell.main()
                code = 0
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(read)
        self.stdin = SimpleNamespace(close=lambda: os.close(write))
        os.set_inheritable(write, False)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def plan(folder: Path, **changes) -> Plan:
    """Two levels and two seeds of a tiny model, each cell a second or two; validated and saved often."""
    settings = yaml.safe_load((HOME / "configs" / "smoke.yaml").read_text())
    settings["model"] |= {"depth": 1}
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{k} times {k} is {k * k}, no more." for k in range(600)), encoding="utf-8")
    settings["data"] |= {"corpus": {"class_path": "File", "init_args": {"path": str(text)}}, "cache": str(folder / "cache")}
    settings["training"] |= {"max_steps": STEPS, "validate_every": 10, "save_every": 5, "sample": 0, "accelerator": "cpu"}
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump(settings))
    fields = {
        "title": "what positions are for",
        "base": str(base),
        "factors": {"position": {"rope": {}, "none": {"model": {"positions": []}}}},
        "outcomes": {"loss": Measure(metric="val_loss")},
        "seeds": 2,
        "engine": local.Local(processes=1),
    }
    return Plan(**(fields | changes))


def child(do: Callable[[], object]) -> int:
    """Start `do` in a fork; the code is 0 where it ends well, 2 for a UserError, which is said on stderr."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            do()
            code = 0
        except UserError as error:
            print(error, file=sys.stderr)
            code = 2
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    return pid


def code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def children(pid: int) -> list[int]:
    """Processes that this one has started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            found += [int(path.parent.name)] * (int(parent) == pid and state != "Z")
    return found


def free(out: Path) -> bool:
    """Whether no process works on a cell."""
    try:
        for lock in (out / "finished").glob(".*.lock"):
            with cell.alone(lock, "held"):
                pass
    except UserError:
        return False
    return True


def training(out: Path) -> bool:
    """Whether a cell has a checkpoint, and has not ended."""
    begun = {path.parents[1].name for path in (out / "cells").glob(LAST)}
    return bool(begun - {path.stem for path in out.glob(DONE)}) or len(list(out.glob(DONE))) == CELLS


def kept(out: Path) -> dict[str, tuple[bytes, int]]:
    """What finished cells have: the bytes of their figures and weights, and when they were written."""
    found = {}
    for done in out.glob(DONE):
        for path in (done, *((out / "cells" / done.stem) / name for name in ("metrics.jsonl", "checkpoints/last.ckpt"))):
            found[str(path)] = (path.read_bytes(), path.stat().st_mtime_ns)
    return found


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    jobs.subprocess = SimpleNamespace(
        Popen=Forked, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired
    )
    whole, killed, stopped, one = folder / "whole", folder / "killed", folder / "stopped", plan(folder)
    said: dict[str, object] = {}

    def study(of: Plan, out: Path) -> int:
        return child(lambda: ablation.ablate(of, out=out, report=False))

    begin = time.monotonic()
    assert code(study(one, whole)) == 0
    length = time.monotonic() - begin

    draw, struck, lost = random.Random(1), {"study": 0, "cell": 0}, 0
    before: dict[str, tuple[bytes, int]] = {}
    for k in range(kills):
        pid = study(one, killed)
        if k:
            time.sleep(draw.uniform(0.3, 0.6) * length)
        else:  # the first strikes while a cell trains, for sure
            while not training(killed):
                time.sleep(0.01)
        while k % 2 and len(list(killed.glob(DONE))) < CELLS:  # a cell, and a moment later the study
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(children(pid)[0], signal.SIGKILL)
                struck["cell"] += 1
                time.sleep(0.2)
                break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        struck["study"] += code(pid) < 0
        now = kept(killed)
        lost += any(now.get(name) != content for name, content in before.items())
        before = now
    assert code(study(one, killed)) == 0
    now = kept(killed)
    said |= {"struck": struck, "lost": lost + any(now.get(name) != content for name, content in before.items())}
    said["table"] = (killed / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    said["orphans"] = sum(path.read_text().count("stopped at step") for path in (killed / "logs").glob("*.txt"))
    said["resumed"] = sum("resumed" in path.read_text() for path in (killed / "cells").glob("*/environment.json"))

    pid = study(one, stopped)
    while not (stopped / "study.yaml").exists():
        time.sleep(0.01)
    said["second"] = code(study(one, stopped))  # while the first is at work
    while not training(stopped):
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    said |= {"stopped": code(pid), "free": free(stopped)}
    said["checkpoint"] = any("stopped at step" in path.read_text() for path in (stopped / "logs").glob("*.txt"))

    said["other"] = code(study(plan(folder, settings={"training": {"max_steps": 7}}), whole))
    before = kept(whole)
    levels = {**one.factors["position"], "lost": {"training": {"devices": 64}}}  # which divide no batch: known when it runs
    said["more"] = code(study(plan(folder, factors={"position": levels}, seeds=3), whole))
    said |= {"failed": failed(whole), "kept": kept(whole).items() >= before.items(), "finished": len(list(whole.glob(DONE)))}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
