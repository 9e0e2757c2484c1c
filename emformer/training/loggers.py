"""Loggers. The journal `metrics.jsonl` is always written and is the truth; the others are mirrors of it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from emformer import parts
from emformer.parts import UserError
from emformer.records import Journal


class JournalLogger(Logger):
    """Lightning's view of a run's `metrics.jsonl`."""

    def __init__(self, path: Path, step: int | None):
        super().__init__()
        self._path, self._step = path, step
        self._journal: Journal | None = None

    @property
    def name(self) -> str:
        return "journal"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._journal is None:
            self._journal = Journal(self._path, self._step)
        self._journal.append({"step": step, **metrics})

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The settings are in config.yaml."""


class _TensorBoardLogger(TensorBoardLogger):
    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Pictures (height, width, channels) of bytes, as `WandbLogger.log_image` takes them."""
        for image in images:
            self.experiment.add_image(key, image, step, dataformats="HWC")


@dataclass(frozen=True)
class TensorBoard(parts.Logger):
    """TensorBoard event files in the run folder's `tensorboard/` (needs the extra `tensorboard`)."""

    def build(self, folder: str) -> Logger:
        try:
            return _TensorBoardLogger(save_dir=folder, name="tensorboard", version="")
        except ModuleNotFoundError as error:
            raise UserError(
                "the TensorBoard logger needs the package tensorboard: pip install 'emformer[tensorboard]'."
            ) from error


@dataclass(frozen=True)
class Wandb(parts.Logger):
    """Weights & Biases, offline unless asked: `wandb sync` uploads the folder later. Names of machine and user are not sent.

    Args:
        project: project name.
        online: send while training; needs an account.
        entity: team or user, if not the default.
    """

    project: str = "emformer"
    online: bool = False
    entity: str | None = None

    def build(self, folder: str) -> Logger:
        import wandb  # a second, and a process: only for those who ask

        settings = wandb.Settings(
            console="off", x_disable_meta=True, x_disable_stats=True, disable_git=True, save_code=False, silent=True
        )
        run = Path(folder)
        return WandbLogger(
            name=run.name,
            project=self.project,
            entity=self.entity,
            save_dir=folder,
            offline=not self.online,
            log_model=False,
            settings=settings,
        )
