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
    from emformer.figures.scene import Scene
    from emformer.observables import state
    from emformer.observables.flow import Flow
    from emformer.parts import UserError
    from emformer.recordings import Recordings, read_records
    from emformer.records import load, read_settings
    from emformer.report import write
    from emformer.settings import Settings
    from emformer.text.blocks import encode
    from emformer.text.tokenizers import load as load_tokenizer
    from emformer.trajectory import Trajectory

    def config(path: Path) -> None:
        read_settings(path)

    def command_line(path: Path) -> None:
        Settings(**{k: v for k, v in vars(parse(settings_parser("", ""), ["-c", str(path)])).items() if k != "config"})

    def tokenizer(path: Path) -> None:
        list(encode(iter(["the cat sat", "h" * 60 + "!"]), load_tokenizer(path)))

    def scene(path: Path) -> None:
        """Drawn, if it is one."""
        folder = path.parent / "analysis"
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder / "scene.safetensors")
        Scene.load(folder / "scene.safetensors")
        write(folder)

    def analysis(path: Path) -> None:
        folder = path.parent / "analysis"
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder / "analysis.json")
        shutil.copy(path.parent / "whole" / "records.jsonl", folder / "records.jsonl")
        write(folder)

    def saved_state(path: Path) -> None:
        observation = Flow().begin()
        try:
            state.restore(observation, state.read(path).dump)
        except (ValueError, LookupError) as error:  # what `analyze` catches, to begin anew
            raise UserError(str(error) or "damaged") from error

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
        "scene": scene,
        "analysis": analysis,
        "state": saved_state,
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
