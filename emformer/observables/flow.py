"""Family "flow": how far, how straight and where to the tokens move, and the cloud as a measure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from emformer import parts
from emformer.geometry import paths, transport
from emformer.observables.base import Moments, Observation, Row
from emformer.parts import UserError
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Flow(parts.Observable):
    """The path of every token: a prompt's value is the mean over its tokens.

    Cost: about ten passes over the clouds in float64, and the per-head updates once. Source: math D.2-7.

    Args:
        seed: of the random steps that tortuosity is held against.
    """

    seed: int = 0

    family: ClassVar[str] = "flow"
    keys: ClassVar[Mapping[str, str]] = {
        "flow.speed": "|D|, the length of a step; units of the stream; >= 0",
        "flow.speed_rel": "|D|/|x|; >= 0",
        "flow.angular": "angle between the normed states before and after; radians; [0, pi]",
        "flow.turning": "angle between a step and the one before it; radians; [0, pi]; null pi/2 (independent steps), and the "
        "same steps in random order (param 'permuted')",
        "flow.curvature": "turning / mean length of the two steps; 1/length; 0 on a line",
        "flow.path_length": "sum of |D|; units of the stream (cloud 'read': of arcs, radians)",
        "flow.chord": "|x^T - x^0|; units of the stream (cloud 'read': great-circle, radians)",
        "flow.tortuosity": "path length / chord; >= 1, 1 iff straight; null: random steps of the same lengths (param 'random')",
        "flow.interference": "cos(x, D); [-1, 1]; null 0, sd of one token 1/sqrt(d)",
        "flow.constructive": "share of tokens with cos(x, D) > 2/sqrt(d); [0, 1]; null .023",
        "flow.destructive": "share of tokens with cos(x, D) < -2/sqrt(d); [0, 1]; null .023",
        "flow.radial_frac": "share of |D|^2 that the next norm cannot see; [0, 1]; null 1/d (RMSNorm), 2/d (LayerNorm)",
        "flow.head_cancel": "1 - |sum_h D^h| / sum_h |D^h|; [0, 1]; null 1 - 1/sqrt(H)",
        "flow.head_share": "<D^h, D>/|D|^2 of each head, and of all that no head wrote (param 'constant'); they sum to 1; null "
        "1/P of P independent pieces of one size",
    }

    def begin(self) -> Observation:
        return _Flow(self.seed)


class _Flow(Observation):
    def __init__(self, seed: int):
        self._seed, self._moments = seed, Moments()

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        add, steps, clouds = self._moments.add, trajectory.steps, trajectory.clouds
        dim = clouds[0].shape[-1]
        centred = _centred(trajectory)
        path, sphere = paths.path(clouds), paths.sphere_path(clouds, centred)
        tokens = clouds[0].shape[1]
        for k, step in enumerate(steps):
            at = step.layer, step.point
            add(path.speed[k], *at, "flow.speed")
            add(path.relative[k], *at, "flow.speed_rel")
            add(sphere.speed[k], *at, "flow.angular", cloud="read")
            if k:
                add(path.turning[k - 1], *at, "flow.turning", null=math.pi / 2)
                add(path.curvature[k - 1], *at, "flow.curvature")
            moved = step.after - step.before
            c = paths.interference(step.before, moved)
            kind = paths.interference_kind(c, dim)
            add(c, *at, "flow.interference", null=0.0, null_sd=1 / math.sqrt(dim * tokens))
            for sign, name in ((1, "constructive"), (-1, "destructive")):
                add((kind == sign).double().where(~kind.isnan(), torch.nan), *at, f"flow.{name}", null=TAIL)
            hidden = paths.split(step.before, moved, centred).invisible
            add(hidden, *at, "flow.radial_frac", null=(2 if centred else 1) / dim)
        nowhere = None, None
        for whole, cloud in ((path, "raw"), (sphere, "read")):
            add(whole.length, *nowhere, "flow.path_length", cloud=cloud)
            add(whole.chord, *nowhere, "flow.chord", cloud=cloud)
            add(whole.tortuosity, *nowhere, "flow.tortuosity", cloud=cloud)
        # a random path of the same steps beside every path; one draw a token is enough where tokens are many
        random = paths.random_tortuosity(path.speed, dim, 1, self._seed)[0]
        add(random, *nowhere, "flow.tortuosity", param="random")
        if len(steps) > 1:
            add(path.turning.nanmean(0), *nowhere, "flow.turning", null=math.pi / 2)
            some = [x[:, ::4] for x in clouds]  # as long as all else together, and its mean needs fewer tokens
            add(paths.permuted_turning(some, 1, self._seed).expected, *nowhere, "flow.turning", param="permuted")
        self._seed += 1  # other draws for the next prompts
        for k in trajectory.attentions:
            self._heads(trajectory, k)

    def _heads(self, trajectory: Trajectory, k: int) -> None:
        step, (heads, drift) = trajectory.steps[k], trajectory.heads(k)
        at, count = (step.layer, step.point), heads.shape[1]
        self._moments.add(paths.head_cancellation(heads), *at, "flow.head_cancel", null=1 - 1 / math.sqrt(count))
        constant = drift if step.ffn is None else step.ffn + drift
        shares = paths.head_shares(heads, constant)
        alone = step.ffn is None and not torch.as_tensor(drift).any()
        null = 1 / (count if alone else count + 1)
        self._moments.add(shares[:, :count], *at, "flow.head_share", heads=True, null=null)
        if not alone:
            self._moments.add(shares[:, count], *at, "flow.head_share", param="constant", null=null)

    def rows(self) -> list[Row]:
        return self._moments.rows()


TAIL = math.erfc(math.sqrt(2)) / 2  # mass of a normal law beyond two standard deviations, one side


@dataclass(frozen=True)
class Transport(parts.Observable):
    """Distances between the clouds before and after a step, as measures, prompt by prompt.

    A first token that is a sink carries most of them: look without it too. Cost: one exact assignment a prompt and step, and one
    from first to last state. Source: math D.8.

    Args:
        skip: tokens at the beginning of each prompt that are left out (rows then say so in `param`, as "skip=1").
        projections: directions of the sliced distance.
        seed: of the directions, the same for every prompt and step.
    """

    skip: int = 0
    projections: int = 32
    seed: int = 0

    family: ClassVar[str] = "flow"
    keys: ClassVar[Mapping[str, str]] = {
        "flow.w2": "exact 2-Wasserstein distance of a step; units of the stream; <= w2_ident",
        "flow.w2_ident": "root mean square of |D|, the distance if every token goes to its own image; units of the stream",
        "flow.w2_fixed": "share of tokens whose own image is the optimal one; [0, 1]; 1/N for unrelated clouds",
        "flow.w2_shape": "2-Wasserstein distance without mean and scale; [0, sqrt 2]",
        "flow.sw2": "sliced distance; units of the stream; <= w2/sqrt(d)",
        "flow.geodesic": "W2(first, last) / sum of W2 over steps; [0, 1]; 1 on a geodesic",
    }

    def __post_init__(self) -> None:
        if self.projections < 2 or self.skip < 0:
            raise UserError(f"{self} cannot be measured: projections is at least 2 and skip at least 0.")

    @classmethod
    def examples(cls) -> Sequence[Transport]:
        return [cls(), cls(skip=1)]

    def begin(self) -> Observation:
        return _Transport(self)


class _Transport(Observation):
    def __init__(self, setting: Transport):
        self._setting, self._moments = setting, Moments()

    def update(self, trajectory: Trajectory) -> None:
        setting, add = self._setting, self._moments.add
        clouds = [x[:, setting.skip :] for x in trajectory.clouds]
        tokens, param = clouds[0].shape[1], f"skip={setting.skip}" if setting.skip else None
        if not tokens:
            return
        hops = 0.0
        for step, before, after in zip(trajectory.steps, clouds, clouds[1:], strict=False):
            at = step.layer, step.point
            whole = transport.wasserstein(before, after)
            hops = hops + whole.w2
            add(whole.w2, *at, "flow.w2", param=param)
            add(whole.identity, *at, "flow.w2_ident", param=param)
            add(whole.fixed, *at, "flow.w2_fixed", param=param, null=1 / tokens)
            add(whole.shape, *at, "flow.w2_shape", param=param)
            sliced = transport.sliced(before, after, setting.projections, setting.seed).distance
            add(sliced, *at, "flow.sw2", param=param)
        chord = transport.wasserstein(clouds[0], clouds[-1]).w2
        add((chord / hops).clamp(max=1), None, None, "flow.geodesic", param=param)

    def rows(self) -> list[Row]:
        return self._moments.rows()


@dataclass(frozen=True)
class Bures(parts.Observable):
    """Distance of the Gaussians with the means and covariances of the clouds before and after a step, prompt by prompt.

    Of a prompt shorter than the space is wide the covariance is singular: compare at equal lengths. Cost: a singular value
    decomposition a prompt and step, the most of the family. Source: math D.8.
    """

    family: ClassVar[str] = "flow"
    keys: ClassVar[Mapping[str, str]] = {
        "flow.bures": "2-Wasserstein distance of the Gaussians of the clouds; units of the stream; <= w2; falls with N < d",
    }

    def begin(self) -> Observation:
        return _Bures()


class _Bures(Observation):
    def __init__(self) -> None:
        self._moments = Moments()

    def update(self, trajectory: Trajectory) -> None:
        clouds = trajectory.clouds
        for step, before, after in zip(trajectory.steps, clouds, clouds[1:], strict=False):
            self._moments.add(transport.bures(before, after), step.layer, step.point, "flow.bures")

    def rows(self) -> list[Row]:
        return self._moments.rows()


def _centred(trajectory: Trajectory) -> bool:
    """Whether the model's norms remove the mean of a token; without a model, they do not."""
    if trajectory.model is None:
        return False
    block = trajectory.block(0)
    norm = block.read_attn if block.read_attn is not None else block.place_attn
    return bool(getattr(norm, "centred", False))
