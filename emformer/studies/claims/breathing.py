"""Does the dimension of the cloud rise after attention and fall after the FFN, and is that more than any update would do?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from emformer import parts
from emformer.geometry import breathing, dimension
from emformer.geometry.neighbours import NEAR_DUPLICATES, Neighbours, near_duplicates, nearest
from emformer.intervals import FEWEST, LEVEL, Interval, bootstrap
from emformer.model import Emformer
from emformer.observables.breathing import uniform
from emformer.parts import UserError
from emformer.studies.flips import flips
from emformer.studies.lines import draws
from emformer.studies.subjects import Subject, Tell, part_of
from emformer.surgery.copies import generator
from emformer.theory.outcome import Curves
from emformer.verdicts import Findings, Verdict

NULL = 1 / 3  # of the sawtooth fraction, for unrelated clouds of one dimension: the middle one of three is the largest
NEIGHBOURS = 2 * max(dimension.SCALES)  # as many as the halves of the bootstrap may need
CONTROLS = {"attn": ("noise", "exchanged", "uniform"), "ffn": ("noise", "exchanged")}

Cloud = tuple[str, int]  # what it is, and the place of the state, or the layer of the block, that it belongs to
Row = dict[Cloud, float]  # weights of log dimensions


@dataclass(frozen=True)
class Sawtooth(parts.Study):
    """S2 9.4: every attention layer raises the dimension of the cloud of last tokens, every MLP lowers it. math G.4.

    TwoNN dimension d of one token a prompt at X^l, X^{l+1/2}, X^{l+1}; b_attn = log d^{l+1/2}/d^l, b_mlp = log d^{l+1}/d^{l+1/2}.
    A change counts if its interval excludes 0 and it has one sign at Gride k = 2, 4, 8 too, in the raw cloud and in the one
    that the next sublayer reads. The sawtooth fraction S is the share of blocks that rise at attention and fall at the FFN in all
    these views. Its interval reaches from the share that does so beyond doubt to the share that is not shown to do otherwise, all
    blocks of a model at 95 % together, by the normal tails of their bootstrap; from six models on it is one over models besides.
    Null at most 1/3, for unrelated clouds of one dimension (1/4 for independent fair signs), less what the views do not agree on.
    What chance does has no such doubt in the balance, S less the share of blocks that do the opposite in all views: null 0, as
    rise and fall are alike to it. Neighbouring blocks share a cloud and several models their depth, so with fewer than six models
    flips of the blocks' signs, of all models together, must tell the balance from 0: it takes six blocks.

    Controls: the untrained twin; instead of an update an isotropic random one of its length, which always adds dimensions, and
    that of another prompt, of the same law; attention by the mean over all that it sees; prompts that end in different words,
    among which there are no pairs of one. Also the other reading, the dimension of the cloud of updates themselves.

    Intervals resample prompts with fixed neighbours, the excess variance of shared distances included. A cloud of which a tenth
    repeats itself (X^0 without positions in the embedding), or with pairs that nearly do, has no dimension, and the changes
    beside it are left out and told. In a parallel block both changes are from its input, and only the raw cloud is a view.

    Cost: some 13 L searches of neighbours, P^2 d each, and as many bootstraps: a minute for P = 1024 and L = 4.

    Args:
        resamples: of the prompts, for each interval; at least 100.
    """

    resamples: int = 2000

    name: ClassVar[str] = "breathing"
    title: ClassVar[str] = "does the dimension rise after attention and fall after the FFN?"
    prompts: ClassVar[int] = 1024

    @classmethod
    def examples(cls) -> Sequence[Sawtooth]:
        return [cls(resamples=100)]

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise UserError(f"breathing: resamples is {self.resamples}; choose at least 100.")

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        for subject in subjects:
            if all(subject.model.layer(k).ffn is None for k in range(subject.model.settings.depth)):
                raise UserError(f"breathing: {subject.name} has no FFN, and the claim is about attention and FFN by turns.")
        found = []
        for k, subject in enumerate(subjects):
            part = part_of(tell, k / len(subjects), (k + 1) / len(subjects))
            found.append(_measure(subject, self.resamples, part))
        return Findings(_verdicts(found, subjects[0].seed), _charts(subjects, found), _note(subjects, found))


# Clouds ---------------------------------------------------------------------------------------------------------------


class Flow(NamedTuple):
    """The last tokens of all prompts along the depth, (P, d) each. `blocks` are those that have both sublayers."""

    raw: list[Tensor]
    read: list[Tensor]  # of the states alone; `raw` also has the halves of parallel blocks behind them
    depths: list[float]  # of the states, in layers
    blocks: list[Block]
    updates: dict[tuple[int, str], Tensor]  # by layer and point
    averaged: dict[int, Tensor]  # the state after attention that looks at everything alike, by layer


class Block(NamedTuple):
    """Places in `Flow.raw` before and after each sublayer of a layer, and how updates enter: place(x + epsilon D)."""

    layer: int
    attn: tuple[int, int]
    ffn: tuple[int, int]
    epsilon: float
    places: dict[str, Any]


@torch.no_grad()
def flow(subject: Subject, model: Emformer) -> Flow:
    """The clouds of last tokens of this model on the subject's prompts."""
    lots: list[list[Tensor]] = []
    for trajectory in subject.trajectories(model):
        states = trajectory.states
        raw = [state.x for state in states]
        update: dict[tuple[int, str], Tensor] = {}
        averaged: dict[int, Tensor] = {}
        changes: dict[int, dict[str, tuple[int, int]]] = {}
        places: dict[int, dict[str, Any]] = {}
        epsilon = {}
        for k, step in enumerate(trajectory.steps):
            block, layer = trajectory.block(k), step.layer
            epsilon[layer] = trajectory.epsilon[k]
            there = places.setdefault(layer, {})
            if step.ffn is not None:
                update[layer, "attn"], update[layer, "ffn"] = step.update - step.ffn, step.ffn
                changes[layer] = {"attn": (k, len(raw)), "ffn": (k, len(raw) + 1)}
                raw += trajectory.halves(k)
                there |= {"attn": None, "ffn": None}  # a half is never placed
            else:
                update[layer, step.point] = step.update
                changes.setdefault(layer, {})[step.point] = k, k + 1
                there[step.point] = block.place_ffn if step.point == "ffn" else block.place_attn
            if step.mixture is not None:
                after = step.before[:, -1:] + epsilon[layer] * uniform(trajectory, k)
                averaged[layer] = after if there["attn"] is None else there["attn"](after)
        blocks = [
            Block(layer, both["attn"], both["ffn"], epsilon[layer], places[layer])
            for layer, both in changes.items()
            if len(both) == 2
        ]
        reads = [state.read for state in states if state.read is not None]
        lots.append([x[:, -1].cpu() for x in (*raw, *reads, *update.values(), *averaged.values())])
    joined = [torch.cat(column) for column in zip(*lots, strict=True)]
    depths = [0.0, *(step.layer + (0.5 if step.point == "attn" else 1.0) for step in trajectory.steps)]
    ends = np.cumsum([len(raw), len(reads), len(update)])
    raw, read, changed, mean = (joined[a:b] for a, b in zip([0, *ends], [*ends, len(joined)], strict=True))
    return Flow(raw, read, depths, blocks, dict(zip(update, changed, strict=True)), dict(zip(averaged, mean, strict=True)))


