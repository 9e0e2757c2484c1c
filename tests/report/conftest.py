"""A scene, records and folders to report on, full of text that means harm, and a browser to look at the page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import model
from pages import HOSTILE, recorded
from playwright.sync_api import Browser, sync_playwright

from emformer.cli import main
from emformer.ffn import ReLU2
from emformer.figures.scene import Scene, stage
from emformer.positions import RoPE

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


@pytest.fixture(scope="session")
def scene() -> Scene:
    """Two layers of two heads on 3 prompts of 16 tokens, of which every word is hostile."""
    torch.manual_seed(0)
    small = model(vocab=len(HOSTILE), dim=16, positions=[RoPE()], ffn=ReLU2())
    tokens = np.stack([np.random.default_rng(k).permutation(len(HOSTILE)) for k in range(3)])
    staged = stage(small, None, tokens, tokens % 3 - 1, ["<i>class</i>"], title="<script>hacked=1</script>")
    words = [[HOSTILE[one] for one in prompt] for prompt in tokens]
    top = [[[HOSTILE[(t + k) % len(HOSTILE)] for k in range(5)] for t in range(16)] for _ in staged.states]
    return replace(staged, words=words, lens_words=top)


@pytest.fixture(scope="session")
def analysis(tmp_path_factory: pytest.TempPathFactory, scene: Scene) -> Path:
    """A folder as emformer analyze leaves it; no test may change it."""
    folder = recorded(tmp_path_factory.mktemp("reports") / "hostile <i>")
    scene.save(folder / "scene.safetensors")
    (folder / "analysis.json").write_text(
        json.dumps({"source": HOSTILE[0], "request": {"text": HOSTILE[2], "tokens": 4800, "steps": [0, 100]}})
    )
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps on a text of markup; no test may change it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(" ".join(HOSTILE).replace("\x00", "").replace("\u2028\u2069", "") * 40, encoding="utf-8")
    callbacks = [{"class_path": f"{name}Callback"} for name in ("Flow", "Clustering", "Breathing")]
    (folder / "callbacks.yaml").write_text(json.dumps({"callbacks": callbacks, "probe": {"prompts": 32, "length": 16}}))
    options = {
        "run": folder / "run",
        "data.path": folder / "text.txt",
        "data.tokenizer": "Bytes",
        "data.cache": folder / "cache",
        "training.accelerator": "cpu",
        "training.max_steps": 4,
        "training.validate_every": 2,
        "training.sample": 0,
        "model.dim": 16,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    main(["fit", "-c", str(SMOKE), "-c", str(folder / "callbacks.yaml"), *words])
    return folder / "run"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless browser. Where the environment says CI it must be there, elsewhere its tests are skipped without."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        reason = f"no browser ({', '.join(BROWSERS)}): apt-get install chromium-headless-shell"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()
