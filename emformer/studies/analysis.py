"""Everything that the recorder can measure, of any checkpoint on any text: an analysis folder.

analysis.json      what was asked, of which model, and how far it has come
records.jsonl      one row a statistic, as of a run; records.parquet is derived
scene.safetensors  what is drawn of the model on a few prompts and is no row
figures/           drawn from records; report.html shows all of it
environment.json, tokenizer.json   as of a run
unfinished/        while it goes on: what the observations know, and the text in the model's tokens
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emformer import parts
from emformer.figures.scene import stage
from emformer.memory import keep_freed_memory
from emformer.model import Emformer
from emformer.observables import Look, Pass, Row, state
from emformer.parts import Corpus, UserError
from emformer.recordings import Recordings
from emformer.records import Loaded, Run
from emformer.report import write as write_report
from emformer.studies.looks import looks
from emformer.studies.progress import Progress, begin, remove, telling
from emformer.studies.request import Checkpoints, check, checkpoints, default_folder, fitting, place, reading
from emformer.studies.sample import Sample
from emformer.text import fingerprint, shuffled
from emformer.training.recording import finish
from emformer.trajectory import ClosureError, capture

LENGTH = 128  # tokens of a prompt, if nothing is said and the model's context is not shorter
SAVE_EVERY = 30.0  # seconds between two writings of the state, at least, and
SAVE_SHARE = 0.05  # of the time, at most, that goes into them
DRAWN = 8, 64  # prompts, and tokens of each, that the scene shows

Observables = str | parts.Observable | Look | Iterable[str | parts.Observable | Look]


def analyze(
    source: str | Path,
    *,
    text: str | Path | None = None,
    corpus: str | Corpus | None = None,
    out: str | Path | None = None,
    observables: Observables = "all",
    checkpoints: Checkpoints = "last",
    tokens: int | None = None,
    length: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    report: bool = True,
) -> Path:
    """Measure a model, or a whole training run, on a text, and write an analysis folder. Returns its path.

        emformer.analyze("runs/default", text="novel.txt", checkpoints="all")
        emformer.read_records("analyses/default-novel")

    The text goes through the model window by window, in an order drawn by `seed`; no two windows share a token. Cheap observables
    see all of it, costly ones the first windows of that order, a fair sample: see `emformer.studies.looks`. Memory does not grow
    with the text. The same call continues an analysis that was killed, and gives the same rows, on the CPU bit for bit.

    Args:
        source: a run folder, a checkpoint file, or whatever else `emformer.load` takes.
        text: a file or glob, all of which may be read.
        corpus: instead of a text; a corpus, or the name of one that needs no arguments (PythonDocs, Grammar). Classes of a
            labelled one are held against clusters. Without either, the probe prompts of the run's own validation text.
        out: the folder; by default `analyses/SOURCE`, or `analyses/SOURCE-TEXT`.
        observables: "all", names of families, settings of observables, or `Look`s, which say how many prompts they see.
        checkpoints: of a run: "last", "best", steps, several of these, or "all" that were kept.
        tokens: read at most; by default all, and of a run's own text as many prompts as its probe has.
        length: of a prompt; by default 128 tokens, or the model's context if that is shorter (of a run's own text: the probe's).
        batch: prompts that go through the model at once; by default at most 4,096 tokens, whose trajectory fits into 512 MB.
        seed: of the order, and of the shuffled prompts that breathing is held against.
        device: "auto", "cpu" or "cuda".
        overwrite: remove an analysis that is there and begin anew.
        report: write report.html at the end.

    Raises:
        UserError: for whatever the caller can mend, among others a folder that holds another analysis or something else.
    """
    where, chosen = place(device), _chosen(source, checkpoints)
    first = chosen[0].load()
    setting = first.config
    if length is None:
        length = min(setting.model.context, LENGTH if text is not None or corpus is not None else setting.probe.length)
    check(first, length, tokens, batch, seed)
    wanted = looks(first.model, observables)
    if batch is None:
        batch = fitting(first.model, length)
    folder = Run(out if out is not None else default_folder(source, text, corpus))
    asked = reading(first, text, corpus, folder, length, tokens, seed)
    request = {
        "text": asked.name,
        "identity": asked.identity,
        "tokenizer": fingerprint(first.tokenizer),
        "tokens": tokens,
        "length": length,
        "batch": batch,
        "seed": seed,
        "steps": [one.step for one in chosen],
        "observables": [_told(look) for look in wanted],
        "device": where.type,
    }
    progress = begin(folder, str(source), request, overwrite)
    if not progress.content["finished"]:
        keep_freed_memory()
        try:
            sample = asked.open()
        except UserError:
            if not progress.content["models"]:  # a text that is of no use, and nothing measured yet
                remove(folder)
            raise
        last = first
        for k, one in enumerate(chosen):
            if one.step not in progress.content["done"]:
                last = one.load() if k else first
                title = f"step {one.step}" + (f" ({k + 1} of {len(chosen)})" if len(chosen) > 1 else "")
                _Measurement(last, sample, wanted, batch, seed, where, progress, title).run()
        finish(folder)
        _stage(progress, last if last.step == chosen[-1].step else chosen[-1].load(), sample, asked.labels)
        progress.write(finished=True)
        progress.tidy()
    if report and not folder.report.exists():
        try:
            write_report(folder.path)
        except UserError as error:  # all else is there, and can be read without it
            tqdm.write(f"no report: {error}", file=sys.stderr)
    return folder.path


_chosen = checkpoints  # `analyze` has an argument of that name


def _told(look: Look) -> str:
    seen = "all prompts" if look.prompts is None else f"up to {look.prompts} prompts"
    return f"{', '.join(map(str, look.observables))} on {seen}{'' if look.order == 'text' else f', {look.order}'}"


class _Measurement:
    """One checkpoint on the sample: from where an earlier process has left it, to rows."""

    def __init__(
        self,
        loaded: Loaded,
        sample: Sample,
        wanted: Sequence[Look],
        batch: int,
        seed: int,
        where: torch.device,
        progress: Progress,
        title: str,
    ):
        self._model, self._step = loaded.model.to(where), loaded.step
        self._sample, self._wanted, self._batch, self._where = sample, wanted, batch, where
        self._progress, self._title = progress, title
        self._about = {"step": loaded.step, "model": _digest(loaded.model), "request": _hashed(progress.content["request"])}
        # prompts that are looked at in either order, and where someone has seen enough
        self._ends = {look.order: 0 for look in wanted}
        for look in wanted:
            self._ends[look.order] = max(self._ends[look.order], self._enough(look))
        self._cuts = sorted({self._enough(look) for look in wanted})
        self._shuffled = np.empty((0, sample.length), np.int64)
        if "shuffled" in self._ends:
            self._shuffled = shuffled(sample.take(0, self._ends["shuffled"]).tokens, seed)
        self._passes = self._fresh()

    def _enough(self, look: Look) -> int:
        return self._sample.count if look.prompts is None else min(look.prompts, self._sample.count)

    def _fresh(self) -> dict[str, Pass]:
        return {order: Pass([look for look in self._wanted if look.order == order]) for order in self._ends}

    def run(self) -> None:
        """Measure, write the rows, and say that the step is done. Saves the state now and then."""
        progress, content = self._progress, self._progress.content
        known = content["models"].get(str(self._step))
        if known not in (None, self._about["model"]):
            raise UserError(
                f"the checkpoint of step {self._step} has changed since {progress.folder.path} was begun; choose another --out "
                "folder, or remove it with --overwrite."
            )
        progress.write(models=content["models"] | {str(self._step): self._about["model"]})
        at, seconds = self._continued()
        total, length = self._cuts[-1], self._sample.length
        if at:
            tqdm.write(f"step {self._step}: goes on at prompt {at:,} of {total:,}", file=sys.stderr)
        begun = saved = time.monotonic()
        rest = SAVE_EVERY
        with telling(self._title, total * length, at * length) as tell:
            while at < total:
                stop = min(at + self._batch, next(cut for cut in self._cuts if cut > at))
                self._look(at, stop)
                at = stop
                tell(at * length)
                now = time.monotonic()
                if now - saved >= rest and at < total:
                    kept = self._save(at, seconds + now - begun)
                    saved = time.monotonic()
                    rest = max(SAVE_EVERY, (saved - now) / SAVE_SHARE) if kept else math.inf
            rows = [row for one in self._passes.values() for row in one.rows()]
        self._write(rows)
        skipped = content["skipped"]
        for sentence in dict.fromkeys(sentence for one in self._passes.values() for sentence in one.skipped):
            if sentence not in skipped:
                skipped = [*skipped, sentence]
                tqdm.write(f"  {sentence}", file=sys.stderr)
        spent = content["seconds"] + seconds + time.monotonic() - begun
        progress.write(done=[*content["done"], self._step], skipped=skipped, seconds=round(spent, 3))
        progress.state.unlink(missing_ok=True)
        self._model.cpu()

    def _look(self, start: int, stop: int) -> None:
        """Prompts `start` to `stop`, to whoever still wants them."""
        lot = self._sample.take(start, stop)
        labels = None if lot.labels is None else self._to(lot.labels)
        groups = torch.from_numpy(np.ascontiguousarray(lot.groups, dtype=np.int64))
        try:
            for order, end in self._ends.items():
                if start < end:
                    mixed = order == "shuffled"
                    ids = self._shuffled[start:stop] if mixed else lot.tokens
                    self._passes[order].update(capture(self._model, self._to(ids), None if mixed else labels, groups))
        except ClosureError as error:
            raise UserError(f"step {self._step}: {error}") from error

    def _to(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids, dtype=np.int64)).to(self._where)

    def _continued(self) -> tuple[int, float]:
        """(prompts seen, seconds spent) of the saved state, which is taken over; zeros where there is none of use."""
        path = self._progress.state
        if not path.exists():
            return 0, 0.0
        try:
            saved = state.read(path)
            if {name: saved.about.get(name) for name in self._about} != self._about:
                return 0, 0.0  # of a step that is done
            state.restore(self._passes, saved.dump, self._where)
            return int(saved.about["at"]), float(saved.about["seconds"])
        except (UserError, ValueError, LookupError) as error:
            tqdm.write(f"{str(error).rstrip('.')}; step {self._step} is measured anew.", file=sys.stderr)
            self._passes = self._fresh()
            return 0, 0.0

    def _save(self, at: int, seconds: float) -> bool:
        """Whether there is a state to go on from: somebody's own observable may hold what cannot be written."""
        try:
            state.save(self._progress.state, self._passes, self._about | {"at": at, "seconds": seconds})
            return True
        except TypeError as error:
            tqdm.write(f"{error}; killed, step {self._step} would be measured anew.", file=sys.stderr)
            return False
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"cannot write {self._progress.state}: {reason}; make room, and give the same command again to go on."
            ) from error

    def _write(self, rows: Sequence[Row]) -> None:
        """The rows of this step, in place of what a killed process may have written of them."""
        done = self._progress.content["done"]
        recordings = Recordings(self._progress.folder.records, max(done, default=-1))
        recordings.append(self._step, rows)
        recordings.close()


def _stage(progress: Progress, loaded: Loaded, sample: Sample, names: Sequence[str]) -> None:
    """Keep what is drawn of the model on the first prompts, and the versions of what the numbers depend on."""
    folder, (prompts, length) = progress.folder, DRAWN
    lot = sample.take(0, min(prompts, sample.count))
    labels = None if lot.labels is None else lot.labels[:, :length]
    title = f"{progress.content['source']}, step {loaded.step}"
    stage(loaded.model.cpu(), loaded.tokenizer, lot.tokens[:, :length], labels, names, title=title).save(
        folder.path / "scene.safetensors"
    )
    request = progress.content["request"]
    parameters = sum(p.numel() for p in loaded.model.parameters())
    folder.write_environment(0, corpus=request["identity"], tokenizer=request["tokenizer"], parameters=parameters)


def _digest(model: Emformer) -> str:
    """SHA-256 of a model's settings and weights. Cost: a pass over them."""
    total = hashlib.sha256(json.dumps(parts.plain(model.settings), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _hashed(request: dict) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
