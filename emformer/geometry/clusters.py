"""How a token cloud clusters: how aligned it is, into how many pieces it falls, who is whose neighbour, and whether that lasts.

Clouds are (..., N, d) of any floating type, rows are tokens, distances are Euclidean between the rows as they are given: for
the geometry of directions pass `unit(cloud).cloud`, for one without the common direction `unit(centred(cloud)).cloud`. A row
with a nan or an infinity is no token: it is dropped and counted, so that the places of the other tokens, and with them the
labels of two layers, still agree. A label below 0 is no label. All is computed in float64, without gradients; what is returned
for one cloud alone lies on the CPU. Undefined is nan. Standard errors take the tokens for independent, which those of one
prompt are not: between prompts the spread of the values is the better one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, v_measure_score
from torch import Tensor

from emformer.geometry.spectra import wide

Clouds = Float[Tensor, "*batch n d"]
Cloud = Float[Tensor, "n d"]
Labels = Int64[Tensor, " n"]
Scalars = Float64[Tensor, "*batch"]
Counts = Int64[Tensor, "*batch"]

EPS = torch.finfo(torch.float64).eps


class Units(NamedTuple):
    cloud: Float64[Tensor, "*batch n d"]  # x_i / |x_i|, a row of nan where x_i = 0 or is not finite
    n: Counts  # rows left
    n_dropped: Counts


@torch.no_grad()
def unit(cloud: Clouds) -> Units:
    """u_i = x_i / |x_i|, the directions of the tokens. A zero vector has none and is dropped. Cost N d. Source: math F."""
    cloud = wide(cloud)
    largest = cloud.abs().amax(-1, keepdim=True)  # neither overflow nor underflow of the squares
    scaled = cloud / largest.where(largest > 0, torch.nan)
    length = scaled.norm(dim=-1, keepdim=True)  # nan where a coordinate is nan or infinite, and so is then the whole row
    kept = length.squeeze(-1).isfinite()
    return Units(scaled.div_(length), kept.sum(-1), (~kept).sum(-1))


@torch.no_grad()
def centred(cloud: Clouds) -> Float64[Tensor, "*batch n d"]:
    """x_i - mean of the rows that are finite; exactly 0 where the difference is rounding of the input's type.

    Removes the common direction that makes the cosines of a raw stream all alike. Cost N d. Source: math F.
    """
    rounding = torch.finfo(cloud.dtype).eps
    cloud = wide(cloud)
    present = _present(cloud).unsqueeze(-1)
    kept = cloud.masked_fill(~present, 0.0)
    n = present.sum(-2, keepdim=True)
    length = kept.norm(dim=-1, keepdim=True)
    difference = kept - kept.sum(-2, keepdim=True) / n
    noise = rounding * length + 16 * EPS * length.sum(-2, keepdim=True) / n
    difference.masked_fill_(difference.norm(dim=-1, keepdim=True) <= noise, 0.0)
    return difference.masked_fill_(~present, torch.nan)


class MeanCosine(NamedTuple):
    mean: Scalars  # in [-1/(n - 1), 1]
    error: Scalars  # jackknife over the tokens, with the centre held fixed if they are centred; nan for fewer than three
    order: Scalars  # |mean of u_i| in [0, 1]
    n: Counts
    n_dropped: Counts  # zero vectors


@torch.no_grad()
def mean_cosine(cloud: Clouds) -> MeanCosine:
    """rho = (n |mean u|^2 - 1)/(n - 1): exactly the average of cos(x_i, x_j) over i != j.

    In [-1/(n - 1), 1]: 1 all tokens point one way. Null: 0 for isotropic tokens, -1/(n - 1) for `centred` ones. One massive
    coordinate makes the raw value 1 and leaves the centred one alone. nan for fewer than two directions. Cost N d. Source: math
    F.
    """
    directions, n, n_dropped = unit(cloud)
    kept = directions[..., 0].isfinite()
    directions = directions.nan_to_num(0.0)
    total = directions.sum(-2)
    squared = total.square().sum(-1)
    # without token i the sum over pairs loses 2 (u_i total - 1), so the jackknife is the spread of u_i total, of mean squared/n
    pull = (directions @ total.unsqueeze(-1)).squeeze(-1)
    spread = (pull - (squared / n).unsqueeze(-1)).where(kept, 0.0).square().sum(-1)
    return MeanCosine(
        mean=((squared - n) / (n * (n - 1))).where(n > 1, torch.nan),
        error=(2 * (spread / (n * (n - 1))).sqrt() / (n - 2)).where(n > 2, torch.nan),
        order=squared.sqrt() / n,
        n=n,
        n_dropped=n_dropped,
    )


class Components(NamedTuple):
    count: Int64[Tensor, "*batch thresholds"]  # in 1..n; 0 for a cloud without a direction
    n: Counts
    n_dropped: Counts  # zero vectors


@torch.no_grad()
def components(cloud: Clouds, thresholds: Sequence[float] = (0.9, 0.99, 0.999)) -> Components:
    """The number of connected components of the graph that joins tokens with cos(x_i, x_j) >= c.

    Monotone in c: near 1 when the cloud has collapsed to one direction, n when no two tokens are that close, which is also the
    null for isotropic tokens in high dimension. Cost N^2 d. Raises ValueError for thresholds outside [-1, 1), where rounding
    would decide. Source: math F.
    """
    if not thresholds or not all(-1 <= c < 1 for c in thresholds):
        raise ValueError(f"the cosines to cut at must lie in [-1, 1), got {tuple(thresholds)}")
    directions, n, n_dropped = unit(cloud)
    tokens, d = cloud.shape[-2:]
    parts = directions.reshape(-1, tokens, d).split(max(1, 2**22 // max(1, tokens * tokens)))  # 32 MiB of cosines at a time
    counts = [_pieces(part, thresholds) for part in parts]
    count = torch.cat(counts).to(n.device).reshape(*n.shape, len(thresholds))
    return Components(count - n_dropped.unsqueeze(-1), n, n_dropped)


class Partition(NamedTuple):
    labels: Labels  # 0..k - 1; -1 for noise and for rows that are dropped
    k: int  # clusters found
    noise: float  # share of the n tokens that no cluster took; nan for n = 0
    n: int
    n_dropped: int


@torch.no_grad()
def kmeans(cloud: Cloud, k: int, seed: int = 0, starts: int = 4) -> Partition:
    """Lloyd's k-means from `starts` greedy k-means++ starts, the tightest of them; equal seeds give equal labels.

    Always answers with k clusters, whether or not there are any, except where fewer rows are distinct. Cost starts
    N k d an iteration. Raises ValueError for k or starts < 1. Source: math F; Arthur and Vassilvitskii 2007, "k-means++: the
    advantages of careful seeding".
    """
    if k < 1 or starts < 1:
        raise ValueError(f"k-means needs k >= 1 clusters and starts >= 1, got k = {k} and starts = {starts}")
    rows, present = _rows(cloud)
    if not len(rows):
        return _partition(np.empty(0, int), present)
    with warnings.catch_warnings():  # fewer clusters than asked for are reported as k
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(min(k, len(rows)), n_init=starts, random_state=seed).fit(rows).labels_
    return _partition(np.unique(found, return_inverse=True)[1], present)


@torch.no_grad()
def hdbscan(cloud: Cloud, min_cluster_size: int = 5) -> Partition:
    """The clusters of at least `min_cluster_size` tokens that persist over the widest range of densities; the rest is noise.

    Finds the number of clusters itself but never a single one: a cloud that is one cluster, a constant one included, is all
    noise. Cost N^2 d. Raises ValueError for sizes below 5, which mistake chance pairs for clusters. Source: math F; Campello et
    al. 2013, "Density-based clustering based on hierarchical density estimates".
    """
    if min_cluster_size < 5:
        raise ValueError(f"the smallest cluster must have at least 5 tokens, got {min_cluster_size}")
    rows, present = _rows(cloud)
    found = HDBSCAN(min_cluster_size=min_cluster_size, copy=True).fit(rows).labels_ if len(rows) >= min_cluster_size else None
    return _partition(np.full(len(rows), -1) if found is None else found, present)


class Silhouette(NamedTuple):
    mean: float  # in [-1, 1]; nan for fewer than two clusters
    error: float  # sd / sqrt(n)
    k: int  # clusters
    n: int
    n_dropped: int  # tokens without a label or not finite


@torch.no_grad()
def silhouette(cloud: Cloud, labels: Labels) -> Silhouette:
    """mean_i (b_i - a_i)/max(a_i, b_i), a_i the mean distance to the others of i's cluster and b_i to the nearest other cluster.

    In [-1, 1]: 1 tight and apart, about 0 for labels that ignore the cloud (null), negative for tokens in the wrong cluster. 0
    for a token alone in its cluster and where a_i = b_i. Cost N^2 d. Source: math F; Rousseeuw 1987, "Silhouettes: a graphical
    aid to the interpretation and validation of cluster analysis".
    """
    cloud, labels = wide(cloud).cpu(), labels.cpu()
    kept = _present(cloud) & (labels >= 0)
    return _silhouette(_distances(cloud[kept]), labels[kept], int((~kept).sum()))


class Scan(NamedTuple):
    best: Partition  # of the largest silhouette, the smaller k among equals; no labels where nothing could be scanned
    silhouette: float  # of the best; nan where nothing could be scanned
    tried: tuple[int, ...]
    silhouettes: tuple[float, ...]


@torch.no_grad()
def choose_k(cloud: Cloud, seed: int = 0, most: int = 20) -> Scan:
    """k-means for k in 2..min(most, N/5), the k of the largest silhouette.

    The chosen value is a maximum over the scan and so above that of a fixed k even without clusters: compare with the scan of a
    null cloud. Cost of the scan: N^2 d once, and 2 most fits. Source: math F.
    """
    rows, present = _rows(cloud)
    points = torch.from_numpy(rows)
    distances = _distances(points)
    tried = tuple(range(2, min(most, len(rows) // 5) + 1))
    fits = [kmeans(points, k, seed, starts=2) for k in tried]
    values = tuple(_silhouette(distances, fit.labels, 0).mean for fit in fits)
    defined = [i for i, value in enumerate(values) if value == value]
    if not defined:
        return Scan(_partition(np.full(len(rows), -1), present), float("nan"), tried, values)
    chosen = max(defined, key=values.__getitem__)
    return Scan(_partition(fits[chosen].labels.numpy(), present), values[chosen], tried, values)


SCORES = {"ari": adjusted_rand_score, "ami": adjusted_mutual_info_score, "v_measure": v_measure_score}


class Persistence(NamedTuple):
    ari: float  # <= 1, null 0
    ami: float  # <= 1, null 0
    v_measure: float  # in [0, 1]; not corrected for chance
    n: int
    n_dropped: int  # tokens without a label in either partition


def persistence(a: Labels, b: Labels, scores: Sequence[str] = tuple(SCORES)) -> Persistence:
    """How far two partitions of the same tokens agree, whatever their clusters are called.

    Adjusted Rand index and adjusted mutual information: 1 iff the partitions are equal, 0 on average for independent labels of
    the same sizes. V-measure, the harmonic mean of homogeneity and completeness, is above 0 by chance. nan without a common
    token, and where `scores` does not name it: each costs N and the product of the numbers of clusters. Source: math F; Hubert
    and Arabie 1985, "Comparing partitions"; Vinh et al. 2010.
    """
    kept = (a >= 0) & (b >= 0)
    n, n_dropped = int(kept.sum()), int((~kept).sum())
    pair = a[kept].cpu().numpy(), b[kept].cpu().numpy()
    found = (float(score(*pair)) if n and name in scores else float("nan") for name, score in SCORES.items())
    return Persistence(*found, n, n_dropped)


class Neighbours(NamedTuple):
    indices: Int64[Tensor, "*batch n k"]  # nearest first; -1 for a dropped row, and in a cloud with fewer than k others
    ties: Scalars  # share of tokens whose k-th and next neighbour are equally far, so that the choice is arbitrary


@torch.no_grad()
def neighbours(cloud: Clouds, k: int) -> Neighbours:
    """The k nearest other tokens of each token, exact in float64. Cost N^2 d; memory N^2. Raises ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"neighbours needs k >= 1, got {k}")
    n, batch = cloud.shape[-2], cloud.shape[:-2]
    cloud = centred(wide(cloud))
    present = _present(cloud)
    found = torch.full((*batch, n, k), -1, device=cloud.device)
    if k >= n:
        return Neighbours(found, torch.full(batch, torch.nan, dtype=torch.float64, device=cloud.device))
    cloud = cloud.nan_to_num(0.0)
    norms = cloud.square().sum(-1)
    squares = _squared_distances(cloud, norms)
    squares.masked_fill_(~present.unsqueeze(-2), torch.inf)
    squares.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    reach, nearest = squares.topk(min(k + 1, n - 1), largest=False)
    usable = present & (present.sum(-1, keepdim=True) > k)
    rounding = 16 * EPS * (norms + norms.gather(-1, nearest[..., k - 1]))
    tied = (reach[..., -1] - reach[..., k - 1] <= rounding) & (reach.shape[-1] > k)
    return Neighbours(nearest[..., :k].where(usable.unsqueeze(-1), -1), (tied & usable).sum(-1) / usable.sum(-1).double())


