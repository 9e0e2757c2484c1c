"""`emformer simulate`: what it prints, writes and refuses, with an experiment of our own that takes no time."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import emformer as emf
from emformer import recipes
from emformer.parts import UserError
from emformer.studies import simulation
from emformer.theory.outcome import Statement

OWN = '''
"""An experiment of somebody's own, in a module of their own."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from emformer import parts, theory
from emformer.parts import UserError
from emformer.theory.outcome import Curves, Outcome, Statement


@dataclass(frozen=True, kw_only=True)
class Pendulum(parts.Experiment):
    """A few tokens on the circle.

    Args:
        tokens: N, at least 2.
        times: when they are looked at.
        fault: what goes wrong.
    """

    tokens: int = 3
    times: Sequence[float] = (0.0, 0.1, 0.3)
    fault: str = ""
    seed: int = 0

    name: ClassVar[str] = "pendulum"
    title: ClassVar[str] = "tokens on the circle <swing>"

    def __post_init__(self):
        object.__setattr__(self, "times", tuple(self.times))
        if self.tokens < 2:
            raise UserError(f"Pendulum: tokens is {self.tokens}; choose at least 2.")

    def run(self, tell):
        if self.fault:
            raise {"value": ValueError("the swing is too short"), "stop": KeyboardInterrupt(), "bug": RuntimeError("a bug"),
                   "number": ArithmeticError("no longer finite at time 0.1."),
                   "memory": RuntimeError("DefaultCPUAllocator: can't allocate memory")}[self.fault]
        tell(0.5, "swinging")
        x = theory.unit_vectors(2, self.tokens, 2, self.seed)
        found = theory.simulate(theory.idealised(2), x, self.times)
        y = [float(cloud.sum()) for cloud in found.clouds]
        frame = pd.DataFrame({"panel": "sum", "line": "all, of \\"both\\"", "x": theory.times_of(found), "y": y})
        claims = [
            Statement("a third, held", "math E.1; nobody", "equals", 1 / 3, 1 / 3 + 1e-3, 2e-3, 7, 1e-4),
            Statement("missed", "math E.2", "at most", 1.0, math.pi, 0.5, 2),
            Statement("enough", "math E.2", "at least", -1e-300, 0.0),
            Statement("a number", "math E.3", "measured", math.nan, 12345.678),
            Statement("nobody knows", "math E.3", "equals", 2.0, math.nan, 0.1),
        ]
        return Outcome(claims, {"sum": Curves(frame, "Sums.", "time", "sum")}, {"N=all": found}, "A note.")
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which `--import own` finds the experiment, new for each test."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own", None)


@pytest.fixture
def swing(emformer, own: Path):
    """`emformer simulate pendulum` with more words."""
    return lambda *words: emformer("simulate", "pendulum", "--import", "own", *words)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("own.py", "__pycache__"))


def test_it_writes_a_folder_and_tells_what_held(swing, own: Path):
    found = swing()
    assert found.code == 0 and not found.err
    lines = [re.split(r"  +", line.strip()) for line in found.out.splitlines()]
    assert lines == [
        ["tokens on the circle <swing>"],
        [""],
        ["predicted ± allowed", "measured", "± error", "n", "claim"],
        ["held", "0.3333 ± 0.002", "0.3343", "± 0.0001", "7", "a third, held (math E.1; nobody)"],
        ["NOT held", "≤ 1 + 0.5", "3.142", "2", "missed (math E.2)"],
        ["held", "≥ -1e-300", "0", "1", "enough (math E.2)"],
        ["told", "12,346", "1", "a number (math E.3)"],
        ["undefined", "2 ± 0.1", "–", "1", "nobody knows (math E.3)"],
        [""],
        ["A note."],
        [""],
        ["wrote simulations/pendulum"],
    ]
    assert entries(own) == ["simulations"] and entries(own / "simulations") == ["pendulum"]
    assert sorted(contents(own / "simulations/pendulum")) == [
        "charts/sum.csv",
        "config.yaml",
        "environment.json",
        "figures/sum.png",
        "note.txt",
        "observed/N=all/records.jsonl",
        "observed/N=all/times.csv",
        "simulation.html",
        "statements.csv",
    ]


