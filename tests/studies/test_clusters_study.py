"""Clusters by meaning: closeness against another library, and models whose weights gather tokens by a rule that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import fill, model
from sklearn.metrics import roc_auc_score
from studied import subject, write

from emformer.intervals import bootstrap
from emformer.masks import Full
from emformer.model import Emformer
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.settings import Embedding, Learned
from emformer.studies.claims.clusters import Clusters, by_prompt, separation
from emformer.verdicts import Findings, Verdict

WORDS, LENGTH, CLASSES, PROMPTS = 24, 12, 3, 24
TOKENS = torch.randint(WORDS, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))


def silent(share: float, word: str) -> None:
    pass


def by_claim(findings: Findings, words: str) -> Verdict:
    (found,) = [one for one in findings.verdicts if words in one.claim]
    return found


@torch.no_grad()
def planted() -> Emformer:
    """Coordinates are words, positions, words before and classes: layer 0 writes the word before, layer 1 the word's class."""
    dim = 2 * WORDS + LENGTH + CLASSES
    net = model(
        WORDS,
        torch.float32,
        dim=dim,
        heads=1,
        context=LENGTH,
        form=Dense(),
        content=Dense(),
        norm=None,
        embedding=Embedding(positions=Learned()),
    )
    word = torch.arange(WORDS)
    place, before, kind = WORDS + torch.arange(LENGTH), WORDS + LENGTH + word, 2 * WORDS + LENGTH + word % CLASSES
    net.embedding.weight.copy_(torch.eye(WORDS, dim))
    fill(net.positions, torch.eye(dim)[place])
    for layer, (shift, to, size) in enumerate(((1, before, 3.0), (0, kind, 20.0))):
        form, content = torch.zeros(dim, dim), torch.zeros(dim, dim)
        form[place[shift:], place[: LENGTH - shift]] = 50.0  # the query at i sees the key at i - shift alone
        content[to, word] = size
        write(net, layer, form, content)
    return net


