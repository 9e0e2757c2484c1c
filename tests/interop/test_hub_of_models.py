"""The hub up to the edge of the network: what is asked of it, by a hub that is none; one sentence where no way leads to it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from builders import model, words
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

import emformer as emf
from emformer import parts, records
from emformer.ffn import SwiGLU
from emformer.interop import hub, own
from emformer.interop.export import export
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.records import Loaded
from emformer.text import Bytes
from emformer.training import NextToken


def held(**fields: Any) -> Loaded:
    net = model(vocab=257, **fields)
    settings = own.around(net.settings, parts.plain(NextToken()), "a test")
    return Loaded(net, Bytes().build(iter(())), settings, Path("a-run"), 30)


def answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx.Request("GET", "https://hub.invalid")
    return kind("the hub\nsays no", response=httpx.Response(status, request=request))


class Hub(HfApi):
    """A hub that keeps what it is given."""

    def __init__(self, error: Exception | None = None):
        super().__init__(endpoint="https://hub.invalid", token=False)
        self.error, self.calls, self.files = error, [], {}

    def create_repo(self, repo_id: str, **how: Any) -> Any:
        self.calls.append(("create", repo_id, how))
        if self.error:
            raise self.error
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: str | Path, **how: Any) -> Any:
        self.calls.append(("folder", repo_id, how))
        self.files |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url=f"https://hub.invalid/{repo_id}/commit/1")

    def upload_file(self, *, repo_id: str, path_or_fileobj: bytes, path_in_repo: str, **how: Any) -> Any:
        self.calls.append(("file", repo_id, how))
        self.files[path_in_repo] = path_or_fileobj
        return SimpleNamespace(commit_url=f"https://hub.invalid/{repo_id}/commit/2")


def test_what_is_pushed_can_be_loaded(tmp_path: Path):
    run, place = held(), Hub()
    assert emf.push(run, "mine", private=True, api=place) == "https://hub.invalid/me/mine/commit/2"
    assert [(name, repo) for name, repo, _ in place.calls] == [("create", "mine"), ("folder", "me/mine"), ("file", "me/mine")]
    assert place.calls[0][2] == {"private": True, "exist_ok": True}
    assert place.files.keys() == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    for name, content in place.files.items():
        (tmp_path / name).write_bytes(content)
    again = emf.load(tmp_path)
    tokens = words(9)
    assert torch.equal(again.model(tokens), run.model(tokens)) and again.step == 30
    card = place.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: emformer\ntags:\n- emformer\n---\n\n# mine\n")
    assert 'emf.load("me/mine")' in card.replace('emf.load("mine")', 'emf.load("me/mine")') and "form: LowRank(" in card


def test_a_folder_goes_up_as_it_is(tmp_path: Path):
    run, place = held(), Hub()
    exported = held(ffn=SwiGLU(), positions=[RoPE()])
    export(exported.model, run.tokenizer, tmp_path / "out", "llama")
    emf.push(tmp_path / "out", "me/theirs", api=place)
    assert place.files["README.md"].decode().startswith("---\nlibrary_name: transformers\n")
    assert place.files["config.json"] == (tmp_path / "out" / "config.json").read_bytes()
    assert not (tmp_path / "out" / "README.md").exists() and place.calls[0][2]["private"] is None
    (tmp_path / "out" / "README.md").write_text("my own words")
    place = Hub()
    assert emf.push(tmp_path / "out", "me/theirs", api=place).endswith("/commit/1")
    assert place.files["README.md"] == b"my own words" and "file" not in [name for name, *_ in place.calls]
    with pytest.raises(UserError, match=r"has no config\.json of a model"):
        emf.push(tmp_path, "me/nothing", api=place)


@pytest.mark.parametrize("error", [answer(HfHubHTTPError, 403), OSError("the line is dead")])
def test_a_hub_that_refuses(error: Exception):
    with pytest.raises(UserError, match="the hub did not take 'me/mine'") as caught:
        emf.push(held(), "me/mine", api=Hub(error))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "../up", "runs/last.ckpt", "/root", "-x"])
def test_what_is_no_name(name: str):
    assert not hub.is_name(name)
    with pytest.raises(UserError, match="hub"):
        hub.push(held(), name, api=Hub())
    with pytest.raises(UserError, match="hub"):
        hub.pull(name)


# Without a network ----------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, an empty cache, no token."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.chdir(tmp_path)


def quickly(sentence: str, call: Any) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=sentence) as caught:
        call()
    assert time.perf_counter() - start < 5 and "\n" not in str(caught.value)


def test_without_a_network_it_is_said_at_once(offline: None):
    quickly("cannot push to 'me/mine': the hub cannot be reached", lambda: emf.push(held(), "me/mine"))
    quickly("cannot fetch the model 'me/mine-that-is-not-there'", lambda: emf.pull("me/mine-that-is-not-there"))
    quickly(
        "runs/mine-that-is-not-there does not exist here; and as a name on the hub: cannot fetch",
        lambda: emf.load("runs/mine-that-is-not-there"),
    )
    quickly(r"nowhere\.ckpt does not exist; give a run folder", lambda: emf.load("nowhere.ckpt"))


def test_a_hub_that_never_answers_is_given_up(offline: None, monkeypatch: pytest.MonkeyPatch):
    """An address of the net that is set aside for documentation: packets to it vanish, or there is no way to it."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    quickly("does not exist here; and as a name on the hub", lambda: emf.load("me/mine-that-is-not-there"))


