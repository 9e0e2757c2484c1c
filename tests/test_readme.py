"""The README is run: its commands, its Python, and what it says of configurations and files.

Everything happens in a temporary folder with copies of `configs` and `train`, in the order of the text, so that a block may
use what an earlier one made. What is shrunken, and nothing else is:

* `make TARGET` is shown by `make -n` in the repository; the `emformer` lines that it would run are then run as below;
* `emformer fit` gets two steps, two rows a batch, a few validation windows and prompts (`SHORT`), after its own options;
* `python train/…` gets the options in `SCRIPTS`, after its own; FILE is a small text;
* `emformer simulate` gets the fields of the experiment's small example, after its own options;
* `emformer ablate` gets one seed, cells as short as those runs (`CELLS`), and trains them in this process;
* `emformer study` gets six prompts of 16 tokens;
* every other `emformer` command and every Python block is run as it stands.

Other commands, and fences of another language, fail: whoever writes one says here what becomes of it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from emformer import cli, parts, plans, recipes
from emformer.configuration import read_yaml
from emformer.studies.cell import run as train_cell
from emformer.studies.jobs import Event, Job

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHELL, PYTHON, DIAGRAM = {"bash", "sh", "shell", "console"}, {"python", "py"}, {"", "text", "yaml"}
SHORT = {
    "training.max_steps": 2,
    "training.batch": 2,
    "training.accumulate": 1,
    "training.validation_windows": 2,
    "training.sample": 3,
    "training.accelerator": "cpu",
    "training.devices": 1,
    "training.strategy": "auto",
    "probe.prompts": 40,
}
CELLS = [
    "--seeds=1",
    "--settings="
    + json.dumps(
        {
            "training": {name.removeprefix("training."): value for name, value in SHORT.items() if name.startswith("training.")},
            "model": {"dim": 32, "context": 32},
            "probe": {"prompts": 8},
            "callbacks": [
                {
                    "class_path": "ObservableCallback",
                    "init_args": {"observables": [{"class_path": "Energy"}], "cadence": {"class_path": "AtEnd"}, "prompts": 8},
                }
            ],
        }
    ),
]
SCRIPTS = {
    "train/ablate.py": CELLS,
    "train/analyze.py": ["--tokens", "1500"],
    "train/compare.py": ["--steps", "2", "--every", "2", "--seeds", "1"],
    "train/obstructions.py": ["--shown", "shown"],
    "train/simulate.py": ["--time", "2"],
    "train/variants.py": ["lowrank", "sinkhorn", "--steps", "2", "--rounds", "2"],
}
# words of a command that sets the project up; looked at, not run
SETUP = {"git", "cd", "pip"}


class Block(NamedTuple):
    line: int
    language: str
    text: str


def blocks() -> list[Block]:
    """Every fenced block of the README, in order."""
    found: list[Block] = []
    language, start, body = None, 0, []
    for number, line in enumerate(README.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*(```+|~~~+)\s*([\w+-]*)", line)
        if not fence:
            body.append(line)
        elif language is None:
            language, start, body = fence[2].lower(), number, []
        else:
            found.append(Block(start, language, "\n".join(body)))
            language = None
    assert language is None, f"the fence of line {start} is not closed"
    return found


def commands(block: Block) -> list[str]:
    """The commands of a shell block; of a console block those after a prompt."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


class Here(parts.Engine):
    """The cells of a study in this process: what is shown is what they are, not how they are started."""

    def run(self, jobs: Sequence[Job], tell: Callable[[Event], None]) -> None:
        for job in jobs:
            train_cell(Path(job.command[3]), job.name)
            tell(Event("finished", job.name))

    def script(self, jobs: Sequence[Job]) -> str:
        return "\n".join(job.name for job in jobs)


def shown(folder: Path) -> None:
    """The table of an obstructions study as it would be, with numbers that mean nothing."""
    plan = plans.read_plan(ROOT / "configs" / "ablations" / "obstructions.yaml", scale="small")
    rows = [
        {"cell": f"{k}", **levels, "seed": 0, "status": "finished", "outcome": name, "value": 0.01 * k}
        for k, levels in enumerate(plan.combinations())
        for name in plan.outcomes
    ]
    folder.mkdir()
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)


def test_there_is_something_to_run():
    found = blocks()
    unknown = {block.language for block in found} - SHELL - PYTHON - DIAGRAM
    assert not unknown, f"no test knows what to do with blocks of {unknown}"
    assert any(block.language in SHELL and commands(block) for block in found), "README.md shows no command"
    assert any(block.language in PYTHON for block in found), "README.md shows no Python"
    for block in found:
        if block.language == "":  # a diagram must not hide a command
            hidden = [
                line for line in block.text.splitlines() if re.match(r"\s*(\$ |emformer (fit|val|gen|info)|make |python )", line)
            ]
            assert not hidden, f"line {block.line}: mark this block as sh"


def test_it_is_finished():
    left = [line for line in README.read_text().splitlines() if re.search(r"\b(FILL|TODO|TBD|XXX|FIXME)\b", line)]
    assert not left, left


