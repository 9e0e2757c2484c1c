"""Corpora: what is yielded is what is on disk, and every mistake is told in one sentence."""

from __future__ import annotations

import gzip
import json
import socket
import time
from pathlib import Path

import pytest

from emformer.parts import UserError
from emformer.text import File, Grammar, Hub, PythonDocs, corpora, hub
from emformer.text.corpora import digest


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's address is a closed port of this machine."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")


def test_identity_counts_the_borders_of_documents() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"]) != digest(["abc"])
    assert digest(iter(["ab", "c"])) == digest(["ab", "c"])


@pytest.mark.parametrize("corpus", [PythonDocs(), Grammar(sentences=50), *File.examples(), *Hub.examples()], ids=repr)
def test_iterating_twice_gives_the_same(corpus) -> None:
    first = list(corpus.documents())
    assert first == list(corpus.documents())
    assert all(first) and corpus.identity() == corpus.identity()
    if not isinstance(corpus, Hub):
        assert corpus.identity() == digest(first)


def test_python_docs_are_the_topics_in_order() -> None:
    from pydoc_data.topics import topics

    assert list(PythonDocs().documents()) == [text for _, text in sorted(topics.items())]


def test_file_keeps_every_byte(tmp_path: Path) -> None:
    data = "one\r\ntwo\rthree\n\n  é € 𝄞 \u2028 no newline at the end".encode()
    (tmp_path / "b.txt").write_bytes(data)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("deep")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(data))
    (tmp_path / "d.txt").write_bytes(b"")
    assert [text.encode() for text in File(str(tmp_path / "b.txt")).documents()] == [data]
    assert [text.encode() for text in File(str(tmp_path / "c.txt.gz")).documents()] == [data]
    assert [text.encode() for text in File(str(tmp_path / "**" / "*.txt*")).documents()] == [data, data, b"deep"]


@pytest.mark.parametrize("text", ["ab€\nc𝄞\n" * 40, "€" * 100, "x\n" + "𝄞" * 30 + "\n" + "y" * 50, "a\n" * 64])
def test_large_files_are_cut_at_lines_or_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(corpora, "WHOLE", 64)
    monkeypatch.setattr(corpora, "PIECE", 20)
    (tmp_path / "large.txt").write_text(text, encoding="utf-8")
    pieces = list(File(str(tmp_path / "large.txt")).documents())
    assert "".join(pieces) == text
    assert len(pieces) > 1 and max(len(piece.encode()) for piece in pieces) <= 20
    lines = max(len(line.encode()) for line in text.splitlines()) < 20
    assert not lines or all(piece.endswith("\n") for piece in pieces)


def test_mistakes_with_files(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("once")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "zero.bin").write_bytes(b"text\n\0more\xff")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"a" * 1000)[:-12])
    cases = {
        "stroy.txt": r"no file .*stroy.txt.*did you mean .*story\.txt",
        "stroy*.tx": r"no file matches .*did you mean .*story\.txt",
        "nowhere/at/all.txt": "no file .*looked in",
        "empty.txt": "empty.txt is empty",
        "zero.bin": "binary .NUL at byte 5",
        "latin.txt": "not UTF-8 text .byte 2",
        "torn.gz": "cannot read .*torn.gz",
        ".": r"is a folder.*\*\.txt",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            list(File(str(tmp_path / name)).documents())


def test_the_byte_offset_of_bad_text_counts_from_the_start_of_the_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(corpora, "WHOLE", 64)
    monkeypatch.setattr(corpora, "PIECE", 20)
    (tmp_path / "bad.txt").write_bytes(b"good line\n" * 30 + b"\xff\n")
    with pytest.raises(UserError, match="byte 300"):
        list(File(str(tmp_path / "bad.txt")).documents())


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("form", ["json", "parquet", "csv"])
def test_hub_reads_local_sets(tmp_path: Path, monkeypatch, no_network, form: str, streaming: bool) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = ["first\nline", "", "séc,ond"]
    rows = datasets.Dataset.from_dict({"body": texts, "n": [1, 2, 3]})
    (tmp_path / "set").mkdir()
    getattr(rows, f"to_{form}")(str(tmp_path / "set" / f"part.{form}"))
    for name in (tmp_path / "set", tmp_path / "set" / f"part.{form}"):
        assert list(Hub(str(name), column="body", streaming=streaming).documents()) == ["first\nline", "séc,ond"]
    with pytest.raises(UserError, match=r"no column 'text'.*body, n"):
        list(Hub(str(tmp_path / "set"), streaming=streaming).documents())
    with pytest.raises(UserError, match="holds int"):
        list(Hub(str(tmp_path / "set"), column="n", streaming=streaming).documents())
    with pytest.raises(UserError, match="cannot load"):
        list(Hub(str(tmp_path / "set"), split="tset", column="body", streaming=streaming).documents())


def test_hub_keeps_the_newlines_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(Hub(str(tmp_path)).documents()) == ["one\n\ntwo\n"] == list(Hub(str(tmp_path / "a.txt")).documents())


def test_hub_identity_follows_settings_and_local_content(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "a"}))
    before = Hub(str(tmp_path)).identity()
    assert before == Hub(str(tmp_path), streaming=False).identity() != Hub(str(tmp_path), split="test").identity()
    (tmp_path / "a.json").write_text(json.dumps({"text": "b"}))
    assert Hub(str(tmp_path)).identity() != before
    assert Hub("someone/set").identity() != Hub("someone/set", revision="v2").identity()


def test_without_network_the_hub_fails_at_once(no_network) -> None:
    import datasets

    before = bool(datasets.config.HF_HUB_OFFLINE)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached.*PythonDocs, Grammar or File"):
        list(Hub("nobody/nothing-at-all").documents())
    assert time.monotonic() - start < 4
    assert before == datasets.config.HF_HUB_OFFLINE


def test_probe(no_network, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hub.reachable()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub.reachable()
