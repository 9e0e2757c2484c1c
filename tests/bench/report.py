"""How long a report takes to open in a browser."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs

import emformer as emf
from emformer.figures.scene import stage
from emformer.observables import Look
from emformer.observables.breathing import Breathing
from emformer.observables.clustering import Clustering
from emformer.observables.flow import Flow, Transport
from emformer.recordings import Recordings
from emformer.report import write
from emformer.text import Prompts
from emformer.training import record

Timing = Callable[[Callable[[], Any], Callable[[], Any], int, int], dict]
CONFIG = Path(__file__).parents[2] / "configs" / "default.yaml"
VOCAB, STEPS = 1024, (0, 1, 3, 10, 30, 100, 300, 1000, 1300)  # as configs/default.yaml records


def report_opens(alternating: Timing, rounds: int) -> dict:
    """a report of the default model, all its records, opened and its first figure drawn / plotly.js alone    goal <= 3 s"""
    torch.manual_seed(0)
    model = emf.Emformer(VOCAB, **vars(emf.read_settings(CONFIG).model)).eval()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (128, 64))
    looks = [Look([Flow(), Transport(), Clustering(), Breathing()])]
    rows, _ = record(model, Prompts(tokens, 64 * np.arange(len(tokens))), looks)
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        folder = Path(place)
        writer = Recordings(folder / "records.jsonl", -1)
        for step in STEPS:
            writer.append(step, rows)
        writer.close()
        stage(model, None, tokens[:8]).save(folder / "scene.safetensors")
        (folder / "analysis.json").write_text(json.dumps({"source": "the default model, untrained"}))
        report, bare = write(folder), folder / "bare.html"
        bare.write_text(f"<!doctype html><meta charset=utf-8><script>{get_plotlyjs()}</script>", encoding="utf-8")
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])

        def opened(path: Path, ready: str) -> None:
            page = started.new_page(viewport={"width": 1180, "height": 900})
            page.goto(path.as_uri())
            while not page.evaluate(ready):
                page.wait_for_timeout(5)
            page.close()

        found = alternating(
            lambda: opened(report, "document.querySelector('figure[data-drawn]') !== null"),
            lambda: opened(bare, "typeof Plotly === 'object'"),
            max(3, rounds // 3),
            1,
        )
        found |= {"goal": "<= 3 s", "seconds": found["first_ms"] / 1e3, "megabytes": report.stat().st_size / 1e6}
        started.close()
    return found


BENCHES = (report_opens,)
