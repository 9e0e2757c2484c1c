"""The LightningModule: loss, optimiser step, validation."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from emformer import parts
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.records import FORMAT
from emformer.settings import Settings
from emformer.training.data import Batch
from emformer.training.objectives import IGNORE


def nll(model: Emformer, batch: Batch, reduction: str = "sum") -> Tensor:
    """-log p(target) in nats, at least in float32: summed over the positions that carry a loss, or ("none") each."""
    logits = model(batch.inputs)
    logits = logits.flatten(0, 1)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, batch.targets.flatten(), ignore_index=IGNORE, reduction=reduction)


class Learner(pl.LightningModule):
    """Trains an Emformer.

    The loss of a micro-batch is its summed negative log likelihood over the positions of the whole optimiser step, times
    the number of shares that are averaged later: the gradient is that of the mean over all positions, however the batch is
    divided over processes and micro-batches, also where masked positions are unevenly spread.

    Args:
        model: what is trained.
        settings: of the run.
        tokenizer: its JSON, carried by checkpoints.
        bytes_per_token: of the validation text.

    Raises:
        UserError: where the masks let the model see its targets, for a kernel that cannot be trained or a penalty that cannot
            act on the model's operators, and at the step at which loss or gradient is not finite.
    """

    def __init__(self, model: Emformer, settings: Settings, tokenizer: str, bytes_per_token: float):
        super().__init__()
        self.model, self.settings, self.tokenizer = model, settings, tokenizer
        self.bytes_per_token = bytes_per_token
        depth = settings.model.depth
        settings.training.objective.check([settings.model.layer(index).mask for index in range(depth)])
        for index in range(depth):
            kernel = model.layer(index).attention.kernel
            if not kernel.differentiable:
                raise UserError(
                    f"the kernel {type(kernel).__name__.removesuffix('Kernel')} of layer {index} cannot be trained, for its "
                    "derivative is zero; it is for simulations and surgery: train with another, such as Softmax."
                )
        if settings.training.penalties:
            trial = copy.deepcopy(model)  # what a penalty refuses is refused now, not at the first step
            for penalty in settings.training.penalties:
                penalty.shrink(trial, 1.0)
        self.loss_value, self.grad_norm = math.nan, math.nan
        self.measured: dict[str, float] = {}
        self._step_loss: Tensor | float = 0.0
        self._sums = torch.zeros(2, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # what is random in the model (dropout, in any layer or part) is a function of (seed, micro-batch, process)
        key = (self.settings.training.seed, 3, batch.index, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        accumulate = self.settings.training.accumulate
        loss = nll(self.model, batch) * (self.trainer.world_size * accumulate / batch.total)
        self._step_loss = self._step_loss + loss.detach() / accumulate
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        training = self.settings.training
        clip = math.inf if training.clip is None else training.clip
        norm = clip_grad_norm_(self.model.parameters(), clip, foreach=True)
        loss = self._step_loss
        if self.trainer.world_size > 1:
            loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        self._step_loss = 0.0
        self.loss_value, self.grad_norm = float(loss), float(norm)
        if not (math.isfinite(self.grad_norm) and math.isfinite(self.loss_value)):
            what = "loss" if not math.isfinite(self.loss_value) else "gradient"
            raise UserError(
                f"the {what} is not finite at step {self.global_step + 1}: training stopped before the weights were touched, "
                "and the last checkpoint is good; try a smaller learning rate, or continue it with --resume."
            )
        factor = training.schedule.factor(self.global_step, training.max_steps)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        training = self.settings.training
        factor = training.schedule.factor(self.global_step, training.max_steps)  # of this step: it is counted when we return
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for penalty in training.penalties:
            penalty.shrink(self.model, factor)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.settings.training.optimizer.build(self.model)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=None if self.device.type == "mps" else self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = nll(self.model, batch).double() if self.device.type != "mps" else nll(self.model, batch).cpu().double()
        self._sums += torch.stack([loss, loss.new_tensor(float(batch.total))])

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        loss = float(sums[0] / sums[1])
        self.measured = self.figures(loss)
        for name, value in self.measured.items():  # for callbacks that monitor; the journal takes them unrounded
            self.log(name, value, logger=False, rank_zero_only=True)

    def figures(self, loss: float) -> dict[str, float]:
        """Validation loss in nats, and in bits per byte where the objective covers the text."""
        found = {"val_loss": loss}
        if self.settings.training.objective.covers_text:
            found["val_bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["emformer"] = {
            "format": FORMAT,
            "settings": parts.plain(self.settings),
            "vocab": self.model.vocab,
            "tokenizer": self.tokenizer,
        }
