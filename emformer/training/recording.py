"""What is recorded while a model learns: the callbacks that YAML names, and the one Lightning callback that serves them all."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from emformer import figures, parts
from emformer.model import Emformer
from emformer.observables import Look, Pass, Row
from emformer.observables.base import Order
from emformer.observables.breathing import Breathing, Controls
from emformer.observables.clustering import Clustering, Density, Scan
from emformer.observables.flow import Bures, Flow, Transport
from emformer.parts import UserError
from emformer.recordings import Recordings, read_records, write_parquet
from emformer.records import Run
from emformer.text import Prompts, shuffled
from emformer.training.cadences import LogSpaced
from emformer.training.learner import Learner
from emformer.trajectory import ClosureError, captures

EIGHT = LogSpaced(8)


def _check(name: str, prompts: int | None) -> None:
    if prompts is not None and prompts < 1:
        raise UserError(f"{name}: prompts is {prompts}; choose at least 1.")


@dataclass(frozen=True)
class FlowCallback(parts.Callback):
    """How far and where the cloud moves: speed, turning, tortuosity, interference, radial share, transport distances.

    Args:
        cadence: when.
        prompts: of the probe that are looked at, all their tokens.
    """

    cadence: parts.Cadence = EIGHT
    prompts: int = 64

    def __post_init__(self) -> None:
        _check("FlowCallback", self.prompts)

    def looks(self, step: int, max_steps: int) -> Sequence[Look]:
        if not self.cadence.due(step, max_steps):
            return []
        costly = [Bures(), Transport(skip=1)] if step == max_steps else []
        return [Look([Flow(), Transport(), *costly], self.prompts)]


@dataclass(frozen=True)
class ClusteringCallback(parts.Callback):
    """How tokens gather: cosines, components, k-means at k = 8 with silhouette and persistence, separation by labels.

    HDBSCAN and the scan over k cost more and have their turn after the last step.

    Args:
        cadence: when.
        prompts: of the probe that are looked at; one cloud of 512 of their tokens is clustered.
    """

    cadence: parts.Cadence = EIGHT
    prompts: int = 64

    def __post_init__(self) -> None:
        _check("ClusteringCallback", self.prompts)

    def looks(self, step: int, max_steps: int) -> Sequence[Look]:
        if not self.cadence.due(step, max_steps):
            return []
        costly = [Density(), Scan()] if step == max_steps else []
        return [Look([Clustering(), *costly], self.prompts)]


@dataclass(frozen=True)
class BreathingCallback(parts.Callback):
    """Intrinsic dimension of the last-token cloud: up after attention, down after the FFN? With paired bootstrap, and Gride.

    The number of points is the same at every state and step: differences of dimension mean something at equal numbers alone
    (math G.2). Step 0 is the untrained model. The controls of math G.4 have their turn after the last step: uniform attention,
    random updates of the same norm, and the same prompts with their tokens shuffled.

    Args:
        cadence: when; step 0 is always recorded.
        prompts: of the probe, each giving its last token; at least 1,000 for an estimate of use.
    """

    cadence: parts.Cadence = EIGHT
    prompts: int = 1024

    def __post_init__(self) -> None:
        _check("BreathingCallback", self.prompts)

    def looks(self, step: int, max_steps: int) -> Sequence[Look]:
        if step and not self.cadence.due(step, max_steps):
            return []
        if step < max_steps:
            return [Look([Breathing()], self.prompts)]
        return [Look([Breathing(), Controls()], self.prompts), Look([Breathing()], self.prompts, "shuffled")]


@dataclass(frozen=True)
class ObservableCallback(parts.Callback):
    """Any observables, at any cadence.

    Args:
        observables: what is measured, as [{class_path: Sinks}, {class_path: Lens}].
        cadence: when.
        prompts: of the probe that are looked at; null for all.
        order: "text", or "shuffled" for prompts whose tokens but the last are shuffled.
    """

    observables: Sequence[parts.Observable]
    cadence: parts.Cadence = EIGHT
    prompts: int | None = 64
    order: Order = "text"

    def __post_init__(self) -> None:
        object.__setattr__(self, "observables", tuple(self.observables))  # YAML gives a list
        _check("ObservableCallback", self.prompts)

    @classmethod
    def examples(cls) -> Sequence[ObservableCallback]:
        return [cls([Flow()]), cls([Clustering(), Transport()], prompts=None, order="shuffled")]

    def looks(self, step: int, max_steps: int) -> Sequence[Look]:
        return [Look(self.observables, self.prompts, self.order)] if self.cadence.due(step, max_steps) else []


def record(
    model: Emformer, prompts: Prompts, looks: Sequence[Look], seed: int = 0, chunk: int = 64
) -> tuple[list[Row], list[str]]:
    """(rows, sentences about what was skipped) of the model on the probe: one pass for all looks at the text, one for all at
    shuffled prompts. Nothing of the model or of any global generator is changed.

    Args:
        seed: of the shuffling.
        chunk: prompts that go through the model at once.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    device = next(model.parameters()).device
    for order in ("text", "shuffled"):
        here = [look for look in looks if look.order == order]
        if not here:
            continue
        once = Pass(here)
        tokens, labels = prompts.tokens, prompts.labels
        if order == "shuffled":
            tokens = shuffled(tokens, seed)
            labels = None if labels is None else np.stack([shuffled(column, seed) for column in labels])
        enough = [len(tokens) if look.prompts is None else min(look.prompts, len(tokens)) for look in here]
        most = slice(max(enough))
        marks = None if labels is None else _to(labels[0, most], device)
        groups = torch.from_numpy(prompts.groups[most])
        for trajectory in captures(model, _to(tokens[most], device), marks, groups, chunk=chunk, cuts=enough):
            once.update(trajectory)
        rows += once.rows()
        skipped += [sentence for sentence in once.skipped if sentence not in skipped]
    return rows, skipped


