"""Family "gaussian": does attention do to real clouds what it does to Gaussian ones, from mean and covariance alone?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from emformer import parts
from emformer.attention import Attention
from emformer.geometry.closure import covariance_change, explained, tilted
from emformer.geometry.sinks import uniform
from emformer.geometry.spectra import wide
from emformer.observables.base import Moments, Observation, Row
from emformer.observables.energy import temperature
from emformer.parts import UserError
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Gaussian(parts.Observable):
    """The Gaussian prediction of every attention step, sum_h F_h (alpha_i + beta Sigma_i r_i), against what the step does.

    alpha_i and Sigma_i are mean and covariance of what query i sees, r_i its relevance gradient; positions, biases and masks are
    taken in (`emformer.geometry.closure`). Told of the update of each head, and of all heads together (head None), as it enters
    the stream; and of the covariance that the cloud has after it, before anything is placed. Beside each stands the prediction
    "mean", F alpha_i alone, which is uniform attention: whether the covariance adds to it is the question, and where scores are
    wide (`gauss.regime` above 1) the closure may do worse than nothing. Of parallel blocks it is the attention's share. Of a
    simulated trajectory the update is the mean over the time between two states, the prediction that of its beginning.

    Kernels other than softmax have rows where they know their Gaussian limit (`Kernel.mean_field`), from the moments of the whole
    cloud: under a full mask, without positions and biases of the scores.

    Cost: H N^2 scores twice, two mixtures H N^2 r, and N d min(N, d). Memory: H N d of a few prompts, and of the H N^2 numbers
    the trajectory's budget. Source: math E.6; Castin et al. 2025 (2501.18322).

    Args:
        skip: tokens at the beginning of each prompt that are not compared: under a causal mask the first sees only itself, which
            is no cloud, and one that is a sink has most of the variance. They stay among what the others see.
    """

    skip: int = 1

    family: ClassVar[str] = "gaussian"
    keys: ClassVar[Mapping[str, str]] = {
        "gauss.r2": "1 - sum |D - Dhat|^2/sum |D - mean D|^2 of the update D and its Gaussian prediction; at most 1; null 0, and "
        "below it worse than a constant; param 'mean': of uniform attention",
        "gauss.cov_error": "|C(Dhat) - C(D)|/|C(D) - C|, C the covariance before, C(D) after the update; >= 0; null 1 (nothing "
        "changes); param 'mean': of uniform attention",
        "gauss.regime": "beta^2 Var_j s_ij = beta^2 r^T Sigma r, mean over queries; >= 0; the closure asks for at most 1, and "
        "e^-regime of its tokens is what a query then looks at; null 0 (uniform)",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise UserError(f"Gaussian: skip is {self.skip}; choose at least 0.")

    def begin(self) -> Observation:
        return _Gaussian(self.skip)


class Closure(NamedTuple):
    """What the closure says of an attention step: mixtures (B, H, T, r) of the prediction and of uniform attention, as
    `Step.mixture` is; the regime (B, H, T), or None where the kernel is no softmax of the score."""

    mixture: Tensor
    uniform: Tensor
    regime: Tensor | None


@torch.no_grad()
def closure(trajectory: Trajectory, k: int) -> Closure | None:
    """The Gaussian prediction of attention step k; None where its kernel has none."""
    attention, y = trajectory.block(k).attention, trajectory.steps[k].read
    beta = temperature(attention.kernel)
    if beta is None:
        return _mean_field(attention, y)
    mixtures, evens, regimes = [], [], []
    for chunk in trajectory.chunks(k):
        told = tilted(chunk.scores, chunk.visible, beta)
        even = uniform(chunk.visible).to(y).expand_as(told.weights)
        mixtures.append(attention.mix(told.weights.to(y), y))
        evens.append(attention.mix(even, y))
        regimes.append(told.regime)
    return Closure(torch.cat(mixtures, 2), torch.cat(evens, 2), torch.cat(regimes, 2))


def _mean_field(attention: Attention, y: Tensor) -> Closure | None:
    """From the moments of the whole cloud, prompt by prompt: a gain is H d^2 numbers."""
    form, content = attention.form, attention.content
    whole = attention.mask.shape == "full" and attention.whole
    if not whole or len(attention.positions) or attention.biases is not None:
        return None
    right = form.right_rows()
    if right is None:
        right = torch.eye(form.dim, dtype=y.dtype, device=y.device).unsqueeze(0)
    rows = wide(form.left_rows()), wide(right).repeat_interleave(form.heads // form.groups, 0)
    mixtures, evens = [], []
    for one in wide(y):
        mean = one.mean(0)
        offset = one - mean
        told = attention.kernel.mean_field(*rows, mean, offset.mT @ offset / len(one))
        if told is None:
            return None
        seen = told.offset.unsqueeze(-2) + one @ told.gain.mT
        even = mean.expand_as(seen)
        mixtures.append(content.project(seen.unsqueeze(0).to(y)))
        evens.append(content.project(even.unsqueeze(0).to(y)))
    return Closure(torch.cat(mixtures), torch.cat(evens), None)


class _Gaussian(Observation):
    def __init__(self, skip: int):
        self._skip, self._moments = skip, Moments()

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        for k in trajectory.attentions:
            told = closure(trajectory, k)
            if told is None:
                continue
            at = trajectory.steps[k].layer, trajectory.steps[k].point
            if told.regime is not None:
                self._moments.by_head(told.regime[..., self._skip :], *at, "gauss.regime", null=0.0)
            for mixture, param in ((told.mixture, None), (told.uniform, "mean")):
                self._compare(trajectory, k, mixture, param)

    def _compare(self, trajectory: Trajectory, k: int, mixture: Tensor, param: str | None) -> None:
        step, block, some = trajectory.steps[k], trajectory.block(k), slice(self._skip, None)
        heads, _ = trajectory.heads(k)
        predicted, rest = block.pieces(step._replace(mixture=mixture))
        update = step.update if step.ffn is None else step.update - step.ffn
        expected = predicted.sum(1) + rest
        each = explained(heads[:, :, some], predicted[:, :, some])
        whole = explained(update[:, some], expected[:, some])
        self._moments.by_head(each, step.layer, step.point, "gauss.r2", mean=whole, param=param, null=0.0)

        # covariances of the raw stream after the attention's share alone
        x, epsilon = wide(step.before[:, some]), trajectory.epsilon[k]
        moved = epsilon * wide(update[:, some])
        missed = epsilon * wide(expected[:, some]) - moved
        change = covariance_change(x, moved)
        size = (x - x.mean(1, keepdim=True)).square().sum((-2, -1)) / max(1, x.shape[1])
        known = change > 16 * torch.finfo(step.before.dtype).eps * size
        error = covariance_change(x + moved, missed) / change.where(known, torch.nan)
        self._moments.add(error, step.layer, step.point, "gauss.cov_error", param=param, null=1.0)

    def rows(self) -> list[Row]:
        return self._moments.rows()
