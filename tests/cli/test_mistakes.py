"""Every mistake gets one sentence on stderr, exit code 2, no traceback, and leaves the disk as it was."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def fit(emformer, small: list[str], tmp_path: Path):
    """`emformer fit` on the smoke configuration made small, with further words; nothing may appear in the run's place."""

    def call(*words: str | Path, config: Path | None = SMOKE):
        run = tmp_path / "run"
        before = files(tmp_path)
        found = emformer("fit", *(["-c", config] if config else []), *small, "--run", run, *words)
        if found.code:
            assert files(tmp_path) == before
        return found

    return call


# -------------------------------------------------------------------------------------------------- settings and options


def changed(tmp_path: Path, **sections: dict) -> Path:
    """The smoke configuration with some keys changed."""
    content = yaml.safe_load(SMOKE.read_text())
    for section, keys in sections.items():
        content[section] |= keys
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("section", "keys", "words"),
    [
        ("model", {"dpeth": 3}, ["dpeth", "depth"]),
        ("model", {"head": 3}, ["head", "heads"]),
        ("training", {"max_step": 3}, ["max_step", "max_steps"]),
        ("data", {"tokeniser": {"class_path": "BPE"}}, ["tokeniser", "tokenizer"]),
        ("model", {"form": {"class_path": "LowRnk", "init_args": {"rank": 4}}}, ["LowRnk", "LowRank"]),
        ("model", {"form": {"class_path": "LowRank", "init_args": {"rnak": 4}}}, ["rnak", "rank"]),
        ("model", {"kernel": {"class_path": "Softmax", "init_args": {"betta": 1.0}}}, ["betta", "beta"]),
        ("training", {"optimizer": {"class_path": "Moun"}}, ["Moun", "Muon"]),
        ("training", {"optimizer": {"class_path": "Muon", "init_args": {"adam_rat": 1.0}}}, ["adam_rat", "adam_rate"]),
        ("training", {"schedule": {"warm": 3}}, ["warm", "warmup"]),
        ("model", {"embedding": {"tide": True}}, ["tide", "tied"]),
        ("model", {"zzzzqqq": 1}, ["zzzzqqq"]),
        ("model", {"form": {"class_path": "os.system"}}, ["os.system"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_names_that_do_not_exist(fit, tmp_path: Path, section: str, keys: dict, words: list[str]):
    fit(config=changed(tmp_path, **{section: keys})).refused(*words)


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--model.dpeth", "depth"),
        ("--training.mxa_steps", "max_steps"),
        ("--training.btach", "batch"),
        ("--data.pth", "path"),
        ("--overwrte", "overwrite"),
        ("--zzzzqqq", ""),
    ],
)
def test_options_that_do_not_exist(fit, option: str, near: str):
    fit(option, "3").refused(option.removeprefix("--"), near)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.depth", "three"], ["depth", "three"]),
        (["--model.depth", "1.5"], ["depth", "1.5"]),
        (["--training.max_steps", "1e3"], ["max_steps", "1000"]),
        (["--training.precision", "16"], ["precision", "16"]),
        (["--model.shared", "perhaps"], ["shared", "perhaps"]),
        (["--model.form", "Softmax"], ["form", "Softmax"]),
        (["--model.layers", "[1, 2]"], ["layers"]),
        (["--model.layers", "{9: {ffn: null}}"], ["layer 9"]),
        (["--model.layers", "{0: {dim: 3}}"], ["dim"]),
        (["--model.depth", "0"], ["depth", "at least 1"]),
        (["--model.dropout", "1.0"], ["dropout", "[0, 1)"]),
        (["--training.accumulate", "3"], ["accumulate", "3"]),
        (["--training.batch", "-1"], ["batch", "at least 1"]),
        (["--data.validation", "1.5"], ["validation"]),
        (["--model.form.rank", "0"], ["rank"]),
        (["--training.optimizer.iterations", "9"], ["iterations"]),
        (["--model.depth"], ["depth"]),
        (["stray"], ["stray"]),
    ],
    ids=" ".join,
)
def test_values_that_do_not_fit(fit, words: list[str], told: list[str]):
    fit(*words).refused(*told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.form.rank", "15", "--model.content.rank", "15"], ["RoPE", "15"]),
        (["--model.form.groups", "3"], ["3 groups", "2 heads"]),
        (["--model.heads", "3", "--model.content.groups", "2"], ["2 groups", "3 heads"]),
        (["--model.mask", "Full"], ["NextToken", "Full", "Causal"]),
        (["--model.mask", "Window", "--model.mask.size", "4"], ["NextToken", "Window"]),
        (["--model.layers", "{0: {mask: {class_path: Full}}}"], ["NextToken", "Full", "layer 0"]),
        (["--training.seed", "-1"], ["seed"]),
        (["--training.accelerator", "abacus"], ["abacus"]),
        (["--training.devices", "0"], ["devices"]),
        (["--training.validation_windows", "0"], ["validation_windows"]),
        (["--training.sample", "-1"], ["sample"]),
        (["--training.clip", "-1"], ["clip"]),
        (["--training.schedule.cooldown", "-1"], ["cooldown"]),
        (["--training.schedule.warmup", "-3"], ["warmup"]),
        (["--data.max_tokens", "0"], ["max_tokens"]),
        (["--data.workers", "-1"], ["workers"]),
        (["--training.nodes", "0"], ["nodes"]),
        (["--model.epsilon", "nan"], ["epsilon"]),
    ],
    ids=" ".join,
)
def test_combinations_that_cannot_be_built(fit, words: list[str], told: list[str]):
    fit(*words).refused(*told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, ["nowhere.yaml"]),
        ("model: {dim: 3\n  depth", ["nowhere.yaml"]),
        ("- a\n- b\n", ["nowhere.yaml"]),
        ("just words", ["nowhere.yaml"]),
        ("\x00\x01", ["nowhere.yaml"]),
    ],
    ids=["missing", "broken", "list", "words", "binary"],
)
def test_files_that_are_no_settings(fit, tmp_path: Path, content: str | None, told: list[str]):
    path = tmp_path / "nowhere.yaml"
    if content is not None:
        path.write_text(content)
    fit(config=path).refused(*told)


