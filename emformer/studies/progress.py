"""How far an analysis has come: on the disk, so that it can be continued, and on the terminal."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emformer.parts import UserError
from emformer.records import Run, write_atomically

FORMAT = 1
NAME = "analysis.json"
WRITTEN = ("records.jsonl", "records.parquet", "scene.safetensors", "report.html", "tokenizer.json", "environment.json", NAME)
UNFINISHED = "unfinished"  # the folder of what is not kept when all is done
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
TELL_EVERY = 30.0  # seconds between two lines where there is no terminal


class Progress:
    """The file analysis.json of a folder: what was asked, and what is done.

    Attributes:
        folder: names its files as those of a run.
        content: `source` as it was named, `request` that must be the same to go on, `models` {step: SHA-256 of the weights} that
            were begun, `done` steps, `skipped` sentences, `seconds` spent on observing, `finished`.
    """

    def __init__(self, folder: Run, content: dict[str, Any]):
        self.folder, self.content = folder, content

    @property
    def state(self) -> Path:
        """Where the observations of the step under way are saved."""
        return unfinished(self.folder) / "state.safetensors"

    def write(self, **changes: Any) -> None:
        self.content |= changes
        write_atomically(self.folder.path / NAME, json.dumps({"format": FORMAT, **self.content}, indent=1) + "\n")

    def tidy(self) -> None:
        """Remove what only an unfinished analysis needs."""
        shutil.rmtree(unfinished(self.folder), ignore_errors=True)


def unfinished(folder: Run) -> Path:
    """Where an analysis that goes on keeps the state of its observations, and the text in the model's tokens."""
    return folder.path / UNFINISHED


def begin(folder: Run, source: str, request: Mapping[str, Any], overwrite: bool) -> Progress:
    """The progress of this request in the folder: none yet, or what an earlier call has left. Writes nothing where it refuses.

    Raises:
        UserError: if the folder holds another analysis (unless `overwrite`), or something else.
    """
    there = folder.path / NAME
    if there.exists():
        content = _read(there)
        if not overwrite:
            _same(folder.path, content["request"], request)
            return Progress(folder, content)
        remove(folder)
    elif folder.path.is_file() or (folder.path.is_dir() and any(not one.name.startswith(".") for one in folder.path.iterdir())):
        raise UserError(f"{folder.path} exists and is no analysis; choose another --out folder.")
    unfinished(folder).mkdir(parents=True, exist_ok=True)
    fresh = Progress(folder, {"source": source, "request": dict(request), "models": {}, "done": [], "skipped": []})
    fresh.write(seconds=0.0, finished=False)
    return fresh


def remove(folder: Run) -> None:
    """Delete what an analysis writes, and nothing else that lies in the folder."""
    for name in ("figures", UNFINISHED):
        shutil.rmtree(folder.path / name, ignore_errors=True)
    for name in WRITTEN:
        (folder.path / name).unlink(missing_ok=True)
    if not any(folder.path.iterdir()):
        folder.path.rmdir()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise UserError(f"{path} is of another version of emformer; choose another --out folder.")
        kinds = {"request": dict, "models": dict, "done": list, "skipped": list, "finished": bool, "seconds": float | int}
        if not all(isinstance(content[name], kind) for name, kind in kinds.items()):
            raise TypeError
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or of no analysis; remove its folder, or choose another --out folder.") from error
    return content


def _same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*old, *new]):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        told = f"{name} {before}, not {now}" if max(len(str(before)), len(str(now))) <= 60 else f"other {name}"
        if name == "identity":
            told = "another content of its text"
        raise UserError(f"{folder} was begun with {told}; choose another --out folder, or remove it with --overwrite.")


@contextmanager
def telling(what: str, total: int | None, start: int = 0) -> Generator[Callable[[int], None]]:
    """A function that is told the number of tokens so far: a bar with speed and time left on a terminal, else a line on stderr
    now and then."""
    if sys.stderr.isatty():
        with tqdm(desc=what, total=total, initial=start, unit="token", unit_scale=True, leave=False) as bar:
            yield lambda count: bar.update(count - bar.n) and None
        return
    begun = last = time.monotonic()

    def tell(count: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < TELL_EVERY:
            return
        last, rate = now, (count - start) / (now - begun)
        of = f" of {total:,}" if total is not None else ""
        left = f", {tqdm.format_interval((total - count) / rate)} left" if total is not None and rate else ""
        print(f"{what}: {count:,}{of} tokens, {rate:,.0f} a second{left}", file=sys.stderr, flush=True)

    yield tell


@contextmanager
def sharing(what: str, start: float = 0.0) -> Generator[Callable[[float, str], None]]:
    """A function that is told the share done, in [0, 1], and a word on what is being done: a bar on a terminal, else a line on
    stderr now and then. `start` is the share that was done before: the time left follows from the rest alone."""
    if sys.stderr.isatty():
        with tqdm(desc=what, total=1.0, initial=start, bar_format=BAR, leave=False) as bar:

            def show(share: float, word: str) -> None:
                bar.set_postfix_str(word, refresh=False)
                bar.update(share - bar.n)

            yield show
        return
    begun = last = time.monotonic()

    def tell(share: float, word: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < TELL_EVERY:
            return
        last = now
        left = f", {tqdm.format_interval((now - begun) * (1 - share) / (share - start))} left" if share > start else ""
        print(f"{what}: {word}, {share:.0%}{left}", file=sys.stderr, flush=True)

    yield tell