def test_closeness_is_the_area_under_the_curve_ties_included():
    random = np.random.default_rng(0)
    states = torch.from_numpy(random.integers(-1, 2, (40, 3)).astype(float) + 0.25)  # many equal cosines
    label, eligible = random.integers(-1, 3, 40), random.random((40, 40)) < 0.7
    np.fill_diagonal(eligible, False)
    found = separation(states, label, eligible).auc
    directions = torch.nn.functional.normalize(states, dim=-1)
    for i in range(40):
        some = np.flatnonzero(eligible[i] & (label >= 0))
        same = label[some] == label[i]
        if label[i] < 0 or same.all() or not same.any():
            assert math.isnan(found[i])
        else:
            cosines = torch.round(directions[some] @ directions[i], decimals=10)
            assert found[i] == pytest.approx(roc_auc_score(same, cosines), abs=1e-12)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Tokens of two classes about two points, and prompts that share a direction: prompts are anchors, and partners of others."""
    random, count, each, dim = np.random.default_rng(0), 30, 5, 4

    def clouds(prompts: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        label = random.integers(2, size=(prompts, tokens))
        states = random.normal(size=(prompts, tokens, dim)) + 0.7 * random.normal(size=(prompts, 1, dim))
        states[..., 0] += label - 0.5
        return states.reshape(-1, dim) / np.linalg.norm(states, axis=-1).reshape(-1, 1), label.ravel()

    (a, its), (b, label) = clouds(200_000, 1), clouds(400_000, 1)
    closeness = np.einsum("nd,nkd->nk", a, b.reshape(-1, 2, dim))
    mixed = (label.reshape(-1, 2) == its[:, None]).sum(1) == 1  # one with the label, one without
    first = label.reshape(-1, 2)[:, 0] == its
    truth = np.mean(np.where(first, closeness[:, 0] > closeness[:, 1], closeness[:, 1] > closeness[:, 0])[mixed])

    prompt, held = np.repeat(np.arange(count), each), 0
    for _ in range(150):
        states, label = clouds(count, each)
        found = separation(torch.from_numpy(states), label, prompt[:, None] != prompt)
        values = by_prompt(found, prompt, count)
        assert values.mean() == pytest.approx(found.auc.mean())
        interval = bootstrap(values, resamples=500)
        held += interval.low <= truth <= interval.high
    assert 0.89 <= held / 150 <= 0.99


def test_it_finds_what_the_weights_gather_and_nothing_else():
    """Words of one class gather in layer 1, occurrences by the word before in layer 0; the next word is drawn at random."""
    findings = Clusters(points=200, shuffles=6).run([subject(planted(), TOKENS, (TOKENS % CLASSES)[None])], silent)
    gather = by_claim(findings, "different words of one class0 gather")
    assert findings.verdicts[0] is gather and gather.word == "supported"
    curve = findings.charts["closer"].frame.query("line == 'made'").pivot(index="x", columns="panel", values="y")
    classes, before, after = curve["different words, class0"], curve["one word, previous token"], curve["one word, next token"]
    assert abs(classes[0] - 0.5) < 0.05 and classes[2] > 0.99 and gather.measured.value == pytest.approx(classes[2] - classes[0])
    assert abs(before[0] - 0.5) < 0.1 and before[1] > 0.99
    assert (abs(after - 0.5) < 0.1).all()
    assert by_claim(findings, "closer than words of others").word == "supported"
    assert by_claim(findings, "same previous token").word == "supported"
    assert by_claim(findings, "same next token gather").word == "undecided"
    assert by_claim(findings, "k-means").word == "undecided"  # one model is one clustering
    assert by_claim(findings, "collapse").word == "refuted"
    agreement = findings.charts["agreement"].frame.set_index("x")["y"]
    assert agreement[2] == pytest.approx(1) and abs(agreement[0]) < 0.4


def test_classes_that_the_model_knows_nothing_of_are_not_found():
    """Labels of words at random: whatever words share by chance is within the spread of shuffled ones. And labels that are random
    for every occurrence, so that not even the word says anything."""
    of_words = torch.randint(CLASSES, (WORDS,), generator=torch.Generator().manual_seed(7))[TOKENS]
    of_places = torch.randint(CLASSES, TOKENS.shape, generator=torch.Generator().manual_seed(8))
    findings = Clusters(points=200, shuffles=6).run([subject(planted(), TOKENS, torch.stack([of_words, of_places]))], silent)
    assert by_claim(findings, "closer than words of others").word == "undecided"
    assert by_claim(findings, "same class1").word == "undecided"


def test_a_word_that_is_always_alike_gathers_by_no_context():
    """Without positions and with layers that add nothing, occurrences of a word are one point: 1/2 exactly, no rounding."""
    net = model(WORDS, torch.float32, norm=None, form=Dense(), content=Dense())
    for layer in range(2):
        write(net, layer, torch.eye(8), torch.zeros(8, 8))
    findings = Clusters(points=64, shuffles=2).run([subject(net, TOKENS)], silent)
    curve = findings.charts["closer"].frame.query("line == 'made'")
    assert len(curve) == 6 and (curve["y"] == 0.5).all()


def test_a_cloud_that_collapses_is_seen():
    net = model(WORDS, torch.float32, depth=1, heads=1, norm=None, mask=Full(), form=Dense(), content=Dense())
    write(net, 0, torch.zeros(8, 8), 100 * torch.eye(8))
    findings = Clusters(points=64, shuffles=2).run([subject(net, TOKENS)], silent)
    assert by_claim(findings, "collapse").word == "supported"


def test_prompts_that_share_text_are_not_compared():
    """All in one group: no pair is left, nothing is claimed."""
    one = subject(planted(), TOKENS, (TOKENS % CLASSES)[None])
    one.groups.zero_()
    findings = Clusters(points=64, shuffles=2).run([one], silent)
    assert {verdict.word for verdict in findings.verdicts} == {"undecided"}
    assert all(math.isnan(verdict.measured.value) for verdict in findings.verdicts if "AUC" in verdict.quantity)


def test_too_short_prompts_are_refused():
    with pytest.raises(UserError, match="--length"):
        Clusters().run([subject(planted(), TOKENS[:, :2])], silent)
