"""The grammar: a unifilar chain with an exact entropy rate, and labels that follow the tokens."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from math import log

import numpy as np
import pytest

from emformer.parts import UserError
from emformer.text import BPE, KINDS, TOPICS, Bytes, Grammar, Language, token_labels
from emformer.text.grammar import END, LEXICON, PIECES, inflect


@pytest.fixture(scope="module")
def language() -> Language:
    return Language()


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(Grammar(sentences=20_000, seed=3).documents())


def test_the_graph_is_unifilar_and_proper(language: Language) -> None:
    assert 300 < len(language.states) < 3000
    for edges in language.edges:
        texts = [edge.text for edge in edges]
        assert len(texts) == len(set(texts))  # the word tells the next state
        assert min(edge.probability for edge in edges) > 0
        assert sum(edge.probability for edge in edges) == pytest.approx(1, abs=1e-12)
        # A word that begins another could be misread only if a letter could follow it.
        assert all(text == END or not text[-1].isalpha() or len(text) > 1 for text in texts)
    for edges in language.edges:
        for edge in edges:
            if edge.text and edge.text[-1].isalpha():
                assert all(not after.text[0].isalpha() for after in language.edges[language.index[edge.target]])


def test_stationary_law(language: Language) -> None:
    matrix, law = language.transition(), language.stationary
    assert np.abs(matrix.sum(1) - 1).max() < 1e-12
    assert np.abs(law @ matrix - law).max() < 1e-12
    assert law.min() > 0 and law.sum() == pytest.approx(1, abs=1e-12)


def test_entropy_rate_agrees_with_exact_surprisal_of_a_long_text(language: Language, documents: list[str]) -> None:
    """Documents are independent, so the ratio estimator has an honest standard error."""
    rate = language.entropy_rate()
    surprisals = [language.surprisal(text) for text in documents[:-1]]  # the last is cut short
    nats = np.array([s.sum() for s in surprisals])
    words = np.array([len(s) - 1 for s in surprisals])
    size = np.array([len(text.encode()) for text in documents[:-1]])
    for exact, units in ((rate.nats_per_word, words), (rate.nats_per_byte, size)):
        error = (nats - exact * units).std() / units.mean() / len(units) ** 0.5
        assert abs(nats.sum() / units.sum() - exact) < 4 * error
        assert error < 0.003 * exact  # the comparison says something
    assert rate.bits_per_byte == pytest.approx(rate.nats_per_byte / log(2), rel=1e-12)
    assert Grammar().entropy_rate() == rate


def test_the_text_has_the_frequencies_and_entropies_of_the_graph(language: Language, documents: list[str]) -> None:
    """From counts alone: visits of each state, and the plug-in entropy of its words with Miller's correction."""
    counts: dict[int, Counter] = defaultdict(Counter)
    visits = np.zeros((len(documents) - 1, len(language.states)))  # per document, and those are independent
    following = [{edge.text: language.index[edge.target] for edge in edges} for edges in language.edges]
    for row, text in zip(visits, documents[:-1], strict=True):
        state = 0
        for piece in [*PIECES.findall(text), END]:
            row[state] += 1
            counts[state][piece] += 1
            state = following[state][piece]
    deviation = visits - visits.sum(1, keepdims=True) * language.stationary
    often = (visits > 0).sum(0) > 30
    score = deviation.sum(0)[often] / np.sqrt((deviation**2).sum(0)[often])
    assert often.sum() > 600 and np.abs(score).max() < 5 and 0.8 < score.std() < 1.2

    found = exact = 0.0
    for i, seen in counts.items():
        n = seen.total()
        if n > 20 * len(language.edges[i]):
            found += sum(-k * log(k / n) for k in seen.values()) + (len(seen) - 1) / 2
            exact += n * sum(-edge.probability * log(edge.probability) for edge in language.edges[i])
    assert exact > 0.3 * visits.sum()
    assert found == pytest.approx(exact, rel=0.01)


