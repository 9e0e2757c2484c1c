"""What the folder of a run or an analysis holds, as far as it can be read; and what is missing, and why."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from emformer.figures.scene import Scene, stage
from emformer.parts import UserError
from emformer.recordings import read_records
from emformer.records import Run, load, read_journal
from emformer.settings import Settings
from emformer.text import File, probe
from emformer.training.data import read_text

PROMPTS, TOKENS = 8, 64  # of a scene staged for a report
CURVES = {"train_loss": "training", "val_loss": "validation"}

T = TypeVar("T")


@dataclass
class Source:
    """One run or analysis.

    Attributes:
        path: its folder.
        kind: "run", "analysis" or "records".
        facts: (name, value) for people.
        curves: {"training" | "validation": [(step, loss)]}. unit: of them.
        records: the frame of `read_records`.
        scene: what is drawn of its model.
        missing: a sentence for each thing that is not there.
    """

    path: Path
    kind: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    unit: str = "loss"
    records: pd.DataFrame | None = None
    scene: Scene | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.path)


def gather(path: str | Path, *, staged: bool = True) -> Source:
    """Everything that a report of this folder shows.

    Args:
        path: a run folder, an analysis folder, or one that holds records alone.
        staged: with a scene: that of an analysis is read; of a run the last checkpoint is shown its first 8 probe prompts of at
            most 64 tokens, which takes the text that it was trained on, and a few seconds.

    Raises:
        UserError: if the folder is none of these.
    """
    folder = Run(path)
    analysis = folder.path / "analysis.json"
    kind = "run" if folder.used else "analysis" if analysis.is_file() else "records"
    if kind == "records" and not (folder.records.is_file() or folder.parquet.is_file()):
        what = "is no folder of a run or an analysis" if folder.path.exists() else "does not exist"
        raise UserError(f"{path} {what}; a report takes a run folder, as runs/default, or what emformer analyze wrote.")
    found = Source(folder.path, kind)
    found.records = _tried(found, "Nothing recorded is shown", lambda: _records(folder))
    if kind == "run":
        settings = _tried(found, "The settings are not shown", folder.settings)
        found.curves = _tried(found, "The loss is not shown", lambda: _curves(folder)) or {}
        found.unit = f"loss, {settings.training.objective.unit}" if settings else "loss"
        found.facts = [*_run_facts(folder, settings, found.curves), *_environment(folder)]
        if staged:
            found.scene = _tried(found, "Nothing is drawn of the model", lambda: _stage(folder, settings))
    elif kind == "analysis":
        found.facts = [("analysis", folder.path.name), *_analysis_facts(_read_json(analysis)), *_environment(folder)]
        if staged:
            scene = folder.path / "scene.safetensors"
            found.scene = _tried(found, "Nothing is drawn of the model", lambda: Scene.load(scene))
    else:
        found.facts = [("records", folder.path.name)]
        found.missing.append("There is no config.yaml and no analysis.json, so nothing is known of the model.")
    return found


def _tried(found: Source, lost: str, make: Callable[[], T]) -> T | None:
    """What `make` gives; if it cannot, None, and the reason among what is missing."""
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            made = make()
        found.missing += [f"{note.message}." for note in notes if issubclass(note.category, UserWarning)]
    except (UserError, OSError) as error:
        found.missing.append(f"{lost}: {error}")
        return None
    return made


def _records(folder: Run) -> pd.DataFrame:
    found = read_records(folder.path)
    if found.empty:
        raise UserError("there are no rows yet.")
    return found


def _curves(folder: Run) -> dict[str, list[tuple[int, float]]]:
    rows = list(read_journal(folder.metrics))
    numbers = (int, float)
    curves = {
        name: [
            (row["step"], row[key]) for row in rows if isinstance(row.get(key), numbers) and isinstance(row.get("step"), numbers)
        ]
        for key, name in CURVES.items()
    }
    return {name: curve for name, curve in curves.items() if curve}


def _stage(folder: Run, settings: Settings | None) -> Scene:
    if settings is None:
        raise UserError("the settings cannot be read.")
    loaded = load(folder.path)
    corpus = settings.data.corpus if settings.data.path is None else File(settings.data.path)
    length = min(settings.probe.length, settings.model.context)
    prompts = probe(read_text(settings.data), corpus, settings.probe.prompts, length, settings.probe.seed)
    labels = None if prompts.labels is None else prompts.labels[0, :PROMPTS, :TOKENS]
    title = f"{folder.path.name}, step {loaded.step}"
    return stage(loaded.model, loaded.tokenizer, prompts.tokens[:PROMPTS, :TOKENS], labels, prompts.names, title=title)


def _run_facts(folder: Run, settings: Settings | None, curves: dict[str, list[tuple[int, float]]]) -> Iterator[tuple[str, str]]:
    yield "run", folder.path.name
    if settings is None:
        return
    model, training = settings.model, settings.training
    yield "model", in_words(model)
    yield "data", brief(settings.data.corpus if settings.data.path is None else settings.data.path)
    yield "tokens", brief(settings.data.tokenizer)
    yield (
        "objective",
        f"{brief(training.objective)}, {brief(training.optimizer)}, batches of {training.batch} × {model.context} tokens",
    )
    reached = max((step for curve in curves.values() for step, _ in curve), default=0)
    yield "steps", f"{reached:,} of {training.max_steps:,}"
    measured = curves.get("validation")
    if measured:
        best = min(measured, key=lambda point: point[1])
        unit = training.objective.unit
        yield "validation loss", f"{measured[-1][1]:.4f} {unit} (step {measured[-1][0]}), best {best[1]:.4f} (step {best[0]})"
    yield "seed", str(training.seed)


ASKED = {"text": "data", "tokens": "tokens", "length": "length of a prompt", "steps": "checkpoints", "observables": "measured"}


def _analysis_facts(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What `emformer analyze` was asked, and whether it is done."""
    if content.get("source"):
        yield "model of", str(content["source"])
    request = content.get("request")
    for name, shown in ASKED.items():
        value = request.get(name) if isinstance(request, dict) else None
        if value not in (None, [], ""):
            told = (
                ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)
            )
            yield shown, told
    if isinstance(request, dict) and isinstance(request.get("seed"), int):
        yield "seed", str(request["seed"])
    if content.get("finished") is False:
        yield "state", "not finished; emformer analyze continues it"


