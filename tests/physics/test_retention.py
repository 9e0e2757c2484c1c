"""Spectral retention: maps that keep everything, limits that keep one direction, and the numbers of random mixing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emformer.geometry.retention import (
    condition_number,
    condition_of,
    mixing,
    nuclear_norm,
    retention,
    signal_retention,
    singular_values,
)

B, H, N, D = 2, 3, 10, 6


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(normal(*shape)).Q


def close(got: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> bool:
    assert got.dtype == torch.float64
    return bool(((got - expected).abs() < tolerance).all())


def test_singular_values_and_the_nuclear_norm(seed):
    values = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    x = orthogonal(N, 3) * values @ orthogonal(D, 3).T
    assert close(singular_values(x)[:3], values) and close(nuclear_norm(x), 5.5) and close(nuclear_norm(x.mT), 5.5)
    # of a positive semidefinite matrix it is the trace
    w = normal(B, H, N, D)
    assert close(nuclear_norm(w @ w.mT), (w @ w.mT).diagonal(dim1=-2, dim2=-1).sum(-1), 1e-10)


def test_permutations_and_orthogonal_maps_keep_everything(seed):
    x = normal(N, D)
    permutation = torch.eye(N, dtype=torch.float64)[torch.randperm(N)]
    for op in (permutation, orthogonal(N, N)):
        assert close(retention(op, x), 1) and close(condition_number(op), 1)
        found = mixing(op.expand(B, H, N, N), x.expand(B, N, D)).mix
        assert close(found.rho, 1) and close(found.kappa, 1) and close(found.log_kappa, 0) and close(found.erank, N, 1e-9)
        step = signal_retention(x, 3 * op @ x)
        assert close(step.rho, 3) and close(step.shape, 1)


def test_condition_numbers(seed):
    spread = torch.logspace(0, -5, N, dtype=torch.float64)
    op = (orthogonal(N, N) * spread) @ orthogonal(N, N)
    assert close(condition_number(op) / 1e5, 1, 1e-8)
    assert condition_number(op.float()) < torch.inf and condition_number((op @ op).float()) == torch.inf
    singular = op.clone()
    singular[0] = singular[1]
    assert condition_number(singular) == torch.inf and condition_number(normal(N, 1) @ normal(1, N)) == torch.inf
    assert condition_number(torch.zeros(N, N)).isnan()
    # wide and tall have min(n, m) values
    assert close(condition_number(orthogonal(N, D)), 1) and close(condition_number(orthogonal(N, D).mT), 1)
    tolerance = 1e-3
    for least, expected in ((1.1e-3, 1 / 1.1e-3), (0.9e-3, math.inf)):
        assert condition_of(torch.tensor([1.0, 0.5, least], dtype=torch.float64), tolerance) == expected


def test_retention_in_closed_form(seed):
    left, right = orthogonal(N, N), orthogonal(D, D)
    values, factors = torch.rand(D, dtype=torch.float64) + 0.1, torch.rand(D, dtype=torch.float64)
    x = left[:, :D] * values @ right.T
    op = left[:, :D] * factors @ left[:, :D].T
    assert close(retention(op, x), (factors * values).sum() / values.sum())
    assert close(retention(-2 * op, x), 2 * (factors * values).sum() / values.sum())
    assert close(retention(op, 1e3 * x), retention(op, x))
    step = signal_retention(x, x + op @ x)
    new = values * (1 + factors)
    assert close(step.rho, new.sum() / values.sum())
    assert close(step.shape, new.sum() / new.norm() / (values.sum() / values.norm()))
    # a cloud of D equal directions that falls to one
    assert close(signal_retention(left[:, :D], left[:, :1] @ normal(1, D)).shape, D**-0.5)


def test_mixing_is_each_operator_by_itself(seed):
    for dim in (4, N, 25):  # narrower and wider than the prompt
        x, a = normal(B, N, dim), normal(B, H, N, N).softmax(-1)
        eye = torch.eye(N, dtype=torch.float64)
        found = mixing(a, x)
        for op, got in zip((a, eye + a, (eye + a) / 2), found, strict=True):
            assert got.rho.shape == (B, H)
            assert close(got.rho, retention(op, x.unsqueeze(1))) and close(
                got.rho, nuclear_norm(op @ x[:, None]) / nuclear_norm(x)[:, None]
            )
            assert close(got.kappa / condition_number(op), 1, 1e-9) and close(got.log_kappa, got.kappa.log10())
            s = torch.linalg.svdvals(op)
            p = s / s.sum(-1, keepdim=True)
            assert close(got.erank, torch.exp(-(p * p.log()).sum(-1)), 1e-9)
        # the same in a rotated space
        assert close(mixing(a, x @ orthogonal(dim, dim)).mix.rho, found.mix.rho)


def test_long_mixing_keeps_the_stationary_law(seed):
    a, x = (0.1 * normal(N, N)).softmax(-1), normal(N, D)
    stationary = torch.linalg.matrix_power(a, 60)[0]
    assert close(stationary @ a, stationary)
    limit = math.sqrt(N) * (stationary @ x).norm() / nuclear_norm(x)
    assert close(retention(torch.linalg.matrix_power(a, 60), x), limit)
    uniform = torch.full((N, N), 1 / N, dtype=torch.float64)
    assert close(retention(uniform, x), math.sqrt(N) * x.mean(0).norm() / nuclear_norm(x))
    assert condition_number(uniform) == torch.inf and close(mixing(uniform[None, None], x[None]).mix.erank, 1, 1e-9)


def test_random_mixing_of_gaussian_clouds():
    torch.manual_seed(0)
    # logits N(0, 1) on 64 tokens
    pattern, x = normal(200, 1, 64, 64).softmax(-1), normal(200, 64, 128)
    found = mixing(pattern, x)
    assert abs(found.mix.rho.mean() - 0.143) < 0.002
    assert abs(found.residual.rho.mean() - 1.022) < 0.002 and abs(found.residual.kappa.median() - 2.53) < 0.05
    # heavy tailed: the median and the quartiles tell, the mean does not
    low, middle, high = found.mix.log_kappa.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert 2.6 < low < 2.8 and 2.8 < middle < 3.05 and 3.1 < high < 3.4
    assert (found.residual.erank > found.mix.erank).all()
    # three steps of attention on its own cloud, against three steps of a random map
    x = normal(200, 32, 64)
    a = torch.linalg.matrix_power((x @ x.mT / (5 * 8)).softmax(-1), 3)
    rho = retention(a, x)
    assert abs(rho.mean() - 0.0373) < 4 * 0.0031 / math.sqrt(200) and abs(rho.std() - 0.0031) < 5e-4
    assert 7.7e3 < condition_number(a).median() < 20.9e3
    maps = torch.nn.functional.one_hot(torch.randint(0, 32, (200, 32)), 32).double()
    rho = retention(torch.linalg.matrix_power(maps, 3), x)
    assert abs(rho.mean() - 0.620) < 4 * 0.065 / math.sqrt(200)
    assert (condition_number(torch.linalg.matrix_power(maps, 3)) == torch.inf).all()
    assert abs(torch.linalg.matrix_rank(maps).double().mean() / 32 - (1 - (31 / 32) ** 32)) < 0.02
    # n = d: 1.18/n in the limit
    mixed = retention(torch.full((32, 32), 1 / 32, dtype=torch.float64), normal(200, 32, 32))
    assert abs(mixed.mean() * 32 - 1.18) < 0.06


def test_degenerate_clouds():
    torch.manual_seed(0)
    a, x = normal(B, H, N, N).softmax(-1), normal(B, N, D)
    zero, constant = torch.zeros(B, N, D), x[:, :1].expand(B, N, D)
    found = mixing(a, zero)
    assert all(one.rho.isnan().all() and not one.kappa.isnan().any() for one in found)
    assert close(mixing(a, constant).mix.rho, 1) and close(mixing(a, constant).residual.rho, 2)  # rows of a sum to 1
    # equal rows have rank 1: in float32 what else there is of the spectrum is rounding of that type
    equal = a[:, :, :1].float().expand(B, H, N, N) + 1e-7 * torch.rand(B, H, N, N)
    assert (mixing(equal, x).mix.kappa == torch.inf).all() and (mixing(equal.double(), x).mix.kappa < torch.inf).all()
    assert retention(a[0, 0], zero[0]).isnan() and close(retention(0 * a[0, 0], x[0]), 0)
    assert signal_retention(zero, x).rho.isnan().all() and signal_retention(zero, x).shape.isnan().all()
    assert close(signal_retention(x, zero).rho, 0) and signal_retention(x, zero).shape.isnan().all()
    one = mixing(torch.ones(B, H, 1, 1), normal(B, 1, D))
    for got, rho in zip(one, (1, 2, 1), strict=True):
        assert close(got.rho, rho) and close(got.kappa, 1) and close(got.erank, 1)
    blind = mixing(0 * a, x).mix
    assert close(blind.rho, 0) and blind.kappa.isnan().all() and blind.log_kappa.isnan().all() and blind.erank.isnan().all()
    a[0, 1, 2, 3], x[1, 0, 0] = torch.nan, torch.inf
    broken = mixing(a, x)
    for got in broken:
        assert got.rho.isnan().tolist() == [[False, True, False], [True] * 3]
        assert got.kappa.isnan().tolist() == got.erank.isnan().tolist() == [[False, True, False], [False] * 3]
