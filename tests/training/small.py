"""The smallest runs that are still runs: one layer, sixteen dimensions, a text of four words."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emformer.block import PreNorm
from emformer.ffn import ReLU2
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.norms import RMSNorm
from emformer.operators import LowRank
from emformer.positions import RoPE
from emformer.records import Run, read_journal
from emformer.settings import Data, Model, Settings, Training
from emformer.text import Bytes, File
from emformer.training import Muon, NextToken


def text(path: Path, words: str = "alpha beta gamma delta", count: int = 800, seed: int = 0) -> Path:
    """A file of random words."""
    path.write_text(" ".join(random.Random(seed).choices(words.split(), k=count)))
    return path


def settings(folder: Path, model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **training: Any) -> Settings:
    """Settings of a run of 20 steps on `folder`/text.txt, which is written if it is not there."""
    path = folder / "text.txt"
    if not path.exists():
        text(path)
    operator = LowRank(rank=4)
    small = Model(
        dim=16,
        depth=1,
        heads=2,
        context=16,
        form=operator,
        content=operator,
        kernel=Softmax(),
        mask=Causal(),
        placement=PreNorm(),
        positions=[RoPE()],
        norm=RMSNorm(),
        ffn=ReLU2(),
    )
    plan = {
        "objective": NextToken(),
        "optimizer": Muon(),
        "max_steps": 20,
        "batch": 8,
        "validate_every": 10,
        "validation_windows": 4,
        "save_every": 7,
        "sample": 0,
        "accelerator": "cpu",
    }
    return Settings(
        model=replace(small, **(model or {})),
        data=Data(**({"corpus": File(str(path)), "tokenizer": Bytes(), "cache": str(folder / "cache")} | (data or {}))),
        training=Training(**(plan | training)),
    )


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    """The weights in one of a run's checkpoints."""
    return torch.load(Run(run).checkpoints / f"{name}.ckpt", weights_only=True)["state_dict"]


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, but for the speed, which is the machine's."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_journal(Run(run).metrics)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
