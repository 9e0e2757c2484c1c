"""The energy of tokens on the sphere: its gradient, its rate, its value for known clouds, and steps that cannot lower it."""

from __future__ import annotations

import math

import builders
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import ive
from torch import Tensor

import emformer as emf
from emformer.geometry.integrability import log_energy, relative_drop, violations
from emformer.kernels import Softmax, Unnormalised
from emformer.masks import Full
from emformer.norms import RMSNorm
from emformer.operators import Dense
from emformer.placements import PreNorm
from emformer.theory.energies import dissipation, log_partition, scaled_energy, uniform_energy, velocity
from emformer.theory.particles import idealised, simulate, unit_vectors

N, D = 9, 4
BETAS = (0.5, 2.0, 7.0)


def plain(theta: Tensor, beta: float) -> Tensor:
    """E_beta of one cloud, as it is written."""
    return (beta * theta @ theta.mT).exp().sum() / (2 * beta * len(theta) ** 2)


def steepest(theta: Tensor, beta: float) -> Tensor:
    """grad E_beta on the sphere, by autograd."""
    moved = theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(plain(torch.nn.functional.normalize(moved, dim=-1), beta), moved)
    return slope


def modelled(theta: Tensor, beta: float, field: str) -> Tensor:
    """What the model's own block does to the directions of one cloud, in the time of the theory."""
    kernel = Softmax(beta=beta) if field == "sa" else Unnormalised(beta=beta, clip=None)
    block = idealised(D, kernel=kernel).layer(0)
    return next(block.flow(math.sqrt(D) * theta[None], torch.arange(N), None, 0)).update[0] / math.sqrt(D)


@pytest.mark.parametrize("beta", BETAS)
def test_the_field_is_the_gradient_and_dissipates(seed, beta):
    """J17: USA = n grad E; SA the same times n/Z_i; dE/dt = (1/n) sum w |v|^2 with w = 1 and Z/n, by autograd, to 1e-10."""
    theta = unit_vectors(1, N, D, seed)[0]
    gradient = steepest(theta, beta)
    z = (beta * theta @ theta.mT).exp().sum(-1, keepdim=True)
    scale = 2 * beta * math.exp(-beta)
    for field, mobility in (("usa", 1.0), ("sa", N / z)):
        v = modelled(theta, beta, field)
        torch.testing.assert_close(v, mobility * N * gradient, rtol=1e-10, atol=1e-12)
        rate = float((gradient * v).sum())
        weight = 1.0 if field == "usa" else z[:, 0] / N
        assert rate == pytest.approx(float((weight * v.square().sum(-1)).mean()), rel=1e-10)
        # and the functions say so: for "usa" in time units of e^-beta
        pace = math.exp(-beta) if field == "usa" else 1.0
        torch.testing.assert_close(velocity(3 * theta[None], beta, field)[0], pace * v, rtol=1e-10, atol=1e-12)
        found = float(dissipation(3 * theta[None], pace * v[None], beta, field))
        assert found == pytest.approx(pace * scale * rate, rel=1e-10)
        assert found > 0
    assert float(scaled_energy(5 * theta[None], beta)) == pytest.approx(scale * float(plain(theta, beta)), rel=1e-12)
    torch.testing.assert_close(log_partition(theta[None], beta)[0], z[:, 0].log(), rtol=1e-12, atol=0)


def test_repulsion_descends_as_fast(seed):
    theta = unit_vectors(1, N, D, seed)
    found = simulate(idealised(D, content=-1.0, kernel=Softmax(beta=2.0)), theta, [0, 1e-3, 2e-3], step=1e-3)
    energies = [float(scaled_energy(x, 2.0)) for x in found.clouds]
    slope = (energies[2] - energies[0]) / 2e-3
    assert slope == pytest.approx(-float(dissipation(found.clouds[1], velocity(found.clouds[1], 2.0), 2.0)), rel=1e-5)


def test_known_clouds():
    one = unit_vectors(1, 1, D).expand(1, N, D)
    two = torch.cat([one[:, :6], -one[:, :3]], 1)
    for beta in (*BETAS, 1e4):  # no temperature overflows
        assert float(scaled_energy(one, beta)) == pytest.approx(1, abs=1e-10)
        parted = (36 + 9 + 36 * math.exp(-2 * beta)) / 81
        assert float(scaled_energy(two, beta)) == pytest.approx(parted, rel=1e-9)
        assert velocity(one, beta).abs().max() < 1e-12
        assert velocity(unit_vectors(1, N, D), beta, "usa").isfinite().all()
    broken = torch.cat([one[:, :-1], 0 * one[:, :1]], 1)
    assert scaled_energy(broken, 1.0).isnan().all()


@pytest.mark.parametrize("dim", [2, 3, 6])
@pytest.mark.parametrize("beta", [0.3, 4.0, 40.0])
def test_the_uniform_law(dim, beta):
    """Against the integral over the angle, and in the circle and the sphere by hand."""
    weight = [quad(lambda a, k=k: math.exp(-k * (1 - math.cos(a))) * math.sin(a) ** (dim - 2), 0, math.pi)[0] for k in (beta, 0)]
    assert uniform_energy(dim, beta) == pytest.approx(weight[0] / weight[1], rel=1e-7)
    if dim == 3:
        assert uniform_energy(3, beta) == pytest.approx((1 - math.exp(-2 * beta)) / (2 * beta), rel=1e-12)
    energies = scaled_energy(unit_vectors(20, 300, dim), beta)
    expected = 1 / 300 + (1 - 1 / 300) * uniform_energy(dim, beta)
    assert float(energies.mean()) == pytest.approx(expected, abs=5 * float(energies.std()) / math.sqrt(20))


