"""Is a token's last state the sum of its first and of every update it has received?"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch

from emformer import parts
from emformer.geometry.spectra import wide
from emformer.intervals import over_models
from emformer.model import Emformer
from emformer.studies.subjects import Subject, Tell
from emformer.theory.outcome import Curves
from emformer.trajectory import Trajectory
from emformer.verdicts import Findings, Verdict

ROUNDING = 1e-5  # of a sum in float32, math J 13: what is stored in fewer bits is computed in these


@dataclass(frozen=True)
class Unrolled(parts.Study):
    """x^L = x^0 + eps sum_l (D_attn^l + D_ffn^l), and what each term adds: math A and J 13, S0 "unrolling".

    The identity is one of arithmetic wherever nothing reshapes the stream between two sublayers: it holds for random weights too.
    It fails, and no sum of updates is the last state, where a norm after the sum or a retraction acts on the stream. Beside it,
    how much the embedding that "is never overwritten" is worth at the end: its share <x^0, x^L>/|x^L|^2, mean over tokens, less
    |x^0|^2/(|x^0|^2 + sum |eps D|^2), which it has where updates know nothing of it: layers that erase it are below.
    """

    name: ClassVar[str] = "unrolled"
    title: ClassVar[str] = "is the last state the first one plus the sum of all updates?"

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        errors, shares, groups, lines = [], [], [], []
        for k, subject in enumerate(subjects):
            found = [_unrolled(one) for one in subject.trajectories(_float(subject.model))]
            error, each, alone = (np.concatenate(column) for column in zip(*found, strict=True))
            errors.append(error)
            shares.append(each[:, 0] - alone)
            groups.append(subject.groups.numpy())
            for step, share in enumerate(each.mean(0)):
                lines.append(("share of |x^L|^2", subject.name, step, share))
            tell((k + 1) / len(subjects), subject.name)
        holds = over_models(errors, groups=groups, seed=subjects[0].seed)
        kept = over_models(shares, groups=groups, seed=subjects[0].seed)
        verdicts = [
            Verdict(
                "the last state is the first plus the sum of every update",
                "S0 residual stream",
                "|x^L - x^0 - eps sum D| / |x^L|, mean over tokens",
                holds,
                most=ROUNDING,
                null=0.0,
                against="arithmetic",
                why="a norm after the sum, or a retraction, acts on the stream" if any(map(_reshaped, subjects)) else "",
                check=True,
            ),
            Verdict(
                "the initial embedding persists as a baseline",
                "S0 residual stream",
                "share <x^0, x^L>/|x^L|^2 of the embedding in the last state - |x^0|^2/(|x^0|^2 + sum |eps D|^2)",
                kept,
                least=0.0,
                null=0.0,
                against="updates at right angles to it and to each other",
            ),
        ]
        frame = pd.DataFrame(lines, columns=["panel", "line", "x", "y"])
        caption = "What each term of the sum adds to the last state: 0 is the embedding, then one step a sublayer. They sum to 1."
        return Findings(verdicts, {"shares": Curves(frame, caption, "term", "share")})


def _reshaped(subject: Subject) -> bool:
    """Whether anything but a sum acts on the stream, in any layer."""
    blocks = [subject.model.layer(layer) for layer in range(subject.model.settings.depth)]
    return any(getattr(block, place, None) is not None for block in blocks for place in ("place_attn", "place_ffn"))


def _float(model: Emformer) -> Emformer:
    """A model whose sums are rounded as float32 or better."""
    return deepcopy(model).float() if torch.finfo(model.embedding.weight.dtype).bits < 32 else model


def _unrolled(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(relative error (B,), shares of the terms in x^L (B, S + 1), the first one's if terms were orthogonal (B,)), means over
    tokens."""
    states = trajectory.states
    last = wide(states[-1].x)
    terms = [wide(states[0].x)]
    terms += [epsilon * wide(step.update) for step, epsilon in zip(trajectory.steps, trajectory.epsilon, strict=True)]
    size = last.norm(dim=-1)
    total = torch.stack(terms).sum(0)
    error = ((last - total).norm(dim=-1) / size).mean(-1)
    shares = torch.stack([((term * last).sum(-1) / size.square()).mean(-1) for term in terms], -1)
    squares = torch.stack([term.square().sum(-1) for term in terms])
    alone = (squares[0] / squares.sum(0)).mean(-1)
    return error.cpu().numpy(), shares.cpu().numpy(), alone.cpu().numpy()
