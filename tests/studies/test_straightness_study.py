"""Straightness of paths: walks whose law is known, and models whose tokens go straight, back, or at right angles."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from builders import fill, model
from studied import small, subject, write

from emformer.ffn import GELU
from emformer.geometry import paths
from emformer.model import Emformer
from emformer.operators import Dense
from emformer.operators.dense import DenseOperator
from emformer.parts import UserError
from emformer.settings import Embedding, Learned
from emformer.studies.claims import straightness
from emformer.studies.claims.straightness import Straightness, _measured, excess
from emformer.verdicts import Findings, Verdict

LENGTH, WORDS, PROMPTS = 12, 16, 8
TOKENS = torch.randint(WORDS, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))


def silent(share: float, word: str) -> None:
    pass


def by_claim(findings: Findings, words: str) -> Verdict:
    (found,) = [one for one in findings.verdicts if words in one.claim]
    return found


@torch.no_grad()
def walking(steps: Sequence[tuple[int, float]]) -> Emformer:
    """Every token reads itself; layer l adds (block, size): its word, of this size, in this block of coordinates."""
    dim = LENGTH + 5 * WORDS
    net = model(
        WORDS,
        torch.float32,
        dim=dim,
        depth=len(steps),
        heads=1,
        context=LENGTH,
        form=Dense(),
        content=Dense(),
        norm=None,
        embedding=Embedding(positions=Learned()),
    )
    word, place = torch.arange(WORDS), 5 * WORDS + torch.arange(LENGTH)
    net.embedding.weight.copy_(torch.eye(WORDS, dim))
    fill(net.positions, torch.eye(dim)[place])
    for layer, (block, size) in enumerate(steps):
        form, content = torch.zeros(dim, dim), torch.zeros(dim, dim)
        form[place, place] = 80.0
        content[(1 + block) * WORDS + word, word] = size
        write(net, layer, form, content)
    return net


def test_the_excess_of_random_walks_is_zero_in_the_mean():
    """Of any step lengths and in few dimensions, where length/chord of one walk says little."""
    random = np.random.default_rng(0)
    steps = random.normal(size=(5, 20_000, 3))
    steps *= np.array([1.0, 0.2, 3.0, 1.0, 0.5])[:, None, None] / np.linalg.norm(steps, axis=-1, keepdims=True)
    states = torch.from_numpy(np.concatenate([np.zeros((1, 20_000, 3)), steps.cumsum(0)]))
    values = excess(paths.path(states))
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20_000**0.5
    line = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None, None] * torch.ones(1, 1, 3, dtype=torch.float64)
    assert float(excess(paths.path(line))) == pytest.approx(1 - 1 / 4)


def test_straight_on():
    """The same step in every layer: no turning, 1 - 1/T; also without what all tokens share, as words go their own ways."""
    findings = Straightness().run([subject(walking([(0, 1.0)] * 3), TOKENS)], silent)
    assert by_claim(findings, "than random walks").measured.value == pytest.approx(1 - 1 / 3, abs=1e-4)
    for words in ("than random walks", "drift", "training makes", "right angle"):
        assert by_claim(findings, words).word == "supported", words
    turning = findings.charts["turning"].frame.query("line == 'made'")["y"]
    assert turning.to_numpy() == pytest.approx(0, abs=1e-3)


def test_there_and_back():
    findings = Straightness().run([subject(walking([(0, 1.0), (0, -1.0), (0, 1.0)]), TOKENS)], silent)
    assert by_claim(findings, "than random walks").measured.value == pytest.approx(1 / 9 - 1 / 3, abs=1e-4)
    for words in ("than random walks", "drift", "right angle"):
        assert by_claim(findings, words).word == "refuted", words


def test_right_angles_are_what_a_random_walk_has():
    """Steps in different coordinates: the excess is 0 exactly, so that the interval holds it, and nothing is claimed."""
    findings = Straightness().run([subject(walking([(0, 1.0), (1, 1.0), (2, 2.0)]), TOKENS)], silent)
    raw = by_claim(findings, "than random walks")
    assert raw.measured.value == pytest.approx(0, abs=1e-5)
    turning = findings.charts["turning"].frame.query("line == 'made'")["y"]
    assert turning.to_numpy() == pytest.approx(math.pi / 2, abs=0.2)  # words are few, so that their mean couples blocks


def test_later_steps_that_align_are_found():
    """Right angles first, then straight on; and the other way round. In six models, as one of so few steps tells nothing."""
    early, late = [(0, 1.0), (1, 1.0), (2, 1.0), (2, 1.0)], [(2, 1.0), (2, 1.0), (1, 1.0), (0, 1.0)]
    for steps, word in ((early, "supported"), (late, "refuted")):
        models = [subject(walking(steps), TOKENS[:2].roll(k, 1), name=str(k)) for k in range(6)]
        assert by_claim(Straightness().run(models, silent), "later steps").word == word
    assert by_claim(Straightness().run([subject(walking(early), TOKENS)], silent), "later steps").word == "undecided"


def test_models_that_were_never_trained_are_not_what_training_makes(monkeypatch):
    """Six of them against twins of other seeds: 5 % or so of such studies find a difference, either way."""
    many, studies = 24, 40
    pairs = [subject(small(k, dim=4, heads=1), prompts=4, length=6, begun=1000 + k, name=str(k)) for k in range(many)]
    measured = functools.cache(lambda one, twin: _measured(one, one.untrained() if twin else None, "layers"))
    monkeypatch.setattr(straightness, "_measured", lambda one, twin, steps: measured(one, twin is not None))
    random, words = np.random.default_rng(0), []
    for _ in range(studies):
        some = [pairs[k] for k in random.choice(many, 6, replace=False)]
        words.append(by_claim(Straightness().run(some, silent), "training makes").word)
    assert words.count("undecided") >= 0.85 * studies


def test_a_drift_that_all_tokens_share_is_taken_off():
    """One vector for all tokens in each layer, and right angles beside it: straight in the raw stream, not without the drift."""
    net = walking([(0, 1.0), (1, 1.0), (2, 1.0)])
    with torch.no_grad():
        for layer in range(3):
            content = net.layer(layer).attention.content
            assert isinstance(content, DenseOperator)
            matrix = content.matrix()[0].clone()
            matrix[4 * WORDS, :WORDS] = 6.0
            content.assign(matrix.mT[None])
    findings = Straightness().run([subject(net, TOKENS)], silent)
    assert by_claim(findings, "than random walks").measured.value > 0.4
    assert abs(by_claim(findings, "drift").measured.value) < 0.05


def test_the_walk_in_the_chart_has_the_steps_of_the_model():
    findings = Straightness().run([subject(walking([(k, 1.0) for k in range(4)]), TOKENS)], silent)
    frame = findings.charts["tortuosity"].frame.pivot(index="x", columns="line", values="y")
    assert frame["made"].to_numpy() == pytest.approx(np.sqrt([1, 2, 3, 4]), abs=1e-4)
    assert frame["theory random walk, made"].to_numpy() == pytest.approx(np.sqrt([1, 2, 3, 4]), rel=0.03)


def test_steps_may_be_sublayers_and_one_step_is_refused():
    one = subject(small(depth=1, ffn=GELU()))
    assert len(Straightness(steps="sublayers").run([one], silent).verdicts) == 5  # one turn has no slope
    with pytest.raises(UserError, match="sublayers"):
        Straightness().run([one], silent)
