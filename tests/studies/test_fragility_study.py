"""Study "fragility": a layer that carries everything is the one that is missed, by as much as a closed form says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from studied import VOCAB, small, subject
from torch import Tensor, nn

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.masks import Full
from emformer.model import Emformer
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.studies.claims.fragility import SITES, WAYS, Found, Fragility, _verdicts, beyond, resampled, share
from emformer.studies.losses import by_prompt, by_token, task
from emformer.training import MaskedToken
from emformer.training.objectives import IGNORE
from emformer.verdicts import Findings, Verdict

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
    trend = "Spearman(l, dL_l), skip of a whole layer"
    ratio = "R/(1 + R), R = mean dL of the first third / of the last, skip of a whole layer"
    assert told[trend] == ("undecided", pytest.approx(-math.sqrt(3) / 2)) and told[ratio] == ("undecided", 1.0)
    assert "too few models: 1" in found.verdicts[0].reason and "of all orders of 3 layers 0.67 have" in found.verdicts[0].reason
    late = next(verdict for verdict in found.verdicts if "without layer 0" in verdict.quantity)
    assert late.word == "undecided" and "takes 3 layers" in late.reason, "two layers are no trend"
    assert "one draw of untrained weights" in found.verdicts[-1].why and "of wide models" in found.note


def planted(sizes: list[float], models: int, seed: int = 0) -> list[Verdict]:
    """Verdicts on rises of these sizes by layer and a little noise, the same at each site, of models of one profile."""
    random = np.random.default_rng(seed)
    net, rises = small(depth=len(sizes)), [np.array(sizes) + 0.01 * random.normal(size=(32, len(sizes))) for _ in range(models)]
    found = [Found({(site, way): one for site in SITES for way in WAYS}, np.stack([one, one[:, ::-1]], 1)) for one in rises]
    return _verdicts(found, [np.arange(32)] * models, [subject(net)] * models)


def test_layers_that_fall_in_order_support_it_if_there_are_enough_of_them_or_of_models():
    falls = [5.0, 4.0, 3.0, 2.0, 1.0, 0.5]
    trend, ratio, after, ratio_after, *_, training = planted(falls, 1)
    assert (trend.word, ratio.word, after.word, training.word) == ("supported",) * 4 and trend.measured.of == "prompts"
    assert "orders of 6 layers 0.0028 have" in trend.why and "orders of 6 layers 0.022 have" in ratio.why
    assert (ratio_after.word, ratio_after.measured.of) == ("undecided", "models"), "one of five is first by chance, and one last"
    assert [verdict.word for verdict in planted(falls[::-1], 1)[:2]] == ["refuted", "refuted"]
    six = planted(falls[:4], 6)[0]
    assert six.word == "supported" and (six.measured.n, six.measured.of, six.why) == (6, "models", "")
    assert {verdict.word for verdict in planted([1.0, 3.0, 2.0, 2.5, 1.5, 2.2], 1)} == {"undecided"}, "in no order"


def test_two_layers_decide_nothing_and_say_so():
    found = study(carried(0, depth=2))
    assert {verdict.word for verdict in found.verdicts} == {"undecided"}
    assert all("a trend takes 3 layers" in verdict.reason for verdict in found.verdicts)
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
    assert by_prompt(net, *given) == pytest.approx(expected, abs=1e-5)
    assert np.array_equal(np.isfinite(by_token(net, *given)), asked.numpy())
    with pytest.raises(UserError, match="objective NextToken"):
        task(subject(net))


def test_the_statistics_are_what_they_are_called():
    rows = np.array([[3.0, 0, 0, 9, 0, 0, 1], [1, -1, 5, 5, 5, 2, -4], [0, 0, 1, 1, 1, -1, -1], [-1, -1, 0, 0, 0, 2, 2]])
    assert share(rows)[[0, 3]] == pytest.approx([0.75, 0.0]) and np.isnan(share(rows)[[1, 2]]).all()
    assert np.isnan(share(rows[:, :2])).all()
    pairs = np.array([[[3.0, 2, 1], [1, 2, 3]], [[3, 2, 1], [3, 2, 1]], [[1, 3, 2], [2, 3, 1]]])
    assert beyond(pairs) == pytest.approx([-2.0, 0.0, 1.0]) and np.isnan(beyond(pairs[..., :2])).all()


def test_layers_without_an_ffn_are_not_asked_for_one():
    net = small(depth=3)
    found = Fragility().run([subject(net)], lambda share, word: None)
    fed = next(verdict for verdict in found.verdicts if "skip of the FFN" in verdict.quantity)
    assert fed.word == "undecided" and "3 layers, and there are 0" in fed.reason
    assert set(found.charts["loss"].frame["panel"]) == {"a whole layer", "attention"} and len(SITES) == 3
