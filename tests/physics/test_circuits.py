"""What operators read of each other and where they lead a cloud: against products of whole matrices, draws of the null, the law
of Gaussian clouds, and the sign and the order of the factors."""

from __future__ import annotations

import math

import pytest
import torch
from builders import fill, model

from emformer.circuits import Growth, compositions, growth, outlook
from emformer.diagnostics import effective, factors
from emformer.geometry import spectra
from emformer.kernels import Softmax
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import PSD, Dense, LowRank, Preconditioned, Skew, Symmetric, Tied

D, PARTS = 24, [LowRank(rank=4), LowRank(rank=4, groups=1), LowRank(rank=30), Dense(), Symmetric(rank=5), PSD(rank=5)]


def haar(dim: int) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    return q * r.diagonal().sign()


# Factors and compositions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS, ids=repr)
@torch.no_grad()
def test_factors_are_the_effective_operators(part):
    torch.manual_seed(0)
    for norm in (LayerNorm(bias=True), RMSNorm(), None):
        contents = [LowRank(rank=3), Tied(), Preconditioned()] if norm == RMSNorm() else [LowRank(rank=3)]
        for content in contents:
            block = model(dim=D, heads=4, form=part, content=content, norm=norm).layer(1)
            told, whole = factors(block), effective(block)
            assert (told.form_left.mT @ told.form_right - whole.form).abs().max() < 1e-12
            assert (told.content_left.mT @ told.content_right - whole.content).abs().max() < 1e-12


@pytest.mark.parametrize("part", PARTS, ids=repr)
@torch.no_grad()
def test_compositions_are_products_of_whole_matrices(part):
    torch.manual_seed(0)
    net = model(dim=D, heads=4, depth=3, form=part, content=LowRank(rank=3), norm=LayerNorm(bias=True))
    found = list(compositions(net))
    assert [(one.layer, one.source) for one in found[::3]] == [(1, 0), (2, 0), (2, 1)]
    for one in found:
        late, early = effective(net.layer(one.layer)), effective(net.layer(one.source)).content
        reads = {"Q": late.form.mT, "K": late.form, "V": late.content}[one.kind]
        exact = spectra.composition(reads.unsqueeze(1), early.unsqueeze(0))
        assert (one.value - exact).abs().max() < 1e-12, "a row for each head that reads"
        # by hand: |M' F| over both norms
        by_hand = (reads[2] @ early[1]).norm() / (reads[2].norm() * early[1].norm())
        assert one.value[2, 1] == pytest.approx(float(by_hand), rel=1e-12)


def test_a_head_that_reads_what_another_wrote_is_seen():
    """F of layer 0 writes along e_0; the keys of one head in layer 1 read e_0, the queries of another."""
    torch.manual_seed(0)
    net = model(dim=D, heads=2, form=LowRank(rank=1), content=LowRank(rank=1), norm=None)
    axes = torch.eye(D, dtype=torch.float64)
    with torch.no_grad():
        fill(net.layer(0).attention.content.left_factor, axes[[0, 1]].unsqueeze(1))
        fill(net.layer(1).attention.form.right_factor, axes[[0, 5]].unsqueeze(1))
        fill(net.layer(1).attention.form.left_factor, axes[[6, 0]].unsqueeze(1))
        fill(net.layer(1).attention.content.right_factor, axes[[1, 7]].unsqueeze(1))
    q, k, v = (one.value for one in compositions(net))
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for found, at in ((q, (1, 0)), (k, (0, 0)), (v, (0, 1))):
        one = expected.clone()
        one[at] = 1
        assert (found - one).abs().max() < 1e-12