@torch.no_grad()
def instead(found: Flow, block: Block, point: str, update: Tensor) -> Tensor:
    """The cloud after a sublayer if it had made this update (P, d)."""
    before = getattr(block, point)[0]
    place = block.places[point]
    device = next((p.device for p in place.parameters()), update.device) if place is not None else update.device
    raw = (found.raw[before] + block.epsilon * update).unsqueeze(1)
    return raw[:, 0] if place is None else place(raw.to(device))[:, 0].cpu()


def noise(update: Tensor, *key: Any) -> Tensor:
    """Isotropic random vectors of the same lengths."""
    random = torch.randn(update.shape, generator=generator("breathing", *key), dtype=torch.float64).to(update)
    return random * update.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)


# Dimensions -----------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What was found on one model. Pairs are of attention and of the FFN; whatever is by block has the order of `layers`."""

    n: int
    few: int  # prompts that end in different words
    depths: list[float]
    dims: dict[str, list[float]]  # of the clouds of states
    layers: list[int]
    changes: tuple[breathing.Change, breathing.Change]  # by block
    others: tuple[Tensor, Tensor]  # the same in other views, (views, blocks)
    mean: dict[str, breathing.Change]  # over blocks, of what `_wanted` names
    lines: dict[tuple[str, str], list[float]]  # changes by block, by point and condition
    parallel: bool
    lost: list[str]


