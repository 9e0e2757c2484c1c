"""A small English whose entropy is known exactly and whose every word says what it is and what it speaks about.

The language is a finite chain: `emissions(state)` lists what may come next, with its probability and the state that
follows. From a state and the word that was emitted the next state is certain (the chain is *unifilar*), so a reader of
the text always knows the state, and the entropy rate is the mean over the stationary law pi of the states

    h = sum_s pi(s) H(emission | s).

No model can have a lower loss than that, and one that reaches it has learnt all there is: that verbs agree in number
with a subject that stands before a prepositional phrase or a relative clause, that every verb belongs to the topic of
its subject, that some verbs take objects of their own topic and others of a partner topic, and that "it" and "they"
stand for the subject of the sentence before.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import log
from typing import ClassVar, NamedTuple

import numpy as np

from emformer.parts import LabelledCorpus, UserError
from emformer.text.corpora import digest

KINDS = (
    "determiner",
    "adjective",
    "noun",
    "verb",
    "preposition",
    "adverb",
    "pronoun",
    "possessive",
    "conjunction",
    "relative",
    "punctuation",
)

# Per topic: nouns, verbs with an object of the same topic, verbs with an object of the partner topic, verbs without
# object, adjectives, adverbs. The nouns and verbs of one topic appear in no other, which makes the chain unifilar.
LEXICON = {
    "sea": (
        "sailor captain pirate whale dolphin ship anchor harbor lighthouse island crab seagull rudder lagoon",
        "steer board tow moor haul",
        "rescue signal ferry spot salvage",
        "drift sink float dive splash",
        "salty tidal coastal stormy nautical sunken",
        "ashore overboard downwind",
    ),
    "farm": (
        "farmer shepherd cow horse goat barn tractor field pasture hen pig rooster orchard stable",
        "milk feed herd harvest breed",
        "shelter fence fertilize water nourish",
        "graze wander nap bleat ripen",
        "muddy fertile rural woolly dusty grassy",
        "outdoors uphill daily",
    ),
    "kitchen": (
        "baker chef waiter oven kettle spoon pan pie soup onion carrot cake plate recipe",
        "bake fry stir peel taste",
        "serve season chop warm sweeten",
        "boil simmer sizzle steam dine",
        "spicy sweet crispy buttery hungry tasty",
        "deliciously tenderly gently",
    ),
    "music": (
        "singer violinist drummer piano flute trumpet melody chord concert orchestra composer song rhythm guitar",
        "compose rehearse perform conduct strum",
        "accompany record admire praise imitate",
        "sing hum resonate improvise vibrate",
        "melodic acoustic rhythmic loud harmonic lyrical",
        "loudly softly sweetly",
    ),
    "law": (
        "judge lawyer court jury witness contract verdict prosecutor defendant statute clerk prison tribunal lawsuit",
        "accuse summon acquit sentence question",
        "prohibit regulate inspect protect sue",
        "testify deliberate object plead confess",
        "guilty innocent legal strict formal impartial",
        "lawfully formally fairly",
    ),
    "medicine": (
        "doctor nurse patient surgeon hospital clinic vaccine bandage symptom fever pharmacist scalpel infection pill",
        "treat diagnose heal vaccinate examine",
        "monitor comfort sterilize revive prescribe",
        "recover cough faint sneeze shiver",
        "sick healthy feverish surgical clinical pale",
        "painfully weakly medically",
    ),
    "machine": (
        "engineer mechanic robot engine gear motor circuit sensor battery lever piston turbine valve cable",
        "assemble repair power calibrate wire",
        "test scan lift crush transport",
        "spin rattle overheat rotate stall",
        "electric mechanical metallic automatic broken oily",
        "automatically rapidly noisily",
    ),
    "forest": (
        "fox bear owl squirrel oak pine mushroom badger hunter trail fern beetle raven meadow",
        "hunt stalk chase gather track",
        "startle avoid watch follow scratch",
        "hide hibernate howl sleep prowl",
        "wild leafy mossy shady furry silent",
        "silently underfoot nightly",
    ),
    "market": (
        "merchant customer coin shop price bargain broker bank loan basket vendor receipt ledger discount",
        "buy sell auction wrap count",
        "import export order finance store",
        "haggle profit speculate negotiate compete",
        "cheap expensive wealthy frugal commercial busy",
        "cheaply profitably weekly",
    ),
    "sky": (
        "astronomer planet star comet telescope moon galaxy satellite rocket astronaut meteor crater asteroid eclipse",
        "orbit observe launch illuminate circle",
        "photograph map chart study discover",
        "glow shine twinkle explode collapse",
        "distant bright lunar cosmic stellar frozen",
        "overhead brightly skyward",
    ),
}
TOPICS = tuple(LEXICON)

SINGULAR, PLURAL = 0, 1
DETERMINERS = {  # word: the numbers that its noun may have
    "the": (SINGULAR, PLURAL),
    "this": (SINGULAR,),
    "every": (SINGULAR,),
    "each": (SINGULAR,),
    "these": (PLURAL,),
    "many": (PLURAL,),
    "several": (PLURAL,),
}
OPENERS = "often today sometimes meanwhile"
PREPOSITIONS = "near behind beside beyond without"
CONJUNCTIONS = "and but while"
END = ""  # the emission that ends a document: it has no characters, a reader sees the separator in its place
PIECES = re.compile(r" ?[A-Za-z]+|\.\n|.", re.DOTALL)  # a text falls apart into its emissions
AHEAD = -1  # the referent of a word that speaks about what follows it, until that is known

State = tuple
START: State = ("start", None)


class Emission(NamedTuple):
    """One thing that may come next: its characters (with the space before or the newline after), probability, the state
    that follows, and the ids of its class and referent."""

    text: str
    probability: float
    target: State
    kind: int
    referent: int


class EntropyRate(NamedTuple):
    """The least mean loss that any model can have on the language, in three units."""

    nats_per_word: float
    nats_per_byte: float
    bits_per_byte: float


class Labelled(NamedTuple):
    """A document and its words: `spans` is (words, 4) int64 with start and end (exclusive) in characters, class id (of
    `KINDS`) and referent id (of `TOPICS`)."""

    text: str
    spans: np.ndarray


def inflect(word: str) -> str:
    """The plural of a noun, or the third person singular of a verb."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "sh", "ch")) else "s")


