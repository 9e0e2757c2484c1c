"""Train in child processes, kill them at random moments, resume, and compare with a run that was left alone.

Run as a script, so that the parent is a process that has imported everything and computed nothing: its forks start at once.

    python kills.py FOLDER WORKERS KILLS

Prints one JSON line: the steps at which the kills struck, and whether weights, optimiser state and records are equal.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from emformer.block import PreNorm
from emformer.ffn import ReLU2
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.norms import RMSNorm
from emformer.operators import LowRank
from emformer.positions import RoPE
from emformer.records import Run, read_journal
from emformer.settings import Data, Model, Settings, Training
from emformer.text import Bytes, File
from emformer.training import Muon, NextToken, fit

STEPS = 240


def settings(folder: Path, workers: int) -> Settings:
    """A small model with dropout in one layer, accumulation, and every cadence out of step with the others."""
    operator = LowRank(rank=8, update_std=0.5)
    return Settings(
        model=Model(
            dim=32,
            depth=2,
            heads=2,
            context=32,
            form=operator,
            content=operator,
            kernel=Softmax(),
            mask=Causal(),
            placement=PreNorm(),
            positions=[RoPE()],
            norm=RMSNorm(),
            ffn=ReLU2(update_std=0.5),
            layers={1: {"dropout": 0.2}},
        ),
        data=Data(corpus=File(str(folder / "text.txt")), tokenizer=Bytes(), cache=str(folder / "cache"), workers=workers),
        training=Training(
            objective=NextToken(),
            optimizer=Muon(),
            max_steps=STEPS,
            batch=8,
            accumulate=2,
            validate_every=15,
            save_every=7,
            sample=5,
            accelerator="cpu",
        ),
    )


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


def same(a, b) -> bool:
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def rows(run: Run) -> list[dict]:
    """The records, but for the speed, which is the machine's."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_journal(run.metrics)]


def main() -> None:
    folder, workers, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta", "to", "of", "and"], k=4000)
    (folder / "text.txt").write_text(" ".join(words))
    config = settings(folder, workers)

    begin = time.perf_counter()
    assert child(config, folder / "whole", None) == 0
    length = time.perf_counter() - begin

    draw, struck = random.Random(workers), []
    for _ in range(kills):
        status = child(config, folder / "killed", draw.uniform(0.08, 0.25) * length)
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
                "weights": same(a["state_dict"], b["state_dict"]),
                "optimizer": same(a["optimizer_states"], b["optimizer_states"]),
                "records": rows(whole) == rows(killed),
                "steps": whole.steps == killed.steps,
                "count": len(rows(whole)),
            }
        )
    )


if __name__ == "__main__":
    main()
