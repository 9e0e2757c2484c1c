"""The folder that a simulation or a study of models writes: whole or not at all, and never over something else."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from emformer.parts import UserError


def check_free(folder: Path, overwrite: bool, written: Collection[str], mark: str, what: str) -> None:
    """Raise for a folder that is not empty, unless `overwrite`, and then for everything but what is our own.

    Args:
        written: names of the files and folders that are written into it; `mark` is one that is always there.
        what: what it holds: "simulation" or "study".
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder with --out.")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if not names:
        return
    strange = next((name for name in names if name not in written), None)
    if strange is not None or mark not in names:
        told = f"holds {strange}, which is no part of a {what}" if strange else f"holds no {what}"
        raise UserError(f"{folder} {told}, so it is left as it is; name another folder with --out.")
    if not overwrite:
        raise UserError(f"{folder} holds a {what} already; replace it with --overwrite, or name another folder with --out.")


@contextmanager
def unwritable(folder: Path) -> Generator[None]:
    """Tell what cannot be written in a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; what was there before is as it was.") from error


def save(frame: pd.DataFrame, path: Path) -> None:
    """A frame as CSV, with the same bytes on every system."""
    frame.to_csv(path, index=False, lineterminator="\n")


def read_note(folder: str | Path) -> str:
    """What else is to be known of the claims of a simulation or a study; "" for nothing."""
    path = Path(folder) / "note.txt"
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