def _near(topic: int) -> list[tuple[int, float]]:
    """Topics of a noun that stands beside one of `topic`."""
    return [(topic, 0.5), ((topic + 1) % len(TOPICS), 0.3), (_partner(topic), 0.2)]


def _partner(topic: int) -> int:
    return (topic + 3) % len(TOPICS)


def _next(topic: int | None) -> list[tuple[int, float]]:
    """Topics of a new subject after a sentence about `topic` (None: at the start of a document)."""
    n = len(TOPICS)
    return [(t, 1 / n if topic is None else 0.6 if t == topic else 0.4 / (n - 1)) for t in range(n)]


def _zipf(n: int, total: float) -> list[float]:
    """n falling probabilities (Zipf's law, shifted) that sum to `total`."""
    weights = [1 / (i + 3) for i in range(n)]
    return [total * weight / sum(weights) for weight in weights]


def _any_of(words: str, total: float, target: State, kind: str, referent: int) -> list[Emission]:
    """One of the words, which all lead to the same state."""
    forms = words.split()
    weights = _zipf(len(forms), total)
    return [Emission(f" {w}", p, target, KINDS.index(kind), referent) for w, p in zip(forms, weights, strict=True)]


def _determiners(total: float, target: State, referent: int) -> list[Emission]:
    """The state that follows remembers which numbers the noun may have."""
    kind, weights = KINDS.index("determiner"), _zipf(len(DETERMINERS), total)
    rows = zip(DETERMINERS.items(), weights, strict=True)
    return [Emission(f" {word}", p, (*target, numbers), kind, referent) for (word, numbers), p in rows]


def _nouns(topic: int, numbers: tuple, total: float, target: State) -> list[Emission]:
    """A noun that becomes the subject is remembered as (topic, number)."""
    out, kind, forms = [], KINDS.index("noun"), LEXICON[TOPICS[topic]][0].split()
    for word, p in zip(forms, _zipf(len(forms), total / len(numbers)), strict=True):
        for number in numbers:
            following = ("subject", (topic, number)) if target == ("subject",) else target
            out.append(Emission(f" {inflect(word) if number == PLURAL else word}", p, following, kind, topic))
    return out


