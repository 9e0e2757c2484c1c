"""Who may be trained for what: the guard against the leak, and the statistics of masking."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import settings

from emformer.masks import All, Causal, Full, Window
from emformer.model import Emformer
from emformer.parts import UserError
from emformer.training import Learner, MaskedToken, NextToken
from emformer.training.objectives import IGNORE

LEGAL = [Causal(), Window(1), All([Causal(), Window(4)]), All([Window(4), Causal()]), All([Full(), Causal()])]
LEAKS = [Full(), Window(2), Window(4), All([Full(), Window(3)])]


@pytest.mark.parametrize("mask", LEGAL, ids=repr)
def test_next_token_takes_causal_masks(mask):
    NextToken().check([mask, Causal()])


@pytest.mark.parametrize("mask", LEAKS, ids=repr)
@pytest.mark.parametrize("layer", [0, 2])
def test_next_token_refuses_masks_that_leak(mask, layer: int):
    masks = [Causal()] * 3
    masks[layer] = mask
    with pytest.raises(UserError, match=rf"{type(mask).__name__} in layer {layer}\b.*Causal.*MaskedToken"):
        NextToken().check(masks)
    MaskedToken().check(masks)


def test_the_guard_sees_what_the_mask_shows():
    """`causal` is not a word of honour: no mask that calls itself causal shows a later token, every leak shows one."""
    import torch

    i = torch.arange(9)
    later = i[None, :] > i[:, None]
    for mask in LEGAL + LEAKS:
        shown = mask.visible(i[:, None], i[None, :])
        assert bool((shown & later).any()) is not mask.causal, mask


@pytest.mark.parametrize("where", ["model", "layer"])
def test_no_learner_comes_from_a_model_that_leaks(tmp_path: Path, where: str):
    overrides = {"mask": Full()} if where == "model" else {"layers": {1: {"mask": Full()}}}
    plan = settings(tmp_path, model={"depth": 2} | overrides)
    model = Emformer(300, **vars(plan.model))
    with pytest.raises(UserError, match=f"layer {0 if where == 'model' else 1}"):
        Learner(model, plan, "{}", 1.0)
    Learner(model, replace(plan, training=replace(plan.training, objective=MaskedToken())), "{}", 1.0)


def test_next_token_is_the_next_token():
    windows = np.arange(24).reshape(3, 8)
    inputs, targets = NextToken().cut(windows, np.random.default_rng(0), 24)
    assert np.array_equal(inputs, windows[:, :-1]) and np.array_equal(targets, windows[:, 1:])


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_masking_has_the_shares_it_says(share: float):
    vocab, shape = 1000, (400, 501)
    rng = np.random.default_rng(3)
    windows = rng.integers(0, vocab, shape)
    before = windows.copy()
    inputs, targets = MaskedToken(share).cut(windows, rng, vocab)
    assert np.array_equal(windows, before)  # they may be a view of the corpus
    tokens = windows[:, :-1]
    assert inputs.shape == targets.shape == tokens.shape
    chosen = targets != IGNORE
    assert np.array_equal(targets[chosen], tokens[chosen])
    assert np.array_equal(inputs[~chosen], tokens[~chosen])

    def near(count: float, of: int, expected: float) -> None:
        assert abs(count / of - expected) < 4 * math.sqrt(expected * (1 - expected) / of), (count / of, expected)

    many = int(chosen.sum())
    near(many, chosen.size, share)
    shown = inputs[chosen]
    near((shown == vocab).sum(), many, 0.8)
    # a random token is the token itself once in `vocab` times
    near(((shown != vocab) & (shown != tokens[chosen])).sum(), many, 0.1 * (1 - 1 / vocab))
    near((shown == tokens[chosen]).sum(), many, 0.1 + 0.1 / vocab)
    assert inputs.max() == vocab and inputs.min() >= 0
    replaced = shown[(shown != vocab) & (shown != tokens[chosen])]
    near((replaced < vocab // 2).sum(), len(replaced), 0.5)
    # all places are equally likely, the first too, though it is what a window without any falls back to
    near(chosen[:, 0].sum(), len(chosen), share)


def test_a_tokenizer_with_a_mask_token_of_its_own():
    """It is shown instead of an id beyond the vocabulary, at the same places."""
    windows = np.random.default_rng(0).integers(0, 50, (40, 33))
    (beyond, targets), (own, same) = (MaskedToken(0.3, token).cut(windows, np.random.default_rng(1), 50) for token in (None, 7))
    assert np.array_equal(targets, same) and np.array_equal(own, np.where(beyond == 50, 7, beyond)) and (beyond == 50).any()
    assert MaskedToken(mask_token=7).extra_tokens == 0
    with pytest.raises(UserError, match="mask_token is -1"):
        MaskedToken(mask_token=-1)


@pytest.mark.parametrize("share", [1e-6, 0.15])
def test_every_window_has_a_target(share: float):
    windows = np.random.default_rng(0).integers(0, 50, (500, 9))
    _, targets = MaskedToken(share).cut(windows, np.random.default_rng(1), 50)
    counts = (targets != IGNORE).sum(1)
    assert counts.min() >= 1
    if share < 1e-3:
        assert counts.max() == 1


def test_masking_is_a_function_of_its_generator():
    windows = np.random.default_rng(0).integers(0, 50, (4, 33))
    one, two, other = (MaskedToken().cut(windows, np.random.default_rng(k), 50) for k in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_share_out_of_range_is_refused(share: float):
    with pytest.raises(UserError, match="share"):
        MaskedToken(share)


def test_what_objectives_say_of_themselves():
    assert (NextToken().extra_tokens, MaskedToken().extra_tokens) == (0, 1)
    assert NextToken().covers_text and not MaskedToken().covers_text
    assert "masked" in MaskedToken().unit and "masked" not in NextToken().unit
