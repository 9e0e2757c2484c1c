"""Is it harmless to normalise queries, and dangerous to normalise keys?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from emformer import parts
from emformer.attention import Attention
from emformer.geometry.disturbance import overturned, reversed_pairs
from emformer.intervals import Interval, Statistic, first, over_models
from emformer.kernels.base import scores
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.positions import KeyNorm, PositionMap, QueryNorm
from emformer.studies.lines import draws, unlike
from emformer.studies.ratios import log_difference, log_ratio
from emformer.studies.subjects import AT_ONCE, Subject, Tell, part_of
from emformer.surgery import skip
from emformer.surgery.copies import Which, copied, maps, rebuilt
from emformer.theory.outcome import Curves
from emformer.trajectory import Trajectory
from emformer.types import Index, KeyIndex, Keys, Queries
from emformer.verdicts import Findings, Verdict

Side = Literal["query", "key"]
SIDES: tuple[Side, Side] = ("query", "key")
SHARE = 1e-3  # of rows or pairs: one in a thousand is some
HARM = 0.1  # of what it costs to leave attention out; ours, as S2 gives no number
Column = tuple[str, Side]
Gains = Mapping[tuple[Side, int], Tensor]  # of a side and a layer: (H,)


@dataclass(frozen=True)
class QKNorm(parts.Study):
    """A norm put before all positions on one side of a trained model: u -> g u/|u|, or v -> g v/|v|. math H.1, S2 4.

    s_ij/|u_i| is a temperature of its own for each query: which keys it prefers, and in which order, stays exactly, through
    rotary positions too. s_ij/|v_j| is no linear function of the key any more, and the order of a row's keys changes as far as
    keys differ in length. Order is compared on the same clouds, in float64; what it costs on the model with the norm in every
    layer: KL of the output, and the rise of the loss where the model predicts the next token. Both sides get the gain g_h, one a
    head, that keeps the size of its scores: their variance within rows, which is all of them that softmax sees, on these prompts.
    What it costs to leave attention out is the scale of harm.

    The norm comes without training: a model that learned with it may do as well. Its gain is a number; one gain a coordinate, as
    trained norms have, changes M into L diag(g) R^T on either side, which is no temperature.
    """

    name: ClassVar[str] = "qk-norm"
    title: ClassVar[str] = "is normalising queries harmless, and normalising keys dangerous?"

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        for subject in subjects:
            _check(subject.model, subject.name)
        tables = []
        for k, subject in enumerate(subjects):
            told = part_of(tell, k / len(subjects), (k + 1) / len(subjects))
            tables.append(_measured(subject, told))
        found = _Found(tables, [subject.groups.numpy() for subject in subjects], subjects[0].seed)
        note = [*_notes(found), unlike(subjects)]
        return Findings(list(_verdicts(found)), _charts(found), "\n".join(filter(None, note)))


def _check(model: Emformer, name: str) -> None:
    for layer in range(model.settings.depth):
        attention = model.layer(layer).attention
        if attention.kernel.reads_factors:
            raise UserError(
                f"{name}: the kernel of layer {layer} reads queries and keys beside their product, so that a norm is no "
                "temperature; choose a model whose weights are made from scores."
            )
        if any(position.reads_factors and not position.planes for position in maps(attention)):
            raise UserError(
                f"{name}: a position of layer {layer} normalises queries or keys already, or does something else that is no "
                "rotation; choose a model without."
            )


# The norm -------------------------------------------------------------------------------------------------------------


class Gain(PositionMap):
    """u_i -> g_h u_i: scores of head h g_h times as large."""

    acts_on_keys = False
    reads_factors = True
    gain: Tensor

    def __init__(self, gain: Tensor):
        super().__init__()
        self.register_buffer("gain", gain)

    def forward(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]:
        return self.gain.view(-1, 1, 1) * u, v


@torch.no_grad()
def normalised(model: Emformer, side: Side, gains: Gains, layers: Which = None) -> Emformer:
    """The model with u -> g_h u/|u| (query) or v -> g_h v/|v| (key) before every position, in some layers or in all."""
    copy, chosen, _ = copied(model, f"{side}s normalised", layers, apart=True)
    for layer in chosen:
        block = copy.layer(layer)
        block.attention = _normalised(block.attention, side, gains[side, layer])
    return copy


def _normalised(attention: Attention, side: Side, gain: Tensor) -> Attention:
    rank = attention.form.rank
    norm = QueryNorm().build(rank) if side == "query" else KeyNorm(1 / math.sqrt(rank)).build(rank)
    return rebuilt(attention, positions=[norm, Gain(gain), *maps(attention)])


# Measurement ----------------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """What one model shows: numbers of its prompts (P,) by column; `layers`: the same (P, L) of single layers."""

    values: Mapping[Column, np.ndarray]
    layers: Mapping[Column, np.ndarray]
    spreads: Mapping[Side, float]  # of the lengths of queries and of keys: sd/mean


@torch.no_grad()
def _measured(subject: Subject, tell: Tell) -> _Table:
    model, twin = (deepcopy(net).double() for net in (subject.model, subject.untrained()))
    gains, lengths, spreads = _gains(subject, model)
    tell(0.2, f"{subject.name}, size of scores")
    order = _joined([_order(one, gains) for one in subject.trajectories(model)])
    tell(0.5, f"{subject.name}, order of keys")
    depth = model.settings.depth
    costs = {side: _costs(subject, model, normalised(model, side, gains)) for side in SIDES}
    values = {(name, side): cost for side in SIDES for name, cost in costs[side].items()}
    values |= {column: torch.from_numpy(one).nanmean(1).numpy() for column, one in order.items()}
    values |= {("lengths", side): _costs(subject, model, normalised(model, side, lengths))["output"] for side in SIDES}
    none = _costs(subject, model, skip(model, "attn"))["output"]
    values |= {("none", side): none for side in SIDES}
    alone = {
        side: np.stack([_costs(subject, model, normalised(model, side, gains, k))["output"] for k in range(depth)], -1)
        for side in SIDES
    }
    tell(0.9, f"{subject.name}, output")
    plain, *_ = _gains(subject, twin)
    values |= {("untrained", side): _costs(subject, twin, normalised(twin, side, plain))["output"] for side in SIDES}
    tell(1.0, f"{subject.name}, untrained")
    return _Table(values, order | {("output", side): one for side, one in alone.items()}, spreads)


def _gains(subject: Subject, model: Emformer) -> tuple[Gains, Gains, dict[Side, float]]:
    """Gains that keep the variance of scores within rows, of every head, on the clouds of these prompts; gains that keep the mean
    length of queries, or of keys; and how much lengths differ within a prompt, layer and head, sd/mean."""
    totals: dict[tuple[str, int], Tensor] = {}
    spreads: dict[Side, list[Tensor]] = {"query": [], "key": []}
    gains: dict[tuple[Side, int], Tensor] = {}
    means: dict[tuple[Side, int], Tensor] = {}
    for clean in subject.trajectories(model):
        for k in clean.attentions:
            layer, attention, y, i = _at(clean, k)
            heads, visible = attention.form.heads, clean.visible(k)
            one = torch.ones(heads, dtype=y.dtype, device=y.device)
            made = {"": attention} | {side: _normalised(attention, side, one) for side in SIDES}
            for name, other in made.items():
                totals[name, layer] = totals.get((name, layer), 0) + _within(scores(*other.factors(y, i)), visible)
            vectors: dict[Side, Tensor] = {"query": attention.queries(y), "key": attention.keys(y)}
            for side, x in vectors.items():
                length = x.norm(dim=-1)
                spreads[side].append((length.std(-1) / length.mean(-1)).flatten())
                mean = length.mean(-1).sum(0).repeat_interleave(heads // length.shape[1]) / len(subject.tokens)
                means[side, layer] = means.get((side, layer), 0) + mean
    for side in SIDES:
        for layer in {layer for _, layer in totals}:
            size = (totals["", layer] / totals[side, layer]).sqrt()
            gains[side, layer] = torch.where(size.isfinite(), size, 1.0)  # a head without scores
    return gains, means, {side: float(torch.cat(one).nanmean()) for side, one in spreads.items()}


def _within(s: Tensor, visible: Tensor) -> Tensor:
    """(H,): the sum over rows of the variance of the scores (b, H, T, S) among the keys that a row sees."""
    seen = visible.to(s)
    count = seen.sum(-1).clamp(min=1)
    mean = (s * seen).sum(-1) / count
    return ((s - mean.unsqueeze(-1)).square() * seen).sum(-1).div(count).sum((0, 2))


def _at(clean: Trajectory, k: int) -> tuple[int, Attention, Tensor, Tensor]:
    step = clean.steps[k]
    return step.layer, clean.block(k).attention, step.read, torch.arange(step.read.shape[1], device=step.read.device)


def _order(clean: Trajectory, gains: Gains) -> dict[Column, np.ndarray]:
    """Of every prompt and layer (b, L), mean over heads and rows: the share of rows whose first key is another one than before,
    and of pairs of keys whose order is reversed."""
    found: dict[Column, list[Tensor]] = {}
    for k in clean.attentions:
        layer, attention, y, i = _at(clean, k)
        visible, before = clean.visible(k), scores(*attention.factors(y, i))
        for side in SIDES:
            after = scores(*_normalised(attention, side, gains[side, layer]).factors(y, i))
            found.setdefault(("first", side), []).append(overturned(before, after, visible).flatten(1).nanmean(1))
            found.setdefault(("pairs", side), []).append(reversed_pairs(before, after, visible).flatten(1).nanmean(1))
    return {column: torch.stack(one, -1).cpu().numpy() for column, one in found.items()}


def _joined(lots: Sequence[Mapping[Column, np.ndarray]]) -> dict[Column, np.ndarray]:
    return {column: np.concatenate([lot[column] for lot in lots]) for column in lots[0]}


def _costs(subject: Subject, model: Emformer, other: Emformer) -> dict[str, np.ndarray]:
    """KL (P,) of the output, mean over tokens, and the rise of the loss where it is that of the next token, else nan."""
    output, loss = [], []
    next_token = subject.loaded.config.training.objective.covers_text
    for some in subject.batches(max(1, AT_ONCE // 4)):
        tokens = subject.tokens[some]
        old, new = (net(tokens).log_softmax(-1) for net in (model, other))
        output.append((old.exp() * (old - new)).sum(-1).clamp(min=0).mean(-1))
        both = [functional.nll_loss(x[:, :-1].mT, tokens[:, 1:], reduction="none").mean(-1) for x in (old, new)]
        loss.append(both[1] - both[0] if next_token else torch.full_like(both[0], math.nan))
    return {"output": torch.cat(output).cpu().numpy(), "loss": torch.cat(loss).cpu().numpy()}


# Findings -------------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    tables: Sequence[_Table]
    groups: Sequence[np.ndarray]
    seed: int

    def interval(self, columns: Sequence[Column], statistic: Statistic = first) -> Interval:
        lots = [np.stack([table.values[column] for column in columns], -1) for table in self.tables]
        return over_models(lots, statistic, groups=self.groups, seed=self.seed)


def _ratio(means: np.ndarray) -> np.ndarray:
    """The second column over the first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[:, 1] / means[:, 0]