class Overlap(NamedTuple):
    share: Scalars  # in [0, 1]; nan without a token to count
    error: Scalars  # sd / sqrt(n) over the tokens
    null: Scalars
    n: Counts  # tokens counted
    n_dropped: Counts


def neighbour_overlap(a: Int64[Tensor, "*batch n k"], b: Int64[Tensor, "*batch n k"]) -> Overlap:
    """chi_k = mean_i |N_k^a(i) and N_k^b(i)| / k: how much of its neighbourhood a token keeps, from `neighbours` of two clouds.

    In [0, 1]: 1 for a cloud and itself, hence under isometries and scaling. Null (unrelated clouds): k/(n - 1). Cost N k^2.
    Source: math F; Doimo et al. 2020, "Hierarchical nucleation in deep neural networks".
    """
    counted = (a[..., 0] >= 0) & (b[..., 0] >= 0)
    common = (a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).sum(-1)
    n = counted.sum(-1)
    return _overlap(common.double() / a.shape[-1], counted, a.shape[-1] / (n - 1).double())


def label_overlap(indices: Int64[Tensor, "*batch n k"], labels: Int64[Tensor, "*batch n"]) -> Overlap:
    """The mean share of a labelled token's k nearest neighbours, from `neighbours`, that carry its label.

    In [0, 1]: 1 for classes apart. Null (labels that ignore the cloud): sum_c n_c (n_c - 1)/(n (N - 1)), n of N tokens labelled.
    Cost N k, and N^2 for the null. Source: math F; Valeriani et al. 2023, "The geometry of hidden representations of large
    transformer models".
    """
    present = indices[..., 0] >= 0
    counted = present & (labels >= 0)
    theirs = labels.gather(-1, indices.clamp(min=0).flatten(-2)).unflatten(-1, indices.shape[-2:])
    share = (theirs == labels.unsqueeze(-1)).double().mean(-1)
    known = labels.where(counted, -1)
    pairs = (known.unsqueeze(-1) == known.unsqueeze(-2)).sum(-1).where(counted, 1).sub(1).sum(-1)
    return _overlap(share, counted, pairs / (counted.sum(-1) * (present.sum(-1) - 1)).double())


