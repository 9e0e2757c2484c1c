"""Positions: an ordered list of maps (u, v) -> (u, v) between the factors and the score u . v.

`u = left(q)` are the queries (B, H, T, r) at positions i, `v = right(t)` the keys (B, G, S, r) at positions j.
An empty list is no position at all (NoPE). Learned absolute positions belong to the embedding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from emformer import parts
from emformer.parts import UserError
from emformer.types import Index, KeyIndex, Keys, Queries


class PositionMap(nn.Module, ABC):
    """`acts_on_keys`: changes v, so that M cannot be absorbed into the query. `reads_factors`: not a function of M alone.

    `planes`: where it reads the factors, how many leading coordinates it turns alike in u and in v, the coordinates k and
    k + planes/2 as a plane. It commutes with a I + b J in each plane and with GL on the rest. 0: with nothing that is known.
    """

    acts_on_keys: bool
    reads_factors: bool
    planes: int = 0

    @abstractmethod
    def forward(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]: ...


@dataclass(frozen=True)
class _Turns:
    """Fields that all rotary positions share.

    Args:
        base: of the frequencies; larger turns more slowly.
        fraction: share of the r coordinates that turn, in (0, 1]; fraction * r must be even.
        offset: position of the first token. The score does not depend on it; long offsets test the tables' precision.
    """

    base: float = 10000.0
    fraction: float = 1.0
    offset: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 < self.fraction <= 1:
            raise UserError(f"{name}: fraction is {self.fraction}; choose a share of the coordinates in (0, 1].")
        if not 0 < self.base < math.inf:
            raise UserError(f"{name}: base is {self.base}; choose a positive number such as 10000.")

    def width(self, rank: int) -> int:
        """How many coordinates turn."""
        width = round(rank * self.fraction, 9)  # 0.28 of 25 is 7
        if width != int(width) or int(width) % 2 or not width:
            raise UserError(
                f"{type(self).__name__}: {self.fraction} of the rank {rank} is {width:g} coordinates, and they turn in pairs; "
                "choose an even rank (for dense operators: an even dim) or another fraction."
            )
        return int(width)


@dataclass(frozen=True)
class RoPE(_Turns, parts.Position):
    """Rotary positions: s_ij = (R_i u) . (R_j v), R_p a rotation by the angle p w_k in plane k, w_k = base^(-2k/n).

    Factored: s_ij = q^T U R_{j-i} V^T t. Dense: s_ij = q^T M R_{j-i} t, rotating the coordinate planes of E. The score
    depends on j - i only; plane k pairs the coordinates k and k + n/2 of the first n = fraction * r. Source: math A.4.
    """

    @classmethod
    def examples(cls) -> Sequence[RoPE]:
        return [cls(), cls(base=100.0, fraction=0.5, offset=3)]

    def build(self, rank: int) -> Rotation:
        return Rotation(self.width(rank), self.base, self.offset)


@dataclass(frozen=True)
class InterpolatedRoPE(_Turns, parts.Position):
    """RoPE at w_k/factor: positions are squeezed into the range that a model was trained on. Source: Chen et al. 2306.15595.

    Args:
        factor: how much slower every plane turns, positive.
    """

    factor: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "factor")

    @classmethod
    def examples(cls) -> Sequence[InterpolatedRoPE]:
        return [cls(), cls(base=100.0, fraction=0.5, offset=3, factor=4.0)]

    def build(self, rank: int) -> Interpolation:
        return Interpolation(self.width(rank), self.base, self.offset, self.factor)


@dataclass(frozen=True)
class Llama3RoPE(_Turns, parts.Position):
    """RoPE whose slow planes turn slower: w_k (t + (1 - t)/factor), t = (turns_k - low)/(high - low) cut to [0, 1], where
    turns_k = original w_k/2 pi is how often plane k turns in the context that a model was trained on. As in Llama 3.1.

    Args:
        factor: how much slower planes turn that make fewer than `low` turns, positive.
        low: turns of a plane in the original context up to which it is slowed fully.
        high: turns from which on it is left as it is; above `low`.
        original: length of the original context.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("factor", "low", "original"):
            _positive(self, name)
        if not self.low < self.high < math.inf:
            raise UserError(f"Llama3RoPE: high is {self.high} and low {self.low}; choose high above low.")

    @classmethod
    def examples(cls) -> Sequence[Llama3RoPE]:
        return [cls(), cls(base=100.0, offset=3, original=50)]

    def build(self, rank: int) -> Llama3Rotation:
        return Llama3Rotation(self.width(rank), self.base, self.offset, self.factor, self.low, self.high, self.original)