@pytest.mark.parametrize(
    ("dim", "beta", "known"),
    [(300, 1.0, 0.3684930814117113), (512, 1.0, 0.3682388732306889), (4096, 64.0, 2.64407587412025e-28), (4096, 1000.0, 0.0)],
)
def test_the_uniform_law_in_many_dimensions(dim, beta, known):
    """Where Gamma, the power or the Bessel function leave floating point: by mpmath, 50 digits of e^-beta 0F1(d/2, beta^2/4)."""
    assert uniform_energy(dim, beta) == pytest.approx(known, rel=1e-11, abs=1e-300)


@pytest.mark.parametrize("dim", [2, 3, 5, 12])
def test_the_uniform_law_when_it_is_cold(dim):
    """Against the Bessel function that is scaled, where it is in range."""
    for beta in (1e-6, 1.0, 30.0, 1000.0):
        factor = math.exp(math.lgamma(dim / 2) + (dim / 2 - 1) * math.log(2 / beta))
        assert uniform_energy(dim, beta) == pytest.approx(factor * ive(dim / 2 - 1, beta), rel=1e-11)


def test_the_uniform_law_of_nothing():
    for dim, beta in ((1, 1.0), (3, 0.0), (3, -1.0), (3, math.nan), (3, math.inf)):
        with pytest.raises(ValueError, match="has an energy for dim >= 2 and beta > 0"):
            uniform_energy(dim, beta)


def psd(seed: int, dim: int) -> Tensor:
    """From a stream that no cloud is from."""
    q = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
    return q @ q.mT / dim


@pytest.mark.parametrize("step", [0.1, 1.0, 10.0, 100.0])
def test_no_step_through_the_real_pre_ln_model_lowers_the_energy(seed, step):
    """J18: RMSNorm with eps 1e-6 and gain 1, no FFN, shared weights, a full mask, F = M = QQ^T/d; captured, 40 layers."""
    torch.manual_seed(seed)
    model = builders.model(
        form=Dense(),
        content=Dense(),
        placement=PreNorm(),
        norm=RMSNorm(eps=1e-6),
        mask=Full(),
        heads=1,
        depth=40,
        shared=True,
        epsilon=step,
    )
    attention = model.layer(0).attention
    with torch.no_grad():
        for parameter in model.layer(0).read_attn.parameters():
            parameter.fill_(1.0)  # the gain, which the builder stirs
        for operator in (attention.form, attention.content):
            operator.assign(psd(seed, 8).mT[None])
    trajectory = emf.capture(model, builders.words(16, batch=1))
    logs = torch.cat([log_energy(x, 8 * psd(seed, 8)[None])[:, 0] for x in trajectory.clouds])
    assert violations(logs.diff(), 1e-12).sum() == 0
    assert relative_drop(logs[:-1], logs[1:]).max() <= 1e-12


@pytest.mark.parametrize("step", [0.1, 1.0, 10.0, 100.0])
def test_with_any_mobility(seed, step):
    """J18 on unit vectors: c_i of each token at each step; then the instrument sees M = F = -I fall, and not for short steps."""
    m, beta = psd(seed, 8), 1.0
    theta = unit_vectors(1, 16, 8, seed)
    generator, logs = torch.Generator().manual_seed(2000 + seed), []
    model = idealised(8, m, m, Softmax(beta=beta), space="preln")
    for _ in range(40):
        logs.append(log_energy(theta, m[None], beta)[0, 0])
        lengths = 1 / torch.rand(1, 16, 1, generator=generator, dtype=torch.float64).clamp(min=1e-3)
        moved = simulate(model, lengths * theta, [0, step], step=step, method="euler").clouds[-1]
        theta = torch.nn.functional.normalize(moved, dim=-1)
    logs = torch.stack(logs)
    assert relative_drop(logs[:-1], logs[1:]).max() <= 1e-12
    minus = simulate(
        idealised(8, -1.0, -1.0, space="postln"), theta_of(seed), [step * k for k in range(41)], step=step, method="euler"
    )
    logs = torch.cat([log_energy(x, -torch.eye(8).double()[None])[:, 0] for x in minus.clouds])
    drop = float(relative_drop(logs[:-1], logs[1:]).max())
    assert drop <= 1e-12 if step <= 1 else drop > 0.1


def theta_of(seed: int) -> Tensor:
    return unit_vectors(1, 16, 8, seed)


def test_a_long_step_along_the_tangent_may_fall():
    """The theorem is of normalise(theta + c A): projected first, the same attraction overshoots. Short steps do not."""
    m = psd(0, 8)
    drops = {}
    for step in (0.1, 10.0):
        model = idealised(8, m, m, space="sphere")
        found = simulate(model, theta_of(0), [step * k for k in range(21)], step=step, method="euler")
        logs = torch.cat([log_energy(x, m[None])[:, 0] for x in found.clouds])
        drops[step] = float(relative_drop(logs[:-1], logs[1:]).max())
    assert drops[0.1] <= 1e-12
    assert drops[10.0] > 0.1


def test_every_temperature_climbs_and_the_cluster_is_the_top():
    """E rises along the flow of SA and USA at any step that resolves it, and ends at 1 for temperatures that gather in time."""
    x = unit_vectors(4, 8, 3)
    for kernel in (Softmax(beta=1.0), Unnormalised(beta=1.0, clip=None)):
        found = simulate(idealised(3, kernel=kernel), x, np.linspace(0, 20, 21).tolist(), step=0.2)
        energies = torch.stack([scaled_energy(y, 1.0) for y in found.clouds])
        assert (energies.diff(dim=0) >= -1e-14).all()
        torch.testing.assert_close(energies[-1], torch.ones(4).double(), rtol=0, atol=1e-6)
