"""Long times: steps that grow where nothing moves and shrink where something does, each held against its own two halves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from emformer.model import Emformer
from emformer.theory.particles import STEP, Real, Tell, schedule, simulate, times_of
from emformer.trajectory import Trajectory
from emformer.types import Cloud

LONGEST = 2.0  # a collapsed cluster returns at rate 1 under softmax, and RK4 is stable up to 2.78 of its time
SHORTEST = 1e-6
ROUNDINGS = 16  # of a coordinate, that the two ways to halve a step may differ by


class March(NamedTuple):
    """`miss`: the sum over intervals of the largest difference that halving the step made, in a coordinate; of RK4 about 15 times
    the error that an interval adds, before the flow itself lets it grow or fade."""

    trajectory: Trajectory
    miss: float


def march(
    model: Emformer,
    x: Cloud,
    times: Sequence[Real],
    *,
    tolerance: float = 1e-8,
    step: Real = STEP,
    longest: Real = LONGEST,
    tell: Tell | None = None,
) -> March:
    """`simulate` with RK4 whose step each interval between `times` chooses: half of one that differs from its half by less.

    An interval is done with steps h and h/2 and kept, the finer, if no coordinate differs by more than `tolerance`; else h is
    halved. It is doubled for the next one where the difference is less than 1/64 of that. All prompts go at one pace. Times
    should be so dense that an interval is either calm or not: ever farther apart, for what slows down.

    Args:
        tolerance: of a coordinate of the cloud as it is (sqrt(d) times the direction), an interval; above its rounding, which is
            taken as 16 times that of the largest coordinate: of one of 2, 7e-15, and 4e-6 in float32.
        step: the first h. longest: bounds h; an unstable step betrays itself by its half.
        tell: is given the share of intervals that are done.

    Raises:
        ValueError: as `simulate`, and for a tolerance that is not positive. ArithmeticError: where the tolerance cannot be met:
            it is below rounding, or halving the step no longer helps, or steps of 1e-6 do not do, as where the flow itself ends.

    Cost: 1.5 times that of `simulate` at h/2, where h need not shrink.
    """
    if not tolerance > 0:
        raise ValueError(f"the tolerance is a length above 0, not {tolerance:g}")
    schedule(times, step)  # refuses times that do not ascend
    steps, missed, closing = [], 0.0, None
    for k, (a, b) in enumerate(pairwise(times)):
        rounding = ROUNDINGS * torch.finfo(x.dtype).eps * float(x.abs().max())
        if tolerance < rounding:
            raise ArithmeticError(f"at time {a:g} the cloud is rounded by {rounding:.1g}; allow more than {tolerance:g}")
        step = min(step, b - a)  # else half a step is the same whole interval, and agrees with it
        coarse, miss = _try(model, x, b - a, step), math.inf
        while True:
            fine, last, miss = _try(model, x, b - a, step / 2), miss, math.inf
            if coarse is not None and fine is not None:
                miss = float((fine.clouds[-1] - coarse.clouds[-1]).abs().max())
                if miss <= tolerance:
                    break
            step, coarse = step / 2, fine
            if step < SHORTEST or last <= miss <= 64 * rounding:  # shorter steps would only round more often
                raise ArithmeticError(f"steps of {step:g} still err by {miss:g} at time {a:g}; allow more than {tolerance:g}")
        missed += miss
        if miss <= tolerance / 64:
            step = min(2 * step, longest)
        x, closing = fine.clouds[-1], fine.states[-1].read
        steps.append(fine.steps[0]._replace(layer=k))
        if tell is not None:
            tell((k + 1) / (len(times) - 1))
    found = Trajectory(steps, model=model, closing=closing, epsilon=[b - a for a, b in pairwise(times)])
    return March(found, missed)


def crossing(trajectory: Trajectory, value: Callable[[Tensor], float], level: float, step: float = 0.2) -> float:
    """The first time at which `value` of a trajectory of one prompt reaches `level` from below, to a thousandth of the step; nan
    if it does at none of its times.

    Within the interval in which it happens, the flow is followed again from its beginning, then within that interval of a step.

    Raises:
        ValueError: for more prompts than one.
    """
    if trajectory.prompts != 1 or trajectory.model is None:
        raise ValueError("a crossing is looked for in one prompt, of a trajectory with a model")
    times, clouds, found = times_of(trajectory), trajectory.clouds, math.nan
    while True:
        above = [k for k, cloud in enumerate(clouds) if value(cloud[0]) >= level]
        if not above:  # what is followed again may end a hair below the state that was recorded at the level
            return found
        k = above[0]
        found = times[k]
        if k == 0:
            return found
        start, width = times[k - 1], times[k] - times[k - 1]
        if width <= step / 1000:
            return found
        inner = simulate(trajectory.model, clouds[k - 1], [width * j / 8 for j in range(9)], step=step)
        times, clouds = [start + time for time in times_of(inner)], inner.clouds


def _try(model: Emformer, x: Tensor, time: float, step: float) -> Trajectory | None:
    """None: the step is so long that the cloud overflows."""
    try:
        return simulate(model, x, [0.0, time], step=step)
    except ArithmeticError:
        return None
