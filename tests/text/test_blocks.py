"""Blocks: nothing lost, nothing twice, nothing believed that is torn; batches are a pure function of (seed, i)."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emformer.parts import UserError
from emformer.text import BPE, Blocks, Bytes, Characters, File, Grammar, Pretrained, PythonDocs, Windows, prepare, save
from emformer.text import blocks as module
from emformer.text.tokenizers import SEPARATOR

SMALL = Grammar(sentences=400)
ACCENTS = "Ünïcödé tëxt wïth €uros and 𝄞 clefs,\nline after line.\n\n    and indented <|endoftext|> code\n" * 300


def write(folder: Path, *texts: str) -> File:
    for i, text in enumerate(texts):
        (folder / f"text{i}.txt").write_bytes(text.encode())
    return File(str(folder / ("text0.txt" if len(texts) == 1 else "text*.txt")))


def left_over(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("setting", [BPE(400), Bytes(), Characters()], ids=repr)
@pytest.mark.parametrize("texts", [[ACCENTS], [ACCENTS, "short", "a" * 10_000, " \n" * 5000]], ids=["one", "four"])
def test_tokens_and_bytes_are_those_of_the_text(tmp_path: Path, setting, texts: list[str]) -> None:
    blocks = prepare(write(tmp_path, *texts), setting, 0.25, cache=tmp_path / "cache")
    train, held = (blocks.tokenizer.decode(part, skip_special_tokens=False) for part in (blocks.train, blocks.validation))
    mark = SEPARATOR if len(texts) > 1 else ""
    assert train + held == "".join(mark + text for text in texts)
    assert blocks.meta["bytes"]["train"] + blocks.meta["bytes"]["validation"] == sum(len(t.encode()) for t in texts)
    if len(texts) == 1:
        assert blocks.meta["bytes"] == {"train": len(train.encode()), "validation": len(held.encode())}
        assert blocks.bytes_per_token("train") == len(train.encode()) / len(blocks.train)
    else:
        # Every 0 heads a document; the word in the text is made of other tokens.
        assert (np.concatenate([blocks.train, blocks.validation]) == 0).sum() == 4 == blocks.meta["documents"]
        assert blocks.train[0] == 0
    count = len(blocks.train) + len(blocks.validation)
    assert 0 <= int(0.75 * count) - len(blocks.train) <= 3  # never inside a character
    assert blocks.meta["count"] == count and blocks.train.dtype == np.uint16
    assert left_over(tmp_path / "cache") == []
    with pytest.raises(ValueError, match="read-only"):
        blocks.train[0] = 1


@pytest.mark.parametrize("share", [0.1, 0.3, 0.0])
def test_characters_split_where_arithmetic_says(tmp_path: Path, share: float) -> None:
    text = ACCENTS[:9_973]
    blocks = prepare(write(tmp_path, text), Characters(), share, cache=tmp_path)
    assert len(blocks.train) == int((1 - share) * len(text))
    assert blocks.tokenizer.decode(blocks.train) == text[: len(blocks.train)]


def test_characters_know_the_validation_part_and_pairs_do_not(tmp_path: Path) -> None:
    corpus = write(tmp_path, "plain text " * 500 + "Ωmega " * 50)
    characters = prepare(corpus, Characters(), cache=tmp_path)
    assert 1 not in characters.validation
    pairs = prepare(corpus, BPE(300), cache=tmp_path)
    assert not [token for token in pairs.tokenizer.get_vocab() if "mega" in token]


def test_chunks_change_no_token() -> None:
    text = "".join(PythonDocs().documents())
    tokenizer = BPE(1024).build(iter([text]))
    chunks = list(module._chunks(text))
    assert "".join(chunks) == text and max(map(len, chunks)) <= module.CHUNK and len(chunks) > 50
    assert [i for e in tokenizer.encode_batch(chunks) for i in e.ids] == tokenizer.encode(text).ids


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["word", " ", "  ", "\n", "\n\n", "é" * 2000, "x" * 3000, "\t"]), max_size=30).map("".join))
def test_chunks_are_the_document(text: str) -> None:
    chunks = list(module._chunks(text))
    assert "".join(chunks) == text and all(0 < len(chunk) <= module.CHUNK for chunk in chunks)


def test_the_batch_size_of_encoding_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(SMALL, BPE(400), cache=tmp_path / "a")
    monkeypatch.setattr(module, "BATCH", 100)
    small = prepare(SMALL, BPE(400), cache=tmp_path / "b")
    assert whole.meta == small.meta
    assert np.array_equal(whole.train, small.train) and np.array_equal(whole.validation, small.validation)


def test_the_second_request_reads_nothing_but_the_folder(tmp_path: Path) -> None:
    seen: list[int] = []
    first = prepare(SMALL, BPE(400), cache=tmp_path, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == first.meta["count"]
    second = prepare(SMALL, BPE(400), cache=tmp_path, progress=lambda n: pytest.fail("encoded again"))
    assert second.folder == first.folder == Blocks(first.folder).folder
    others = [prepare(SMALL, BPE(401), cache=tmp_path), prepare(SMALL, BPE(400), 0.2, cache=tmp_path)]
    others += [
        prepare(SMALL, BPE(400), cache=tmp_path, max_tokens=999),
        prepare(Grammar(401), BPE(400), cache=tmp_path),
    ]
    assert len({blocks.folder for blocks in [first, *others]}) == 5


@pytest.mark.parametrize("limit", [3, 4, 5, 6, 7, 8, 100, 10**9])
def test_max_tokens(tmp_path: Path, limit: int) -> None:
    text = "€𝄞 and more" * 10
    blocks = prepare(write(tmp_path, text), Bytes(), 0.0, cache=tmp_path, max_tokens=limit)
    kept = [n for n in range(len(text) + 1) if len(text[:n].encode()) <= limit][-1]
    assert blocks.tokenizer.decode(blocks.train) == text[:kept]
    assert blocks.meta["bytes"] == {"train": len(text[:kept].encode()), "validation": 0}


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    import tokenizers as hf

    for size, dtype in ((65_535, np.uint16), (65_536, np.uint32)):
        words = {f"w{i}": i for i in range(size)}
        tokenizer = hf.Tokenizer(hf.models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
        save(tokenizer, tmp_path / "tokenizer.json")
        corpus = write(tmp_path, f"  w{size - 1}   w1\n\nw2 w3  ")
        blocks = prepare(corpus, Pretrained(str(tmp_path / "tokenizer.json")), 0.5, cache=tmp_path / "cache")
        assert blocks.train.dtype == dtype and blocks.train.tolist() == [size - 1, 1]
        # White space that no token covers still has its bytes: with the next token, at the end with the last.
        assert blocks.meta["bytes"] == {"train": 2 + 6 + 3 + 2, "validation": 2 + 2 + 1 + 2 + 2}


def test_no_separator_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    import tokenizers as hf

    tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    save(tokenizer, tmp_path / "tokenizer.json")
    blocks = prepare(write(tmp_path, "b", "b", "a"), Pretrained(str(tmp_path)), 0.0, cache=tmp_path / "cache")
    assert blocks.train.tolist() == [1, 1, 0]


def test_white_space_that_a_tokenizer_drops_keeps_its_bytes(tmp_path: Path) -> None:
    import tokenizers as hf

    tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    save(tokenizer, tmp_path / "tokenizer.json")
    corpus = write(tmp_path, "  ", "b", "\n\n\n", "a a", "     ")
    blocks = prepare(corpus, Pretrained(str(tmp_path)), 0.5, cache=tmp_path / "cache")
    assert blocks.train.tolist() == [1] and blocks.validation.tolist() == [0, 0]
    assert blocks.meta["bytes"] == {"train": 2 + 1, "validation": 3 + 3 + 5}


DAMAGES = {
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "torn meta": lambda folder: (folder / "meta.json").write_text('{"count": 3'),
    "foreign meta": lambda folder: (folder / "meta.json").write_text("[1, 2]"),
    "short tokens": lambda folder: os.truncate(folder / "tokens.bin", 1000),
    "long tokens": lambda folder: (folder / "tokens.bin").open("ab").write(b"more"),
    "no tokens": lambda folder: (folder / "tokens.bin").unlink(),
    "torn tokenizer": lambda folder: os.truncate(folder / "tokenizer.json", 100),
    "other tokenizer": lambda folder: save(Bytes().build(iter([])), folder / "tokenizer.json"),
    "everything": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_folder_is_made_again(tmp_path: Path, damage: str) -> None:
    first = prepare(SMALL, BPE(400), cache=tmp_path)
    before = np.array(first.train)
    DAMAGES[damage](first.folder)
    with pytest.raises(UserError, match="no whole set of tokens"):
        Blocks(first.folder)
    again = prepare(SMALL, BPE(400), cache=tmp_path)
    assert np.array_equal(again.train, before) and again.folder == first.folder
    assert left_over(tmp_path) == []


WRITER = """
import os, signal, sys, time
from pathlib import Path
from emformer.text import BPE, Grammar, prepare
cache, how = Path(sys.argv[1]), sys.argv[2]
def progress(n):
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    (cache / f"writing-{os.getpid()}").touch()
    while how == "meet" and len(list(cache.glob("writing-*"))) < 2:
        time.sleep(0.01)