def in_words(model: Any) -> str:
    """The model of these settings (`emformer.settings.Model`) in a line: sizes, then its parts."""
    sizes = f"{model.depth} layers of {model.heads} heads in E = R^{model.dim}"
    named: list[object] = [
        f"M {brief(model.form)}",
        f"F {brief(model.content)}",
        model.kernel,
        model.mask,
        model.placement,
        *model.positions,
    ]
    named += [part for part in (model.norm, model.ffn, model.arrangement, model.functional, model.drift) if part is not None]
    if model.embedding.tied:
        named.append("tied embedding")
    if model.shared:
        named.append("one block for all layers")
    if model.layers:
        named.append(f"{len(model.layers)} layers with parts of their own")
    return f"{sizes}: {', '.join(part if isinstance(part, str) else brief(part) for part in named)}"


def brief(part: Any) -> str:
    """A part by its name and what differs from its defaults, as "LowRank(rank=16)"."""
    if not is_dataclass(part) or isinstance(part, type):
        return str(part)
    told = {one.name: getattr(part, one.name) for one in fields(part)}
    own = [f"{one.name}={told[one.name]!r}" for one in fields(part) if told[one.name] != one.default]
    return f"{type(part).__name__}({', '.join(own)})" if own else type(part).__name__


def _environment(folder: Run) -> Iterator[tuple[str, str]]:
    known = _read_json(folder.environment)
    if isinstance(known.get("parameters"), int):
        yield "parameters", f"{known['parameters']:,}"
    packages = known.get("packages")
    if isinstance(packages, dict):
        told = [f"{name} {version}" for name, version in packages.items() if version]
        yield "versions", ", ".join([f"Python {known.get('python', '?')}", *told])
    if known.get("device"):
        yield "device", str(known["device"])
    if known.get("git"):
        revision = str(known["git"])
        yield "git", revision[:12] + ("+" if revision.endswith("+") else "")
    if known.get("corpus"):
        yield "corpus", f"SHA-256 {str(known['corpus'])[:16]}…"
    resumed = known.get("resumed")
    if isinstance(resumed, list) and resumed:
        yield "resumed", f"{len(resumed)} times"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
