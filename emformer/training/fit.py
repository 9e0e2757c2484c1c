"""One training run, from settings to a run folder."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from emformer import parts
from emformer.memory import keep_freed_memory
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.records import Run, read_checkpoint, read_journal
from emformer.settings import Data, Settings, Training
from emformer.text import Blocks, File, fingerprint, probe
from emformer.text import save as save_tokenizer
from emformer.training.callbacks import AtomicFiles, Checkpoints, Metrics, Progress
from emformer.training.data import Text, check_division, read_text
from emformer.training.learner import Learner
from emformer.training.loggers import JournalLogger
from emformer.training.recording import Recording, finish

MAY_CHANGE = ("training.max_steps", "loggers")


@dataclass(frozen=True)
class Result:
    """What a run ended with: its folder, the last step, and the figures of the last and the best validation."""

    path: Path
    step: int
    last: dict[str, float | int]
    best: dict[str, float | int]


def fit(
    settings: Settings,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[pl.Callback] = (),
) -> Result:
    """Train as `settings` say and write everything into the run folder.

    Args:
        settings: of the run.
        run: the folder; default `runs/<date and time>`.
        resume: continue a run that was begun here, bit for bit as if it had not been stopped (on CPU); begin it if there is
            none. Only `training.max_steps` and `loggers` may differ from the run's own settings.
        overwrite: remove a run that was begun here.
        callbacks: further Lightning callbacks.

    Raises:
        UserError: for whatever the user can mend; the folder and its checkpoints stay as they were.
        SystemExit: 143 after SIGTERM or SIGUSR1, 130 after SIGINT, with `last.ckpt` written.
    """
    folder = Run(run if run is not None else _default_path())
    first = _process() == 0
    if first:
        _may_write(folder, settings, resume, overwrite)
    # everything that can be refused is made before anything is written or removed
    blocks = read_text_visibly(settings.data)
    model, learner, text = assemble(settings, blocks)
    checkpoint, step = _resumed(folder, blocks) if resume else (None, 0)
    if checkpoint is not None and step >= settings.training.max_steps:
        if first:
            finish(folder)  # a run that was killed after its last checkpoint
        return result(folder)
    recording = [] if not settings.callbacks else [recorder(settings, folder, blocks, -1 if checkpoint is None else step)]
    trainer = make_trainer(settings, folder, blocks, step, [*callbacks, *recording])
    trainer.loggers = [*trainer.loggers, *(logger.build(str(folder.path)) for logger in settings.loggers)]
    if first:
        if overwrite:
            folder.remove()
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_settings(settings)
        folder.checkpoints.mkdir(exist_ok=True)
        for later in [kept for kept in folder.steps if kept > step]:  # of a course that is not taken again
            folder.step(later).unlink()
        save_tokenizer(blocks.tokenizer, folder.tokenizer)
        folder.write_environment(
            step,
            seed=settings.training.seed,
            corpus=blocks.meta["corpus"],
            tokenizer=fingerprint(blocks.tokenizer),
            parameters=sum(p.numel() for p in model.parameters()),
        )
    keep_freed_memory()
    try:
        trainer.fit(learner, datamodule=text, ckpt_path=checkpoint, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device has too little memory for a micro-batch: raise training.accumulate, or lower training.batch or "
            "model.context."
        ) from error
    return result(folder)


def assemble(settings: Settings, blocks: Blocks) -> tuple[Emformer, Learner, Text]:
    """Model, LightningModule and DataModule of these settings. Seeds the global generator for the initial weights."""
    training = settings.training
    text = Text(blocks, settings.model.context, training, settings.data.workers)
    torch.manual_seed(training.seed)
    model = Emformer(text.vocab + training.objective.extra_tokens, **vars(settings.model))
    if training.precision == "64":
        model.double()
    learner = Learner(model, settings, blocks.tokenizer.to_str(), blocks.bytes_per_token("validation"))
    return model, learner, text


def recorder(settings: Settings, folder: Run, blocks: Blocks, step: int = -1) -> Recording:
    """The Lightning callback that serves `settings.callbacks`, of a run that has reached `step` (-1: begins).

    Raises `UserError` where the validation split is shorter than one prompt.
    """
    corpus = settings.data.corpus if settings.data.path is None else File(settings.data.path)
    length = min(settings.probe.length, settings.model.context)
    prompts = probe(blocks, corpus, settings.probe.prompts, length, settings.probe.seed)
    return Recording(settings.callbacks, prompts, folder, step, settings.training.max_steps, settings.figures)


def make_trainer(
    settings: Settings, folder: Run, blocks: Blocks, step: int = 0, callbacks: Sequence[pl.Callback] = ()
) -> pl.Trainer:
    """The Lightning trainer of a run that has reached `step`. Raises `UserError` for a device that is not there."""
    training = settings.training
    _silence()
    prompt = blocks.validation[: max(1, min(32, settings.model.context // 4))].astype(int).tolist()
    journal = JournalLogger(folder.metrics, step)
    try:
        trainer = pl.Trainer(
            accelerator=training.accelerator,
            devices=training.devices,
            num_nodes=training.nodes,
            strategy=training.strategy,
            precision=_precision(training),
            max_steps=training.max_steps,
            max_epochs=-1,
            min_epochs=0,
            accumulate_grad_batches=training.accumulate,
            val_check_interval=training.validate_every * training.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=journal,
            callbacks=[
                *callbacks,
                Metrics(max(1, min(50, training.max_steps // 100)), training.batch * settings.model.context),
                Progress(blocks.tokenizer, prompt, training),
                Checkpoints(folder, training),
            ],
            plugins=[AtomicFiles()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder.path,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise UserError(f"this machine cannot train as asked: {' '.join(str(error).split())}") from error
    check_division(training, trainer.world_size)
    return trainer


def _silence() -> None:
    """Lightning's advice that does not apply here."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*dataloader is not resumable.*",  # it starts at the step reached
        ".*GPU available but not used.*",
        ".*srun.*",
    ):
        warnings.filterwarnings("ignore", pattern)