def test_determinism(documents: list[str]) -> None:
    assert documents == list(Grammar(sentences=20_000, seed=3).documents())
    assert documents[0] != next(Grammar(seed=4).documents())
    assert "".join(documents).count("\n") == 20_000
    assert all(text.endswith(".\n") for text in documents)
    # A change of the language or of numpy's stream must be noticed: it changes every recorded number.
    text = "".join(Grammar(sentences=100).documents())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ac4644a2092c598b"


def test_vocabulary_is_rich_and_content_words_are_unambiguous(language: Language) -> None:
    labels = defaultdict(set)
    for edges in language.edges:
        for edge in edges:
            if edge.kind >= 0 and KINDS[edge.kind] in ("noun", "verb", "adjective"):
                labels[edge.text.strip()].add((edge.kind, edge.referent))
    assert all(len(found) == 1 for found in labels.values())
    assert 300 <= len(Grammar().words()) <= 1200
    assert [inflect(word) for word in ("fox", "fry", "buoy", "coach", "map")] == ["foxes", "fries", "buoys", "coaches",
                                                                               "maps"]  # fmt: skip


def test_labels_tell_the_truth() -> None:
    noun, verb, pronoun = (KINDS.index(kind) for kind in ("noun", "verb", "pronoun"))
    nouns = {form: t for t, name in enumerate(TOPICS) for w in LEXICON[name][0].split() for form in (w, inflect(w))}
    verbs = {form: t for t, name in enumerate(TOPICS) for column in (1, 2, 3) for w in LEXICON[name][column].split()
             for form in (w, inflect(w))}  # fmt: skip
    grammar = Grammar(sentences=300)
    texts = list(grammar.documents())
    for text, (same, spans) in zip(texts, grammar.labelled_documents(), strict=True):
        assert text == same
        words = [text[start:end] for start, end, _, _ in spans]
        assert "".join(words) == "".join(text.split())  # every character that is not white space, once
        assert set(spans[:, 2]) <= set(range(len(KINDS))) and set(spans[:, 3]) <= set(range(len(TOPICS)))
        for i, (word, (_, _, kind, referent)) in enumerate(zip(words, spans, strict=True)):
            if kind == noun:
                assert nouns[word] == referent
            elif kind == verb:
                assert verbs[word] == referent
            elif kind == pronoun:  # its verb speaks about the same
                assert spans[i + 1][2] == verb and spans[i + 1][3] == referent


def test_agreement_survives_a_noun_of_the_other_number(language: Language) -> None:
    for good in ("The ship near these cows drifts.\n", "The ships near this cow drift.\nThey sink.\n"):
        assert np.isfinite(language.surprisal(good)).all()
    for bad in ("The ship near these cows drift.\n", "The ships drift.\nIt sinks.\n", "The ship bakes.\n", "The ship"):
        with pytest.raises(UserError, match="not a sentence"):
            language.surprisal(bad)


@pytest.mark.parametrize("setting", [BPE(400), Bytes()], ids=repr)
def test_labels_follow_tokens(setting) -> None:
    grammar = Grammar(sentences=200)
    tokenizer = setting.build(grammar.documents())
    for text, spans in grammar.labelled_documents():
        offsets = tokenizer.encode(text).offsets
        labels = token_labels(offsets, spans)
        owner = np.full(len(text), -1)  # the word of every character
        for i, (start, end, _, _) in enumerate(spans):
            owner[start:end] = i
        for (start, end), label in zip(offsets, labels, strict=True):
            inside = [int(i) for i in owner[start:end] if i >= 0]
            best = Counter(inside).most_common(1)
            assert label.tolist() == (spans[best[0][0], 2:].tolist() if best else [-1, -1])


def test_a_token_over_several_words_belongs_to_the_larger_part() -> None:
    spans = np.array([[0, 2, 7, 1], [3, 8, 8, 2], [8, 9, 9, 3]])
    offsets = [(0, 5), (0, 6), (2, 3), (7, 9), (1, 9), (5, 5), (20, 30)]
    assert token_labels(offsets, spans)[:, 0].tolist() == [7, 8, -1, 8, 8, -1, -1]
    assert token_labels([], spans).shape == (0, 2)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="sentences >= 1"):
        Grammar(sentences=0)
    with pytest.raises(UserError, match="seed >= 0"):
        Grammar(seed=-1)
