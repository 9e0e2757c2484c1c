"""The probe: held-out prompts at fixed places, evenly spread, in a fair order; and labels that belong to their tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from emformer import parts
from emformer.parts import LabelledCorpus, Tokenizer, UserError
from emformer.settings import Probe
from emformer.text import BPE, Blocks, Bytes, Characters, File, Grammar, Pretrained, Prompts, prepare, probe, save, shuffled
from emformer.text import blocks as module

SMALL = Grammar(sentences=300)
PINNED = [717, 942, 134, 521, 270, 402, 94, 850], [20, 2, 7, 4, 12, 17, 15, 10]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return prepare(SMALL, BPE(300), 0.2, cache=tmp_path_factory.mktemp("cache"))


def places(total: int, prompts: int, length: int, seed: int) -> Prompts:
    """The probe of a text whose tokens are their own places."""
    blocks = object.__new__(Blocks)  # there is no folder
    blocks.validation = np.arange(total, dtype=np.uint32)
    found = probe(blocks, File(__file__), prompts, length, seed)
    assert found.labels is None and found.names == ()
    assert np.array_equal(found.tokens, found.starts[:, None] + np.arange(length))  # consecutive, and from those starts
    return found


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(0, 120), st.integers(1, 60), st.integers(0, 5))
def test_starts_are_different_and_overlap_no_more_than_they_must(length: int, more: int, prompts: int, seed: int) -> None:
    total = length + more
    found = places(total, prompts, length, seed)
    starts = np.sort(found.starts)
    possible = total - length + 1
    assert found.tokens.shape == (min(prompts, possible), length) and found.tokens.dtype == np.int64
    assert starts[0] >= 0 and starts[-1] + length <= total and (np.diff(starts) > 0).all()
    if prompts * length <= total:
        assert (np.diff(starts) >= length).all()
        assert np.array_equal(starts * prompts // total, np.arange(prompts)) or total % prompts  # one a stretch
        assert (found.overlap, found.shared, found.covered) == (0, 0, prompts * length)
    else:
        step = possible / len(starts)
        assert set(np.diff(starts).tolist()) <= {int(step), int(np.ceil(step))}
    seen = Counter(found.tokens.ravel().tolist())
    assert found.covered == len(seen) and found.overlap == pytest.approx(1 - len(seen) / found.tokens.size)
    sets = [set(row) for row in found.tokens[np.argsort(found.starts)].tolist()]
    assert found.shared == max((len(a & b) for a, b in pairwise(sets)), default=0)


def test_it_is_a_pure_function_and_every_argument_counts(blocks: Blocks) -> None:
    first = probe(blocks, SMALL, 40, 16, 0)
    state = np.random.get_state()[1].tolist()
    again = probe(Blocks(blocks.folder), SMALL, 40, 16, 0)
    assert again.identity == first.identity and np.array_equal(again.tokens, first.tokens)
    assert np.random.get_state()[1].tolist() == state
    others = [probe(blocks, File(__file__), *which) for which in ((41, 16, 0), (40, 17, 0), (40, 16, 1))]
    assert first.labels is not None
    others += [replace(first, labels=None, names=()), replace(first, names=("referent", "class"))]
    others += [replace(first, labels=first.labels[::-1])]
    assert len({found.identity for found in [first, *others]}) == 7
    assert first.distinct == len(set(first.tokens[:, -1].tolist())) < 40
    # another stream of numpy would move every prompt, and records of before and after could not be compared
    assert places(1000, 8, 10, 0).starts.tolist() == PINNED[0] and places(30, 8, 10, 0).starts.tolist() == PINNED[1]


def test_prompts_are_held_out(blocks: Blocks) -> None:
    found = probe(blocks, File(__file__), 10_000, 16, 3)  # every start there is
    assert sorted(found.starts.tolist()) == list(range(len(blocks.validation) - 15))
    for start, row in zip(found.starts, found.tokens, strict=True):
        assert np.array_equal(row, blocks.validation[start : start + 16])


def test_the_whole_text_has_its_turn() -> None:
    """The places are evenly spread in each probe, and over many seeds none is left out."""
    for total, prompts in ((640, 8), (100, 8), (100, 30)):
        starts = np.concatenate([places(total, prompts, 10, seed).starts for seed in range(400)])
        tokens = np.bincount((starts[:, None] + np.arange(10)).ravel(), minlength=total)
        assert tokens.min() > 0
        fractions = np.sort((places(total, prompts, 10, 7).starts + 5) / total)
        assert np.abs(fractions - (np.arange(prompts) + 0.5) / prompts).max() < 0.6 / prompts + 5 / total
        if prompts * 10 > total:  # every start is as likely as any other
            counts, expected = np.bincount(starts), len(starts) / (total - 9)
            assert len(counts) == total - 9 and np.abs(counts - expected).max() < 5 * expected**0.5


def test_the_first_prompts_are_a_fair_sample() -> None:
    """Over seeds, the first quarter lies as far into the text on average as all do, and its first one anywhere in it."""
    for total, prompts in ((6400, 64), (2000, 64)):
        starts = np.stack([places(total, prompts, 64, seed).starts for seed in range(1000)]) / (total - 63)
        means = starts[:, :16].mean(1) - starts.mean(1)
        assert abs(means.mean()) < 4 * means.std() / 1000**0.5
        assert means.std() == pytest.approx((3 / 4 / 12 / 16) ** 0.5, rel=0.1)  # drawn without replacement
        assert np.bincount((starts[:, 0] * 5).astype(int), minlength=5).min() > 140  # 200 are expected


def test_prompts_that_share_text_share_a_group() -> None:
    apart = places(1000, 20, 10, 0)
    assert len(set(apart.groups)) == 20, "none overlap"
    close = places(400, 100, 20, 0)
    groups, order = close.groups[np.argsort(close.starts)], np.sort(close.starts)
    assert (np.diff(groups) >= 0).all() and len(set(groups)) == 400 // 40
    for group in set(groups):
        inside = order[groups == group]
        assert inside[-1] - inside[0] < 40
    for group, other in pairwise(range(10)):  # every second stretch shares nothing
        gap = order[groups == other + 1].min(initial=10**6) - order[groups == group].max()
        assert gap > 20


def test_shuffling_keeps_the_words_and_the_last() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, (200, 12))
    found = shuffled(tokens, 5)
    assert found.shape == tokens.shape and found.dtype == tokens.dtype
    assert np.array_equal(found[:, -1], tokens[:, -1])
    assert np.array_equal(np.sort(found, axis=1), np.sort(tokens, axis=1))
    assert np.array_equal(found, shuffled(tokens, 5)) and not np.array_equal(found, shuffled(tokens, 6))
    assert np.array_equal(shuffled(tokens[:20], 5), found[:20])
    order = shuffled(np.tile(np.arange(12), (4000, 1)), 5)
    assert np.array_equal(np.take_along_axis(tokens, order[:200], axis=1), found)  # labels move with their tokens
    assert len(np.unique(order, axis=0)) > 3990  # each its own
    assert np.abs(order[:, :-1].mean(0) - 5).max() < 5 * 10**0.5 / 4000**0.5  # any token to any place
    for short in (1, 2):
        assert np.array_equal(shuffled(tokens[:, :short], 5), tokens[:, :short])


def owners(corpus: LabelledCorpus, blocks: Blocks) -> list[list[int]]:
    """Labels of all tokens: each is decoded by itself, laid on the text, and asks the characters that it lies on."""
    documents = [(text, spans) for text, spans in corpus.labelled_documents() if text]
    mark = blocks.tokenizer.token_to_id("<|endoftext|>") if len(documents) > 1 else None
    nothing = [-1] * len(corpus.label_names)
    found, number, place = [], 0 if mark is None else -1, 0
    for token in np.concatenate([blocks.train, blocks.validation]).tolist():
        if token == mark:
            number, place = number + 1, 0
            found.append(nothing)
            continue
        text, spans = documents[number]
        piece = blocks.tokenizer.decode([token])
        assert text.startswith(piece, place)
        touched = np.minimum(spans[:, 1], place + len(piece)) - np.maximum(spans[:, 0], place)
        found.append(spans[touched.argmax(), 2:].tolist() if touched.max(initial=0) > 0 else nothing)
        place += len(piece)
    return found


@dataclass(frozen=True)
class Odd(LabelledCorpus):
    """Documents that are empty or blank or long, and words without a class."""

    texts: tuple[str, ...] = ("", "one two  three", "\n ", "", "four five six " * 40, "", "seven eight ten eleven " * 10, "")

    label_names: ClassVar[tuple[str, ...]] = ("length",)

    def documents(self) -> Iterator[str]:
        yield from self.texts

    def identity(self) -> str:
        return "0" * 64

    def labelled_documents(self) -> Iterator[tuple[str, np.ndarray]]:
        for text in self.documents():
            rows, place = [(0, 0, 0)][:0], 0
            for word in text.split():
                start = text.index(word, place)
                place = start + len(word)
                rows.append((start, place, len(word) if len(word) != 4 else -1))
            yield text, np.array(rows, np.int64).reshape(-1, 3)


CASES: list[tuple[LabelledCorpus, Tokenizer, float, int | None]] = [
    (Grammar(sentences=60), BPE(300), 0.5, None),
    (Odd(), BPE(280), 0.5, None),
    (Odd(), Bytes(), 0.2, 610),
    (Odd(), Characters(), 0.9, None),
    (Odd(("one document, hence no separator\nthough cut in two; " * 9,)), BPE(280), 0.7, None),
]


def test_labels_are_those_of_the_words_under_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 150)  # many chunks a document
    monkeypatch.setattr(module, "BATCH", 400)
    grammar = CASES[0][0]
    assert [text for text, _ in grammar.labelled_documents()] == list(grammar.documents())
    text = " ".join(Odd().documents()).split()
    words = hf.Tokenizer(hf.models.WordLevel({word: k for k, word in enumerate(sorted(set(text)))}, unk_token="one"))
    words.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()  # drops white space, and there is no separator
    save(words, tmp_path / "tokenizer.json")
    ready = Pretrained(str(tmp_path))
    for number, (corpus, setting, share, limit) in enumerate([*CASES, (Odd(), ready, 0.5, None)]):
        blocks = prepare(corpus, setting, share, cache=tmp_path / str(number), max_tokens=limit)
        found = probe(blocks, corpus, 10_000, 8, 0)
        assert found.names == corpus.label_names and found.labels is not None
        assert found.labels.shape == (len(found.names), *found.tokens.shape) and found.labels.dtype == np.int64
        if setting is ready:  # a token is a word
            expected = np.array([len(word) if len(word) != 4 else -1 for word in text])[:, None]
        else:
            expected = np.array(owners(corpus, blocks))
        held = expected[blocks.meta["train"] : blocks.meta["count"]]
        for column, labels in enumerate(found.labels):
            assert np.array_equal(labels, held[found.starts[:, None] + np.arange(8), column]), (number, column)
            assert len(np.unique(labels)) > 2 and (labels >= 0).mean() > 0.2
    assert Grammar.label_names == ("class", "referent")  # the class first


def test_a_corpus_that_knows_no_classes_has_none(tmp_path: Path) -> None:
    corpus = File(__file__)
    found = probe(prepare(corpus, Bytes(), cache=tmp_path), corpus, 20, 8, 0)
    assert found.labels is None and found.names == () and not isinstance(corpus, LabelledCorpus)


def test_mistakes_of_probing(blocks: Blocks, tmp_path: Path) -> None:
    held, plain = len(blocks.validation), File(__file__)
    assert probe(blocks, plain, 5, held, 0).tokens.shape == (1, held)
    with pytest.raises(UserError, match=rf"prompt of {held + 1} tokens .* set probe.length to {held} or less"):
        probe(blocks, plain, 5, held + 1, 0)
    with pytest.raises(UserError, match="fit into 0 of validation: take a longer text or"):
        probe(prepare(plain, Bytes(), 0.0, cache=tmp_path), plain, 5, 2, 0)
    for other in (Grammar(sentences=300, seed=1), Grammar(sentences=299), Odd()):
        with pytest.raises(UserError, match=r"gives other tokens .* name the corpus"):
            probe(blocks, other, 5, 8, 0)
    for wrong in ((0, 8, 0), (5, 0, 0), (5, 8, -1)):
        with pytest.raises(UserError, match="make no probe"):
            probe(blocks, plain, *wrong)


def test_settings_of_the_probe() -> None:
    assert parts.plain(Probe()) == {"prompts": 1024, "length": 64, "seed": 0}
    for name, wrong in (("prompts", 0), ("length", 1), ("seed", -1)):
        with pytest.raises(UserError, match=rf"probe\.{name} is {wrong}; choose at least {wrong + 1}\."):
            Probe(**{name: wrong})
