"""Characters, bytes, byte-level pairs, or a ready tokenizer; all are `tokenizers.Tokenizer` objects of one JSON file.

The own tokenizers have `<|endoftext|>` as id 0. It separates documents and is never read out of text: a corpus that
spells it gets the ids of its letters. That switch (`encode_special_tokens`) is not part of the JSON, hence `load`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read at import: its threads do not survive a fork

import tokenizers as hf
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from emformer.files import replaced
from emformer.parts import Tokenizer, UserError, plain
from emformer.text.hub import offline, reachable

SEPARATOR = "<|endoftext|>"
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Characters(Tokenizer):
    """One token per Unicode character seen in the text, `<unk>` (id 1) for every other; ids follow code points.

    It asks for the whole text, not only the training part: its vocabulary is an alphabet, nothing is fitted to
    frequencies, and a letter that only the validation part has would otherwise become `<unk>` and cost nothing to name.
    """

    reads_all: ClassVar[bool] = True

    def build(self, texts: Iterator[str]) -> hf.Tokenizer:
        """Return the tokenizer of the characters in `texts`. Round-trips every text of these. Cost: one pass."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        vocab = {token: i for i, token in enumerate([SEPARATOR, UNKNOWN, *sorted(seen)])}
        tokenizer = hf.Tokenizer(models.WordLevel(vocab=vocab, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return _finish(tokenizer)


@dataclass(frozen=True)
class Bytes(Tokenizer):
    """One token per UTF-8 byte: 257 ids, nothing to learn, every text round-trips."""

    def build(self, texts: Iterator[str]) -> hf.Tokenizer:
        """Return the tokenizer; `texts` is not read."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate([SEPARATOR, *alphabet])}
        tokenizer = hf.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return _finish(tokenizer)


@dataclass(frozen=True)
class BPE(Tokenizer):
    """Byte-level pair encoding, trained on the text; every text round-trips, seen or not.

    Attributes:
        vocab: number of ids, at least 257 (the separator and the 256 bytes); fewer come out where the text is too small
            to have that many pairs.
    """

    vocab: int = 1024

    def __post_init__(self) -> None:
        if self.vocab < 257:
            raise UserError(f"BPE(vocab={self.vocab}) has no room for 256 bytes and a separator: set vocab >= 257")

    @classmethod
    def examples(cls) -> Sequence[BPE]:
        return [cls(vocab=300)]

    def build(self, texts: Iterator[str]) -> hf.Tokenizer:
        """Return the tokenizer trained on `texts`; the same texts give the same tokenizer. Cost: 0.4 s per MB."""
        tokenizer = hf.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return _finish(tokenizer)


@dataclass(frozen=True)
class Pretrained(Tokenizer):
    """A tokenizer that exists already.

    Attributes:
        source: path of a `tokenizer.json`, a folder that has one (a run, a checkpoint), or a name on the hub. A name is
            taken from the local cache where there is no network, and fails at once (<= 2 s) if it is not there.
    """

    source: str

    @classmethod
    def examples(cls) -> Sequence[Pretrained]:
        return []  # none that is there on every machine

    def build(self, texts: Iterator[str]) -> hf.Tokenizer:
        """Return the tokenizer; `texts` is not read. Raises `UserError` where there is none or the file is broken."""
        return load(_locate(self.source))


def load(path: str | Path) -> hf.Tokenizer:
    """Read a `tokenizer.json`. Special tokens that text spells out stay text, nothing is truncated or padded.

    Raises `UserError` for a missing, truncated or foreign file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or "unreadable"
        raise UserError(f"cannot read the tokenizer {path} ({reason}): name an existing tokenizer.json") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text, so not a whole tokenizer.json: restore it or train a new one") from error
    with guarded(f"{path} is not a whole tokenizer.json", "restore it or train a new one"):
        tokenizer = hf.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@contextmanager
def guarded(what: str, advice: str) -> Generator[None]:
    """`UserError` "WHAT (reason): ADVICE" for whatever the library raises of a tokenizer that is damaged, or of a text that it
    cannot bear: the bare class, or a panic of its Rust code, which is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(f"{what} ({str(error)[:100]}): {advice}") from error


def save(tokenizer: hf.Tokenizer, path: str | Path) -> None:
    """Write the tokenizer's JSON. A reader sees the old file or the new one, never a part."""
    with replaced(Path(path)) as partial:
        partial.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def vocabulary(tokenizer: hf.Tokenizer) -> int:
    """Ids that a model of this tokenizer needs: the largest plus one (given tokenizers may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: hf.Tokenizer) -> str:
    """Hex SHA-256 of the tokenizer's JSON: equal for equal vocabularies, merges and rules."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def identity(tokenizer: Tokenizer) -> str:
    """Hex SHA-256 of a tokenizer's settings, and for a local file of what is in it."""
    total = hashlib.sha256(json.dumps(plain(tokenizer), sort_keys=True).encode())
    if isinstance(tokenizer, Pretrained) and Path(tokenizer.source).exists():
        total.update(fingerprint(load(_locate(tokenizer.source))).encode())
    return total.hexdigest()


def _finish(tokenizer: hf.Tokenizer) -> hf.Tokenizer:
    tokenizer.add_special_tokens([SEPARATOR])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _locate(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise UserError(f"the folder {path} has no tokenizer.json: name a folder or file that has one")
        return path / "tokenizer.json"
    if path.is_file():
        return path
    advice = "name a local tokenizer.json, or train one with BPE, Bytes or Characters"
    if path.suffix == ".json" or path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise UserError(f"there is no tokenizer file {path}: {advice}")
    from huggingface_hub import hf_hub_download

    online = reachable()
    try:
        with nullcontext() if online else offline():
            return Path(hf_hub_download(source, "tokenizer.json"))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200] if online else "the hub cannot be reached and it is not in the cache"
        raise UserError(f"cannot load the tokenizer '{source}' ({why}): {advice}") from error
