"""The command line in this process: what it printed, the code it ended with, and a finished run to ask about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from emformer.cli import main

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> str:
        """The one sentence of a mistake; every one of `words` is in it."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("emformer: ") and "Traceback" not in lines[0], self.err
        assert not self.out, self.out
        for word in words:
            assert word in lines[0], (word, lines[0])
        return lines[0]


@pytest.fixture
def emformer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Call the command line with words."""

    def call(*words: str | Path) -> Answer:
        capsys.readouterr()
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, text: Path) -> list[str]:
    """Options that make of any configuration a run of two steps on the small text, on this CPU."""
    options = {
        "data.path": text,
        "data.tokenizer": "Bytes",
        "data.cache": tmp_path_factory.mktemp("cache"),
        "training.accelerator": "cpu",
        "training.max_steps": 2,
        "training.batch": 2,
        "training.validation_windows": 2,
        "training.sample": 4,
        "model.dim": 16,
        "model.depth": 1,
        "model.context": 16,
    }
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """A finished run; no test may change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["fit", "-c", str(SMOKE), "--run", str(folder), *small])
    return folder


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A folder with records of ten steps, and beside it `other` with those of one."""
    from emformer.observables import Row
    from emformer.recordings import Recordings

    run, other = tmp_path / "recorded", tmp_path / "other"
    for folder, steps in ((run, [0, *(2**k for k in range(10) if k != 4)]), (other, [0])):
        folder.mkdir()
        writer = Recordings(folder / "records.jsonl", -1)
        for step in steps:
            for layer in (0, 1):
                mean = step * (1 + 2 * layer) + layer + 0.123
                writer.append(step, [Row(layer, "ffn", "flow.test", mean, 0.5, 0.12, 60, 4, 0.25, 0.01)])
            if folder == run:
                writer.append(step, [Row(layer, None, "clu.test", None, n_dropped=64) for layer in (2, 4)])
                sinks = [
                    Row(0, "attn", "sinks.test.undefined", 0.00012345, head=k, cloud="centred", param="k=4") for k in range(4)
                ]
                writer.append(step, sinks if step < 2 else [])
        writer.close()
    return run
