"""Does attention keep the spectrum of a cloud, as transport would, or does it mix it away?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import retention
from emformer.geometry.sinks import uniform
from emformer.geometry.spectra import wide
from emformer.intervals import Interval, bootstrap, over_models
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.studies.lines import averaged, points, unlike
from emformer.studies.lines import draws as twins
from emformer.studies.subjects import Subject, Tell, part_of
from emformer.surgery.copies import generator
from emformer.theory.outcome import Curves
from emformer.trajectory import Trajectory
from emformer.verdicts import Findings, Verdict

PUBLISHED = {"mixing": 0.0358, "condition": 10758.0, "retrieval": 0.6261}  # S2 table 2; transport 1 and 1, retrieval's kappa inf
STRANGE = 0.05  # share of draws that are further out than a number which a set-up does not explain
ISOMETRY = math.log(1.05)  # a step that changes the nuclear norm by less is called near to one
COLLAPSE = 0.5  # of the nuclear norm: what is left of it where a pattern mixes the cloud away
DECADE = 1.0  # log10 of what "much better conditioned" is
FEW = 0.01  # of n ranks: a difference that is one
LAW = (8, 16, 32, 64)  # numbers of tokens
OURS = "{} is a threshold of ours: S2 gives none"


@dataclass(frozen=True)
class Retention(parts.Study):
    """rho(Op; X) = |Op X|_*/|X|_* and kappa(Op) = sigma_max/sigma_min, of idealised operators and of a model's: math H.3, S2 9.3.

    The idealised ones: S2 tells rho and kappa of one mixing, one retrieval and one transport, and not how they were made. Three
    set-ups that could have made them are drawn `draws` times, X of N(0, 1), n x d, k applications of one operator:

        C1  n = 32, d = 64, k = 3, A = softmax(X X^T/(5 sqrt d)), kappa of A^3
        C2  n = d = 32, k = 3, A = softmax(U/10), U uniform on [0, 1], kappa of A
        C3  n = 32, d = 64, k = 2, A = softmax(X X^T/(10 sqrt d)), kappa of A^2

    Retrieval is a random one-hot map, transport a permutation and a rotation. A set-up is excluded if S2's row is an outlier
    among its draws: if at most 5 % of them lie further from their centre, by Mahalanobis' distance of (rho of mixing, log10 kappa
    of mixing, rho of retrieval).

    The model's: A, I + A and (I + A)/2 of every head on what it reads; and every step X -> X' that the stream really makes, an
    attention or FFN step each, also of X/|X|_F. That rho is near 1 is no evidence of transport where D is short: beside it stand
    steps of the same length in random directions, token by token, and the same model untrained. kappa of a pattern that a causal
    mask makes triangular says little: see rho and the effective rank. An infinite kappa counts as the largest that the type of
    the pattern can tell, so that what the residual stream gains is a lower bound.

    Cost: four decompositions n x n a head, prompt and layer, trained and untrained; and the draws, about a second a hundred.

    Args:
        draws: of every idealised set-up, at least 8.
    """

    draws: int = 200

    name: ClassVar[str] = "retention"
    title: ClassVar[str] = "does attention keep the spectrum of a cloud, or does it mix it away?"

    def __post_init__(self) -> None:
        if self.draws < 8:
            raise UserError(f"retention: draws is {self.draws}; choose at least 8.")

    @classmethod
    def examples(cls) -> Sequence[Retention]:
        return [cls(draws=8)]

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        seed = subjects[0].seed
        tables = idealised(self.draws, seed)
        tell(0.1, "idealised operators")
        found = []
        for k, subject in enumerate(subjects):
            inner = part_of(tell, 0.1 + 0.9 * k / len(subjects), 0.1 + 0.9 * (k + 1) / len(subjects))
            own = _kept(subject, subject.model, part_of(inner, 0.0, 0.5), subject.name)
            found.append((own, _kept(subject, subject.untrained(), part_of(inner, 0.5, 1.0), f"{subject.name}, untrained")))
        verdicts = _steps(subjects, found) + _patterns(subjects, found) + [_explained(*one, seed) for one in tables.items()]
        charts = {"steps": _step_chart(found), "patterns": _pattern_chart(found), "table": _table_chart(tables)}
        charts["law"] = _law_chart(self.draws, seed)
        note = [_note(subjects, found, tables, self.draws, seed), unlike(subjects)]
        return Findings(verdicts, charts, "\n".join(filter(None, note)))


# Idealised operators --------------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """One way to have made S2's table: n tokens in d dimensions, k applications of `mixing`(X, U), and the powers whose kappa is
    told (k or 1). U is (draws, n, n), uniform on [0, 1]."""

    n: int
    d: int
    k: int
    power: int
    mixing: Callable[[Tensor, Tensor], Tensor]


def _alike(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, _: (x @ x.mT / (temperature * math.sqrt(x.shape[-1]))).softmax(-1)


SETUPS: Mapping[str, Setup] = {
    "C1": Setup(32, 64, 3, 3, _alike(5.0)),
    "C2": Setup(32, 32, 3, 1, lambda _, u: (0.1 * u).softmax(-1)),
    "C3": Setup(32, 64, 2, 2, _alike(10.0)),
}


class Table(NamedTuple):
    """Of every draw (R,): rho and log10 kappa (inf where singular) of mixing, and of retrieval."""

    mixing: np.ndarray
    condition: np.ndarray
    retrieval: np.ndarray
    retrieval_condition: np.ndarray


def idealised(draws: int, seed: int = 0) -> dict[str, Table]:
    """`Table` of every set-up. Cost: about 2 ms a draw."""
    tables = {}
    for name, one in SETUPS.items():
        random = generator("retention", name, seed)
        x = torch.randn(draws, one.n, one.d, dtype=torch.float64, generator=random)
        a = one.mixing(x, torch.rand(draws, one.n, one.n, dtype=torch.float64, generator=random))
        b = one_hot(draws, one.n, random)
        values: list[Tensor] = []
        for op, power in ((a, one.power), (b, one.k)):
            rho = retention.retention(torch.linalg.matrix_power(op, one.k), x)
            kappa = retention.condition_number(torch.linalg.matrix_power(op, power))
            values += [rho, kappa.log10()]
        tables[name] = Table(*(value.numpy() for value in values))
    return tables


def one_hot(draws: int, n: int, random: torch.Generator) -> Tensor:
    """Retrieval: every token becomes one that is drawn for it, (draws, n, n)."""
    chosen = torch.randint(n, (draws, n), generator=random)
    return torch.nn.functional.one_hot(chosen, n).double()


def transports(draws: int, n: int, random: torch.Generator) -> Tensor:
    """Permutations and rotations (2 draws, n, n)."""
    order = torch.rand(draws, n, generator=random).argsort(-1)
    turned = torch.linalg.qr(torch.randn(draws, n, n, dtype=torch.float64, generator=random)).Q
    return torch.cat([torch.nn.functional.one_hot(order, n).double(), turned])


def further(table: Table) -> np.ndarray:
    """Of every draw (R,), whether it lies as far out as S2's row, by Mahalanobis' distance to the centre of all draws."""
    draws = np.stack([table.mixing, table.condition, table.retrieval], -1)
    draws = draws[np.isfinite(draws).all(-1)]
    row = np.array([PUBLISHED["mixing"], math.log10(PUBLISHED["condition"]), PUBLISHED["retrieval"]])
    scale = np.linalg.pinv(np.cov(draws.T))
    away, published = (np.einsum("ri,ij,rj->r", z, scale, z) for z in (draws - draws.mean(0), (row - draws.mean(0))[None]))
    return (away >= published).astype(np.float64)


def _explained(name: str, table: Table, seed: int) -> Verdict:
    one = SETUPS[name]
    return Verdict(
        f"S2's table does not exclude that set-up {name} made it (n = {one.n}, d = {one.d}, k = {one.k})",
        "S2 9.3, table 2",
        "share of draws that lie further from their centre than the published row",
        bootstrap(further(table), of="draws", seed=seed),
        least=STRANGE,
        null=0.5,
        against="a draw of the set-up itself",
        why="of no model; one row hardly tells set-ups apart, as kappa spreads over decades",
        check=True,
    )


# The model's ----------------------------------------------------------------------------------------------------------


FIELDS = ("rho", "log_kappa", "erank")  # of `emformer.geometry.retention.Retention`


class Kept(NamedTuple):
    """Of P prompts, S steps and N heads of all layers: see `_kept`.

    `rho`, `shape` and `length` (P, S) of the steps, `random` rho of steps of the same length; `heads`, of A and of I + A each
    {"rho", "erank", "kappa"} (P, N), erank as a share of n and kappa as log10; `even` (P, N) rho of uniform weights; `layer`
    (N,); `singular` the share of A that have no finite kappa.
    """

    rho: np.ndarray
    shape: np.ndarray
    length: np.ndarray
    random: np.ndarray
    heads: dict[str, dict[str, np.ndarray]]
    even: np.ndarray
    layer: np.ndarray
    singular: float

    def deviation(self, name: str) -> np.ndarray:
        """|log rho|, mean over the steps (P,)."""
        return np.abs(np.log(getattr(self, name))).mean(1)


@torch.no_grad()
def _kept(subject: Subject, model: Emformer, tell: Tell, word: str) -> Kept:
    random = generator("retention", "updates", subject.seed)
    found: list[dict[str, Tensor]] = []
    layers: list[int] = []
    for trajectory in subject.trajectories(model):
        steps, one = trajectory.steps, dict[str, Tensor]()
        kept = [retention.signal_retention(step.before, step.after) for step in steps]
        one["rho"], one["shape"] = (torch.stack([getattr(each, name) for each in kept], 1) for name in ("rho", "shape"))
        one["random"] = torch.stack([_random(step.before, step.after, random) for step in steps], 1)
        one["length"] = torch.stack([_length(step.after - step.before) / _length(step.before) for step in steps], 1)
        each = [_heads(trajectory, k) for k in trajectory.attentions]
        one |= {name: torch.cat([head[name] for head in each], 1) for name in each[0]}
        layers = [steps[k].layer for k in trajectory.attentions for _ in range(trajectory.block(k).attention.form.heads)]
        found.append({name: value.cpu() for name, value in one.items()})
        tell(sum(len(lot["rho"]) for lot in found) / len(subject.tokens), word)
    whole = {name: torch.cat([lot[name] for lot in found]).numpy() for name in found[0]}
    heads = {op: {key: whole[f"{op} {key}"] for key in ("rho", "erank", "kappa")} for op in ("A", "I+A")}
    steps = (whole[name] for name in ("rho", "shape", "length", "random"))
    return Kept(*steps, heads, whole["even"], np.array(layers), float(whole["singular"].mean()))


def _heads(trajectory: Trajectory, k: int) -> dict[str, Tensor]:
    """Of the heads of one attention step, (B, H) each."""
    read, attention = trajectory.steps[k].read, trajectory.block(k).attention
    tokens, heads = read.shape[1], attention.form.heads
    told = [retention.mixing(a, read) for _, a in trajectory.matrices(k)]
    if not told:
        raise UserError(f"retention: a pattern of {tokens} x {tokens} is too large to decompose; choose a smaller --length.")
    largest = -math.log10(tokens * torch.finfo(read.dtype).eps)
    found = {}
    for op, name in (("A", "mix"), ("I+A", "residual")):
        rho, kappa, erank = (torch.cat([getattr(getattr(one, name), key) for one in told], 1) for key in FIELDS)
        found |= {f"{op} rho": rho, f"{op} kappa": kappa.clamp(max=largest), f"{op} erank": erank / tokens}
        if op == "A":
            found["singular"] = kappa.isinf().double()
    even = torch.full_like(found["A rho"], torch.nan)
    if attention.kernel.normalised:
        weights = uniform(trajectory.visible(k)).to(read)[None, None].expand(len(read), 1, tokens, tokens)
        even = retention.mixing(weights, read).mix.rho.expand(-1, heads)
    return found | {"even": even}


def _random(before: Tensor, after: Tensor, random: torch.Generator) -> Tensor:
    """rho (B,) of a step in which every token goes as far as it did, in a direction of its own that is drawn."""
    x, d = wide(before), wide(after - before)
    drawn = torch.randn(d.shape, dtype=torch.float64, generator=random).to(d)
    drawn = drawn * (d.norm(dim=-1) / drawn.norm(dim=-1)).unsqueeze(-1)
    return retention.signal_retention(x, x + drawn).rho


def _length(x: Tensor) -> Tensor:
    """|X|_F (B,)."""
    return wide(x).flatten(1).norm(dim=-1)


# Verdicts -------------------------------------------------------------------------------------------------------------

Pair = tuple[Kept, Kept]  # trained, untrained


def _steps(subjects: Sequence[Subject], found: Sequence[Pair]) -> list[Verdict]:
    def measured(name: str) -> Interval:
        return _over(subjects, [own.deviation(name) for own, _ in found])

    def control(name: str) -> float:
        return float(np.mean([np.nanmean(twin.deviation(name)) for _, twin in found]))

    quantity = "|log rho| of X -> X', mean over attention and FFN steps"
    length = float(np.mean([np.nanmean(own.length) for own, _ in found]))
    return [
        Verdict(
            "the trained model approximates transport: a step keeps the nuclear norm to 5 % on average",
            "S2 9.3",
            quantity,
            measured("rho"),
            most=ISOMETRY,
            null=control("rho"),
            against="the untrained model",
            why=f"a step goes {length:.2f} |X| far on average; a short one is near to an isometry whatever it does; "
            + OURS.format("5 %"),
        ),
        Verdict(
            "without its scale too: a step keeps |X|_*/|X|_F to 5 % on average",
            "S2 9.3",
            "|log| of the ratio of |X|_*/|X|_F after and before a step, mean over steps",
            measured("shape"),
            most=ISOMETRY,
            null=control("shape"),
            against="the untrained model",
            why=OURS.format("5 %"),
        ),
        Verdict(
            "a step is nearer to an isometry than a random one of the same length",
            "S2 9.3",
            f"{quantity}, less that of random steps",
            _over(subjects, [own.deviation("rho") - own.deviation("random") for own, _ in found]),
            most=0.0,
            null=0.0,
            against="updates of every token's length in random directions",
        ),
        Verdict(
            "training brings the steps nearer to an isometry",
            "S2 9.3",
            f"{quantity}, less that of the untrained model",
            _over(subjects, [own.deviation("rho") - twin.deviation("rho") for own, twin in found]),
            most=0.0,
            null=0.0,
            against="the untrained model",
            why=twins(len(subjects)),
        ),
    ]


def _patterns(subjects: Sequence[Subject], found: Sequence[Pair]) -> list[Verdict]:
    def gain(key: str) -> tuple[Interval, float]:
        """What is measured, paired by head, of A and I + A; and what it is untrained."""
        sign = -1 if key == "kappa" else 1
        own, twin = (
            [sign * (kept.heads["I+A"][key] - kept.heads["A"][key]).mean(1) for kept in of] for of in zip(*found, strict=True)
        )
        return _over(subjects, own), float(np.mean([np.nanmean(one) for one in twin]))

    lifted, ranked = gain("kappa"), gain("erank")
    even = float(np.mean([np.mean(own.even) for own, _ in found]))
    singular = float(np.mean([own.singular for own, _ in found]))
    shaped = "; a causal A is triangular, its kappa is the mask's as much as attention's: see the effective rank"
    causal = any(one.model.layer(k).attention.mask.causal for one in subjects for k in range(one.model.settings.depth))
    return [
        Verdict(
            "attention without the residual stream collapses the cloud: of its nuclear norm less than half is left",
            "S2 9.3",
            "rho(A; Y) on the cloud that a head reads, mean over heads",
            _over(subjects, [own.heads["A"]["rho"].mean(1) for own, _ in found]),
            most=COLLAPSE,
            null=even,
            against="uniform weights under the same mask",
            why=OURS.format("half")
            + ("" if math.isfinite(even) else "; rows of this kernel do not sum to one, so rho tells their size too"),
        ),
        Verdict(
            "the residual stream keeps rank: I + A has a larger effective rank than A",
            "S2 9.3",
            "(erank(I + A) - erank(A))/n, mean over heads",
            ranked[0],
            least=FEW,
            null=ranked[1],
            against="the untrained model",
            why="true of nearly every pattern, and so of I + A rather than of a model",
            check=True,
        ),
        Verdict(
            "the residual stream lifts conditioning: kappa(I + A) is far below kappa(A)",
            "S2 9.3",
            "log10 kappa(A) - log10 kappa(I + A), mean over heads",
            lifted[0],
            least=DECADE,
            null=lifted[1],
            against="the untrained model",
            why=f"{singular:.0%} of A are singular to rounding and count as the largest kappa that can be told"
            + (shaped if causal else ""),
            check=True,
        ),
    ]


def _over(subjects: Sequence[Subject], values: Sequence[np.ndarray]) -> Interval:
    return over_models(values, groups=[one.groups.numpy() for one in subjects], seed=subjects[0].seed)


# Charts ---------------------------------------------------------------------------------------------------------------


def _step_chart(found: Sequence[Pair]) -> Curves:
    rows = []
    for own, twin in found:
        for line, kept in (("trained", own), ("untrained", twin)):
            x = np.arange(1.0, kept.rho.shape[1] + 1)
            rows += [points("|X'|_*/|X|_*", line, x, kept.rho), points("the same of X/|X|_F", line, x, kept.shape)]
            rows += [points("|X' - X|/|X|", line, x, kept.length)]
        rows.append(points("|X'|_*/|X|_*", "random steps of the same length", x, own.random))
    caption = "What a step leaves of the spectrum, of attention and of FFN steps in their order: an isometry has 1."
    return Curves(averaged(rows), caption, "step", "ratio")


def _pattern_chart(found: Sequence[Pair]) -> Curves:
    rows = []
    for own, twin in found:
        for suffix, kept in (("", own), (", untrained", twin)):
            x = kept.layer
            for op in ("A", "I+A"):
                rows.append(points("rho on the cloud read", op + suffix, x, kept.heads[op]["rho"]))
                rows.append(points("effective rank / n", op + suffix, x, kept.heads[op]["erank"]))
                rows.append(points("log10 kappa", op + suffix, x, kept.heads[op]["kappa"]))
            rows.append(points("rho on the cloud read", "(I+A)/2" + suffix, x, kept.heads["I+A"]["rho"] / 2))
        rows.append(points("rho on the cloud read", "theory: uniform weights", own.layer, own.even))
    caption = "Attention's patterns as operators on tokens, alone and beside the residual stream; mean over heads."
    return Curves(averaged(rows), caption, "layer", "value")


PANELS = {"mixing": "mixing: rho", "condition": "mixing: log10 kappa", "retrieval": "retrieval: rho"}


def _table_chart(tables: Mapping[str, Table]) -> Curves:
    share = np.linspace(0.02, 0.98, 25)
    rows = []
    for key, panel in PANELS.items():
        for name, table in tables.items():
            values = getattr(table, key)
            rows += [(panel, name, *point) for point in zip(share, np.quantile(values[np.isfinite(values)], share), strict=True)]
        told = math.log10(PUBLISHED[key]) if key == "condition" else PUBLISHED[key]
        rows += [(panel, "theory: S2's table", x, told) for x in (share[0], share[-1])]
    caption = "Draws of three set-ups that could have made S2's table, in order of their value, and the one number published."
    return Curves(pd.DataFrame(rows, columns=["panel", "line", "x", "y"]), caption, "share of draws below", "value")


def law(n: int, draws: int, seed: int = 0) -> float:
    """Mean rho of uniform weights on n Gaussian tokens of n dimensions, the limit of long mixing: about 1.18/n for large n."""
    x = torch.randn(draws, n, n, dtype=torch.float64, generator=generator("retention", "law", n, seed))
    return float(retention.retention(torch.full((n, n), 1 / n, dtype=torch.float64), x).mean())


def _law_chart(draws: int, seed: int) -> Curves:
    rows = [("mixing to rank 1", "measured", float(n), law(n, min(draws, 50), seed)) for n in LAW]
    rows += [("mixing to rank 1", "theory: 1.18/n", float(n), 1.18 / n) for n in LAW]
    caption = "What long mixing leaves of n tokens in n dimensions: a number about n, and about nothing else."
    return Curves(pd.DataFrame(rows, columns=["panel", "line", "x", "y"]), caption, "n", "rho", log_x=True, log_y=True)


def _note(subjects: Sequence[Subject], found: Sequence[Pair], tables: Mapping[str, Table], draws: int, seed: int) -> str:
    lines = []
    for name, table in tables.items():
        kappa = 10 ** np.quantile(table.condition, [0.25, 0.5, 0.75], method="nearest")
        lines.append(
            f"{name}, {draws} draws: mixing rho {table.mixing.mean():.4f} +- {table.mixing.std(ddof=1):.4f}, kappa median "
            f"{kappa[1]:.3g} (quartiles {kappa[0]:.3g} to {kappa[2]:.3g}); retrieval rho {table.retrieval.mean():.3f} +- "
            f"{table.retrieval.std(ddof=1):.3f}, kappa infinite in {np.isinf(table.retrieval_condition).mean():.0%}."
        )
    random = generator("retention", "transport", seed)
    op, x = transports(draws, 32, random), torch.randn(2 * draws, 32, 64, dtype=torch.float64, generator=random)
    worst = max(float((one - 1).abs().max()) for one in (retention.retention(op, x), retention.condition_number(op)))
    lines.append(
        f"Transport, permutations and rotations: rho and kappa are 1, the largest deviation of {2 * draws} is {worst:.0e}."
    )
    for subject, (own, twin) in zip(subjects, found, strict=True):
        lines.append(
            f"{subject.name}: a step goes {own.length.mean():.3f} |X| far on average (untrained {twin.length.mean():.3f}), and "
            f"leaves {np.exp(np.log(own.rho).mean()):.3f} of the nuclear norm (untrained {np.exp(np.log(twin.rho).mean()):.3f}, "
            f"random steps of its length {np.exp(np.log(own.random).mean()):.3f}); geometric means."
        )
    return "\n".join(lines)
