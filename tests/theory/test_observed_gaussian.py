"""Family "gaussian": the closure written out with its moments, the limits in which it is exact, and those in which it fails."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from builders import model, only, told, words
from torch import Tensor

from emformer import theory
from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.geometry.closure import covariance_change, explained, tilted
from emformer.kernels import L2, Linear, Sigmoid, Sinkhorn, SinkSoftmax, Softmax
from emformer.masks import All, Causal, Full, Window
from emformer.norms import LayerNorm, RMSNorm
from emformer.observables import Row
from emformer.observables.energy import Energy
from emformer.observables.gaussian import Gaussian, _mean_field, closure
from emformer.operators import LowRank
from emformer.parts import UserError
from emformer.placements import SandwichNorm, Sphere
from emformer.positions import RoPE
from emformer.settings import Drift, Functional
from emformer.trajectory import Trajectory, capture

D = 6


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def step(x: Tensor, form: Tensor, content: Tensor, size: float = 1.0, **parts: Any) -> Trajectory:
    """One Euler step of attention in R^d without a norm."""
    net = theory.idealised(x.shape[-1], form, content, space="flat", **parts)
    return theory.simulate(net, x, [0.0, size], step=size, method="euler")


def test_weights_are_the_closure_with_moments_of_what_each_query_sees(seed):
    """F (alpha_i + beta Sigma_i r_i) + g by loops, 1e-12: masks, biases, groups of heads, norms, beta."""
    for mask in (Causal(), Full(), All((Causal(), Window(size=3)))):
        for given in ({"functional": Functional(), "drift": Drift(), "norm": LayerNorm(bias=True)}, {"norm": None}):
            form = LowRank(rank=3, groups=2)
            net = model(mask=mask, heads=4, form=form, content=form, kernel=Softmax(beta=0.7), depth=1, **given)
            seen = capture(net, words(7))
            attention, y = net.layer(0).attention, seen.steps[0].read
            forms, contents = attention.matrices()
            u = attention.functional()
            u = torch.zeros(4, 8).double() if u is None else u
            found = closure(seen, 0)
            assert found is not None
            expected = torch.zeros_like(y)
            for b in range(2):
                for i in range(7):
                    some = y[b, seen.visible(0)[i]]
                    alpha = some.mean(0)
                    sigma = (some - alpha).T @ (some - alpha) / len(some)
                    for h in range(4):
                        r = forms[h].T @ y[b, i] + u[h]
                        expected[b, i] += contents[h] @ (alpha + 0.7 * sigma @ r)
                        assert float(found.regime[b, h, i]) == pytest.approx(0.49 * (r @ sigma @ r).item(), abs=1e-12)
            if attention.drift is not None:
                expected += attention.drift
            assert (attention.lift(found.mixture) - expected).abs().max() < 1e-12


def test_under_positions_it_is_the_covariance_with_the_score(seed):
    """Stein's lemma asks for no linear score: beta Cov_j(s_ij, y_j)."""
    seen = capture(model(positions=[RoPE()], functional=Functional(), depth=1), words(7))
    found, y, s = closure(seen, 0), seen.steps[0].read, seen.scores(0)
    attention = seen.block(0).attention
    for i in range(7):
        some, of = y[:, : i + 1], s[:, :, i, : i + 1]
        mean = some.mean(1)
        covariance = torch.einsum("bhj,bjd->bhd", of - of.mean(-1, keepdim=True), some - mean.unsqueeze(1)) / (i + 1)
        expected = attention.content.project((mean.unsqueeze(1) + covariance).unsqueeze(2))[:, :, 0]
        assert (found.mixture[:, :, i] - expected).abs().max() < 1e-12


def test_covariance_of_the_prediction_is_the_discrete_law(seed):
    """Full mask: (I + eps F Sigma M^T) Sigma (I + eps F Sigma M^T)^T, and the row is its distance to what was measured."""
    x, form, content = normal(1, 40, D), 0.5 * normal(D, D), normal(D, D)
    seen = step(x, form, content, 0.3)
    row = only(told(Gaussian(skip=0), seen), "gauss.cov_error")

    def covariance(x: Tensor) -> Tensor:
        return torch.cov(x[0].T, correction=0)

    sigma, after = covariance(x), covariance(seen.clouds[1])
    law = torch.eye(D).double() + 0.3 * content @ sigma @ form.T
    expected = (law @ sigma @ law.T - after).norm() / (after - sigma).norm()
    assert row.mean == pytest.approx(float(expected), rel=1e-10) and row.null == 1