class Separation(NamedTuple):
    within: float  # W/T = tr S_W / tr S_T in [0, 1]; 0 classes are points, 1 class means coincide
    error: float  # of `within`, by linearisation; too wide by about a third where the labels ignore the cloud
    null: float  # (n - K)/(n - 1)
    fisher: float  # (B/(K - 1)) / (W/(n - K)); null 1
    davies_bouldin: float  # >= 0, lower is better
    classes: int  # K
    n: int
    n_dropped: int  # tokens without a label, alone in their class, or not finite
    classes_dropped: int  # of fewer than two tokens


@torch.no_grad()
def separation(cloud: Cloud, labels: Labels) -> Separation:
    """How far the classes of given labels are apart: the scatter within them against the total, T = W + B.

    W/T -> its null (n - K)/(n - 1) and Fisher -> 1 for labels that ignore the cloud. Davies-Bouldin is the mean over classes of
    max over others of (s_a + s_b)/|m_a - m_b|, s the mean distance to the class mean m. The error of W/T = sum w_i / sum t_i is
    sqrt(sum (w_i - t_i W/T)^2) / T. nan for fewer than two classes or a constant cloud; Fisher also where every class is a point,
    Davies-Bouldin where two class means coincide. Cost N K d. Source: math F; Davies and Bouldin 1979, "A cluster separation
    measure".
    """
    cloud, labels = cloud.cpu(), labels.cpu()
    kept = _present(cloud) & (labels >= 0)
    names, sizes = labels[kept].unique(return_counts=True)
    kept = kept & torch.isin(labels, names[sizes > 1])
    n, n_dropped, k, small = int(kept.sum()), int((~kept).sum()), int((sizes > 1).sum()), int((sizes < 2).sum())
    nan = float("nan")
    undefined = Separation(nan, nan, nan, nan, nan, k, n, n_dropped, small)
    if k < 2:
        return undefined
    points = centred(cloud[kept])
    members = torch.nn.functional.one_hot(labels[kept].unique(return_inverse=True)[1]).double()
    means = members.mT @ points / members.sum(0).unsqueeze(-1)
    w, t = (points - members @ means).square().sum(-1), points.square().sum(-1)
    if not t.any():
        return undefined
    within = float(w.sum() / t.sum())
    between = float((members.sum(0) * means.square().sum(-1)).sum() / t.sum())
    spread = members.mT @ w.sqrt() / members.sum(0)
    gaps = _distances(means)
    ratio = ((spread.unsqueeze(-1) + spread) / gaps.where(gaps > 0, torch.nan)).fill_diagonal_(0.0)
    return Separation(
        within=within,
        error=float((w - within * t).norm() / t.sum()),
        null=(n - k) / (n - 1),
        fisher=(between / (k - 1)) / (within / (n - k)) if within > EPS**2 * n else nan,
        davies_bouldin=float(ratio.amax(-1).mean()),
        classes=k,
        n=n,
        n_dropped=n_dropped,
        classes_dropped=small,
    )


