"""`emformer study`: what it prints, writes and refuses, with a study of our own that takes no time, and one of ours."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import emformer as emf
from emformer import recipes
from emformer.studies import examination

OWN = '''
"""A study of somebody's own, in a module of their own."""
import math
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from emformer import parts
from emformer.intervals import Interval
from emformer.parts import UserError
from emformer.theory.outcome import Curves
from emformer.verdicts import Findings, Verdict


@dataclass(frozen=True, kw_only=True)
class Weighing(parts.Study):
    """How many numbers a model has.

    Args:
        most: so many are claimed at most.
        refuse: say that it cannot be done.
    """

    most: float = 10.0
    refuse: bool = False

    name: ClassVar[str] = "weighing"
    title: ClassVar[str] = "what a model <weighs>"
    prompts: ClassVar[int] = 6
    length: ClassVar[int] = 8

    def __post_init__(self):
        if self.most < 0:
            raise UserError(f"Weighing: most is {self.most}; choose at least 0.")

    def run(self, subjects, tell):
        if self.refuse:
            raise UserError("weighing needs a model that can be weighed; give another one.")
        rows = []
        for k, one in enumerate(subjects):
            rows.append(("", one.name, float(k), float(len(one.tokens))))
            tell((k + 1) / len(subjects), one.name)
        count, length = (float(x) for x in subjects[0].tokens.shape)
        of = "models" if len(subjects) > 1 else "prompts"
        third, much = Interval(1 / 3, 0.25, 0.5, 8, of), Interval(12345.678, 12000.0, 13000.0, int(count), of)
        few = Interval(length, math.nan, math.nan, len(subjects), of)
        verdicts = [
            Verdict("a third", "S0 one", "numbers", third, least=0.0, most=self.most, null=0.25, against="luck"),
            Verdict("too much", "S2 9.1", "grams", much, most=self.most),
            Verdict("few", "S2 9.2", "tokens", few, least=3.0, why="as the text is"),
        ]
        chart = Curves(pd.DataFrame(rows, columns=["panel", "line", "x", "y"]), "Weights.", "model", "prompts")
        return Findings(verdicts, {"weights": chart}, "A note.\\nAnother.")
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory in which `--import own` finds the study, new for each test."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own", None)


@pytest.fixture
def weigh(emformer, own: Path, run: Path):
    """`emformer study weighing` of the run, with more words."""
    return lambda *words: emformer("study", "weighing", run, "--import", "own", *words)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_writes_a_folder_and_tells_the_verdicts(weigh, own: Path, run: Path):
    found = weigh()
    assert found.code == 0
    lines = [re.split(r"  +", line.strip()) for line in found.out.splitlines()]
    scale = examination.read_scale(own / "studies" / f"weighing-{run.name}")
    assert re.match(
        r"a model of [\d,]+ parameters \(d = 16, 1 layers, 2 heads\), trained on [\d,]+ tokens of Grammar in 2 steps", scale
    )
    few = "too few prompts: 1, and an interval at 95 % takes 6; as the text is"
    assert lines == [
        ["what a model <weighs>"],
        [""],
        ["measured", "95 % interval", "claimed", "null", "n", "claim"],
        ["supported", "0.3333", "[0.25, 0.5]", "0 … 10", "0.25 (luck)", "8 prompts", "a third (S0 one)"],
        ["numbers"],
        ["refuted", "12,346", "[12,000, 13,000]", "≤ 10", "–", "6 prompts", "too much (S2 9.1)"],
        ["grams"],
        ["undecided", "8", "–", "≥ 3", "–", "1 prompts", "few (S2 9.2)"],
        [f"tokens; {few}"],
        [""],
        [f"of {scale}"],
        [""],
        ["A note."],
        ["Another."],
        [""],
        [f"wrote studies/weighing-{run.name}"],
    ]
    folder = own / "studies" / f"weighing-{run.name}"
    assert sorted(contents(folder)) == [
        "charts/weights.csv",
        "config.yaml",
        "environment.json",
        "figures/weights.png",
        "note.txt",
        "study.html",
        "verdicts.csv",
    ]
    verdicts = examination.read_verdicts(folder)
    assert verdicts[0].measured.value == 1 / 3 and verdicts[1].least == -math.inf and math.isnan(verdicts[2].measured.low)
    assert [one.word for one in verdicts] == ["supported", "refuted", "undecided"]
    assert pd.read_csv(folder / "verdicts.csv")["verdict"].tolist() == ["supported", "refuted", "undecided"]


def test_its_recipe_and_its_fields_come_back(weigh, emformer, own: Path, run: Path):
    assert weigh("--most", "20000", "--prompts", "7", "--length", "4", "--out", "one").code == 0
    assert [one.word for one in examination.read_verdicts("one")][1] == "supported"
    text = Path("one/config.yaml").read_text()
    assert "# prompts: 7" in text and "# length: 4" in text and str(run) in text
    again = emformer("study", "one/config.yaml", run, "--import", "own", "--prompts", "7", "--length", "4", "--out", "two")
    assert again.code == 0 and Path("two/verdicts.csv").read_bytes() == Path("one/verdicts.csv").read_bytes()
    printed = emformer("study", "weighing", run, "--import", "own", "--most", "3", "--print_config")
    assert printed.code == 0 and "most: 3" in printed.out and not Path("studies").exists()


