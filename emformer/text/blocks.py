"""From text to windows of tokens: tokenise once into a memory-mapped folder, then cut windows at random access."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers as hf

from emformer.parts import Corpus, Tokenizer, UserError
from emformer.text.tokenizers import SEPARATOR, fingerprint, guarded, identity, load, save

FORMAT = 1
CHUNK = 1 << 12  # characters that are encoded as one string
BATCH = 1 << 20  # characters that are encoded at once, and so the measure of the memory needed
HEAD = 10_000_000  # characters of a remote corpus that a tokenizer learns from

Split = Literal["train", "validation"]

# Cutting a text at these two places changes no token of a byte-level BPE: its words begin with the one space before
# them, and a single newline between two words is a word of its own. A run of white space would be divided otherwise.
_AFTER_NEWLINE = re.compile(r".*\S\n(?=\S)", re.DOTALL)
_BEFORE_SPACE = re.compile(r".*\S(?= \S)", re.DOTALL)


class Blocks:
    """The tokens of a corpus on disk, split into a leading training part and a validation part that follow each other.

    Attributes:
        folder: where `tokens.bin`, `tokenizer.json` and `meta.json` lie.
        meta: `count` (tokens), `train` (tokens before the split), `bytes` (UTF-8 bytes of each split's text, separators
            counting none), `documents`, `dtype`, `corpus`, `tokenizer` (SHA-256 of both), `key`, `format`.
        tokenizer: made the tokens, ready to use.
        tokens: all of them, a read-only memory map, 1-D, uint16 or uint32.
        train, validation: its two parts.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder that `prepare` wrote. Raises `UserError` if anything in it is missing, torn or foreign."""
        self.folder = Path(folder)
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            count, dtype = self.meta["count"], np.dtype(self.meta["dtype"])
            whole = (self.folder / "tokens.bin").stat().st_size == count * dtype.itemsize
            known = self.meta["format"] == FORMAT and self.meta["key"].startswith(self.folder.name)
            self.tokenizer = load(self.folder / "tokenizer.json")
            if not (whole and known and fingerprint(self.tokenizer) == self.meta["tokenizer"]):
                raise ValueError("its files do not belong together")
            self.tokens = np.memmap(self.folder / "tokens.bin", dtype=dtype, mode="r", shape=(count,))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{self.folder} holds no whole set of tokens ({error}): prepare the corpus again"
            raise UserError(message) from error
        self.train = self.tokens[: self.meta["train"]]
        self.validation = self.tokens[self.meta["train"] :]

    def bytes_per_token(self, split: Split) -> float:
        """Mean UTF-8 bytes of text per token, so that bits per byte = nats per token / (ln 2 * bytes per token)."""
        tokens = self.train if split == "train" else self.validation
        if not len(tokens):
            raise UserError(f"the {split} part of {self.folder} is empty: prepare the corpus with another share")
        return self.meta["bytes"][split] / len(tokens)


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    validation: float = 0.1,
    *,
    cache: str | Path,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Blocks:
    """Tokenise `corpus` once into a folder under `cache`; the same request later opens that folder.

    The first `int((1 - validation) * count)` tokens are for training, moved back by up to three where that would cut
    one character in two. Several documents are each headed by `<|endoftext|>`, where the tokenizer has it. A tokenizer
    that learns sees the leading `1 - validation` share of the characters, of a remote corpus only that share of its
    first 10 MB; with `max_tokens` no more characters than training tokens, because a token may be as short as that.
    `Characters` alone reads all of a local text: its vocabulary is an alphabet, and the validation part must not hold
    unknown letters.

    The folder appears whole or not at all: a killed writer leaves only a `.partial-*` folder, which is never read, two
    writers at once both succeed, and a damaged folder is made again.

    Args:
        validation: share of the tokens kept apart at the end, in [0, 1).
        cache: folder for prepared corpora, made if it is not there.
        max_tokens: stop after that many tokens (separators count).
        progress: called with the number of tokens written so far, about once per megabyte.

    Raises `UserError` for a wrong argument, an empty corpus, a full disk or a cache that cannot be written, and what
    the corpus or the tokenizer raise. Cost: about 1 s per MB of text and 6 bytes of disk per token while it runs, 2
    (or 4) afterwards; memory does not grow with the corpus, apart from one document. Opening an existing folder costs
    the corpus' `identity()`.
    """
    if not 0 <= validation < 1:
        raise UserError(f"validation={validation} is not a share of the text: set it in [0, 1), such as 0.1")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} leaves no text: set it to 1 or more, or leave it out")
    request = {
        "corpus": corpus.identity(),
        "tokenizer": identity(tokenizer),
        "validation": validation,
        "max_tokens": max_tokens,
        "format": FORMAT,
    }
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    folder = Path(cache) / key[:32]
    partial = None
    try:
        if folder.is_dir():
            try:
                return Blocks(folder)
            except UserError:  # torn or foreign: out of the way, in one step, and again
                _discard(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        texts = _learnable(corpus, tokenizer, 1 - validation, max_tokens)
        built = tokenizer.build(texts)
        meta = _write(corpus, built, partial, validation, max_tokens, progress)
        meta |= {"corpus": request["corpus"], "key": key, "format": FORMAT}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another writer was first, and both wrote the same: below the other's folder is opened.
        return Blocks(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk of {cache} is full: free some space or choose another cache folder") from error
        raise UserError(f"cannot write to the cache {cache} ({error}): choose another folder") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _discard(folder: Path) -> None:
    grave = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    with suppress(FileNotFoundError):  # another process was faster
        folder.rename(grave / folder.name)
    shutil.rmtree(grave, ignore_errors=True)


def _learnable(corpus: Corpus, tokenizer: Tokenizer, share: float, max_tokens: int | None) -> Iterator[str]:
    """The text that the tokenizer may learn from, in chunks; nothing is read before the first is asked for."""
    remote = corpus.remote
    if tokenizer.reads_all:
        left = HEAD if remote else None
    else:
        total = 0
        for document in corpus.documents():
            total += len(document)
            if remote and total >= HEAD:
                break
        left = int(share * min(total, HEAD if remote else total, max_tokens or total))
    for document in corpus.documents():
        yield from _chunks(document[:left])
        if left is not None:
            left -= len(document)
            if left <= 0:
                return


def _chunks(document: str) -> Iterator[str]:
    """The document in pieces of at most CHUNK characters, cut where a byte-level BPE would cut anyway if possible.

    The places depend on the document alone, so its tokens never depend on what else was encoded beside it.
    """
    start = 0
    while len(document) - start > CHUNK:
        window = document[start : start + CHUNK + 2]  # what follows the last place is looked at
        match = _AFTER_NEWLINE.match(window, 0, CHUNK + 1) or _BEFORE_SPACE.match(window)
        cut = start + (match.end() if match else CHUNK)
        yield document[start:cut]
        start = cut
    if start < len(document):
        yield document[start:]


def _write(
    corpus: Corpus,
    tokenizer: hf.Tokenizer,
    folder: Path,
    validation: float,
    max_tokens: int | None,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Write tokens.bin and tokenizer.json into `folder`; return what there is to say about them.

    Beside every token its number of bytes goes to a file that lives as long as this function: where the split falls is
    known only at the end, and the bytes on both sides of it must be exact.
    """
    separator = tokenizer.token_to_id(SEPARATOR)
    largest = max(tokenizer.get_vocab().values(), default=0)
    dtype = np.dtype(np.uint16 if largest < 65_535 else np.uint32)
    count = number = pending = 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "lengths.bin").open("wb") as lengths:
        for batch in encode(corpus.documents(), tokenizer):
            for text, opens, head, encoding in batch:
                number += opens and (max_tokens is None or count < max_tokens)
                tokens.write(np.array(head, dtype).tobytes())
                lengths.write(np.zeros(len(head), np.uint32).tobytes())
                count += len(head)
                ids = np.array(encoding.ids, dtype)
                sizes = _sizes(text, encoding.offsets)
                if not len(ids):  # a tokenizer may drop white space: its bytes go to the next token there is
                    pending += len(text.encode())
                    continue
                sizes[0] += pending
                pending = 0
                tokens.write(ids.tobytes())  # `tofile` would not say that a disk is full
                lengths.write(sizes.astype(np.uint32).tobytes())
                count += len(ids)
            if progress is not None:
                progress(count if max_tokens is None else min(count, max_tokens))
            if max_tokens is not None and count > max_tokens:
                break
    if not count:
        raise UserError("the corpus has no text, or none that this tokenizer knows: choose another")

    ids = np.memmap(folder / "tokens.bin", dtype, mode="r")
    sizes = np.memmap(folder / "lengths.bin", np.uint32, mode="r")

    def whole(place: int) -> int:
        """The place at or before `place` that does not stand inside a character."""
        while 0 < place < len(ids) and sizes[place] == 0 and ids[place] != separator:
            place -= 1
        return place

    count = whole(count if max_tokens is None else min(count, max_tokens))
    if not count:
        raise UserError(f"max_tokens={max_tokens} ends inside the first character: set it higher")
    train = whole(int((1 - validation) * count))
    size = {"train": int(sizes[:train].sum(dtype=np.int64))}
    size["validation"] = int(sizes[train:count].sum(dtype=np.int64)) + (pending if count == len(ids) else 0)
    os.truncate(folder / "tokens.bin", count * dtype.itemsize)
    (folder / "lengths.bin").unlink()
    save(tokenizer, folder / "tokenizer.json")
    return {
        "count": count,
        "train": train,
        "bytes": size,
        "documents": number,
        "dtype": dtype.name,
        "tokenizer": fingerprint(tokenizer),
    }