def _difference(means: np.ndarray) -> np.ndarray:
    return means[:, 1] - means[:, 0]


def _verdicts(found: _Found) -> Iterator[Verdict]:
    output: list[Column] = [("output", side) for side in SIDES]
    untrained: list[Column] = [("untrained", side) for side in SIDES]
    costs = " and ".join(f"{found.interval([column]).value:.3g}" for column in output)
    one = found.interval([("lengths", side) for side in SIDES], log_ratio)
    kept = f"the log ratio is {one.value:.3g} [{one.low:.3g}, {one.high:.3g}]"
    yield Verdict(
        "normalising keys costs more than normalising queries",
        "S2 4",
        "log KL(output) of normalised keys over that of normalised queries, scores of one size",
        found.interval(output, log_ratio),
        least=0.0,
        null=0.0,
        against="equal costs",
        why=f"queries and keys cost {costs} nats a token; with mean lengths kept instead of the size of scores, {kept}",
    )
    yield Verdict(
        "training widens what normalised keys cost beyond normalised queries",
        "S2 4",
        "log KL(output) of keys over queries, less that of untrained weights",
        found.interval([*output, *untrained], log_difference),
        least=0.0,
        null=0.0,
        against=f"untrained weights, whose log ratio is {found.interval(untrained, log_ratio).value:.3g}",
        why=draws(len(found.tables)),
    )
    for side, claim, least, most in (
        ("query", "normalising queries is harmless", -math.inf, HARM),
        ("key", "normalising keys is dangerous", HARM, math.inf),
    ):
        yield Verdict(
            claim,
            "S2 4",
            f"KL(output) over that of a model without attention; {HARM:g} and more is harm",
            found.interval([("none", side), ("output", side)], _ratio),
            least=least,
            most=most,
            null=0.0,
            against="vectors of one length",
            why="where harm begins is ours to say: S2 gives no number",
        )
    for name, what, quantity in (
        ("first", "first key", "share of rows whose highest score is that of another key"),
        ("pairs", "order of keys", "share of pairs of keys in a row that change their order"),
    ):
        # a positive number times each row, which no order notices
        yield Verdict(
            f"normalising queries leaves the {what} of every row as it is",
            "math H.1",
            quantity,
            found.interval([(name, "query")]),
            most=0.0,
            check=True,
        )
        yield Verdict(
            f"normalising keys changes the {what} of rows",
            "math H.1",
            quantity,
            found.interval([(name, "key")]),
            least=SHARE,
            null=0.0,
            against="keys of one length",
        )
    yield Verdict(
        "normalising keys raises the loss more than normalising queries",
        "S2 4",
        "rise of the loss with normalised keys less that with normalised queries, nats a token",
        found.interval([("loss", side) for side in SIDES], _difference),
        least=0.0,
        null=0.0,
        against="equal rises",
        why=_loss(found),
    )


