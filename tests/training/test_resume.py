"""Killed at random moments and resumed, a run ends with the same bits and the same records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("workers", "kills"), [(0, 5), (2, 4)])
def test_kills_change_nothing(tmp_path: Path, pytestconfig: pytest.Config, workers: int, kills: int):
    if workers and not pytestconfig.getoption("thorough"):
        pytest.skip("processes that load batches have nothing of their own to lose: with --thorough")
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(workers), str(kills)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(set(found["struck"])) >= 2, f"the kills struck too few different steps to prove anything: {found}"
    assert all(found[what] for what in ("weights", "optimizer", "metrics", "records", "parquet", "steps")), found
    assert found["count"][0] > 100 and found["count"][1] > 1000