def _verbs(column: int, subject: tuple, total: float, target: State) -> list[Emission]:
    """Verbs of the subject's topic, in the form that its number asks for."""
    topic, number = subject
    words = LEXICON[TOPICS[topic]][column]
    forms = words if number == PLURAL else " ".join([inflect(word) for word in words.split()])
    return _any_of(forms, total, target, "verb", topic)


def _transitive(subject: tuple, total: float, back: str) -> list[Emission]:
    """Verbs that say the topic of their object."""
    topic = subject[0]
    own = _verbs(1, subject, 0.6 * total, ("article", subject, topic, back))
    return own + _verbs(2, subject, 0.4 * total, ("article", subject, _partner(topic), back))


def _mark(text: str, p: float, target: State, subject: tuple) -> list[Emission]:
    return [Emission(text, p, target, KINDS.index("punctuation"), subject[0])]


def _pronoun(p: float, subject: tuple) -> list[Emission]:
    return _any_of("they" if subject[1] == PLURAL else "it", p, ("verb", subject), "pronoun", subject[0])


def _first(edges: list[Emission]) -> list[Emission]:
    """The same at the start of a sentence: a capital, and no space before it."""
    return [edge._replace(text=edge.text.strip().capitalize()) for edge in edges]


def emissions(state: State) -> list[Emission]:
    """What may follow in `state`. The names of the states say what is expected; what they remember stands behind.

    `subject` is (topic, number) of the sentence's subject, or of the last sentence's at a start. `back` names the state
    to which a noun phrase inside the sentence returns.
    """
    match state:
        case ("start", None):
            openers = _any_of(OPENERS, 0.2, ("opened", None), "adverb", AHEAD)
            return _first(openers + _determiners(0.8, ("fresh", None), AHEAD))
        case ("start", subject):
            openers = _any_of(OPENERS, 0.1, ("opened", subject), "adverb", AHEAD)
            subjects = _pronoun(0.35, subject) + _determiners(0.5, ("fresh", subject[0]), AHEAD)
            return [Emission(END, 0.05, START, -1, AHEAD), *_first(openers + subjects)]
        case ("opened", None):
            return _determiners(1.0, ("fresh", None), AHEAD)
        case ("opened", subject):
            return _pronoun(0.4, subject) + _determiners(0.6, ("fresh", subject[0]), AHEAD)
        case ("fresh", before, numbers):  # a new subject, after its determiner
            out = []
            for topic, p in _next(before):
                out += _any_of(LEXICON[TOPICS[topic]][4], 0.3 * p, ("described", topic, numbers), "adjective", topic)
                out += _nouns(topic, numbers, 0.7 * p, ("subject",))
            return out
        case ("described", topic, numbers):
            return _nouns(topic, numbers, 1.0, ("subject",))
        case ("subject", subject):
            phrases = _any_of(PREPOSITIONS, 0.25, ("place", subject, "verb"), "preposition", subject[0])
            phrases += _any_of("that", 0.1, ("relative", subject), "relative", subject[0])
            return phrases + _transitive(subject, 0.45, "object") + _verbs(3, subject, 0.2, ("object", subject))
        case ("relative", subject):
            return _transitive(subject, 1.0, "verb")
        case ("verb", subject):
            return _transitive(subject, 0.7, "object") + _verbs(3, subject, 0.3, ("object", subject))
        case ("article", subject, topic, back):  # an object, its topic said by the verb
            owner = "their" if subject[1] == PLURAL else "its"
            thing = ("thing", subject, topic, back)
            owned = _any_of(owner, 0.2, (*thing, (SINGULAR, PLURAL)), "possessive", subject[0])
            return owned + _determiners(0.8, thing, topic)
        case ("thing", subject, topic, back, numbers):
            bare = ("bare", subject, topic, back, numbers)
            described = _any_of(LEXICON[TOPICS[topic]][4], 0.25, bare, "adjective", topic)
            return described + _nouns(topic, numbers, 0.75, (back, subject))
        case ("bare", subject, topic, back, numbers):
            return _nouns(topic, numbers, 1.0, (back, subject))
        case ("place", subject, back):  # a prepositional phrase, after its preposition
            return _determiners(1.0, ("site", subject, back), AHEAD)
        case ("site", subject, back, numbers):
            return [edge for topic, p in _near(subject[0]) for edge in _nouns(topic, numbers, p, (back, subject))]
        case ("object", subject):  # the predicate is whole
            more = _any_of(PREPOSITIONS, 0.2, ("place", subject, "done"), "preposition", subject[0])
            more += _any_of(LEXICON[TOPICS[subject[0]]][5], 0.15, ("done", subject), "adverb", subject[0])
            more += _mark(",", 0.1, ("joined", subject), subject)
            return more + _mark(".\n", 0.55, ("start", subject), subject)
        case ("done", subject):
            return _mark(".\n", 0.9, ("start", subject), subject) + _mark(",", 0.1, ("joined", subject), subject)
        case ("joined", subject):
            return _any_of(CONJUNCTIONS, 1.0, ("again", subject), "conjunction", subject[0])
        case ("again", subject):
            return _pronoun(1.0, subject)
        case _:
            raise AssertionError(f"no such state: {state}")