def test_what_it_writes_is_what_was_found(swing, own: Path):
    """Every number of the tables is the one that the experiment gave, to the last bit."""
    assert swing("--tokens", "5").code == 0
    folder = own / "simulations/pendulum"
    known = recipes.EXPERIMENTS.all()["pendulum"](tokens=5).run(lambda share, word: None)
    read = simulation.read_statements(folder)
    for row, one in zip(read, known.statements, strict=True):
        for name, value in one._asdict().items():
            assert getattr(row, name) == value or (math.isnan(value) and math.isnan(getattr(row, name))), (name, row)
    told = pd.read_csv(folder / "statements.csv")
    assert told.columns.tolist() == [*Statement._fields, "held"]
    assert [row.rpartition(",")[2] for row in (folder / "statements.csv").read_text().splitlines()[1:]] == [
        "True",
        "False",
        "True",
        "",
        "",
    ]
    chart = pd.read_csv(folder / "charts/sum.csv", dtype=str).astype({"x": float, "y": float})
    pd.testing.assert_frame_equal(chart, known.charts["sum"].frame, check_exact=True)
    assert (folder / "figures/sum.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "simulation.html").read_text(encoding="utf-8")
    assert "<swing>" not in page and "&lt;swing&gt;" in page
    # the records are those of `observe`, and stand at times
    rows = emf.read_records(folder / "observed/N=all")
    seen = emf.observe(known.trajectories["N=all"], simulation.OBSERVED)
    seen = seen[seen["key"].isin(rows["key"])]
    assert rows["step"].eq(0).all() and {"flow.speed", "clu.mean_cos", "attn.entropy_norm"} <= set(rows["key"])
    pd.testing.assert_frame_equal(rows.drop(columns=["run", "step"]), seen.drop(columns="step").reset_index(drop=True))
    times = pd.read_csv(folder / "observed/N=all/times.csv")
    assert times["time"].tolist() == pytest.approx([0.0, 0.1, 0.3]) and times["layer"].tolist() == [0, 0, 1]
    assert times["point"].tolist() == ["embed", "attn", "attn"]
    about = json.loads((folder / "environment.json").read_text())
    assert about["experiment"] == "pendulum" and about["seconds"] >= 0 and about["packages"]["torch"]


def test_its_config_gives_the_same_bytes_again(swing, emformer, own: Path):
    assert swing("--times", "[0, 0.2, 0.7]", "--seed", "3", "--observables", "flow,clustering").code == 0
    first = own / "simulations/pendulum"
    words = ["simulate", first / "config.yaml", "--import", "own", "--observables", "flow,clustering"]
    assert "simulations/pendulum holds a simulation already" in emformer(*words).refused("--overwrite", "--out")
    assert emformer(*words, "--out", own / "again").code == 0
    one, two = contents(first), contents(own / "again")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"environment.json"}
    assert emformer(*words, "--seed", "4", "--out", own / "other").code == 0
    assert contents(own / "other")["observed/N=all/records.jsonl"] != one["observed/N=all/records.jsonl"]


def test_files_lie_on_top_of_each_other_and_words_on_top_of_them(emformer, own: Path):
    (own / "one.yaml").write_text("experiment: pendulum\ntokens: 4\nseed: 1\n")
    (own / "two.yaml").write_text("seed: 2\ntimes: [0, 1]\n")
    words = ["simulate", "one.yaml", "-c", "two.yaml", "--import", "own"]
    found = yaml.safe_load(emformer(*words, "--times", "[0, 2]", "--print_config").out)
    assert found == {"experiment": "pendulum", "tokens": 4, "times": [0.0, 2.0], "fault": "", "seed": 2}
    assert entries(own) == ["one.yaml", "two.yaml"]
    (own / "printed.yaml").write_text(yaml.safe_dump(found))
    assert recipes.EXPERIMENTS.read(own / "printed.yaml") == recipes.EXPERIMENTS.read(
        own / "one.yaml", own / "two.yaml"
    ).__class__(tokens=4, times=(0.0, 2.0), seed=2)
    assert emformer(*words, "--no-observe").code == 0  # the folder is called as the last file
    assert entries(own / "simulations") == ["two"] and "observed" not in entries(own / "simulations/two")
    assert recipes.EXPERIMENTS.folder(["x/config.yaml"], recipes.EXPERIMENTS.read(own / "one.yaml")) == Path("simulations/x")


