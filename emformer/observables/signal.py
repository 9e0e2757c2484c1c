"""Family "signal": how large the stream is, how alike its tokens are, and what that does to scores and contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import leaves, signals
from emformer.geometry.dimension import rank_residual
from emformer.geometry.energy import NEAR
from emformer.geometry.paths import direction
from emformer.geometry.spectra import wide
from emformer.norms import Norm
from emformer.observables.base import Moments, Observation, Row
from emformer.observables.energy import temperature
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Signal(parts.Observable):
    """What an initialisation is judged by: the states by their raw clouds, each attention step by its scores and context means.

    Scores and contexts have rows of each head and of their mean. The predicted variance of the context is that of untrained
    operators; how far training has gone from it is what the pair shows. Cost: H N (N + d) a prompt and layer; memory the
    trajectory's budget. Source: math I.
    """

    family: ClassVar[str] = "signal"
    keys: ClassVar[Mapping[str, str]] = {
        "signal.variance": "variance of a token's features; units of the stream squared; 1 after LayerNorm",
        "signal.norm": "median |x| of a prompt's tokens; units of the stream",
        "signal.correlation": "r, mean cosine of different tokens, each less its mean; [-1/(N - 1), 1]; null 0",
        "signal.rank_resid": "|X - 1 mean^T|/|X|; [0, 1]; 0 if all tokens are equal; null sqrt(1 - 1/N)",
        "signal.update_ratio": "|eps D|/|X| of a step, over the cloud; >= 0; param 'parallel': either share of a parallel block",
        "signal.score_std": "standard deviation of beta s over visible pairs; nats; sqrt(1 - r^2) at the usual initialisation",
        "signal.score_std_within": "the same within rows, which alone the softmax sees; nats; null signal.score_std/sqrt(1 + r)",
        "signal.context_variance": "Var(m), m the context means of tokens of variance 1, n >= 8 visible keys; null (softmax): "
        "r + (1 - r) e^(s_w^2)/n + (1 - r) s_w^2/d of the scores as they are, s_w within rows",
    }

    def begin(self) -> Observation:
        return _Signal()


class _Signal(Observation):
    def __init__(self) -> None:
        self._moments, self._terms = Moments(), Moments()
        self._dim = 0
        self._seen: dict[tuple[int | None, str | None], list[int]] = {}

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        add = self._moments.add
        self._dim = trajectory.clouds[0].shape[-1]
        for state in trajectory.states:
            at, (count, dim) = (state.layer, state.point), state.x.shape[1:]
            add(signals.stream_variance(state.x), *at, "signal.variance")
            add(signals.median_norm(state.x), *at, "signal.norm")
            pairs = count * (count - 1) * (dim - 1)
            spread = math.sqrt(2 / pairs) if pairs else None
            add(signals.token_correlation(state.x), *at, "signal.correlation", null=0.0, null_sd=spread)
            add(rank_residual(state.x), *at, "signal.rank_resid", null=math.sqrt(1 - 1 / count))
        for epsilon, step in zip(trajectory.epsilon, trajectory.steps, strict=True):
            size = _size(step.before)
            add(abs(epsilon) * _size(step.update) / size, step.layer, step.point, "signal.update_ratio")
            if step.ffn is not None:
                shares = ("attn", step.update - step.ffn), ("ffn", step.ffn)
                for point, share in shares:
                    add(abs(epsilon) * _size(share) / size, step.layer, point, "signal.update_ratio", param="parallel")
        for k in trajectory.attentions:
            self._attention(trajectory, k)

    def _attention(self, trajectory: Trajectory, k: int) -> None:
        step, block, count = trajectory.steps[k], trajectory.block(k), trajectory.counts(k)[0]
        kernel = block.attention.kernel
        at = step.layer, step.point
        read = _bare(block.read_attn, step.before, step.read)
        pairs, rows, contexts = [], [], []
        for chunk in trajectory.chunks(k):
            s = getattr(kernel, "beta", 1.0) * chunk.scores
            pairs.append(signals.pair_moments(s, chunk.visible))
            rows.append(leaves.row_variance(s, chunk.visible))
            contexts.append(signals.stream_variance(chunk.pattern @ read.unsqueeze(1)))
        std = signals.score_std_of(pairs, torch.cat(rows, -1))
        variance = torch.cat(contexts, -1).where(count >= NEAR, torch.nan)
        r = signals.token_correlation(read)
        # of scores of mean square sigma^2 all pairs share r^2 sigma^2, and a row shares r sigma^2
        within = std.total / (1 + r).sqrt().unsqueeze(1)
        self._moments.by_head(std.total, *at, "signal.score_std")
        self._moments.by_head(std.within, *at, "signal.score_std_within", null=within)
        self._moments.by_head(variance, *at, "signal.context_variance")
        self._terms.add(r, *at, "r")
        if temperature(kernel) is not None:
            self._terms.add(std.within.square(), *at, "rows", heads=True)
            self._seen[at] = count[count >= NEAR].tolist()

    def rows(self) -> list[Row]:
        terms = {(row.layer, row.point, row.key, row.head): row.mean for row in self._terms.rows()}
        found = []
        for row in self._moments.rows():
            at = row.layer, row.point
            if row.key == "signal.context_variance" and at in self._seen:
                heads = [head for *place, head in terms if place == [*at, "rows"]] if row.head is None else [row.head]
                nulls = [null for head in heads if (null := self._predicted(terms, at, head)) is not None]
                row = row._replace(null=math.fsum(nulls) / len(nulls) if nulls else None)
            found.append(row)
        return found

    def _predicted(self, terms: Mapping[Any, float | None], at: tuple[int | None, str | None], head: int | None) -> float | None:
        """Var(m) of the mean scores and correlation, over the queries that are looked at."""
        r, inside, seen = terms[*at, "r", None], terms[*at, "rows", head], self._seen[at]
        if r is None or inside is None or not seen or r >= 1:
            return None
        whole = inside / (1 - r)
        return math.fsum(signals.context_variance(r, inside, whole, n, self._dim) for n in seen) / len(seen)


def _bare(norm: object, x: Tensor, read: Tensor) -> Tensor:
    """What is read, as tokens of variance 1: the norm without gain and bias; the read cloud itself where there is no norm."""
    unit = direction(x, norm.centred) if isinstance(norm, Norm) else direction(read)
    return math.sqrt(x.shape[-1]) * unit.nan_to_num().to(x)


def _size(x: Tensor) -> Tensor:
    """|X| of each prompt; nan for 0."""
    size = wide(x).flatten(1).norm(dim=-1)
    return size.where(size > 0, torch.nan)
