"""The nearest neighbours of the points of a cloud, exact, and what their distances say at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from emformer.geometry.spectra import wide

NEAR_DUPLICATES = 0.05  # above it a cloud is suspect, see `near_duplicates`

_SPARE = 8  # candidates beyond k, so that the bound can prove the k-th
_TABLE = 2**22  # distances screened at a time, 16 MB: every block is a barrier for all threads
_LANES = 4  # columns behind one minimum: finding the smallest minima first shortens the selection
_BLOCK = 2**20  # coordinates refined at a time, 8 MB


class Neighbours(NamedTuple):
    """The k nearest neighbours of each distinct point of a cloud, itself excluded; see `nearest`.

    Row r describes point `kept[r]`. `indices` are rows of the cloud. Where there are fewer than k other points, the distance is
    nan and the index -1.
    """

    distances: Float64[Tensor, "kept k"]  # in units of the cloud, ascending
    indices: Int64[Tensor, "kept k"]
    kept: Int64[Tensor, " kept"]  # ascending
    points: int  # of the cloud, duplicates included


@torch.no_grad()
def nearest(cloud: Float[Tensor, "points d"], k: int) -> Neighbours:
    """The k nearest neighbours by Euclidean distance, exact to the rounding of float64; ties in the order of the rows.

    Of points that are equal in every coordinate the first is kept. A cloud with an entry that is not finite keeps none. Float32
    products on the centred cloud propose candidates, whose distances are then taken coordinate by coordinate in float64; a row
    for which the error bound of the products does not exclude every other point is searched again in float64, and again without
    products. Bitwise the same on every run. Cost N^2 d, memory O(N (k + d)) and some 100 MB. Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"the number of neighbours must be at least 1, not {k}")
    w = wide(cloud)
    kept = _distinct(w).to(w.device) if w.isfinite().all() else torch.arange(0, device=w.device)
    w = w[kept]
    distances = w.new_full((len(w), k), torch.nan)
    indices = kept.new_full((len(w), k), -1)
    found = min(k, len(w) - 1)
    if found > 0:
        # a power of two is exact, and squares can no longer overflow
        exponent = max(-1000, min(1000, math.frexp(w.abs().amax().item())[1]))
        r, j = _search(w * 2.0**-exponent, found)
        distances[:, :found] = r * 2.0**exponent
        indices[:, :found] = kept[j]
    return Neighbours(distances, indices, kept, len(cloud))


def log_ratios(neighbours: Neighbours, k: int = 1) -> Float64[Tensor, " points"]:
    """l = log(r_2k / r_k) of each row of the cloud, in nats, >= 0; for k = 1 exponential with the dimension as its rate.

    nan for a duplicate and where there are fewer than 2k other points. Raises ValueError if fewer than 2k were searched.
    """
    require(neighbours, 2 * k)
    r = neighbours.distances
    ratios = r.new_full((neighbours.points,), torch.nan)
    ratios[neighbours.kept] = (r[:, 2 * k - 1] / r[:, k - 1]).log()
    return ratios


def near_duplicates(neighbours: Neighbours) -> float:
    """The share of points with r_1 < .01 median r_2: near-duplicate pairs, which look like a collapse of the dimension.

    In [0, 1]; above `NEAR_DUPLICATES` (.05) believe no estimate from r_1. Clean clouds: .02 in one dimension, < .001 from two
    on. Sees pairs only: groups of three and more escape it. nan for fewer than three distinct points. Source: math J 23.
    """
    require(neighbours, 2)
    r = neighbours.distances
    if len(r) < 3:
        return math.nan
    return float((r[:, 0] < 0.01 * r[:, 1].quantile(0.5)).double().mean())


def require(neighbours: Neighbours, k: int) -> None:
    """Raises ValueError unless the k-th neighbours were searched."""
    if k < 1 or neighbours.distances.shape[1] < k:
        raise ValueError(f"needs {k} neighbours of each point, {neighbours.distances.shape[1]} were searched")


def _distinct(w: Tensor) -> Tensor:
    """The rows of the first occurrence of each point, ascending."""
    w = (w + 0.0).cpu().contiguous()  # -0 becomes 0, so that equal points have equal bytes
    points = w.numpy().view(np.dtype((np.void, 8 * w.shape[1]))).ravel() if w.numel() else np.zeros(len(w))
    return torch.from_numpy(np.sort(np.unique(points, return_index=True)[1]))