def _measure(subject: Subject, resamples: int, tell: Tell) -> Measured:
    groups = subject.groups.cpu()
    trained, twin = flow(subject, subject.model), flow(subject, subject.untrained())
    tell(0.3, f"{subject.name}: clouds")
    clouds: dict[Cloud, Tensor] = {("raw", k): x for k, x in enumerate(trained.raw)}
    clouds |= {("twin", k): x for k, x in enumerate(twin.raw)}
    for block in trained.blocks:
        for point in ("attn", "ffn"):
            update = trained.updates[block.layer, point]
            clouds[f"update {point}", block.layer] = update
            clouds[f"noise {point}", block.layer] = instead(
                trained, block, point, noise(update, subject.seed, block.layer, point)
            )
            clouds[f"exchanged {point}", block.layer] = instead(trained, block, point, update.roll(1, 0))
        clouds["uniform attn", block.layer] = trained.averaged[block.layer]
    near = {cloud: nearest(x, NEIGHBOURS) for cloud, x in clouds.items()}
    reads = [nearest(x, NEIGHBOURS) for x in trained.read]
    tell(0.6, f"{subject.name}: neighbours")
    blocks, known = trained.blocks, _known(near)
    wanted = _wanted(blocks, twin.blocks, known)
    mean = _contrasts(near, wanted, known, groups, resamples, subject.seed)
    tell(0.9, f"{subject.name}: intervals")
    different = torch.from_numpy(np.unique(subject.tokens[:, -1].cpu().numpy(), return_index=True)[1])
    fewer = {("raw", k): nearest(x[different], NEIGHBOURS) for k, x in enumerate(trained.raw)}
    amplitude = {"different": wanted["amplitude"]}
    mean |= _contrasts(fewer, amplitude, _known(fewer), groups[different], resamples, subject.seed)
    tell(1.0, subject.name)
    states = range(len(trained.depths))
    reasons = [(depth, _lacks(near["raw", k])) for k, depth in enumerate(trained.depths)]
    return Measured(
        n=len(groups.unique()),
        few=len(groups[different].unique()),
        depths=trained.depths,
        dims={
            "raw": [_dimension(near["raw", k]) for k in states],
            "read": [_dimension(one) for one in reads],
            "untrained": [_dimension(near["twin", k]) for k in states],
        },
        layers=[block.layer for block in blocks],
        changes=(
            _joined([mean[f"attn {block.layer}"] for block in blocks]),
            _joined([mean[f"ffn {block.layer}"] for block in blocks]),
        ),
        others=(_views(near, reads, [block.attn for block in blocks]), _views(near, reads, [block.ffn for block in blocks])),
        mean=mean,
        lines=_lines(near, blocks, twin.blocks),
        parallel=len(trained.raw) > len(trained.depths),
        lost=[f"layer {depth:g} of {subject.name}: {why}" for depth, why in reasons if why is not None],
    )