class Language:
    """The whole graph, found from the start state: `states` and, in the same order, their `edges`.

    Cost: 0.1 s and a few MB for about a thousand states.
    """

    def __init__(self) -> None:
        edges: dict[State, list[Emission]] = {}
        frontier = [START]
        while frontier:
            state = frontier.pop()
            if state not in edges:
                edges[state] = emissions(state)
                frontier.extend(emission.target for emission in edges[state])
        self.states = list(edges)
        self.edges = list(edges.values())
        self.index = {state: i for i, state in enumerate(self.states)}

    def transition(self) -> np.ndarray:
        """The (states, states) matrix P of the chain; its rows sum to 1."""
        matrix = np.zeros((len(self.states), len(self.states)))
        for i, edges in enumerate(self.edges):
            for edge in edges:
                matrix[i, self.index[edge.target]] += edge.probability
        return matrix

    @cached_property
    def stationary(self) -> np.ndarray:
        """The law pi (states,) with pi P = pi and sum 1, from one dense linear solve."""
        system = self.transition().T - np.eye(len(self.states))
        system[-1] = 1  # the equations add up to zero, so one of them gives way to the norm
        return np.linalg.solve(system, np.eye(len(self.states))[-1])

    def entropy_rate(self) -> EntropyRate:
        """Exact, from the stationary law. The end of a document counts with its nats, but as no word and no byte."""
        nats = words = size = 0.0
        for weight, edges in zip(self.stationary.tolist(), self.edges, strict=True):
            for edge in edges:
                nats -= weight * edge.probability * log(edge.probability)
                words += weight * edge.probability * (edge.text != END)
                size += weight * edge.probability * len(edge.text.encode())
        return EntropyRate(nats / words, nats / size, nats / size / log(2))

    def surprisal(self, text: str) -> np.ndarray:
        """Nats of every word of one document, (words + 1,) float64; the last entry is that of the document's end.

        Over many documents their sum, divided by the number of words, tends to the entropy rate. Raises `UserError` at
        the first word that the language forbids: so it also judges what a model wrote. Cost: 1 s per MB.
        """
        nats, state, place = [], 0, 0
        for piece in [*PIECES.findall(text), END]:
            if piece not in self._by_text[state]:
                message = f"not a sentence of the grammar at character {place}: {text[place : place + 30]!r}"
                raise UserError(f"{message}; give one document, from its first sentence to the end of its last")
            edge = self._by_text[state][piece]
            nats.append(-log(edge.probability))
            state, place = self.index[edge.target], place + len(piece)
        return np.array(nats)

    @cached_property
    def _by_text(self) -> list[dict[str, Emission]]:
        return [{edge.text: edge for edge in edges} for edges in self.edges]


