"""Analyse a run in child processes, kill them at random moments, call them again, and compare with one that was left alone.

Run as a script, so that the parent is a process that has imported everything and computed nothing: its forks start at once.

    python stops.py FOLDER KILLS

Prints one JSON line: where the kills struck, and whether records and Parquet are the same bytes.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny  # beside this script
import torch

from emformer.observables import Look, state
from emformer.observables.breathing import Breathing
from emformer.observables.clustering import Clustering
from emformer.observables.energy import Energy
from emformer.observables.flow import Flow, Transport
from emformer.observables.operators import Operators
from emformer.observables.sinks import Sinks
from emformer.parts import UserError
from emformer.records import Run
from emformer.studies import analysis

analysis.SAVE_EVERY, analysis.SAVE_SHARE = 0.05, 0.5  # of seconds, not of half minutes
MEASURED = [
    Look([Flow(), Clustering(points=100), Breathing(points=150)]),
    Look([Breathing(points=100)], 100, "shuffled"),
    Look([Energy(), Sinks(prompts=50), Transport(projections=4)], 151),
    Look([Operators(control=False)], 7),
]


def child(run: Path, out: Path, kill_after: float | None) -> int:
    """Run `analyze` in a fork; SIGKILL it after so many seconds. Returns the exit status."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            torch.set_num_threads(1)
            analysis.analyze(
                run, corpus=tiny.CORPUS, out=out, observables=MEASURED, checkpoints="all", batch=8, length=32, report=False
            )
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def reached(out: Path) -> tuple[int, int]:
    """(steps done, prompts of the next one in the saved state)."""
    try:
        done = len(json.loads((out / "analysis.json").read_text())["done"])
        return done, int(state.read(out / "unfinished" / "state.safetensors").about["at"])
    except (OSError, UserError):
        return 0, 0


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    pid = os.fork()  # training may leave threads behind
    if pid == 0:
        tiny.trained(folder, steps=2)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    begin = time.perf_counter()
    assert child(folder / "run", folder / "whole", None) == 0
    length = time.perf_counter() - begin
    draw, struck = random.Random(0), []
    for _ in range(kills):
        if not child(folder / "run", folder / "killed", draw.uniform(0.5, 2.0) / kills * length):
            break
        struck.append(reached(folder / "killed"))
    assert child(folder / "run", folder / "killed", None) == 0
    whole, killed = Run(folder / "whole"), Run(folder / "killed")
    equal = {
        name: (whole.path / name).read_bytes() == (killed.path / name).read_bytes()
        for name in ("records.jsonl", "records.parquet", "scene.safetensors")
    }
    left = sorted(path.name for path in killed.path.iterdir())
    print(json.dumps({"struck": struck, "equal": equal, "rows": len(whole.records.read_bytes().splitlines()), "left": left}))


if __name__ == "__main__":
    main()
