"""Where text comes from: CPython's own manual, local files, and any set that the `datasets` library reads."""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from emformer.parts import Corpus, UserError
from emformer.text.hub import offline, reachable

WHOLE = 64 << 20  # bytes: a file below this size is one document
PIECE = 16 << 20  # bytes: a larger one is cut into pieces of about this size
FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "arrow": "arrow"}
ALTERNATIVES = "use PythonDocs, Grammar or File, which need no network"


def digest(documents: Iterable[str]) -> str:
    """Hex SHA-256 of the documents, each prefixed by its length in bytes so that their boundaries count. One pass."""
    total = hashlib.sha256()
    for document in documents:
        data = document.encode()
        total.update(len(data).to_bytes(8, "big"))
        total.update(data)
    return total.hexdigest()


@dataclass(frozen=True)
class PythonDocs(Corpus):
    """The topics of Python's own help: 0.5 MB of technical English that every interpreter carries, no network needed.

    One document per topic, in sorted order of their names. The text differs between patch releases of Python, so a run
    that must be repeated elsewhere records `identity()`.
    """

    def documents(self) -> Iterator[str]:
        """About 80 documents, 0.47 MB. Raises `UserError` on a Python that was installed without its help text."""
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise UserError("this Python carries no pydoc_data.topics: use Grammar or File instead") from error
        for name in sorted(topics):
            yield topics[name]

    def identity(self) -> str:
        """Hex SHA-256 over the documents. Cost: one pass, a few milliseconds."""
        return digest(self.documents())


@dataclass(frozen=True)
class File(Corpus):
    """Local UTF-8 text: one file or all files that a pattern matches, `.gz` opened transparently.

    Each file is one document, in sorted order of the paths, its newlines kept exactly as they are. A file of 64 MB or
    more becomes several documents of about 16 MB, cut after a newline (inside a line only where one line is longer than
    that), so that memory stays bounded.

    Attributes:
        path: a file or a glob pattern; `**` stands for any depth of folders, `~` for the home folder. Empty files that
            a pattern matches are passed over, as long as one of them has text.
    """

    path: str

    @classmethod
    def examples(cls) -> Sequence[File]:
        return [cls(path=__file__)]

    def documents(self) -> Iterator[str]:
        """The files' texts. Raises `UserError` for a missing, empty, unreadable or binary file, with its place."""
        empty = True
        for path in self._paths():
            for document in _read(path):
                empty = False
                yield document
        if empty:
            raise UserError(f"{self.path} is empty: name a file that has text in it")

    def identity(self) -> str:
        """Hex SHA-256 over the documents. Cost: one pass over the files."""
        return digest(self.documents())

    def _paths(self) -> list[Path]:
        path = Path(self.path).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            raise UserError(f"{self.path} is a folder: name its files by a pattern such as '{path / '**' / '*.txt'}'")
        if glob.has_magic(self.path):
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
            if matches:
                return matches
            raise UserError(f"no file matches '{self.path}': correct the pattern{_nearest(path)}")
        raise UserError(f"there is no file {self.path}: correct the path{_nearest(path)}")


@dataclass(frozen=True)
class Absent(Corpus):
    """The text of a model whose own text is not at hand: one that came as a folder, or from the hub.

    Attributes:
        of: the model, for the sentence that says so.
    """

    of: str

    @classmethod
    def examples(cls) -> Sequence[Absent]:
        return []  # it has no documents

    def documents(self) -> Iterator[str]:
        """Raises `UserError`, which asks for another text."""
        raise UserError(self._sentence())

    def identity(self) -> str:
        """Raises `UserError` as `documents` does."""
        raise UserError(self._sentence())

    def _sentence(self) -> str:
        return f"the text that {self.of} learned from is not part of it: name another one with --text FILE."