print(prepare(Grammar(400), BPE(400), cache=cache, progress=progress).folder.name)
"""


def writer(cache: Path, how: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(cache), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    dead = writer(tmp_path, "die")
    dead.communicate(timeout=60)
    assert dead.returncode == -signal.SIGKILL
    assert [path.name[:9] for path in tmp_path.iterdir()] == [".partial-"]
    blocks = prepare(SMALL, BPE(400), cache=tmp_path)
    assert np.array_equal(blocks.train, prepare(SMALL, BPE(400), cache=tmp_path / "other").train)


def test_two_writers_at_once_both_succeed(tmp_path: Path) -> None:
    """Each waits until the other writes too, so they certainly meet."""
    processes = [writer(tmp_path, "meet") for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert Blocks(tmp_path / answers[0][0].strip()).meta["count"] > 0
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("code, message", [(errno.ENOSPC, "disk of .* is full"), (errno.EIO, "cannot write")])
def test_trouble_with_the_disk(tmp_path: Path, code: int, message: str) -> None:
    def progress(n: int) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=message):
        prepare(SMALL, Bytes(), cache=tmp_path, progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def progress(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(SMALL, Bytes(), cache=tmp_path, progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_preparing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validation=1"):
        prepare(SMALL, Bytes(), 1.0, cache=tmp_path)
    with pytest.raises(UserError, match="max_tokens=0"):
        prepare(SMALL, Bytes(), cache=tmp_path, max_tokens=0)
    with pytest.raises(UserError, match="max_tokens=2 ends inside"):
        prepare(write(tmp_path, "€uro"), Bytes(), cache=tmp_path, max_tokens=2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write to the cache"):
        prepare(SMALL, Bytes(), cache=tmp_path / "file")
    blocks = prepare(SMALL, Bytes(), 0.0, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"validation part .* is empty"):
        blocks.bytes_per_token("validation")


def test_meta_is_plain_and_whole(tmp_path: Path) -> None:
    blocks = prepare(SMALL, BPE(400), cache=tmp_path)
    assert json.loads((blocks.folder / "meta.json").read_text()) == blocks.meta
    assert blocks.meta["corpus"] == SMALL.identity()
    assert sorted(path.name for path in blocks.folder.iterdir()) == ["meta.json", "tokenizer.json", "tokens.bin"]


sizes = st.tuples(st.integers(1, 9), st.integers(0, 60), st.integers(0, 3)).map(lambda t: (t[0], t[0] + 1 + t[1], t[2]))


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(1, 7), st.integers(0, 12))
def test_a_batch_is_a_pure_function_of_seed_and_number(size, rows: int, latest: int) -> None:
    context, count, seed = size
    windows = Windows(np.arange(count), context, seed)
    forward = [windows.batch(i, rows) for i in range(latest + 1)]
    for i in reversed(range(latest + 1)):
        assert np.array_equal(windows.batch(i, rows), forward[i])
        assert np.array_equal(Windows(np.arange(count), context, seed).batch(i, rows), forward[i])
        ranks = [windows.batch(i, rows, slice(k, k + 2)) for k in range(0, rows, 2)]
        assert np.array_equal(np.concatenate(ranks), forward[i])
        assert np.array_equal(windows.batch(i, rows, slice(1, None, 2)), forward[i][1::2])
    assert forward[0].shape == (rows, context + 1) and forward[0].dtype == np.int64


@settings(max_examples=80, deadline=None)
@given(sizes)
def test_an_epoch_visits_each_of_its_windows_once(size) -> None:
    context, count, seed = size
    windows = Windows(np.arange(count), context, seed)
    n = windows.epoch_length
    for epoch in range(3):
        cut = windows.batch(epoch, n)
        assert np.array_equal(cut - cut[:, :1], np.tile(np.arange(context + 1), (n, 1)))  # consecutive tokens
        starts = np.sort(cut[:, 0])
        assert starts[0] >= 0 and starts[-1] + context < count
        assert np.array_equal(np.diff(starts), np.full(n - 1, context))  # inputs neither overlap nor leave a gap
        assert count - n * context < 2 * context + 1  # fewer than two windows are left out
    # The same windows in the same order, however they are cut into batches.
    pieces = np.concatenate([windows.batch(i, 3) for i in range(n)])
    assert np.array_equal(pieces, np.concatenate([windows.batch(epoch, n) for epoch in range(3)]))


def test_epochs_differ_and_in_time_every_token_is_seen() -> None:
    windows = Windows(np.arange(101), 10, seed=1)
    epochs = [windows.batch(e, windows.epoch_length) for e in range(300)]
    assert not np.array_equal(epochs[0], epochs[1])
    assert len({int(e[:, 0].min()) for e in epochs}) >= 10
    assert np.array_equal(np.unique(np.concatenate(epochs)), np.arange(101))
    assert not np.array_equal(epochs[0], Windows(np.arange(101), 10, seed=2).batch(0, windows.epoch_length))


def test_validation_windows_are_fixed() -> None:
    windows = Windows(np.arange(32), 10)
    assert len(windows) == 3
    assert windows.fixed(0, 99)[:, 0].tolist() == [0, 10, 20] and windows.fixed(1, 2).tolist() == [list(range(10, 21))]
    assert len(Windows(np.arange(31), 10)) == 3 and len(Windows(np.arange(30), 10)) == 2
    assert windows.fixed(3, 4).shape == (0, 11)


def test_training_and_validation_share_no_token(tmp_path: Path) -> None:
    blocks = prepare(SMALL, BPE(400), cache=tmp_path)
    assert len(blocks.train) + len(blocks.validation) == blocks.meta["count"]
    everything = np.fromfile(blocks.folder / "tokens.bin", blocks.train.dtype)
    assert np.array_equal(np.concatenate([blocks.train, blocks.validation]), everything)
    last = max(int(Windows(np.arange(len(blocks.train)), 16).batch(i, 64).max()) for i in range(100))
    assert last < len(blocks.train)


def test_too_little_text_says_both_numbers() -> None:
    Windows(np.arange(11), 10)
    with pytest.raises(UserError, match=r"10 tokens.* context 10 needs 11"):
        Windows(np.arange(10), 10)
    with pytest.raises(UserError, match="context >= 1"):
        Windows(np.arange(10), 0)
