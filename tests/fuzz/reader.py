"""Reads every damaged file of a folder as the program would, in a process of its own that watches what it does.

python reader.py KIND FOLDER        prints one line of JSON a file: name, outcome, seconds
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 20  # of processor time for one file
MEMORY = 6 * 2**30  # of address space, beside what is in use before
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo")


def watch(event: str, arguments: tuple) -> None:
    """Ends the process with a code of its own where a file makes it do what no data may."""
    if event.startswith(FORBIDDEN):
        print(json.dumps({"place": "?/?", "outcome": f"did {event} {arguments!r}"}), flush=True)
        signal.raise_signal(signal.SIGKILL)


def readers() -> dict[str, Callable[[Path], Any]]:
    from emformer.configuration import parse, settings_parser
    from emformer.recordings import Recordings, read_records
    from emformer.records import load, read_settings
    from emformer.settings import Settings
    from emformer.text.tokenizers import load as load_tokenizer
    from emformer.trajectory import Trajectory

    def config(path: Path) -> None:
        read_settings(path)

    def command_line(path: Path) -> None:
        Settings(**{k: v for k, v in vars(parse(settings_parser("", ""), ["-c", str(path)])).items() if k != "config"})

    def tokenizer(path: Path) -> None:
        load_tokenizer(path).encode("the cat sat").ids  # noqa: B018

    def records(path: Path) -> None:
        read_records(path)
        copy = path.with_name("again.jsonl")
        shutil.copy(path, copy)
        Recordings(copy, 1).close()

    def model_folder(path: Path) -> None:
        """The damaged file in the place of the one of its name in a whole folder beside it."""
        copy = path.parent / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path.parent / "whole", copy)
        shutil.copy(path, copy / path.name.partition("-")[2])
        load(copy)

    return {
        "checkpoint": load,
        "config": config,
        "command_line": command_line,
        "tokenizer": tokenizer,
        "records": records,
        "parquet": read_records,
        "trajectory": Trajectory.load,
        "model_folder": model_folder,
    }


def main() -> None:
    folder, read = Path(sys.argv[1]), readers()
    from emformer.configuration import load_parts
    from emformer.parts import UserError

    load_parts()
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.addaudithook(watch)
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(TimeoutError("no end")))
    for path in sorted(folder.glob("*/[0-9]*")):
        begin = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read[path.parent.name.partition(".")[0]](path)
            outcome = "read"
        except UserError as error:
            text = str(error)
            outcome = "refused" if text and "\n" not in text and len(text) < 2000 else f"no sentence: {text[:300]!r}"
        except BaseException as error:
            outcome = "raised " + "".join(traceback.format_exception(error)[-3:])[-900:]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(
            json.dumps({"place": f"{path.parent.name}/{path.name}", "outcome": outcome, "seconds": time.process_time() - begin}),
            flush=True,
        )


if __name__ == "__main__":
    main()