def test_no_settings_at_all(emformer):
    emformer("fit").refused("-c configs/default.yaml")
    emformer("info").refused("-c configs/default.yaml")


def test_settings_that_are_not_whole(emformer, tmp_path: Path):
    path = tmp_path / "part.yaml"
    path.write_text("model:\n  dim: 8\n")
    emformer("fit", "-c", path).refused("heads", "configs/default.yaml")


# ------------------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, ["text.txt"]),
        (b"", ["text.txt", "empty"]),
        (b"too short", ["tokens", "context 16"]),
        (b"\x7fELF\x00\x00" * 100, ["text.txt", "binary"]),
        (b"\xff\xfe latin \xe9 " * 100, ["text.txt", "UTF-8"]),
    ],
    ids=["missing", "empty", "short", "binary", "latin"],
)
def test_texts_that_cannot_be_read(fit, emformer, run: Path, tmp_path: Path, content: bytes | None, told: list[str]):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    fit("--data.path", path).refused(*told)
    emformer("validate", run, "--text", path).refused(*told)


def test_a_misspelt_text_gets_the_nearest(fit, tmp_path: Path):
    (tmp_path / "shakespeare.txt").write_text("x" * 999)
    fit("--data.path", tmp_path / "shakespaere.txt").refused("did you mean", "shakespeare.txt")