def test_experiments_are_listed_and_explained(emformer, swing, own: Path):
    """All of emformer's, found; the fields of each with what they mean."""
    listed = emformer("simulate", "--help")
    assert listed.code == 0 and emformer("simulate").code == 2
    assert "pendulum" not in listed.out and "--overwrite" in listed.out
    for name, cls in recipes.EXPERIMENTS.all().items():
        if cls.__module__.startswith("emformer."):
            assert re.search(rf"^  {name} +{re.escape(cls.title)}$", listed.out, re.MULTILINE), name
    assert re.search(r"^  pendulum +tokens on", emformer("simulate", "--help", "--import", "own").out, re.MULTILINE)
    helped = swing("--help")
    assert helped.code == 0 and "N, at least 2. (type: int, default: 3)" in " ".join(helped.out.split())
    assert "--out" in helped.out and "A few tokens on the circle." in helped.out


def test_an_existing_folder_is_replaced_only_if_it_is_a_simulation(swing, own: Path):
    folder = own / "simulations/pendulum"
    assert swing().code == 0
    before = contents(folder)
    swing("--tokens", "4").refused("simulations/pendulum", "--overwrite", "--out")
    assert contents(folder) == before
    assert swing("--tokens", "4", "--overwrite", "--no-observe").code == 0
    assert "tokens: 4" in (folder / "config.yaml").read_text() and "observed" not in entries(folder)
    (folder / "diary.txt").write_text("mine")
    before = contents(folder)
    swing("--overwrite").refused("diary.txt", "--out")
    (own / "novel").mkdir()
    (own / "novel/charts").mkdir()
    swing("--out", "novel", "--overwrite").refused("novel", "no simulation")
    swing("--out", "own.py", "--overwrite").refused("own.py", "file")
    assert contents(folder) == before and entries(own / "novel") == ["charts"]
    (own / "empty").mkdir()
    assert swing("--out", "empty").code == 0 and "statements.csv" in entries(own / "empty")


@pytest.mark.parametrize(
    ("fault", "words"), [("value", ["pendulum", "too short"]), ("number", ["at time 0.1."]), ("memory", ["memory", "smaller"])]
)
def test_a_simulation_that_cannot_be_carried_through_is_told_in_a_sentence(swing, own: Path, fault: str, words: list[str]):
    told = swing("--fault", fault).refused(*words)
    assert not told.endswith("..") and entries(own) == []


