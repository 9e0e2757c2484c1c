"""Study "breathing": a planted sawtooth is supported, its opposite refuted, and controls are what they say."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from studied import small, subject
from torch import Tensor, nn

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.geometry.breathing import AGREEMENT, Change
from emformer.geometry.neighbours import nearest
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.placements import PostNorm, SandwichNorm, Sphere
from emformer.studies.claims.breathing import (
    Measured,
    Sawtooth,
    Signs,
    _balance,
    _measure,
    _signs,
    _verdicts,
    _views,
    flow,
    instead,
    noise,
)
from emformer.studies.subjects import Subject
from emformer.verdicts import Findings

N, D, K = 128, 16, 4


class Map(nn.Module):
    """A linear FFN."""

    scales: Tensor

    def __init__(self, scales: list[float]):
        super().__init__()
        self.register_buffer("scales", torch.tensor(scales))

    def forward(self, y: Tensor) -> Tensor:
        return y * self.scales


def prompts(repeated: int = 0, seed: int = 0) -> Tensor:
    """Random prompts that end in different words, but for the first few, which end in the same."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(300, (N, 4), generator=random)
    tokens[:, -1] = torch.randperm(300, generator=random)[:N]
    tokens[:repeated, -1] = tokens[0, -1]
    return tokens


@torch.no_grad()
def planted(fed: list[float], content: float = 1.0, depth: int = 2, tiny: float = 0.0) -> Emformer:
    """Words of K dimensions (K more of size `tiny`). Attention adds the mean of words seen in K others; the FFN is diagonal."""
    net = small(dim=D, depth=depth, heads=1, norm=None, form=Dense(), content=Dense(), ffn=GELU())
    net.embedding.weight[:, K : 2 * K] *= tiny
    net.embedding.weight[:, 2 * K :] = 0
    for layer in range(depth):
        block = net.layer(layer)
        form, rows = block.attention.form.left_rows(), block.attention.content.left_rows()
        form.zero_()
        rows.zero_()
        for k in range(K):
            rows[0, k, 2 * K + k] = content
        block.ffn = Map(fed)
    return net


def study(*subjects: Subject) -> Findings:
    return Sawtooth(resamples=200).run(subjects, lambda share, word: None)


KEEP, DROP = [0.0] * K, [-1.0] * K


@functools.cache
def breathes() -> Findings:
    return study(subject(planted(KEEP + KEEP + DROP + DROP), prompts()))


def test_a_planted_sawtooth_is_supported():
    found = breathes()
    strict, balance, amplitude, different, training, *_ = found.verdicts
    assert strict.word == "supported" and strict.measured[:3] == (1.0, 1.0, 1.0) and strict.measured.of == "prompts"
    assert balance.word == "undecided" and balance.measured[:3] == (1.0, 1.0, 1.0), "two blocks are no more than two tosses"
    assert "too few models: 1" in balance.reason and "sign flips of blocks: p = 0.5" in balance.why
    assert amplitude.word == "supported" and amplitude.measured.value == pytest.approx(math.log(2), abs=0.35)
    assert different.measured[:3] == pytest.approx(amplitude.measured[:3]), "all words are different here"
    assert training.word == "supported" and "one draw of untrained weights" in training.why
    change = found.charts["change"].frame
    attention = change[(change["panel"] == "attention") & (change["line"] == "trained")]["y"]
    assert attention.tolist() == pytest.approx([math.log(2)] * 2, abs=0.4)
    # here attention is uniform already
    same = change[(change["panel"] == "attention") & (change["line"] == "uniform attention")]["y"]
    assert same.tolist() == pytest.approx(attention.tolist(), abs=1e-4)


def test_isotropic_noise_raises_more_than_attention_that_adds_four_dimensions():
    noisy, random, added, fed = breathes().verdicts[-4:]
    assert noisy.word != "supported" and random.word == "supported"
    assert noisy.measured.value < 0.1 and random.measured.value < -0.5
    assert abs(added.measured.value) < 0.4, "means of words have as many dimensions as words"
    assert fed.measured.n == N


def test_an_ffn_that_adds_dimensions_refutes_it():
    """Attention does nothing; what the FFN makes visible were dimensions too small to be seen."""
    net = planted(KEEP + [999.0] * K + KEEP + KEEP, content=0.0, tiny=1e-3, depth=1)
    strict, _, amplitude, *_ = study(subject(net, prompts())).verdicts
    assert strict.word == "refuted" and strict.measured[:3] == (0.0, 0.0, 0.0)
    assert amplitude.word == "refuted"


def test_repeated_words_are_left_out_and_told():
    net = planted(KEEP + KEEP + DROP + DROP, depth=1)
    found = study(subject(net, prompts(repeated=100)))
    strict, _, amplitude, different, *_ = found.verdicts
    for layer in (0, 1):
        assert f"layer {layer} of made: 77% of the points repeat another" in strict.why
        assert f"layer {layer} of made: 77% of the points repeat another." in found.note
    assert "layer 0.5 " not in strict.why
    assert all(math.isnan(one.measured.value) for one in (strict, amplitude)) and strict.reason == strict.why
    assert different.measured.n == N - 99 and different.word == "supported"
    dims = found.charts["dimension"].frame
    assert dims[(dims["x"] == 0)]["y"].isna().all() and dims[dims["x"] == 0.5]["y"].notna().all()


