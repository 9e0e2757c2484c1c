"""Are the paths of tokens straighter than random walks, and do later steps go the same way?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import paths
from emformer.geometry.spectra import wide
from emformer.intervals import over_models
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.studies.lines import BAND, band, draws, mean, spearman, trend
from emformer.studies.subjects import Subject, Tell
from emformer.theory.outcome import Curves
from emformer.trajectory import Trajectory
from emformer.verdicts import Findings, Verdict

LEAST = 0.001  # of the excess: far above the rounding of states
SOURCE = "S0 flow, math D.3-4"
WALK = "a random walk of the same step lengths"


@dataclass(frozen=True)
class Straightness(parts.Study):
    """Each token's path x^0 … x^T, a step a layer, against independent isotropic steps of the lengths that it has.

    *Straightness* (chord/length)^2, in [0, 1]: its mean over such walks is sum |D|^2/(sum |D|)^2 exactly, in any dimension, so
    that the excess is sum_{k != m} <D^k, D^m>/(sum |D|)^2: 0 for a random walk, above it where steps align. It is taken of the
    raw stream, and of the stream without the mean of all tokens at each state: a drift that all tokens share makes paths straight
    and organises nothing. *Turning* is the angle between consecutive steps, pi/2 for independent ones; beside it the same steps
    in random order, and its trend over depth, held against all orders of the steps. Whatever random weights do, as growing steps,
    the untrained twin does too. First tokens are left out, which may be sinks. Cost: two passes and some 20 of the clouds,
    seconds for the default.

    Args:
        steps: "layers", or "sublayers": attention and FFN alternate then, and each may go on with what it did a layer before.
    """

    name: ClassVar[str] = "straightness"
    title: ClassVar[str] = "are token paths straighter than random walks, and do later steps align?"

    steps: Literal["layers", "sublayers"] = "layers"

    @classmethod
    def examples(cls) -> Sequence[Straightness]:
        return [cls(), cls(steps="sublayers")]

    def __post_init__(self) -> None:
        if self.steps not in ("layers", "sublayers"):
            raise UserError(f"straightness: steps is '{self.steps}'; choose layers or sublayers.")

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        for subject in subjects:
            if subject.tokens.shape[1] < 2:
                raise UserError("straightness: first tokens are left out, and a prompt has no other; choose a --length above 1.")
        found: list[tuple[Measured, Measured]] = []
        for k, subject in enumerate(subjects):
            tell(k / len(subjects), subject.name)
            trained = _measured(subject, None, self.steps)
            tell((k + 0.5) / len(subjects), f"untrained {subject.name}")
            found.append((trained, _measured(subject, subject.untrained(), self.steps)))
        tell(1.0, "intervals")
        groups, seed = [subject.groups.numpy() for subject in subjects], subjects[0].seed

        def verdict(claim: str, quantity: str, values: list[np.ndarray], null: float, against: str, **bounds: Any) -> Verdict:
            measured = over_models(values, groups=groups, seed=seed)
            return Verdict(claim, SOURCE, quantity, measured, null=null, against=against, **bounds)

        squared = "(chord/length)^2 - its mean over random walks"
        verdicts = [
            verdict(
                "the paths of tokens are straighter than random walks",
                f"{squared}, raw stream",
                [one.excess for one, _ in found],
                0.0,
                WALK,
                least=LEAST,
            ),
            verdict(
                "they are straighter also without the drift that all tokens share",
                f"{squared}, mean of all tokens removed",
                [one.own for one, _ in found],
                0.0,
                WALK,
                least=LEAST,
            ),
            verdict(
                "training makes the paths of tokens straighter",
                f"{squared}, mean of all tokens removed, less the twin's",
                [one.own - twin.own for one, twin in found],
                0.0,
                "the untrained twin",
                least=LEAST,
                why=draws(len(subjects)),
            ),
            verdict(
                "a step turns from the one before by less than a right angle",
                "turning angle in radians, mean over steps and tokens, mean of all tokens removed",
                [mean(one.turning, 1) for one, _ in found],
                math.pi / 2,
                WALK,
                most=math.pi / 2,
            ),
            verdict(
                "consecutive steps align more than steps in random order",
                "turning angle - that of the same steps in random order",
                [mean(one.turning, 1) - one.permuted for one, _ in found],
                0.0,
                "the same steps in random order",
                most=0.0,
            ),
        ]
        if all(one.turning.shape[1] > 1 for one, _ in found):
            measured, why = trend([one.turning for one, _ in found], groups=groups, seed=seed)
            claim, against = "later steps align more than earlier ones", "the untrained twin"
            quantity = "Spearman's correlation of the step with its turning angle"
            null = float(np.mean([float(spearman(mean(twin.turning, 0))) for _, twin in found]))
            verdicts.append(Verdict(claim, SOURCE, quantity, measured, most=0.0, null=null, against=against, why=why))
        names = [subject.name for subject in subjects]
        return Findings(verdicts, {"turning": _turning(names, found, groups), "tortuosity": _tortuosity(names, found)})


class Measured(NamedTuple):
    """Of one model, by prompt: excess straightness (P,), raw and `own`, without the common mean; turning (P, T - 1) and its mean
    in random order (P,), without it too; tortuosity of the raw path up to each step (T,), and of random walks."""

    excess: np.ndarray
    own: np.ndarray
    turning: np.ndarray
    permuted: np.ndarray
    tortuosity: np.ndarray
    random: np.ndarray


def excess(path: paths.Path) -> Tensor:
    """(chord^2 - sum |D|^2)/(sum |D|)^2 of each token: the mean cosine-like alignment of pairs of steps.

    In [-1, 1 - 1/T]; 0 in the mean over independent isotropic steps of any lengths and dimension; 1 - sum |D|^2/(sum |D|)^2 on a
    line. nan for a token that never moves. Source: math D.3.
    """
    length = path.length.where(path.length > 0, torch.nan)
    return (path.chord.square() - path.speed.square().sum(0)) / length.square()


@torch.no_grad()
def _measured(subject: Subject, model: Emformer | None, steps: str) -> Measured:
    def clouds() -> Iterator[list[Tensor]]:
        for one in subject.trajectories(model):
            yield [wide(x[:, 1:]) for x in _states(one, steps)]

    sums, count = None, 0
    for some in clouds():
        added = torch.stack([x.sum((0, 1)) for x in some])
        sums, count = added if sums is None else sums + added, count + some[0].shape[0] * some[0].shape[1]
    assert sums is not None
    common = sums / count
    rows: list[tuple[np.ndarray, ...]] = []
    dim = common.shape[-1]
    for lot, some in enumerate(clouds()):
        whole = paths.path(some)
        free = [x - mean for x, mean in zip(some, common, strict=True)]
        own = paths.path(free)
        stops = range(1, len(some))
        ways = [paths.path(some[: stop + 1]).tortuosity.nanmean(-1) for stop in stops]
        walks = [paths.random_tortuosity(whole.speed[:stop], dim, 1, subject.seed + lot)[0].nanmean(-1) for stop in stops]
        shuffled = paths.permuted_turning(free, 1, subject.seed).expected
        columns = (
            excess(whole).nanmean(-1),
            excess(own).nanmean(-1),
            own.turning.nanmean(-1).mT,
            shuffled.nanmean(-1),
            torch.stack(ways, -1),
            torch.stack(walks, -1),
        )
        rows.append(tuple(column.cpu().numpy() for column in columns))
    excesses, owns, turning, permuted, tortuosity, random = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Measured(excesses, owns, turning, permuted, mean(tortuosity, 0), mean(random, 0))


def _states(trajectory: Trajectory, steps: str) -> list[Tensor]:
    """The first state, and what every layer, or sublayer, left. Raises `UserError` where there is one step, which is straight."""
    following = [*trajectory.steps[1:], None]
    ends = [
        step.after
        for step, after in zip(trajectory.steps, following, strict=True)
        if steps == "sublayers" or after is None or after.layer != step.layer
    ]
    if len(ends) < 2:
        raise UserError("straightness: tokens move once, and one step is straight; take a deeper model, or --steps sublayers.")
    return [trajectory.steps[0].before, *ends]


def _turning(names: Sequence[str], found: Sequence[tuple[Measured, Measured]], groups: Sequence[np.ndarray]) -> Curves:
    rows = []
    for name, pair, group in zip(names, found, groups, strict=True):
        for one, line in zip(pair, (name, f"untrained {name}"), strict=True):
            rows += band("turning angle", line, one.turning, group, 1)
    last = found[0][0].turning.shape[1]
    rows += [("turning angle", "theory random walk", step, math.pi / 2, math.nan, math.nan) for step in sorted({1, last})]
    caption = "Angle between a step and the one before it, mean of all tokens removed, by step."
    return Curves(pd.DataFrame(rows, columns=BAND), caption, "step", "radians")


def _tortuosity(names: Sequence[str], found: Sequence[tuple[Measured, Measured]]) -> Curves:
    rows = []
    for name, pair in zip(names, found, strict=True):
        for one, line in zip(pair, (name, f"untrained {name}"), strict=True):
            for values, word in ((one.tortuosity, line), (one.random, f"theory random walk, {line}")):
                rows += [("length / chord", word, k + 1, value) for k, value in enumerate(values)]
    caption = "Length over chord of the raw path up to each step, and of a random walk with steps of the same lengths."
    return Curves(pd.DataFrame(rows, columns=["panel", "line", "x", "y"]), caption, "step", "length / chord")
