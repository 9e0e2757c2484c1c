"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Generator[Path]:
    """A name beside `path` to write to. If the block ends well, what was written is synced to the disk and takes the place of
    `path` at once: a reader sees the old file or the new one. If it does not, or the process is killed, the old one stays.

    Raises OSError as the system does.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        mode = _usual(partial)
        yield partial
        _settle(partial, mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Generator[Path]:
    """An empty folder beside `path` to write files into. If the block ends well, they are synced to the disk and the folder
    takes the place of `path`, and of all that was in it. If it does not, or the process is killed, the old one stays.

    Folders cannot change places in one step: a kill between the two renames leaves the old one beside its place, as
    `.NAME.PID.old`, and nothing is lost. Raises OSError as the system does.
    """
    path = path.resolve()
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    partial.mkdir(parents=True)
    try:
        mode = _usual(partial / "any")
        (partial / "any").unlink()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _settle(file, mode)
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(partial, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _usual(path: Path) -> int:
    """The permissions that a new file has; it is made."""
    path.touch()
    return path.stat().st_mode & 0o777


def _settle(path: Path, mode: int) -> None:
    """Sync to the disk, with the usual permissions: a library that writes safetensors closes them to everybody else."""
    os.chmod(path, mode)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
