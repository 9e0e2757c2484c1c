"""The probe: the fixed held-out prompts on which everything is recorded, with what is known of their words."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Int64, Integer

from emformer.parts import Corpus, LabelledCorpus, UserError
from emformer.text.blocks import Blocks, encode
from emformer.text.grammar import token_labels

STREAM = 3  # sets the probe's random numbers apart from those of the training batches of the same seed


@dataclass(frozen=True, eq=False)
class Prompts:
    """N prompts of T tokens from the validation part, in random order: the first n are a fair sample of all.

    Attributes:
        tokens: ids (N, T).
        starts: where each begins, in tokens from the start of the validation part; all different.
        names: of the C classifications, or empty.
        labels: class ids (C, N, T), -1 where a token has none; None where the corpus knows no classes.
    """

    tokens: Int64[np.ndarray, "N T"]
    starts: Int64[np.ndarray, " N"]
    names: tuple[str, ...] = ()
    labels: Int64[np.ndarray, "C N T"] | None = None

    @property
    def distinct(self) -> int:
        """Different ids among the N last tokens: before a model mixes in their context, so many different points."""
        return len(np.unique(self.tokens[:, -1]))

    @property
    def covered(self) -> int:
        """Tokens of the text that stand in at least one prompt; N T where none overlap."""
        length = self.tokens.shape[1]
        return length + int(np.minimum(self._gaps(), length).sum())

    @property
    def overlap(self) -> float:
        """Share of the prompts' tokens that repeat a place of the text, 1 - covered / (N T), in [0, 1)."""
        return 1 - self.covered / self.tokens.size

    @property
    def shared(self) -> int:
        """The most tokens that two prompts have in common by their place in the text, in 0 .. T - 1."""
        length = self.tokens.shape[1]
        return max(0, length - int(self._gaps().min(initial=length)))

    @property
    def groups(self) -> Int64[np.ndarray, " N"]:
        """A number for each prompt, the same for those that begin in the same stretch of 2 T tokens: most prompts that share text
        then share a group, and are one draw to a bootstrap. Where none overlap, each is a group of its own."""
        if not self.shared:
            return np.arange(len(self.starts))
        return self.starts // (2 * self.tokens.shape[1])

    @property
    def identity(self) -> str:
        """Hex SHA-256 of tokens, places, names and labels: what was measured on equal probes may be compared."""
        total = hashlib.sha256(json.dumps([*self.tokens.shape, *self.names]).encode())
        for array in (self.tokens, self.starts, self.labels):
            if array is not None:
                total.update(array.astype("<i8").tobytes())
        return total.hexdigest()

    def _gaps(self) -> np.ndarray:
        return np.diff(np.sort(self.starts))


def probe(blocks: Blocks, corpus: Corpus, prompts: int, length: int, seed: int) -> Prompts:
    """`prompts` prompts of `length` tokens from the validation part, evenly spread over it.

    Where the V validation tokens suffice (prompts * length <= V), the part is cut into as many equal stretches, and each
    prompt lies at a random place within its own. Otherwise the S = V - length + 1 possible starts are stepped through at equal
    distances from a random first one, each as likely as any other: neighbours share length - S / prompts tokens, rounded up or
    down. Where S is less than `prompts`, every start is taken once. The order is a random permutation, and all is a pure
    function of (validation tokens, prompts, length, seed).

    Args:
        corpus: what `blocks` was prepared from; a `LabelledCorpus` gives the prompts' tokens the classes of the words that
            cover most of them, -1 to separators and white space.

    Raises `UserError` if not one prompt fits, for arguments that make none, and if a labelled corpus is not the one that was
    prepared. Cost: O(prompts * length); with labels also what making and encoding the corpus costs, 0.6 s per MB.
    """
    if prompts < 1 or length < 1 or seed < 0:
        raise UserError(f"prompts={prompts}, length={length}, seed={seed} make no probe: set 1 or more, and a seed >= 0")
    total = len(blocks.validation)
    if total < length:
        advice = f"set probe.length to {total} or less, or" if total > 1 else "take a longer text or"
        raise UserError(f"a prompt of {length} tokens does not fit into {total} of validation: {advice} enlarge data.validation")
    random = np.random.default_rng((STREAM, seed))
    starts = random.permutation(_starts(total, prompts, length, random))
    where = starts[:, None] + np.arange(length)
    tokens = blocks.validation[where].astype(np.int64)
    if not isinstance(corpus, LabelledCorpus):
        return Prompts(tokens, starts)
    labels = _labels(blocks, corpus)[where]
    return Prompts(tokens, starts, corpus.label_names, np.ascontiguousarray(np.moveaxis(labels, -1, 0)))


