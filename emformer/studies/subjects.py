"""What a study looks at: trained models, each with the prompts that it is shown and an untrained twin."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emformer.model import Emformer
from emformer.parts import Corpus, UserError
from emformer.records import Loaded, Run, load
from emformer.studies.request import check, place, reading
from emformer.studies.sample import own_text
from emformer.text import vocabulary
from emformer.trajectory import Trajectory, capture

AT_ONCE = 16  # prompts in a pass, so that memory does not grow with their number


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in eval mode with P prompts of T tokens from one text, in random order, none of which the model was trained on
    where it is a run's own validation text.

    Attributes:
        name: the run or checkpoint as it was given.
        loaded: model, tokenizer and settings; its model is on the device of `tokens`.
        tokens: ids (P, T).
        labels: classes of the tokens (C, P, T), -1 for none, of the classifications `classes`; None where the corpus knows none.
        groups: (P,) equal for prompts that share text: one draw to a bootstrap.
        seed: of whatever a study draws.
    """

    name: str
    loaded: Loaded
    tokens: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    groups: Tensor
    seed: int
    _twin: list[Emformer] = field(default_factory=list, repr=False)

    @property
    def model(self) -> Emformer:
        return self.loaded.model

    def untrained(self) -> Emformer:
        """The model as its training began, in eval mode: what is true of it too is no work of training. Runs of other seeds have
        other twins. Of a model that came without a run it is drawn by the laws of our parts, which need not be those that it
        began with.

        The global generator is left as it was. Kept, as later calls ask for the same.
        """
        if not self._twin:
            weight = self.model.embedding.weight
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.loaded.config.training.seed)
                twin = Emformer(self.model.vocab, **vars(self.model.settings))
            self._twin.append(twin.to(weight.device, weight.dtype).eval())
        return self._twin[0]

    def batches(self, size: int = AT_ONCE) -> Iterator[slice]:
        """Slices of the prompts, a few at a time."""
        for start in range(0, len(self.tokens), size):
            yield slice(start, min(start + size, len(self.tokens)))

    def trajectories(self, model: Emformer | None = None, size: int = AT_ONCE) -> Iterator[Trajectory]:
        """The trajectories of all prompts, a few at a time, of the model or of another one (a surgery's, the untrained)."""
        for some in self.batches(size):
            labels = None if self.labels is None else self.labels[0, some]
            yield capture(self.model if model is None else model, self.tokens[some], labels, self.groups[some])


def subjects(
    sources: Sequence[str | Path],
    *,
    text: str | Path | None = None,
    corpus: str | Corpus | None = None,
    prompts: int,
    length: int,
    which: str | int = "last",
    seed: int = 0,
    device: str = "auto",
) -> list[Subject]:
    """Load the models and their prompts: all of one text, or each of its own validation text.

    Raises:
        UserError: for whatever `emformer.analyze` refuses; for a text of fewer prompts than two; for models that differ in more
            than their seed, or of which two are the same.
    """
    where = place(device)
    found: list[Subject] = []
    for source in sources:
        loaded = load(source, which)
        if found:
            _alike(found, str(source), loaded)
        within = min(length, loaded.config.model.context)
        check(loaded, within, prompts * within, None, seed)
        if text is None and corpus is None:
            own = own_text(loaded)
            sample = own.sample(prompts, within, loaded.config.probe.seed + seed)
            lot, classes = sample.take(0, sample.count), sample.names
            labels = None if sample.labels is None else torch.from_numpy(sample.labels)
        else:
            with tempfile.TemporaryDirectory(prefix="emformer-") as folder:
                one = reading(loaded, text, corpus, Run(folder), within, prompts * within, seed)
                windows = one.open()
                lot, classes = windows.take(0, min(prompts, windows.count)), one.labels[:1]
            labels = None if lot.labels is None else torch.from_numpy(lot.labels)[None]
        if len(lot.tokens) < 2:
            raise UserError(f"{source}: the text holds {len(lot.tokens)} prompts of {within} tokens; a study takes at least two.")
        ids, groups = torch.from_numpy(lot.tokens).long().to(where), torch.from_numpy(lot.groups).long()
        loaded.model.to(where).eval()
        found.append(Subject(str(source), loaded, ids, None if labels is None else labels.to(where), classes, groups, seed))
    return found


def _alike(found: Sequence[Subject], name: str, loaded: Loaded) -> None:
    """Raise unless this model is one more of the same kind: several are units of one claim only where a seed alone sets them
    apart."""
    first = found[0]
    before, now = (_kind(one) for one in (first.loaded, loaded))
    key = next((key for key in before if before[key] != now[key]), None)
    if key is not None:
        raise UserError(
            f"{name} has another {key} than {first.name}: models of one study differ by their seed alone; give each kind its "
            "own call."
        )
    for one in found:
        same = loaded.model.state_dict()
        if all(torch.equal(value.cpu(), same[key]) for key, value in one.model.state_dict().items()):
            raise UserError(f"{name} and {one.name} are one model; give it once.")
        if loaded.family == "emformer" and one.loaded.config.training.seed == loaded.config.training.seed:
            raise UserError(f"{name} and {one.name} have one seed, so they are not independent; give one of them.")


def _kind(loaded: Loaded) -> dict[str, Any]:
    """What models of one study have in common."""
    training = replace(loaded.config.training, seed=0, accelerator="", devices=1, nodes=1, strategy="", save_every=1, sample=0)
    data = replace(loaded.config.data, cache="", workers=0)
    return {"family": loaded.family, "model": loaded.config.model, "data": data, "training": training, "step": loaded.step}


def scale(found: Sequence[Subject]) -> str:
    """Of what size the models are, in a line: a verdict is about models like these."""
    first = found[0]
    settings, config = first.model.settings, first.loaded.config
    count = sum(value.numel() for value in first.model.parameters())
    many = "a model" if len(found) == 1 else f"{len(found)} models"
    told = f"{many} of {count:,} parameters (d = {settings.dim}, {settings.depth} layers, {settings.heads} heads)"
    if first.loaded.family != "emformer" or not first.loaded.step:
        return f"{told}, family {first.loaded.family}"
    tokens = first.loaded.step * config.training.batch * settings.context
    return f"{told}, trained on {tokens:,} tokens of {type(config.data.corpus).__name__} in {first.loaded.step:,} steps"


Tell = Callable[[float, str], None]


def part_of(tell: Tell, start: float, stop: float) -> Tell:
    """What a part of a study tells: its share of 0 … 1 lies between `start` and `stop` of the whole."""
    return lambda share, word: tell(start + (stop - start) * share, word)


def vocabulary_of(subject: Subject) -> int:
    """Ids that text has; a model may have more, as a mask token."""
    return vocabulary(subject.loaded.tokenizer)
