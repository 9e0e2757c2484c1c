"""Study "caustics": a decision that is planted in one layer is found there, and only tokens that are asked for count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from studied import VOCAB, small, subject
from torch import Tensor, nn

from emformer.geometry import lens
from emformer.masks import Full
from emformer.model import Emformer
from emformer.operators import Dense
from emformer.studies.claims.caustics import Caustics, few, reading
from emformer.studies.losses import task
from emformer.training import MaskedToken
from emformer.training.objectives import IGNORE
from emformer.verdicts import Findings

WORDS, SURE = 8, 9.0
TOKENS = (torch.arange(WORDS)[:, None] + torch.arange(7)) % WORDS


class Next(nn.Module):
    """Writes the word that follows the one in the first coordinates into the next ones; or nothing."""

    def __init__(self, size: float):
        super().__init__()
        self.size = size

    def forward(self, y: Tensor) -> Tensor:
        found = torch.zeros_like(y)
        found[..., WORDS : 2 * WORDS] = self.size * y[..., :WORDS].roll(1, -1)
        return found


@torch.no_grad()
def decides(*sizes: float) -> Emformer:
    """A model whose layers are so sure of the next word, one after the other."""
    net = small(dim=2 * WORDS, depth=len(sizes), heads=1, norm=None, form=Dense(), content=Dense())
    net.embedding.weight.zero_()
    net.embedding.weight[:WORDS, :WORDS] = torch.eye(WORDS)
    net.unembedding.weight.zero_()
    net.unembedding.weight[:WORDS, WORDS:] = torch.eye(WORDS)
    for layer, size in enumerate(sizes):
        block = net.layer(layer)
        block.attention.content.left_rows().zero_()
        block.ffn = Next(size)
        block.read_ffn = block.shape_ffn = block.place_ffn = None
    return net


def study(net: Emformer) -> Findings:
    return Caustics().run([subject(net, TOKENS)], lambda share, word: None)


def entropy(score: float) -> float:
    p = torch.tensor([score] + [0.0] * (VOCAB - 1), dtype=torch.float64).softmax(0)
    return float(-(p * p.log()).sum())


def test_a_last_layer_that_decides():
    found = study(decides(0.0, 0.0, SURE))
    late, trained, faster, opened, later, shuffled = found.verdicts
    assert late.word == "supported" and late.measured[:3] == (1.0, 1.0, 1.0) and late.null == pytest.approx(1 / 3)
    assert faster.measured.value == pytest.approx(math.log(VOCAB) - entropy(SURE), abs=1e-5) and faster.word == "supported"
    assert trained.measured.value > 0 and later.measured.value > 0
    assert math.isnan(opened.measured.value) and "too little" in opened.reason, "states of which nothing is read"
    assert shuffled.measured[:3] == (0.0, 0.0, 0.0), "each word decides by itself"
    assert shuffled.word == "undecided" and "no difference at all" in shuffled.reason
    assert all("one draw of untrained weights" in one.why for one in (trained, opened, later))
    told = found.charts["lens"].frame.set_index(["panel", "line", "x"])["y"]
    for layer, score in enumerate((0.0, 0.0, 0.0, SURE)):
        assert told["entropy H, nats", "text", layer] == pytest.approx(entropy(score), abs=1e-5)
    assert told["share with the answer on top", "text", 2] == 0.0 and told["share with the answer on top", "text", 3] == 1.0
    depths = found.charts["depths"].frame.set_index(["panel", "line", "x"])["y"]
    assert depths["collapse depth", "text", 3] == 1.0 and depths["caustic depth", "text", 2] == 1.0
    loss = -float(torch.tensor([SURE] + [0.0] * (VOCAB - 1), dtype=torch.float64).log_softmax(0)[0])
    assert f"entropy of the prediction {entropy(SURE):.3f}, loss {loss:.3f} nats" in found.note


def test_a_first_layer_that_decides():
    found = study(decides(SURE, 0.0, 0.0))
    late, _, faster, opened, later, _ = found.verdicts
    assert late.word == "refuted" and late.measured.value == 0.0
    assert faster.word == "refuted" and later.word == "refuted"
    assert opened.measured.value <= 0 and "settled 1, open 0, unseen 0" in opened.why
    assert "text 0.333" in later.why


def test_the_middle_layer_is_not_of_the_last_third_and_leaves_what_enters_it():
    net = decides(0.0, SURE, 0.0)
    one = reading(subject(net, TOKENS), net)
    assert one.late == pytest.approx(0) and one.settled == pytest.approx(1) and one.collapse == pytest.approx(2 / 3)


def test_an_answer_that_is_seen_before_it_is_settled_is_open():
    """Until the last layer another word leads."""
    net = decides(2.0, 0.0, SURE)
    with torch.no_grad():
        net.embedding.weight[:WORDS, WORDS:] = 4 * torch.eye(WORDS).roll(2, 1)
    one = reading(subject(net, TOKENS), net)
    assert one.open == pytest.approx(1) and one.settled == pytest.approx(0) and one.collapse == pytest.approx(1)
    assert one.seen[:, 1:3] == pytest.approx(1) and one.agrees[:, 1:3] == pytest.approx(0)


def test_only_what_is_asked_for_counts():
    net = small(mask=Full(), context=16, depth=3)
    one = subject(net, objective=MaskedToken(share=0.3))
    given = task(one)
    found = reading(one, net)
    states = [net.embed(given.inputs, torch.arange(15)), *(step.after for step in net.flow(given.inputs))]
    with torch.no_grad():
        entropies = [lens.entropy(net.unembed(x)) for x in states]
        final = net.unembed(states[-1])
        first = lens.read(net.unembed(states[0]), final)
    asked = given.targets != IGNORE
    for layer, values in enumerate(entropies):
        expected = [float(values[b, asked[b]].mean()) for b in range(len(values))]
        assert found.entropy[:, layer] == pytest.approx(expected)
    assert found.divergence[:, 0] == pytest.approx([float(first.divergence[b, asked[b]].mean()) for b in range(len(asked))])
    assert found.depths["collapse"].sum() == pytest.approx(1) and len(found.depths["collapse"]) == 4


def test_two_layers_have_no_last_third():
    found = study(decides(0.0, SURE))
    assert {verdict.word for verdict in found.verdicts} == {"undecided"}
    assert all(verdict.reason == "a last third takes 3 layers" for verdict in found.verdicts)
    assert np.isfinite(found.charts["lens"].frame["y"]).all()


def test_of_a_small_vocabulary_few_are_few():
    assert [few(v) for v in (2, 11, 40, 256, 50_000)] == [2, 2, 4, 10, 10]