def shuffled(tokens: Integer[np.ndarray, "N T"], seed: int) -> Integer[np.ndarray, "N T"]:
    """The tokens of each prompt in random order but for the last, which stays: the same words without their syntax.

    Each prompt has a permutation of its own, drawn uniformly from those of its first T - 1 places. They depend on (T, seed)
    and the prompt's row alone, so that labels of that shape are shuffled alike, and the first rows alike without the rest.
    A new array; cost O(N T).
    """
    count, length = tokens.shape
    order = np.broadcast_to(np.arange(length), (count, length)).copy()
    order[:, :-1] = np.random.default_rng((STREAM, seed, 1)).permuted(order[:, :-1], axis=1)
    return np.take_along_axis(tokens, order, axis=1)


def _starts(total: int, prompts: int, length: int, random: np.random.Generator) -> np.ndarray:
    """Ascending starts below total - length + 1, all different; as many as asked for where there are."""
    if prompts * length <= total:
        bounds = np.arange(prompts + 1) * total // prompts
        return bounds[:-1] + random.integers(0, np.diff(bounds) - length, endpoint=True)
    possible = total - length + 1
    count = min(prompts, possible)
    # the first one is random to the fraction of a step, so that every start is as likely as any other
    return (np.arange(count) * possible + random.integers(possible)) // count


def _labels(blocks: Blocks, corpus: LabelledCorpus) -> np.ndarray:
    """Labels of the validation tokens, (V, C) int64."""
    train = blocks.meta["train"]
    found = [np.empty((0, len(corpus.label_names)), np.int64)]
    for start, labels in token_classes(blocks, corpus):
        found.append(labels[max(0, train - start) :])
    return np.concatenate(found)


def token_classes(blocks: Blocks, corpus: LabelledCorpus) -> Iterator[tuple[int, Int64[np.ndarray, "n C"]]]:
    """(place of the first token, classes of n tokens (n, C) int64) through all of a prepared text, -1 where a token has none.

    The text is encoded once more, and must give the same tokens: raises `UserError` if it does not. Cost: 0.6 s per MB, and the
    memory of one document.
    """
    count = blocks.meta["count"]
    waiting: deque[np.ndarray] = deque()  # spans of the documents that were read but not yet encoded

    def documents() -> Iterator[str]:
        for text, spans in corpus.labelled_documents():
            if text:
                waiting.append(spans)
            yield text

    spans, place, end = np.empty((0, 2 + len(corpus.label_names)), np.int64), 0, 0
    for text, opens, head, encoding in chain.from_iterable(encode(documents(), blocks.tokenizer)):
        if opens:
            spans, place = waiting.popleft(), 0
        begin, end = end, min(end + len(head) + len(encoding), count)
        if not np.array_equal([*head, *encoding.ids][: end - begin], blocks.tokens[begin:end]):
            break
        offsets = np.array([(0, 0)] * len(head) + encoding.offsets, np.int64).reshape(-1, 2)
        offsets[len(head) :] += place
        yield begin, token_labels(offsets, spans)[: end - begin]
        place += len(text)
        if end == count:
            return
    raise UserError(f"{corpus} gives other tokens than {blocks.folder} has: name the corpus that was prepared there")
