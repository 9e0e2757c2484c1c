"""Study "breathing": a planted sawtooth is supported, its opposite refuted, and controls are what they say."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from studied import small, subject
from torch import Tensor, nn

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.geometry.breathing import AGREEMENT
from emformer.geometry.neighbours import nearest
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.placements import PostNorm, SandwichNorm, Sphere
from emformer.studies.claims.breathing import Sawtooth, _measure, _verdicts, _views, flips, flow, instead, noise
from emformer.studies.subjects import Subject
from emformer.verdicts import Findings

N, D, K = 160, 16, 4


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
    strict, usual, amplitude, different, training, *_ = found.verdicts
    assert strict.word == "supported" and strict.measured[:3] == (1.0, 1.0, 1.0) and strict.measured.of == "prompts"
    assert usual.word == "undecided" and usual.measured.n == 2 and "p = 0.25" in usual.why and usual.null == 0.25
    assert amplitude.word == "supported" and amplitude.measured.value == pytest.approx(math.log(2), abs=0.35)
    assert different.measured[:3] == pytest.approx(amplitude.measured[:3]), "all words are different here"
    assert training.word == "supported"
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
        assert f"layer {layer} of made: 62% of the points repeat another" in strict.why
        assert f"layer {layer} of made: 62% of the points repeat another." in found.note
    assert "layer 0.5 " not in strict.why
    assert all(math.isnan(one.measured.value) for one in (strict, amplitude)) and strict.reason == strict.why
    assert different.measured.n == N - 99 and different.word == "supported"
    dims = found.charts["dimension"].frame
    assert dims[(dims["x"] == 0)]["y"].isna().all() and dims[dims["x"] == 0.5]["y"].notna().all()


def test_six_models_are_the_units():
    one = _measure(subject(planted(KEEP + KEEP + DROP + DROP, depth=1), prompts()[:80]), 200, lambda share, word: None)
    strict, usual, amplitude, *_ = _verdicts([one] * 6, 0)
    assert strict.measured.of == "prompts" and strict.measured.low <= strict.measured.value
    assert (usual.measured.n, usual.measured.of) == (6, "models") == (amplitude.measured.n, amplitude.measured.of)
    assert amplitude.word == "supported" and f"{0.5**6:.2g}" in usual.why
    (_, _, few, *_), (_, _, alone, *_) = _verdicts([one] * 4, 0), _verdicts([one], 0)
    assert few.measured.of == "prompts" and few.measured.value == pytest.approx(alone.measured.value)
    width, usual_width = (one.measured.high - one.measured.low for one in (few, alone))
    assert width == pytest.approx(usual_width / 2), "four independent models"


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


def test_sign_flips_are_exact():
    assert flips(np.array([1.0, 1.0, 1.0]), 0) == 1 / 8
    assert flips(np.array([1.0, -1.0]), 0) == 3 / 4
    assert flips(np.zeros(2), 0) == 1.0
    assert math.isnan(flips(np.array([]), 0))
    many = np.r_[np.ones(9), -np.ones(7)]  # binomial, at most 7 tails of 16
    chance: Callable[[int], int] = lambda k: math.comb(16, k)  # noqa: E731
    exact = sum(map(chance, range(8))) / 2**16
    assert flips(many, 0) == pytest.approx(exact, abs=4 * math.sqrt(exact / 4096))


def test_the_views_are_the_scales_of_both_clouds():
    cloud = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    near = {("raw", 0): nearest(cloud, 64), ("raw", 1): nearest(2 * cloud, 64)}
    found = _views(near, list(near.values()), [(0, 1)])
    assert found.shape == (2 * len(AGREEMENT) + 1, 1) and found.abs().max() < 1e-9