def _present(cloud: Tensor) -> Tensor:
    return cloud.abs().amax(-1).isfinite()


def _rows(cloud: Tensor) -> tuple[np.ndarray, Tensor]:
    """The rows that are finite, and which they are, on the CPU."""
    cloud = wide(cloud).cpu()
    present = _present(cloud)
    return cloud[present].numpy(), present


def _partition(found: np.ndarray, present: Tensor) -> Partition:
    labels = torch.full(present.shape, -1)
    labels[present] = torch.from_numpy(found).long()
    noise = float((found < 0).mean()) if len(found) else float("nan")
    return Partition(labels, len(np.unique(found[found >= 0])), noise, len(found), len(labels) - len(found))


def _pieces(directions: Tensor, thresholds: Sequence[float]) -> Tensor:
    """(B, thresholds): the components of each cloud, a dropped row one of its own."""
    clouds, tokens = directions.shape[:2]
    cosines = directions @ directions.mT
    b, i, j = (cosines >= min(thresholds)).triu_(1).nonzero(as_tuple=True)
    reached = cosines[b, i, j].cpu().numpy()
    rows, columns = ((b * tokens + k).cpu().numpy() for k in (i, j))
    counts = []
    for c in thresholds:  # one graph for all clouds, which are its blocks
        edges = rows[reached >= c], columns[reached >= c]
        graph = coo_array((np.ones(len(edges[0]), bool), edges), shape=(clouds * tokens,) * 2)
        first = np.unique(connected_components(graph, directed=False)[1], return_index=True)[1]
        counts.append(np.bincount(first // max(1, tokens), minlength=clouds))
    return torch.from_numpy(np.stack(counts, -1))


def _squared_distances(cloud: Tensor, norms: Tensor) -> Tensor:
    """(..., N, N): |x_i - x_j|^2 from the squared norms, to whose rounding it is exact, negative values included."""
    squares = cloud @ cloud.mT
    squares *= -2
    squares += norms.unsqueeze(-1)
    squares += norms.unsqueeze(-2)
    return squares


def _distances(points: Tensor) -> Tensor:
    """(N, N), 0 where it is rounding of the norms: equal rows must be at distance 0, not 1e-8."""
    points = points - points.mean(-2, keepdim=True)
    norms = points.square().sum(-1)
    squares = _squared_distances(points, norms)
    return squares.where(squares > 8 * EPS * (norms.unsqueeze(-1) + norms), 0.0).sqrt()


def _silhouette(distances: Tensor, labels: Tensor, n_dropped: int) -> Silhouette:
    n = len(labels)
    names, members = labels.unique(return_inverse=True)
    k = len(names)
    if k < 2:
        return Silhouette(float("nan"), float("nan"), k, n, n_dropped)
    own = torch.nn.functional.one_hot(members, k).double()
    sizes = own.sum(0)
    sums = distances @ own
    a = sums.gather(-1, members.unsqueeze(-1)).squeeze(-1) / (sizes[members] - 1)
    b = (sums / sizes).where(own == 0, torch.inf).amin(-1)
    values = ((b - a) / torch.maximum(a, b)).where(sizes[members] > 1, 0.0).nan_to_num(0.0)
    return Silhouette(float(values.mean()), float(values.std() / n**0.5), k, n, n_dropped)


def _overlap(share: Tensor, counted: Tensor, null: Tensor) -> Overlap:
    n = counted.sum(-1)
    mean = share.where(counted, 0.0).sum(-1) / n
    variance = (share - mean.unsqueeze(-1)).where(counted, 0.0).square().sum(-1) / (n - 1)
    return Overlap(mean, (variance / n).sqrt(), null.where(n > 1, torch.nan), n, (~counted).sum(-1))