def test_exact_for_weak_scores_and_many_gaussian_tokens():
    """1 - R^2 falls as the square of the scores' size; at order one, with the number of tokens of a Gaussian cloud."""
    torch.manual_seed(0)
    form, content = normal(D, D) / D, normal(D, D)
    x = normal(4, 64, D)
    weak = [rows(step(x, form * scale, content)) for scale in (0.2, 0.1, 0.05)]
    for one, two in pairwise(weak):
        assert (1 - one[0]) / (1 - two[0]) == pytest.approx(4, rel=0.3)
        assert one[1] / two[1] == pytest.approx(2, rel=0.3)
    assert weak[-1][0] > 0.999 and weak[-1][1] < 0.05
    many = [rows(step(normal(prompts, count, D), form / 2, content)) for prompts, count in ((64, 64), (16, 512), (2, 2048))]
    assert many[0][0] < many[1][0] < many[2][0] and many[2][0] > 0.99
    assert many[0][1] > many[1][1] > many[2][1] and many[2][1] < 0.02
    ratio = (1 - many[0][0]) / (1 - many[1][0])
    assert ratio == pytest.approx(8, rel=0.4), "squared error is 1/N"
    # corners of a cube have the same moments and do not converge: the closure is not right for every cloud
    corners = (torch.randint(2, (2, 2048, D)) * 2 - 1).double()
    cube, ball = rows(step(corners, form, content)), rows(step(normal(2, 2048, D), form, content))
    assert cube[1] > 3 * ball[1] and cube[1] > 0.15


def rows(seen: Trajectory, **settings: int) -> tuple[float, float]:
    found = told(Gaussian(**settings), seen)
    return only(found, "gauss.r2").mean, only(found, "gauss.cov_error").mean  # type: ignore[return-value]


def test_sharp_attention_is_not_gaussian():
    """Below zero, and said so by the regime; uniform attention beside it stays at its null."""
    torch.manual_seed(0)
    seen = step(normal(3, 64, D), torch.eye(D).double(), torch.eye(D).double(), kernel=Softmax(beta=6.0))
    found = told(Gaussian(), seen)
    assert only(found, "gauss.r2").mean < -5 and only(found, "gauss.r2", head=0).mean < -5
    assert only(found, "gauss.regime").mean > 50
    even = only(found, "gauss.r2", param="mean")
    assert -0.2 < even.mean <= 0 == even.null, "a constant, and not the best one"
    weak = told(Gaussian(), step(normal(3, 64, D), 0.1 * torch.eye(D).double(), torch.eye(D).double()))
    assert only(weak, "gauss.r2", param="mean").mean <= 0 < 0.9 < only(weak, "gauss.r2").mean


def test_the_regime_is_the_effective_number_of_tokens(seed):
    """ESS = n e^-regime in a large Gaussian cloud (math E.6)."""
    x = normal(1, 20000, D)
    s = (x[:, :32] @ x.mT * 0.3).unsqueeze(1)
    visible = torch.ones(32, 20000, dtype=torch.bool)
    regime = tilted(s, visible).regime
    share = 1 / s.softmax(-1).square().sum(-1) / 20000
    near = regime < 1
    assert near.sum() >= 16 and ((share.log() + regime).abs() < 0.05)[near].all()


def test_parts_of_the_update(seed):
    """Heads and their sum as they enter the stream: a tangent, a norm on the update, an FFN beside."""
    for fields in (
        {"placement": Sphere(), "norm": None},
        {"placement": SandwichNorm()},
        {"arrangement": Parallel(), "ffn": GELU(), "drift": Drift()},
    ):
        net = model(depth=1, **fields)
        seen = capture(net, words(9, batch=3))
        found, block, at = told(Gaussian(), seen), net.layer(0), seen.steps[0]
        z = closure(seen, 0).mixture
        update = block.attention.lift(z)
        if block.shape_attn is not None:
            update = block.shape_attn(at.before, update)
        actual = at.update if at.ffn is None else at.update - at.ffn
        expected = [r_squared(actual[b, 1:], update[b, 1:]) for b in range(3)]
        assert only(found, "gauss.r2").mean == pytest.approx(sum(expected) / 3, rel=1e-9)
        heads, predicted = seen.heads(0)[0], block.pieces(at._replace(mixture=z))[0]
        each = [r_squared(heads[b, 1, 1:], predicted[b, 1, 1:]) for b in range(3)]
        assert only(found, "gauss.r2", head=1).mean == pytest.approx(sum(each) / 3, rel=1e-9)


def r_squared(actual: Tensor, predicted: Tensor) -> float:
    return 1 - ((actual - predicted).square().sum() / (actual - actual.mean(0)).square().sum()).item()


