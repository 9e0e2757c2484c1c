"""A new operator, kernel, position, norm, FFN or placement is one new file: written here to a temporary folder, named in YAML by
class path, trained, resumed, loaded, decoded. No other file knows of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from emformer import cli, parts
from emformer.records import load

SOURCE = '''
from dataclasses import dataclass
import torch
from torch import nn
from emformer import parts
from emformer.kernels.base import Direct, scores
from emformer.norms import Norm
from emformer.operators.base import FullRank, Sizes, full_rate
from emformer.placements import PreNorm
from emformer.positions import PositionMap


@dataclass(frozen=True)
class Diagonal(Sizes, parts.Operator):
    """W = diag(w)."""

    def build(self, role, dim, heads, form=None):
        return DiagonalOperator(self.norm(role, dim, heads) * dim**-0.5 * torch.randn(heads, dim), full_rate(role, dim, heads))


class DiagonalOperator(FullRank):
    claims = ("symmetric",)

    def __init__(self, weight, rate):
        super().__init__(weight.shape[1], len(weight), {"weight": rate})
        self.weight = nn.Parameter(weight)

    def left_rows(self):
        return torch.diag_embed(self.weight)


@dataclass(frozen=True)
class Square(parts.Kernel):
    """a = s^2 / sum s^2."""

    def build(self, heads, dim):
        return SquareKernel()


class SquareKernel(Direct):
    normalised = True
    row_invariant = False

    def weights(self, u, v, visible):
        s = scores(u, v)
        a = (s.square() + 1e-6).masked_fill(~visible.dense(*s.shape[-2:], s.device), 0.0)
        return a / a.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Fade(parts.Position):
    """Keys shrink as they are further from the start."""

    rate: float = 0.01

    def build(self, rank):
        return FadeMap(self.rate)


class FadeMap(PositionMap):
    acts_on_keys = True
    reads_factors = False

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, u, v, i, j):
        return u, v * torch.exp(-self.rate * j.to(v.dtype))[:, None]


@dataclass(frozen=True)
class Halve(parts.Norm):
    """y = x / 2."""

    def build(self, dim):
        return HalveNorm()


class HalveNorm(Norm):
    centred = False
    gain = bias = None

    def forward(self, x):
        return x / 2

    def size(self, x):
        return torch.full_like(x[..., :1], 2.0)

    def affine(self, dim):
        return torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)

    def spread(self, x, pieces):
        return pieces / 2


@dataclass(frozen=True)
class Scale(parts.FFN):
    """x -> w x."""

    def build(self, dim):
        return nn.Linear(dim, dim, bias=False)


@dataclass(frozen=True)
class Still(parts.Placement):
    """As PreNorm."""

    @property
    def closes(self):
        return True

    def build(self, norm, dim):
        return PreNorm().build(norm, dim)

    def enter(self, dim):
        return None
'''

MODEL = {
    "form": {"class_path": "mine.Diagonal"},
    "content": {"class_path": "mine.Diagonal", "init_args": {"update_std": 0.5}},
    "kernel": {"class_path": "mine.Square"},
    "positions": [{"class_path": "mine.Fade", "init_args": {"rate": 0.02}}],
    "norm": {"class_path": "mine.Halve"},
    "ffn": {"class_path": "mine.Scale"},
    "placement": {"class_path": "mine.Still"},
    "functional": {},
    "drift": {},
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("kinds", [[kind] for kind in MODEL if kind not in ("functional", "drift")] + [list(MODEL)], ids="+".join)
def test_one_file_is_enough(kinds: list[str], mine: Path, capsys: pytest.CaptureFixture[str]):
    config = mine / "mine.yaml"
    config.write_text(yaml.safe_dump({"model": {kind: MODEL[kind] for kind in kinds}}))
    smoke = Path(__file__).parents[2] / "configs" / "smoke.yaml"
    run = mine / "run"
    given = ["fit", "-c", str(smoke), "-c", str(config), "--run", str(run), "--data.cache", str(mine / "cache")]
    given += ["--training.batch", "4", "--training.validation_windows", "2", "--training.sample", "5", "--resume"]
    cli.main([*given, "--training.max_steps", "3"])
    cli.main([*given, "--training.max_steps", "5"])  # and goes on
    assert "(5 steps)" in capsys.readouterr().out
    loaded = load(run)
    used = str(parts.plain(loaded.config))
    names = [item["class_path"] for kind in kinds for item in (MODEL[kind] if kind == "positions" else [MODEL[kind]]) if item]
    assert all(name in used for name in names)
    tokens = torch.randint(loaded.model.vocab, (1, 16))
    memory = loaded.model.memory()
    with torch.no_grad():
        states = [step.after for piece in tokens.split([5, 1, 10], 1) for *_, step in [loaded.model.flow(piece, memory)]]
        assert (loaded.model.unembed(torch.cat(states, 1)) - loaded.model(tokens)).abs().max() < 1e-4
    cli.main(["info", str(run)])
    assert "FLOPs a token" in capsys.readouterr().out
