"""Sinks: identities of causality, planted sinks whose every number is known, and models that have none or cannot be asked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from builders import fill
from studied import VOCAB, small, subject

from emformer.ffn import GELU
from emformer.kernels import Linear, Sigmoid, Sinkhorn, SinkSoftmax
from emformer.masks import All, Causal, Full, Window
from emformer.norms import LayerNorm
from emformer.operators import LowRank
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Drift, Embedding, Functional, Learned
from emformer.studies.claims.sinks import Sinks, effects, halved, look, pairs
from emformer.training import MaskedToken
from emformer.trajectory import capture

T, P, DIM = 16, 80, 16  # half of the prompts choose the heads, half are judged
LIKED = 7  # the token that the planted text is full of

SAME = "with the same first token it is the same in every context"
ALIKE = "the vector that a sink gives is the same whatever the first token"
BEYOND = "it is more alike between contexts than what a later token gives"
BIAS = "its content acts as a constant bias: the mean in its place costs less than a tenth of what removal costs"
USED = "its content is used: 0 in its place costs more than 0 in a later token's"
REMOVED = "removing the sink costs more than removing a later token"
VALVE = "the weight on the sink is a valve: it varies with the query and not with its position alone"
DRAIN = "the sink drains attention: it gives less than other tokens do"
THERE = "the first token is a sink"


def ask(*subjects, **setting) -> dict[str, Any]:
    return {one.claim: one for one in Sinks(**setting).run(subjects, lambda *_: None).verdicts}


def edited(about, heads):
    """Change of loss of the judged half."""
    chooser, judge = halved(about)
    return effects(judge, chooser, heads, 5, lambda *_: None).change


def draw(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(topic: bool = False, valve: float = 0.0):
    """One layer, whose head 0 gives token 1 the weight e^s/(e^s + i - 1) at query i, s = 4 (+ `valve` times a coordinate of
    the query); head 1 is idle. What token 1 gives is one vector, which raises the logit of LIKED; with `topic` it is the first
    token's own vector, which raises the logit of the token that comes 100 after it.

    Coordinates: 0 says that a token is the first, 1 what LIKED is read from, 2 … 8 the token's own vector, 9 … 15 where its
    content goes and is read from.
    """
    part = LowRank(rank=8)
    net = small(
        dtype=torch.float64,
        depth=1,
        dim=DIM,
        norm=None,
        form=part,
        content=part,
        functional=Functional(),
        embedding=Embedding(positions=Learned()),
    )
    attention = net.blocks[0].attention
    own = torch.zeros(VOCAB, DIM, dtype=torch.float64)
    own[:100, 2:9] = torch.nn.functional.normalize(draw((100, 7)), dim=-1)
    place = torch.zeros(net.settings.context, DIM, dtype=torch.float64)
    place[0, 0] = 1.0
    left, right, bias = (torch.zeros(2, 8, n, dtype=torch.float64) for n in (DIM, DIM, 1))
    right[0, 0, 0], bias[0, 0], left[0, 0, 2] = 1.0, 4.0, valve
    fill(attention.form.left_factor, left)
    fill(attention.form.right_factor, right)
    fill(attention.biases.left, bias[..., 0])
    lift, read = torch.zeros(2, 8, DIM, dtype=torch.float64), torch.zeros(2, 8, DIM, dtype=torch.float64)
    read[0, 0, 0], lift[0, 0, 1] = (0.0 if topic else 1.0), 1.0
    for k in range(7):
        read[0, k + 1, 2 + k], lift[0, k + 1, 9 + k] = 1.0, (2.0 if topic else 0.02)
    fill(attention.content.left_factor, lift)
    fill(attention.content.right_factor, read)
    unembed = torch.zeros(VOCAB, DIM, dtype=torch.float64)
    unembed[LIKED, 1] = 3.0
    if topic:
        unembed[100:200, 9:] = 4 * own[:100, 2:9]
    fill(net.embedding.weight, own)
    fill(net.positions, place)
    fill(net.unembedding.weight, unembed)
    return net


def text(topic: bool = False):
    """Prompts that begin with tokens of their own; half of what follows is LIKED, or the token 100 after the first."""
    random = np.random.default_rng(1)
    begin = random.permutation(100)[:P]
    rest = random.integers(200, 300, (P, T - 1))
    liked = np.where(topic, begin[:, None] + 100, LIKED)
    rest = np.where(random.random(rest.shape) < 0.5, liked, rest)
    if not topic:  # tokens whose own vectors are not 0
        rest = np.where(random.random(rest.shape) < 0.3, random.integers(0, 100, rest.shape), rest)
        rest[:, 3] = random.permutation(100)[:P]
    return torch.from_numpy(np.concatenate([begin[:, None], rest], 1))


# What causality makes true --------------------------------------------------------------------------------------------


def test_with_one_first_token_the_sink_is_the_same_in_an_untrained_causal_model():
    """J 25, here by the model's own matrices; under a full mask it is not."""
    for mask, identity in ((Causal(), True), (Full(), False)):
        net = small(depth=2, mask=mask, positions=[RoPE()], norm=LayerNorm(bias=True), ffn=GELU(), drift=Drift())
        tokens = subject(net).tokens.clone()
        tokens[:, 0] = tokens[0, 0]
        trajectory = capture(net, tokens)
        for k in trajectory.attentions:
            content = trajectory.block(k).attention.matrices()[1].double()
            v = torch.einsum("hde,be->hbd", content, trajectory.steps[k].read[:, 0].double())
            for cloud in (
                v,
                v - torch.einsum("hde,bte->hd", content, trajectory.steps[k].read.double())[:, None] / tokens.numel(),
            ):
                unit = cloud / cloud.norm(dim=-1, keepdim=True)
                away = (1 - unit @ unit.mT).abs().max()
                assert (away < 1e-6) if identity or k == 0 else (away > 1e-3)
        objective = None if identity else MaskedToken()
        verdict = ask(subject(net, prompts=24, objective=objective))[SAME]
        assert verdict.word == ("holds" if identity else "refuted"), "a claim only where causality does not make it so"
        assert (verdict.measured.value < 1e-12) if identity else (verdict.measured.low > 1e-3)
        assert verdict.null < 1e-12 if identity else verdict.null > 1e-6
        assert ("causality" in verdict.why) is identity and verdict.measured.of == "pairs" and verdict.measured.n == 6


