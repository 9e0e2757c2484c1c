"""Study "fragility": a layer that carries everything is the one that is missed, by as much as a closed form says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from studied import VOCAB, small, subject
from torch import Tensor, nn

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.masks import Full
from emformer.model import Emformer
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.studies.claims.fragility import SITES, WAYS, Fragility, beyond, by_chance, losses, resampled, share, spearman, task
from emformer.training import MaskedToken
from emformer.training.objectives import IGNORE
from emformer.verdicts import Findings

WORDS, DEPTH, SURE = 8, 3, 5.0
TOKENS = (torch.arange(WORDS)[:, None] + torch.arange(7)) % WORDS  # each word is followed by the next


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
def carried(*layers: int, depth: int = DEPTH) -> Emformer:
    """A model in which these layers know the next word, each `SURE` of it, and the others do nothing."""
    net = small(dim=2 * WORDS, depth=depth, heads=1, norm=None, form=Dense(), content=Dense(), ffn=GELU())
    net.embedding.weight.zero_()
    net.embedding.weight[:WORDS, :WORDS] = torch.eye(WORDS)
    net.unembedding.weight.zero_()
    net.unembedding.weight[:WORDS, WORDS:] = torch.eye(WORDS)
    for layer in range(depth):
        block = net.layer(layer)
        block.attention.content.left_rows().zero_()
        block.ffn = Next(SURE if layer in layers else 0.0)
    return net


def study(*models: Emformer, **more: Any) -> Findings:
    return Fragility().run([subject(net, TOKENS, **more) for net in models], lambda share, word: None)


def words(found: Findings) -> dict[str, tuple[str, float]]:
    return {verdict.quantity: (verdict.word, verdict.measured.value) for verdict in found.verdicts}


def test_what_a_first_layer_is_missed_for():
    found = study(carried(0))
    frame = found.charts["loss"].frame.set_index(["panel", "line", "x"])["y"]
    rest = VOCAB - 1  # words that the model has no score for, but the right one
    loss = math.log(math.exp(SURE) + rest) - SURE
    mean = math.log(WORDS * math.exp(SURE / WORDS) + VOCAB - WORDS) - SURE / WORDS
    truth = {"skip": math.log(VOCAB), "mean": mean, "resample": math.log(math.exp(SURE) + rest)}
    for panel, carries in (("a whole layer", True), ("attention", False), ("the FFN", True)):
        for way in WAYS:
            assert frame[panel, way, 0] == pytest.approx(truth[way] - loss if carries else 0.0, abs=1e-5), (panel, way)
            assert [frame[panel, way, layer] for layer in (1, 2)] == pytest.approx([0, 0], abs=1e-6)
    p = torch.tensor([SURE] + [0.0] * rest, dtype=torch.float64).softmax(0)
    moved = float((p * p.log()).sum()) + math.log(VOCAB)
    shift = found.charts["shift"].frame.set_index(["line", "x"])["y"]
    assert [shift["trained", layer] for layer in range(DEPTH)] == pytest.approx([moved, 0, 0], abs=1e-5)
    assert all(shift["untrained twin", layer] > 0 for layer in range(DEPTH))
    told = words(found)
    assert told["Spearman(l, dL_l), skip of a whole layer"] == ("supported", pytest.approx(-math.sqrt(3) / 2))
    assert told["R/(1 + R), R = mean dL of the first third / of the last, skip of a whole layer"] == ("supported", 1.0)
    assert told["Spearman(l, dL_l), resample of a whole layer"][0] == "supported"
    assert told["Spearman(l, dL_l), skip of the FFN"][0] == "supported"
    assert "Spearman(l, dL_l), skip of attention" in told
    late = next(verdict for verdict in found.verdicts if "without layer 0" in verdict.quantity)
    assert late.word == "undecided" and "takes 3 layers" in late.reason, "two layers are no trend"


def test_a_last_layer_that_carries_it_refutes_the_claim():
    found = study(carried(2))
    assert [verdict.word for verdict in found.verdicts[:2]] == ["refuted", "refuted"]
    assert found.verdicts[1].measured.value == 0.0


def test_two_layers_decide_nothing_and_say_so():
    found = study(carried(0, depth=2))
    assert {verdict.word for verdict in found.verdicts} == {"undecided"}
    assert all("fewer" in verdict.reason for verdict in found.verdicts)
    assert found.charts["loss"].frame["y"].max() > 1, "what is measured is still told"


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"ffn": GELU(), "epsilon": 0.5}, id="sequential"),
        pytest.param({"ffn": GELU(), "arrangement": Parallel()}, id="parallel"),
        pytest.param({"ffn": GELU(), "shared": True}, id="shared"),
        pytest.param({}, id="no-ffn"),
    ],
)
def test_another_prompts_update_is_the_difference_of_its_states(fields):
    net = small(**fields)
    tokens = subject(net).tokens
    steps = [step for step in net.flow(tokens) if step.layer == 1]
    before, after = steps[0].before, steps[-1].after
    points = ["attn", "ffn"] if "ffn" in fields else ["attn"]
    with torch.no_grad():
        found = resampled(net, tokens, 1, points)(tokens)
        expected = net.unembed(before + (after - before).roll(1, 0))
    torch.testing.assert_close(found, expected)
    # an earlier layer, attention alone: what comes after it reads what it left
    attention = next(step for step in net.flow(tokens) if step.layer == 0)
    changed = next(step for step in resampled(net, tokens, 0, ["attn"]).flow(tokens) if step.layer == 1).before
    assert (changed - attention.before).abs().max() > 0.01
    if "ffn" not in fields:
        torch.testing.assert_close(changed, attention.before + (attention.after - attention.before).roll(1, 0))


def test_masks_are_the_studys_own_and_the_loss_is_on_masked_words():
    net = small(mask=Full(), context=16)
    one = subject(net, objective=MaskedToken(share=0.3))
    state = torch.get_rng_state()
    given = task(one)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(given.targets, task(one).targets)
    asked = given.targets != IGNORE
    assert 0.1 < asked.double().mean() < 0.5 and torch.equal(given.targets[asked], one.tokens[:, :-1][asked])
    assert torch.equal(given.inputs[~asked], one.tokens[:, :-1][~asked])
    assert (given.inputs[asked] == VOCAB - 1).double().mean() > 0.5, "the mask token"
    with torch.no_grad():
        logs = net(given.inputs).log_softmax(-1)
    expected = [-logs[b, asked[b]].gather(1, given.targets[b, asked[b], None]).mean().item() for b in range(len(logs))]
    assert losses(net, *given) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="objective NextToken"):
        task(subject(net))


def test_the_statistics_are_what_they_are_called():
    random = np.random.default_rng(0)
    rises = random.normal(size=(20, 7)).round(1)  # with ties
    expected = [stats.spearmanr(range(7), row).statistic for row in rises]
    assert spearman(rises) == pytest.approx(expected)
    assert np.isnan(spearman(np.ones((1, 5)))).all() and np.isnan(spearman(rises[:, :2])).all()
    rows = np.array([[3.0, 0, 0, 9, 0, 0, 1], [1, -1, 5, 5, 5, 2, -4], [0, 0, 1, 1, 1, -1, -1], [-1, -1, 0, 0, 0, 2, 2]])
    assert share(rows)[[0, 3]] == pytest.approx([0.75, 0.0]) and np.isnan(share(rows)[[1, 2]]).all()
    assert np.isnan(share(rows[:, :2])).all()


def test_a_trend_is_held_against_the_twins():
    rows = np.array([[3.0, 2, 1, 1, 2, 3], [3, 2, 1, 3, 2, 1], [1, 3, 2, 2, 3, 1]])
    assert beyond(rows) == pytest.approx([-2.0, 0.0, 1.0])
    assert np.isnan(beyond(rows[:, :4])).all()


def test_an_order_of_few_layers_is_no_surprise():
    assert [by_chance(value, 3) for value in (-1.0, -0.5, 0.5, 1.0)] == pytest.approx([1 / 6, 1 / 2, 5 / 6, 1.0])
    assert by_chance(-0.9, 9) < 0.01


def test_layers_without_an_ffn_are_not_asked_for_one():
    net = small(depth=3)
    found = Fragility().run([subject(net)], lambda share, word: None)
    fed = next(verdict for verdict in found.verdicts if "skip of the FFN" in verdict.quantity)
    assert fed.word == "undecided" and "layers that have it" in fed.reason
    assert set(found.charts["loss"].frame["panel"]) == {"a whole layer", "attention"} and len(SITES) == 3
