"""Does the prediction stay open until the last layers force a decision, as the logit lens sees it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import lens
from emformer.intervals import Interval, over_models
from emformer.model import Emformer
from emformer.observables.lens import read, whole_layers
from emformer.parts import UserError
from emformer.studies.lines import draws, mean
from emformer.studies.losses import by_prompt, task
from emformer.studies.subjects import Subject, Tell, part_of
from emformer.text import shuffled
from emformer.theory.outcome import Curves
from emformer.training.objectives import IGNORE
from emformer.trajectory import capture
from emformer.verdicts import Findings, Verdict

LAYERS = 3  # that have a last third
SEEN = 10  # ranks within which the lens sees a token among the candidates, see `few`


@dataclass(frozen=True)
class Caustics(parts.Study):
    """S2 8.4: a model keeps several continuations open until the geometry of the final layers forces a resolution. math H.4.

    p^l = softmax(W_U LN_f(x^l)) of the embedding (l = 0) and of what each layer leaves, on the tokens that the model's objective
    asks for. Caustic depth argmax_l (H^l - H^{l+1}), the layer whose step lets the entropy fall most: null uniform over layers.
    Collapse depth min{l: the top token is the last one's from l on}: layers that know nothing agree with the last by chance
    alone and collapse late, and so does a random stream, which drifts away from where it began. A late collapse is therefore no
    evidence for a superposition, nor is a token that enters the last third open (the answer among ten, not yet first for good):
    both are held against the untrained twin, and collapse against the same words in random order too.

    The lens is biased in early layers, which are not trained to be read so, and most where the unembedding is a matrix of its
    own. Where it does not see the answer among ten for half of the tokens, whether they are open is left undecided.

    Fewer than 3 layers have no last third: all is then told and nothing decided.

    Cost: three readings of every state, P T d V each: 15 s for V = 1000 and L = 4, half an hour for GPT-2.
    """

    name: ClassVar[str] = "caustics"
    title: ClassVar[str] = "do predictions stay open until the last layers force a decision?"

    def run(self, subjects: Sequence[Subject], tell: Tell) -> Findings:
        for subject in subjects:
            if subject.model.vocab < 2:
                raise UserError(f"caustics: {subject.name} has a single word, and nothing to decide.")
        found = []
        for k, subject in enumerate(subjects):
            part = part_of(tell, k / len(subjects), (k + 1) / len(subjects))
            mixed = shuffled(subject.tokens.cpu().numpy(), subject.seed)
            disordered = replace(subject, tokens=torch.from_numpy(mixed).to(subject.tokens))
            lots = {"text": (subject, subject.model), "untrained": (subject, subject.untrained())}
            lots["shuffled"] = (disordered, subject.model)
            found.append({})
            for name, (one, model) in lots.items():
                found[-1][name] = reading(one, model)
                part(len(found[-1]) / 3, f"{subject.name}: {name}")
        groups = [subject.groups.cpu().numpy() for subject in subjects]
        return Findings(_verdicts(found, groups, subjects), _charts(found, groups, subjects), _note(found, subjects))


# Readings -------------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What the lens reads of one model: means over the tokens of each prompt that are asked for."""

    entropy: np.ndarray  # (P, L + 1) nats
    divergence: np.ndarray  # (P, L + 1) KL(p^L || p^l), nats
    seen: np.ndarray  # (P, L + 1) share whose answer is among the first few
    agrees: np.ndarray  # (P, L + 1) share whose top token is the answer already
    collapse: np.ndarray  # (P,) collapse depth / L
    late: np.ndarray  # (P,) share whose entropy falls most in the last third
    open: np.ndarray  # (P,) share that enters the last third with the answer seen and not settled
    settled: np.ndarray  # (P,) share that enters it settled
    loss: np.ndarray  # (P,) nats
    depths: dict[str, np.ndarray]  # shares of all tokens by collapse depth (L + 1,) and by caustic depth (L,)
    undefined: float  # share of tokens without a caustic: their entropy falls nowhere


def few(vocabulary: int) -> int:
    """Ranks that count as seen: ten, of a small vocabulary a tenth."""
    return min(SEEN, max(2, vocabulary // 10))


@torch.no_grad()
def reading(subject: Subject, model: Emformer) -> Reading:
    """The lens on a model's states, at the tokens that the subject's objective asks for."""
    given, among = task(subject), few(model.vocab)
    columns: list[tuple[Tensor, ...]] = []
    depths: list[tuple[Tensor, Tensor]] = []
    loss = []
    for some in subject.batches():
        inputs, targets = given.inputs[some], given.targets[some]
        asked = targets != IGNORE
        trajectory = capture(model, inputs)
        found = read(trajectory)
        layers = [found[k] for k in whole_layers(trajectory.states)]
        steps = len(layers) - 1
        start = steps - steps // 3  # the state that enters the last third
        entropy, divergence, rank, top = (torch.stack(column) for column in zip(*layers, strict=True))
        collapse, caustic = lens.collapse_depth(top), lens.caustic_depth(entropy)
        settled = (collapse <= start).double().where(collapse.isfinite(), torch.nan)
        within = (rank <= among).double().where(rank.isfinite(), torch.nan)
        agrees = (top == top[-1]).double().where(top[-1] >= 0, torch.nan)
        late = (caustic >= start).double().where(caustic.isfinite(), torch.nan)
        stacks = (entropy, divergence, within, agrees)
        singles = (collapse / steps, late, within[start] * (1 - settled), settled)
        columns.append((*(_mean(one, asked).T for one in stacks), *(_mean(one, asked) for one in singles)))
        depths.append((collapse[asked], caustic[asked]))
        loss.append(by_prompt(model, inputs, targets))
    whole = [torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True)]
    collapse, caustic = (torch.cat(column) for column in zip(*depths, strict=True))
    shares = {
        name: np.array([float((values == layer).double().mean()) for layer in range(count)])
        for name, values, count in (("collapse", collapse, steps + 1), ("caustic", caustic, steps))
    }
    return Reading(*whole, np.concatenate(loss), shares, float(caustic.isnan().double().mean()))


def _mean(values: Tensor, asked: Tensor) -> Tensor:
    """(…, B, T) -> (…, B): over the tokens that are asked for and have a value; nan where none has."""
    return values.where(asked, torch.nan).nanmean(-1)


# Verdicts -------------------------------------------------------------------------------------------------------------


def _rate(one: Reading) -> np.ndarray:
    """(P,): nats that the entropy falls by a layer in the last third, less those that it falls by a layer before it."""
    steps = one.entropy.shape[1] - 1
    third = steps // 3
    if not third:
        return np.full(len(one.entropy), math.nan)
    early = (one.entropy[:, 0] - one.entropy[:, -1 - third]) / (steps - third)
    return (one.entropy[:, -1 - third] - one.entropy[:, -1]) / third - early


def _verdicts(found: Sequence[dict[str, Reading]], groups: Sequence[np.ndarray], subjects: Sequence[Subject]) -> list[Verdict]:
    depths = [subject.model.settings.depth for subject in subjects]
    shallow = min(depths) < LAYERS
    chance = float(np.mean([(depth // 3) / depth for depth in depths]))

    def interval(values: Sequence[np.ndarray]) -> Interval:
        return over_models(
            [np.full_like(one, math.nan) if shallow else one for one in values], groups=groups, seed=subjects[0].seed
        )

    def told(condition: str, field: str) -> str:
        return f"{np.mean([mean(getattr(one[condition], field)) for one in found]):.3g}"

    def against(field: str, other: str) -> list[np.ndarray]:
        return [getattr(one["text"], field) - getattr(one[other], field) for one in found]

    why = f"a last third takes {LAYERS} layers" if shallow else ""
    drawn = "".join(f"; {line}" for line in [draws(len(found))] if line)
    names = ("text", "untrained", "shuffled")
    lates = ", ".join(f"{name} {told(name, 'late')}" for name in names)
    collapses = ", ".join(f"{name} {told(name, 'collapse')}" for name in names)
    unseen = [1 - float(mean(one["text"].open + one["text"].settled)) for one in found]
    blind = not shallow and float(np.mean(unseen)) > 0.5
    state = f"settled {told('text', 'settled')}, open {told('text', 'open')}, unseen {np.mean(unseen):.3g}; "
    state += f"twin's settled {told('untrained', 'settled')}, open {told('untrained', 'open')}"
    opened = [math.nan * one if blind else one for one in against("open", "untrained")]
    late_claim = "share of tokens whose entropy falls most in the last third of the layers"
    return [
        Verdict(
            "the final layers force the resolution: the entropy falls most in the last third",
            "S2 8.4",
            late_claim,
            interval([one["text"].late for one in found]),
            least=chance,
            null=chance,
            against="a layer at random",
            why=why,
        ),
        Verdict(
            "that is the work of training",
            "S2 8.4",
            f"{late_claim}, less that of the untrained twin",
            interval(against("late", "untrained")),
            least=0.0,
            null=0.0,
            against="the untrained twin",
            why=why or lates + drawn,
        ),
        Verdict(
            "the entropy falls faster in the last third than before",
            "S2 8.4",
            "fall of the mean entropy a layer in the last third, less that in the layers before, nats",
            interval([_rate(one["text"]) for one in found]),
            least=0.0,
            null=0.0,
            against="an even fall",
            why=why,
        ),
        Verdict(
            "superposition: more predictions are still open entering the last third than in the untrained twin",
            "S2 8.4",
            f"share of tokens whose answer is among the lens's first {SEEN}, not yet first for good, less that of the twin",
            interval(opened),
            least=0.0,
            null=0.0,
            against="the untrained twin",
            why=why or state + (": the lens sees too little there to tell open from unknown" if blind else "") + drawn,
        ),
        Verdict(
            "early collapse is avoided: predictions settle later than in the untrained twin",
            "S2 8.4",
            "mean collapse depth / L, less that of the untrained twin",
            interval(against("collapse", "untrained")),
            least=0.0,
            null=0.0,
            against="the untrained twin",
            why=why or f"{collapses}; of layers that know nothing about 1, so that late alone is no evidence{drawn}",
        ),
        Verdict(
            "meaning is what is kept open: predictions settle later on text than on its words in random order",
            "S2 8.4",
            "mean collapse depth / L, less that on shuffled words",
            interval(against("collapse", "shuffled")),
            least=0.0,
            null=0.0,
            against="the same words in random order",
            why=why or collapses,
        ),
    ]


LINES = {"text": "text", "untrained": "untrained twin", "shuffled": "shuffled words"}
PANELS = {
    "entropy": "entropy H, nats",
    "divergence": "KL(last || here), nats",
    "seen": "share with the answer seen",
    "agrees": "share with the answer on top",
}


def _charts(found: Sequence[dict[str, Reading]], groups: Sequence[np.ndarray], subjects: Sequence[Subject]) -> dict[str, Curves]:
    """Means over the models that have the layer; with intervals of the models themselves."""
    rows, counted = [], []
    for condition, line in LINES.items():
        readings = [one[condition] for one in found]
        for field, panel in PANELS.items():
            for layer in range(max(getattr(one, field).shape[1] for one in readings)):
                have = [k for k, one in enumerate(readings) if layer < getattr(one, field).shape[1]]
                columns = [getattr(readings[k], field)[:, layer] for k in have]
                one = over_models(columns, groups=[groups[k] for k in have], seed=subjects[0].seed)
                rows.append((panel, line, layer, one.value, one.low, one.high))
        for name in ("collapse", "caustic"):
            for one in readings:
                counted += [(f"{name} depth", line, layer, value) for layer, value in enumerate(one.depths[name])]
    shares = pd.DataFrame(counted, columns=["panel", "line", "x", "y"])
    shares = shares.groupby(["panel", "line", "x"], sort=False, as_index=False).mean()
    return {
        "lens": Curves(
            pd.DataFrame(rows, columns=["panel", "line", "x", "y", "low", "high"]),
            f"What the logit lens reads of each state; 0 is the embedding. Seen: among the first {SEEN}.",
            "layer",
            "mean over tokens",
        ),
        "depths": Curves(shares, "Where predictions settle, and where their entropy falls most.", "layer", "share of tokens"),
    }


def _note(found: Sequence[dict[str, Reading]], subjects: Sequence[Subject]) -> str:
    said = ["The lens reads early layers with an unembedding that was trained for the last: what it does not see may be there."]
    own = [subject.name for subject in subjects if not subject.model.settings.embedding.tied]
    if own:
        said.append(f"The unembedding is no copy of the embedding in {', '.join(own)}: there the bias is largest.")
    for subject, one in zip(subjects, found, strict=True):
        entropy, loss = float(one["text"].entropy[:, -1].mean()), float(mean(one["text"].loss))
        said.append(
            f"{subject.name}: mean entropy of the prediction {entropy:.3f}, loss {loss:.3f} nats; "
            f"{one['text'].undefined:.1%} of the tokens have an entropy that falls nowhere, and no caustic."
        )
    return "\n".join(said)
