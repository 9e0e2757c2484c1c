"""The loss of a trained model on a text."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from emformer.parts import UserError
from emformer.records import Loaded
from emformer.text import File, Windows, vocabulary
from emformer.text.tokenizers import guarded
from emformer.training.data import ValidationBatches, read_text
from emformer.training.learner import nll
from emformer.training.objectives import IGNORE

LOGITS = 2**27  # at once: 512 MB in float32, so that 1,024 tokens of 50,257 words each go through two windows at a time


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over `positions` targets in `windows` windows, its standard error over windows, bits per byte.

    `bits_per_byte` is None where the objective does not cover the text. The standard error (nan for one window)
    treats windows as independent, which consecutive text is not quite: read it as a lower bound.
    """

    loss: float
    error: float
    unit: str
    bits_per_byte: float | None
    windows: int
    positions: int

    def __str__(self) -> str:
        spread = "" if math.isnan(self.error) else f" ± {self.error:.4f}"
        line = f"loss {self.loss:.4f}{spread} {self.unit}"
        if self.bits_per_byte is not None:
            line += f"   {self.bits_per_byte:.4f} bits per byte"
        return f"{line}   ({self.windows:,} windows, {self.positions:,} targets)"


def evaluate(loaded: Loaded, text: str | None = None, batch: int = 32) -> Evaluation:
    """Validate a loaded model on its own validation split, or on all of another text, with its own tokenizer.

    Args:
        loaded: from `emformer.load`.
        text: file or glob; None for the run's own validation split.
        batch: windows at once; fewer where the logits of so many would not fit into memory.

    Raises:
        UserError: for a text that is missing, binary or shorter than a window, and if the run's corpus no longer gives its
            tokenizer.
    """
    settings = loaded.config
    objective = settings.training.objective
    if text is None:
        blocks = read_text(settings.data)
        if blocks.tokenizer.to_str() != loaded.tokenizer.to_str():
            raise UserError(
                f"the corpus of {loaded.path} has changed and no longer gives its tokenizer; name a text with --text FILE."
            )
        tokens, bytes_per_token = blocks.validation, blocks.bytes_per_token("validation")
    else:
        documents = list(File(text).documents())
        end = loaded.tokenizer.token_to_id("<|endoftext|>")
        heads = [end] if len(documents) > 1 and end is not None else []  # as in training
        with guarded("the tokenizer cannot read this text", "take another text"):
            pieces = [heads + loaded.tokenizer.encode(document, add_special_tokens=False).ids for document in documents]
        tokens = np.fromiter(chain.from_iterable(pieces), dtype=np.int64)
        bytes_per_token = sum(len(document.encode()) for document in documents) / max(1, len(tokens))
    windows = Windows(tokens, settings.model.context, 0)
    vocab = vocabulary(loaded.tokenizer)
    if vocab + objective.extra_tokens > loaded.model.vocab:
        raise UserError(f"{loaded.path}: its tokenizer has no mask token, and its model no id to stand for one.")
    batch = max(1, min(batch, LOGITS // (settings.model.context * loaded.model.vocab)))
    batches = ValidationBatches(windows, objective, vocab, batch, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded.model.to(device)
    sums, counts = [], []  # by window
    bar = tqdm(DataLoader(batches, batch_size=None), unit="batch", leave=False, disable=not sys.stderr.isatty())
    with torch.inference_mode():
        for one in bar:
            moved = one._replace(inputs=one.inputs.to(device), targets=one.targets.to(device))
            sums.append(nll(model, moved, reduction="none").view_as(moved.targets).double().sum(1).cpu())
            counts.append((one.targets != IGNORE).sum(1))
    total, count = torch.cat(sums), torch.cat(counts)
    positions = int(count.sum())
    loss = float(total.sum()) / positions
    # a ratio of two means: the residuals of each window, as if windows were independent
    spread = float((total - loss * count).square().sum())
    many = len(total)
    error = math.sqrt(spread * many / (many - 1)) / positions if many > 1 else math.nan
    bits = loss / math.log(2) / bytes_per_token if objective.covers_text else None
    return Evaluation(loss, error, objective.unit, bits, len(windows), positions)
