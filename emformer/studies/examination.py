"""A study of trained models, as a folder.

config.yaml        the study, every field in it, the models and the text
verdicts.csv       each claim, what was measured for it with its interval, and the verdict; note.txt what else is to be known
charts/            what is drawn, as numbers; figures/ as pictures
study.html         the verdicts and all charts on one page
environment.json   versions of what the numbers depend on
"""

from __future__ import annotations

import csv
import glob
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tqdm import tqdm

from emformer import figures, parts, recipes
from emformer.figures import charts as drawing
from emformer.files import replaced_folder
from emformer.intervals import Interval
from emformer.parts import Corpus, UserError
from emformer.records import Run
from emformer.report import charts as page
from emformer.studies.outputs import check_free, save, unwritable
from emformer.studies.progress import sharing
from emformer.studies.request import default_folder
from emformer.studies.subjects import scale, subjects
from emformer.verdicts import Findings, Verdict

WRITTEN = {"config.yaml", "verdicts.csv", "note.txt", "charts", "figures", "study.html", "environment.json"}
NUMBERS = ("value", "low", "high", "least", "most", "null")
COLUMNS = ("verdict", "claim", "source", "quantity", *NUMBERS, "against", "n", "of", "why", "check", "scale")


def examine(
    study: parts.Study | str,
    models: str | Path | Iterable[str | Path],
    *,
    text: str | Path | None = None,
    corpus: str | Corpus | None = None,
    out: str | Path | None = None,
    prompts: int | None = None,
    length: int | None = None,
    which: str | int = "last",
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Put the claims of a study to the test on trained models, write what was found into a folder, and return that folder.

        emformer.examine("sinks", "runs/default")
        emformer.examine("fragility", "ablations/claims/cells/kind=docs,*", prompts=256)

    One model gives verdicts about that model, with intervals over prompts; six or more that differ by their seed give verdicts
    about models trained like them, with intervals over models. The folder appears whole, or not at all.

    Args:
        study: one of `emformer.studies.claims`, your own `parts.Study`, or a name, for its defaults, or a recipe's file.
        models: whatever `emformer.load` takes, one or several; a glob names several.
        text: a file or glob that all are shown; `corpus`: instead of it, or the name of one; without either each its own
            validation text.
        out: the folder; by default `studies/STUDY-MODEL`.
        prompts: how many each model is shown, of `length` tokens; by default what the study wants.
        which: checkpoint of a run: "last", "best" or a step.
        seed: of the prompts, and of whatever the study draws.
        device: "auto", "cpu" or "cuda".
        overwrite: replace the folder, if it holds a study and nothing else.

    Raises:
        UserError: for a folder that is taken, models or a text that cannot be read, and what the study cannot be done on.
    """
    if isinstance(study, str):
        study = recipes.STUDIES.choose([study])
    sources = _sources([models] if isinstance(models, str | Path) else list(models))
    folder = Path(out) if out is not None else default(study, sources, text, corpus)
    check_free(folder, overwrite, WRITTEN, "verdicts.csv", "study")
    with unwritable(folder):  # which shall be known before anything is measured
        tempfile.TemporaryDirectory(dir=next(one for one in folder.resolve().parents if one.exists())).cleanup()
    for name, value, least in (("prompts", prompts, 2), ("length", length, 2)):
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; choose at least {least}.")
    begun = time.monotonic()
    shown: dict[str, Any] = {"prompts": prompts or study.prompts, "length": length or study.length, "which": which, "seed": seed}
    found = subjects(sources, text=text, corpus=corpus, device=device, **shown)
    with sharing(study.name) as tell:
        findings = study.run(found, tell)
    asked: dict[str, Any] = {"models": [str(one) for one in sources], "text": None if text is None else str(text)}
    asked |= {"corpus": None if corpus is None else str(corpus), **shown, "scale": scale(found)}
    with unwritable(folder), replaced_folder(folder) as partial:
        _write(partial, study, asked, findings, time.monotonic() - begun)
    return folder


def default(study: parts.Study, sources: list[str | Path], text: str | Path | None, corpus: str | Corpus | None) -> Path:
    """studies/STUDY-MODEL, with the text's name where it is not the model's own, and how many models where there are several."""
    more = f"-and-{len(sources) - 1}-more" if len(sources) > 1 else ""
    return Path(recipes.STUDIES.home) / f"{study.name}-{default_folder(sources[0], text, corpus).name}{more}"


def read_verdicts(folder: str | Path) -> list[Verdict]:
    """What a study's folder says of its claims. Raises `UserError` where there is none."""
    path = Path(folder) / "verdicts.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [_verdict(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def read_scale(folder: str | Path) -> str:
    """Of what size the models were that a study looked at."""
    with open(Path(folder) / "verdicts.csv", encoding="utf-8", newline="") as file:
        return next((row["scale"] for row in csv.DictReader(file)), "no models")


def _verdict(row: Mapping[str, str]) -> Verdict:
    """Numbers by `float`, which loses no bit; what is undefined, or no bound, is empty."""
    value, low, high, null = (float(row[name] or "nan") for name in ("value", "low", "high", "null"))
    least, most = float(row["least"] or "-inf"), float(row["most"] or "inf")
    interval = Interval(value, low, high, int(row["n"]), row["of"])
    words = row["claim"], row["source"], row["quantity"]
    return Verdict(*words, interval, least, most, null, row["against"], row["why"], row["check"] == "True")


def frame(verdicts: Iterable[Verdict], scale: str = "") -> pd.DataFrame:
    """Verdicts as rows of `COLUMNS`; `scale`: of what size the models are that they are about."""
    rows = []
    for one in verdicts:
        told = one._asdict() | one.measured._asdict() | {"verdict": one.word, "why": one.why, "scale": scale}
        told |= {"least": _bound(one.least), "most": _bound(one.most)}
        rows.append({name: told[name] for name in COLUMNS})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _bound(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _sources(models: list[str | Path]) -> list[str | Path]:
    """Globs resolved, each source once, in their order."""
    found: list[str | Path] = []
    for one in models:
        if Path(one).exists() or not glob.has_magic(str(one)):
            found.append(one)
            continue
        matches = [match for match in sorted(glob.glob(str(one), recursive=True)) if Run(match).used or Path(match).is_file()]
        if not matches:
            raise UserError(f"{one} matches no run; give run folders, as runs/default, or a glob of them, as 'runs/*'.")
        found += matches
    if not found:
        raise UserError("no model is named; give a run folder, as runs/default.")
    return list({Path(one).resolve() if Path(one).exists() else one: one for one in found}.values())


def _write(folder: Path, study: parts.Study, asked: Mapping[str, object], found: Findings, seconds: float) -> None:
    recipe = recipes.STUDIES.plain(study)
    told = "".join(f"# {line}\n" for line in yaml.safe_dump(dict(asked), sort_keys=False, allow_unicode=True).splitlines())
    (folder / "config.yaml").write_text(told + recipes.STUDIES.written(study), encoding="utf-8")
    save(frame(found.verdicts, str(asked["scale"])), folder / "verdicts.csv")
    if found.note:
        (folder / "note.txt").write_text(found.note + "\n", encoding="utf-8")
    for name in ("charts", "figures"):
        (folder / name).mkdir()
    for name, chart in found.charts.items():
        save(chart.frame, folder / "charts" / f"{name}.csv")
        figures.save(drawing.draw(chart, study.title), folder / "figures" / f"{name}.png")
    facts = {
        name: ", ".join(value) if isinstance(value, list) and name == "models" else str(value)
        for name, value in (recipe | dict(asked)).items()
        if value is not None
    }
    try:
        page.write(found, folder / "study.html", title=study.title, facts=facts)
    except UserError as error:  # all else is there, and can be read without it
        tqdm.write(f"no page: {error}", file=sys.stderr)
    Run(folder).write_environment(0, study=study.name, seconds=round(seconds, 3))