def _wanted(blocks: Sequence[Block], twin: Sequence[Block], known: set[Cloud]) -> dict[str, list[Row]]:
    """What is measured, each the mean of some rows: both changes of each block, and over blocks the amplitude, what is more than
    the twin's, and what is more than under each control."""
    up, down = ([_step("raw", getattr(block, point)) for block in blocks] for point in ("attn", "ffn"))
    wanted = {f"attn {block.layer}": [row] for block, row in zip(blocks, up, strict=True)}
    wanted |= {f"ffn {block.layer}": [row] for block, row in zip(blocks, down, strict=True)}
    amplitude = [_amplitude(*rows) for rows in zip(up, down, strict=True)]
    of_twin = [_amplitude(_step("twin", block.attn), _step("twin", block.ffn)) for block in twin]
    sound = [k for k, row in enumerate(amplitude) if row.keys() <= known]  # the means of both sides are over the same blocks
    wanted |= {"amplitude": amplitude, "attn": [up[k] for k in sound], "ffn": [down[k] for k in sound]}
    wanted["trained"] = [_sum((1.0, mine), (-1.0, its)) for mine, its in zip(amplitude, of_twin, strict=True)]
    wanted["twin"] = [its for mine, its in zip(amplitude, of_twin, strict=True) if (mine.keys() | its.keys()) <= known]
    for point in ("attn", "ffn"):
        for control in CONTROLS[point]:
            wanted[f"{control} {point}"] = [
                {("raw", getattr(block, point)[1]): 1.0, (f"{control} {point}", block.layer): -1.0} for block in blocks
            ]
        wanted[f"update {point}"] = [{(f"update {point}", block.layer): 1.0, ("raw", block.attn[0]): -1.0} for block in blocks]
    return wanted


def _amplitude(up: Row, down: Row) -> Row:
    return _sum((0.5, up), (-0.5, down))


def _known(near: Mapping[Cloud, Neighbours]) -> set[Cloud]:
    """The clouds that have a dimension."""
    return {cloud for cloud, one in near.items() if _lacks(one) is None}


def _lacks(one: Neighbours) -> str | None:
    """Why this cloud has no dimension that means anything; None if it has."""
    if not math.isfinite(dimension.twonn(one).value):
        repeated = 1 - len(one.kept) / one.points
        return f"{repeated:.0%} of the points repeat another" if repeated > dimension.REMOVED else "it has no dimension"
    pairs = near_duplicates(one)
    return None if pairs <= NEAR_DUPLICATES else f"{pairs:.0%} of the points have a near duplicate"


def _dimension(one: Neighbours) -> float:
    return dimension.twonn(one).value if _lacks(one) is None else math.nan


def _step(kind: str, places: tuple[int, int]) -> Row:
    before, after = places
    return {(kind, before): -1.0, (kind, after): 1.0}


def _sum(*terms: tuple[float, Row]) -> Row:
    found: Row = {}
    for factor, row in terms:
        for cloud, weight in row.items():
            found[cloud] = found.get(cloud, 0.0) + factor * weight
    return found


def _contrasts(
    near: Mapping[Cloud, Neighbours],
    wanted: Mapping[str, list[Row]],
    known: set[Cloud],
    groups: Tensor,
    resamples: int,
    seed: int,
) -> dict[str, breathing.Change]:
    """Of each name the mean over those of its rows all of whose clouds are known; nan where there are none."""
    order = {cloud: k for k, cloud in enumerate(near)}
    weights = torch.zeros(len(wanted), len(order), dtype=torch.float64)
    for line, rows in zip(weights, wanted.values(), strict=True):
        usable = [row for row in rows if row.keys() <= known]
        if not usable:
            line.fill_(torch.nan)
        for row in usable:
            for cloud, weight in row.items():
                line[order[cloud]] += weight / len(usable)
    found = breathing.contrasts(list(near.values()), weights, groups, resamples, seed=seed)
    return {name: breathing.Change(*(field[k] for field in found)) for k, name in enumerate(wanted)}


def _joined(changes: Sequence[breathing.Change]) -> breathing.Change:
    return breathing.Change(*(torch.stack(fields) for fields in zip(*changes, strict=True)))


