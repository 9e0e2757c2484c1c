"""Batches: a pure function of (seed, i), whatever the process, the worker or the moment."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emformer import parts
from emformer.parts import UserError
from emformer.settings import Data, Training
from emformer.text import Blocks, File, Windows, prepare, vocabulary
from emformer.training.objectives import IGNORE

ENDLESS = 10**12  # batches; training ends at max_steps, and a loader with a length is not prefetched by Lightning


class Batch(NamedTuple):
    """Inputs and targets (B, T), `total` positions with a loss in the whole optimiser step, over all processes."""

    inputs: Tensor
    targets: Tensor
    total: int
    index: int


def check_division(training: Training, world: int) -> None:
    """Raise unless the batch divides evenly over processes and micro-batches."""
    if training.batch % (world * training.accumulate):
        raise UserError(
            f"training.batch is {training.batch} sequences, which {world} processes times {training.accumulate} micro-batches do "
            "not divide; choose a multiple."
        )


class TrainingBatches(Dataset):
    """Micro-batch m of one process: rows of batch i = m // accumulate."""

    def __init__(self, windows: Windows, objective: parts.Objective, vocab: int, training: Training, rank: int, world: int):
        self.windows, self.objective, self.vocab = windows, objective, vocab
        self.accumulate, self.size, self.seed = training.accumulate, training.batch, training.seed
        self.rank, self.world = rank, world
        check_division(training, world)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        step, micro = divmod(index, self.accumulate)
        # the whole batch is cut, so that every process knows how many positions carry a loss without being told
        rng = np.random.default_rng((self.seed, 1, step))
        inputs, targets = self.objective.cut(self.windows.batch(step, self.size), rng, self.vocab)
        total = int((targets != IGNORE).sum())
        rows = slice(micro * self.world + self.rank, None, self.accumulate * self.world)
        return Batch(torch.from_numpy(inputs[rows].copy()), torch.from_numpy(targets[rows].copy()), total, index)


class ValidationBatches(Dataset):
    """The validation windows in order, `size` a batch, every `world`-th batch from `rank` on. Always the same."""

    def __init__(self, windows: Windows, objective: parts.Objective, vocab: int, size: int, limit: int | None):
        self.windows, self.objective, self.vocab, self.size = windows, objective, vocab, size
        count = len(windows)
        kept = count if limit is None else min(limit, count)
        self.picked = np.linspace(0, count - 1, kept).round().astype(int) if kept < count else np.arange(count)

    def __len__(self) -> int:
        return -(-len(self.picked) // self.size)

    def __getitem__(self, index: int) -> Batch:
        picked = self.picked[index * self.size : (index + 1) * self.size]
        # each window is cut by its own generator, so that nothing depends on how many go together
        cuts = [
            self.objective.cut(self.windows.fixed(k, k + 1), np.random.default_rng((0, 2, k)), self.vocab)
            for k in picked.tolist()
        ]
        inputs, targets = (np.concatenate(arrays) for arrays in zip(*cuts, strict=True))
        total = int((targets != IGNORE).sum())
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), total, index)


def read_text(data: Data, progress=None) -> Blocks:
    """The tokenised text of these settings, from the cache or put there."""
    corpus = data.corpus if data.path is None else File(data.path)
    return prepare(corpus, data.tokenizer, data.validation, cache=data.cache, max_tokens=data.max_tokens, progress=progress)


class Text(pl.LightningDataModule):
    """Training and validation batches of tokenised text.

    The training loader starts at the optimiser step the trainer has reached, so that a resumed run sees the batches an
    uninterrupted one would have seen.
    """

    def __init__(self, blocks: Blocks, context: int, training: Training, workers: int = 0):
        super().__init__()
        self.blocks, self.training, self.workers = blocks, training, workers
        self.vocab = vocabulary(blocks.tokenizer)
        self.train = Windows(blocks.train, context, training.seed)
        self.validation = Windows(blocks.validation, context, 0)

    def train_dataloader(self) -> DataLoader:
        rank, world, step = 0, 1, 0
        if self.trainer is not None:
            rank, world, step = self.trainer.global_rank, self.trainer.world_size, self.trainer.global_step
        batches = TrainingBatches(self.train, self.training.objective, self.vocab, self.training, rank, world)
        return self._loader(batches, range(step * self.training.accumulate, ENDLESS))

    def val_dataloader(self) -> DataLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        micro = max(1, self.training.batch // self.training.accumulate // world)
        limit = self.training.validation_windows
        kept = len(self.validation) if limit is None else min(limit, len(self.validation))
        if kept < world:
            raise UserError(f"there are {kept} validation windows for {world} processes; give each at least one.")
        size = min(2 * micro, kept // world)  # every process gets a batch
        batches = ValidationBatches(self.validation, self.training.objective, self.vocab, size, limit)
        return self._loader(batches, range(rank, len(batches), world))

    def _loader(self, batches: Dataset, order: range) -> DataLoader:
        return DataLoader(
            batches,
            batch_size=None,
            sampler=order,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            # the base seed of workers would be drawn from the global generator; nothing in them is random
            generator=torch.Generator(),
        )
