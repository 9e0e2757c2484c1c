"""The run directory: what is written while a model trains, and how it is read back.

config.yaml        the resolved settings
environment.json   versions, device, seed, hashes of corpus and tokenizer, git revision
tokenizer.json
metrics.jsonl      append-only: one row a step that is logged; the truth, every other logger mirrors it
records.jsonl      append-only: one row a statistic that callbacks recorded; the truth, see `emformer.recordings`
records.parquet    the same rows, derived; report.html and figures/ are derived too
checkpoints/       last.ckpt (everything, to resume), best.ckpt and step-*.ckpt (weights and settings)
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer

from emformer import interop, parts
from emformer.configuration import load_parts, parse, read_yaml, revive, settings_parser
from emformer.files import replaced
from emformer.interop import hub, own
from emformer.interop.config import read_config
from emformer.interop.weights import FLOATS, check_shared, hollow, plain_data
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.settings import Settings
from emformer.text import vocabulary
from emformer.text.tokenizers import guarded

FORMAT = 1
MASKS = ("[MASK]", "<mask>")  # what the mask token is called


class Journal:
    """Rows of JSON, one line each, in an append-only file. One unbuffered write a row: a killed process loses no whole row.

    What follows the last whole row is torn, and dropped when the file is opened. A line before it that is no row was damaged by
    something else; it stays, and readers skip it with a warning.

    Args:
        path: the file; made if missing.
        step: rows of later steps are cut, wherever they stand, as a run that resumes at `step` writes them again. A row
            without a step counts as of step 0. -1 cuts every row, None keeps all.
    """

    def __init__(self, path: Path, step: int | None = None):
        self.path = path
        path.touch()
        kept = _kept(path, step)
        if len(kept) == 1:
            if kept[0].stop < path.stat().st_size:
                os.truncate(path, kept[0].stop)
        else:
            whole = path.read_bytes()
            write_atomically(path, b"".join(whole[some] for some in kept))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, row: dict[str, Any]) -> None:
        """Write one row. Numbers that are not finite become null. Raises `UserError` on a full disk, with nothing written."""
        line = (json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n").encode()
        written = 0
        try:
            while written < len(line):  # a disk that is nearly full takes a part, without an error
                written += self._file.write(line[written:])
        except OSError as error:
            if written:  # else the next row would be glued to it
                self._file.truncate(self._file.tell() - written)
            raise disk_error(error, self.path) from error

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal, up to a torn tail. Damaged lines before it are skipped with a warning."""
    damaged: list[int] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row = _row(line)
            if row is None:
                damaged.append(number)
                continue
            if damaged:
                warnings.warn(f"{path}: line {', '.join(map(str, damaged))} is damaged and left out", stacklevel=2)
                damaged.clear()
            yield row


def _kept(path: Path, step: int | None) -> list[slice]:
    """The bytes of a journal up to its last row of at most `step`, without rows of later steps; the first slice is from 0."""
    kept, start, at = [slice(0, 0)], 0, 0
    with open(path, "rb") as file:
        for line in file:
            at += len(line)
            row = _row(line)
            if row is None:
                continue  # goes with the next row
            if step is None or (row.get("step") or 0) <= step:
                if kept[-1].stop == start:
                    start = kept.pop().start
                kept.append(slice(start, at))
            start = at
    return kept


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int | float | None) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def disk_error(error: OSError, path: Path) -> UserError:
    """The sentence for a write that failed; what is already on disk stays as it was."""
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error)).lower()
    return UserError(
        f"cannot write {path}: {reason}; everything saved before is intact, so make room and continue (a run with --resume)."
    )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at once: a reader sees the old content or the new, a killed writer leaves the old."""
    try:
        with replaced(path) as partial:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise disk_error(error, path) from error


class Run:
    """The folder of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config, self.environment = self.path / "config.yaml", self.path / "environment.json"
        self.metrics, self.tokenizer = self.path / "metrics.jsonl", self.path / "tokenizer.json"
        self.records, self.parquet = self.path / "records.jsonl", self.path / "records.parquet"
        self.report, self.figures = self.path / "report.html", self.path / "figures"
        self.checkpoints = self.path / "checkpoints"
        self.last, self.best = self.checkpoints / "last.ckpt", self.checkpoints / "best.ckpt"

    def step(self, step: int) -> Path:
        """Path of the checkpoint of a step."""
        return self.checkpoints / f"step-{step:07d}.ckpt"

    @property
    def steps(self) -> list[int]:
        """Steps of which a checkpoint is kept, ascending."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self.checkpoints.glob("step-*.ckpt"))

    @property
    def used(self) -> bool:
        """Whether a run has begun here: a config.yaml that maps model, data and training."""
        try:
            return {"model", "data", "training"} <= read_yaml(self.config).keys()
        except UserError:
            return False

    def remove(self) -> None:
        """Delete what a run writes, and nothing else that lies in the folder."""
        for name in ("checkpoints", "tensorboard", "wandb", "figures"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for path in (self.environment, self.tokenizer, self.metrics, self.records, self.parquet, self.report, self.config):
            path.unlink(missing_ok=True)

    def settings(self) -> Settings:
        """The settings in config.yaml."""
        return read_settings(self.config)

    def curve(self, key: str) -> dict[int, float]:
        """{step: value} of one key of the metrics, as "val_loss", where it was measured."""
        return {row["step"]: row[key] for row in read_journal(self.metrics) if row.get(key) is not None}

    @property
    def corpus(self) -> str | None:
        """Identity of the text the run was begun with, if it is known."""
        try:
            return json.loads(self.environment.read_text(encoding="utf-8")).get("corpus")
        except (OSError, ValueError, AttributeError):
            return None

    def write_settings(self, settings: Settings) -> None:
        write_atomically(self.config, yaml.safe_dump(parts.plain(settings), sort_keys=False, allow_unicode=True))

    def write_environment(self, step: int, **facts: Any) -> None:
        """Versions of what the numbers depend on, and `facts`; of a run continued at `step`, when and how under "resumed"."""
        packages = ("emformer", "torch", "pytorch-lightning", "tokenizers", "datasets", "numpy")
        content: dict[str, Any] = {
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in packages},
            "machine": platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "git": _revision(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            **facts,
        }
        if step and self.environment.exists():
            first = json.loads(self.environment.read_text(encoding="utf-8"))
            again = {"step": step} | {key: value for key, value in content.items() if first.get(key) != value}
            content = first | {"resumed": [*first.get("resumed", []), again]}
        write_atomically(self.environment, json.dumps(content, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The git revision of this source tree, '+' if it has changes; None outside a checkout."""
    source = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def read_settings(path: str | Path, *more: str | Path) -> Settings:
    """The settings in a YAML file, complete. Parts are named by their class path, or by class where they are loaded.

    Further files go on top of it, as on the command line, and like there may name parts of modules that are then imported;
    one file alone imports nothing.
    """
    if not more:
        return revive(read_yaml(path))
    load_parts()
    words = [word for one in (path, *more) for word in ("-c", str(one))]
    return Settings(**{name: value for name, value in vars(parse(settings_parser("", ""), words)).items() if name != "config"})


