"""Callbacks: metrics, checkpoints, progress, and a clean stop at a signal."""

from __future__ import annotations

import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from tokenizers import Tokenizer
from tqdm import tqdm

from emformer.files import replaced
from emformer.parts import UserError
from emformer.records import Run, disk_error, read_checkpoint
from emformer.settings import Training
from emformer.training.learner import Learner


class AtomicFiles(CheckpointIO):
    """Checkpoints are written beside their name and moved into place; a killed or failed writer leaves the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        for value in checkpoint["state_dict"].values():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise UserError(
                    f"the weights are not finite after step {checkpoint['global_step']}: they are not saved, and the last "
                    "checkpoint is good; try a smaller learning rate."
                )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as partial:
                torch.save(checkpoint, partial)
        except (OSError, RuntimeError) as error:  # torch turns some failed writes into RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            raise disk_error(cause if isinstance(cause, OSError) else OSError(str(error)), path) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Metrics(pl.Callback):
    """Rows of metrics to every logger: training loss at every `every`-th step, validation figures when they are measured."""

    def __init__(self, every: int, tokens_per_step: int):
        self.every, self.tokens_per_step = every, tokens_per_step
        self._since = (0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, learner: Learner) -> None:
        self._since = (trainer.global_step, time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, learner: Learner, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if not _stepped(learner, batch) or (step % self.every and step != 1):
            return
        row = {
            "train_loss": learner.loss_value,
            "grad_norm": learner.grad_norm,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
        }
        first, then = self._since
        now = time.perf_counter()
        row["tokens_per_second"] = round((step - first) * self.tokens_per_step / (now - then), 1)
        self._since = (step, now)
        _log(trainer, row)

    def on_validation_end(self, trainer: pl.Trainer, learner: Learner) -> None:
        _log(trainer, learner.measured)
        self._since = (trainer.global_step, time.perf_counter())  # speed is that of training


def _log(trainer: pl.Trainer, row: dict[str, Any]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(row, step=trainer.global_step)


def _stepped(learner: Learner, batch: Any) -> bool:
    """Whether this micro-batch ended an optimiser step."""
    accumulate = learner.settings.training.accumulate
    return batch.index % accumulate == accumulate - 1


class Checkpoints(pl.Callback):
    """Writes `last.ckpt` every `save_every` steps and at the end, `step-*.ckpt` at 0, 1, 2, 4, 8 …, and `best.ckpt`.

    A checkpoint of a step at which validation is due is written after the validation, so that whoever resumes from it has
    all records of that step and repeats none. SIGTERM, SIGUSR1 and SIGINT end the run at the next such moment: the step is
    finished, `last.ckpt` written, and the process exits with 143 (SIGINT: 130).
    """

    def __init__(self, run: Run, training: Training):
        self.run, self.training = run, training
        self.best = math.inf
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, learner: Learner) -> None:
        def note(number: int, frame: Any) -> None:
            if number == self._signal == signal.SIGINT:  # asked twice: at once
                raise KeyboardInterrupt
            self._signal = number

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._handlers[number] = signal.signal(number, note)
        if trainer.global_step == 0:
            self._save(trainer, self.run.step(0), weights_only=True)

    def on_train_batch_end(self, trainer: pl.Trainer, learner: Learner, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not _stepped(learner, batch):
            return
        if trainer.global_step == self.training.max_steps:
            trainer.should_stop = True  # Lightning then validates once more, aligned or not
        elif trainer.global_step % self.training.validate_every:
            self._keep(trainer)

    def on_validation_end(self, trainer: pl.Trainer, learner: Learner) -> None:
        loss = learner.measured["val_loss"]
        if loss < self.best:
            self.best = loss
            self._save(trainer, self.run.best, weights_only=True)
        self._keep(trainer)

    def _keep(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step & (step - 1) == 0 or step == self.training.max_steps:
            self._save(trainer, self.run.step(step), weights_only=True)
        stop = self._agreed(trainer)
        if stop or step % self.training.save_every == 0 or step == self.training.max_steps:
            self._save(trainer, self.run.last)
        if stop and step < self.training.max_steps:
            if trainer.is_global_zero:
                tqdm.write(f"stopped at step {step} by {signal.Signals(stop).name}; continue with --resume", file=sys.stderr)
            raise SystemExit(130 if stop == signal.SIGINT else 143)

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The signal that any process has received, or 0; all processes get the same answer."""
        if trainer.world_size == 1:
            return self._signal or 0
        seen = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        return int(seen)

    def _save(self, trainer: pl.Trainer, path: Path, weights_only: bool = False) -> None:
        trainer.save_checkpoint(path, weights_only=weights_only)

    def teardown(self, trainer: pl.Trainer, learner: Learner, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, learner: Learner, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


class Progress(pl.Callback):
    """A progress bar on stderr, a line and a text sample at every validation. Off a terminal, lines alone."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], training: Training):
        self.tokenizer, self.prompt, self.training = tokenizer, prompt, training
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, learner: Learner) -> None:
        self.bar = tqdm(
            total=self.training.max_steps,
            initial=trainer.global_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not (trainer.is_global_zero and sys.stderr.isatty()),
        )

    def on_train_batch_end(self, trainer: pl.Trainer, learner: Learner, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is not None and not self.bar.disable and _stepped(learner, batch):
            self.bar.set_postfix_str(f"loss {learner.loss_value:.3f}", refresh=False)
            self.bar.update()

    def on_validation_end(self, trainer: pl.Trainer, learner: Learner) -> None:
        if not trainer.is_global_zero:
            return
        found = learner.measured
        line = f"step {trainer.global_step:>6}  validation {found['val_loss']:.4f} {self.training.objective.unit}"
        if "val_bits_per_byte" in found:
            line += f"  {found['val_bits_per_byte']:.4f} bits/byte"
        tqdm.write(line, file=sys.stderr)
        if self.training.sample and self.training.objective.covers_text:
            tqdm.write(f"  {self.sample(learner)}\n", file=sys.stderr)

    def sample(self, learner: Learner) -> str:
        """A continuation of the validation text's beginning, on one line; the same seed every time."""
        tokens = torch.tensor([self.prompt], device=learner.device)
        with torch.autocast(learner.device.type, enabled=False):
            text = learner.model.generate(tokens, self.training.sample, temperature=0.8, top_p=0.95, seed=0)
        new = self.tokenizer.decode(text[0, len(self.prompt) :].tolist())
        return "… " + " ".join(new.split())

    def on_exception(self, trainer: pl.Trainer, learner: Learner, exception: BaseException) -> None:
        self._close()

    def on_train_end(self, trainer: pl.Trainer, learner: Learner) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