@dataclass(frozen=True)
class Grammar(LabelledCorpus):
    """Documents of the generated language: the same for the same settings, about 45 bytes per sentence, one per line.

    Every document begins in the same state, in which nothing was said before, and after each sentence it ends with
    probability 1/20. The end is one more emission of the chain, so `entropy_rate` holds for the stream of documents
    with their separators, and the text of a document never depends on another's. (The last is cut where the sentences
    run out.)

    Attributes:
        sentences: how many in all, at least 1; the default makes 0.9 MB.
        seed: of the choices, at least 0. The language itself is always the same.
    """

    sentences: int = 20_000
    seed: int = 0

    label_names: ClassVar[tuple[str, ...]] = ("class", "referent")

    def __post_init__(self) -> None:
        if self.sentences < 1 or self.seed < 0:
            raise UserError(f"{self} makes no text: set sentences >= 1 and seed >= 0")

    @classmethod
    def examples(cls) -> Sequence[Grammar]:
        return [cls(sentences=60)]

    def documents(self) -> Iterator[str]:
        """The texts, of about 20 sentences each. Cost: under a second per MB."""
        for document in self._walks():
            yield "".join([emission.text for emission in document])

    def identity(self) -> str:
        """Hex SHA-256 over the documents. Cost: making them once."""
        return digest(self.documents())

    def labelled_documents(self) -> Iterator[Labelled]:
        """The documents with the span, class and referent of every word.

        A word that comes before what it speaks about (an opening adverb, a determiner) has the referent of the next
        word that has one of its own. Only the full stops and commas have no space before them; no span holds any space.
        """
        for document in self._walks():
            spans = np.empty((len(document), 4), np.int64)
            place = 0
            for row, emission in zip(spans, document, strict=True):
                word = emission.text.strip()
                start = place + emission.text.index(word)
                row[:] = start, start + len(word), emission.kind, emission.referent
                place += len(emission.text)
            for row, following in zip(spans[-2::-1], spans[:0:-1], strict=True):
                if row[3] == AHEAD:
                    row[3] = following[3]
            yield Labelled("".join([emission.text for emission in document]), spans)

    def words(self) -> tuple[str, ...]:
        """The distinct words of the language with its punctuation marks, sorted; sentence starts are capitalised."""
        return tuple(sorted({e.text.strip() for edges in Language().edges for e in edges} - {END}))

    def entropy_rate(self) -> EntropyRate:
        """The exact entropy rate of the language: nats per word, nats per byte, bits per byte."""
        return Language().entropy_rate()

    def _walks(self) -> Iterator[list[Emission]]:
        """The emissions of each document, without its end."""
        language = Language()
        random = np.random.default_rng(self.seed)
        targets = [[language.index[edge.target] for edge in edges] for edges in language.edges]
        bounds = [list(accumulate(edge.probability for edge in edges))[:-1] for edges in language.edges]
        left = self.sentences
        document: list[Emission] = []
        state = language.index[START]
        while True:
            for u in random.random(1 << 14).tolist():
                choice = bisect(bounds[state], u)
                emission = language.edges[state][choice]
                state = targets[state][choice]
                if emission.text == END:
                    yield document
                    document = []
                    continue
                document.append(emission)
                left -= emission.text.endswith("\n")
                if not left:
                    yield document
                    return


def token_labels(offsets: Sequence[tuple[int, int]] | np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Labels of tokens from labels of words: (tokens, columns - 2) int64, -1 where a token touches no word.

    `offsets` are (start, end) in characters of each token, as `Encoding.offsets` gives them; `spans`, of shape
    (words, 2 + labels), has start, end and labels of each word, ascending and without overlap. A token takes the labels
    of the word that covers most of its characters, of the first such word in a tie. Cost: O(tokens log words).
    """
    offsets = np.asarray(offsets, np.int64).reshape(-1, 2)
    labels = np.full((len(offsets), spans.shape[1] - 2), -1, np.int64)
    first = np.searchsorted(spans[:, 1], offsets[:, 0], side="right")  # the first word that ends after the token begins
    last = np.searchsorted(spans[:, 0], offsets[:, 1], side="left")  # the first that begins where the token has ended
    best = np.zeros(len(offsets), np.int64)
    for step in range(int(max((last - first).max(initial=0), 0))):
        here = np.flatnonzero(first + step < last)
        word = spans[first[here] + step]
        shared = np.minimum(offsets[here, 1], word[:, 1]) - np.maximum(offsets[here, 0], word[:, 0])
        better = shared > best[here]
        labels[here[better]] = word[better, 2:]
        best[here[better]] = shared[better]
    return labels