def _positive(part: _Turns, name: str) -> None:
    value = getattr(part, name)
    if not 0 < value < math.inf:
        raise UserError(f"{type(part).__name__}: {name} is {value}; choose a positive number.")


class Rotation(PositionMap):
    """Angles are formed in float64 and the tables cast: float32 angles err by 1e-3 at position 2048 (math A.4)."""

    acts_on_keys = True
    reads_factors = True

    def __init__(self, width: int, base: float, offset: int):
        super().__init__()
        self.width, self.base, self.offset = width, base, offset
        self.planes = width
        self._last: tuple[torch.Tensor, torch.dtype, tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]:
        queries = self._remembered(i, u)
        return self.turn(u, *queries), self.turn(v, *(queries if i is j else self.tables(j, v)))

    def _remembered(self, index: Index, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables of the same index tensor are made once: the layers of one forward pass share it, and this map."""
        if torch.compiler.is_compiling():
            return self.tables(index, like)
        if self._last is None or self._last[0] is not index or self._last[1] != like.dtype:
            self._last = index, like.dtype, self.tables(index, like)
        return self._last[2]

    def tables(self, index: Index, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the angles at positions `index`: (T, n/2) each, in the dtype of `like`."""
        wide = torch.float32 if index.device.type == "mps" else torch.float64
        plane = torch.arange(0, self.width, 2, device=index.device, dtype=wide)
        frequency = self.slowed(torch.exp(plane * (-math.log(self.base) / self.width)))
        angle = (index + self.offset).to(wide)[:, None] * frequency
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)

    def slowed(self, frequency: torch.Tensor) -> torch.Tensor:
        """What becomes of the frequencies base^(-2k/n) (n/2,)."""
        return frequency

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        a, b, *rest = x.split([half, half, x.shape[-1] - self.width] if self.width < x.shape[-1] else half, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, *rest], -1)


class Interpolation(Rotation):
    """Every plane `factor` times slower."""

    def __init__(self, width: int, base: float, offset: int, factor: float):
        super().__init__(width, base, offset)
        self.factor = factor

    def slowed(self, frequency: torch.Tensor) -> torch.Tensor:
        return frequency / self.factor


class Llama3Rotation(Rotation):
    """Slow planes `factor` times slower, fast ones as they are, those between in between."""

    def __init__(self, width: int, base: float, offset: int, factor: float, low: float, high: float, original: int):
        super().__init__(width, base, offset)
        self.factor, self.low, self.high, self.original = factor, low, high, original

    def slowed(self, frequency: torch.Tensor) -> torch.Tensor:
        turns = frequency * (self.original / (2 * math.pi))
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class QueryNorm(parts.Position):
    """u <- scale u / |u|: every query gets the same temperature. Foliation, order of leaves and argmax stay (math H.1).

    Args:
        scale: length of the normalised query; 1 is its typical length at initialisation.
    """

    scale: float = 1.0

    def build(self, rank: int) -> _QueryNorm:
        return _QueryNorm(self.scale)


class _QueryNorm(PositionMap):
    acts_on_keys = False
    reads_factors = True

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]:
        return self.scale * functional.normalize(u, dim=-1), v


@dataclass(frozen=True)
class KeyNorm(parts.Position):
    """v <- scale sqrt(r) v / |v|: the order of leaves changes, the score is no longer linear in the key (math H.1).

    Args:
        scale: length of the normalised key in units of sqrt(r), its typical length at initialisation.
    """

    scale: float = 1.0

    def build(self, rank: int) -> _KeyNorm:
        return _KeyNorm(self.scale)


class _KeyNorm(PositionMap):
    acts_on_keys = True
    reads_factors = True

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]:
        return u, self.scale * math.sqrt(v.shape[-1]) * functional.normalize(v, dim=-1)
