"""Family "lens": what the model would predict if it stopped at a state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from emformer import parts
from emformer.geometry import lens
from emformer.observables.base import Moments, Observation, Row
from emformer.trajectory import State, Trajectory

BYTES = 1 << 26  # of the logits of one state that are held at once


@dataclass(frozen=True)
class Lens(parts.Observable):
    """The logit lens on every state; a prompt's value is the mean over its tokens. Depths are told in layers: 0 is the embedding,
    l what layer l - 1 left, half steps apart from attention and FFN not counted.

    Early states are not trained to be read so, those of models with an unembedding of their own least of all.

    Cost: N d V a prompt and state, and four passes over the V logits. Memory: 128 MiB, whatever V is. Source: math H.4.
    """

    family: ClassVar[str] = "lens"
    keys: ClassVar[Mapping[str, str]] = {
        "lens.entropy": "H(p^l) of the next token; nats; [0, log V]; null log V",
        "lens.kl": "KL(p^L || p^l), p^L the model's prediction; nats; >= 0; 0 at the last state",
        "lens.rank": "rank of the model's top token in p^l; 1 .. V; null (V+1)/2; 1 at the last state",
        "lens.agreement": "share of tokens whose top token is the model's already; [0, 1]; null 1/V; 1 at the last state",
        "lens.collapse_depth": "first layer from which on the top token is the model's; 0 .. L; null L - sum_m V^-m, m = 1 .. L",
        "lens.caustic_depth": "layer l whose step lets the entropy fall most; 0 .. L-1; undefined where none falls",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model", "vocabulary"})

    def begin(self) -> Observation:
        return _Lens()


class _Lens(Observation):
    def __init__(self) -> None:
        self._moments = Moments()

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        model, states = trajectory.model, trajectory.states
        assert model is not None
        found, vocabulary = read(trajectory), model.vocab
        goal = found[-1].top
        for state, one in zip(states, found, strict=True):
            at = state.layer, state.point
            agrees = (one.top == goal).double().where(goal >= 0, torch.nan)
            self._moments.add(one.entropy, *at, "lens.entropy", null=math.log(vocabulary))
            self._moments.add(one.divergence, *at, "lens.kl")
            self._moments.add(one.rank, *at, "lens.rank", null=(vocabulary + 1) / 2)
            self._moments.add(agrees, *at, "lens.agreement", null=1 / vocabulary)
        whole = whole_layers(states)
        steps = len(whole) - 1
        collapse = lens.collapse_depth(torch.stack([found[k].top for k in whole]))
        caustic = lens.caustic_depth(torch.stack([found[k].entropy for k in whole]))
        # layers that know nothing: the last m agree with chance V^-m
        chance = steps - sum(vocabulary**-m for m in range(1, steps + 1))
        self._moments.add(collapse, None, None, "lens.collapse_depth", null=chance)
        self._moments.add(caustic, None, None, "lens.caustic_depth")

    def rows(self) -> list[Row]:
        return self._moments.rows()


@torch.no_grad()
def read(trajectory: Trajectory) -> list[lens.Reading]:
    """`geometry.lens.read` of every state against the last, (B, T) each. Logits are made and dropped, some tokens at a time."""
    model, clouds = trajectory.model, trajectory.clouds
    assert model is not None
    flat = [x.flatten(0, 1).unsqueeze(0) for x in clouds]
    tokens = max(1, BYTES // (model.vocab * clouds[0].element_size()))
    found: list[list[lens.Reading]] = [[] for _ in clouds]
    for start in range(0, flat[0].shape[1], tokens):
        some = slice(start, start + tokens)
        final = model.unembed(flat[-1][:, some])
        for kept, x in zip(found, flat[:-1], strict=False):
            kept.append(lens.read(model.unembed(x[:, some]), final))
        found[-1].append(lens.read(final, final))
    shape = clouds[0].shape[:2]
    return [lens.Reading(*(torch.cat(column, 1).view(shape) for column in zip(*kept, strict=True))) for kept in found]


def whole_layers(states: list[State]) -> list[int]:
    """Places of the embedding and of what each layer leaves as a whole."""
    last = len(states) - 1
    return [0, *(k for k in range(1, last + 1) if k == last or states[k + 1].layer != states[k].layer)]
