"""What the machinery of studies costs: `emformer ablate` against the same runs made one by one with `emformer fit`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import emformer as emf
from emformer import plans
from emformer.studies.jobs import environment
from emformer.training.data import read_text

Timing = Callable[[Callable[[], Any], Callable[[], Any], int, int], dict]
CONFIG = Path(__file__).parents[2] / "configs" / "grammar.yaml"
STEPS, SEEDS = 200, 3  # of two levels; about 20 seconds a cell


def study_overhead(alternating: Timing, rounds: int) -> dict:
    """a study of 6 cells, one at a time, start to report / `emformer fit` of the same 6  goal <= 1.05"""
    used: dict[str, float] = {}

    def run(kind: str, *words: str | Path) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "emformer", *map(str, words)]
        subprocess.run(command, env=environment(1, os.environ), check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used[kind] = used.get(kind, 0.0) + after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = {
            "title": "what a study costs",
            "base": str(CONFIG),
            "settings": {"data": {"cache": str(folder / "cache")}, "training": {"max_steps": STEPS, "accelerator": "cpu"}},
            "factors": {"position": {"rope": {}, "none": {"model": {"positions": []}}}},
            "outcomes": {"loss": {"metric": "val_loss"}},
            "seeds": SEEDS,
            "engine": {"class_path": "Local", "init_args": {"processes": 1}},
        }
        file = folder / "study.yaml"
        file.write_text(yaml.safe_dump(plan))
        cells = plans.cells(plans.read_plan(file))
        read_text(cells[0].settings.data)  # for both sides
        for cell in cells:
            (folder / f"{cell.name}.yaml").write_text(yaml.safe_dump(emf.parts.plain(cell.settings)))
        begin = time.monotonic()

        def place_for(kind: str) -> Path:
            return folder / f"{kind}-{time.monotonic() - begin:.3f}"

        def study() -> None:
            run("study", "ablate", file, "--out", place_for("study"))

        def by_hand() -> None:
            for cell in cells:
                run("fits", "fit", "-c", folder / f"{cell.name}.yaml", "--run", place_for("run"))

        found = _pairs(study, by_hand, max(1, rounds // 7))
    return found | {
        "goal": "<= 1.05",
        "cpu_ratio": used["study"] / used["fits"],
        "seconds_a_cell": found["second_ms"] / 1e3 / len(cells),
    }


def _pairs(a: Callable[[], None], b: Callable[[], None], rounds: int) -> dict:
    """As `alternating`, without its rounds of warming up: these take minutes, in fresh processes."""
    ratios, seconds = [], ([], [])
    for k in range(rounds):
        for which in (0, 1) if k % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            (a, b)[which]()
            seconds[which].append(time.perf_counter() - begin)
        ratios.append(seconds[0][-1] / seconds[1][-1])
    ratios.sort()
    middle = (ratios[(rounds - 1) // 2] + ratios[rounds // 2]) / 2
    first, second = (1e3 * sum(some) / rounds for some in seconds)
    return {
        "ratio": middle,
        "quartile_low": ratios[0],
        "quartile_high": ratios[-1],
        "first_ms": first,
        "second_ms": second,
        "rounds": rounds,
    }


BENCHES = (study_overhead,)
