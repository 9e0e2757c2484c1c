"""Two processes are one process with half the rows each; interrupted, they resume exactly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from emformer.records import Run, read_journal

CONFIG = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def command(run: Path, devices: int, objective: str) -> list[str]:
    return [
        *(sys.executable, "-m", "emformer", "fit", "-c", str(CONFIG), "--run", str(run), "--resume"),
        *("--data.cache", str(run.parent / "cache"), "--training.precision", "64", "--training.accelerator", "cpu"),
        *("--training.strategy", "ddp" if devices > 1 else "auto", "--training.devices", str(devices)),
        *("--training.objective", objective, "--training.max_steps", "40", "--training.batch", "8"),
        *("--training.accumulate", "2", "--training.validate_every", "10", "--training.save_every", "5"),
        *("--training.sample", "0", "--training.validation_windows", "20"),
    ]


def start(run: Path, devices: int, objective: str = "NextToken") -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(run, devices, objective), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> None:
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == code, errors


def curve(run: Path, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in read_journal(run / "metrics.jsonl") if key in row}


@pytest.mark.parametrize("objective", ["NextToken", "MaskedToken"])
def test_two_processes_follow_one(tmp_path: Path, objective: str, pytestconfig: pytest.Config):
    if objective != "NextToken" and not pytestconfig.getoption("thorough"):
        pytest.skip("another objective changes nothing in how processes share work: with --thorough")
    finish(start(tmp_path / "one", 1, objective))
    finish(start(tmp_path / "two", 2, objective))
    one, two = tmp_path / "one", tmp_path / "two"
    for key in ("val_loss", "train_loss"):
        a, b = curve(one, key), curve(two, key)
        assert a.keys() == b.keys() and len(a) >= 4
        assert max(abs(a[step] - b[step]) for step in a) < 1e-5
    weights = [torch.load(Run(run).last, weights_only=True)["state_dict"] for run in (one, two)]
    assert max((weights[0][k] - weights[1][k]).abs().max() for k in weights[0]) < 1e-5
    assert yaml.safe_load((two / "config.yaml").read_text())["training"]["devices"] == 2


def test_interrupted_processes_resume_exactly(tmp_path: Path):
    finish(start(tmp_path / "whole", 2))
    cut = tmp_path / "cut"
    process = start(cut, 2)
    deadline = time.time() + 120
    while time.time() < deadline:  # until it has trained a little
        if (cut / "metrics.jsonl").exists() and len(curve(cut, "train_loss")) >= 7:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    step = torch.load(Run(cut).last, weights_only=True)["global_step"]
    assert 7 <= step < 40
    finish(start(cut, 2))
    a, b = (torch.load(Run(run).last, weights_only=True)["state_dict"] for run in (tmp_path / "whole", cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert curve(tmp_path / "whole", "val_loss") == curve(cut, "val_loss")
    assert curve(tmp_path / "whole", "train_loss") == curve(cut, "train_loss")