def test_other_kernels_have_rows_where_they_know_their_limit():
    torch.manual_seed(0)
    net = model(mask=Full(), depth=1, norm=RMSNorm(), form=LowRank(rank=3, groups=1))
    seen = capture(net, words(9))
    both = closure(seen, 0), _mean_field(net.layer(0).attention, seen.steps[0].read)
    for one, two in zip(both[0][:2], both[1][:2], strict=True):  # softmax, by scores and by moments
        assert (one - two).abs().max() < 1e-12
    for fields in ({"mask": Causal()}, {"positions": [RoPE()]}, {"functional": Functional()}):
        assert _mean_field(model(**({"mask": Full()} | fields)).layer(0).attention, seen.steps[0].read) is None
    exact = told(Gaussian(), capture(model(kernel=Linear(), mask=Full()), words(9)))
    assert only(exact, "gauss.r2").mean == pytest.approx(1, abs=1e-12), "linear attention is affine, whatever the cloud"
    for kernel in (SinkSoftmax(), Sigmoid()):
        assert told(Gaussian(), capture(model(kernel=kernel, mask=Full()), words(9))) == []
    form, content = normal(D, D) / D, normal(D, D)
    for kernel in (L2(), Sinkhorn()):
        found = told(Gaussian(), step(normal(2, 600, D), form, content, kernel=kernel))
        assert only(found, "gauss.r2").mean > 0.8 and only(found, "gauss.cov_error").mean < 0.3
        assert not [row for row in found if row.key == "gauss.regime"]
    assert told(Gaussian(), capture(model(kernel=L2()), words(9))) == [], "under a causal mask there is no one cloud"


def test_pieces_are_the_whole():
    torch.manual_seed(0)
    net = model(positions=[RoPE()], form=LowRank(rank=4, groups=1))
    tokens = words(13)
    whole = told(Gaussian(), capture(net, tokens))
    for budget in (1, 2 * 13 * 4):
        split = capture(net, tokens)
        split.budget = budget
        for one, two in zip(whole, told(Gaussian(), split), strict=True):
            assert close(one, two)
    assert only(whole, "gauss.r2").n_valid == 2


def close(one: Row, two: Row) -> bool:
    same = one[:3] == two[:3] and one[6:8] == two[6:8] and one[10:] == two[10:]
    return same and all(a == pytest.approx(b, rel=1e-10, abs=1e-12) for a, b in zip(one[3:6], two[3:6], strict=True))


def test_first_tokens_are_left_out_of_the_comparison_alone():
    torch.manual_seed(0)
    x = normal(2, 30, D)
    x[:, 0] *= 20
    form = 0.1 * torch.eye(D).double()
    seen = step(x, form, torch.eye(D).double(), mask=Causal())
    actual, z = seen.steps[0].update, closure(seen, 0).mixture[:, 0]
    for skip in (0, 3):
        expected = sum(r_squared(actual[b, skip:], z[b, skip:]) for b in range(2)) / 2
        assert only(told(Gaussian(skip=skip), seen), "gauss.r2").mean == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UserError, match="skip is -1"):
        Gaussian(skip=-1)


def test_explained_and_covariance_change(seed):
    for count, dim in ((9, 4), (4, 9), (2, 3), (3, 2)):
        x, move = normal(3, count, dim), normal(3, count, dim)
        for size in (1.0, 1e-6):
            found = covariance_change(x, size * move)
            for b in range(3):
                one, two = (torch.cov(w.T, correction=0) for w in (x[b], x[b] + size * move[b]))
                assert float(found[b]) == pytest.approx(float((two - one).norm()), rel=1e-6 if size < 1 else 1e-10)
    assert covariance_change(normal(2, 1, 3), normal(2, 1, 3)).isnan().all()
    y = normal(3, 5)
    assert float(explained(y, y)) == 1 and float(explained(y, y.mean(0).expand_as(y))) == pytest.approx(0, abs=1e-12)
    assert explained(y[:1].expand(3, 5), y).isnan()


def test_the_keys_have_a_meaning_beside_others():
    """The regime of a causal softmax bounds what entropies know of it: 0 where attention is uniform."""
    torch.manual_seed(0)
    net = model(depth=1)
    with torch.no_grad():
        net.layer(0).attention.form.left_factor.zero_()
    seen = capture(net, words(12))
    found = told(Gaussian(), seen)
    assert only(found, "gauss.regime").mean == 0 and only(told(Energy(), seen), "attn.entropy_norm").mean == pytest.approx(1)
    assert only(found, "gauss.r2").mean == only(found, "gauss.r2", param="mean").mean == pytest.approx(1)
    assert only(found, "gauss.cov_error").mean == pytest.approx(0, abs=1e-10)