def _loss(found: _Found) -> str:
    rises = [found.interval([("loss", side)]).value for side in SIDES]
    if any(map(math.isnan, rises)):
        return "the loss of the next token is not what this model was trained for"
    return f"it rises by {rises[0]:.3g} with queries and by {rises[1]:.3g} with keys"


def _charts(found: _Found) -> dict[str, Curves]:
    panels = {
        "output": "KL of the output, the norm in this layer alone",
        "first": "rows whose first key changes",
        "pairs": "pairs of keys that change their order",
    }
    lines = []
    for name, panel in panels.items():
        for side in SIDES:
            one = ("queries", "keys")[SIDES.index(side)]
            depth = min(table.layers[name, side].shape[1] for table in found.tables)
            for layer in range(depth):
                lots = [table.layers[name, side][:, layer] for table in found.tables]
                told = over_models(lots, groups=found.groups, seed=found.seed)
                lines.append((panel, f"{one} normalised", layer, told.value, told.low, told.high))
    frame = pd.DataFrame(lines, columns=["panel", "line", "x", "y", "low", "high"])
    caption = "What a norm on one side does, layer by layer; nats, and shares on the same clouds. Scores keep their size."
    return {"layers": Curves(frame, caption, "layer", "nats, or share")}


def _notes(found: _Found) -> Iterator[str]:
    told = [np.mean([table.spreads[side] for table in found.tables]) for side in SIDES]
    yield (
        f"Lengths within a prompt and head differ by {told[0]:.2f} of their mean for queries and by {told[1]:.2f} for keys "
        "(sd/mean): a norm does nothing where lengths are one."
    )
    yield (
        "The other way round, a norm on keys leaves the order of queries in every column as it is, and one on queries does not: "
        "what tells the sides apart is that a row sums to one over keys."
    )
