"""Train and record in child processes, kill them at random moments, resume, and compare with a run that was left alone.

Run as a script, so that the parent is a process that has imported everything and computed nothing: its forks start at once.

    python kills.py FOLDER WORKERS KILLS

Prints one JSON line: the steps at which the kills struck, and whether weights, optimiser state, metrics and records are equal.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import small  # beside this script
import torch

from emformer.records import Run, read_journal
from emformer.settings import Probe, Settings
from emformer.training import BreathingCallback, ClusteringCallback, Every, FlowCallback, LogSpaced, fit

STEPS = 240


def plan(folder: Path, workers: int) -> Settings:
    """A small model with dropout in one layer, accumulation, and every cadence out of step with the others."""
    callbacks = [FlowCallback(Every(10), 4), ClusteringCallback(Every(36), 6), BreathingCallback(LogSpaced(4, first=20), 40)]
    whole = small.settings(
        folder,
        model={"dim": 32, "depth": 2, "context": 32, "layers": {1: {"dropout": 0.2}}},
        data={"workers": workers},
        max_steps=STEPS,
        accumulate=2,
        validate_every=15,
        validation_windows=None,
        sample=5,
    )
    return replace(whole, callbacks=callbacks, probe=Probe(prompts=40, length=16))


def child(settings: Settings, run: Path, kill_after: float | None) -> int:
    """Run `fit` in a fork; SIGKILL its whole process group after so many seconds. Returns the exit status."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 1
        try:
            torch.set_num_threads(1)
            fit(settings, run, resume=True)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def rows(run: Run) -> list[dict]:
    """The metrics, but for the speed, which is the machine's."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_journal(run.metrics)]


def main() -> None:
    folder, workers, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    small.text(folder / "text.txt", "alpha beta gamma delta to of and", 4000)
    config = plan(folder, workers)

    begin = time.perf_counter()
    assert child(config, folder / "whole", None) == 0
    length = time.perf_counter() - begin

    draw, struck = random.Random(workers), []
    for _ in range(kills):
        status = child(config, folder / "killed", draw.uniform(0.8, 2.5) / kills * length)
        steps = [row["step"] for row in read_journal(folder / "killed" / "metrics.jsonl")] if status else [STEPS]
        struck.append(max(steps, default=0))
        if not status:
            break
    assert child(config, folder / "killed", None) == 0

    whole, killed = Run(folder / "whole"), Run(folder / "killed")
    a, b = (torch.load(run.last, weights_only=True) for run in (whole, killed))
    print(
        json.dumps(
            {
                "struck": struck,
                "weights": small.same(a["state_dict"], b["state_dict"]),
                "optimizer": small.same(a["optimizer_states"], b["optimizer_states"]),
                "metrics": rows(whole) == rows(killed),
                "records": list(read_journal(whole.records)) == list(read_journal(killed.records)),
                "parquet": pd.read_parquet(whole.parquet).equals(pd.read_parquet(killed.parquet)),
                "steps": whole.steps == killed.steps,
                "count": [len(rows(whole)), len(list(read_journal(whole.records)))],
            }
        )
    )


if __name__ == "__main__":
    main()
