"""How tokens move: speed, bend and length of their paths, and which part of an update another layer can see.

Functions act on each token by itself: a cloud is any (..., N, d), mostly (B, N, d). A path is the states x^0 … x^T in order, one
tensor (T+1, ..., d) or a sequence of (..., d); its steps are D^k = x^{k+1} - x^k, eps and every reshaping included. All compute
in float64 and return float64. Lengths are in units of the stream, angles in radians. What is not defined is nan: a direction
of the zero vector, a ratio to a length 0. Coordinates matter: pass the raw stream, and beside it the mean-removed one; for the
normed stream there are `angular_speed` and `sphere_path`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emformer.geometry.spectra import wide

Vectors = Float[Tensor, "*batch d"]
One = Float[Tensor, "*#batch d"]  # of a pair, whose batches broadcast
States = Float[Tensor, "S *batch d"] | Sequence[Float[Tensor, "*batch d"]]
Scalars = Float64[Tensor, "*batch"]
Pairs = Float64[Tensor, "..."]


def direction(x: Vectors, centred: bool = False) -> Float64[Tensor, "*batch d"]:
    """e = Pi x / |Pi x|, what a norm without gain makes of x up to the factor sqrt(d).

    Pi = I - 11^T/d for LayerNorm (`centred`), I for RMSNorm. nan where Pi x = 0 up to the rounding of the input's type: there a
    norm shows its own epsilon and not the token. Cost d. Source: math A.6.
    """
    return _direction(wide(x), centred, _rounding(x))[0]


def angle(u: One, v: One) -> Pairs:
    """2 atan2(|u/|u| - v/|v||, |u/|u| + v/|v||), in [0, pi].

    Null (independent directions): pi/2, its cosine with sd 1/sqrt(d). nan where either vector is 0. Accurate to 1e-16 at both
    ends, where the arc cosine loses half the digits. Cost d. Source: Kahan 2006, "How futile are mindless assessments of
    roundoff".
    """
    return _arc(direction(u), direction(v))


def cosine(u: One, v: One) -> Pairs:
    """<u, v> / (|u| |v|), in [-1, 1].

    Null (independent directions): 0 with sd 1/sqrt(d). nan where either vector is 0. Cost d.
    """
    u, v = wide(u), wide(v)
    scale = _size(u) * _size(v)
    return ((u * v).sum(-1) / scale.where(scale > 0, torch.nan)).clamp(-1, 1)


class Path(NamedTuple):
    """`speed`, `relative` (T, ...); `turning`, `curvature` (T-1, ...); `length`, `chord`, `tortuosity` (...)."""

    speed: Float64[Tensor, " T *batch"]
    relative: Float64[Tensor, " T *batch"]
    turning: Float64[Tensor, " K *batch"]
    curvature: Float64[Tensor, " K *batch"]
    length: Scalars
    chord: Scalars
    tortuosity: Scalars


def path(states: States) -> Path:
    """The shape of each token's path, in one pass.

    * speed |D^k|; relative speed |D^k|/|x^k|, nan at x^k = 0;
    * turning angle(D^k, D^{k+1}) in [0, pi], nan beside a step 0; null (independent isotropic steps) pi/2;
    * curvature = turning / ((|D^k| + |D^{k+1}|)/2) in 1/length: 0 on a line, about 1/R on a finely sampled circle of radius R;
    * length = sum |D^k|, chord = |x^T - x^0|, tortuosity = length/chord >= 1: 1 iff straight, nan where the chord is 0 up to the
      rounding of the states' type. Null (independent isotropic steps of one size, d large): sqrt(T), see `random_tortuosity`.

    Cost T d, memory 4 clouds in float64. Source: math D.2-4.

    Raises:
        ValueError: for fewer than two states.
    """
    _check(states, 2)
    speed, relative, turning = [], [], []
    here, heading = wide(states[0]), None
    for after in states[1:]:
        x, here, before = here, wide(after), heading
        step = here - x
        size, radius = _size(step), _size(x)
        heading = step.div_(size.where(size > 0, torch.nan).unsqueeze(-1))
        speed.append(size)
        relative.append(size / radius.where(radius > 0, torch.nan))
        if before is not None:
            turning.append(_arc(before, heading))
    speeds = torch.stack(speed)
    turns = torch.stack(turning) if turning else speeds[:0]
    length, first = speeds.sum(0), wide(states[0])
    chord = _size(here - first)
    noise = _rounding(states[0]) * (_size(first) + _size(here))
    return Path(
        speed=speeds,
        relative=torch.stack(relative),
        turning=turns,
        curvature=2 * turns / (speeds[:-1] + speeds[1:]),
        length=length,
        chord=chord,
        tortuosity=length / chord.where(chord > noise, torch.nan),
    )


def autocorrelation(states: States, lag: int = 1) -> Float64[Tensor, " K *batch"]:
    """cos(D^k, D^{k+lag}) for k = 0 … T-1-lag, in [-1, 1]: whether later branches go on, or take back, what earlier ones wrote.

    Null (independent isotropic steps): 0 with sd 1/sqrt(d). nan beside a step 0. Cost T d. Source: math D.4.

    Raises:
        ValueError: unless 1 <= lag < T.
    """
    if not 1 <= lag < len(states) - 1:
        raise ValueError(f"a path of {len(states)} states has no two steps {lag} apart")
    pairs = zip(pairwise(states[:-lag]), pairwise(states[lag:]), strict=True)
    return torch.stack([cosine(wide(b) - wide(a), wide(d) - wide(c)) for (a, b), (c, d) in pairs])


def angular_speed(states: States, centred: bool = False) -> Float64[Tensor, " T *batch"]:
    """angle(Pi x^k, Pi x^{k+1}) in [0, pi]: the arc on the sphere that norms map to, see `direction` for Pi. Cost T d."""
    return sphere_path(states, centred).speed


class SpherePath(NamedTuple):
    """`speed` (T, ...), the arcs; `length`, `chord`, `tortuosity` (...)."""

    speed: Float64[Tensor, " T *batch"]
    length: Scalars
    chord: Scalars
    tortuosity: Scalars


def sphere_path(states: States, centred: bool = False) -> SpherePath:
    """The path of the directions Pi x/|Pi x|: sum of arcs, great-circle chord, and their ratio >= 1.

    In radians; `chord` <= pi. 1 iff along one great circle without turning back. nan where a direction is undefined, and the
    ratio where the chord is 0 up to the rounding of the states' type. Cost T d. Source: math D.3.

    Raises:
        ValueError: for fewer than two states.
    """
    _check(states, 2)
    first = before = direction(states[0], centred)
    arcs = []
    for x in states[1:]:
        after = direction(x, centred)
        arcs.append(_arc(before, after))
        before = after
    speed = torch.stack(arcs)
    length, chord = speed.sum(0), _arc(first, before)
    return SpherePath(speed, length, chord, length / chord.where(chord > 2 * _rounding(states[0]), torch.nan))


def random_tortuosity(speed: Float[Tensor, " T *batch"], dim: int, draws: int, seed: int) -> Float64[Tensor, " draws *batch"]:
    """The null of tortuosity: independent isotropic steps in R^dim of the same sizes |D^k| (T, ...).

    Exact in law without drawing a vector: S_{k+1} = S_k + s w has |S_{k+1}|^2 = |S_k|^2 + s^2 + 2 s |S_k| c, and the cosine c of
    an isotropic w with whatever stands before it has (1 + c)/2 ~ Beta((dim-1)/2, (dim-1)/2). Mean near sqrt(T) for equal sizes
    (T = 12, dim = 128: 3.48, one draw sd .21). nan where all sizes are 0. Cost T a draw and token. Source: math D.3.
    """
    sizes, rng = wide(speed), np.random.default_rng(seed)
    square = sizes[:1].square().expand(draws, *sizes.shape[1:])
    for size in sizes[1:]:
        c = 2 * (rng.integers(0, 2, square.shape) if dim == 1 else rng.beta((dim - 1) / 2, (dim - 1) / 2, square.shape)) - 1.0
        cosines = torch.from_numpy(np.asarray(c)).to(sizes.device)
        square = (square + size.square() + 2 * size * square.sqrt() * cosines).clamp(min=0)
    chord = square.sqrt()
    return sizes.sum(0) / chord.where(chord > 0, torch.nan)


class Permuted(NamedTuple):
    """Mean turning angles: `expected` (...) over all orders, `draws` (draws, ...) of single random orders."""

    expected: Scalars
    draws: Float64[Tensor, " draws *batch"]


def permuted_turning(states: States, draws: int, seed: int) -> Permuted:
    """The null of the mean turning angle: the same steps of each token in a random order.

    Length, chord and therefore tortuosity do not change. `expected` is exact: the mean angle over all pairs of steps, to 1e-8.
    nan for a token with a step 0, and for fewer than two steps. Cost T^2 d, and T a draw; memory T clouds. Source: math D.3.
    """
    _check(states, 2)
    headings = torch.stack([direction(wide(b) - wide(a)) for a, b in pairwise(states)], -2)
    table = (headings @ headings.mT).clamp(-1, 1).acos()
    count = table.shape[-1]
    pairs = table.sum((-2, -1)) - table.diagonal(dim1=-2, dim2=-1).sum(-1)
    expected = pairs / (count * (count - 1) or math.nan)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(draws, *table.shape[:-1], generator=generator).argsort(-1).to(table.device)
    chosen = table.flatten(-2).expand(draws, *table.shape[:-2], -1).gather(-1, order[..., :-1] * count + order[..., 1:])
    return Permuted(expected, chosen.mean(-1))


def interference(x: One, update: One) -> Pairs:
    """c = cos(x, D), in [-1, 1]: |x + D|^2 = |x|^2 + |D|^2 + 2 c |x| |D|.

    Null (independent directions): 0 with sd 1/sqrt(d). nan where x or D is 0: no update, no interference. Cost d.
    Source: math D.6.
    """
    return cosine(x, update)


def interference_kind(c: Float[Tensor, "*batch"], dim: int) -> Scalars:
    """1 constructive (c > t), -1 destructive (c < -t), 0 orthogonal, with t = 2/sqrt(dim); nan where c is.

    Null (independent directions, d large): .023, .023 and .954 of the tokens. Source: math D.6.
    """
    c, threshold = wide(c), 2 / math.sqrt(dim)
    kind = (c > threshold).double() - (c < -threshold).double()
    return kind.where(~c.isnan(), torch.nan)


class Split(NamedTuple):
    """Lengths `mean`, `radial` (signed) and `tangential`; `invisible` in [0, 1]; `mobility` = 1/|Pi x|."""

    mean: Pairs
    radial: Pairs
    tangential: Pairs
    invisible: Pairs
    mobility: Pairs


def split(x: One, update: One, centred: bool) -> Split:
    """D = mean 1/sqrt(d) + radial e + D_t with e = Pi x/|Pi x|: what the next norm sees of an update.

    |D|^2 = mean^2 + radial^2 + tangential^2. To first order the norm reads D_t alone and turns by tangential * mobility radians.
    `invisible` = (mean^2 + radial^2)/|D|^2, null (isotropic D) 2/d for LayerNorm (`centred`), 1/d for RMSNorm, where mean is 0
    by definition. nan where e is undefined, `invisible` also at D = 0. Cost d. Source: math D.7.
    """
    e, radius = _direction(wide(x), centred, _rounding(x))
    step = wide(update)
    whole, average = _size(step), step.mean(-1)
    rest = step - average.unsqueeze(-1) if centred else step
    mean = average * math.sqrt(step.shape[-1]) if centred else torch.zeros_like(whole)
    radial = (rest * e).sum(-1)
    tangential = _size(torch.addcmul(rest, radial.unsqueeze(-1), e, value=-1))
    hidden = torch.hypot(mean, radial) / whole.where(whole > 0, torch.nan)
    return Split(mean.where(~radial.isnan(), torch.nan), radial, tangential, hidden.square().clamp(max=1), 1 / radius)


def head_cancellation(heads: Float[Tensor, "B H N d"]) -> Float64[Tensor, "B N"]:
    """1 - |sum_h D^h| / sum_h |D^h|, in [0, 1]: 0 all heads push the same way, 1 they push for nothing.

    Null (independent isotropic heads of one size): 1 - 1/sqrt(H). nan where every head is 0. Cost H d. Source: math D.5.
    """
    heads = wide(heads)
    effort = _size(heads).sum(1)
    return (1 - _size(heads.sum(1)) / effort.where(effort > 0, torch.nan)).clamp(0, 1)


def head_shares(heads: Float[Tensor, "B H N d"], constant: Tensor | float = 0.0) -> Float64[Tensor, "B P N"]:
    """<D^h, D>/|D|^2 of the H heads and, last, of the constant: P = H + 1 numbers that sum to 1, of either sign.

    D = sum_h D^h + constant. Null (independent pieces of one size): 1/P each. nan where D = 0. Cost H d. Source: math D.5.

    Args:
        constant: the drift, and all else that no head wrote (the FFN of a parallel block): anything that broadcasts to (B, N, d).
    """
    heads = wide(heads)
    rest = wide(constant) if isinstance(constant, Tensor) else heads.new_tensor(constant)
    update = heads.sum(1) + rest
    whole = update.square().sum(-1)
    parts = torch.cat([torch.einsum("bhnd,bnd->bhn", heads, update), (rest * update).sum(-1).unsqueeze(1)], 1)
    return parts / whole.where(whole > 0, torch.nan).unsqueeze(1)


def _direction(x: Tensor, centred: bool, rounding: float) -> tuple[Tensor, Tensor]:
    """e and |Pi x| of x in float64, both nan where Pi x is 0 up to rounding."""
    size = _size(x)
    y = x - x.mean(-1, keepdim=True) if centred else x
    length = _size(y)
    length = length.where(length > rounding * size, torch.nan)
    return y / length.unsqueeze(-1), length


def _arc(e: Tensor, f: Tensor) -> Tensor:
    """The angle between unit vectors."""
    return 2 * torch.atan2(_size(e - f), _size(e + f))


def _size(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _rounding(x: Tensor) -> float:
    """Relative to |x|, what the input's own type cannot tell from 0."""
    return 4 * torch.finfo(x.dtype).eps


def _check(states: Sequence[Tensor] | Tensor, least: int) -> None:
    if len(states) < least:
        raise ValueError(f"a path needs at least {least} states, not {len(states)}")