def test_the_folder_of_another_study_is_left_alone(weigh, own: Path):
    assert weigh("--out", "taken").code == 0
    before = contents(own / "taken")
    weigh("--out", "taken").refused("holds a study already", "--overwrite")
    assert contents(own / "taken") == before
    assert weigh("--out", "taken", "--overwrite", "--most", "1").code == 0
    assert "most: 1" in (own / "taken" / "config.yaml").read_text()
    (own / "taken" / "mine.txt").write_text("mine")
    weigh("--out", "taken", "--overwrite").refused("mine.txt", "left as it is")
    weigh("--out", "own.py").refused("is a file")


def test_a_glob_names_several_models(emformer, own: Path, run: Path):
    shutil.copytree(run, own / "cells" / "a")
    assert emformer("fit", "-c", "cells/a/config.yaml", "--training.seed", "1", "--run", "cells/b").code == 0
    (own / "cells" / "note.txt").mkdir()
    found = emformer("study", "weighing", "cells/*", "--import", "own")
    assert found.code == 0 and "wrote studies/weighing-a-and-1-more" in found.out and "8 models" in found.out
    chart = pd.read_csv(own / "studies/weighing-a-and-1-more/charts/weights.csv")
    assert chart["line"].tolist() == ["cells/a", "cells/b"]
    emformer("study", "weighing", "none/*", "--import", "own").refused("none/* matches no run")
    shutil.copytree(run, own / "again")
    emformer("study", "weighing", "cells/a", "again", "--out", "x", "--import", "own").refused("again and cells/a are one model")
    assert emformer("study", "weighing", "cells/a", "./cells/a", "--import", "own").code == 0  # named twice, looked at once


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["study", "unroled", "RUN"], ["unroled", "did you mean 'unrolled'"]),
        (["study", "unrolled"], ["no model is named", "runs/default"]),
        (["study", "unrolled", "--seed", "1"], ["no model is named"]),
        (["study", "unrolled", "missing"], ["missing"]),
        (["study", "weighing", "RUN", "--most", "-1"], ["Weighing: most is -1"]),
        (["study", "weighing", "RUN", "--mosst", "1"], ["mosst", "most"]),
        (["study", "weighing", "RUN", "--most", "many"], ["most"]),
        (["study", "weighing", "RUN", "--refuse", "true"], ["can be weighed"]),
        (["study", "weighing", "RUN", "--prompts", "1"], ["--prompts is 1", "at least 2"]),
        (["study", "weighing", "RUN", "--prompts", "0"], ["--prompts"]),
        (["study", "weighing", "RUN", "--which", "7"], ["7"]),
        (["study", "weighing", "RUN", "--text", "missing.txt"], ["missing.txt"]),
        (["study", "weighing", "RUN", "--out", "/proc/none/there"], ["/proc/none/there"]),
        (["study", "unrolled", "RUN", "--import", "missing_module"], ["missing_module"]),
    ],
    ids=lambda value: " ".join(value[1:]) if value[0] == "study" else "",
)
def test_a_mistake_is_one_sentence_and_writes_nothing(emformer, own: Path, run: Path, words: list[str], told: list[str]):
    given = [str(run) if word == "RUN" else word for word in words]
    imported = [] if "--import" in words else ["--import", "own"]
    found = emformer(*given, *imported)
    assert found.code == 2 and not (own / "studies").exists()
    line = found.err.strip().splitlines()[-1]
    assert line.startswith("emformer: ") and "Traceback" not in found.err
    for word in told:
        assert word in line, (word, line)


def test_help_names_every_study_and_the_fields_of_one(emformer, own: Path):
    found = emformer("study", "--help", "--import", "own")
    assert found.code == 0
    for name, title in (recipes.STUDIES.titles() | {"weighing": "what a model <weighs>"}).items():
        assert re.search(rf"^  {re.escape(name)} +{re.escape(title)}$", found.out, re.MULTILINE), name
    assert emformer("study").code == 2
    one = emformer("study", "weighing", "--help", "--import", "own")
    assert one.code == 0 and "--most" in one.out and "so many are claimed at most" in one.out


def test_one_of_ours_ends_in_verdicts(emformer, run: Path, tmp_path: Path):
    found = emformer("study", "unrolled", run, "--prompts", "6", "--length", "8", "--out", tmp_path / "s")
    assert found.code == 0 and "supported" in found.out and "the last state is the first plus the sum" in found.out
    assert json.loads((tmp_path / "s" / "environment.json").read_text())["study"] == "unrolled"
    assert emf.examine("unrolled", run, prompts=6, length=8, out=tmp_path / "t") == tmp_path / "t"
    assert (tmp_path / "t" / "verdicts.csv").read_bytes() == (tmp_path / "s" / "verdicts.csv").read_bytes()