class Chunk(NamedTuple):
    """A piece of a document with its tokens: those of `head` (the separator, or none), then those of `encoding`."""

    text: str
    opens: bool  # it begins a document
    head: list[int]
    encoding: hf.Encoding


def encode(documents: Iterator[str], tokenizer: hf.Tokenizer) -> Iterator[list[Chunk]]:
    """All tokens of the documents, in the order in which a prepared folder has them, about BATCH characters at a time.

    An empty document has no chunk.
    """
    separator = tokenizer.token_to_id(SEPARATOR)
    first = list(islice(documents, 2))
    head = [separator] if separator is not None and len(first) > 1 else []
    for batch in _batches(chain(first, documents)):
        with guarded("the tokenizer cannot read this text", "take another tokenizer or text"):
            encodings = tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
        yield [
            Chunk(text, opens, head if opens else [], encoding) for (text, opens), encoding in zip(batch, encodings, strict=True)
        ]


def _batches(documents: Iterator[str]) -> Iterator[list[tuple[str, bool]]]:
    """Groups of (chunk, whether it opens a document) of about BATCH characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        for i, text in enumerate(_chunks(document)):
            batch.append((text, i == 0))
            size += len(text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _sizes(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes of every token, (tokens,) int64; they sum to the bytes of `text` if there is a token at all.

    The bytes of a character that several tokens share belong to the first of them, characters that no token covers to
    the next token, those at the end to the last.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    upto = np.concatenate([[0], np.cumsum(width)])
    ends = np.maximum.accumulate(np.array(offsets, np.int64).reshape(-1, 2)[:, 1])
    ends[-1:] = len(text)
    return np.diff(upto[ends], prepend=0)


class Windows:
    """Windows of `context + 1` tokens at stride `context`: inputs are `[:-1]`, targets `[1:]`, nothing is padded.

    `batch` is for training, without end and in random order; `fixed` and `len` are for validation, in order.

    An epoch has `n = max(1, len(tokens) // context - 1)` windows that begin at a random offset, so that the borders
    fall elsewhere each time. The number is the same in all epochs, so that the place of batch i is found by division.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int = 0) -> None:
        """Take a 1-D array of tokens, the number of inputs per window and a seed >= 0.

        Raises `UserError` if there are fewer tokens than one window needs.
        """
        if context < 1 or seed < 0:
            raise UserError(f"context={context}, seed={seed} make no windows: set context >= 1 and seed >= 0")
        if len(tokens) < context + 1:
            raise UserError(
                f"the text has {len(tokens)} tokens, but one window of context {context} needs {context + 1}: "
                "take a longer text, a larger share of it or a smaller context"
            )
        self.tokens, self.context, self.seed = tokens, context, seed
        self.epoch_length = max(1, len(tokens) // context - 1)
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Number of validation windows, `(len(tokens) - 1) // context`."""
        return (len(self.tokens) - 1) // self.context

    def batch(self, i: int, size: int, rows: slice = slice(None)) -> np.ndarray:
        """Training batch i >= 0: (size, context + 1) int64, or those `rows` of it (one rank's share).

        A pure function of (tokens, context, seed, i, size): the order of calls does not matter. Every epoch visits each
        of its windows once, and batches run on across the border of epochs. Cost: the rows asked for, plus one
        permutation of the epoch where it is another epoch than the last call's.
        """
        places = np.arange(i * size, (i + 1) * size)[rows]
        epochs, within = np.divmod(places, self.epoch_length)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            starts[chosen] = self._starts(int(epoch))[within[chosen]]
        return self._cut(starts)

    def fixed(self, start: int, stop: int) -> np.ndarray:
        """Validation windows `start` to `stop` (exclusive) in the order of the text, (stop - start, context + 1) int64.

        They are the same at every call; `stop` beyond `len(self)` gives fewer rows.
        """
        return self._cut(np.arange(start, min(stop, len(self))) * self.context)

    def _starts(self, epoch: int) -> np.ndarray:
        if self._latest[0] != epoch:
            random = np.random.default_rng((self.seed, epoch))
            # All room that the windows leave, which is `context` or more on any text of two windows: so the last tokens
            # of the text have their turn too.
            offset = random.integers(len(self.tokens) - self.epoch_length * self.context)
            self._latest = epoch, offset + self.context * random.permutation(self.epoch_length)
        return self._latest[1]

    def _cut(self, starts: np.ndarray) -> np.ndarray:
        return self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)
