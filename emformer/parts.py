"""The abstract parts a model, a corpus and a run are composed of, as plain frozen settings.

A *part* is a small immutable dataclass that says what is wanted (`LowRank(rank=32)`) and builds the thing that does it.
Settings are plain data: YAML names them by class, a checkpoint carries them as a dictionary, nothing is ever pickled.
This module imports no torch, so that command line help appears at once.

To add a variant, write one new file with one frozen dataclass that inherits from one of the classes below and name it in
YAML by its class path. Nothing else has to be edited: the contract suite finds every subclass by itself and asks it for
`examples()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy
    import tokenizers
    import torch

Role = Literal["form", "content"]


class UserError(ValueError):
    """A mistake of the user, told in one sentence: what, where, what to do. The command line exits with code 2.

    What the sentence quotes may come from a damaged file: it is told in one line of at most `LONGEST` characters, and what a
    terminal would not print, but obey, is spelt out.
    """

    LONGEST: ClassVar[int] = 1000

    def __init__(self, message: str):
        line = " ".join(message.split())
        line = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
        spare = len(line) - self.LONGEST
        if spare > 0:
            middle = self.LONGEST // 2
            line = f"{line[:middle]} … {line[middle + spare :]}"
        super().__init__(line)


@dataclass(frozen=True)
class Part(ABC):  # noqa: B024  (what is abstract differs by kind)
    """An immutable setting. Subclasses are final: they implement the abstract methods and override nothing else."""

    @classmethod
    def examples(cls) -> Sequence[Part]:
        """Instances for the contract suite, small enough for d = 8 and two heads. Default: the bare constructor."""
        return [cls()]


class Operator(Part):
    """Setting of H linear maps `W_h = L_h R_{g(h)}^T` on the embedding space: as the form M or as the content F."""

    @abstractmethod
    def build(self, role: Role, dim: int, heads: int, form: torch.nn.Module | None = None) -> torch.nn.Module:
        """Return the `emformer.operators.Operator` module; `form` is given to a content that is tied to its form."""


class Kernel(Part):
    """Setting of a rule that turns relevance scores into mixture weights."""

    @abstractmethod
    def build(self, heads: int, dim: int) -> torch.nn.Module:
        """Return the `emformer.kernels.Kernel` module."""


class Position(Part):
    """Setting of a map (u, v) -> (u, v) on queries and keys; an ordered list of them acts one after the other."""

    @abstractmethod
    def build(self, rank: int) -> torch.nn.Module:
        """Return the `emformer.positions.PositionMap` for factors of width `rank`."""


class Mask(Part):
    """A predicate: may the query at position i see the key at position j? `All` composes several.

    `causal`: never sees j > i. `shape` names the two patterns that a fused kernel needs no table for: "full" (all),
    "triangle" (exactly j <= i), or "table" for every other.
    """

    @property
    @abstractmethod
    def causal(self) -> bool: ...

    @property
    @abstractmethod
    def shape(self) -> Literal["full", "triangle", "table"]: ...

    @abstractmethod
    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Boolean, broadcast over the integer positions `i` of queries and `j` of keys."""


class Norm(Part):
    """Setting of a per-token normalisation R^d -> R^d."""

    @abstractmethod
    def build(self, dim: int) -> torch.nn.Module:
        """Return the `emformer.norms.Norm` module."""


class FFN(Part):
    """Setting of a token-wise network R^d -> R^d."""

    @abstractmethod
    def build(self, dim: int) -> torch.nn.Module: ...


class Placement(Part):
    """Where the norm stands around a sublayer, and on what space the stream lives. See `emformer.placements`."""

    @abstractmethod
    def build(self, norm: Norm | None, dim: int) -> tuple[torch.nn.Module | None, torch.nn.Module | None, torch.nn.Module | None]:
        """(read, shape, place) of one sublayer, x <- place(x + eps shape(x, D(read(x)))); None: nothing there."""

    @abstractmethod
    def enter(self, dim: int) -> torch.nn.Module | None:
        """What puts the embedded tokens onto the space that the states live on; None: they are there."""

    @property
    @abstractmethod
    def closes(self) -> bool:
        """Whether the stream needs the norm once more before it is unembedded."""


class Arrangement(Part):
    """How attention and FFN follow each other in a block, where it is not one after the other."""

    @abstractmethod
    def build(
        self,
        attention: torch.nn.Module,
        ffn: torch.nn.Module | None,
        norm: Norm | None,
        placement: Placement,
        epsilon: float,
        dropout: float,
    ) -> torch.nn.Module:
        """Return the `emformer.block.Block` module."""


