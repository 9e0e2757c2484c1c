"""Checkpoints of other libraries as M and F, and ours for others. What a folder holds is data; no code in it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tokenizers
import torch

from emformer.interop import bert, gpt2, llama, neox, own
from emformer.interop.config import read_config
from emformer.interop.vocabulary import read_tokenizer
from emformer.interop.weights import Weights
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.settings import Model

__all__ = ["FAMILIES", "Found", "read"]


class Family(Protocol):
    """A module that reads one `model_type`."""

    def read(self, config: dict[str, Any], weights: Weights, dtype: torch.dtype) -> Emformer:
        """The model of a config.json and its tensors. Raises `UserError`."""
        ...


FAMILIES: Mapping[str, Family] = {"gpt2": gpt2, "llama": llama, "gpt_neox": neox, "bert": bert, "emformer": own}


class Found(NamedTuple):
    """What a folder holds: `model` in eval mode on the CPU, `tokenizer` if there is one, the model's `settings`, `family` (its
    model_type), and whether it was trained to fill in masked tokens, `masked`, as far as its attention tells."""

    model: Emformer
    tokenizer: tokenizers.Tokenizer | None
    settings: Model
    family: str
    masked: bool


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Found:
    """The model that a folder with a config.json holds, as the transformers library writes it, or as we do.

    The logits are the library's, up to rounding; so are the states after every layer. Weights are converted to `dtype`. Sharded
    checkpoints are read one file at a time; memory beside the model's own is that of one tensor.

    Raises:
        UserError: for a kind of model that is not read, a feature that is not built, and files that are missing, damaged or do
            not fit their config.json.
    """
    config = read_config(folder)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        kind = f"model_type {str(family)[:40]!r} is not supported" if family is not None else "model_type is not said"
        raise UserError(f"{folder / 'config.json'}: {kind}; {', '.join(sorted(FAMILIES))} are.")
    model = FAMILIES[family].read(config, Weights.of(folder), dtype)
    settings = model.settings
    masked = not all(settings.layer(k).mask.causal for k in range(settings.depth))
    return Found(model, read_tokenizer(folder, family), settings, family, masked)
