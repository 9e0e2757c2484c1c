"""Two symmetric forms as landscapes: do they rise in the same directions?

Forms are (d, d), of any floating type; numbers are float64. Nulls are for eigenvectors of one of them that are drawn anew,
S' -> O S' O^T with O uniform on O(d), and are exact: of the traceless parts S0, S0' the inner product has mean 0 and variance
|S0|^2 |S0'|^2/n, n = (d - 1)(d + 2)/2 the dimension of the space of such forms, on which O(d) acts irreducibly (Schur).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from emformer.geometry.spectra import wide

Form = Float[Tensor, "d d"]


class Likeness(NamedTuple):
    """A number, with its mean and standard deviation for random eigenvectors; nan where undefined."""

    value: float
    null: float
    null_sd: float


def cosine(s: Form, other: Form) -> Likeness:
    """<S, S'>/(|S||S'|), in [-1, 1]: 1 the same landscape but for its height, -1 hills for valleys. Null: tr S tr S'/(d |S||S'|).

    nan where either is 0. Cost d^2. Source: math K (6).
    """
    s, other = wide(s), wide(other)
    size = float(s.norm() * other.norm()) or math.nan
    dim = len(s)
    null = float(s.trace() * other.trace()) / dim
    return Likeness(float((s * other).sum()) / size, null / size, _spread(s, other) / size)


def overlap(s: Form, other: Form, count: int) -> Likeness:
    """The mean squared cosine of the principal angles between the spaces of the `count` largest eigenvalues, in [0, 1]. Null:
    count/d. nan where that space of one of them is not known: the next eigenvalue is as large, up to rounding. Cost d^3.
    Source: math K (6).

    Raises:
        ValueError: for a count that is not in 1 … d.
    """
    dim = len(s)
    if not 1 <= count <= dim:
        raise ValueError(f"a space of {count} directions of {dim}")
    one, two = (_highest(w, count) for w in (s, other))
    # of projections onto so many directions, whichever they are
    p = torch.diag((torch.arange(dim) < count).double())
    found = math.nan if one is None or two is None else float((one.mT @ two).square().sum()) / count
    return Likeness(found, count / dim, _spread(p, p) / count)


def _highest(s: Tensor, count: int) -> Tensor | None:
    """(d, count) eigenvectors of the largest eigenvalues; None where the next one ties with them."""
    values, vectors = torch.linalg.eigh(wide(s))
    first = len(s) - count
    rounding = 16 * len(s) * torch.finfo(s.dtype).eps * float(values.abs().max())
    return None if first and float(values[first] - values[first - 1]) <= rounding else vectors[:, first:]


def _spread(s: Tensor, other: Tensor) -> float:
    """The standard deviation of <S, O S' O^T>."""
    dim = len(s)
    if dim < 2:
        return 0.0
    sizes = [max(0.0, float(w.square().sum() - w.trace() ** 2 / dim)) for w in (s, other)]
    return math.sqrt(sizes[0] * sizes[1] * 2 / ((dim - 1) * (dim + 2)))
