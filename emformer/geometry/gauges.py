"""Canonical gauges: one choice of factors for every operator W_h = L_h R_g^T, whatever training made of them.

Factors are rows, as `emformer.operators.lowrank` stores them: `left` (G, s, r, d), the rows of L_h^T for the s heads that share
a right factor, and `right` (G, r, d), the rows of R_g^T. A gauge is an invertible G of width r per group,
(L_h, R) -> (L_h G, R G^-T), which leaves every W_h as it was; vectors in the factor's space such as b_Q go to G^T b. What is
read off canonical factors (norms, cosines, matched coordinates) no longer depends on the gauge. Source: math A.3, A.4, A.5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from emformer.geometry.spectra import wide

Left = Float[Tensor, "G s r d"]
Right = Float[Tensor, "G r d"]


class Gauge(NamedTuple):
    """G and G^-1 per group, dimensionless; both are computed from the factors, none by inversion."""

    forward: Float64[Tensor, "G r r"]
    inverse: Float64[Tensor, "G r r"]


def apply(left: Left, right: Right, gauge: Gauge) -> tuple[Left, Right]:
    """L_h -> L_h G and R -> R G^-T, in float64 and back to the type of each factor. Cost (s + 1) d r^2 a group."""
    return (gauge.forward.mT.unsqueeze(1) @ wide(left)).to(left), (gauge.inverse @ wide(right)).to(right)


def balanced(left: Left, right: Right) -> Gauge:
    """The balanced gauge: sum_h L_h^T L_h = R^T R = S, the singular values of the heads on top of each other, descending.

    For s = 1, (|L|_F^2 + |R|_F^2)/2 becomes the nuclear norm of W, its minimum over all gauges. What remains, a sign for each
    column, is fixed by the largest |entry| of the stacked L, which is made positive; equal singular values leave a rotation free.
    With RoPE it changes the scores: use `planes`. Needs r <= d. Cost (s + 1) d r^2 a group. Source: math A.3.

    Raises:
        ValueError: the factors of a group have a rank below r; no gauge balances them.
    """
    stacked, shared = _columns(left, right)
    basis, outer = torch.linalg.qr(stacked)
    inner = torch.linalg.qr(shared, mode="r").R
    # stacked = Q T and shared = Q' T' with T T'^T = A S B^T. From T (T'^T B) = A S follows T^-1 A = T'^T B S^-1, so that neither
    # T nor T', either of which may be close to singular, is inverted: G = T^-1 A S^1/2, G^-1 = S^-1/2 A^T T.
    a, values, bh = torch.linalg.svd(outer @ inner.mT, full_matrices=False)
    _refuse_deficient(values, right.shape[-2], stacked.shape[-2])
    a, b = a * (sign := _signs(basis @ a)), bh.mT * sign
    root = values.sqrt().unsqueeze(-2)
    return Gauge(inner.mT @ (b / root), (a / root).mT @ outer)


def planes(left: Left, right: Right, width: int) -> Gauge:
    """The canonical gauge that RoPE leaves free: G_k = a I + b J in plane k = (k, k + width/2), J the quarter turn.

    Per plane the norms become equal, |L_k|_F = |R_k|_F, L_k over all heads of the group, and L_k^T L_k diagonal, descending, the
    largest |entry| of its first column positive. That G commutes with every rotation of the planes, so that no score changes; it
    is all of the freedom if the frequencies differ. The r - width coordinates that do not turn are balanced among themselves.
    width = 0 is `balanced`. A plane with L_k^T L_k = c I leaves its phase free. Cost (s + 1) d r^2 a group. Source: math A.4.

    Args:
        width: number of coordinates that turn, fraction * r of `emformer.positions.RoPE`.

    Raises:
        ValueError: width is not an even number of 0 … r; a plane of a factor is 0; the rest has not its full rank.
    """
    rank, half = right.shape[-2], width // 2
    if width % 2 or not 0 <= width <= rank:
        raise ValueError(f"planes: width is {width}; choose an even number of the {rank} coordinates.")
    stacked, shared = _columns(left, right)
    first, second = stacked[..., :half], stacked[..., half:width]
    size_left = torch.hypot(first.norm(dim=-2), second.norm(dim=-2))
    size_right = torch.hypot(shared[..., :half].norm(dim=-2), shared[..., half:width].norm(dim=-2))
    for name, size in (("left", size_left), ("right", size_right)):
        if not size.all():
            group, plane = (size == 0).nonzero()[0].tolist()
            raise ValueError(f"planes: plane {plane} of the {name} factor of group {group} is 0; no gauge makes the norms equal.")
    scale = (size_right / size_left).sqrt()
    # L_k^T L_k = [[p, q], [q, t]] is diagonal, descending, in the frame turned by phase: its angle doubled is that of (p - t, 2q)
    phase = torch.atan2(2 * (first * second).sum(-2), (first.square() - second.square()).sum(-2)) / 2
    cos, sin = phase.cos(), phase.sin()
    sign = _signs(first * cos.unsqueeze(-2) + second * sin.unsqueeze(-2)).squeeze(-2)  # turns both columns: half a turn
    cos, sin = sign * cos, sign * sin
    forward, inverse = (stacked.new_zeros(len(right), rank, rank) for _ in range(2))
    forward[:, :width, :width] = _commuting(scale * cos, scale * sin)
    inverse[:, :width, :width] = _commuting(cos / scale, -sin / scale)
    if width < rank:
        rest = balanced(left[:, :, width:], right[:, width:])
        forward[:, width:, width:], inverse[:, width:, width:] = rest
    return Gauge(forward, inverse)


def _commuting(a: Tensor, b: Tensor) -> Tensor:
    """(G, n), (G, n) -> (G, 2n, 2n): a_k I + b_k J in the planes (k, k + n), the angle of a + ib as `Rotation.turn` counts it."""
    a, b = torch.diag_embed(a), torch.diag_embed(b)
    return torch.cat([torch.cat([a, -b], -1), torch.cat([b, a], -1)], -2)


def _columns(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """L of all heads of a group on top of each other (G, s d, r), and R (G, d, r)."""
    return wide(left).mT.flatten(1, 2), wide(right).mT


def _signs(columns: Tensor) -> Tensor:
    """(…, n, r) -> (…, 1, r): the sign of the largest |entry| of each column; 1 for a column of zeros."""
    peak = columns.gather(-2, columns.abs().argmax(-2, keepdim=True))
    return torch.where(peak < 0, -1.0, 1.0).to(peak)


def _refuse_deficient(values: Tensor, rank: int, length: int) -> None:
    """`values` (G, .): the singular values, descending, of operators with factors of width `rank` and columns of `length`."""
    found = (values > length * torch.finfo(values.dtype).eps * values[:, :1]).sum(-1)
    if (found < rank).any():
        group = int((found < rank).nonzero()[0])
        raise ValueError(
            f"balanced: the operators of group {group} have rank {int(found[group])} and factors of width {rank}; "
            "no gauge balances them. Make the factors as narrow as the rank."
        )