def _to(ids: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(device)


@runtime_checkable
class Images(Protocol):
    """A logger that takes pictures."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None: ...


class Recording(pl.Callback):
    """Runs what is due after a step on the probe, in one pass for all, and writes the rows of it: to `records.jsonl` before any
    checkpoint of that step, to loggers as scalars, and as one line to the terminal. Figures when `figures` says, and at the end.

    Only the first process records; the others wait for it at their next exchange.

    Args:
        callbacks: what, and when.
        prompts: the probe.
        run: where to.
        step: that the run has reached and whose rows are kept; -1 for none.
        max_steps: of the run.
        drawn: when figures are drawn; after the last step they always are, and None is then alone.
    """

    def __init__(
        self,
        callbacks: Sequence[parts.Callback],
        prompts: Prompts,
        run: Run,
        step: int,
        max_steps: int,
        drawn: parts.Cadence | None,
    ):
        self.callbacks, self.prompts, self.run, self.max_steps, self.drawn = callbacks, prompts, run, max_steps, drawn
        self.seconds = 0.0  # spent here by this process
        self._start = step
        self._recordings: Recordings | None = None
        self._told: set[str] = set()

    def on_train_start(self, trainer: pl.Trainer, learner: Learner) -> None:
        if trainer.is_global_zero:
            self._recordings = Recordings(self.run.records, self._start)
            if self._start < 0:
                self._record(trainer, learner.model, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, learner: Learner, outputs: Any, batch: Any, batch_idx: int) -> None:
        accumulate = learner.settings.training.accumulate
        if trainer.is_global_zero and batch.index % accumulate == accumulate - 1:
            self._record(trainer, learner.model, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, learner: Learner) -> None:
        if trainer.is_global_zero and self._recordings is not None:
            begin = time.perf_counter()
            self._recordings.close()
            finish(self.run)
            self.seconds += time.perf_counter() - begin

    def _record(self, trainer: pl.Trainer, model: Emformer, step: int) -> None:
        looks = [look for one in self.callbacks for look in one.looks(step, self.max_steps)]
        if not looks or self._recordings is None:
            return
        begin = time.perf_counter()
        try:
            rows, skipped = record(model, self.prompts, looks)
        except ClosureError as error:
            raise UserError(f"recording after step {step}: {error}") from error
        self._recordings.append(step, rows)
        for sentence in skipped:
            if sentence not in self._told:
                self._told.add(sentence)
                tqdm.write(f"  {sentence}", file=sys.stderr)
        tqdm.write(f"step {step:>6}  {summary(rows)}", file=sys.stderr)
        mirrors = [logger for logger in trainer.loggers if logger.name != "journal"]
        scalars = named(rows) if mirrors else {}
        for logger in mirrors:
            logger.log_metrics(scalars, step=step)
        if step == self.max_steps or (self.drawn is not None and self.drawn.due(step, self.max_steps)):
            self._draw(mirrors, step)
        self.seconds += time.perf_counter() - begin

    def _draw(self, mirrors: Sequence[Any], step: int) -> None:
        drawn = draw(self.run)
        for logger in mirrors:
            if isinstance(logger, Images):
                for path in drawn:
                    logger.log_image(f"figures/{path.stem}", [np.asarray(Image.open(path))], step=step)


def draw(run: Run) -> list[Path]:
    """Draw every figure that the run's records allow into its `figures/`, and return their paths."""
    run.figures.mkdir(exist_ok=True)
    drawn = figures.draw_all(read_records(run.path)).items()
    return [figures.save(figure, run.figures / f"{name}.png") for name, figure in drawn]


def finish(run: Run) -> None:
    """Derive what a finished run has from its records: `records.parquet`, and the figures where they are older."""
    if not run.records.exists() or not run.records.stat().st_size:
        return
    newest = run.records.stat().st_mtime_ns
    if not run.parquet.exists() or run.parquet.stat().st_mtime_ns < newest:
        write_parquet(run.path)
    drawn = list(run.figures.glob("*.png")) if run.figures.exists() else []
    if not drawn or min(path.stat().st_mtime_ns for path in drawn) < newest:
        draw(run)


def named(rows: Sequence[Row]) -> dict[str, float]:
    """Scalars for a logger under readable names, as "flow/speed_rel/layer 3 ffn": statistics over all heads of raw clouds."""
    found = {}
    for row in rows:
        if row.mean is None or row.head is not None:
            continue
        family, _, name = row.key.partition(".")
        where = [] if row.layer is None else [f"layer {row.layer} {row.point}"]
        what = [text for text in (row.cloud if row.cloud != "raw" else None, row.param) if text]
        found["/".join([family, " ".join([name, *what]), *where])] = row.mean
    return found


def summary(rows: Sequence[Row]) -> str:
    """The record in a line, told of the last layer, as "layer 3: cloud moved 0.41, 12 clusters, dimension 4.1 ↑ 4.8 ↓ 4.4"."""
    last = max((row.layer for row in rows if row.layer is not None), default=0)
    at = {
        (row.key, row.point): row.mean
        for row in rows
        if row.layer == last and row.head is None and row.cloud == "raw" and row.param in (None, "c=0.9") and row.mean is not None
    }
    end = "ffn" if any(point == "ffn" for _, point in at) else next((point for _, point in at if point != "embed"), None)
    said = []
    moved = [value for (key, _), value in at.items() if key == "flow.speed_rel"]
    if moved:
        said.append(f"cloud moved {sum(moved):.2f}")
    clusters = at.get(("clu.components", end))
    if clusters is not None:
        said.append(f"{clusters:.0f} clusters")
    chain = _dimensions(rows, last)
    if chain:
        words = [f"{chain[0]:.1f}"]
        for before, after in pairwise(chain):
            words.append(f"{'↑' if after > before else '↓' if after < before else '='} {after:.1f}")
        said.append(f"dimension {' '.join(words)}")
    return f"layer {last}: {', '.join(said)}" if said else f"{len(rows)} rows recorded"


def _dimensions(rows: Sequence[Row], layer: int) -> list[float]:
    """Dimension of the raw cloud before layer `layer`, and after each of its steps, as far as they are defined."""
    found = [row for row in rows if row.key == "geo.id_twonn" and row.cloud == "raw" and row.param is None and row.head is None]
    first = next((k for k, row in enumerate(found) if row.layer == layer and row.point != "embed"), None)
    if first is None:
        return []
    return [row.mean for row in found[max(0, first - 1) :] if row.mean is not None]