def test_what_is_stopped_leaves_what_was_there(swing, own: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped while it runs or while it writes: the old folder as it was, no half of a new one; a bug is not hidden."""
    assert swing("--no-observe").code == 0
    before = contents(own / "simulations")
    assert swing("--overwrite", "--fault", "stop").code == 130
    with pytest.raises(RuntimeError, match="a bug"):
        swing("--overwrite", "--fault", "bug")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(simulation.figures, "save", full)
    swing("--overwrite", "--tokens", "9").refused("No space left", "as it was")
    swing("--out", "new").refused("cannot write new")
    assert contents(own / "simulations") == before and entries(own) == ["simulations"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["spher"], ["'spher' is no experiment", "did you mean 'sphere'?"]),
        (["qqq"], ["'qqq' is no experiment", "there are", "sphere"]),
        (["pendulum", "--tokns", "3"], ["tokns", "did you mean 'tokens'?"]),
        (["pendulum", "--overwrte"], ["overwrte", "did you mean 'overwrite'?"]),
        (["pendulum", "--tokens", "three"], ["tokens", "int", "three"]),
        (["pendulum", "--tokens", "2.5"], ["tokens", "int", "2.5"]),
        (["pendulum", "--tokens", "null"], ["tokens", "None"]),
        (["pendulum", "--tokens", "1"], ["tokens is 1", "at least 2"]),
        (["pendulum", "--tokens"], ["tokens"]),
        (["pendulum", "--times", "[0, x]"], ["times", "x"]),
        (["pendulum", "--times", "[1, 0]"], ["times", "ascend"]),
        (["pendulum", "stray"], ["stray"]),
        (["--tokens", "3"], ["no experiment is named", "sphere"]),
        (["nowhere.yaml"], ["nowhere.yaml does not exist"]),
        (["pendulum", "-c", "nowhere.yaml"], ["nowhere.yaml does not exist"]),
        (["pendulum", "-c"], ["config"]),
        (["broken.yaml"], ["broken.yaml line 2", "not valid YAML"]),
        (["list.yaml"], ["list.yaml", "settings"]),
        (["unknown.yaml"], ["unknown.yaml", "'pendulm' is no experiment", "did you mean 'pendulum'?"]),
        (["number.yaml"], ["number.yaml", "3"]),
        (["typo.yaml"], ["tokken", "did you mean 'tokens'?"]),
        (["null.yaml"], ["seed"]),
        (["nameless.yaml"], ["no experiment is named"]),
        (["sphere", "-c", "typo.yaml"], ["typo.yaml", "'pendulum', not 'sphere'"]),
        (["pendulum", "--experiment", "sphere"], ["sphere", "pendulum"]),
        (["pendulum", "--observables", "flw"], ["flw", "did you mean 'flow'?"]),
        (["pendulum", "--observables", ","], ["no observable"]),
        (["pendulum", "--observables", "flow", "--no-observe"], ["--observables", "--no-observe"]),
        (["pendulum", "--import", "not_there"], ["not_there"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_mistakes_get_one_sentence(emformer, own: Path, words: list[str], told: list[str]):
    files = {
        "broken": "experiment: pendulum\n  tokens: [",
        "list": "- pendulum",
        "unknown": "experiment: pendulm",
        "number": "experiment: 3",
        "typo": "experiment: pendulum\ntokken: 3",
        "null": "experiment: pendulum\nseed: null",
        "nameless": "tokens: 3",
    }
    for name, content in files.items():
        (own / f"{name}.yaml").write_text(content)
    before = entries(own)
    emformer("simulate", *words, "--import", "own").refused(*told)
    assert entries(own) == before


def test_from_python(own: Path):
    """The same without the command line: observables by their settings, or none; nothing that costs nothing is written."""
    sys.path.insert(0, str(own))
    try:
        import own as module
    finally:
        sys.path.remove(str(own))
    from emformer.observables.flow import Flow

    assert emf.perform(module.Pendulum(), out=own / "bare", observables=None) == own / "bare"
    assert "observed" not in entries(own / "bare")
    emf.perform(module.Pendulum(), out=own / "flow", observables=[Flow(), "flow"])
    keys = set(emf.read_records(own / "flow/observed/*")["key"])
    assert keys and all(key.startswith("flow.") for key in keys) and "flow.w2" in keys
    with pytest.raises(UserError, match="cannot be read"):
        simulation.read_statements(own)


def test_one_of_emformers_own(emformer, tmp_path: Path):
    """A real one, made tiny, and its records beside each other."""
    small = recipes.EXPERIMENTS.all()["space"].examples()[0]
    (tmp_path / "small.yaml").write_text(recipes.EXPERIMENTS.written(small))
    state = torch.get_rng_state()
    found = emformer("simulate", "space", "-c", tmp_path / "small.yaml", "--out", tmp_path / "out")
    assert found.code == 0 and found.out.endswith(f"wrote {tmp_path / 'out'}\n") and torch.equal(state, torch.get_rng_state())
    assert recipes.EXPERIMENTS.read(tmp_path / "out/config.yaml") == small
    names = entries(tmp_path / "out/observed")
    assert len(names) >= 2
    compared = emformer("compare", *(tmp_path / "out/observed" / name for name in names), "--key", "clu.mean_cos")
    assert compared.code == 0 and "clu.mean_cos" in compared.out