def test_the_hub_without_a_network_fails_at_once(emformer, small: list[str], tmp_path: Path, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of nothing
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    words = ["fit", "-c", SMOKE, *small, "--data.path", "null", "--run", tmp_path / "run"]
    corpus = ["--data.corpus", "Hub", "--data.corpus.name", "nobody/no-such-set"]
    emformer(*words, *corpus).refused("no-such-set")  # the first call imports the library
    begin = time.perf_counter()
    emformer(*words, *corpus).refused("no-such-set", "cannot be reached", "PythonDocs", "Grammar", "File")
    assert time.perf_counter() - begin < 5
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------- runs, checkpoints


def test_a_used_folder(emformer, small: list[str], run: Path):
    before = files(run)
    emformer("fit", "-c", SMOKE, *small, "--run", run).refused("--resume", "--overwrite")
    emformer("fit", "-c", SMOKE, *small, "--run", run, "--resume", "--overwrite").refused("exclude")
    emformer("fit", "-c", SMOKE, *small, "--run", run, "--resume", "--training.seed", "5").refused("training.seed", "5")
    assert files(run) == before


def test_resuming_with_a_changed_text(emformer, small: list[str], tmp_path: Path):
    path, run = tmp_path / "text.txt", tmp_path / "run"
    path.write_text("abc " * 300)
    words = ["fit", "-c", SMOKE, *small, "--data.path", path, "--data.tokenizer", "Characters", "--run", run]
    assert emformer(*words).code == 0
    path.write_text("xyz " * 300)
    before = files(run)
    emformer(*words, "--resume", "--training.max_steps", "5").refused("begun with: it has changed")
    assert files(run) == before


class Harm:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged(kind: str, run: Path, folder: Path) -> Path:
    """A file that is no checkpoint."""
    path = folder / "bad.ckpt"
    good = (run / "checkpoints" / "last.ckpt").read_bytes()
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    if kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind == "foreign":
        torch.save({"state_dict": {"weight": torch.ones(2)}}, path)
    elif kind == "tensor":
        torch.save(torch.ones(2), path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Harm(folder / "harmed")))
    elif kind == "pickle in torch":
        torch.save(content | {"extra": Harm(folder / "harmed")}, path)
    elif kind == "unknown part":
        content["emformer"]["settings"]["model"]["ffn"] = {"class_path": "nowhere.at_all.Part"}
        torch.save(content, path)
    elif kind == "a function":
        content["emformer"]["settings"]["model"]["ffn"] = {
            "class_path": "os.mkdir",
            "init_args": {"path": str(folder / "harmed")},
        }
        torch.save(content, path)
    elif kind == "unknown key":
        content["emformer"]["settings"]["model"]["dpeth"] = 3
        torch.save(content, path)
    elif kind == "not settings":
        content["emformer"]["settings"] = {"model": [1, 2], "data": 3}
        torch.save(content, path)
    elif kind == "other weights":
        content["state_dict"] = {"model.embedding.weight": torch.ones(2, 2)}
        torch.save(content, path)
    elif kind == "no weights":
        del content["state_dict"]
        torch.save(content, path)
    elif kind == "no vocab":
        content["emformer"]["vocab"] = "many"
        torch.save(content, path)
    elif kind == "tokenizer":
        content["emformer"]["tokenizer"] = "{}"
        torch.save(content, path)
    else:
        content["emformer"]["format"] = 99
        torch.save(content, path)
    return path