class Loaded:
    """A model with what belongs to it.

    `model` in eval mode on the CPU, `config` (the settings), `path` of the checkpoint or folder, `step` it was saved at (0 where
    that is not known), `family`: "emformer", or the model_type that it had in another library.
    """

    def __init__(
        self, model: Emformer, tokenizer: Tokenizer | None, config: Settings, path: Path, step: int, family: str = "emformer"
    ):
        self.model, self.config, self.path, self.step, self.family = model, config, path, step, family
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `UserError` where the model came without one, see `has_tokenizer`."""
        if self._tokenizer is None:
            raise UserError(f"{self.path} came without a tokenizer, so it reads no text; put its tokenizer.json into the folder.")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def having(self, model: Emformer) -> Loaded:
        """The same with another model in its place, as a surgery made one."""
        return Loaded(model, self._tokenizer, self.config, self.path, self.step, self.family)

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
        """Write a folder of model, tokenizer and settings that can be given away; `load` reads it. See `emformer.interop.own`."""
        return own.save(self.model, self._tokenizer, self.config, folder, step=self.step, dtype=dtype, overwrite=overwrite)


def load(source: str | Path, which: str | int = "last", dtype: torch.dtype | None = None) -> Loaded:
    """The model of a run folder, of a checkpoint file, of a folder that holds a model (ours, or as `transformers` writes GPT-2,
    Llama, NeoX and BERT), or of a name on the Hugging Face hub.

    A name is looked up where no path is called so; without a network the cache is asked, and what is missing is said within
    three seconds. A model that came without a run has settings that are true of it: its own, what it was trained for, and its
    tokenizer; the text it learned from is absent, so that only another one can be read.

    Args:
        source: a run folder, a `.ckpt` file, a folder with a config.json, or a name as "gpt2" or "owner/name".
        which: in a run folder: "last", "best", or a step of which a checkpoint was kept.
        dtype: of the weights; null for the type they were saved in by us, and float32 for those of others.

    Raises:
        UserError: if there is none, or the files are truncated or of a kind that is not read. Everything is read as data
            (`weights_only`, safetensors, JSON); no code in it is run.
    """
    path = Path(source)
    if not path.exists() and hub.is_name(str(source)):
        try:
            folder = hub.pull(str(source))
        except UserError as error:
            raise UserError(f"{source} does not exist here; and as a name on the hub: {error}") from error
        return _load_folder(folder, str(source), dtype)
    if (path / own.CONFIG).is_file() and not Run(path).used:
        return _load_folder(path, str(path), dtype)
    path = _checkpoint(path, which)
    content = read_checkpoint(path)
    saved = content["emformer"]
    settings = revive(saved["settings"])
    with guarded(f"{path}: its tokenizer cannot be read", "the file is damaged"):
        tokenizer = Tokenizer.from_str(saved["tokenizer"])
    tokenizer.encode_special_tokens = True  # not kept in tokenizer.json
    if vocabulary(tokenizer) + settings.training.objective.extra_tokens != saved["vocab"]:
        raise UserError(
            f"{path}: the model has {saved['vocab']} tokens and its tokenizer {vocabulary(tokenizer)}; "
            "they do not belong together."
        )
    weights = {key.removeprefix("model."): value for key, value in content["state_dict"].items()}
    _compare(own.blank(saved["vocab"], settings.model, len(weights), str(path)), weights, path)
    with torch.random.fork_rng(devices=[]):  # the initial draw is overwritten, so it shall not move the caller's generator
        model = Emformer(saved["vocab"], **vars(settings.model))
    if weights:
        model.to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    if dtype is not None:
        model.to(dtype)
    return Loaded(model.eval(), tokenizer, settings, path, content["global_step"])


def _compare(blank: Emformer, weights: dict[str, Any], path: Path) -> None:
    """Raise unless these are the tensors of the model, each with the numbers that its shape claims."""
    asked = blank.state_dict()
    strange = sorted(asked.keys() ^ weights.keys())
    if strange:
        what = "is missing" if strange[0] in asked else "has no place in it"
        raise UserError(f"{path}: the weights do not fit the settings saved with them ('{strange[0]}' {what}).")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided or hollow(value):
            raise UserError(f"{path}: '{name}' is no plain tensor.")
        if value.dtype not in FLOATS.values():
            raise UserError(f"{path}: '{name}' is stored as {value.dtype}; weights are floating-point numbers.")
        if value.shape != asked[name].shape:
            raise UserError(
                f"{path}: the weights do not fit the settings saved with them ('{name}' has the shape {list(value.shape)[:8]}, "
                f"not {list(asked[name].shape)})."
            )
    check_shared(weights, path)


def _load_folder(folder: Path, source: str, dtype: torch.dtype | None) -> Loaded:
    """The model of a folder with a config.json. `source`: where its tokenizer will be found again."""
    config = read_config(folder)
    ours = config.get("model_type") == "emformer"
    found = interop.read(folder, dtype or (own.dtype(config) if ours else torch.float32))
    model, tokenizer = found.model, found.tokenizer
    if tokenizer is not None and vocabulary(tokenizer) > model.vocab:
        raise UserError(
            f"{folder}: the model has {model.vocab} tokens and its tokenizer {vocabulary(tokenizer)}; "
            "they do not belong together."
        )
    if ours:
        settings, step = own.told(config, source), own.step(config, str(folder))
    else:
        settings, step = own.around(found.settings, _objective(found), source), 0
    return Loaded(model, tokenizer, settings, folder, step, found.family)


def _objective(found: interop.Found) -> dict[str, Any]:
    """What a model of another library was trained for, as plain data: what its attention allows."""
    if not found.masked:
        return {"class_path": "emformer.training.objectives.NextToken"}
    ids = [] if found.tokenizer is None else [found.tokenizer.token_to_id(name) for name in MASKS]
    token = next((token for token in ids if token is not None), None)
    return {"class_path": "emformer.training.objectives.MaskedToken", "init_args": {"mask_token": token}}


def _checkpoint(source: Path, which: str | int) -> Path:
    if source.is_file():
        return source
    if not source.exists():
        raise UserError(f"{source} does not exist; give a run folder, a checkpoint file or the folder of a model.")
    run = Run(source)
    named = {"last": run.last, "best": run.best}
    path = named[which] if isinstance(which, str) and which in named else None
    if path is None:
        try:
            path = run.step(int(which))
        except ValueError:
            raise UserError(f"'{which}' names no checkpoint; choose last, best or a step.") from None
    if path.exists():
        return path
    kept = [name for name, file in named.items() if file.exists()] + [str(step) for step in run.steps]
    has = f"it has {', '.join(kept)}" if kept else "it has no checkpoint yet"
    raise UserError(f"{source} has no checkpoint '{which}'; {has}.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of emformer, as plain data on the CPU. Raises `UserError` for any other file."""
    try:
        content = plain_data(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is truncated, or holds something other than plain data."
        ) from error
    own = content.get("emformer") if isinstance(content, dict) else None
    whole = isinstance(content, dict) and {"state_dict", "global_step"} <= content.keys()
    if not whole or not isinstance(own, dict) or not {"settings", "tokenizer", "vocab", "format"} <= own.keys():
        raise UserError(f"{path} is not a checkpoint of emformer.")
    kinds = (content["state_dict"], dict), (content["global_step"], int), (own["vocab"], int), (own["tokenizer"], str)
    if not all(isinstance(value, kind) for value, kind in kinds) or not all(
        isinstance(key, str) for key in content["state_dict"]
    ):
        raise UserError(f"{path} is not a checkpoint of emformer, or a damaged one.")
    if own["format"] != FORMAT:
        raise UserError(f"{path} has the checkpoint format {own['format']}; this version reads {FORMAT}.")
    return content
