"""Tokens as particles: the flow of a transformer of infinite depth, by the model's own operators and kernels.

An idealised model is an `Emformer` whose one block acts for ever, and whose depth is time: dx/dt = shape(x, D(read(x))), the
limit eps -> 0 of the block's step x <- place(x + eps shape(x, D)). `idealised` builds it from the objects of the theory,
`autonomous` takes a layer of any other model, and `simulate` gives the `Trajectory` that a trained model's prompts have too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.block import Block, Step
from emformer.kernels import Softmax
from emformer.masks import Full
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.operators import Dense, Identity
from emformer.placements import PostNorm, PreNorm, Retraction, Sphere
from emformer.positions import PositionMap
from emformer.trajectory import Trajectory
from emformer.types import Cloud, Index, KeyIndex, Keys, Queries

Space = Literal["sphere", "flat", "preln", "postln"]
Method = Literal["rk4", "euler"]
Tell = Callable[[float], Any]
Real = int | float
Matrix = Real | Tensor

STEP = 0.05  # of time; on the sphere with softmax RK4 errs by less than 2e-7 (beta 1 to 50, up to time 10)
# weights of the stages of one step, and where in it each is taken
TABLEAUS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "euler": ((0.0,), (1.0,)),
    "rk4": ((0.0, 0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def idealised(
    dim: int,
    form: Matrix | parts.Operator = 1.0,
    content: Matrix | parts.Operator = 1.0,
    kernel: parts.Kernel | None = None,
    mask: parts.Mask | None = None,
    heads: int = 1,
    space: Space = "sphere",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Emformer:
    """A model of one block without FFN, biases, positions or vocabulary, in the units of the theory.

    With unit vectors theta and A_i(theta) = sum_h F_h sum_j a_ij^h theta_j, a = kernel(theta^T M_h theta):

    * "sphere": theta' = P_theta A(theta), the continuous Post-LN (SA with softmax, USA with `Unnormalised(clip=None)`);
    * "preln": x' = A(x/|x|), so that with x = r theta, theta' = P A/r and r' = <theta, A>;
    * "flat": x' = A(x) in R^d, without a norm;
    * "postln": theta <- (theta + step A)/|theta + step A|, a map and no flow: the Post-LN block itself, for Euler steps of any
      size. Small ones are those of "sphere", whose long steps, along the tangent, are others.

    Clouds on the sphere have radius sqrt(d), as everywhere in emformer: x = sqrt(d) theta. The scale is inside the operators,
    which are M/d on the sphere and M/d, F/sqrt(d) for "preln", so that scores, times and directions are those of the theory.

    Args:
        dim: d.
        form, content: M and F: a number c for c I in every head; matrices (d, d) or (H, d, d), score = q^T M t; or a setting,
            which builds them in the model's own units.
        kernel: default Softmax(); its `beta` is that of the theory.
        mask: default Full().
        heads: H; of matrices (H, d, d) it is H.
        seed: of what a setting draws; the global generator is left as it was.

    Raises:
        UserError: for parts that do not go together. ValueError: for a matrix of another shape, and another space.
    """
    if space not in get_args(Space):
        raise ValueError(f"'{space}' is no space; choose one of {', '.join(get_args(Space))}")
    read = 1 / math.sqrt(dim) if space == "preln" else 1.0
    given = {
        "form": (form, 1.0 if space == "flat" else 1 / dim),
        "content": (content, read),
    }
    for matrix, _ in given.values():
        if isinstance(matrix, Tensor):
            if matrix.shape[-2:] != (dim, dim) or matrix.ndim not in (2, 3):
                raise ValueError(f"operators are matrices ({dim}, {dim}) or (H, {dim}, {dim}), not {tuple(matrix.shape)}")
            heads = len(matrix) if matrix.ndim == 3 else heads
    settings: dict[str, Any] = {
        name: matrix if isinstance(matrix, parts.Operator) else _part(matrix, scale) for name, (matrix, scale) in given.items()
    }
    placement = {"sphere": Sphere(), "postln": PostNorm()}.get(space, PreNorm())
    with torch.random.fork_rng(devices=[]):  # parts draw from the global generator, which nobody shall notice
        torch.manual_seed(seed)
        model = Emformer(
            1,
            dim=dim,
            depth=1,
            heads=heads,
            context=1,
            shared=True,
            **settings,
            kernel=kernel or Softmax(),
            mask=mask or Full(),
            placement=placement,
            norm=RMSNorm(gain=False, eps=0.0) if space in ("preln", "postln") else None,
        )
    if space == "postln":
        model.enter = Retraction()  # clouds enter by their directions, as on the sphere
    model = model.to(dtype).requires_grad_(False).eval()
    attention = model.layer(0).attention
    for name, (matrix, scale) in given.items():
        operator: Any = attention.get_submodule(name)
        if isinstance(matrix, Tensor):
            operator.assign(scale * matrix.expand(heads, dim, dim).mT.to(dtype))
        elif not isinstance(matrix, parts.Operator):
            operator.scale.fill_(scale * matrix)  # modules are made in float32: 1/d would keep its error of 1e-8
    return model


def autonomous(model: Emformer, layer: int, *, ffn: bool = True) -> Emformer:
    """One layer of a model as a model of its own that acts for ever; a copy, in eval mode, without gradients.

    Args:
        ffn: whether its FFN stays. One that comes after attention has to go for `simulate`: what is left is attention alone.

    Raises:
        ValueError: for a parallel block that is to lose its FFN.
    """
    found = copy.deepcopy(model).requires_grad_(False).eval()
    found.blocks = nn.ModuleList([found.layer(layer)])
    found.settings = replace(found.settings.layer(layer), shared=True, depth=1)
    found.enter = found.settings.placement.enter(found.settings.dim)
    if not ffn:
        if found.settings.arrangement is not None:
            raise ValueError("a parallel block acts as one; its FFN cannot be left out of it")
        found.layer(0).ffn = None
        found.settings = replace(found.settings, ffn=None)
    return found


@torch.no_grad()
def simulate(
    model: Emformer,
    x: Cloud,
    times: Sequence[Real],
    *,
    step: Real = STEP,
    method: Method = "rk4",
    tell: Tell | None = None,
) -> Trajectory:
    """The trajectory of the clouds x (B, N, d), prompts of their own, at `times` under the flow of the model's block.

    Between two times are as many equal steps of the method as keep each at most `step` long; after each the cloud is put back on
    its space (the sphere), which changes it by an error of the method's order. All stages recompute the weights.

    State k of the trajectory is at times[k], its layer k, and `epsilon` the time between. `update` is the mean velocity, so that
    before + epsilon update = after; `mixture` the mean over all stages, whose heads sum to the update exactly in R^d, on the
    sphere (where each instant has a tangent space of its own) to first order in epsilon. Its model is `model`.

    Args:
        x: of the model's type and device; put on the sphere where the model lives there, so directions are enough.
        times: ascending from 0, in the units of the theory. USA is stiff: give it e^{-beta} times those of SA, and such a step.
        step: longest step of the method, > 0.
        method: "rk4", classical, error of order step^4; "euler", the steps of a transformer (on the sphere with a retraction).
        tell: is given the share that is done, in [0, 1], after every step.

    Raises:
        ValueError: for times that do not ascend from 0, a step that is not positive, a model of several blocks or whose FFN comes
            after attention, "rk4" where a norm follows the sum, a cloud of another dimension or type than the model, and a token
            without a direction where it needs one: a vector 0 on the sphere or under a norm. ArithmeticError: for a cloud that
            stops being finite, with the time.

    Cost: a step is 4 (1) calls of the block, each that of a forward pass of one layer; memory that of one call, linear in N for
    fused kernels (softmax, L2), and 4 clouds a time that is kept. Source: math E.1, E.2.
    """
    block = _block(model, method)
    start = _start(model, x)
    clouds = list(integrate(start, times, step, _velocity(block, start, 1.0), method, block.place_attn, tell))
    return _trajectory(model, start, times, clouds)


@torch.no_grad()
def sweep(
    model: Emformer,
    x: Cloud,
    betas: Sequence[Real],
    times: Sequence[Real],
    *,
    paces: Sequence[Real] | None = None,
    step: Real = STEP,
    method: Method = "rk4",
    tell: Tell | None = None,
) -> dict[Real, Trajectory]:
    """`simulate` of the same clouds at several inverse temperatures, all in one tensor of (betas x B, N, d).

    Args:
        betas: each in place of the beta of the model's kernel. paces: of each, the factor on its velocity (USA: e^{-beta}), and
            so on its times: epsilon and time are those of the theory, pace x times. Default 1.

    Raises:
        ValueError: as `simulate`; and for a kernel without beta, or with parameters of its own.
    """
    kernel: Any = model.layer(0).attention.kernel
    if not hasattr(kernel, "beta"):
        raise ValueError(f"a sweep over beta needs a kernel that has one; {type(kernel).__name__} has none")
    if next(kernel.parameters(), None) is not None:
        raise ValueError(f"a sweep scales scores, and not what {type(kernel).__name__} has learned: simulate one beta at a time")
    paces = [1.0] * len(betas) if paces is None else list(paces)
    models = [_at(model, beta) for beta in betas]
    together = copy.deepcopy(model)
    block = _block(together, method)
    prompts = len(x)
    relative = x.new_tensor([beta / kernel.beta for beta in betas]).repeat_interleave(prompts)
    block.attention.positions.append(_Temperatures(relative))
    start = _start(model, x)
    whole = start.repeat(len(betas), 1, 1)
    pace = x.new_tensor(paces).repeat_interleave(prompts).view(-1, 1, 1)
    clouds = list(integrate(whole, times, step, _velocity(block, whole, pace), method, block.place_attn, tell))
    found = {}
    for k, (beta, one, own) in enumerate(zip(betas, models, paces, strict=True)):
        mine = slice(k * prompts, (k + 1) * prompts)
        kept = [Moved(after[mine], mixture[mine] / own) for after, mixture in clouds]
        found[beta] = _trajectory(one, start, [own * time for time in times], kept)
    return found


def times_of(trajectory: Trajectory) -> list[float]:
    """The times of the states, from 0: the sums of its step sizes."""
    found = [0.0]
    for epsilon in trajectory.epsilon:
        found.append(found[-1] + epsilon)
    return found


def unit_vectors(prompts: int, tokens: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Cloud:
    """Independent uniform directions (B, N, d) from a generator of their own."""
    x = torch.randn(prompts, tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(x, dim=-1).to(dtype)


class Moved(NamedTuple):
    """Where a cloud came to, and the mean mixture on the way (a number where the velocity tells of none)."""

    after: Tensor
    mixture: Any


class _Temperatures(PositionMap):
    """u, v <- sqrt(c_b) u, sqrt(c_b) v for prompt b: beta u.v and beta |u - v|^2 alike become those of the temperature c beta."""

    acts_on_keys = True
    reads_factors = True

    def __init__(self, relative: Tensor):
        super().__init__()
        self.root: Tensor
        self.register_buffer("root", relative.sqrt().view(-1, 1, 1, 1))

    def forward(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]:
        return self.root * u, self.root * v


def _part(matrix: Matrix, scale: Real) -> parts.Operator:
    return Dense() if isinstance(matrix, Tensor) else Identity(scale=scale * matrix, learned=False)


def _block(model: Emformer, method: Method) -> Block:
    block = model.layer(0)
    if len(model.blocks) > 1:
        raise ValueError("the flow of a model of several blocks is not autonomous; take one of them: autonomous(model, layer)")
    if block.ffn is not None and model.settings.arrangement is None:
        raise ValueError("an FFN after attention is no flow in one time; leave it out: autonomous(model, layer, ffn=False)")
    if method != "euler" and block.place_attn is not None and block.shape_attn is None:
        raise ValueError("a norm after the sum (PostNorm) makes a map, whose stages lie on no flow: take the method 'euler'")
    return block


def _at(model: Emformer, beta: Real) -> Emformer:
    """The model at another inverse temperature."""
    found = copy.deepcopy(model)
    kernel: Any = found.layer(0).attention.kernel
    kernel.beta = beta
    found.settings = replace(found.settings, kernel=replace(cast(Any, found.settings.kernel), beta=beta))
    return found


def schedule(times: Sequence[Real], step: Real) -> list[tuple[float, int]]:
    """Length and number of the steps between each two times."""
    if len(times) < 2 or times[0] != 0 or any(not 0 < b - a < math.inf for a, b in pairwise(times)):
        raise ValueError("times ascend from 0 and are at least two")
    if not 0 < step < math.inf:
        raise ValueError(f"the step is {step}; it must be positive")
    found = []
    for a, b in pairwise(times):
        count = max(1, math.ceil((b - a) / step - 1e-9))
        found.append(((b - a) / count, count))
    return found


def integrate(
    x: Tensor,
    times: Sequence[Real],
    step: Real,
    velocity: Callable[[Tensor, float], tuple[Tensor, Any]],
    method: Method,
    place: Callable[[Tensor], Tensor] | None = None,
    tell: Tell | None = None,
) -> Iterator[Moved]:
    """From each of the times to the next, in steps of at most `step`: what all that moves in this package moves by.

    `velocity` of a cloud at a time is its velocity and its mixture, whose mean over stages and steps comes with each cloud; a
    cloud is put back on its space by `place` after every step.
    """
    nodes, weights = TABLEAUS[method]
    plan = schedule(times, step)
    done, whole, time = 0, sum(count for _, count in plan), float(times[0])
    for (size, count), end in zip(plan, times[1:], strict=True):
        mean: Any = 0.0
        for _ in range(count):
            now, total, stage = None, 0.0, x
            for node, weight in zip(nodes, weights, strict=True):
                if now is not None:
                    stage = x + (node * size) * now
                now, mixture = velocity(stage, time + node * size)
                total = total + weight * now
                mean = mean + (weight / count) * mixture
            x = x + size * total
            if place is not None:
                x = place(x)
            done, time = done + 1, time + size
            if tell is not None:
                tell(done / whole)
        time = float(end)  # not the sum of its steps, which rounds
        if not bool(x.isfinite().all()):
            raise ArithmeticError(f"the cloud is no longer finite at time {time:g}; shorten the steps, or stop before")
        yield Moved(x, mean)


def _velocity(block: Block, x: Tensor, pace: Any) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """Of clouds like x under the block, whatever the time."""
    i = torch.arange(x.shape[1], device=x.device)

    def velocity(x: Tensor, _: float) -> tuple[Tensor, Tensor]:
        now = next(block.flow(x, i, None, 0))
        return pace * now.update, _of_heads(pace) * now.mixture

    return velocity


def _start(model: Emformer, x: Tensor) -> Tensor:
    """The cloud in the model's space."""
    dim, kind = model.settings.dim, model.embedding.weight.dtype
    if x.shape[-1] != dim or x.dtype != kind:
        raise ValueError(f"the model is of dimension {dim} in {kind}, and the cloud of {x.shape[-1]} in {x.dtype}")
    start = x if model.enter is None else model.enter(x)
    block = model.layer(0)
    read = start if block.read_attn is None else block.read_attn(start)
    nowhere = model.enter is not None and bool((start == 0).all(-1).any())
    if nowhere or not bool(read.isfinite().all()):
        raise ValueError(
            "a token has no direction: clouds are finite, and on the sphere or under a norm none of their tokens is 0"
        )
    return start


def _of_heads(pace: Any) -> Any:
    return pace.unsqueeze(1) if isinstance(pace, Tensor) else pace


def _trajectory(model: Emformer, start: Tensor, times: Sequence[Real], moved: Sequence[Moved]) -> Trajectory:
    block = model.layer(0)
    gaps = [float(b - a) for a, b in pairwise(times)]
    point = "attn" if model.settings.arrangement is None else "block"
    steps, before = [], start
    for k, (gap, (after, mixture)) in enumerate(zip(gaps, moved, strict=True)):
        read = before if block.read_attn is None else block.read_attn(before)
        steps.append(Step(k, point, before, read, mixture, (after - before) / gap, after))
        before = after
    closing = before if block.read_attn is None else block.read_attn(before)
    return Trajectory(steps, model=model, closing=closing, epsilon=gaps)