KINDS = [
    *("truncated", "empty", "text", "foreign", "tensor", "pickle", "pickle in torch", "unknown part", "a function"),
    *("unknown key", "not settings", "other weights", "no weights", "no vocab", "tokenizer", "format"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint(emformer, run: Path, tmp_path: Path, kind: str):
    path = damaged(kind, run, tmp_path)
    before = path.read_bytes()
    for command in ("validate", "generate", "info"):
        told = emformer(command, path).refused()
        if kind in ("truncated", "empty", "text", "foreign", "tensor", "pickle", "pickle in torch", "format", "no weights"):
            assert "bad.ckpt" in told
        if kind == "unknown part":
            assert "nowhere.at_all" in told
    assert path.read_bytes() == before and not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("command", ["validate", "generate", "info"])
def test_runs_that_are_not_there(emformer, run: Path, tmp_path: Path, command: str):
    emformer(command, tmp_path / "nowhere").refused("nowhere", "does not exist")
    (tmp_path / "hollow").mkdir()
    emformer(command, tmp_path / "hollow").refused("hollow", "no checkpoint")
    emformer(command, run, "--which", "77").refused("77", "last, best, 0, 1, 2")
    emformer(command, run, "--which", "frist").refused("frist", "last, best or a step")


# -------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("word", "near"), [("fti", "fit"), ("genrate", "generate"), ("zzz", "fit, validate, generate, info, records")]
)
def test_commands_that_do_not_exist(emformer, word: str, near: str):
    emformer(word).refused(word, near)


@pytest.mark.parametrize("word", ["--version", "-x"])
def test_an_option_in_place_of_a_command(emformer, word: str):
    emformer(word).refused(word)


@pytest.mark.parametrize("command", ["validate", "generate"])
def test_a_run_that_is_not_named(emformer, command: str):
    emformer(command).refused("run")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", "--prompt", ""], ["prompt", "empty"]),
        (["generate", "--tokens", "0"], ["tokens"]),
        (["generate", "--tokens", "many"], ["tokens", "many"]),
        (["generate", "--top-k", "-1"], ["top-k"]),
        (["generate", "--temperature", "-1"], ["temperature"]),
        (["generate", "--temperature", "nan"], ["temperature"]),
        (["generate", "--top-p", "2"], ["top_p"]),
        (["generate", "--seed", "x"], ["seed"]),
        (["generate", "--promt", "x"], ["--promt", "--prompt"]),
        (["validate", "--batch", "0"], ["batch"]),
        (["validate", "--txt", "x"], ["--txt", "--text"]),
        (["validate", "stray"], ["stray"]),
        (["info", "--whihc", "last"], ["--whihc", "--which"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_options_of_the_other_commands(emformer, run: Path, words: list[str], told: list[str]):
    found = emformer(words[0], run, *words[1:])
    if words[:2] == ["generate", "--temperature"] or "--top-p" in words:
        found = found._replace(out="")  # the prompt is on its way already
    found.refused(*told)


def test_records_that_cannot_be_shown(emformer, recorded: Path, tmp_path: Path):
    emformer("records").refused("RUN", "--help")
    emformer("records", tmp_path / "nowhere").refused("nowhere", "does not exist")
    (tmp_path / "hollow").mkdir()
    emformer("records", tmp_path / "hollow").refused("hollow", "no records", "callbacks")
    emformer("records", recorded, "--key", "flow.tset").refused("key", "flow.tset", "flow.test")
    emformer("records", recorded, "--family", "flwo").refused("family", "flwo", "did you mean 'flow'")
    emformer("records", recorded, "--family", "zzz").refused("zzz", "clu, flow, sinks")
    emformer("records", recorded, "--fmaily", "flow").refused("--fmaily", "--family")
    before = files(recorded)
    emformer("records", recorded, "--csv", recorded / "records.jsonl").refused("records.jsonl", "--csv")
    found = emformer("records", recorded, "--csv", tmp_path / "no" / "folder.csv")
    found._replace(out="").refused("non-existent directory")
    assert files(recorded) == before
    emformer("records", recorded / "records.jsonl", "--parquet")
    assert (recorded / "records.parquet").exists()


def test_generating_with_a_masked_model(emformer, small: list[str], tmp_path: Path):
    words = ["fit", "-c", SMOKE, *small, "--run", tmp_path / "run"]
    made = emformer(*words, "--model.mask", "Full", "--training.objective", "MaskedToken")
    assert made.code == 0 and "emformer generate" not in made.out
    found = emformer("generate", tmp_path / "run")
    found._replace(out="").refused("masked tokens")


# ------------------------------------------------------------------------------------------------- in a process of its own


def real(*words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "emformer", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_real_process_says_one_sentence(tmp_path: Path):
    done = real("fit", "-c", SMOKE, "--model.dpeth", "3", "--run", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "run").exists()
    assert re.fullmatch(r"emformer: .*dpeth.*depth.*\n", done.stderr)


def test_a_real_process_refuses_a_pickle(tmp_path: Path):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    done = real("generate", path)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "harmed").exists()
    assert re.fullmatch(r"emformer: .*bad\.ckpt.*\n", done.stderr)


# ------------------------------------------------------------------------------------------------- data that is not trusted


@pytest.mark.parametrize(
    "place",
    [
        {"form": "strange_module.Part"},
        {"form": "{class_path: strange_module.Part}"},
        {"form": {"class_path": "strange_module.Part"}},
        {"positions": "strange_module.Part"},
        {"positions": ["strange_module.Part"]},
        {"layers": {0: {"form": "strange_module.Part"}}},
        {"mask": {"class_path": "emformer.masks.All", "init_args": {"masks": ["strange_module.Part"]}}},
        {"form": {"class_path": "os.system"}},
    ],
    ids=repr,
)
def test_settings_of_a_checkpoint_import_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: dict):
    from emformer.configuration import revive
    from emformer.parts import UserError, plain
    from emformer.records import read_settings

    (tmp_path / "strange_module.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = plain(read_settings(SMOKE))
    data["model"] |= place
    with pytest.raises(UserError):
        revive(data)
    assert not (tmp_path / "was_here").exists()


def test_overwriting_a_folder_that_is_no_run_touches_nothing(fit, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: another tool\n")
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    fit("--overwrite").refused("is not a run")


def test_a_part_in_a_file_of_its_own(emformer, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One new file, named by class path in YAML; the commands on the run ask before they import it."""
    (tmp_path / "my_norm.py").write_text(
        "from dataclasses import dataclass\nfrom torch import nn\nfrom emformer import parts\n\n\n"
        "@dataclass(frozen=True)\nclass Half(parts.Norm):\n    eps: float = 1e-5\n\n"
        "    def build(self, dim: int) -> nn.Module:\n        return nn.LayerNorm(dim, self.eps)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    config = changed(tmp_path, model={"norm": {"class_path": "my_norm.Half"}})
    done = emformer("fit", "-c", config, *small, "--run", run)
    assert done.code == 0 and "--import my_norm" in done.out
    sys.modules.pop("my_norm")
    emformer("validate", run).refused("--import my_norm")
    assert emformer("validate", run, "--import", "my_norm").code == 0
