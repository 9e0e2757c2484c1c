"""Small models and layers for tests, and the search for every variant of a part that the package defines."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

import emformer
from emformer import parts
from emformer.attention import Attention
from emformer.block import PreNorm
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.observables import Row
from emformer.operators import LowRank, Operator
from emformer.settings import Drift, Embedding, Functional
from emformer.trajectory import Trajectory

M = TypeVar("M", bound=nn.Module)
VOCAB = 11
LEGIBLE = Embedding(unembed_std=0.3)  # logits of order one, so that an absolute tolerance means something


def model(vocab: int = VOCAB, dtype: torch.dtype = torch.float64, **overrides: Any) -> Emformer:
    """A small causal low-rank model in evaluation mode; `overrides` are fields of `emformer.settings.Model`."""
    fields = dict(
        dim=8,
        depth=2,
        heads=2,
        context=24,
        form=LowRank(rank=4),
        content=LowRank(rank=4),
        kernel=Softmax(),
        mask=Causal(),
        placement=PreNorm(),
        norm=RMSNorm(),
        embedding=LEGIBLE,
    )
    return stir(Emformer(vocab, **(fields | overrides))).to(dtype).eval()


def attention(
    form: parts.Operator,
    content: parts.Operator,
    *,
    dim: int = 12,
    heads: int = 3,
    kernel: parts.Kernel | None = None,
    positions: Sequence[parts.Position] = (),
    mask: parts.Mask | None = None,
    functional: Functional | None = None,
    drift: Drift | None = None,
    dtype: torch.dtype = torch.float64,
) -> Attention:
    """One attention layer on E = R^dim, biases and drift drawn at random."""
    m = form.build("form", dim, heads)
    assert isinstance(m, Operator)
    layer = Attention(
        m,
        content.build("content", dim, heads, m),
        (kernel or Softmax()).build(heads, dim),
        [position.build(m.rank) for position in positions],
        mask or Causal(),
        functional,
        drift,
    )
    return stir(layer).to(dtype)


@torch.no_grad()
def stir(module: M, size: float = 0.3) -> M:
    """Add noise to every parameter that starts constant (biases at 0, gains at 1): a constant hides mistakes."""
    for parameter in module.parameters():
        if parameter.numel() and parameter.min() == parameter.max():
            parameter.add_(size * torch.randn_like(parameter))
    return module


@torch.no_grad()
def fill(parameter: nn.Parameter | None, value: torch.Tensor) -> None:
    """Write a value of the very same shape."""
    assert parameter is not None and parameter.shape == value.shape, (parameter, value.shape)
    parameter.copy_(value)


def words(count: int, batch: int = 2, vocab: int = VOCAB) -> torch.Tensor:
    """Random tokens (batch, count)."""
    return torch.randint(vocab, (batch, count))


def cloud(count: int, dim: int = 12, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A random cloud (batch, count, dim) of unit variance."""
    return torch.randn(batch, count, dim, dtype=dtype)


def span(count: int, start: int = 0) -> torch.Tensor:
    """The positions start … start + count - 1."""
    return torch.arange(start, start + count)


def told(observable: parts.Observable, trajectories: Trajectory | Sequence[Trajectory]) -> list[Row]:
    """The rows of an observable: keys that it declares, each row at a place of its own, numbers that are finite or undefined."""
    observation = observable.begin()
    for one in [trajectories] if isinstance(trajectories, Trajectory) else trajectories:
        observation.update(one)
    rows = observation.rows()
    assert len({(row[:3], row[10:]) for row in rows}) == len(rows), "every row has a place of its own"
    for row in rows:
        assert row.key.removesuffix(".undefined") in observable.keys, row
        assert all(value is None or math.isfinite(value) for value in (*row[3:6], *row[8:10])), row
    return rows


def only(
    rows: Sequence[Row], key: str, head: int | None = None, layer: int | None = 0, param: str | None = None, cloud: str = "raw"
) -> Row:
    """The one row at this place."""
    (row,) = [r for r in rows if (r.key, r.head, r.layer, r.param, r.cloud) == (key, head, layer, param, cloud)]
    return row


def bare(trajectory: Trajectory, k: int) -> torch.Tensor:
    """Pi x / s(x) of what step k reads, written here."""
    x, norm = trajectory.steps[k].before, trajectory.block(k).read_attn
    if norm is None:
        return trajectory.steps[k].read
    if norm.centred:
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def variants(base: type[parts.Part]) -> list[type[parts.Part]]:
    """Every concrete subclass of `base` that the package defines, in whatever file."""
    for module in _modules_with(base.__name__):
        importlib.import_module(module)
    found: set[type[parts.Part]] = set()
    queue = [base]
    while queue:
        cls = queue.pop()
        queue.extend(cls.__subclasses__())
        if not inspect.isabstract(cls) and cls.__module__.startswith("emformer."):
            found.add(cls)
    return sorted(found, key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")


def _modules_with(base: str) -> list[str]:
    """Modules of the package that define a class inheriting, through however many others, from one named `base`.

    Read off the sources, because importing every module would take in all of Lightning.
    """
    root = Path(emformer.__file__).parent
    classes = []  # (module, name, names of its bases)
    for path in sorted(root.rglob("*.py")):
        module = ".".join(["emformer", *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                above = [ast.unparse(b.value if isinstance(b, ast.Subscript) else b) for b in node.bases]
                classes.append((module, node.name, {name.rpartition(".")[2] for name in above}))
    names, modules = {base}, set()
    for _ in classes:
        heirs = [(module, name) for module, name, above in classes if above & names]
        modules |= {module for module, _ in heirs}
        if names >= (new := {name for _, name in heirs}):
            break
        names |= new
    return sorted(modules)


def examples(base: type[parts.Part]) -> list[Any]:
    """`pytest.param`s: every example of every variant of `base`, named by what it is."""
    return [pytest.param(example, id=repr(example)) for cls in variants(base) for example in cls.examples()]