def _views(near: Mapping[Cloud, Neighbours], reads: Sequence[Neighbours], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """(views, blocks): the changes at other scales, and in the read cloud where that is known of both states."""
    raw = [near["raw", k] for k in range(1 + max(max(pair) for pair in pairs))]
    lots = [(raw, breathing.AGREEMENT)]
    if len(reads) >= len(raw):
        lots.append((list(reads[: len(raw)]), (1, *breathing.AGREEMENT)))
    found = []
    for clouds, scales in lots:
        logs = torch.tensor([[one.value for one in dimension.gride(cloud, scales)] for cloud in clouds]).double().log()
        before, after = (list(side) for side in zip(*pairs, strict=True))
        found.append((logs[after] - logs[before]).T)
    return torch.cat(found)


def _lines(
    near: Mapping[Cloud, Neighbours], blocks: Sequence[Block], twin: Sequence[Block]
) -> dict[tuple[str, str], list[float]]:
    """Changes by block, under each condition."""
    dims = {cloud: _dimension(one) for cloud, one in near.items()}
    found: dict[tuple[str, str], list[float]] = {}
    for point in ("attn", "ffn"):
        for block, other in zip(blocks, twin, strict=True):
            before, after = getattr(block, point)
            ends = {
                "trained": ("raw", after),
                "random update": (f"noise {point}", block.layer),
                "another prompt's update": (f"exchanged {point}", block.layer),
            }
            if point == "attn":
                ends["uniform attention"] = "uniform attn", block.layer
            for name, end in ends.items():
                found.setdefault((point, name), []).append(math.log(dims[end] / dims["raw", before]))
            first, second = getattr(other, point)
            found.setdefault((point, "untrained"), []).append(math.log(dims["twin", second] / dims["twin", first]))
    return found


# Verdicts -------------------------------------------------------------------------------------------------------------


class Signs(NamedTuple):
    """+1, -1 or 0 of the blocks of a model, (2, blocks): attention's and the FFN's."""

    known: np.ndarray  # (blocks,) whether both changes are defined
    agreed: np.ndarray  # 0 where the views are not of one sign
    sure: np.ndarray  # 0 also where chance may have made it

    @property
    def scores(self) -> np.ndarray:
        """+1 for each block that breathes, -1 for each that does the opposite."""
        up, down = self.agreed
        return 1.0 * ((up > 0) & (down < 0)) - 1.0 * ((up < 0) & (down > 0))

    @property
    def fraction(self) -> np.ndarray:
        """The sawtooth fraction; the share that is one beyond doubt; the share that is not beyond doubt none."""
        (up, down), (rises, falls) = self.agreed, self.sure
        known = self.known
        if not known.any():
            return np.full(3, math.nan)
        told = (up > 0) & (down < 0), (rises > 0) & (falls < 0), (rises >= 0) & (falls <= 0)
        return np.array([one[known].mean() for one in told])


def _signs(one: Measured, tests: int) -> Signs:
    """`tests`: signs that must be right at 95 % together. So far out that takes the tails of Student's law: to count resamples
    there would take more of them the more blocks there are."""
    known = np.logical_and(*(change.value.isfinite().numpy() for change in one.changes))
    agreed, sure = [], []
    for change, others in zip(one.changes, one.others, strict=True):
        sign = change.value.sign()
        agreed.append((sign * (sign == others.sign()).all(0)).numpy())
        tail = 2 * stats.t.sf((change.value.abs() / change.se).numpy(), max(1, one.n - 1))
        p = torch.maximum(change.p, tests * torch.from_numpy(tail))
        sure.append((sign * breathing.counts(change._replace(p=p), others)).numpy())
    return Signs(known, np.where(known, agreed, 0.0), np.where(known, sure, 0.0))


def _strict(fractions: np.ndarray, found: Sequence[Measured], seed: int) -> Interval:
    """The sawtooth fraction, of `Signs.fraction` by model: between the two bounds, of which the outer ends count over models."""
    if len(found) >= FEWEST:
        value, least, most = (bootstrap(column, of="models", seed=seed) for column in fractions.T)
        return value._replace(low=least.low, high=most.high)
    return Interval(*(float(column.mean()) for column in fractions.T), min(one.n for one in found), "prompts")


def _balance(signs: Sequence[Signs], seed: int) -> tuple[Interval, str]:
    """The mean score of blocks, and what sign flips say; blocks of fewer than six models are units only if those agree."""
    scores = np.stack([np.where(one.known, one.scores, math.nan) for one in signs])
    scores = scores[:, np.isfinite(scores).any(0)]
    if not scores.size:
        return Interval(math.nan, math.nan, math.nan, 0, "blocks"), ""
    many = len(signs) >= FEWEST
    units, of = np.nanmean(scores, axis=1 if many else 0), "models" if many else "blocks"
    p = min(1.0, 2 * min(flips(units, seed), flips(-units, seed)))
    told = f"sign flips of {of}: p = {p:.2g}, which cannot be below {min(1.0, 2 * 0.5 ** len(units)):.2g}"
    measured = bootstrap(units, of=of, seed=seed)
    if not many and p > LEVEL:
        measured = measured._replace(n=len(signs), of="models")
        told += "; the interval is over blocks"
    return measured, told


def _pooled(found: Sequence[Measured], name: str, seed: int) -> Interval:
    """Over models where there are enough of them, else over the prompts: all models see the same ones, and what these do to them
    may go one way, so that the error of the mean is as large as the mean of the errors."""
    values = [float(one.mean[name].value) for one in found]
    if len(found) >= FEWEST:
        return bootstrap(np.array(values), of="models", seed=seed)
    n = min(one.few if name == "different" else one.n for one in found)
    value = float(np.mean(values))
    half = float(np.mean([float(one.mean[name].high - one.mean[name].value) for one in found]))
    return Interval(value, value - half, value + half, n, "prompts")


def _verdicts(found: Sequence[Measured], seed: int) -> list[Verdict]:
    blocks = [len(one.layers) for one in found]  # of a model, where models are the units, else of all: to be right together
    signs = [_signs(one, 2 * (max(blocks) if len(found) >= FEWEST else sum(blocks))) for one in found]
    strict = _strict(np.array([one.fraction for one in signs]), found, seed)
    balance, flipped = _balance(signs, seed)
    lost = "; ".join(line for one in found for line in one.lost)
    means = {
        name: _pooled(found, name, seed) for name in ("attn", "ffn", "twin", "uniform attn", "exchanged attn", "exchanged ffn")
    }

    def verdict(claim: str, quantity: str, name: str, **more: Any) -> Verdict:
        measured = _pooled(found, name, seed)
        if not math.isfinite(measured.value):
            more["why"] = lost
        return Verdict(claim, "S2 9.4", quantity, measured, **more)

    return [
        Verdict(
            "every attention layer raises the dimension, every MLP lowers it",
            "S2 9.4",
            "sawtooth fraction S: share of blocks with b_attn > 0 > b_mlp in all views",
            strict,
            least=1.0,
            null=NULL,
            against="unrelated clouds of one dimension, at most",
            why=f"left out, {lost}" if lost else "",
        ),
        Verdict(
            "blocks rise at attention and fall at the FFN more often than the other way round",
            "S2 9.4",
            "share of blocks that breathe in all views, less the share that do the opposite",
            balance,
            least=0.0,
            null=0.0,
            against="rise and fall exchanged",
            why=flipped or lost,
        ),
        verdict(
            "on average over blocks the dimension rises at attention and falls at the FFN",
            "amplitude, mean (b_attn - b_mlp)/2 over blocks, nats",
            "amplitude",
            least=0.0,
            null=0.0,
            against="no change",
            why=f"b_attn {_told(means['attn'])}, b_mlp {_told(means['ffn'])}: one side alone makes an amplitude too",
        ),
        verdict(
            "it does so too among prompts that end in different words",
            "amplitude with one prompt a last token, nats",
            "different",
            least=0.0,
            null=0.0,
            against="no change",
        ),
        verdict(
            "training makes it breathe",
            "amplitude less that of the untrained twin, nats",
            "trained",
            least=0.0,
            null=0.0,
            against="the untrained twin",
            why="; ".join(filter(None, (f"the twin's amplitude {_told(means['twin'])}", draws(len(found))))),
        ),
        verdict(
            "attention raises the dimension more than noise of its length does",
            "log dimension after attention over that after an isotropic random update, mean over blocks, nats",
            "noise attn",
            least=0.0,
            null=0.0,
            against="an equal-norm random update",
            why=f"over another prompt's update {_told(means['exchanged attn'])}, over uniform attention "
            f"{_told(means['uniform attn'])}",
        ),
        verdict(
            "the FFN lowers the dimension more than a random update of its length does",
            "log dimension after the FFN over that after an isotropic random update, mean over blocks, nats",
            "noise ffn",
            most=0.0,
            null=0.0,
            against="an equal-norm random update",
            why=f"a random update always adds dimensions, and is easily beaten; over another prompt's update "
            f"{_told(means['exchanged ffn'])}",
        ),
        verdict(
            "what attention adds has more dimensions than the cloud it is added to",
            "log dimension of the updates of attention over that of X^l, mean over blocks, nats",
            "update attn",
            least=0.0,
            null=0.0,
            against="no change",
        ),
        verdict(
            "what the MLP adds has fewer dimensions than the cloud that the block began with",
            "log dimension of the updates of the FFN over that of X^l, mean over blocks, nats",
            "update ffn",
            most=0.0,
            null=0.0,
            against="no change",
        ),
    ]


def _told(one: Interval) -> str:
    return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def _charts(subjects: Sequence[Subject], found: Sequence[Measured]) -> dict[str, Curves]:
    names = {"raw": "the stream", "read": "what the next sublayer reads", "untrained": "the stream"}
    rows = []
    for subject, one in zip(subjects, found, strict=True):
        for cloud, dims in one.dims.items():
            line = "untrained" if cloud == "untrained" else subject.name
            rows += [(names[cloud], line, depth, dim) for depth, dim in zip(one.depths, dims, strict=False)]
    dims = (
        pd.DataFrame(rows, columns=["panel", "line", "x", "y"]).groupby(["panel", "line", "x"], sort=False, as_index=False).mean()
    )
    panels = {"attn": "attention", "ffn": "FFN"}
    rows = []
    for one in found:
        bounds = {point: change for point, change in zip(("attn", "ffn"), one.changes, strict=True)}
        for (point, condition), values in one.lines.items():
            for k, (layer, y) in enumerate(zip(one.layers, values, strict=True)):
                ends = bounds[point].low[k], bounds[point].high[k]
                low, high = ends if condition == "trained" and len(found) == 1 else (math.nan, math.nan)
                rows.append((panels[point], condition, layer, y, float(low), float(high)))
    changes = pd.DataFrame(rows, columns=["panel", "line", "x", "y", "low", "high"])
    changes = changes.groupby(["panel", "line", "x"], sort=False, as_index=False).mean()
    return {
        "dimension": Curves(
            dims,
            "TwoNN dimension of the last tokens: l is the state before layer l, l + 1/2 after its attention.",
            "layer",
            "dimension",
        ),
        "change": Curves(
            changes,
            "Change of log dimension at each sublayer, and what it would be with another update in its place; mean over models.",
            "layer",
            "change, nats",
        ),
    }


def _note(subjects: Sequence[Subject], found: Sequence[Measured]) -> str:
    said = [
        "Only differences of dimension at equal numbers of points mean something; TwoNN sees the nearest neighbours alone.",
        "Of unrelated clouds of one dimension 1/3 of the blocks rise and fall, of independent signs 1/4; fewer do in all views.",
        "Isotropic noise has all dimensions of the stream: hardly any update raises the dimension more, and most FFNs do less; "
        "another prompt's update has the law of the true one and nothing to do with the token.",
    ]
    if any(one.parallel for one in found):
        said.append("Blocks are parallel: both changes are from the block's input, and no read cloud of a half is known.")
    if any(len(one.layers) < subject.model.settings.depth for subject, one in zip(subjects, found, strict=True)):
        said.append("Layers without an FFN are left out.")
    said += [f"Without a dimension, and left out with the changes beside it: {line}." for one in found for line in one.lost]
    return "\n".join(said)
