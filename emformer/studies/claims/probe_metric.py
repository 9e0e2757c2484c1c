"""Is the metric (keys) more fragile than the probe (queries)? In every gauge, and in none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.attention import Attention
from emformer.geometry import disturbance
from emformer.intervals import Interval, Statistic, first, over_models
from emformer.model import Emformer
from emformer.observables.energy import temperature
from emformer.operators import Operator
from emformer.parts import UserError
from emformer.studies.lines import draws as twins
from emformer.studies.lines import unlike
from emformer.studies.ratios import log_difference, log_ratio
from emformer.studies.subjects import Subject, Tell, part_of
from emformer.surgery import canonical, noise
from emformer.surgery.copies import Wrapper, copied, free, generator, maps, plain, rebuilt, set_to
from emformer.theory.outcome import Curves
from emformer.trajectory import Trajectory, capture
from emformer.types import Cloud, Keys, Queries
from emformer.verdicts import Findings, Verdict

SIGMAS = (0.01, 0.05, 0.1, 0.2)  # of S2's noise, and of noise on M; of the others the first two
GAUGE = 2.0  # c of the other gauge (q/c, ck)
PAIRS = {  # of noise on the probe and noise on the metric, and what charts call them; the first three are gauges
    "raw": "raw q, k",
    "other": "raw q/2, 2k",
    "balanced": "balanced q, k",
    "relative": "relative q, k",
    "M": "(I + E) M, M (I + E)",
    "tokens": "y read as query, as key",
}
UNTRAINED = "untrained M"
WHOLE = ("raw", "M")  # pairs that are measured at every sigma
# Queries and keys are r^p u and r^p' v, s = u . v: sqrt(r) u as S2 has them; in the balanced gauge both have the same share.
SHARES = {"raw": (0.5, 0.0), "other": (0.5, 0.0), "balanced": (0.25, 0.25)}
BUDGET = 1 << 22  # numbers in an array over rows and pairs of keys

Side = Literal[0, 1]  # probe, metric
SIDES: tuple[Side, Side] = (0, 1)
Column = tuple[str, str, Side, float]  # pair, "output" or "attention" or "theory", side, sigma


def sigmas(pair: str) -> tuple[float, ...]:
    """Sizes of the noise at which a pair is measured."""
    return SIGMAS if pair in WHOLE else SIGMAS[:2]


@dataclass(frozen=True)
class ProbeMetric(parts.Study):
    """Noise of one size on the probe and on the metric, and what each costs: KL of the output, and of attention's rows on the
    same clouds, in float64. S2 9.1 made controlled, math H.1.

        raw        q + sigma n against k + sigma n, s = q . k/sqrt(r), as S2 did it, in the gauge that the weights are in; and
                   again in the gauge (q/2, 2k), in which every output is the same
        balanced   the same in the canonical gauge, in which queries and keys are of one size
        relative   sigma rms(q) against sigma rms(k), vector by vector
        M          (I + E) M against M (I + E), E iid N(0, sigma^2/d): of one relative size, and the same in every gauge
        tokens     y + sigma |y|/sqrt(d) n, read as a query only or as a key only, values clean

    Only the last two are of the model and not of the gauge of its factors. (The gain of a norm could still move into M: y is
    what attention reads, gain included.) Noise of small sigma has KL ~ sigma^2, with coefficients of math H.1 that are drawn
    beside: the theory of attention's rows is exact to second order, through RoPE too. Raw noise and noise on M have sigma .01,
    .05, .1 and .2, the others .01 and .05.

    Draws of noise and prompts are both random. Each draw is shown prompts of its own, so that a draw with its prompts is one
    unit, independent of the next, and the interval holds both; where prompts are fewer than draws, a prompt with its draws is.

    Cost: about 3/4 minute a model of d = 128, L = 4, H = 4 with 80 prompts of 64 tokens; twice that for 40 draws.

    Args:
        draws: of the noise.
    """

    name: ClassVar[str] = "probe-metric"
    title: ClassVar[str] = "is the metric (keys) more fragile than the probe (queries)?"
    prompts: ClassVar[int] = 80

    draws: int = 20

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise UserError(f"ProbeMetric: draws is {self.draws}; choose at least 2 draws of noise, 20 for an interval to trust.")

    @classmethod
    def examples(cls) -> Sequence[ProbeMetric]:
        return [cls(draws=2)]

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        tables = []
        for k, subject in enumerate(subjects):
            told = part_of(tell, k / len(subjects), (k + 1) / len(subjects))
            tables.append(_measured(subject, self.draws, 100_003 * subject.seed + 1009 * k, told))
        found = _Found(tables, subjects[0].seed)
        note = [*_notes(found), unlike(subjects)]
        return Findings(list(_verdicts(found)), _charts(found), "\n".join(filter(None, note)))


# Noise ----------------------------------------------------------------------------------------------------------------

Noisy = Callable[[float, int], Emformer]


def _absolute(model: Emformer, shares: tuple[float, float], side: Side) -> Noisy:
    """sigma n on q = r^p u, or on k = r^p' v: (p, p') are `shares` of s = u . v = q . k/sqrt(r), and sum to 1/2."""
    ranks: dict[int, list[int]] = {}
    for layer in range(model.settings.depth):
        ranks.setdefault(model.layer(layer).attention.form.rank, []).append(layer)
    on: Literal["query", "key"] = ("query", "key")[side]

    def noisy(sigma: float, seed: int) -> Emformer:
        found = model
        for rank, layers in ranks.items():
            found = noise(found, sigma * rank ** -shares[side], on, seed, relative=False, layers=layers)
        return found

    return noisy


@torch.no_grad()
def regauged(model: Emformer, c: float) -> Emformer:
    """The same function with the queries q/c and the keys ck, the factors of every form written out. math A.3.

    Raises:
        UserError: where something reads the factors that is no rotation: queries and keys then have no gauge.
    """
    copy, chosen, _ = copied(model, f"gauge q/{c:g}, {c:g}k", None)
    for layer in chosen:
        block = copy.layer(layer)
        old, form = block.attention, block.attention.form
        if not _linear(old):
            raise UserError("the kernel or a position reads the factors, so that queries and keys have no other gauge.")
        right = form.right_rows()
        if right is None:
            right = torch.eye(form.dim, dtype=form.left_rows().dtype, device=form.left_rows().device).unsqueeze(0)
        new = rebuilt(old, form=plain(form.left_rows() / c, right * c, form), content=free(old.content))
        if new.biases is not None:
            set_to(new.biases.left, new.biases.left / c)
            if new.biases.right is not None:
                set_to(new.biases.right, new.biases.right * c)
        block.attention = new
    return copy


def _linear(attention: Attention) -> bool:
    """Whether scores are bilinear in queries and keys, and positions turn these and do no more."""
    return not attention.kernel.reads_factors and all(p.planes or not p.reads_factors for p in maps(attention))


@torch.no_grad()
def stirred(model: Emformer, side: Side, sigma: float, seed: int) -> Emformer:
    """y_i + sigma |y_i|/sqrt(d) n_i as a query (side 0) or as a key (1), n ~ N(0, I) one draw a layer and token that all heads
    share; contents are read from y. The last surgery: one on M would forget it. For whole sequences."""
    copy, chosen, _ = copied(model, f"noise {sigma:g} on y as a {'key' if side else 'query'}, seed {seed}", None, apart=True)
    for layer in chosen:
        block = copy.layer(layer)
        form = Stirred(block.attention.form, sigma, side, seed, layer)
        block.attention = rebuilt(block.attention, form=form, content=free(block.attention.content))
    return copy


class Stirred(Wrapper):
    """A form that reads noisy tokens on one side; a function of the seed, the layer and the size of the batch."""

    def __init__(self, inner: Operator, sigma: float, side: Side, seed: int, layer: int):
        super().__init__(inner)
        self.sigma, self.side, self.key = sigma, side, ("noise", "tokens", side, seed, layer)

    def left(self, x: Cloud) -> Queries:
        return self.inner.left(x if self.side else self._noisy(x))

    def right(self, x: Cloud) -> Keys:
        return self.inner.right(self._noisy(x) if self.side else x)

    def _noisy(self, x: Tensor) -> Tensor:
        n = torch.randn(x.shape, generator=generator(*self.key), dtype=torch.float64).to(x)
        return x + self.sigma * x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) * n


# Measurement ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _gauges(model: Emformer) -> tuple[dict[str, Emformer], dict[str, str]]:
    """The model in every gauge that it has, and why it has not the others."""
    found, missing = {"raw": model}, {}
    for name, made in (
        ("other", lambda: regauged(model, GAUGE)),
        ("balanced", lambda: canonical(regauged(model, 1.0))),
    ):
        try:
            found[name] = made()
        except UserError as error:
            missing[name] = str(error)
    return found, missing


def _noises(gauges: Mapping[str, Emformer]) -> Iterator[tuple[str, Side, Noisy]]:
    """Every kind of noise: (pair, side, what makes a noisy model of sigma and a seed)."""
    model = gauges["raw"]
    for side in SIDES:
        for name, net in gauges.items():
            yield name, side, _absolute(net, SHARES[name], side)
        yield "relative", side, partial(_on, model, ("query", "key")[side])
        yield "M", side, partial(_on, model, ("left", "right")[side])
        yield "tokens", side, partial(stirred, model, side)


def _on(model: Emformer, on: Literal["left", "right", "query", "key"], sigma: float, seed: int) -> Emformer:
    return noise(model, sigma, on, seed)


class _Clean(NamedTuple):
    """What a model does with some prompts when nothing disturbs it."""

    trajectory: Trajectory
    log_p: Tensor  # (b, T, V)
    rows: bool  # whether every kernel has rows of positive weights that sum to one

    @classmethod
    def of(cls, model: Emformer, tokens: Tensor) -> _Clean:
        kernels = [model.layer(k).attention.kernel for k in range(model.settings.depth)]
        rows = all(kernel.normalised and not (kernel.sparse or kernel.signed) for kernel in kernels)
        return cls(capture(model, tokens), model(tokens).log_softmax(-1), rows)

    def output(self, net: Emformer) -> np.ndarray:
        """KL (b,) of what another model says to the same prompts, mean over tokens."""
        assert self.trajectory.tokens is not None
        other = net(self.trajectory.tokens).log_softmax(-1)
        return (self.log_p.exp() * (self.log_p - other)).sum(-1).clamp(min=0).mean(-1).cpu().numpy()

    def attention(self, net: Emformer) -> np.ndarray:
        """KL (b,) of the rows of its attention on the same clouds, mean over layers, heads and rows."""
        costs = []
        for k in self.trajectory.attentions:
            step, a = self.trajectory.steps[k], self.trajectory.pattern(k)
            b = net.layer(step.layer).attention.weights(step.read, torch.arange(a.shape[-1], device=a.device))
            costs.append(disturbance.divergence(a, b).mean((1, 2)))
        return torch.stack(costs).mean(0).cpu().numpy()


class _Table(NamedTuple):
    """What one model shows: `values` by column, each of them a prompt under a draw; `units` equal for those that share a draw or
    text, `by`: what a unit is. `same`: the largest KL of an output in the other gauge. `missing`: gauges it has not, and why."""

    values: Mapping[Column, np.ndarray]
    units: np.ndarray
    by: str
    same: float
    missing: Mapping[str, str]


@torch.no_grad()
def _measured(subject: Subject, draws: int, first: int, tell: Tell) -> _Table:
    model, twin = (deepcopy(net).double() for net in (subject.model, subject.untrained()))
    gauges, missing = _gauges(model)
    noises = [*_noises(gauges), *((UNTRAINED, side, partial(_on, twin, ("left", "right")[side])) for side in SIDES)]
    lots, by = designed(subject.groups.numpy(), draws)
    tables: list[dict[Column, np.ndarray]] = []
    units: list[int] = []
    same = 0.0 if "other" in gauges else math.nan
    for draw, (unit, prompts) in enumerate(lots):
        tokens, seed = subject.tokens[torch.from_numpy(prompts)], first + draw
        clean, plainly = _Clean.of(model, tokens), _Clean.of(twin, tokens)
        values: dict[Column, np.ndarray] = {}
        for pair, side, noisy in noises:
            undisturbed = plainly if pair == UNTRAINED else clean
            for sigma in sigmas(pair):
                net = noisy(sigma, seed)
                values[pair, "output", side, sigma] = undisturbed.output(net)
                if undisturbed.rows:
                    values[pair, "attention", side, sigma] = undisturbed.attention(net)
        for (pair, side), cost in theory(clean.trajectory, gauges).items():
            values |= {(pair, "theory", side, sigma): sigma**2 * cost for sigma in sigmas(pair)}
        if "other" in gauges:
            same = max(same, float(clean.output(gauges["other"]).max()))
        tables.append(values)
        units += [unit] * len(prompts)
        tell((draw + 1) / len(lots), f"{subject.name}, draw {draw + 1}")
    columns = {column: np.concatenate([values[column] for values in tables]) for column in tables[0]}
    return _Table(columns, np.array(units), by, same, missing)


def designed(groups: np.ndarray, draws: int) -> tuple[list[tuple[int, np.ndarray]], str]:
    """For each draw (unit, prompts): prompts (P,) are dealt to draws so that no text is seen by two of them; where there are
    fewer texts than draws, each draw sees one, and units are texts. Also what units are, "draws" or "prompts"."""
    _, text = np.unique(groups, return_inverse=True)
    count = int(text.max()) + 1
    if count >= draws:
        return [(draw, np.flatnonzero(text % draws == draw)) for draw in range(draws)], "draws"
    return [(draw % count, np.flatnonzero(text == draw % count)) for draw in range(draws)], "prompts"


# Theory ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def theory(clean: Trajectory, gauges: Mapping[str, Emformer]) -> dict[tuple[str, Side], np.ndarray]:
    """KL (b,) of attention's rows to second order, mean over layers, heads and rows, over sigma^2: by pair and side.

    Nothing where a kernel is no softmax of its scores, or a position is no rotation. Cost a head: rows S^2 r.
    """
    layers = range(gauges["raw"].settings.depth)
    if any(temperature(net.layer(k).attention.kernel) is None for net in gauges.values() for k in layers):
        return {}
    if not all(_linear(gauges["raw"].layer(k).attention) for k in layers):
        return {}
    told: dict[tuple[str, Side], list[Tensor]] = {}
    for name, net in gauges.items():
        for k in clean.attentions:
            step = clean.steps[k]
            attention = net.layer(step.layer).attention
            for pair, side, cost in _costs(attention, clean.pattern(k), step.read, name):
                told.setdefault((pair, side), []).append(cost)
    return {key: torch.stack(costs).mean(0).cpu().numpy() for key, costs in told.items()}


def _costs(attention: Attention, a: Tensor, y: Tensor, gauge: str) -> Iterator[tuple[str, Side, Tensor]]:
    """(pair, side, KL (b,)) of one head after another's rows, at sigma = 1."""
    form, beta = attention.form, temperature(attention.kernel)
    assert beta is not None
    i = torch.arange(y.shape[1], device=y.device)
    u, v = attention.factors(y, i)
    v = v.repeat_interleave(form.heads // form.groups, 1)
    r, d, size = form.rank, form.dim, y.square().sum(-1)
    for h in range(form.heads):
        p, q, k = a[:, h], u[:, h], v[:, h]
        yield gauge, 0, disturbance.query_noise(p, k, r ** -SHARES[gauge][0], beta).mean(-1)
        yield gauge, 1, disturbance.key_noise(p, q, r ** -SHARES[gauge][1], beta).mean(-1)
        if gauge != "raw":
            continue
        length, along = q.square().sum(-1, keepdim=True), k.square().sum(-1).unsqueeze(-2)
        yield "relative", 0, (length.squeeze(-1) / r * disturbance.query_noise(p, k, 1.0, beta)).mean(-1)
        yield "relative", 1, disturbance.independent_noise(p, length * along / r, beta).mean(-1)
        left, right, key = _on_tokens(attention, h, p, q, k, y, beta)
        yield "M", 0, (size / d * left).mean(-1)
        yield "tokens", 0, (size / d * left).mean(-1)
        yield "M", 1, (right / d).mean(-1)
        yield "tokens", 1, (key / d).mean(-1)


def _on_tokens(
    attention: Attention, h: int, p: Tensor, q: Tensor, k: Tensor, y: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """KL (b, T) of head h for noise n ~ N(0, I) on y_i as a query, for E ~ N(0, 1) in M E, and for n_j on y_j as keys.

    With positions P_i, Q_j on factors, s_ij = (P_i u_i) . (Q_j v_j): its gradient in y_i is L z_ij with z = P_i^T Q_j v_j, and
    in y_j it is R t_ij with t = Q_j^T P_i u_i. In coordinates in which L and R are isometries nothing is wider than r.
    """
    form, i = attention.form, torch.arange(y.shape[1], device=y.device)
    right = form.right_rows()
    inner, outer = _isometry(form.left_rows()[h]), _isometry(None if right is None else right[h // (form.heads // form.groups)])
    basis = torch.eye(form.rank, dtype=y.dtype, device=y.device).view(form.rank, 1, 1, form.rank)
    basis = basis.expand(-1, -1, len(i), -1)
    on_queries, on_keys = (
        x.squeeze(1) if turn is None else torch.einsum("wa,aic->wic", turn, x.squeeze(1))
        for turn, x in zip((inner, outer), attention.place(basis, basis, i, i), strict=True)
    )  # (w, T, r): coordinates w of P_i^T, of Q_j^T
    gram = y @ y.mT
    found = []
    for rows in _slices(len(i), max(1, BUDGET // (len(y) * len(i) * max(len(i), form.rank)))):
        some = p[:, rows]
        z = torch.einsum("aic,bjc->bija", on_queries[:, rows], k)
        t = torch.einsum("ajc,bic->bija", on_keys, q[:, rows])
        found.append(
            (
                disturbance.query_noise(some.unsqueeze(-2), z, 1.0, beta).squeeze(-1),
                disturbance.score_noise(some, t @ t.mT * gram.unsqueeze(1), beta),
                disturbance.independent_noise(some, t.square().sum(-1) * y.square().sum(-1).unsqueeze(1), beta),
            )
        )
    left, on_form, on_key = (torch.cat(one, 1) for one in zip(*found, strict=True))
    return left, on_form, on_key


def _isometry(rows: Tensor | None) -> Tensor | None:
    """W (., r) with |W z| = |L z| for the rows (r, d) of L^T; None for the identity."""
    return None if rows is None else torch.linalg.qr(rows.mT, mode="r").R


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


# Findings -------------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    tables: Sequence[_Table]
    seed: int

    def interval(self, columns: Sequence[Column], statistic: Statistic) -> Interval:
        """Of a statistic of the mean costs in these columns; undefined where a model lacks one."""
        lots = []
        for table in self.tables:
            nothing = np.full(len(table.units), math.nan)
            lots.append(np.stack([table.values.get(column, nothing) for column in columns], -1))
        found = over_models(lots, statistic, groups=[table.units for table in self.tables], seed=self.seed)
        by = {table.by for table in self.tables}
        return found._replace(of="draws") if found.of == "prompts" and by == {"draws"} else found

    def ratio(self, pair: str, sigma: float, where: str = "output") -> Interval:
        """log of what noise on the metric costs over what noise on the probe costs."""
        return self.interval([(pair, where, side, sigma) for side in SIDES], log_ratio)

    def missing(self, *gauges: str) -> str:
        return next((table.missing[name] for name in gauges for table in self.tables if name in table.missing), "")


def _dip(means: np.ndarray) -> np.ndarray:
    """(R, 6) -> (R,): the middle one of three log ratios less the smaller of its neighbours."""
    low, middle, high = (log_ratio(means[:, k : k + 2]) for k in (0, 2, 4))
    return middle - np.minimum(low, high)


def _slope(means: np.ndarray) -> np.ndarray:
    """(R, 2 n) -> (R,): of n slopes of log KL in log sigma, between the smallest two, the one that is furthest from 2."""
    low, high = means[:, ::2], means[:, 1::2]
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = (np.log(high) - np.log(low)) / math.log(SIGMAS[1] / SIGMAS[0])
    return np.take_along_axis(slopes, np.abs(slopes - 2).argmax(1)[:, None], 1)[:, 0]


def _verdicts(found: _Found) -> Iterator[Verdict]:
    least = SIGMAS[0]
    quantity_of = "log KL(output) of noise on the {} over that on the {}, sigma .01"
    yield Verdict(
        "the metric is more fragile than the probe, in no gauge: M (I + E) costs more than (I + E) M",
        "S2 9.1",
        quantity_of.format("right of M", "left of M"),
        found.ratio("M", least),
        least=0.0,
        null=0.0,
        against="equal costs",
    )
    both = [(pair, "output", side, least) for pair in ("M", UNTRAINED) for side in SIDES]
    untrained = found.ratio(UNTRAINED, least).value
    yield Verdict(
        "training makes the metric more fragile against the probe than it is at random, in no gauge",
        "S2 9.1",
        f"{quantity_of.format('right of M', 'left of M')}, less that of untrained weights",
        found.interval(both, log_difference),
        least=0.0,
        null=0.0,
        against=f"untrained weights, whose log ratio is {untrained:.3f}",
        why=twins(len(found.tables)),
    )
    for pair, claim, quantity in (
        (
            "raw",
            "noise of one absolute size costs more on keys than on queries, in the gauge of the weights",
            ("keys", "queries"),
        ),
        ("balanced", "noise of one absolute size costs more on keys than on queries, in the balanced gauge", ("keys", "queries")),
        ("relative", "noise of one relative size costs more on keys than on queries", ("keys", "queries")),
        ("tokens", "a noisy token costs more read as a key than read as a query", ("y as a key", "y as a query")),
    ):
        yield Verdict(
            claim,
            "S2 9.1",
            quantity_of.format(*quantity),
            found.ratio(pair, least),
            least=0.0,
            null=0.0,
            against="equal costs",
            why=found.missing(pair) or ("a number of the gauge, not of the model" if pair == "raw" else ""),
        )
    gauges = [(pair, "output", side, least) for pair in ("other", "raw") for side in SIDES]
    yield Verdict(
        "the ratio of raw key to raw query noise is no fact of the model: it goes as c^-4 with the gauge (q/c, ck)",
        "math A.3, H.1",
        f"log of the ratio in the gauge (q/2, 2k) over that in the gauge of the weights, sigma .01; {-4 * math.log(GAUGE):.3f}",
        found.interval(gauges, log_difference),
        least=-4 * math.log(GAUGE) - 0.1,
        most=-4 * math.log(GAUGE) + 0.1,
        check=True,
        why=found.missing("other") or f"outputs in both gauges differ by at most {max(t.same for t in found.tables):.1g} nats",
    )
    three = [("raw", "output", side, sigma) for sigma in SIGMAS[:3] for side in SIDES]
    yield Verdict(
        "the raw ratio K/Q is lower at sigma .05 than at .01 and at .1, as in the table of S2",
        "S2 9.1",
        "log K/Q at .05 less the smaller of those at .01 and .1; -.40 in the table of S2",
        found.interval(three, _dip),
        most=0.0,
        null=0.0,
        against="second order, where no ratio depends on sigma",
    )
    pairs = [pair for pair in (*PAIRS, UNTRAINED) if all((pair, "output", 0, least) in table.values for table in found.tables)]
    small = [(pair, "output", side, sigma) for pair in pairs for side in SIDES for sigma in SIGMAS[:2]]
    yield Verdict(
        "small noise costs as its square, whatever it acts on",
        "math H.1",
        f"slope of log KL(output) in log sigma from .01 to .05, of {len(small) // 2} kinds of noise that furthest from 2",
        found.interval(small, _slope),
        least=1.9,
        most=2.1,
        check=True,
    )


def _charts(found: _Found) -> dict[str, Curves]:
    charts = {}
    for where, caption in (
        ("output", "Cost of noise on the probe and on the metric: KL of the output, mean over tokens. Intervals over draws."),
        (
            "attention",
            "Cost of noise on the probe and on the metric: KL of attention's rows on the same clouds, mean over layers, heads "
            "and rows; dashed the second order of math H.1. Intervals over draws.",
        ),
    ):
        lines = list(_costs_of(found, where))
        if lines:
            frame = pd.DataFrame(lines, columns=["panel", "line", "x", "y", "low", "high"])
            charts[where] = Curves(frame, caption, "sigma", "KL in nats", log_x=True, log_y=True)
    frame = pd.DataFrame(list(_ratios(found)), columns=["panel", "line", "x", "y", "low", "high"])
    caption = (
        "Cost of noise on the metric over that on the probe: 1 is no asymmetry. The first three lines are one function in three "
        "gauges. To second order no ratio depends on sigma."
    )
    charts["ratio"] = Curves(frame, caption, "sigma", "metric / probe", log_x=True, log_y=True)
    return charts


def _costs_of(found: _Found, where: str) -> Iterator[tuple[str, str, float, float, float, float]]:
    for pair, panel in (PAIRS | {UNTRAINED: UNTRAINED}).items():
        for side in SIDES:
            name = ("probe", "metric")[side]
            for label, kind in ((name, where), (f"theory {name}", "theory")):
                if kind == "theory" and where == "output":
                    continue
                for sigma in sigmas(pair):
                    one = found.interval([(pair, kind, side, sigma)], first)
                    if math.isfinite(one.value):
                        yield panel, label, sigma, one.value, *((one.low, one.high) if kind == where else (math.nan, math.nan))


def _ratios(found: _Found) -> Iterator[tuple[str, str, float, float, float, float]]:
    for where, panel in (("output", "output"), ("attention", "rows of attention"), ("theory", "rows of attention")):
        for pair, label in (PAIRS | {UNTRAINED: UNTRAINED}).items():
            for sigma in sigmas(pair):
                one = found.ratio(pair, sigma, where)
                if math.isfinite(one.value):
                    ends = (math.nan, math.nan) if where == "theory" else (math.exp(one.low), math.exp(one.high))
                    yield panel, f"theory {label}" if where == "theory" else label, sigma, math.exp(one.value), *ends


def _notes(found: _Found) -> Iterator[str]:
    told = [f"{math.exp(found.ratio('raw', sigma).value):.3g} at sigma {sigma:g}" for sigma in SIGMAS]
    yield f"Raw K/Q in KL of the output: {', '.join(told)}. S2 has 1.86, 0.86 and 1.28 at .01, .05 and .1 for GPT-2."
    yield (
        "The raw and the balanced ratio are numbers of a gauge: (q/c, ck) is the same function, and turns K/Q into c^-4 K/Q. "
        "What is the model's own is noise on M from either side, and on tokens as they are read."
    )
    for name, told in (("other", "The gauge (q/2, 2k)"), ("balanced", "The balanced gauge")):
        if why := found.missing(name):
            yield f"{told} is undefined here: {why}"
    if any(("M", "attention", 0, SIGMAS[0]) not in table.values for table in found.tables):
        yield "Rows of attention have no KL here: a kernel whose rows do not sum to one, or have weights of 0."
    elif any(("M", "theory", 0, SIGMAS[0]) not in table.values for table in found.tables):
        yield "The second order is not drawn: a kernel is no softmax of its scores, or a position is no rotation."
    if any(table.by != "draws" for table in found.tables):
        yield "There are fewer prompts than draws of noise: units are prompts, each with draws of its own."
