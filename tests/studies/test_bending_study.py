"""Study "bending": edits are of the kinds they say, and what they do in a linear model is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from studied import small, subject
from torch import Tensor

from emformer.masks import All, Causal, Full, Window
from emformer.model import Emformer
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.studies.claims.bending import Bending, _angle, bend, edits, is_causal, log_ratio, permuted
from emformer.studies.subjects import Subject
from emformer.training import MaskedToken
from emformer.trajectory import capture

WORDS, CLASSES, P, T = 40, 4, 24, 12


def prompts(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random words, some more frequent than others; their class is the word modulo 4, their other class that halved."""
    random = np.random.default_rng(seed)
    tokens = torch.from_numpy(np.minimum(random.geometric(0.06, (P, T)) - 1, WORDS - 1))
    return tokens, torch.stack([tokens % CLASSES, tokens % CLASSES // 2])


@torch.no_grad()
def linear(spread: float) -> Emformer:
    """x_i + mean_j<=i x_j, with words that stand `spread` around the vector of their class."""
    net = small(dim=16, depth=1, heads=1, norm=None, form=Dense(), content=Dense())
    attention = net.layer(0).attention
    attention.form.left_rows().zero_()
    attention.content.left_rows().copy_(torch.eye(16)[None])
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 16, generator=random)
    net.embedding.weight[:WORDS] = centres[torch.arange(WORDS) % CLASSES] + spread * torch.randn(WORDS, 16, generator=random)
    return net


def test_in_a_linear_model_deflections_are_as_large_as_edits():
    tokens, labels = prompts()
    net = linear(0.2)
    one = subject(net, tokens, labels)
    made = edits(one, 8)
    weight = net.embedding.weight.detach()
    plain = weight[tokens[made.prompts, made.places]]
    sizes = {kind: (weight[made.words[kind]] - plain).norm(dim=-1) for kind in ("near", "far")}
    expected = (sizes["far"] / sizes["near"]).log()
    found = Bending().run([one], lambda share, word: None)
    raw, gain, turned, trained, causal = found.verdicts
    assert raw.measured.value == pytest.approx(float(expected.mean()), abs=1e-4) and raw.word == "supported"
    assert raw.measured.n == len(made.prompts) > P // 2
    assert f"the edit itself has log(far/near) {raw.measured.value:+.3g}" in raw.why and "p = 0.00024" in raw.why
    assert gain.measured.value == pytest.approx(0, abs=1e-4), "nothing but size"
    assert turned.word == "supported" and trained.word == "supported" and "one draw of untrained weights" in trained.why
    assert causal.word == "holds" and causal.measured[:3] == (0.0, 0.0, 0.0)
    near = bend(net, tokens, made, "near", True)
    states = capture(net, tokens[made.prompts]).clouds
    for k, (place, size) in enumerate(zip(made.places, sizes["near"], strict=True)):
        later = torch.arange(place + 1, T)
        whole = states[1][k, later].norm(dim=-1)
        exact = size / (later + 1) / whole
        assert near.later[k, 1] == pytest.approx(float(exact.mean()), rel=1e-3)
        assert near.reach[k, 1 : T - place] == pytest.approx(exact.numpy(), rel=1e-3)
        assert np.isnan(near.reach[k, 0]) and np.isnan(near.reach[k, T - place :]).all()
        assert near.edited[k, 0] == pytest.approx(float(size / states[0][k, place].norm()), rel=1e-4)
    assert (near.later[:, 0] == 0).all()


def test_edits_are_minimal_pairs_of_like_frequency():
    tokens, labels = prompts()
    labels[:, 3] = -1
    one = subject(linear(0.2), tokens, labels)
    state = str(np.random.get_state())
    made = edits(one, 1)
    again = edits(one, 1)
    assert str(np.random.get_state()) == state
    assert made.labelled and all(np.array_equal(made.words[kind], again.words[kind]) for kind in made.words)
    assert 3 not in made.prompts and ((made.places >= T // 4) & (made.places < T // 2)).all()
    old = tokens[made.prompts, made.places].numpy()
    near, far = made.words["near"], made.words["far"]
    assert (near != old).all() and (near % CLASSES == old % CLASSES).all()
    assert (far % CLASSES // 2 != old % CLASSES // 2).all(), "of another class in every classification"
    counts = np.bincount(tokens.flatten(), minlength=WORDS)
    for word, same, other in zip(old, near, far, strict=True):
        pool = [w for w in range(WORDS) if counts[w] and w != word and w % CLASSES == word % CLASSES]
        assert abs(math.log(counts[same] / counts[word])) == min(abs(math.log(counts[w] / counts[word])) for w in pool)
        pool = [w for w in range(WORDS) if counts[w] and w % CLASSES // 2 != word % CLASSES // 2]
        assert abs(math.log(counts[other] / counts[same])) == min(abs(math.log(counts[w] / counts[same])) for w in pool)


def test_without_classes_they_are_near_and_far_by_embedding():
    tokens, _ = prompts()
    net = linear(0.2)
    one = subject(net, tokens)
    made = edits(one, 8)
    assert not made.labelled and len(made.prompts) == P
    there = tokens.unique()
    vectors = net.embedding.weight.detach().double()
    vectors = vectors - vectors[there].mean(0)
    old = tokens[made.prompts, made.places]
    for word, near, far in zip(old, made.words["near"], made.words["far"], strict=True):
        cosine = torch.nn.functional.cosine_similarity(vectors[there], vectors[word][None], dim=-1)
        others = there != word
        assert near == there[others][cosine[others].argmax()] and far == there[others][cosine[others].argmin()]
    verdicts = Bending().run([one], lambda share, word: None).verdicts
    assert "size would" in verdicts[0].claim and "by construction" in verdicts[1].why


def test_what_is_not_causal_moves_on_both_sides():
    tokens, labels = prompts()
    near = All((Causal(), Window(3)))
    assert is_causal(small(mask=near)) and not is_causal(small(mask=Window(3)))
    both = small(mask=Full())
    one = subject(both, tokens, labels, objective=MaskedToken())
    found = Bending().run([one], lambda share, word: None)
    assert not any("causal" in verdict.claim for verdict in found.verdicts) and "Not every mask is causal" in found.note
    made = edits(one, 8)
    assert (bend(both, tokens, made, "far", False).before > 0).all()
    assert (bend(small(mask=near), tokens, made, "far", True).before == 0).all()
    # a window of three in two layers does not reach the end
    far = bend(small(mask=near), tokens, made, "far", True).reach
    assert (far[:, 1:5] > 0).all() and (far[:, 5:][np.isfinite(far[:, 5:])] == 0).all()


def test_no_word_to_change_is_said():
    tokens, labels = prompts()
    found = Bending().run([subject(linear(0.2), tokens, torch.full_like(labels, -1))], lambda share, word: None)
    assert all(verdict.word == "undecided" and "no prompt has a word" in verdict.reason for verdict in found.verdicts)
    with pytest.raises(UserError, match="choices is 0"):
        Bending(choices=0)


def test_permutations_ratios_and_angles():
    groups = [np.array([0, 0, 1, 2])]
    assert permuted([np.array([1.0, 1.0, 2.0, 3.0])], groups, 0) == 1 / 8
    assert permuted([np.array([1.0, 1.0, 2.0, 3.0])] * 5, groups * 5, 0) == 1 / 8, "the same prompts are no new ones"
    assert permuted([np.array([1.0, -2.0, 2.0, 3.0])] * 6, groups * 6, 0) == 1 / 64, "models are the units"
    assert permuted([np.array([1.0, -1.0, math.nan, 0.0])], groups, 0) == 1.0
    assert math.isnan(permuted([np.full(4, math.nan)], groups, 0))
    found = log_ratio(np.array([2.0, 0.0, 1.0]), np.array([1.0, 1.0, math.nan]))
    assert found[0] == math.log(2) and np.isnan(found[1:]).all()
    a, b = torch.tensor([[1.0, 0], [2.0, 0], [1, 1], [0, 0]]), torch.tensor([[0, 3.0], [-1.0, 0], [1, 1], [1, 0]])
    angle = _angle(a, b)
    assert angle[:3].tolist() == pytest.approx([math.pi / 2, math.pi, 0.0]) and angle[2] == 0 and angle[3].isnan()


def test_a_subject_keeps_its_tokens():
    tokens, labels = prompts()
    one: Subject = subject(linear(0.2), tokens.clone(), labels)
    bend(one.model, one.tokens, edits(one, 8), "far", True)
    assert torch.equal(one.tokens, tokens)
