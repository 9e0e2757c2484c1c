"""What the callbacks of runs recorded: written while a model trains, read back as one frame, derived as Parquet.

`records.jsonl` is the truth. A row a line, the step first, then the columns of `emformer.observables.COLUMNS`; undefined is null.
"""

from __future__ import annotations

import glob
import io
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.json

from emformer.files import replaced
from emformer.observables.base import COLUMNS, Row
from emformer.observables.frame import DTYPES, conform
from emformer.parts import UserError
from emformer.records import Journal, Run, disk_error, read_journal

Source = str | Path


class Recordings:
    """Writer of a run's records: append-only, one unbuffered write a row, so that a killed process loses no whole row.

    Rows of step s belong before checkpoint s: who resumes from that has them all and writes none twice.

    Args:
        path: `Run.records`; made if missing, and at once cut to what the run keeps.
        step: of the checkpoint that the run continues from; rows of later steps are cut, and a torn tail is dropped. -1: the run
            begins anew, every row is cut, those of step 0 too.
    """

    def __init__(self, path: Path, step: int):
        self._journal = Journal(path, step)

    def append(self, step: int, rows: Iterable[Row]) -> None:
        """Write rows of one step. Numbers that are not finite become null. Raises `UserError` on a full disk."""
        for row in rows:
            self._journal.append({"step": step} | {name: _PLAIN[DTYPES[name]](getattr(row, name)) for name in COLUMNS[1:]})

    def close(self) -> None:
        self._journal.close()


def _whole(value: Any) -> int | None:
    return None if value is None else operator.index(value)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "Int64": _whole,
    "int64": operator.index,
    "float64": _number,
    "string": lambda value: None if value is None else str(value),
}


def write_parquet(run: Source) -> Path:
    """Derive `records.parquet` from the records of a run folder, at once: readers see the old file or the new. Returns its path.

    `pandas.read_parquet` gives the frame of `read_records` back, dtypes and all, but for the column `run`.

    Raises:
        UserError: for a folder without records, or if it cannot be written.
    """
    folder = Run(run)
    if not folder.records.is_file():
        raise UserError(_nothing(str(run)))
    found = _read_rows(folder.records)
    try:
        with replaced(folder.parquet) as partial:
            found.to_parquet(partial, engine="pyarrow", index=False)
    except OSError as error:
        raise disk_error(error, folder.parquet) from error
    return folder.parquet


def read_records(source: Source | Iterable[Source]) -> pd.DataFrame:
    """Everything recorded, of one run or of many: a frame with the column `run`, then those of `emformer.observables.COLUMNS`.

        emformer.read_records("runs/*").query("key == 'flow.w2' and layer == 3")

    Args:
        source: a run folder, a records.jsonl or records.parquet, a glob, or several of these; what is named twice is read once.
            Of a folder the JSONL is read, which may still be growing: up to its last whole row. Its Parquet, only where there is
            no JSONL.

    Returns:
        Rows in the order of the sources and in each as they were recorded; `run` is the folder as given. Undefined is NA or nan.

    Raises:
        UserError: if nothing is there, or a folder has no records. Of a glob, runs without are left out with a warning.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    files = {file.resolve(): (run, file) for one in sources for run, file in _files(str(one))}
    # a Parquet file beside its JSONL says the same once more
    chosen = [found for path, found in files.items() if path.suffix != ".parquet" or path.with_suffix(".jsonl") not in files]
    if not chosen:
        raise UserError("no records are named; give a run folder, as runs/default.")
    frames = []
    for run, file in chosen:
        one = _read_parquet(file) if file.suffix == ".parquet" else _read_rows(file)
        one.insert(0, "run", pd.array([run] * len(one), dtype="string"))
        frames.append(one)
    return pd.concat(frames, ignore_index=True)


def _files(source: str) -> Iterator[tuple[str, Path]]:
    """(run as given, file of its records) for a path or a glob."""
    path = Path(source)
    if path.exists():
        found = _records(path)
        if found is None:
            raise UserError(_nothing(source) if path.is_dir() else f"{source} is no file of records (.jsonl or .parquet).")
        yield _name(path), found
        return
    matches = sorted(glob.glob(source, recursive=True))
    if not matches:
        raise UserError(f"{source} does not exist; give a run folder, as runs/default, or a glob, as 'runs/*'.")
    having = [(match, found) for match in matches if (found := _records(Path(match))) is not None]
    if not having:
        raise UserError(_nothing(source))
    without = [match for match in matches if _records(Path(match)) is None and Run(match).used]
    if without:
        warnings.warn(f"without records, and left out: {', '.join(without)}", stacklevel=3)
    for match, found in having:
        yield _name(Path(match)), found


def _records(path: Path) -> Path | None:
    """The file that holds the records of a folder; a file of records itself."""
    candidates = (Run(path).records, Run(path).parquet) if path.is_dir() else (path,)
    return next((file for file in candidates if file.is_file() and file.suffix in (".jsonl", ".parquet")), None)


def _name(path: Path) -> str:
    """What a frame calls this run: its folder; of a copy by another name, the file."""
    return str(path.parent if path.is_file() and path.stem == "records" else path)


def _nothing(source: str) -> str:
    return f"{source} has no records; train with callbacks (they are on in configs/default.yaml), which write records.jsonl."


_ARROW = {"Int64": pa.int64(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
_OPTIONS = pyarrow.json.ParseOptions(
    explicit_schema=pa.schema([(name, _ARROW[dtype]) for name, dtype in DTYPES.items()]), unexpected_field_behavior="ignore"
)
_NULLABLE = {pa.int64(): pd.Int64Dtype(), pa.string(): pd.StringDtype()}


def _read_rows(path: Path) -> pd.DataFrame:
    """The whole rows of a JSONL file."""
    content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    try:
        table = pyarrow.json.read_json(io.BytesIO(content), parse_options=_OPTIONS) if content else None
    except (pa.ArrowInvalid, UnicodeDecodeError):
        table = None
    if table is not None and table.num_rows == content.count(b"\n"):
        return conform(table.to_pandas(types_mapper=_NULLABLE.get))
    # a line is damaged: slowly, to say which
    rows = list(read_journal(path))
    try:
        return conform({name: [row.get(name) for row in rows] for name in COLUMNS})
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} holds something other than records: {error}.") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return conform(pd.read_parquet(path))
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:  # of damaged metadata, too
        raise UserError(f"{path} cannot be read: it is damaged, or no Parquet; records.jsonl beside it can be.") from error