def result(folder: Run) -> Result:
    """The figures of a run, from its journal."""
    rows = [row for row in read_journal(folder.metrics) if row.get("val_loss") is not None] if folder.metrics.exists() else []
    figures = [{key: value for key, value in row.items() if key == "step" or key.startswith("val_")} for row in rows]
    last = figures[-1] if figures else {}
    return Result(folder.path, int(last.get("step", 0)), last, min(figures, key=lambda row: row["val_loss"], default={}))


def read_text_visibly(data: Data) -> Blocks:
    """`read_text` with a progress bar on a terminal while a corpus is tokenised for the first time."""
    with tqdm(desc="tokenising", unit="token", unit_scale=True, leave=False, delay=1, disable=not sys.stderr.isatty()) as bar:
        return read_text(data, lambda count: bar.update(count - bar.n))


def _precision(training: Training) -> Any:
    fixed = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}
    if training.precision != "auto":
        return fixed[training.precision]
    on_gpu = training.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def _process() -> int:
    """Rank of this process, before any process group exists."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def _default_path() -> str:
    """runs/<time> or runs/<job>; the processes that Lightning starts from this one find it in the environment."""
    if _process() != 0:
        if "EMFORMER_RUN" not in os.environ:
            raise UserError("several processes need one run folder: name it with --run.")
        return os.environ["EMFORMER_RUN"]
    path = Path("runs") / (os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S"))
    count = 1
    while path.exists() and "SLURM_JOB_ID" not in os.environ:  # a second run within the second
        count += 1
        path = path.with_name(f"{path.name.split('.')[0]}.{count}")
    os.environ["EMFORMER_RUN"] = str(path)
    return str(path)


def _may_write(folder: Run, settings: Settings, resume: bool, overwrite: bool) -> None:
    """Raise unless this folder may be written to. Nothing is touched."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: continue the run, or remove it and begin again.")
    if not folder.used:
        # a hidden file is what a process that was killed while it began has left
        if folder.path.is_file() or any(not path.name.startswith(".") for path in folder.path.glob("*")):
            raise UserError(f"{folder.path} exists and is not a run; choose another --run folder.")
        return
    if overwrite:
        return
    if not resume:
        raise UserError(
            f"{folder.path} holds a run already; continue it with --resume, remove it with --overwrite, "
            "or choose another --run folder."
        )
    _same(folder, settings)


def _same(folder: Run, settings: Settings) -> None:
    """Raise unless the settings are those of the run, but for what may change."""
    old, new = _flat(parts.plain(folder.settings())), _flat(parts.plain(settings))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder.path} was begun with {key} = {old.get(key)}, not {new.get(key)}{more}; a resumed run may change only "
            f"{' and '.join(MAY_CHANGE)}, so choose another --run folder, or --overwrite."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _resumed(folder: Run, blocks: Blocks) -> tuple[Path | None, int]:
    """The checkpoint to continue from and its step; (None, 0) if the run wrote none yet."""
    if not folder.last.exists():
        rows = read_journal(folder.metrics) if folder.metrics.exists() else ()
        reached = max((row.get("step") or 0 for row in rows), default=0)
        if folder.used and reached > folder.settings().training.save_every:
            raise UserError(
                f"{folder.last} is missing although the run has reached step {reached}; restore it, or begin again with "
                "--overwrite."
            )
        return None, 0
    content = read_checkpoint(folder.last)
    same_tokens = content["emformer"]["tokenizer"] == blocks.tokenizer.to_str()
    if not same_tokens or folder.corpus not in (None, blocks.meta["corpus"]):
        what = "gives another tokenizer than" if not same_tokens else "is not"
        raise UserError(
            f"the text {what} the one {folder.path} was begun with: it has changed; restore it, or choose another --run folder."
        )
    if "optimizer_states" not in content:
        raise UserError(f"{folder.last} holds weights only and cannot be resumed from.")
    return folder.last, content["global_step"]