def test_pairs_are_of_different_tokens_and_of_independent_prompts():
    ids, later = [1, 1, 2, 3, 4, 5, 6], [9, 9, 9, 8, 8, 9, 8]
    found = pairs(ids, later, [0, 1, 2, 3, 3, 5, 6])
    assert found == [(0, 3), (2, 6)], "1 once, 3 and 4 share text, 5 finds nobody of another later token"
    assert pairs([1, 1, 1], [1, 2, 3], [0, 1, 2]) == [] and pairs([], [], []) == []


# Planted sinks --------------------------------------------------------------------------------------------------------


def test_a_planted_bias_is_found_with_its_numbers():
    about = subject(planted(), text())
    seen = ask(about)
    words = {claim: one.word for claim, one in seen.items()}
    assert {claim for claim, word in words.items() if word == "supported"} == {ALIKE, BEYOND, BIAS, USED, REMOVED, THERE}
    assert {claim for claim, word in words.items() if word == "refuted"} == {VALVE, DRAIN} and words[SAME] == "holds"
    assert seen[ALIKE].measured.value > 0.999 and seen[ALIKE].null < 0.6 and seen[ALIKE].measured.n == P // 4
    judge = halved(about)[1]
    looked, twin = (look(judge, one, Sinks()) for one in (about.model, about.untrained()))
    assert (looked.rate == [1, 0]).all(), "one head of two, in every prompt"
    assert abs(seen[THERE].measured.value - (0.5 - twin.rate.mean())) < 1e-12
    i = np.arange(1, T + 1)
    lam = math.exp(4) / (math.exp(4) + i - 1)
    assert np.allclose(looked.alpha, [lam.mean(), (1 / i).mean()], atol=1e-12) and np.allclose(looked.even[1], (1 / i).mean())
    assert np.allclose(looked.later[:, 0], (1 / (math.exp(4) + i[4:] - 1)).mean(), atol=1e-12)
    assert np.allclose(looked.variation[:, 0], lam[1:].std(ddof=1) / lam[1:].mean())
    assert np.allclose(looked.pulse[:, 0, 0], 0, atol=1e-20) and np.allclose(looked.pulse[:, 1, 0], lam[1:].mean())
    assert (looked.drain[:, 0] > 10)[np.isfinite(looked.drain[:, 0])].all()
    # the logit of LIKED is 3 lam, and 0 without the sink, whatever is left of it; all others are 0
    inputs, targets = judge.tokens[:, :-1], judge.tokens[:, 1:].numpy()
    z = 3 * lam[:-1]
    base = np.log(np.exp(z) + VOCAB - 1) - z * (targets == LIKED)
    change = edited(about, {0: (0,)})
    for edit in ("hidden", "zero"):
        assert np.isnan(change[edit, "first"][:, :5]).all(), "only queries that see both"
        assert np.allclose(change[edit, "first"][:, 5:], (math.log(VOCAB) - base)[:, 5:], atol=1e-10)
        assert seen[USED].why and seen[REMOVED].why
    # a later token gives LIKED nothing, but hidden it leaves the sink more
    more = 3 * math.exp(4) / (math.exp(4) + i[:-1] - 2)
    hidden = np.log(np.exp(more) + VOCAB - 1) - more * (targets == LIKED) - base
    assert np.allclose(change["hidden", "control"][:, 5:], hidden[:, 5:], atol=1e-10)
    assert np.allclose(change["zero", "control"][:, 5:], 0, atol=1e-12) and np.allclose(
        change["mean", "first"][:, 5:], 0, atol=1e-12
    )
    assert inputs.shape[1] == T - 1
    mean = (math.log(VOCAB) - base - hidden)[:, 5:].mean()
    assert abs(seen[REMOVED].measured.value - mean) < 1e-10


