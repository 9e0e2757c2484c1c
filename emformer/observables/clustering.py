"""Family "clustering": how tokens gather, within a prompt and in one cloud pooled from all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import clusters
from emformer.observables.base import Moments, Observation, Reservoir, Row, estimate
from emformer.parts import UserError
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Clustering(parts.Observable):
    """Cosines and components of every prompt; k-means, neighbours and labels of one pooled cloud.

    The pooled cloud holds the same tokens at every state: `points` drawn at random from all prompts, never a first token, whose
    context is empty. Distances are between directions x/|x| (math F). True classes separate tokens where the probe has them
    (param "label=class"), token ids where it has ids ("label=token"); the latter are all alike at X^0 without positions.

    Cost: N^2 d a state for each prompt, points^2 d and a k-means of the pooled cloud. Source: math F.

    Args:
        points: of the pooled cloud.
        k: clusters of k-means, and no finding: it always answers with k.
        neighbours: of which neighbourhoods are made.
        seed: of the points and of k-means.
    """

    points: int = 512
    k: int = 8
    neighbours: int = 10
    seed: int = 0

    family: ClassVar[str] = "clustering"
    keys: ClassVar[Mapping[str, str]] = {
        "clu.mean_cos": "mean cosine between tokens of a prompt; [-1/(N-1), 1]; null 0 (isotropic)",
        "clu.mean_cos_centred": "the same with the prompt's mean removed; [-1/(N-1), 1]; null -1/(N-1)",
        "clu.components": "pieces of a prompt's graph cos >= c; 1 .. N; null N",
        "clu.silhouette": "of the k-means clusters of the pooled cloud; [-1, 1]; about 0 without clusters",
        "clu.ari_next": "adjusted Rand index of the clusters with those of the state before; <= 1; null 0",
        "clu.ami_final": "adjusted mutual information of the clusters with those of the last state; <= 1; null 0",
        "clu.chi_k": "share of the k nearest neighbours kept since the state before; [0, 1]; null k/(N-1)",
        "clu.wt_ratio": "variance within classes / total, mean removed; [0, 1]; 0 classes are points; null (N-K)/(N-1)",
        "clu.chi_label": "share of the k nearest neighbours with the token's own label; [0, 1]; null of labels by chance",
    }

    def __post_init__(self) -> None:
        if min(self.points, self.k, self.neighbours) < 1 or self.seed < 0:
            raise UserError(f"{self} cannot be measured: points, k and neighbours are at least 1 and the seed at least 0.")

    def begin(self) -> Observation:
        return _Clustering(self)


class Pool:
    """The same tokens of every state, drawn from the prompts as they come."""

    def __init__(self, points: int, seed: int):
        self._reservoir = Reservoir(points, seed)
        self._places: list[tuple[int, str]] = []

    def update(self, trajectory: Trajectory) -> None:
        """Offer all tokens but the first of each prompt."""
        states = trajectory.states
        self._places = [(state.layer, state.point) for state in states]
        first = 1 if states[0].x.shape[1] > 1 else 0
        rows = {f"x{k}": state.x[:, first:].flatten(0, 1) for k, state in enumerate(states)}
        for name, ids in (("token", trajectory.tokens), ("class", trajectory.labels)):
            if ids is not None:
                rows[name] = ids[:, first:].flatten()
        self._reservoir.offer(**rows)

    def __len__(self) -> int:
        return len(self._reservoir)

    def directions(self) -> Iterator[tuple[int, str, Tensor]]:
        """(layer, point, x/|x|) of each state, on the CPU."""
        for place, x in zip(self._places, self._reservoir.numbered("x"), strict=True):
            yield *place, clusters.unit(x).cloud

    def labels(self) -> Iterator[tuple[str, Tensor]]:
        """The labels there are, by name: "class", "token"."""
        for name in ("class", "token"):
            if name in self._reservoir:
                yield name, self._reservoir[name].cpu()


class _Clustering(Observation):
    def __init__(self, setting: Clustering):
        self._setting, self._moments, self._pool = setting, Moments(), Pool(setting.points, setting.seed)

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        self._pool.update(trajectory)
        add = self._moments.add
        for layer, point, x, _ in trajectory.states:
            tokens = x.shape[1]
            own = clusters.centred(x)
            lowest = -1 / (tokens - 1) if tokens > 1 else None
            add(clusters.mean_cosine(x).mean, layer, point, "clu.mean_cos", null=0.0)
            add(clusters.mean_cosine(own).mean, layer, point, "clu.mean_cos_centred", cloud="centred", null=lowest)
            pieces = clusters.components(x, THRESHOLDS)
            count = pieces.count.double().where(pieces.n.unsqueeze(-1) > 0, torch.nan)
            for c, column in zip(THRESHOLDS, count.unbind(-1), strict=True):
                add(column, layer, point, "clu.components", param=f"c={c}", null=float(tokens))

    def rows(self) -> list[Row]:
        return self._moments.rows() + self._pooled()

    def _pooled(self) -> list[Row]:
        if not len(self._pool):
            return []
        setting, labels = self._setting, list(self._pool.labels())
        clouds = list(self._pool.directions())
        fits = [clusters.kmeans(cloud, setting.k, setting.seed, starts=1).labels for *_, cloud in clouds]
        near = [clusters.neighbours(cloud, setting.neighbours).indices for *_, cloud in clouds]
        found: list[Row] = []
        for k, (layer, point, cloud) in enumerate(clouds):
            at = layer, point
            shape = clusters.silhouette(cloud, fits[k])
            found.append(estimate(at, "clu.silhouette", shape.mean, *shape[3:], error=shape.error, null=0.0))
            if k:
                same = clusters.persistence(fits[k - 1], fits[k], ["ari"])
                found.append(estimate(at, "clu.ari_next", same.ari, *same[3:], null=0.0))
                kept = clusters.neighbour_overlap(near[k - 1], near[k])
                found.append(_overlap(at, "clu.chi_k", kept, f"k={setting.neighbours}"))
            last = clusters.persistence(fits[k], fits[-1], ["ami"])
            found.append(estimate(at, "clu.ami_final", last.ami, *last[3:], null=0.0))
            for name, ids in labels:
                apart = clusters.separation(cloud, ids)
                n, label = (apart.n, apart.n_dropped), f"label={name}"
                row = estimate(at, "clu.wt_ratio", apart.within, *n, error=apart.error, null=apart.null, param=label)
                found.append(row)
                own = clusters.label_overlap(near[k], ids)
                found.append(_overlap(at, "clu.chi_label", own, label))
        return found


THRESHOLDS = (0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Density(parts.Observable):
    """HDBSCAN of the pooled cloud: clusters as regions of density, their number found and not asked for.

    Cost: points^2 d a state, ten times that of k-means. Source: math F.

    Args:
        points: of the pooled cloud.
        smallest: tokens of a cluster, at least 5.
        seed: of the points.
    """

    points: int = 512
    smallest: int = 5
    seed: int = 0

    family: ClassVar[str] = "clustering"
    keys: ClassVar[Mapping[str, str]] = {
        "clu.density_count": "clusters that HDBSCAN finds; >= 0",
        "clu.density_noise": "share of tokens that belong to none; [0, 1]",
        "clu.density_silhouette": "silhouette of these clusters, noise left out; [-1, 1]",
    }

    def __post_init__(self) -> None:
        if self.points < 1 or self.smallest < 5:
            raise UserError(f"{self} cannot be measured: points is at least 1 and smallest at least 5.")

    def begin(self) -> Observation:
        return _Pooled(self.points, self.seed, self._told)

    def _told(self, at: tuple[int, str], cloud: Tensor) -> list[Row]:
        fit = clusters.hdbscan(cloud, self.smallest)
        shape = clusters.silhouette(cloud, fit.labels)
        return [
            estimate(at, "clu.density_count", float(fit.k), *fit[3:]),
            estimate(at, "clu.density_noise", fit.noise, *fit[3:]),
            estimate(at, "clu.density_silhouette", shape.mean, *shape[3:], error=shape.error),
        ]


class _Pooled(Observation):
    """What is told of the pooled cloud of each state by itself."""

    def __init__(self, points: int, seed: int, told: Callable[[tuple[int, str], Tensor], list[Row]]):
        self._pool, self._told = Pool(points, seed), told

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        self._pool.update(trajectory)

    def rows(self) -> list[Row]:
        return [row for layer, point, cloud in self._pool.directions() for row in self._told((layer, point), cloud)]


@dataclass(frozen=True)
class Scan(parts.Observable):
    """k-means of the pooled cloud for every k from 2 to `most`: the k of the best silhouette.

    A maximum over many k is above the silhouette of one even where there are no clusters. Cost: `most` k-means a state. Source:
    math F.

    Args:
        points: of the pooled cloud.
        most: largest k.
        seed: of the points and of k-means.
    """

    points: int = 512
    most: int = 20
    seed: int = 0

    family: ClassVar[str] = "clustering"
    keys: ClassVar[Mapping[str, str]] = {
        "clu.best_k": "the k of the largest silhouette; 2 .. most",
        "clu.best_silhouette": "that silhouette; [-1, 1]",
    }

    def __post_init__(self) -> None:
        if self.points < 1 or self.most < 2:
            raise UserError(f"{self} cannot be measured: points is at least 1 and most at least 2.")

    def begin(self) -> Observation:
        return _Pooled(self.points, self.seed, self._told)

    def _told(self, at: tuple[int, str], cloud: Tensor) -> list[Row]:
        scan = clusters.choose_k(cloud, self.seed, self.most)
        k = math.nan if math.isnan(scan.silhouette) else float(scan.best.k)
        return [
            estimate(at, "clu.best_k", k, *scan.best[3:]),
            estimate(at, "clu.best_silhouette", scan.silhouette, *scan.best[3:]),
        ]


def _overlap(at: tuple[int, str], key: str, found: clusters.Overlap, param: str) -> Row:
    n = int(found.n), int(found.n_dropped)
    return estimate(at, key, float(found.share), *n, error=float(found.error), null=float(found.null), param=param)