def test_the_null_is_that_of_random_singular_vectors(seed):
    """Mean and deviation of 2,000 Haar draws, of flat and of steep spectra."""
    for first, second in ((torch.ones(3), torch.ones(5)), (torch.tensor([3.0, 1, 0.3]), torch.tensor([2.0, 0.1, 0.1, 0.1]))):
        u, v = (torch.zeros(1, len(s), 12, dtype=torch.float64) for s in (first, second))
        for rows, s in ((u, first), (v, second)):
            rows[0, range(len(s)), range(len(s))] = s.double().sqrt()
        drawn = []
        for _ in range(2000):
            turn = haar(12)
            drawn.append(spectra.composition((u.mT @ u)[0], turn @ (v.mT @ v)[0]))
        values = torch.stack(drawn)
        told = spectra.compositions((u, u), (v, v))
        # means to 4 standard errors and what second order leaves out
        assert abs(float(values.mean() - told.null)) < 4 * float(values.std()) / math.sqrt(2000) + 0.01 * float(told.null)
        assert float(values.std()) == pytest.approx(float(told.null_sd), rel=0.12)
        assert float(values.square().mean()) == pytest.approx(1 / 12, rel=0.05)


def test_compositions_of_blocks_that_are_shared_or_zero():
    torch.manual_seed(0)
    net = model(shared=True, depth=3)
    assert [(one.layer, one.source, one.kind) for one in compositions(net)] == [(0, 0, "Q"), (0, 0, "K"), (0, 0, "V")]
    assert list(compositions(model(depth=1))) == []
    net = model()
    with torch.no_grad():
        net.layer(0).attention.content.left_factor[0].zero_()
    for one in compositions(net):
        assert one.value[:, 0].isnan().all() and one.value[:, 1].isfinite().all()
        assert one.null[:, 0].isnan().all() and one.null_sd[:, 1].isfinite().all()


# Spectra --------------------------------------------------------------------------------------------------------------


def test_rotations_and_stretches():
    angle, axes = 0.7, torch.eye(6, dtype=torch.float64)
    turn = torch.zeros(6, 6, dtype=torch.float64)
    turn[0, 0] = turn[1, 1] = 2 * math.cos(angle)
    turn[0, 1], turn[1, 0] = -2 * math.sin(angle), 2 * math.sin(angle)  # 2 e^{+-i angle}, energy 8
    turn[2, 2] = -3  # energy 9
    found = spectra.turning(turn.mT, axes)
    assert float(found.radius) == pytest.approx(3) and float(found.rotation) == pytest.approx(8 / 17)
    torch.manual_seed(0)
    left, right = (torch.randn(5, 4, 10, dtype=torch.float64) for _ in range(2))
    values = torch.linalg.eigvals(left.mT @ right)
    found = spectra.turning(left, right)
    assert (found.radius - values.abs().amax(-1)).abs().max() < 1e-10
    size = values.abs().square()
    share = (size * (values.imag.abs() > 1e-6)).sum(-1) / size.sum(-1)
    assert (found.rotation - share).abs().max() < 1e-10
    for part, rotation in ((Symmetric(rank=5), 0.0), (PSD(rank=5), 0.0), (Skew(), 1.0)):
        told = factors(model(dim=D, form=part, norm=RMSNorm(gain=False)).layer(0))
        got = spectra.turning(told.form_left, told.form_right)
        assert (got.rotation - rotation).abs().max() < 1e-12
    assert spectra.turning(0 * left, right).rotation.isnan().all()


def test_random_operators_are_the_null_of_rotation():
    torch.manual_seed(0)
    left, right = (torch.randn(300, 6, 40, dtype=torch.float64) for _ in range(2))
    found = spectra.turning(left, right)
    drawn = spectra.random_turning(spectra.thin_singular_values(left, right), 40, seed=3)
    for one, two in zip(found, drawn, strict=True):
        assert abs(float(one.mean() - two.mean())) < 4 * float(one.std()) * math.sqrt(2 / 300)
        assert float(one.std()) == pytest.approx(float(two.std()), rel=0.2)
    again = spectra.random_turning(torch.ones(2, 40), 40)  # whole orthogonal matrices
    assert (again.radius - 1).abs().max() < 1e-10


# Growth ---------------------------------------------------------------------------------------------------------------