def test_without_a_token_it_is_said(offline: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "reachable", lambda: True)
    quickly("without a token: log in with `hf auth login`, or set HF_TOKEN", lambda: emf.push(held(), "me/mine"))


# With one -------------------------------------------------------------------------------------------------------------


def downloads(folder: Path, files: dict[str, bytes], asked: list[Any]) -> Any:
    """What fetches the files of a model whose name matches the patterns."""

    def download(name: str, **how: Any) -> str:
        asked.append((name, how))
        folder.mkdir(exist_ok=True)
        for file, content in files.items():
            if any(file.endswith(pattern.lstrip("*")) for pattern in how["allow_patterns"]):
                (folder / file).write_bytes(content)
        return str(folder)

    return download


def test_pickles_are_fetched_only_if_there_is_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "reachable", lambda: True)
    safe = {
        "config.json": b"{}",
        "model.safetensors": b"",
        "pytorch_model.bin": b"",
        "merges.txt": b"",
        "run.py": b"",
        "x.h5": b"",
    }
    asked: list[Any] = []
    found = hub.pull("gpt2", download=downloads(tmp_path / "a", safe, asked))
    assert sorted(path.name for path in found.iterdir()) == ["config.json", "merges.txt", "model.safetensors"]
    assert asked == [("gpt2", dict(allow_patterns=list(hub.SMALL), ignore_patterns=["*/*"], local_files_only=False))]
    del safe["model.safetensors"]
    found = hub.pull("gpt2", download=downloads(tmp_path / "b", safe, asked))
    assert sorted(path.name for path in found.iterdir()) == ["config.json", "merges.txt", "pytorch_model.bin"]


def test_a_name_is_loaded_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And its tokenizer is known by that name, not by a place in the cache; a path of that name goes before."""
    run = held()
    folder = run.save(tmp_path / "snapshot")
    asked = []
    monkeypatch.setattr(records.hub, "pull", lambda name: asked.append(name) or folder)
    monkeypatch.chdir(tmp_path)
    found = emf.load("me/mine")
    assert asked == ["me/mine"] and found.config.data.tokenizer.source == "me/mine"
    tokens = words(5)
    assert torch.equal(found.model(tokens), run.model(tokens))
    os.makedirs("me/mine")
    with pytest.raises(UserError, match="has no checkpoint"):
        emf.load("me/mine")
    assert asked == ["me/mine"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (answer(RepositoryNotFoundError, 404), "there is no model 'me/mine' on the hub that you may read"),
        (answer(GatedRepoError, 403), "the model 'me/mine' is gated"),
        (answer(HfHubHTTPError, 500), "cannot fetch the model 'me/mine' .the hub says no"),
        (LocalEntryNotFoundError("not here"), "cannot fetch the model 'me/mine' .not here"),
        (OSError("no room"), "cannot fetch the model 'me/mine' .no room"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_says_no_to(error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "reachable", lambda: True)
    quickly(sentence, lambda: hub.pull("me/mine", download=fails))


def test_the_card_tells_the_model(tmp_path: Path):
    folder = held().save(tmp_path / "out")
    content = json.loads((folder / "config.json").read_text())
    card = hub.card(folder, "me/mine")
    for key in ("dim", "depth", "heads", "context"):
        assert f"{key} {content['model'][key]}" in card
    assert 'emf.load("me/mine")' in card and "vocabulary 257" in card
