"""Distances between clouds against closed forms and against POT (math D.8, J 16)."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from emformer.geometry.transport import (
    bures,
    geodesic_ratio,
    identity_coupling,
    shape,
    sinkhorn_divergence,
    sliced,
    wasserstein,
)


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def rms(rows: Tensor) -> float:
    return float(rows.square().sum(-1).mean().sqrt())


def semidefinite(d: int, rank: int) -> Tensor:
    factor = normal(d, rank)
    return factor @ factor.mT / d


def rotation(d: int, angle: float) -> Tensor:
    skew = normal(d, d)
    return torch.linalg.matrix_exp(angle * (skew - skew.mT) / math.sqrt(2 * d))


def pot(x: Tensor, y: Tensor) -> float:
    """W2 by POT's network simplex."""
    return math.sqrt(ot.emd2([], [], ot.dist(x.numpy(), y.numpy()), numItermax=10**7))


def clouds(n: int, d: int) -> list[tuple[str, Tensor, Tensor]]:
    """Pairs of the kinds that training makes, easy and hard."""
    x, y, far = normal(n, d), normal(n, d), 5 * normal(8, d)
    tokens = torch.randint(0, max(2, n // 8), (2, n))
    heavy = torch.ones(n, 1, dtype=torch.float64)
    heavy[0] = 500
    twins = x[torch.arange(n) // 2] + 1e-7 * y
    return [
        ("unrelated", x, y),
        ("small step", x, x + 0.2 * y),
        ("large step", x, x + 2 * y),
        ("small step and drift", x, x + 0.2 * y + 30),
        ("repeated tokens", x[tokens[0]], x[tokens[1]]),
        ("clusters", far[tokens[0] % 8] + x, far[tokens[1] % 8] + y),
        ("massive token", heavy * x, heavy * y),
        ("nearly a line", x[:, :1] + 0.05 * x, y[:, :1] + 0.05 * y),
        ("far from the origin", x + 1e4, y + 1e4),
        ("near twins trade places", twins, twins[torch.arange(n) ^ 1]),
    ]


def test_ordering(seed: int) -> None:
    """J 16: Bures <= W2 <= identity and SW2 <= W2/sqrt(d) + 3 se, for 50 random pairs."""
    for case in range(50):
        n, d = int(torch.randint(1, 60, ())), int(torch.randint(1, 40, ()))
        x = normal(n, d) * normal(d).exp()
        y = x + normal(n, d) * normal(1).exp() if case % 2 else normal(n, d) + normal(d)
        exact, shadow = wasserstein(x, y), sliced(x, y, seed=case)
        assert bures(x, y) <= exact.w2 * (1 + 1e-12)
        assert exact.w2 <= exact.identity
        assert exact.identity == pytest.approx(float(identity_coupling(x, y)), rel=1e-12)
        assert shadow.distance <= exact.w2 / math.sqrt(d) + 3 * shadow.error + 1e-12


def test_closed_forms(seed: int) -> None:
    """J 16: translations, scalings and SPD maps move a cloud along a geodesic, on which all distances agree; rotations do not."""
    for n, d in ((20, 30), (64, 8), (300, 5)):
        x, t = normal(n, d), normal(d)
        for y, rank in ((x + t, 1), (2.5 * x, d), (x @ semidefinite(d, 2 * d), d), (x @ semidefinite(d, 2), 2)):
            length = rms(y - x)
            found = wasserstein(x, y)
            values = torch.stack([found.w2, found.identity, bures(x, y), identity_coupling(x, y)])
            assert (values - length).abs().max() < 1e-8 * max(1.0, length), rank
            assert found.fixed == 1 and (found.order == torch.arange(n)).all()
        for angle in (1e-3, 0.1, 2.0):
            y = x @ rotation(d, angle)
            found = wasserstein(x, y)
            assert found.w2 <= found.identity
            assert angle > 0.01 or found.w2 == found.identity == pytest.approx(rms(y - x), rel=1e-12)
        shadow = sliced(x, x + t)
        assert abs(shadow.distance - t.norm() / math.sqrt(d)) <= 3.5 * shadow.error
        assert wasserstein(x, 3 * x + t).shape < 1e-7


def test_polygon() -> None:
    """A regular n-gon turned by a share of its step: the best coupling goes to the nearer corner."""
    n, radius = 24, 2.0
    step = 2 * math.pi / n
    corners = radius * torch.polar(torch.ones(n, dtype=torch.float64), step * torch.arange(n, dtype=torch.float64))
    for share in (0.3, 0.7, 1.0, 3.2):
        turned = corners * complex(math.cos(share * step), math.sin(share * step))
        found = wasserstein(torch.view_as_real(corners), torch.view_as_real(turned))
        left = abs(share - round(share))
        assert found.w2 == pytest.approx(2 * radius * math.sin(left * step / 2), abs=1e-12)
        assert found.identity == pytest.approx(2 * radius * math.sin(share * step / 2), abs=1e-12)
        assert found.fixed == (share < 0.5)
        assert (found.order == (torch.arange(n) - round(share)) % n).all()
        assert bures(torch.view_as_real(corners), torch.view_as_real(turned)) < 1e-7  # the covariance does not turn


@pytest.mark.parametrize(("n", "d"), [(300, 40), (300, 3), (64, 16)])
def test_assignment_against_pot(n: int, d: int) -> None:
    """The optimum of a network simplex, whichever proof or potentials led to ours; the order is a permutation that attains it."""
    torch.manual_seed(n + d)
    for name, x, y in clouds(n, d):
        found = wasserstein(x, y)
        centred = x - x.mean(0), y - y.mean(0)  # POT squares distances from the origin, and keeps the rounding of those squares
        truth = math.hypot(pot(*centred), float((x.mean(0) - y.mean(0)).norm()))
        assert found.w2 == pytest.approx(0.0 if "twins" in name else truth, rel=1e-9), name
        assert (found.order.sort().values == torch.arange(n)).all(), name
        assert rms(y[found.order] - x) == pytest.approx(float(found.w2), rel=1e-12), name
        assert found.ratio == found.w2 / found.identity
        assert found.fixed == (found.order == torch.arange(n)).double().mean()


def test_planted_orders() -> None:
    """A permutation is found and its inverse returned; steps below half the smallest gap keep the identity optimal."""
    torch.manual_seed(0)
    for n, d in ((2, 1), (17, 3), (300, 64)):
        x, order = normal(n, d), torch.randperm(n)
        found = wasserstein(x, x[order])
        assert found.w2 < 1e-12 and (order[found.order] == torch.arange(n)).all()
        gaps = torch.cdist(x, x).fill_diagonal_(torch.inf)
        step = normal(n, d)
        y = x + step / step.norm(dim=-1, keepdim=True) * gaps.min() / 2 * (1 - 1e-9)
        found = wasserstein(x, y)
        assert found.fixed == 1 and found.ratio == 1 and found.w2 == pytest.approx(float(gaps.min()) / 2, rel=1e-8)


def test_near_twins_that_trade_places() -> None:
    """W2 is 0 and no token is fixed, also for twins that float32 cannot tell apart: no proof of the identity may rest on it."""
    torch.manual_seed(0)
    for trial in range(200):
        n, d = (2, 5) if trial % 2 else (4, 40)
        twins = normal(n, d) + (10 * normal(n // 2, d)).repeat_interleave(2, 0)
        gap = 10.0 ** -(trial % 6)
        twins[1::2] = twins[::2] + gap * normal(n // 2, d)
        found = wasserstein(twins, twins[torch.arange(n) ^ 1])
        assert found.w2 < 1e-12 and found.fixed == 0, gap


def test_duplicates_keep_their_own_image() -> None:
    """Tokens at one place may trade images at no cost; the share of fixed tokens does not depend on who did."""
    torch.manual_seed(0)
    for n in (40, 320):
        places = 10 * torch.eye(8, dtype=torch.float64)
        x = places[torch.arange(n) % 8]
        for image in (x, x + 3 * normal(n, 8), 2 * x + 1, normal(n, 8)):
            found = wasserstein(x, image)
            # of the tokens at one place as many keep their own image as the place has images that are its own tokens'
            kept = sum(int((found.order[i::8] % 8 == i).sum()) for i in range(8))
            assert round(float(found.fixed) * n) == kept
    assert wasserstein(x, x).fixed == 1 and wasserstein(x, x).w2 == 0 and wasserstein(x, x).ratio.isnan()


def test_shape() -> None:
    """Without mean and scale: W2 splits exactly into drift, growth and change of shape; unrelated shapes stay below sqrt(2)."""
    torch.manual_seed(0)
    for n, d in ((50, 6), (300, 20)):
        x, y = normal(n, d) + 3, 4 * normal(n, d).abs() - 1
        found = wasserstein(x, y)
        radii = [rms(cloud - cloud.mean(0)) for cloud in (x, y)]
        drift = float((x.mean(0) - y.mean(0)).norm())
        square = drift**2 + (radii[0] - radii[1]) ** 2 + radii[0] * radii[1] * float(found.shape) ** 2
        assert found.w2 == pytest.approx(math.sqrt(square), rel=1e-12)
        assert found.shape == pytest.approx(float(wasserstein(shape(x), shape(y)).w2), rel=1e-12) and 0 < found.shape < math.sqrt(
            2
        )
        assert rms(shape(y)) == pytest.approx(1, rel=1e-12) and shape(y).mean(0).abs().max() < 1e-14
        assert wasserstein(x, y).shape == pytest.approx(float(wasserstein(7 * x - 2, y + 5).shape), rel=1e-12)


def test_sliced_against_pot_and_on_a_line() -> None:
    """POT with the same directions; one dimension has one direction; the error is the spread between seeds."""
    torch.manual_seed(0)
    x, y = normal(80, 12), normal(80, 12) + 0.5
    directions = torch.randn(150, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    directions /= directions.norm(dim=-1, keepdim=True)
    truth = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions.mT.contiguous().numpy())
    assert sliced(x, y, 150, seed=3).distance == pytest.approx(float(truth), rel=1e-12)
    assert sliced(x[:, :1], y[:, :1], 5).distance == pytest.approx(float(wasserstein(x[:, :1], y[:, :1]).w2), rel=1e-12)
    assert sliced(x[:, :1], y[:, :1], 5).error < 1e-9
    draws = [sliced(x, y, 40, seed=s) for s in range(200)]
    spread = torch.stack([draw.distance for draw in draws]).std()
    assert torch.stack([draw.error for draw in draws]).mean() == pytest.approx(float(spread), rel=0.15)
    assert sliced(x, y, 1).error.isnan() and sliced(x, x).distance == sliced(x, x).error == 0


def test_bures_against_pot(seed: int) -> None:
    """J 16: POT without regularisation where it is defined, N >= 2 d; below only the bound, where POT has nan."""
    for n, d in ((60, 5), (40, 20), (300, 30)):
        x, y = normal(n, d) @ normal(d, d), normal(n, d) @ normal(d, d) + normal(d)
        truth = ot.gaussian.empirical_bures_wasserstein_distance(x.numpy(), y.numpy(), reg=0)
        assert bures(x, y) == pytest.approx(float(truth), rel=1e-8)
    for n, d in ((1, 4), (2, 4), (10, 10), (11, 10), (20, 50)):
        x, y = normal(n, d), normal(n, d)
        assert bures(x, y).isfinite() and bures(x, y) <= wasserstein(x, y).w2 * (1 + 1e-12)


def test_bures_of_close_clouds() -> None:
    """A step far below the rounding of the squared radii: the difference of norms alone would read 0 or 1e-8."""
    torch.manual_seed(0)
    for n, d in ((50, 8), (8, 20)):
        x = normal(n, d)
        y = x + 1e-9 * x @ semidefinite(d, d)
        assert bures(x, y) == pytest.approx(rms(y - x), rel=1e-5)
        assert bures(x, x[torch.randperm(n)]) < 1e-13


def test_geodesic_ratio() -> None:
    """1 along a straight line, sqrt(1/2) around a right angle, 0 on the way back, nan at rest; batched over prompts."""
    torch.manual_seed(0)
    x, s, t = normal(2, 30, 6), torch.eye(6, dtype=torch.float64)[0], torch.eye(6, dtype=torch.float64)[1]
    assert geodesic_ratio(torch.stack([x, x + t, x + 3 * t])).tolist() == pytest.approx([1, 1], rel=1e-12)
    assert all(geodesic_ratio(torch.stack([x, x + c * t, x + t])).max() <= 1 for c in torch.linspace(0.1, 0.9, 20))
    assert geodesic_ratio(torch.stack([x[0], x[0] + t, x[0] + t + s])) == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert geodesic_ratio(torch.stack([x, x + t, x])).tolist() == [0, 0]
    assert geodesic_ratio(torch.stack([x, x])).isnan().all()
    with pytest.raises(ValueError, match="two layers"):
        geodesic_ratio(x[:1])


def logcosh(z: float) -> float:
    return abs(z) + math.log1p(math.exp(-2 * abs(z))) - math.log(2)


def test_sinkhorn_of_two_points() -> None:
    """{-a, a} and {-b, b}: OT = a^2 + b^2 - eps log cosh(2 a b/eps) by symmetry, dual value and entropy included."""
    for a, b, eps in ((1.0, 2.0, 0.5), (1.0, 2.0, 4.0), (0.3, 0.3, 0.01), (2.0, 0.0, 1.0), (1.5, 1.0, 100.0)):
        x, y = (torch.tensor([[-c, 0.0], [c, 0.0]], dtype=torch.float64) for c in (a, b))
        truth = eps / 2 * (logcosh(2 * a * a / eps) + logcosh(2 * b * b / eps)) - eps * logcosh(2 * a * b / eps)
        assert sinkhorn_divergence(x, y, eps).value == pytest.approx(truth, abs=1e-9)


def test_sinkhorn_against_pot_and_limits() -> None:
    """The entropic value of POT, debiased; W2^2 and |mean difference|^2 in the limits; a translation exactly; never negative."""
    torch.manual_seed(0)
    x, y = normal(30, 4), normal(30, 4) * 0.7 + 0.5
    weights = np.full(30, 1 / 30)
    for eps in (1.0, 5.0):
        values = [
            ot.solve(ot.dist(p.numpy(), q.numpy()), weights, weights, reg=eps, reg_type="KL", tol=1e-11, max_iter=2000).value
            for p, q in ((x, y), (x, x), (y, y))
        ]
        found = sinkhorn_divergence(x, y, eps, tolerance=1e-11)
        assert found.error <= 1e-11
        assert found.value == pytest.approx(values[0] - (values[1] + values[2]) / 2, rel=1e-7)
    drift = float((x.mean(0) - y.mean(0)).square().sum())
    assert sinkhorn_divergence(x, y, 1e6).value == pytest.approx(drift, rel=1e-4)
    assert sinkhorn_divergence(x, y, 0.003).value == pytest.approx(float(wasserstein(x, y).w2) ** 2, rel=0.01)
    for eps in (0.05, 1.0, 50.0):
        assert sinkhorn_divergence(x, x + 2, eps).value == pytest.approx(16, rel=1e-9)
        assert sinkhorn_divergence(x, x[torch.randperm(30)], eps).value.abs() < 1e-9
        assert sinkhorn_divergence(x, 1.01 * x, eps).value > 0
    assert sinkhorn_divergence(x, y, 0.01, limit=3).error > 1e-3
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon"):
            sinkhorn_divergence(x, y, wrong)


def test_batches_types_and_generators() -> None:
    """A batch is its clouds one by one, in any float type, with gradients or without; no global generator moves."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 40, 8)
    y = x + torch.linspace(0.1, 3, 6).reshape(3, 2, 1, 1) * torch.randn(3, 2, 40, 8)
    state, drawn = torch.get_rng_state(), np.random.get_state()[1].tolist()
    both = [f(x, y) for f in (wasserstein, sliced, lambda a, b: sinkhorn_divergence(a, b, 5.0))]
    fields = {(i, name): value for i, found in enumerate(both) for name, value in found._asdict().items()}
    for b, c in ((0, 0), (1, 1), (2, 0), (2, 1)):
        alone = [f(x[b, c], y[b, c]) for f in (wasserstein, sliced, lambda a, b: sinkhorn_divergence(a, b, 5.0))]
        for (i, name), value in fields.items():
            if i == 2 and name == "error":  # the slowest prompt decides when all stop
                continue
            assert value[b, c].double().numpy() == pytest.approx(getattr(alone[i], name).double().numpy(), rel=1e-9), name
        assert bures(x, y)[b, c] == pytest.approx(float(bures(x[b, c], y[b, c])), rel=1e-12)
        assert identity_coupling(x, y)[b, c] == identity_coupling(x[b, c], y[b, c])
    assert torch.equal(torch.get_rng_state(), state) and np.random.get_state()[1].tolist() == drawn
    rounded = x.bfloat16().requires_grad_(), y.half()
    assert (wasserstein(*rounded).w2 == wasserstein(rounded[0].detach().double(), rounded[1].double()).w2).all()


def test_degenerate_clouds() -> None:
    """One token, constant clouds, zeros, nan, infinities, no prompt: a number where there is one, else nan, never an error."""
    torch.manual_seed(0)
    for n, d in ((1, 3), (7, 1), (7, 3), (300, 4)):
        x, constant, zero = normal(n, d), torch.full((n, d), 0.1, dtype=torch.float64), torch.zeros(n, d, dtype=torch.float64)
        for a, b in ((x, constant), (constant, zero), (zero, zero), (constant, constant), (x, x)):
            found = wasserstein(a, b)
            values = [found.w2, found.identity, found.fixed, *sliced(a, b), bures(a, b), *sinkhorn_divergence(a, b, 1.0)]
            assert all(value.isfinite() for value in values)
            assert found.ratio.isnan() == (found.identity == 0)
            assert found.shape.isnan() == (a is not x or b is not x or n == 1)
            assert bures(a, b) <= found.w2 + 1e-12 and found.fixed == 1 and found.w2 == found.identity
        for wrong in (math.nan, math.inf, 1e200):
            broken = x.clone()
            broken[0, 0] = wrong
            for a, b in ((broken, x), (x, broken)):
                found = wasserstein(torch.stack([a, x]), torch.stack([b, x + 1]))
                assert all(value[0].isnan() for value in found[:5]) and (found.order[0] == -1).all()
                assert found.w2[1] == pytest.approx(math.sqrt(d)) and found.fixed[1] == 1
                values = [*sliced(a, b), bures(a, b), *sinkhorn_divergence(a, b, 1.0), identity_coupling(a, b)]
                assert all(value.isnan() for value in values)
    assert wasserstein(normal(0, 4, 3), normal(0, 4, 3)).w2.shape == (0,)
    for f in (wasserstein, sliced, bures, identity_coupling):
        with pytest.raises(ValueError, match="at least one token"):
            f(normal(0, 3), normal(0, 3))
    with pytest.raises(ValueError, match="projection"):
        sliced(normal(2, 3), normal(2, 3), 0)