def velocity(v: torch.Tensor, a: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """d Sigma/dt of math E.6 in S3's letters, summed over heads; written here."""
    one = (v @ covariance @ a @ covariance).sum(0)
    return one + one.mT


@pytest.mark.parametrize("part", PARTS, ids=repr)
@torch.no_grad()
def test_b_is_the_covariance_s_first_step(part):
    """B = Sigma' at Sigma = I, with every form and content, and as the formula F M^T + M F^T, not F M + M^T F^T."""
    torch.manual_seed(0)
    for content in (LowRank(rank=3), Dense()):
        net = model(dim=D, heads=3, form=part, content=content, norm=RMSNorm(), kernel=Softmax(beta=0.7))
        found, told = growth(net.layer(0)), effective(net.layer(0))
        whole = (found.vectors * found.values) @ found.vectors.mT
        law = velocity(told.content, 0.7 * told.form.mT, torch.eye(D, dtype=torch.float64))  # V = F and A = M^T
        assert (whole - law).abs().max() < 1e-12
        assert (found.values.diff() >= 0).all()
        for head, values in enumerate(found.heads):
            m, f = told.form[head], told.content[head]
            exact = torch.linalg.eigvalsh(0.7 * (f @ m.mT + m @ f.mT))
            missing = torch.zeros(D - len(values), dtype=torch.float64)
            assert (torch.cat([values, missing]).sort().values - exact).abs().max() < 1e-12
        other = torch.linalg.eigvalsh(0.7 * (told.content @ told.form + (told.content @ told.form).mT).sum(0))
        symmetric = isinstance(part, Symmetric | PSD) and norm_is_flat(net)
        assert symmetric or (other - found.values).abs().max() > 1e-3, "the other order says something else"


def norm_is_flat(net: torch.nn.Module) -> bool:
    """Folded gains leave a symmetric M symmetric, and then both orders of the product agree."""
    m = effective(net.layer(0)).form
    return bool((m - m.mT).abs().max() < 1e-12)


@torch.no_grad()
def test_a_mean_that_the_norm_removes_does_not_grow():
    torch.manual_seed(0)
    net = model(dim=D, norm=LayerNorm(), content=Dense(), form=Dense())
    found = growth(net.layer(0))
    ones = torch.ones(D, dtype=torch.float64)
    whole = (found.vectors * found.values) @ found.vectors.mT
    assert (whole @ ones).abs().max() < 1e-12
    assert (effective(net.layer(0)).content.sum(1)).abs().max() > 1e-2, "F does write a mean"


@torch.no_grad()
def test_the_time_of_blow_up_is_that_of_the_flow():
    """Sigma' integrated from I by Euler steps, for M and F that commute: every direction goes as 1/(1 - t lambda), to infinity at
    1/lambda_max where lambda is positive and to 0 where it is negative."""
    rates = torch.tensor([2.0, 0.5, -1.0, -4.0], dtype=torch.float64)
    net = model(dim=4, heads=1, depth=1, form=Dense(), content=Dense(), norm=None)
    fill(net.layer(0).attention.form.left_factor, torch.eye(4, dtype=torch.float64).unsqueeze(0))
    fill(net.layer(0).attention.content.left_factor, torch.diag(rates / 2).unsqueeze(0))
    told = outlook(growth(net.layer(0)).values)
    assert float(told.time) == pytest.approx(0.5) and float(told.top) == pytest.approx(2)
    assert float(told.count) == 2 and float(told.share) == pytest.approx(2.5 / 7.5)
    covariance, steps, operators = torch.eye(4, dtype=torch.float64), 20000, effective(net.layer(0))
    for _ in range(steps):  # to 0.9 of the time
        covariance = covariance + 0.9 * float(told.time) / steps * velocity(operators.content, operators.form.mT, covariance)
    exact = 1 / (1 - 0.9 * float(told.time) * rates)
    assert (covariance.diagonal() / exact - 1).abs().max() < 2e-3


def test_outlook_of_signs_and_nothing():
    found = outlook(torch.tensor([[-1.0, -2.0, 0.0], [1.0, 1e-14, 3.0], [0.0, 0.0, 0.0]]).double())
    assert found.share[:2].tolist() == pytest.approx([0.0, 1.0]) and found.count[:2].tolist() == [0.0, 2.0]
    assert found.time[0].isnan() and found.time[1] == pytest.approx(1 / 3) and found.top[0] == 0
    for values in found:
        assert values[2].isnan()
    assert isinstance(growth(model().layer(0)), Growth)
