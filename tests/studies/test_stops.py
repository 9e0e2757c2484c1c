"""Killed at random moments and called again, an analysis ends with the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_kills_change_nothing(tmp_path: Path):
    script = Path(__file__).with_name("stops.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "6"],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    places = {tuple(place) for place in found["struck"]}
    assert len(places) >= 3 and any(at for _, at in places), f"the kills struck too few places to prove anything: {found}"
    assert all(found["equal"].values()), found
    assert found["rows"] > 1000
    kept = {"analysis.json", "environment.json", "figures", "records.jsonl", "records.parquet"}
    assert set(found["left"]) == kept | {"scene.safetensors", "tokenizer.json"}, "nothing of the killed ones is left"
