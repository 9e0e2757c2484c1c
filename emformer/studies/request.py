"""What an analysis is asked for: which checkpoints, which text, where to; all that can be refused before anything is read."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from emformer.model import Emformer
from emformer.parts import Corpus, UserError
from emformer.records import Loaded, Run, load, read_checkpoint
from emformer.studies.progress import telling, unfinished
from emformer.studies.sample import Sample, Windows, classes, own_text, tokenised
from emformer.text import File, save, vocabulary

AT_ONCE = 4096  # tokens in one pass through the model, at most
BUDGET = 1 << 29  # bytes that their trajectory may take
OWN = "validation"  # what a run's own text is called

Checkpoints = str | int | Iterable[str | int]


class Checkpoint(NamedTuple):
    """A model that is loaded when its turn comes."""

    step: int
    load: Callable[[], Loaded]


def checkpoints(source: str | Path, named: Checkpoints) -> list[Checkpoint]:
    """The checkpoints of a run that are named ("last", "best", steps, "all"), each once, in the order of their steps; of any
    other source its one model.

    Raises:
        UserError: for a checkpoint that is not there.
    """
    words = [named] if isinstance(named, str | int) else list(named)
    names = [word.strip() for one in words for word in str(one).split(",") if word.strip()]
    if not names:
        raise UserError("no checkpoint is named; choose last, best, all or steps, as 100,200.")
    run = Run(source)
    if not run.checkpoints.is_dir():
        if names != ["last"]:
            raise UserError(f"{source} is one model, not a run of which '{','.join(names)}' were kept; leave --checkpoints out.")
        whole = load(source)
        return [Checkpoint(whole.step, lambda: whole)]
    if "all" in names:
        kept = [str(step) for step in run.steps]
        names = [*(name for name in names if name != "all"), *kept, *(["last"] if run.last.exists() or not kept else [])]
    found: dict[int, Checkpoint] = {}
    for name in names:
        path = {"last": run.last, "best": run.best}.get(name)
        if path is not None and path.exists():
            step = int(read_checkpoint(path)["global_step"])
        elif name.isdecimal() and run.step(int(name)).exists():
            step = int(name)
        else:
            whole = load(source, name)  # says what there is instead
            step = whole.step
        found.setdefault(step, Checkpoint(step, lambda name=name: load(source, name)))
    return [found[step] for step in sorted(found)]


def place(device: str) -> torch.device:
    """ "auto", "cpu" or "cuda" as a device. Raises `UserError` for another, and for one that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"'{device}' is no device; choose auto, cpu or cuda.")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("this machine has no CUDA device that torch can use; choose --device cpu.")
    return torch.device("cuda" if there and device != "cpu" else "cpu")


def check(loaded: Loaded, length: int, tokens: int | None, batch: int | None, seed: int) -> None:
    """Raise `UserError` for numbers that no analysis of this model can have, and for a model that cannot read text."""
    for name, value, least in (("tokens", tokens, 1), ("length", length, 2), ("batch", batch, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; choose at least {least}.")
    if tokens is not None and tokens < length:
        raise UserError(f"--tokens {tokens} hold no prompt of {length}; choose more of them, or a smaller --length.")
    size, model = vocabulary(loaded.tokenizer), loaded.config.model
    if model.embedding.positions is not None and length > model.context:
        raise UserError(f"--length {length} is more than the {model.context} positions that {loaded.path} has learned.")
    if length > model.context:
        told = f"  prompts of {length} tokens are longer than the windows of {model.context} that {loaded.path} was trained on"
        tqdm.write(told, file=sys.stderr)
    if size > loaded.model.vocab:
        raise UserError(f"{loaded.path}: its tokenizer has {size} tokens and its model {loaded.model.vocab}; they do not fit.")


def fitting(model: Emformer, length: int) -> int:
    """Prompts of this length that go through at once: at most 4,096 tokens, whose trajectory takes 512 MB. At least one."""
    settings, size = model.settings, next(model.parameters()).element_size()
    clouds = 5 * 2 * settings.depth * settings.dim  # before, read, mixture, update, after of each step
    patterns = settings.depth * settings.heads * length
    return max(1, min(AT_ONCE, BUDGET // (size * (clouds + patterns))) // length)


class Reading(NamedTuple):
    """A text that is known and not yet read. `open` tokenises it; `labels` names the classifications of its words."""

    name: str
    identity: str
    labels: tuple[str, ...]
    open: Callable[[], Sample]


def reading(
    loaded: Loaded, text: str | Path | None, corpus: str | Corpus | None, folder: Run, length: int, tokens: int | None, seed: int
) -> Reading:
    """The text or corpus, or without either the probe prompts of the run's own validation text.

    Raises:
        UserError: for both at once, a corpus that does not exist, a text that cannot be read, a model that came without its own.
    """
    if text is not None and corpus is not None:
        raise UserError("--text and --corpus exclude each other: name one of them.")
    if text is None and corpus is None:
        setting = loaded.config.probe
        sample = own_text(loaded).sample(setting.prompts if tokens is None else tokens // length, length, setting.seed + seed)
        return Reading(OWN, sample.identity, sample.names, lambda: sample)
    source = File(str(text)) if text is not None else named_corpus(corpus) if isinstance(corpus, str) else corpus
    assert source is not None

    def opened() -> Sample:
        tokenizer = folder.tokenizer
        save(loaded.tokenizer, tokenizer)
        with telling("tokenising", None) as tell:
            blocks = tokenised(source, tokenizer, unfinished(folder), tell)
        return Windows(blocks.tokens, length, seed, tokens, classes(blocks))

    return Reading(str(source), source.identity(), getattr(source, "label_names", ()), opened)


def named_corpus(name: str) -> Corpus:
    """The corpus of this class with its defaults. Raises `UserError` if there is none, or it has none."""
    known = {one.__name__: one for one in _below(Corpus) if not getattr(one, "__abstractmethods__", None)}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sorted(known))}."
        raise UserError(f"'{name}' is no corpus; {hint}")
    try:
        return known[name]()
    except TypeError:
        raise UserError(f"--corpus {name} takes more than its name; name a local text with --text FILE.") from None


def _below(base: type) -> Iterable[type]:
    for one in base.__subclasses__():
        yield one
        yield from _below(one)


def default_folder(source: str | Path, text: str | Path | None, corpus: str | Corpus | None) -> Path:
    """analyses/SOURCE, or analyses/SOURCE-TEXT."""
    path = Path(source)
    if path.suffix == ".ckpt":
        name = f"{path.absolute().parent.parent.name}-{path.stem}"
    else:
        name = path.absolute().name if path.exists() else str(source)
    of = "" if text is None else Path(text).name.partition(".")[0]
    if corpus is not None:
        of = corpus if isinstance(corpus, str) else type(corpus).__name__
    return Path("analyses") / re.sub(r"[^\w.-]+", "-", f"{name}-{of}").strip("-.")
