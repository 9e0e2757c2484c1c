"""What clouds and weights come to in the end: polytopes, hyperplanes, Boolean rows, leaders, the first token.

Clouds are (..., n, d) and finite, lengths those of the clouds as given; all is computed in float64, without gradients. Whether
something has been reached is a matter of a tolerance, which is a length, or a weight, and the caller's to choose.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.optimize import nnls
from scipy.spatial import ConvexHull
from torch import Tensor

from emformer.geometry.spectra import wide

Clouds = Float[Tensor, "*batch n d"]
Directions = Float[Tensor, "u d"]
Weights = Float[Tensor, "*batch n m"]
Counts = Int64[Tensor, "*batch"]


@torch.no_grad()
def vertices(cloud: Clouds, tolerance: float = 1e-3) -> Bool[Tensor, "*batch n"]:
    """Which tokens are the vertices of the cloud's convex hull: enough for all others to be within `tolerance` of their hull.

    In any dimension of the hull, a point (one vertex) and a segment (two) included; tokens that have come together count once.
    Taken one after the other, each the farthest from the hull of those before it, so that none is but an extreme point. For a
    tolerance that is not small fewer might do: the choice is greedy.
    Cost: a non-negative least squares (Lawson and Hanson's least distance) of d rows for each token and vertex.
    Source: math E.2; arXiv 2305.05465, theorem 3.1.

    Raises:
        ValueError: for a tolerance that is not positive, where rounding would decide.
    """
    if not tolerance > 0:
        raise ValueError(f"the tolerance is a length above 0, not {tolerance:g}")
    points = wide(cloud).cpu().numpy()
    found = np.zeros(points.shape[:-1], dtype=bool)
    for place in np.ndindex(points.shape[:-2]):
        found[place] = _extreme(points[place], tolerance)
    return torch.from_numpy(found).to(cloud.device)


@torch.no_grad()
def depth(cloud: Clouds) -> Float64[Tensor, "*batch n"]:
    """How far each token is inside the convex hull of the cloud: its distance from the nearest facet, 0 on the boundary.

    0 for all tokens of a cloud that lies in a hyperplane: it is all boundary. Cost: that of the hull, n^{d/2}. Source: math E.2.
    """
    points = wide(cloud).cpu().numpy()
    found = np.zeros(points.shape[:-1])
    for place in np.ndindex(points.shape[:-2]):
        some = points[place]
        spread = np.linalg.svd(some - some.mean(0), compute_uv=False) if len(some) > some.shape[1] else np.zeros(1)
        if spread[-1] <= 1e-12 * np.abs(some).max():
            continue
        if some.shape[1] == 1:
            found[place] = np.minimum(some - some.min(), some.max() - some)[:, 0]
        else:
            facets = ConvexHull(some).equations  # outward normal and offset, <= 0 inside
            found[place] = -(some @ facets[:, :-1].T + facets[:, -1]).max(1).clip(max=0.0)
    return torch.from_numpy(found).to(cloud.device)


@torch.no_grad()
def support(cloud: Clouds, directions: Directions) -> Float64[Tensor, "*batch u"]:
    """max_i <z_i, u>: how far the hull reaches in each direction. Of a hull that shrinks it falls with time, in every one.

    Cost n d u. Source: math E.2.
    """
    return (wide(cloud) @ wide(directions).mT).amax(-2)


class Levels(NamedTuple):
    centres: list[Float64[Tensor, "*batch k"]]  # of k = 1, 2 … levels, ascending; repeated where fewer would do
    within: Float64[Tensor, "*batch most"]  # mean squared distance from the nearest of k levels


@torch.no_grad()
def levels(values: Float[Tensor, "*batch n"], most: int = 3) -> Levels:
    """The best k = 1 … most levels of numbers, and what is left about them: k-means on a line, solved exactly.

    With <z_i, phi*>, phi* a left eigenvector of V, they are parallel hyperplanes, and `within` -> 0 says that tokens lie on them.
    `within` falls with k, to 0 at k = n; its rounding is 1e-15 of the largest square. Uniform values leave 1/k^2 of the variance,
    so that a small number means little before it is far below 1/most^2. Cost most n^2, by dynamic programming over the sorted
    values. Source: math E.2.

    Raises:
        ValueError: for no level, or more than there are values.
    """
    n = values.shape[-1]
    if not 1 <= most <= n:
        raise ValueError(f"{n} values have 1 to {n} levels, not {most}")
    middle = wide(values).mean(-1, keepdim=True)
    y = (wide(values) - middle).sort(-1).values
    first, square = (torch.nn.functional.pad(one.cumsum(-1), (1, 0)) for one in (y, y.square()))
    count = torch.arange(n + 1, device=y.device)
    size = (count[None, :] - count[:, None]).clamp(min=1)  # of the values from a to b, at [a, b]
    total = first[..., None, :] - first[..., :, None]
    cost = (square[..., None, :] - square[..., :, None] - total.square() / size).clamp(min=0)
    cost = cost.masked_fill(count[None, :] < count[:, None], torch.inf)
    best, cuts, centres, within = cost[..., 0, :], [], [], []
    for k in range(most):
        if k:  # of the first b values into k + 1 parts, the last of which begins at the cut
            best, cut = (best[..., :, None] + cost).min(-2)
            cuts.append(cut)
        within.append(best[..., -1])
        end = torch.full((*y.shape[:-1], 1), n, device=y.device)
        parts = []
        for cut in [*reversed(cuts), None]:
            start = torch.zeros_like(end) if cut is None else cut.gather(-1, end)
            span = (end - start).clamp(min=1)
            parts.append((first.gather(-1, end) - first.gather(-1, start)) / span)
            end = start
        centres.append(torch.cat(parts[::-1], -1) + middle)
    return Levels(centres, torch.stack(within, -1) / n)


@torch.no_grad()
def boolean(weights: Weights) -> Float64[Tensor, "*batch n"]:
    """1 - max_j a_ij of each row: 0 where a query looks at one token alone, 1 - 1/m where at all alike. Source: math E.2."""
    return 1 - wide(weights).amax(-1)


@torch.no_grad()
def distinct(weights: Weights, tolerance: float = 1e-3) -> Counts:
    """How many rows of the pattern differ: groups that a chain of rows joins, each within `tolerance` of the next in all entries.

    In 1 … n. Cost n^2 m. Source: math E.2; arXiv 2305.05465, theorem 2.1.
    """
    rows = wide(weights)
    n = rows.shape[-2]
    near = torch.stack([(rows - rows[..., k : k + 1, :]).abs().amax(-1) <= tolerance for k in range(n)], -1)
    label = torch.arange(n, device=rows.device).expand(near.shape[:-1])
    while True:  # the smallest number in the neighbourhood, until nothing changes
        lower = label.unsqueeze(-2).where(near, n).amin(-1)
        if torch.equal(lower, label):
            return (label == torch.arange(n, device=rows.device)).sum(-1)
        label = lower


@torch.no_grad()
def rank(weights: Weights, tolerance: float = 1e-3) -> Counts:
    """How many singular values exceed `tolerance` times the largest. Boolean rows: at most as many as are distinct."""
    return torch.linalg.matrix_rank(wide(weights), rtol=tolerance)


@torch.no_grad()
def leaders(weights: Weights, share: float = 0.5) -> Bool[Tensor, "*batch m"]:
    """Which tokens some query gives at least this share of its weight. Cost n m. Source: math E.2."""
    return (wide(weights) >= share).any(-2)


@torch.no_grad()
def toward(cloud: Clouds, target: Float[Tensor, "*batch d"]) -> Float64[Tensor, "*batch n"]:
    """1 - cos(x_i, target) in [0, 2], as |u - w|^2/2 of the unit vectors: exact also where it is far below rounding of a cosine.

    nan for a vector of no length. Cost n d. Source: math E.1.
    """
    u, w = (torch.nn.functional.normalize(wide(one), dim=-1, eps=0.0) for one in (cloud, target))
    return (u - w.unsqueeze(-2)).square().sum(-1) / 2


def _extreme(points: np.ndarray, tolerance: float) -> np.ndarray:
    away = np.linalg.norm(points - points.mean(0), axis=1)
    chosen = [int(away.argmax())]
    while len(chosen) < len(points):
        away = np.array([_distance(points[chosen], point) for point in points])
        if away.max() <= tolerance:
            break
        chosen.append(int(away.argmax()))
    return np.isin(np.arange(len(points)), chosen)


def _distance(corners: np.ndarray, point: np.ndarray) -> float:
    """Of a point from the hull of the corners (k, d): the least |w (corners - point)|^2 + (sum w - 1)^2 over w >= 0 is at a
    multiple of the weights of the nearest point."""
    arms = corners - point
    size = np.abs(arms).max()
    if size == 0:
        return 0.0
    arms = arms / size
    weights, _ = nnls(np.vstack([arms.T, np.ones(len(arms))]), np.r_[np.zeros(len(point)), 1.0])
    return float(size * np.linalg.norm(weights @ arms) / weights.sum())
