"""Two thousand damaged files and more, of which `make test` tries a tenth and `make thorough` all.

Each is read or refused in one sentence; none hangs, raises, or runs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mutation import bombs, laughs, mutated, rewritten
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from emformer import parts
from emformer.figures.scene import stage
from emformer.model import Emformer
from emformer.observables import Row, state
from emformer.observables.flow import Flow
from emformer.parts import UserError
from emformer.recordings import Recordings, write_parquet
from emformer.records import FORMAT, load, read_settings
from emformer.text import Bytes
from emformer.trajectory import capture

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
READER = Path(__file__).with_name("reader.py")
# mutated files of each kind, and of each file of a model folder, with --thorough
COUNTS = {
    "checkpoint": 500,
    "config": 400,
    "command_line": 150,
    "tokenizer": 300,
    "records": 300,
    "parquet": 100,
    "trajectory": 150,
    "scene": 60,
    "analysis": 60,
    "state": 100,
}
FOLDER = 100
# tokenizers that the library reads and then does not bear, or that make it panic
UNBEARABLE: list[dict[str, Any]] = [
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 9,
            "vocab": {},
        }
    },
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(h+)+$"}, "behavior": "Isolated", "invert": False}},
]
FAMILIES = ["emformer", "gpt2"]
SIZES = ["dim", "depth", "heads", "context", "vocab"]
HUGE = [10**6 + 1, 10**9, 2**40, 10**18, 10**30]
assert sum(COUNTS[kind] for kind in ("checkpoint", "config", "tokenizer", "records")) + 2 * 3 * FOLDER >= 2000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file of each kind as the program writes it."""
    folder = tmp_path_factory.mktemp("whole")
    own = read_settings(SMOKE)
    tokenizer = Bytes().build(iter(()))
    torch.manual_seed(0)
    net = Emformer(257, **vars(own.model))
    content = {
        "state_dict": {f"model.{name}": value for name, value in net.state_dict().items()},
        "global_step": 3,
        "emformer": {"settings": parts.plain(own), "tokenizer": tokenizer.to_str(), "vocab": 257, "format": FORMAT},
    }
    torch.save(content, folder / "last.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(parts.plain(own)))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    recordings = Recordings(folder / "records.jsonl", -1)
    for step in (0, 1, 2):
        recordings.append(step, [Row(layer, "attn", "flow.speed", 0.5, 0.1, 0.02, 20, 1, head=0) for layer in range(4)])
    recordings.close()
    write_parquet(folder)
    capture(net, torch.randint(0, 257, (2, 5))).save(folder / "seen.safetensors")
    stage(net, tokenizer, torch.randint(0, 257, (2, 12)).numpy()).save(folder / "scene.safetensors")
    (folder / "analysis.json").write_text(json.dumps({"source": "a run", "request": {"tokens": 30, "length": 5}, "done": [3]}))
    observation = Flow().begin()
    observation.update(capture(net, torch.randint(0, 257, (2, 5))))
    state.save(folder / "state", observation, {"at": 2})
    names = {
        "scene": "scene.safetensors",
        "analysis": "analysis.json",
        "state": "state",
        "checkpoint": "last.ckpt",
        "config": "config.yaml",
        "command_line": "config.yaml",
        "tokenizer": "tokenizer.json",
        "records": "records.jsonl",
        "parquet": "records.parquet",
        "trajectory": "seen.safetensors",
    }
    return {kind: (folder / name).read_bytes() for kind, name in names.items()}


def changed(kind: str, whole: bytes, draw: random.Random, folder: Path) -> bytes | None:
    """A file that is well formed and says something else; None for kinds that have no such form."""
    if kind in ("config", "command_line"):
        return yaml.safe_dump(rewritten(yaml.safe_load(whole), draw)).encode()
    if kind in ("scene", "trajectory", "state"):
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        meta = header["__metadata__"]
        name = draw.choice(list(meta))
        with suppress(ValueError):  # else it is no JSON, but a word
            meta[name] = json.dumps(rewritten(json.loads(meta[name]), draw))
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]
    if kind in ("tokenizer", "analysis"):
        return json.dumps(rewritten(json.loads(whole), draw)).encode()
    if kind == "records":
        rows = rewritten([json.loads(line) for line in whole.splitlines()], draw)
        return "".join(json.dumps(row) + "\n" for row in rows).encode() if isinstance(rows, list) else None
    if kind == "checkpoint":
        path = folder / "whole.pt"
        path.write_bytes(whole)
        content: dict[str, Any] = torch.load(path, weights_only=True)
        if draw.random() < 0.2:
            content = rewritten(content, draw)  # type: ignore[assignment]
        elif draw.random() < 0.3:
            weights = content["state_dict"]
            name = draw.choice(list(weights))
            x, numbers = weights[name], torch.zeros(1)
            strange = [x.long(), x > 0, x.to(torch.complex64), x.to(torch.float8_e4m3fn), x[:1], x.to("meta"), x.to_sparse()]
            weights[name] = draw.choice([*strange, numbers.expand(x.shape), numbers.expand(10**6, 10**6), None, 1.0, "x", [x]])
        else:
            content["emformer"]["settings"] = rewritten(content["emformer"]["settings"], draw)
        torch.save(content, path)
        found = path.read_bytes()
        path.unlink()
        return found
    return None


