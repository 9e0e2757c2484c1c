"""From folders to the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from emformer.comparison import compare
from emformer.figures.scene import Scene
from emformer.files import replaced
from emformer.observables.frame import Key, catalogue
from emformer.parts import UserError
from emformer.recordings import read_records
from emformer.records import Run
from emformer.report import differences, scenes, series
from emformer.report.glossary import anchors, glossary
from emformer.report.page import page, require_plotly
from emformer.report.section import Section
from emformer.report.sources import Source, gather
from emformer.report.text import fact_list

SCENES_FIRST = ("cloud", "paths")
LONGEST = 2_000  # points of a curve of the loss


def write(source: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of a run or an analysis, or a comparison of several, and return its path.

    One HTML file of at most 6 MB, 4.8 of them plotly; nothing in it is loaded from anywhere, and text from corpora, settings and
    records is shown as text. What the folder lacks is told in it, with the reason. Of a run, its last checkpoint is shown some of
    its probe prompts: a few seconds, and the text that it was trained on must still be there.

    Args:
        source: a folder, or several; of several the first is the baseline.
        out: the file. Default: `report.html` in the folder; of several, in the working directory.

    Raises:
        UserError: if a folder is neither a run nor an analysis, has no records to compare, or the file cannot be written; and
            without plotly.
    """
    folders = [source] if isinstance(source, str | Path) else list(dict.fromkeys(map(str, source)))
    if not folders:
        raise UserError("a report takes at least one folder, as runs/default.")
    alone = len(folders) == 1
    path = Path(out) if out is not None else Run(folders[0]).report if alone else Path("report.html")
    if path.suffix not in (".html", ".htm"):
        raise UserError(f"a report is HTML, and '{path.name}' does not say so; name it .html.")
    if out is not None and not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist; make it, or choose another --out.")
    require_plotly()
    told = _one(gather(folders[0])) if alone else _several([gather(folder, staged=False) for folder in folders])
    try:
        with replaced(path) as partial:
            partial.write_text(told, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; an older report is as it was.") from error
    return path


def _one(source: Source) -> str:
    known, sections = catalogue(), []
    ids = anchors(_keys(source, known))
    if source.curves:
        sections.append(_loss([(source.path.name, source)]))
    drawn = list(scenes.sections(source.scene)) if source.scene is not None else []
    told = list(series.sections(source.records, known)) if source.records is not None else []
    # what moves first; then what training did; then the one model in detail
    sections += [one for one in drawn if one.name in SCENES_FIRST]
    sections += [one for one in told if one.name != "explorer"]
    sections += [one for one in drawn if one.name not in SCENES_FIRST]
    sections += [one for one in told if one.name == "explorer"]
    if source.records is not None:
        sections.append(series.table(source.records, known, ids))
    if ids:
        sections.append(glossary(known, ids))
    return page(f"{source.path.name}: {_what(source)}", _facts(source), source.missing, sections, ids)


def _what(source: Source) -> str:
    return {"run": "a transformer and its token cloud", "analysis": "an analysis", "records": "records"}[source.kind]


def _keys(source: Source, known: Mapping[str, Key]) -> Iterator[str]:
    """Keys that have an entry in the glossary: those recorded, and those that what is drawn of the model refers to."""
    if source.records is not None:
        yield from map(str, source.records["key"].dropna().unique())
    if source.scene is not None:
        yield from (key for key in scenes.KEYS if key in known)


def _several(sources: list[Source]) -> str:
    missing = [f"{source.name}: {sentence}" for source in sources for sentence in source.missing]
    found = compare(read_records([source.path for source in sources]))
    known, ids = catalogue(), anchors(map(str, found["key"].unique()))
    names = differences.short_names([source.name for source in sources])
    read = list(found["run"].unique())
    found["run"] = found["run"].map(dict(zip(read, differences.short_names(read), strict=True)))
    sections = [_loss(list(zip(names, sources, strict=True)))] if any(source.curves for source in sources) else []
    sections += [*differences.sections(found, known, ids), glossary(known, ids)]
    title = f"{names[1]} against {names[0]}" if len(names) == 2 else f"{len(names) - 1} runs against {names[0]}"
    return page(title, differences.side_by_side(sources), missing, sections, ids)


def _facts(source: Source) -> str:
    told = [*source.facts]
    if source.records is not None:
        steps = source.records["step"].dropna()
        span = f" at {steps.nunique()} steps, {steps.min():,} to {steps.max():,}" if len(steps) else ""
        told.append(("recorded", f"{len(source.records):,} rows of {source.records['key'].nunique()} keys{span}"))
    if source.scene is not None:
        told.append(("drawn", _drawn(source.scene)))
    return fact_list(told)


def _drawn(scene: Scene) -> str:
    prompts, tokens = scene.ids.shape
    return f"{scene.title}: {prompts} prompts of {tokens} tokens through {len(scene.states)} states".removeprefix(": ")


def _loss(named: list[tuple[str, Source]]) -> Section:
    curves = [
        {"name": name, "kind": kind, "run": number, "steps": [s for s, _ in points], "loss": [y for _, y in points]}
        for number, (name, source) in enumerate(named)
        for kind, curve in source.curves.items()
        for points in [curve[:: -(-len(curve) // LONGEST)]]
    ]
    units = list(dict.fromkeys(source.unit for _, source in named if source.curves))
    caption = (
        "Loss by training step: of the batch that was just learnt from (thin), and of the whole held-out part (points). "
        "Where the "
        "second stops following the first, the model learns its text by heart."
    )
    return Section("loss", "Loss", caption, {"curves": curves, "unit": " and ".join(units), "several": len(named) > 1})