def _search(w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(n, k) distances and rows, for distinct points with coordinates up to 1."""
    centred = w - w.mean(0)
    distances = w.new_empty(len(w), k)
    indices = torch.empty(len(w), k, dtype=torch.int64, device=w.device)
    rows = torch.arange(len(w), device=w.device)
    for dtype in (torch.float32, torch.float64):
        candidates, floor = _screen(centred.to(dtype), rows, min(k + _SPARE, len(w) - 1))
        r, j = _refine(w, rows, candidates, k)
        distances[rows], indices[rows] = r, j
        rows = rows[r[:, -1].square() > floor]
        if not len(rows):
            break
    for block in rows.split(max(1, _TABLE // len(w))):
        r = torch.cdist(w[block], w, compute_mode="donot_use_mm_for_euclid_dist")
        r[torch.arange(len(block), device=w.device), block] = torch.inf
        r, j = r.sort(dim=1, stable=True)
        distances[block], indices[block] = r[:, :k], j[:, :k]
    return distances, indices


def _screen(y: Tensor, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """For each of the rows, m candidates, and a lower bound on the squared distance of all other points.

    What is compared is itself a lower bound: |y_i|^2 (1 - s) + |y_j|^2 (1 - s) - 2 y_i y_j. With unit rounding u, the product
    errs by at most d u (|y_i|^2 + |y_j|^2) in any order of summation, the additions by 4 u and the coordinates, rounded twice
    on the way here, by 8 u; hence s = (d + 16) u. A bound for each pair, rather than for the cloud: a token of huge norm costs
    the others nothing.
    """
    n, d = y.shape
    info = torch.finfo(y.dtype)
    s = (d + 16) * info.eps / 2
    exact = y.double()
    norms = exact.square().sum(1) * (1 - s) - (d + 16) * info.tiny
    sample = (exact - exact[rows[0]]).square().sum(1) * (1 + d * torch.finfo(torch.float64).eps) - norms[rows[0]]
    sample[rows[0]] = torch.inf
    lanes = _LANES if _LANES * m <= n else 1
    width = -(-n // lanes)
    padding = lanes * width - n
    far = torch.cat([norms.to(y.dtype), y.new_full((padding,), torch.inf)])
    y = torch.cat([y, y.new_zeros(padding, d)])
    lane = torch.arange(lanes, device=y.device)[:, None] * width
    blocks = rows.split(max(1, _TABLE // n))
    bounds = y.new_empty(len(blocks[0]), lanes * width)
    candidates, floor, holds = [], [], True
    for block in blocks:
        bound = torch.addmm(far, y[block], y.mT, alpha=-2, out=bounds[: len(block)])
        bound[torch.arange(len(block), device=y.device), block] = torch.inf
        if not floor:
            # torch may have been told to round float32 products to bfloat16 or TF32: one row shows it, and nothing is proven
            holds = bool((bound[0, :n] <= sample).all())
        # the m smallest lie behind the m smallest minima
        columns = bound.view(-1, lanes, width).amin(1).topk(m, largest=False, sorted=False).indices
        columns = (columns[:, None] + lane).flatten(1)
        least, place = bound.gather(1, columns).topk(m, largest=False, sorted=False)
        candidates.append(columns.gather(1, place))
        floor.append(least.amax(1).double() + norms[block])
    floor = torch.cat(floor)
    if m == n - 1:
        floor.fill_(torch.inf)
    elif not holds:
        floor.fill_(-torch.inf)
    return torch.cat(candidates), floor


def _refine(w: Tensor, rows: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of the candidates, by differences of coordinates."""
    candidates = candidates.sort(1).values  # so that the stable sort leaves ties in the order of the rows
    m, d = candidates.shape[1], w.shape[1]
    block = max(1, _BLOCK // (m * max(d, 1)))
    differences = w.new_empty(min(block, len(rows)) * m, d)
    r = w.new_empty(candidates.shape)
    for at in range(0, len(rows), block):
        near = candidates[at : at + block]
        difference = torch.index_select(w, 0, near.flatten(), out=differences[: near.numel()]).view(*near.shape, d)
        difference -= w[rows[at : at + block], None]
        torch.linalg.vector_norm(difference, dim=-1, out=r[at : at + block])
    r, order = r.sort(dim=1, stable=True)
    return r[:, :k], candidates.gather(1, order[:, :k])
