"""The prompts that an analysis reads, a few at a time and in a random order: the first n are a fair sample of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from emformer.files import replaced
from emformer.parts import Corpus, LabelledCorpus, UserError
from emformer.records import Loaded
from emformer.text import Absent, Blocks, File, Pretrained, Prompts, prepare, probe, token_classes
from emformer.training.fit import read_text_visibly

STREAM = 4  # sets the order's random numbers apart from those of training and of the probe


class Lot(NamedTuple):
    """Some prompts: ids (n, T); classes of their tokens (n, T), -1 for none; groups (n,), equal where they share text."""

    tokens: Int64[np.ndarray, "n T"]
    labels: Int64[np.ndarray, "n T"] | None
    groups: Int64[np.ndarray, " n"]


class Sample(ABC):
    """`count` prompts of `length` tokens in a fixed random order."""

    count: int
    length: int

    @abstractmethod
    def take(self, start: int, stop: int) -> Lot:
        """Prompts `start` to `stop` (exclusive). A pure function: the same at every call."""


class Windows(Sample):
    """Windows of a text on disk that lie side by side, so that no two share a token. Memory: 8 bytes a window of the text.

    Args:
        tokens: ids of the text (N,), mapped.
        length: T.
        seed: of the order.
        most: tokens that are read at most; None for all, up to the last whole window.
        classes: of each token (N,), mapped; or None.

    Raises:
        UserError: if the text, or what may be read of it, is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, length: int, seed: int, most: int | None = None, classes: np.ndarray | None = None):
        whole = len(tokens) // length
        self.count, self.length = whole if most is None else min(whole, most // length), length
        if not whole:
            raise UserError(
                f"the text has {len(tokens)} tokens and one prompt {length}: take a longer text, or a smaller --length."
            )
        self._tokens, self._classes = tokens, classes
        self._order = np.random.default_rng((STREAM, seed)).permutation(whole)[: self.count].copy()

    def take(self, start: int, stop: int) -> Lot:
        some = self._order[start:stop]
        where = some[:, None] * self.length + np.arange(self.length)
        labels = None if self._classes is None else self._classes[where].astype(np.int64)
        return Lot(self._tokens[where].astype(np.int64), labels, some)


class Probe(Sample):
    """The prompts of `emformer.text.probe`, all in memory, with their identity and the names of their classifications."""

    def __init__(self, prompts: Prompts):
        self.count, self.length = prompts.tokens.shape
        self.identity, self.names, self.labels, self._prompts = prompts.identity, prompts.names, prompts.labels, prompts

    def take(self, start: int, stop: int) -> Lot:
        one, some = self._prompts, slice(start, stop)
        return Lot(one.tokens[some], None if one.labels is None else one.labels[0, some], one.groups[some])


class Own(NamedTuple):
    """The validation text that a model was trained beside, ready to be sampled."""

    blocks: Blocks
    corpus: Corpus

    def sample(self, prompts: int, length: int, seed: int) -> Probe:
        return Probe(probe(self.blocks, self.corpus, prompts, length, seed))


def own_text(loaded: Loaded) -> Own:
    """The text of the settings that a model was trained with.

    Raises:
        UserError: where it is not known, is no longer there, or has become another.
    """
    data = loaded.config.data
    corpus = data.corpus if data.path is None else File(data.path)
    if isinstance(corpus, Absent):
        raise UserError(f"{loaded.path} comes without its text; name one with --text FILE or --corpus NAME.")
    blocks = read_text_visibly(data)
    if blocks.tokenizer.to_str() != loaded.tokenizer.to_str():
        raise UserError(
            f"the corpus of {loaded.path} has changed and no longer gives its tokenizer; name a text with --text FILE."
        )
    return Own(blocks, corpus)


def tokenised(corpus: Corpus, tokenizer: Path, folder: Path, progress: Callable[[int], None] | None = None) -> Blocks:
    """The whole corpus in the tokens of `tokenizer` (a tokenizer.json), once made in `folder` and then found there.

    Of a labelled corpus its first classification is written beside the tokens: see `classes`. Cost: about 1 s per MB of text and
    6 bytes of disk per token while it runs, 2 or 4 afterwards, 4 more with classes; memory does not grow with the corpus.
    """
    blocks = prepare(corpus, Pretrained(str(tokenizer)), 0.0, cache=folder, progress=progress)
    path = blocks.folder / CLASSES
    if isinstance(corpus, LabelledCorpus) and not path.exists():
        with replaced(path) as partial, partial.open("wb") as file:
            for _, labels in token_classes(blocks, corpus):
                file.write(labels[:, 0].astype(np.int32).tobytes())
    return blocks


CLASSES = "classes.bin"


def classes(blocks: Blocks) -> np.ndarray | None:
    """The class of every token of a text that `tokenised` made, mapped; None where its corpus knows none."""
    path = blocks.folder / CLASSES
    return np.memmap(path, np.int32, mode="r") if path.exists() else None