class Corpus(Part):
    """A source of text documents. Iterating twice gives the same documents in the same order.

    `remote`: reading all of it may mean a download; a tokenizer then learns from its head only.
    """

    remote: ClassVar[bool] = False

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The texts, one document at a time. Raises `UserError` for a missing, empty or binary source."""

    @abstractmethod
    def identity(self) -> str:
        """Hex SHA-256 of what `documents` yields (for a remote set: of its name, revision and settings)."""


class LabelledCorpus(Corpus):
    """A corpus that knows classes of its words.

    `label_names`: of the classifications that every word has, the one that clusters are compared with first.
    """

    label_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def labelled_documents(self) -> Iterator[tuple[str, numpy.ndarray]]:
        """The texts of `documents`, in their order, each with the (words, 2 + labels) int64 spans of its words: start and end
        (exclusive) in characters, ascending and without overlap, then one class id >= 0 a classification (-1: it has none)."""


class Tokenizer(Part):
    """Setting of a tokenizer; `build` trains or loads it.

    `reads_all`: learns from the validation part too (a character that is not in the vocabulary cannot be predicted).
    """

    reads_all: ClassVar[bool] = False

    @abstractmethod
    def build(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        """Return the tokenizer, trained on `texts` where it learns anything."""


class Objective(Part):
    """What the model is trained for: cuts windows of tokens into inputs and targets for a cross entropy."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """What the loss is measured in, for people."""

    @property
    @abstractmethod
    def covers_text(self) -> bool:
        """Whether every token is a target once, so that the loss can be told in bits per byte."""

    @property
    @abstractmethod
    def extra_tokens(self) -> int:
        """Ids beyond the tokenizer's vocabulary that the model needs (a mask token: 1)."""

    @abstractmethod
    def check(self, masks: Sequence[Mask]) -> None:
        """Raise `UserError` if a model with these masks, one a layer, could cheat at this objective."""

    @abstractmethod
    def cut(self, windows: numpy.ndarray, rng: numpy.random.Generator, vocab: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Windows (B, T+1) of ids below `vocab` -> inputs and targets, each (B, T); target -100 carries no loss."""


class Penalty(Part):
    """What shrinks M or F after every optimiser step, apart from the loss."""

    @abstractmethod
    def shrink(self, model: torch.nn.Module, factor: float) -> None:
        """Change the operators of the model in place; `factor` in (0, 1] is the schedule's at this step."""


class Optimizer(Part):
    """Setting of the optimiser."""

    @abstractmethod
    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer: ...


class Observable(Part):
    """Setting of something measured on trajectories: a thin shell over pure functions of `emformer.geometry`.

    `family`: the short name that `emformer.observe` knows it by. `keys`: every key that its rows may have, and for each the
    definition, unit, range and null in one line. `needs`: what a trajectory must have for it ("model": operators, heads and
    patterns; "vocabulary": a model with words to predict, more than one; "reads": read clouds; "labels"; "tokens"); where that
    lacks it is skipped, and said so.
    """

    family: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def begin(self) -> Any:
        """Return the `emformer.observables.Observation` that takes trajectories one after the other, then tells its rows."""


class Experiment(Part):
    """Setting of an idealised model that is simulated, and held against what theory says of it.

    `name`: the word that `emformer simulate` knows it by. `title`: what it is about, in one line.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def run(self, tell: Callable[[float, str], None]) -> Any:
        """Simulate, and return the `emformer.theory.outcome.Outcome`. `tell` is given the share done, in [0, 1], and a word on
        what is being done, now and then."""


class Study(Part):
    """Setting of a study of trained models: claims that are held against what is measured on them, with controls.

    `name`: the word that `emformer study` knows it by. `title`: what it asks, in one line. `prompts`, `length`: how many prompts
    of how many tokens it wants, unless the caller says otherwise; a model of shorter context gets shorter ones.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    prompts: ClassVar[int] = 64
    length: ClassVar[int] = 64

    @abstractmethod
    def run(self, subjects: Sequence[Any], tell: Callable[[float, str], None]) -> Any:
        """Study the `emformer.studies.subjects.Subject`s, one model or several that differ by their seed, and return
        `emformer.verdicts.Findings`. `tell` is given the share done, in [0, 1], and a word on what is being done."""


class Engine(Part):
    """Setting of what runs the cells of an ablation study, each in a process of its own."""

    @abstractmethod
    def run(self, jobs: Sequence[Any], tell: Callable[[Any], None]) -> None:
        """Run every `emformer.studies.jobs.Job`, and return when none is left. `tell` is given an `emformer.studies.jobs.Event`
        for each that starts or ends, and now and then one that says nothing new. A job that fails does not stop the rest."""

    @abstractmethod
    def script(self, jobs: Sequence[Any]) -> str:
        """What would be run, as text for people."""


class Cadence(Part):
    """When to record."""

    @abstractmethod
    def due(self, step: int, max_steps: int) -> bool:
        """Whether something is recorded after optimiser step `step` of `max_steps`; step 0 is the untrained model."""


class Callback(Part):
    """Setting of what is recorded while a model learns, and when."""

    @abstractmethod
    def looks(self, step: int, max_steps: int) -> Sequence[Any]:
        """What to look at after optimiser step `step` of `max_steps`, as `emformer.observables.Look`s; none if nothing is due.
        Step 0 is the untrained model; after the last step costly ones have their turn."""


class Logger(Part):
    """Setting of a mirror of the metrics (the JSONL file in the run folder is always the truth)."""

    @abstractmethod
    def build(self, folder: str) -> Any: ...


def plain(value: Any) -> Any:
    """A setting as nested dictionaries, lists and scalars; parts become {class_path, init_args}. Inverse: the parser."""
    if isinstance(value, Part):
        arguments = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"class_path": path, "init_args": arguments} if arguments else {"class_path": path}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
