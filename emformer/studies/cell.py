"""The process of one cell: a run as `emformer fit` makes it, in the folder of a study.

    python -m emformer.studies.cell STUDY NAME

Reads STUDY/configs/NAME.yaml, trains in STUDY/cells/NAME (going on where an earlier process was stopped), and writes
STUDY/finished/NAME.json when all is done. Two processes never work on one cell: the second waits for the first.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system; a second process would be of a second study
    fcntl = None

from emformer.parts import UserError
from emformer.records import read_settings, write_atomically
from emformer.training import fit

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m emformer.studies.cell", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path, help="the folder of the study")
    parser.add_argument("name", help="of the cell")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own parts")
    parser.add_argument("--with-parent", action="store_true", help="stop when the process at the other end of stdin has died")
    options = parser.parse_args()
    if options.with_parent:
        threading.Thread(target=_orphaned, daemon=True).start()
    if hasattr(signal, "SIGUSR2"):  # what a cluster sends to all processes of a job before it takes it away
        signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        for module in options.modules:
            importlib.import_module(module)
        with alone(options.study / "finished" / f".{options.name}.lock"):
            run(options.study, options.name)
    except UserError as error:
        print(f"emformer: {error}", file=sys.stderr)
        sys.exit(2)


def run(study: Path, name: str) -> None:
    """Train the cell and say that it is done, unless it is: {"step", "seconds"}, where seconds are those of this process."""
    done = study / "finished" / f"{name}.json"
    if done.exists():
        return
    begun = time.monotonic()
    found = fit(read_settings(study / "configs" / f"{name}.yaml"), study / "cells" / name, resume=True)
    seconds = round(time.monotonic() - begun, 3)
    write_atomically(done, json.dumps({"step": found.step, "seconds": seconds}) + "\n")


@contextmanager
def alone(path: Path, refused: str | None = None) -> Generator[None]:
    """Hold a lock that falls when the process ends, whatever way. Where another process holds it: wait, or raise `UserError` with
    the sentence `refused`.

    On a file system of several machines it holds between them if that keeps locks for all of them (NFS does by default, Lustre
    when mounted with `flock`). Where there are no locks at all that is told, and nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refused is not None else 0))
            except BlockingIOError:
                raise UserError(refused or "") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(f"emformer: {path.parent} has no locks: see to it that one process works there.", file=sys.stderr)
        yield


def _orphaned() -> None:
    """Wait for the end of stdin, which comes when the parent has died, and stop as after SIGTERM: with a checkpoint."""
    while os.read(0, 4096):
        pass
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGTERM)  # the thread that handles it, so that it wakes
    else:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
