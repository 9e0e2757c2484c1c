"""A folder of our own that can be given away: config.json, model.safetensors, tokenizer.json. Nothing in it is code.

config.json      {"model_type": "emformer", "format": 1, "vocab", "dtype", "step", "model", "objective"}: the settings of the
                 model and what it was trained for, parts by class path; no paths of this machine, no other settings
model.safetensors   the weights by their names in `state_dict`; tensors that are tied stand there once
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from emformer import parts
from emformer.configuration import revive
from emformer.files import replaced_folder
from emformer.interop.config import Facts
from emformer.interop.weights import FLOATS, Entry, Weights, filled, same
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.settings import Model, Settings
from emformer.text import tokenizers

FORMAT = 1
MOST = 2**24  # layers, and tokens of a context: far beyond every model, and short of what a file may make a machine do
CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
# what a folder that holds a model and nothing else may hold, of ours or as `transformers` writes it
_FILES = re.compile(
    r"config\.json|generation_config\.json|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|README\.md"
)


def save(
    model: Emformer,
    tokenizer: Tokenizer | None,
    settings: Settings,
    folder: str | Path,
    *,
    step: int = 0,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the folder; it appears whole or not at all.

    Args:
        model: what is saved, with its settings.
        tokenizer: or null, if there is none.
        settings: of these, what the model was trained for.
        step: of training, that the weights are from.
        dtype: of the weights in the file; null for the model's own.
        overwrite: replace a folder that holds a model and nothing else.

    Raises:
        UserError: for a folder that is taken, and a model that its settings do not describe (after a surgery).
    """
    if model.surgery:
        raise UserError(
            f"a model that was changed by surgery ({'; '.join(model.surgery)}) cannot be saved: its settings do not describe it; "
            "save the model that it was made from."
        )
    dtype = dtype or model.embedding.weight.dtype
    config = {
        "model_type": "emformer",
        "format": FORMAT,
        "vocab": model.vocab,
        "dtype": named(dtype),
        "step": step,
        "model": parts.plain(model.settings),
        "objective": parts.plain(settings.training.objective),
    }
    with writing(folder, overwrite) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in _once(model).items()}
        write_weights(state, partial)
        if tokenizer is not None:
            tokenizers.save(tokenizer, partial / TOKENIZER)
    return Path(folder)


def read(config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> Emformer:
    """The model of such a folder. Parts are named by class path, and no module is imported on a file's behalf.

    Raises `UserError` for a config.json that says something else, and weights that are not those of its model.
    """
    facts = Facts(config, f"{weights.where}: {CONFIG}")
    version, vocab = facts.count("format"), facts.count("vocab")
    if version != FORMAT:
        raise UserError(f"{facts.where} has the format {version}; this version reads {FORMAT}.")
    settings = told(config, weights.where).model
    state = _once(blank(vocab, settings, len(weights.places), facts.where))
    entries = {name: Entry(tuple(value.shape), {name: same}) for name, value in state.items()}
    return filled(vocab, settings, dtype, weights, entries)


def blank(vocab: int, settings: Model, tensors: int, where: str) -> Emformer:
    """The model of settings that are not trusted, on the meta device: its shapes, and no numbers.

    Raises `UserError`, before time or memory is taken, for a model that so many `tensors` cannot be the weights of, and for sizes
    that no tensor can have.
    """
    layers = 1 if settings.shared else settings.depth
    if layers > tensors:
        raise UserError(f"{where} says model.depth {settings.depth}, and the file holds {tensors} tensors.")
    if max(settings.depth, settings.context) > MOST:
        raise UserError(f"{where}: a depth of {settings.depth} and a context of {settings.context} are more than it reads.")
    try:
        with torch.device("meta"):
            return Emformer(vocab, **vars(settings))
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # sizes that no tensor can have
        raise UserError(f"{where} describes a model that cannot be built: {str(error).splitlines()[0][:200]}.") from error


def dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type that the weights were saved in; float32 where config.json does not say."""
    return next((one for one in FLOATS.values() if named(one) == config.get("dtype")), torch.float32)


def step(config: Mapping[str, Any], where: str) -> int:
    """The step of training that the weights are from; 0 where config.json does not say."""
    return Facts(config, f"{where}: {CONFIG}").count("step", 0, least=0)


def told(config: Mapping[str, Any], source: str) -> Settings:
    """The settings in the config.json of such a folder."""
    model, objective = config.get("model"), config.get("objective")
    if not isinstance(model, dict) or not isinstance(objective, dict):
        raise UserError(f"{source}: {CONFIG} lacks the settings 'model' or 'objective'; it is damaged.")
    try:
        return around(model, objective, source)
    except UserError as error:
        raise UserError(f"{source}: {CONFIG}: {error}") from error


def around(model: Model | Mapping[str, Any], objective: Mapping[str, Any], source: str) -> Settings:
    """Settings of a model that came without those of a run: its own, its objective, its tokenizer; its text is not at hand.

    Args:
        model: settings, or plain data from a file, which is not trusted (`configuration.revive`).
        objective: as plain data.
        source: the folder, which has the tokenizer.
    """
    plain = parts.plain(model) if isinstance(model, Model) else dict(model)
    if isinstance(plain.get("layers"), dict):
        plain["layers"] = {_layer(key): value for key, value in plain["layers"].items()}  # JSON makes text of every key
    return revive(
        {
            "model": plain,
            "data": {
                "corpus": {"class_path": "emformer.text.corpora.Absent", "init_args": {"of": source}},
                "tokenizer": {"class_path": "emformer.text.tokenizers.Pretrained", "init_args": {"source": source}},
            },
            "training": {
                "objective": dict(objective),
                "optimizer": {"class_path": "emformer.training.optimizers.AdamW"},
            },
        }
    )


def _layer(key: str | int) -> int:
    try:
        return int(key)
    except ValueError:
        raise UserError(f"model.layers names a layer '{key}'; layers are numbers from 0.") from None


def named(dtype: torch.dtype) -> str:
    """As config.json says it: float32."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def writing(folder: str | Path, overwrite: bool) -> Generator[Path]:
    """An empty folder to write to, which takes the place of `folder` if the block ends well. Raises as `check_free`."""
    check_free(folder, overwrite)
    with replaced_folder(Path(folder)) as partial:
        yield partial


def check_free(folder: str | Path, overwrite: bool) -> None:
    """Raise `UserError` for a folder that is not empty, unless `overwrite`, and then for everything but a folder that holds
    a model and nothing else."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder to write to.")
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    if names and not overwrite:
        raise UserError(f"{path} exists and is not empty; choose another folder, or --overwrite if it holds a model to replace.")
    if names:
        strange = next((name for name in names if not _FILES.fullmatch(name)), None)
        if strange is not None or not _is_model(path / CONFIG):
            what = f"holds {strange}, which is no part of a model" if strange else "has no config.json of a model"
            raise UserError(f"{path} {what}, so it is left as it is; choose another folder.")


def _is_model(path: Path) -> bool:
    try:
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def write_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """model.safetensors. Tensors that share memory are written each for itself."""
    apart, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if memory in seen else value
        seen.add(memory)
    try:
        save_file(apart, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # how it tells of a full disk
        raise UserError(f"cannot write {folder / WEIGHTS}: {error}; nothing saved before is damaged.") from error


def _once(model: Emformer) -> dict[str, Tensor]:
    """The state, of tensors that are one under several names the first alone."""
    kept, seen = {}, set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            kept[name] = value.detach()
    return kept