def run_shell(command: str, folder: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[0].endswith("/emformer"):
        words[0] = "emformer"
    if words[:3] == ["python", "-m", "emformer"]:
        words[:3] = ["emformer"]
    if words[0] == "make":
        shown = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
        for line in shown.stdout.splitlines():
            if re.match(r"\S*/emformer ", line):
                run_shell(line, folder)
    elif words[0] == "emformer":
        if "fit" in words[1:2]:
            words += [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
        if "ablate" in words[1:2] and "--help" not in words:
            words += [*CELLS, "--engine", "test_readme.Here"]
        if "study" in words[1:2] and "--help" not in words:
            words += ["--prompts", "6", "--length", "16"]
        if "simulate" in words[1:2] and "--help" not in words:
            asked = [word for word in words[2:] if word not in ("--out", "--overwrite") and not word.startswith("simulations/")]
            small = type(recipes.EXPERIMENTS.choose(asked)).examples()[0]
            words += [
                word
                for name, value in recipes.EXPERIMENTS.plain(small).items()
                for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
            ]
            # the many small steps of a simulation are ten times as fast without the checks of types that tests have
            done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return
        try:
            cli.main(words[1:])
        except SystemExit as end:
            assert not end.code, f"{command}: exit code {end.code}"
    elif words[0] in ("python", "python3"):
        assert (ROOT / words[1]).is_file(), f"{command}: there is no {words[1]}"
        assert words[1] in SCRIPTS, f"{command}: say in SCRIPTS how it is made short"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        done = subprocess.run(
            [sys.executable, *words[1:], *SCRIPTS[words[1]]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    else:
        assert words[0] in SETUP, f"no test knows how to run: {command}"


def test_its_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in ("configs", "train"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shown(tmp_path / "shown")
    (tmp_path / "FILE").write_text("a text of one's own, said again and again and again\n" * 400)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in blocks():
        place = f"README.md, line {block.line}"
        if block.language in SHELL:
            for command in commands(block):
                run_shell(command, tmp_path)
                ran += 1
                if command.startswith(("emformer validate", "emformer info", "emformer generate", "emformer records")):
                    assert capsys.readouterr().out.strip(), f"{place}: {command} printed nothing"
        elif block.language in PYTHON:
            exec(compile(block.text, place, "exec"), {"__name__": "readme"})
            ran += 1
    assert ran >= 2
    assert (tmp_path / "runs").is_dir(), "nothing was trained"


def test_the_configurations_it_names_are_those_there_are():
    content = README.read_text()
    there = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    there |= {
        f"{folder}/{path.name}" for folder in ("theory", "ablations") for path in (ROOT / "configs" / folder).glob("*.yaml")
    }
    told = set(re.findall(r"`(?:configs/)?([\w./-]+\.yaml)`", content)) - {"config.yaml"}
    assert told == there, told ^ there


def test_its_table_has_every_variant():
    variants = {path.stem for path in (ROOT / "configs" / "variants").glob("*.yaml")}
    table = README.read_text().split("| variant |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| ([\w-]+) +\|", table, re.MULTILINE)) == variants


def test_its_table_has_every_experiment():
    """Each with the configurations that are of it."""
    table = README.read_text().split("| experiment | what")[1].split("\n\n")[0]
    told = {
        row[0]: set(re.findall(r"`([\w./-]+)`", row[2]))
        for row in re.findall(r"^\| ([\w-]+) \| (.+) \| (.+) \|$", table, re.MULTILINE)
    }
    there: dict[str, set[str]] = {name: set() for name in recipes.EXPERIMENTS.titles()}
    for path in (ROOT / "configs" / "theory").glob("*.yaml"):
        there[read_yaml(path)["experiment"]].add(f"theory/{path.name}")
    assert told == there


def test_its_table_has_every_study():
    table = README.read_text().split("| study | what it asks")[1].split("\n\n")[0]
    assert dict(re.findall(r"^\| ([\w-]+) \| (.+) \|$", table, re.MULTILINE)) == recipes.STUDIES.titles()


def test_the_files_it_names_are_there():
    content = README.read_text()
    for path in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", content) + re.findall(
        r"`((?:train|configs|tests|data)/[\w./-]+)`", content
    ):
        assert (ROOT / path).exists(), f"README.md names {path}"


def test_the_commands_and_options_it_names_exist():
    content = README.read_text()
    words = set(
        re.findall(
            r"\bemformer (\w+) ", "\n".join(line for block in blocks() if block.language in SHELL for line in commands(block))
        )
    )
    assert words <= set(cli.COMMANDS), words
    assert set(cli.COMMANDS) <= set(re.findall(r"\w+", content))


def test_the_tree_it_prints_is_the_tree():
    """Every file and folder of the package stands in the block that begins with `emformer/`, and no other does."""
    trees = [block.text for block in blocks() if block.text.startswith("emformer/\n")]
    assert len(trees) == 1
    package = trees[0].split("\ntrain/")[0]
    told = set(re.findall(r"(?<![\w/])([a-z_]+(?:\.py|/))(?=\s)", package)) - {"emformer/"}
    top = {path.relative_to(ROOT / "emformer").parts for path in (ROOT / "emformer").rglob("*.py")}
    there = {parts[0] if len(parts) == 1 else f"{parts[0]}/" for parts in top if not parts[0].startswith("_")}
    assert told == there, told ^ there