def model_folder(family: str, whole: dict[str, bytes], folder: Path) -> None:
    """A folder of our own, or one that `transformers` wrote."""
    if family == "emformer":
        checkpoint = folder.with_name("last.ckpt")
        checkpoint.write_bytes(whole["checkpoint"])
        load(checkpoint).save(folder)
    else:
        shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 257}
        GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes(whole["tokenizer"])


def write(folder: Path, suffix: str, contents: list[bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for content in contents:
        (folder / f"{len(list(folder.glob('[0-9]*'))):04d}{suffix}").write_bytes(content)


def single_files(folder: Path, whole: dict[str, bytes], share: float, canary: Path) -> None:
    for kind, count in COUNTS.items():
        draw = random.Random(kind)
        made = bombs(whole[kind], canary) if kind != "parquet" else []
        if kind in ("config", "command_line"):
            made += [laughs(), b"model: &a [*a]", b"model: &a {form: *a}", b"[" * 10**5, b"a: " * 10**4]
        for k in range(round(share * count)):
            other = changed(kind, whole[kind], draw, folder) if k % 2 else None
            made.append(mutated(whole[kind], draw, canary) if other is None else other)
        place = folder / f"{kind}.file"
        write(place, {"records": ".jsonl", "parquet": ".parquet"}.get(kind, ".bin"), made)
        if kind == "analysis":
            (place / "whole").mkdir()
            (place / "whole" / "records.jsonl").write_bytes(whole["records"])
        if kind == "tokenizer":
            write(place, ".bin", [json.dumps(json.loads(whole[kind]) | one).encode() for one in UNBEARABLE])


def model_folders(folder: Path, whole: dict[str, bytes], share: float, canary: Path) -> None:
    """One file of the folder damaged: config.json, weights in both formats, tokenizer.json; and sizes beyond all measure."""
    for family in FAMILIES:
        draw, own, pickled = random.Random(family), folder / f"model_folder.{family}", folder / f"model_folder.{family}-pickled"
        for place in (own, pickled):
            place.mkdir()
            model_folder(family, whole, place / "whole")
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            content = (own / "whole" / name).read_bytes()
            for k in range(round(share * FOLDER)):
                plain = name.endswith(".json") and k % 2
                other = json.dumps(rewritten(json.loads(content), draw)).encode() if plain else mutated(content, draw, canary)
                write(own, f"-{name}", [other])
        config = json.loads((own / "whole" / "config.json").read_text())
        fields = ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size", "vocab", "format")
        write(own, "-config.json", [json.dumps(config | {key: huge}).encode() for key in fields for huge in HUGE])
        target = io.BytesIO()
        torch.save(load_file(pickled / "whole" / "model.safetensors"), target)
        (pickled / "whole" / "model.safetensors").unlink()  # else the pickle is not looked at
        write(pickled, "-pytorch_model.bin", bombs(target.getvalue(), canary))


def test_a_compressed_archive_is_refused(whole: dict[str, bytes], tmp_path: Path):
    """Its bytes would be read as numbers where they are mapped, and a small one would fill any memory."""
    for name, content in (("last.ckpt", whole["checkpoint"]), ("folder", None)):
        path = tmp_path / name
        if content is None:
            model_folder("gpt2", whole, path)
            target = io.BytesIO()
            torch.save(load_file(path / "model.safetensors"), target)
            (path / "model.safetensors").unlink()
            content = target.getvalue()
        with (
            zipfile.ZipFile(io.BytesIO(content)) as source,
            zipfile.ZipFile(path if path.suffix else path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as copy,
        ):
            for entry in source.infolist():
                copy.writestr(entry.filename, source.read(entry))
        with pytest.raises(UserError):
            load(path)


def absurd_checkpoints(folder: Path, whole: dict[str, bytes]) -> None:
    for field in SIZES:
        content = torch.load(io.BytesIO(whole["checkpoint"]), weights_only=True)
        own, made = content["emformer"], []
        for huge in HUGE:
            (own if field == "vocab" else own["settings"]["model"])[field] = huge
            target = io.BytesIO()
            torch.save(content, target)
            made.append(target.getvalue())
        write(folder / f"checkpoint.{field}", ".bin", made)


@pytest.fixture(scope="module")
def outcomes(
    whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, list[dict[str, Any]]]:
    """What became of every file, by folder; "canary" holds an entry if code was run."""
    base, share = tmp_path_factory.mktemp("damaged"), 1.0 if pytestconfig.getoption("thorough") else 0.1
    files, canary = base / "files", base / "canary"
    files.mkdir()
    single_files(files, whole, share, canary)
    model_folders(files, whole, share, canary)
    absurd_checkpoints(files, whole)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(READER), str(files)], capture_output=True, text=True, timeout=3000, env=environment, cwd=base
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    found: dict[str, list[dict[str, Any]]] = {"canary": [{}] if canary.exists() else []}
    for line in done.stdout.splitlines():
        one = json.loads(line)
        found.setdefault(one["place"].partition("/")[0], []).append(one)
    for folder in files.iterdir():
        count = len([path for path in folder.glob("[0-9]*") if path.is_file()])
        assert not folder.is_dir() or len(found[folder.name]) == count, folder
    return found


def test_damaged_files_are_read_or_refused(outcomes: dict[str, list[dict[str, Any]]]):
    """In one sentence, in a time, without a trace back and without running what is in them."""
    every = [one for found in outcomes.values() for one in found if one]
    bad = [one for one in every if one["outcome"] not in ("read", "refused")]
    kinds = {one["outcome"].strip().splitlines()[-1][:100]: one for one in bad}  # one of each sort
    assert not bad, f"{len(bad)} of {len(every)}:\n" + "\n".join(f"{one['place']}: {one['outcome']}" for one in kinds.values())
    assert not outcomes["canary"], "code in a file was run"


@pytest.mark.parametrize(
    "kind", [f"{kind}.file" for kind in COUNTS if kind != "analysis"] + [f"model_folder.{family}" for family in FAMILIES]
)
def test_damage_is_noticed(kind: str, outcomes: dict[str, list[dict[str, Any]]]):
    found = [one["outcome"] for one in outcomes[kind]]
    assert found.count("refused") > len(found) / 20


@pytest.mark.parametrize("family", FAMILIES)
def test_pickles_of_code_are_refused(family: str, outcomes: dict[str, list[dict[str, Any]]]):
    found = [one["outcome"] for one in outcomes[f"model_folder.{family}-pickled"]]
    assert found and set(found) == {"refused"}


@pytest.mark.parametrize("field", SIZES)
def test_a_checkpoint_that_claims_an_absurd_size_is_refused(field: str, outcomes: dict[str, list[dict[str, Any]]]):
    """Before memory, or time, is taken for it."""
    found = outcomes[f"checkpoint.{field}"]
    assert len(found) == len(HUGE) and max(one["seconds"] for one in found) < 5
    # no part of this model has a size of the context
    assert field == "context" or {one["outcome"] for one in found} == {"refused"}


def test_a_bomb_goes_off_where_code_is_run(tmp_path: Path):
    """What the tests above look for happens if a file is unpickled: they would see it."""
    canary = tmp_path / "canary"
    pickle.loads(bombs(b"", canary)[0])
    assert canary.exists()