def _nearest(path: Path) -> str:
    """A hint at the existing name that is most like the missing one, in the deepest folder that does exist."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir())
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f", did you mean {parent / close[0]}?" if close else f" (looked in {parent})"


def _read(path: Path) -> Iterator[str]:
    try:
        with cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            data, place = file.read(WHOLE), 0
            if len(data) < WHOLE:
                if data:
                    yield _decode(data, path, place)
                return
            while data:
                cut = len(data)
                if cut > PIECE:
                    cut = data.rfind(b"\n", 0, PIECE) + 1 or PIECE
                    while cut > 1 and data[cut] & 0xC0 == 0x80:  # never inside a character
                        cut -= 1
                yield _decode(data[:cut], path, place)
                data, place = data[cut:], place + cut
                if len(data) <= PIECE:
                    data += file.read(WHOLE)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): check that it is whole and that you may read it") from error


def _decode(data: bytes, path: Path, place: int) -> str:
    zero = data.find(0)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if zero < 0 or error.start < zero:
            message = f"{path} is not UTF-8 text (byte {place + error.start}): convert it or name another file"
            raise UserError(message) from error
    if zero >= 0:
        raise UserError(f"{path} is not text but binary (NUL at byte {place + zero}): name a text file")
    return text


@dataclass(frozen=True)
class Hub(Corpus):
    """Any set that the `datasets` library reads: a name on the hub, or a local file or folder (json, csv, parquet ...).

    One row is one document; rows whose cell is null or empty are passed over. Without network a set of the hub is taken
    from the local cache of `datasets`, and if it is not there the failure comes at once (<= 2 s). Local names never
    touch the network. Plain text in a set is read file by file, so that its newlines survive.

    Attributes:
        name: of the set on the hub, or the path of a local file or folder.
        config: name of the set's configuration, where it has several.
        split: such as "train" or "validation", also a slice such as "train[:1%]" where `streaming` is off.
        column: the column that holds the text.
        revision: branch, tag or commit on the hub; name a commit to make a run repeatable.
        streaming: read rows as they arrive instead of storing the whole set first.
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    streaming: bool = True

    remote: ClassVar[bool] = True  # its length is unknown and a second pass is dear: a tokenizer learns from its head

    @classmethod
    def examples(cls) -> Sequence[Hub]:
        return [cls(name=__file__)]  # a local text file, so that no network is needed

    def documents(self) -> Iterator[str]:
        """The column's texts in the order of the rows.

        Raises `UserError` without network or set, for an unknown configuration, split or column (naming those that
        exist), and for a column that holds no text. Cost: reads lazily where `streaming`.
        """
        rows = self._rows()
        columns = rows.column_names or list(next(iter(rows), {}))
        if self.column not in columns:
            known = ", ".join(columns) or "none"
            raise UserError(f"{self.name} has no column '{self.column}': set column to one of its columns ({known})")
        found = False
        try:
            for row in rows.select_columns([self.column]):
                text = row[self.column]
                if not isinstance(text, str | None):
                    kind = type(text).__name__
                    raise UserError(f"column '{self.column}' of {self.name} holds {kind}: name a column of text")
                if text:
                    found = True
                    yield text
        except OSError as error:
            raise UserError(f"reading {self.name} broke off ({_line(error)}): try again, or {ALTERNATIVES}") from error
        if not found:
            raise UserError(f"column '{self.column}' of {self.name} ({self.split}) is empty: name another set or split")

    def identity(self) -> str:
        """Hex SHA-256 of name, config, split, column and revision, and for a local set of its files.

        Asks no network, so that what was prepared earlier is found again offline. Cost: one pass over local files.
        """
        settings = [self.name, self.config, self.split, self.column, self.revision]
        total = hashlib.sha256(json.dumps(settings).encode())
        path = Path(self.name)
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            with file.open("rb") as data:
                total.update(f"{file.relative_to(path)}:{hashlib.file_digest(data, 'sha256').hexdigest()}".encode())
        return total.hexdigest()

    def _rows(self) -> Any:
        import datasets
        import datasets.exceptions

        path = Path(self.name)
        local = path.exists()
        online = local or reachable()
        arguments: dict[str, Any] = {"path": self.name, "name": self.config, "revision": self.revision}
        if path.is_file():
            suffixes = path.name.removesuffix(".gz").split(".")
            arguments |= {"path": FORMATS.get(suffixes[-1].lower(), "text"), "data_files": str(path), "revision": None}
            if suffixes[-1].lower() == "tsv":
                arguments["sep"] = "\t"
        try:
            with offline() if local or not online else nullcontext():
                builder = datasets.load_dataset_builder(**arguments)
                if hasattr(builder.config, "keep_linebreaks"):  # plain text: by default it would lose its newlines
                    builder = datasets.load_dataset_builder(**arguments, sample_by="document")
                if self.streaming and online:
                    return builder.as_streaming_dataset(split=self.split)
                builder.download_and_prepare()
                return builder.as_dataset(split=self.split)
        except ConnectionError as error:
            why = "the hub cannot be reached and the set is not in the local cache" if not online else _line(error)
            raise UserError(f"cannot load '{self.name}': {why}; {ALTERNATIVES}") from error
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"cannot load '{self.name}' ({_line(error)}): correct its settings") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
