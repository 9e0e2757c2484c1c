"""Tokens in R^d as someone sees them who grows as they do: z = e^{-tV} x, V the content; what is left is how they meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from emformer.block import Block, Step
from emformer.masks import visible
from emformer.model import Emformer
from emformer.theory.particles import STEP, Method, Real, Tell, integrate
from emformer.trajectory import Trajectory
from emformer.types import Cloud, Weights

GROWTH = 40.0  # natural logarithm of the largest scale e^{tV} is given: scores e^80 apart are as good as infinitely far apart


@torch.no_grad()
def rescaled(
    model: Emformer,
    z: Cloud,
    times: Sequence[Real],
    *,
    step: Real = STEP,
    method: Method = "rk4",
    tell: Tell | None = None,
) -> Trajectory:
    """The clouds z = e^{-tV} x (B, N, d) at `times`, where x' = V sum_j a_ij x_j is the flow of a model in R^d with one head.

    dz_i/dt = V (sum_j a_ij z_j - z_i), a the model's own kernel, mask and form at x = e^{tV} z. This is exact for every V and M,
    for V commutes with its own exponential and with nothing else needs to; rows of weights that sum to one make it
    V sum_j a_ij (z_j - z_i). x itself grows like e^{lambda t}; z stays where it can be seen. For V = I every step below 1 takes
    convex combinations of tokens: their hull cannot grow, but by rounding.

    Read clouds of the trajectory are x, so that `Trajectory.pattern` tells the weights at each time (`patterns` those at the last
    one too); `update` is the mean velocity of z, and no head takes part in it by itself. State k is at times[k]. Its model is
    `model`.

    e^{tV} is that of an earlier time once it would exceed e^40. From there on scores differ by far more than softmax can tell
    from an infinite difference, unless tokens agree to the last digits.

    Args:
        model: of `idealised(space="flat")`: one head, nothing but attention. z: x at time 0.
        times, step, method, tell: as of `simulate`.

    Raises:
        ValueError: for another model, and as `simulate`. ArithmeticError: for a cloud that stops being finite, as it does where V
            has eigenvalues below 0 (-V then pushes apart what V would draw together).

    Cost: a step is 4 (1) calls of attention. Source: math E.2; arXiv 2305.05465.
    """
    block, i = _flat(model), torch.arange(z.shape[1], device=z.device)
    attention = block.attention
    content = attention.matrices()[1][0]
    grow = _Growth(content)

    def velocity(z: Tensor, time: float) -> tuple[Tensor, float]:
        u, v = attention.factors(z @ grow(time), i)
        mean = attention.kernel(u, v, z.unsqueeze(1), visible(attention.mask, i, len(i))).squeeze(1)
        return (mean - z) @ content.mT, 0.0

    steps, before = [], z
    for k, (after, _) in enumerate(integrate(z, times, step, velocity, method, tell=tell)):
        gap = times[k + 1] - times[k]
        steps.append(Step(k, "attn", before, before @ grow(times[k]), None, (after - before) / gap, after))
        before = after
    return Trajectory(steps, model=model, closing=before @ grow(times[-1]), epsilon=[b - a for a, b in pairwise(times)])


@torch.no_grad()
def patterns(trajectory: Trajectory) -> list[Weights]:
    """The weights (B, H, N, N) of every state, the last one included."""
    last = trajectory.states[-1].read
    assert last is not None
    attention, i = trajectory.block(-1).attention, torch.arange(last.shape[1], device=last.device)
    return [*(trajectory.pattern(k) for k in range(len(trajectory.steps))), attention.weights(last, i)]


class _Growth:
    """Time -> (e^{tV})^T, which takes rows z to rows x."""

    def __init__(self, content: Tensor):
        self.content = content.mT
        fastest = float(torch.linalg.eigvals(content).real.max())
        self.longest = GROWTH / fastest if fastest > 0 else torch.inf
        self._time, self._kept = 0.0, torch.eye(len(content), dtype=content.dtype, device=content.device)

    def __call__(self, time: Real) -> Tensor:
        time = min(time, self.longest)
        if time != self._time:  # two stages of RK4 share a time, as do a step's last and the next one's first
            self._time, self._kept = time, torch.linalg.matrix_exp(time * self.content)
        return self._kept


def _flat(model: Emformer) -> Block:
    block = model.layer(0)
    attention = block.attention
    around = block.read_attn, block.shape_attn, block.place_attn, block.ffn, attention.drift
    if len(model.blocks) > 1 or attention.form.heads > 1 or not attention.whole or any(one is not None for one in around):
        raise ValueError("rescaled tokens are those of one head in R^d, without norm, FFN or biases: idealised(space='flat')")
    return block