@functools.cache
def measured() -> Measured:
    """One block that breathes."""
    return _measure(subject(planted(KEEP + KEEP + DROP + DROP, depth=1), prompts()[:80]), 100, lambda share, word: None)


def test_six_models_are_the_units():
    one = measured()
    strict, balance, amplitude, _, training, *_ = _verdicts([one] * 6, 0)
    assert strict.word == balance.word == amplitude.word == "supported"
    assert all(found.measured[3:] == (6, "models") for found in (strict, balance, amplitude))
    assert f"p = {2 * 0.5**6:.2g}" in balance.why and "draw" not in training.why


def test_prompts_that_several_models_saw_are_no_new_prompts():
    (_, _, few, *_), (_, _, alone, *_) = _verdicts([measured()] * 4, 0), _verdicts([measured()], 0)
    assert few.measured[:3] == pytest.approx(alone.measured[:3]) and few.measured[3:] == alone.measured[3:]


@pytest.mark.parametrize("blocks", [8, 300])
def test_a_clear_sawtooth_is_beyond_doubt_however_many_blocks_there_are(blocks: int):
    """A change of 8 standard errors is one among 600 signs too; one of 2.5 is not."""

    def signs(size: float) -> Signs:
        value, p = torch.full((blocks,), size, dtype=torch.float64), torch.full((blocks,), 1 / 101, dtype=torch.float64)
        up = Change(value, torch.ones_like(value), value - 2, value + 2, p, p, p, p)
        down = up._replace(value=-value, low=-value - 2, high=2 - value)
        others = torch.stack([value, value])
        return _signs(measured()._replace(n=200, changes=(up, down), others=(others, -others)), 2 * blocks)

    assert signs(8.0).fraction.tolist() == [1.0, 1.0, 1.0]
    assert signs(2.5).fraction.tolist() == [1.0, 0.0, 1.0]
    assert (-signs(8.0).agreed).tolist() == signs(-8.0).agreed.tolist() and signs(-8.0).fraction.tolist() == [0.0, 0.0, 0.0]


def signs(scores: list[float]) -> Signs:
    agreed = np.array([scores, [-one for one in scores]])
    return Signs(np.ones(len(scores), dtype=bool), agreed, agreed)


def test_flips_decide_for_the_blocks_of_a_model():
    up, p = _balance([signs([1.0] * 6)], 0)
    assert up == (1.0, 1.0, 1.0, 6, "blocks") and "p = 0.031" in p
    few, p = _balance([signs([1.0] * 5)] * 5, 0)
    assert few[:3] == (1.0, 1.0, 1.0) and not few.enough and "p = 0.062" in p, "models share their depth"
    mixed, p = _balance([signs([1.0, 0, 1, 0, 1, 1, 0, 1])], 0)
    assert mixed.low > 0 and not mixed.enough and "p = 0.062" in p, "an interval over blocks alone would have decided"
    assert _balance([signs([-1.0] * 7)], 0)[0][1:] == (-1.0, -1.0, 7, "blocks")


def test_clouds_without_any_order_are_balanced():
    """Three exchangeable numbers rise and fall as often as they fall and rise, 1/3 each; and seldom is anything decided."""
    random = np.random.default_rng(0)
    dims = random.normal(size=(40, 12, 3))
    lots = [Signs(np.ones(12, dtype=bool), (steps := np.sign(np.diff(one).T)), steps) for one in dims]
    assert np.mean([one.fraction[0] for one in lots]) == pytest.approx(1 / 3, abs=0.08)
    found = [_balance([one], 0)[0] for one in lots]
    assert np.mean([one.value for one in found]) == pytest.approx(0, abs=0.13)
    assert np.mean([one.enough and (one.low > 0 or one.high < 0) for one in found]) < 0.12


def test_without_an_ffn_there_is_nothing_to_say():
    with pytest.raises(UserError, match="made has no FFN"):
        study(subject(small(depth=1)))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"epsilon": 0.5}, id="prenorm"),
        pytest.param({"placement": PostNorm(), "norm": RMSNorm()}, id="postnorm"),
        pytest.param({"placement": SandwichNorm(), "norm": RMSNorm()}, id="sandwich"),
        pytest.param({"placement": Sphere()}, id="sphere"),
        pytest.param({"arrangement": Parallel()}, id="parallel"),
        pytest.param({"shared": True}, id="shared"),
    ],
)
def test_the_true_update_in_place_of_itself_changes_nothing(fields):
    net = small(ffn=GELU(), **fields)
    found = flow(subject(net), net)
    assert [block.layer for block in found.blocks] == [0, 1] and len(found.depths) == len(found.read)
    for block in found.blocks:
        for point in ("attn", "ffn"):
            after = found.raw[getattr(block, point)[1]]
            update = found.updates[block.layer, point]
            torch.testing.assert_close(instead(found, block, point, update), after)
            other = noise(update, 3, point)
            torch.testing.assert_close(other.norm(dim=-1), update.norm(dim=-1))
            assert torch.equal(other, noise(update, 3, point)) and not torch.equal(other, noise(update, 4, point))
            assert (instead(found, block, point, other) - after).norm() > 0.1


def test_the_views_are_the_scales_of_both_clouds():
    cloud = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    near = {("raw", 0): nearest(cloud, 64), ("raw", 1): nearest(2 * cloud, 64)}
    found = _views(near, list(near.values()), [(0, 1)])
    assert found.shape == (2 * len(AGREEMENT) + 1, 1) and found.abs().max() < 1e-9
