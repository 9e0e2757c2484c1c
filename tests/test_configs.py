"""Every configuration is parsed, built and trained, and explains itself."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from configurations import CONFIGS, EXPERIMENTS, FOLDER, files, name

from emformer import cli, recipes
from emformer.records import load, read_journal, read_settings
from emformer.text import Grammar

named = pytest.mark.parametrize("config", CONFIGS, ids=name)


def paths(value: Any, prefix: str = "") -> list[str]:
    """Dotted names of everything a file says, in the order of its lines."""
    if not isinstance(value, dict):
        return []
    found = []
    for key, item in value.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        found += [dotted, *paths(item, dotted)]
    return found


def test_there_are_configurations():
    assert {"default", "smoke"} <= {path.stem for path in CONFIGS}
    assert not list(FOLDER.rglob("*.yml")), "one ending, so that none is missed"


@named
def test_it_begins_with_what_it_is_for(config: Path):
    first = config.read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 30


def test_every_key_of_the_default_is_there_and_commented():
    """The default file is the reference of all settings: each is in it, and each line says what it is.

    A comment stands on the key's own line, or on the line of the group that it belongs to.
    """
    content = (FOLDER / "default.yaml").read_text()
    settings = yaml.safe_load(content)
    from emformer.settings import Data, Embedding, Model, Probe, Schedule, Training

    for section, cls in (("model", Model), ("data", Data), ("training", Training), ("probe", Probe)):
        assert set(settings[section]) == set(cls.__dataclass_fields__), section
    assert set(settings["model"]["embedding"]) == set(Embedding.__dataclass_fields__)
    assert set(settings["training"]["schedule"]) == set(Schedule.__dataclass_fields__)

    bare, stack = [], []
    for line in content.splitlines():
        match = re.match(r"(\s*)(?:- )?\{?\w+:(.*)", line)
        if not match:
            continue
        depth, rest = len(match[1]), match[2]
        stack = [(d, c) for d, c in stack if d < depth]
        commented = "#" in rest or any(c for _, c in stack)
        if rest.strip() and not commented:
            bare.append(line)
        stack.append((depth, "#" in rest))
    # what a part's line leaves unsaid (Muon, ReLU2), the line of the other choices says
    assert not bare, "\n".join(bare)


@named
def test_what_differs_from_the_default_is_explained(config: Path):
    """Every file but the default is a recipe: it has a comment for every ten lines or so, and none is longer than a line."""
    lines = config.read_text().splitlines()
    comments = [line for line in lines if "#" in line]
    assert len(comments) * 12 >= len(lines)
    assert all(len(line) <= 140 and "\t" not in line and line == line.rstrip() for line in lines)


def strictly(config: Path) -> dict:
    """What a file says, each key of it once."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{config}: a key stands twice among {keys}"
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return yaml.load(config.read_text(), Strict)


@named
def test_no_key_is_misspelt_or_said_twice(config: Path, capsys: pytest.CaptureFixture[str]):
    said = strictly(config)
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", *files(config), "--print_config"])
    assert not end.value.code
    resolved = set(paths(yaml.safe_load(capsys.readouterr().out)))
    # a part may be written {class_path: X} or X; `functional: {}` is a class without arguments
    missing = [dotted for dotted in paths(said) if dotted not in resolved]
    assert not missing, missing


def test_every_experiment_has_a_configuration():
    assert set(recipes.EXPERIMENTS.titles()) <= {strictly(config)["experiment"] for config in EXPERIMENTS}


@pytest.mark.parametrize("config", EXPERIMENTS, ids=name)
def test_an_experiment_is_set_out_in_full(config: Path):
    """Above: its source, what outcome to expect and how long it takes; then every field, with what it does and its range."""
    lines = config.read_text().splitlines()
    assert all(len(line) <= 140 and "\t" not in line and line == line.rstrip() for line in lines)
    above = [line for line in lines if line.startswith("#")]
    assert above == lines[: len(above)] and len(above) >= 3 and len(above[0]) > 30
    told = " ".join(above).lower()
    assert "math" in told and "expected" in told and re.search(r"\d+ (s|seconds|minutes?)\b", told)
    said = strictly(config)
    experiment = recipes.EXPERIMENTS.read(config)
    assert said == recipes.EXPERIMENTS.plain(experiment) and list(said) == list(recipes.EXPERIMENTS.plain(experiment)), (
        "every field, in its order"
    )
    for line in lines[len(above) + 1 :]:
        assert re.match(r"\w+: [^#]+# .{3,}", line), line


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small grammar is tokenised once for all."""
    return tmp_path_factory.mktemp("cache")


SHRUNKEN = {
    "training.accumulate": 1,
    "training.max_steps": 2,
    "training.validation_windows": 2,
    "training.sample": 3,
    "training.accelerator": "cpu",
    "training.devices": 1,
    "training.strategy": "auto",
    "data.workers": 0,
    "probe.prompts": 40,
}


@named
def test_it_trains_two_steps(config: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]):
    """With the model as it stands; only the batch, the text and what is shown are small (of GPT-2, one step of one row)."""
    stated = read_settings(*files(config)[1::2])
    options: dict[str, Any] = SHRUNKEN | {"data.cache": tmp_path / "cache", "training.batch": 2}
    if isinstance(stated.data.corpus, Grammar):
        options |= {"data.corpus.sentences": 2000, "data.cache": cache}
    if stated.model.dim * stated.model.context > 200_000:
        options |= {"training.batch": 1, "training.validation_windows": 1, "training.max_steps": 1, "training.sample": 0}
    if config.parent == FOLDER / "variants":
        options |= {"callbacks": "[]"}  # those of the file that it lies on
    steps = options["training.max_steps"]
    run = tmp_path / "run"
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    cli.main(["fit", *files(config), "--run", str(run), *words])
    assert f"({steps} steps)" in capsys.readouterr().out
    assert (run / "records.jsonl").exists() == bool(stated.callbacks and "callbacks" not in options)
    found = list(read_journal(run / "metrics.jsonl"))
    losses = [row["train_loss"] for row in found if "train_loss" in row]
    # every configuration starts near the uniform prediction, and the rate is small enough for the second step
    loaded = load(run)
    assert len(losses) == steps and losses[0] == pytest.approx(math.log(loaded.model.vocab), abs=0.6)
    assert losses[-1] < losses[0] + 0.5 and found[-1]["val_loss"] < losses[0] + 0.5
    assert loaded.step == steps and loaded.config.model == stated.model
    shutil.rmtree(run)  # gigabytes, of the large one