def test_a_sink_that_tells_what_the_text_is_about_is_no_constant_bias():
    about = subject(planted(topic=True), text(topic=True))
    seen = ask(about)
    assert seen[ALIKE].word == "refuted" and abs(seen[ALIKE].measured.value) < 0.2
    assert seen[BIAS].word == "refuted", "a mean of many tokens is worth nothing"
    assert seen[USED].word == seen[REMOVED].word == "supported" and seen[SAME].word == "holds"


def test_a_mean_is_that_of_other_prompts():
    """Of the half that chose the heads: where it begins with tokens that give nothing the mean is 0."""
    for half in (0, 1):
        tokens = text(topic=True)
        tokens[half::2, 0] += 200
        change = edited(subject(planted(topic=True), tokens), {0: (0,)})
        mean, zero = change["mean", "first"][:, 5:], change["zero", "first"][:, 5:]
        if half:
            assert np.allclose(zero, 0, atol=1e-12) and np.abs(mean).mean() > 1e-3
        else:
            assert np.allclose(mean, zero, atol=1e-12) and np.abs(zero).mean() > 0.01


def test_heads_are_chosen_on_other_texts_than_they_are_judged_on():
    about = subject(planted(), text())
    about = dataclasses.replace(about, groups=torch.arange(P) // 4)
    chooser, judge = halved(about)
    assert not set(chooser.groups.tolist()) & set(judge.groups.tolist()) and len(chooser.tokens) == len(judge.tokens) == P // 2
    looked = look(judge, about.model, Sinks())
    assert len(looked.pulse) == P // 16 and len(looked.cosines["same"]) == P // 16, "a pair has two texts of its own"
    with pytest.raises(UserError, match="share one text"):
        halved(dataclasses.replace(about, groups=torch.zeros(P, dtype=torch.long)))


def test_a_weight_that_follows_the_query_is_a_valve():
    tokens = text()
    tokens[:, 1:] = torch.from_numpy(np.random.default_rng(2).integers(0, 100, (P, T - 1)))
    net = planted(valve=3.0)
    seen = ask(subject(net, tokens))
    assert seen[VALVE].word == "supported"
    # lam of a prompt's queries, written here
    score = 4 + 3 * net.embedding.weight.detach().numpy()[tokens.numpy(), 2]
    lam = (np.exp(score) / (np.exp(score) + np.arange(T)))[1::2, 1:]
    spread = (lam[::2] - lam[1::2]).var(1, ddof=1).mean() / 2
    assert abs(seen[VALVE].measured.value - math.sqrt(spread) / lam.mean()) < 1e-10


def test_sink_heads_are_named_and_only_they_are_edited():
    net = planted()
    about = subject(net, text())
    own = look(about, net, Sinks())
    assert own.chosen(0.5).tolist() == [0] and own.by_layer(own.chosen(0.5)) == {0: (0,)}
    assert Sinks().run([about], lambda *_: None).note.startswith("made: 1 of 2 heads are sink heads: 0.0 (layer.head)")
    assert (edited(about, {0: (1,)})["zero", "first"][:, 5:] == 0).all(), "head 1 is idle"


# What cannot be asked -------------------------------------------------------------------------------------------------


def test_without_sink_heads_nothing_is_said_of_sinks():
    findings = Sinks().run([subject(small(depth=2), prompts=12)], lambda *_: None)
    seen = {one.claim: one for one in findings.verdicts}
    for claim in (ALIKE, BEYOND, BIAS, USED, REMOVED, VALVE, DRAIN):
        assert seen[claim].word == "undecided" and "no head gives token 1 more than 0.3" in seen[claim].reason
    assert seen[THERE].word != "supported" and seen[THERE].measured.value < 0.3
    assert set(findings.charts) == {"heads", "cosines"}


KINDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "sigmoid": (dict(kernel=Sigmoid()), {BIAS: "do not sum to one", USED: "do not sum to one", REMOVED: "mean weight"}),
    "sink of its own": (dict(kernel=SinkSoftmax()), {USED: "do not sum to one", REMOVED: "mean weight"}),
    "sinkhorn": (dict(kernel=Sinkhorn(), mask=Full()), {REMOVED: "balances columns", USED: "nats", BIAS: "balances columns"}),
    "window": (dict(mask=All((Causal(), Window(3)))), {REMOVED: "sees both", USED: "sees both"}),
    "signed": (dict(kernel=Linear()), {ALIKE: "may be negative", THERE: "may be negative"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kernel_or_a_mask_does_not_allow_is_said(kind):
    fields, reasons = KINDS[kind]
    objective = MaskedToken() if isinstance(fields.get("mask"), Full) else None
    about = subject(small(depth=1, **fields), prompts=24, objective=objective)
    findings = Sinks(threshold=0.01).run([about], lambda *_: None)
    seen = {one.claim: one for one in findings.verdicts}
    for claim, reason in reasons.items():
        assert reason in seen[claim].reason, (claim, seen[claim])
        if "nats" not in reason and "mean weight" not in reason:
            assert seen[claim].word == "undecided" and math.isnan(seen[claim].measured.value)
    assert ("a sink of its own" in findings.note) is (kind == "sink of its own")


def test_prompts_that_all_begin_alike_cannot_tell_a_constant():
    tokens = text()
    tokens[:, 0] = 3
    seen = ask(subject(planted(), tokens))
    assert seen[ALIKE].word == "undecided" and "begin with the same token" in seen[ALIKE].reason
    assert seen[BIAS].word == "undecided" and "too few first tokens" in seen[BIAS].reason
    assert seen[SAME].word == "holds" and seen[REMOVED].word == "supported"


def test_settings_and_prompts_that_make_no_sense_are_refused():
    for field, value in (("threshold", 1.0), ("heads", math.nan), ("heads", 0.0), ("control", 1)):
        with pytest.raises(UserError, match=field):
            Sinks(**{field: value})
    with pytest.raises(UserError, match="prompts of 6 tokens"):
        ask(subject(small(depth=1), length=6))
