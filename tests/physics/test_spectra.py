"""Indices of single operators and of pairs: closed forms, nulls, invariances, and a search for P that knows no theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from emformer.geometry.spectra import (
    asymmetry,
    attraction,
    compatibility,
    compatibility_sphere,
    composition,
    effective_rank,
    effective_rank_of,
    eigenvalues,
    overlap,
    singular_values,
    stable_rank,
    stable_rank_of,
    thin_singular_values,
)

D = 8
EYE = torch.eye(D, dtype=torch.float64)
SINGLE = {
    "asymmetry": asymmetry,
    "attraction": attraction,
    "effective_rank": effective_rank,
    "stable_rank": stable_rank,
}
PAIRS = {
    "compatibility_sphere": compatibility_sphere,
    "compatibility": lambda f, m: compatibility(f, m, tolerance=1e-9).delta,
    "composition": lambda f, m: composition(m, f),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(normal(*shape)).Q


def semidefinite(rank: int, *batch: int) -> Tensor:
    factor = normal(*batch, D, rank)
    return factor @ factor.mT


def conditioned(condition: float, dim: int = D) -> Tensor:
    """A random matrix with singular values spread evenly in log over [1/condition, 1]."""
    values = torch.logspace(-math.log10(condition), 0, dim, dtype=torch.float64)
    return (orthogonal(dim, dim) * values) @ orthogonal(dim, dim)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def size(a: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a)


def close(got: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> bool:
    assert got.dtype == torch.float64
    return bool(((got - expected).abs() < tolerance).all())


# one operator


def test_asymmetry_of_symmetric_skew_and_mixed(seed):
    s, k = normal(D, D), normal(D, D)
    s, k = s + s.T, k - k.T
    assert close(asymmetry(s), 0) and close(asymmetry(k), 1)
    assert close(asymmetry(s / size(s) + 2 * k / size(k)), 0.8)
    assert close(asymmetry(matrix([0, 1], [0, 0])), 0.5)
    assert asymmetry(0 * EYE).isnan()


def test_attraction_of_definite_indefinite_and_skew(seed):
    p, k = semidefinite(3), normal(D, D)
    k = k - k.T
    assert close(attraction(p), 1) and close(attraction(-p), 0)
    assert close(attraction(p + 100 * k), 1, 1e-10)  # S alone counts
    assert close(attraction(matrix([3, 5], [-5, -1])), 0.75)
    assert attraction(k).isnan() and attraction(0 * k).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attraction_takes_rounding_for_no_symmetric_part(seed, dtype):
    u, v = normal(2, D, 3).to(dtype)
    product = torch.cat([u, -v], 1) @ torch.cat([v, u], 1).T  # skew, but for the order of its sums
    assert attraction(product + 1e-7 * torch.finfo(dtype).eps * torch.eye(D, dtype=dtype)).isnan()
    assert not attraction(product + 0.01 * torch.eye(D, dtype=dtype)).isnan()


def test_nulls_of_iid_entries(seed):
    w, wide = normal(400, D, D), normal(4, 256, 256)
    a, pi = asymmetry(w), attraction(w)
    assert abs(a.mean() - (D - 1) / (2 * D)) < 4 * a.std() / 20
    assert abs(pi.mean() - 0.5) < 4 * pi.std() / 20
    # the quarter circle law sqrt(4 - s^2)/pi on [0, 2]: E s^2 = 1, max s^2 = 4, and exp H by the midpoint rule
    s = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 50_000
    density = (4 - s**2).sqrt() / math.pi / 50_000
    mean = (density * s).sum()
    expected = mean * torch.exp(-(density * s * s.log()).sum() / mean)
    assert abs(expected - 0.805) < 5e-4
    assert close(effective_rank(wide) / 256, expected, 0.01)
    assert close(stable_rank(wide) / 256, 0.25, 0.03)


def test_ranks_of_a_projector_are_its_rank(seed):
    for rank in (1, 3, D):
        basis = orthogonal(D, D)[:, :rank]
        for value in (effective_rank(5 * basis @ basis.T), stable_rank(5 * basis @ basis.T)):
            assert close(value, rank)


def test_ranks_in_closed_form(seed):
    w = (orthogonal(D, D)[:, :3] * torch.tensor([2.0, 1.0, 1.0])) @ orthogonal(D, D)[:3]
    assert close(effective_rank(w), 2**1.5) and close(stable_rank(w), 1.5)
    w = normal(50, D, D)
    assert (stable_rank(w) >= 1).all() and (stable_rank(w) <= effective_rank(w)).all() and (effective_rank(w) <= D).all()
    assert effective_rank(0 * w[0]).isnan() and stable_rank(0 * w[0]).isnan()


def test_thin_singular_values_are_those_of_the_product(seed):
    left, right = normal(2, 5, 3, D), normal(2, 5, 3, D)
    dense, thin = singular_values(left.mT @ right), thin_singular_values(left, right)
    assert thin.shape == (2, 5, 3) and close(thin, dense[..., :3]) and close(dense[..., 3:], 0)
    assert close(effective_rank_of(thin), effective_rank(left.mT @ right))
    assert close(stable_rank_of(thin), stable_rank(left.mT @ right))


def test_eigenvalues_are_complex_and_ordered(seed):
    cos, sin = 2 * math.cos(0.3), 2 * math.sin(0.3)
    values = eigenvalues(torch.block_diag(matrix([1.0]), matrix([cos, -sin], [sin, cos]), matrix([-3.0])))
    expected = torch.tensor([-3, complex(cos, sin), complex(cos, -sin), 1], dtype=torch.complex128)
    assert values.dtype == torch.complex128 and (values - expected).abs().max() < 1e-12
    w = normal(4, D, D)
    assert (eigenvalues(w).abs().diff(dim=-1) <= 1e-12).all()
    assert (eigenvalues(w).sum(-1) - torch.einsum("bii->b", w)).abs().max() < 1e-12


@pytest.mark.parametrize("name", SINGLE)
def test_an_index_knows_no_scale_and_no_basis(seed, name):
    index, w, o = SINGLE[name], normal(3, D, D), orthogonal(D, D)
    assert close(index(-7 * w) if name != "attraction" else 1 - index(-7 * w), index(w), 1e-10)
    assert close(index(1e-9 * w), index(w), 1e-10)
    assert close(index(o @ w @ o.T), index(w), 1e-10)


# pairs


def test_overlap_of_planes_at_an_angle():
    e = EYE[:4]
    turned = torch.stack([math.cos(0.4) * e[0] + math.sin(0.4) * e[2], e[1]])
    assert close(overlap(e[:2], turned), (1 + math.cos(0.4) ** 2) / 2)
    assert close(overlap(e[:2], e[2:]), 0)
    assert close(overlap(e[:2], e[:1]), 1) and close(overlap(e[:1], e[:3]), 1)
    assert overlap(0 * e, e).isnan()


def test_overlap_sees_spaces_and_not_their_bases(seed):
    a, b = normal(5, 2, D), normal(5, 3, D)
    value = overlap(a, b)
    assert close(overlap(normal(5, 2, 2) @ a, b), value, 1e-10)
    assert close(overlap(b, torch.cat([a, a[:, :1]], 1)), value, 1e-10)  # a row twice is no dimension
    o = orthogonal(D, D)
    assert close(overlap(a @ o, b @ o), value, 1e-10)
    many = overlap(normal(1000, 2, D), normal(1000, 3, D))
    assert abs(many.mean() - 3 / D) < 4 * many.std() / 1000**0.5


def test_composition_in_closed_form(seed):
    u, v, x = orthogonal(D, 3).T
    assert close(composition(u[:, None] * v, v[:, None] * x), 1)
    assert close(composition(u[:, None] * v, x[:, None] * v), 0)
    assert close(composition(EYE, normal(3, D, D)), D**-0.5)
    for rank in (1, 3, D):
        value = composition(normal(2000, D, rank) @ normal(2000, rank, D), normal(2000, D, D)).square()
        assert abs(value.mean() - 1 / D) < 4 * value.std() / 2000**0.5


def test_compatibility_on_the_sphere(seed):
    f, m = normal(D, D), normal(D, D)
    assert close(compatibility_sphere(-3 * m, m), 0)
    assert close(compatibility_sphere(f - (f * m).sum() / (m * m).sum() * m, m), 1)
    many = compatibility_sphere(normal(4000, D, D), normal(4000, D, D))
    assert abs(many.mean() - (1 - 1 / D**2)) < 4 * many.std() / 4000**0.5
    assert compatibility_sphere(f, 0 * m).isnan()


def to_the_cone(f: Tensor) -> Tensor:
    """|F - P|_F / |F|_F for the nearest P >= 0: the skew part and the negative eigenvalues are lost."""
    negative = torch.linalg.eigvalsh((f + f.mT) / 2).clamp(max=0)
    return (size((f - f.mT) / 2).square() + negative.square().sum(-1)).sqrt() / size(f)


def test_compatibility_with_the_identity_is_the_distance_to_the_cone(seed):
    f = normal(6, D, D)
    delta, error = compatibility(f, 3 * EYE)
    assert close(delta, to_the_cone(f)) and (error < 1e-10).all()


def test_compatibility_with_an_orthogonal_form(seed):
    f, q = normal(6, D, D), orthogonal(6, D, D)
    delta, error = compatibility(f, 0.1 * q)
    assert close(delta, to_the_cone(f @ q.mT)) and (error < 1e-10).all()


@pytest.mark.parametrize("condition", [1, 100, 1e6])
@pytest.mark.parametrize("rank", [2, D])
def test_compatibility_of_a_gradient_is_zero(seed, rank, condition):
    m, p = conditioned(condition), semidefinite(rank)
    assert close(compatibility(p @ m, m).delta, 0, 1e-8)
    assert compatibility(m @ p, m).delta > 1e-2 or condition == 1  # P stands on the left


def test_compatibility_at_its_ends(seed):
    m, k = conditioned(10), normal(D, D)
    assert close(compatibility(-EYE, EYE).delta, 1) and close(compatibility(-m, m, tolerance=1e-9).delta, 1, 1e-9)
    hopeless = (k - k.T - semidefinite(D)) @ torch.linalg.inv(m).T  # sym(F M^T) < 0: every P > 0 makes it worse
    assert close(compatibility(hopeless, m, tolerance=1e-9).delta, 1, 1e-9)
    assert compatibility(hopeless + 0.5 * m * size(hopeless), m).delta < 0.99
    assert close(compatibility(EYE, 0 * EYE).delta, 1)
    assert compatibility(0 * EYE, EYE).delta.isnan() and compatibility(0 * EYE, EYE).error.isnan()


def test_compatibility_where_the_symmetric_solution_is_semidefinite():
    """F = P M + N with N M^T skew, for which no symmetric P is better: delta = |N|/|F|, and one step proves it."""
    m = matrix([1, 0], [0, 3])
    n = matrix([0, 1], [-3, 0])
    p = matrix([2, 1], [1, 2])
    assert close(n @ m.T + m @ n.T, 0)
    delta, error = compatibility(p @ m + n, m, limit=0)
    assert close(delta, size(n) / size(p @ m + n)) and close(error, 0)


def search(f: Tensor, m: Tensor) -> Tensor:
    """The least |F - C C^T M|/|F| that a quasi-Newton search over C finds, from three starts."""
    best = []
    for _ in range(3):
        c = normal(*f.shape).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [c], max_iter=4000, history_size=50, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def loss(c: Tensor = c, optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = size(f - c @ c.T @ m).square()
            value.backward()
            return value

        optimiser.step(loss)
        best.append(loss().detach())
    return torch.stack(best).min().sqrt() / size(f)


def test_compatibility_is_what_a_search_finds(seed):
    f, m = normal(5, 5), normal(5, 5)
    delta, error = compatibility(f, m, tolerance=1e-9)
    assert 0 <= error <= 1e-9
    assert 0.1 < delta < 0.99
    assert close(delta, search(f, m), 1e-6)


def test_a_form_that_kills_a_direction():
    """M = diag(1, 0): a is fitted if positive, c always though only in the limit, b and e never."""
    m = matrix([1, 0], [0, 0])
    for a in (2.0, 0.0, -2.0):
        f = matrix([a, 0.5], [3, 0.7])
        delta, error = compatibility(f, m)
        assert close(delta, math.sqrt(min(a, 0) ** 2 + 0.5**2 + 0.7**2) / size(f)) and close(error, 0)
        for epsilon in (1e-3, 1e-6):  # these P come as near as one likes, and none comes nearer
            p = matrix([max(a, 0) + epsilon, 3], [3, 9 / epsilon])
            assert torch.linalg.eigvalsh(p).min() > -1e-9
            assert 0 <= size(f - p @ m) / size(f) - delta < epsilon


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_form_of_low_rank(seed, dtype):
    """With M = U S V^T thin: the part of F outside range(V) is lost, F V behind U is free, and U^T F V meets S alone."""
    rank = 3
    u, v = normal(D, rank).to(dtype), normal(D, rank).to(dtype)
    f, m = normal(D, D).to(dtype), u @ v.T
    p = semidefinite(D).to(dtype)
    assert close(compatibility(p @ m, m).delta, 0, 1e-8 if dtype == torch.float64 else 1e-4)
    w, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    w, s, vh = w[:, :rank], s[:rank], vh[:rank]
    outside, inside = size(f.double() - f.double() @ vh.T @ vh), w.T @ f.double() @ vh.T
    least = compatibility(inside, s.diag(), tolerance=1e-9).delta * size(inside)
    expected = torch.hypot(outside, least) / size(f.double())
    assert close(compatibility(f, m, tolerance=1e-9).delta, expected, 1e-8 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("limit", [0, 3, 10, 30])
def test_the_error_is_honest(seed, limit):
    """Wherever the iteration stops, delta lies between the bounds; a good run knows it to 1e-9."""
    f, m = normal(4, D, D), torch.stack([conditioned(c) for c in (1, 10, 1e3, 1e5)])
    exact = compatibility(f, m, tolerance=1e-9, limit=20_000)
    assert (exact.error < 1e-9).all()
    delta, error = compatibility(f, m, tolerance=0.0, limit=limit)
    assert (exact.delta <= delta + 1e-9).all() and (delta - error <= exact.delta + 1e-9).all()
    if limit == 3:
        assert (error > 1e-6).any()


@pytest.mark.parametrize("condition", [30, 1e4, 1e7])
def test_the_certificate_is_reached_at_the_width_of_a_model(condition):
    torch.manual_seed(0)
    _, error = compatibility(normal(2, 48, 48), conditioned(condition, 48))
    assert (error <= 1e-4).all()


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_knows_no_scale_and_no_basis(seed, name):
    index, f, m, o = PAIRS[name], normal(3, D, D), normal(3, D, D), orthogonal(D, D)
    value = index(f, m)
    assert close(index(1e-6 * f, m), value, 1e-8) and close(index(f, 1e6 * m), value, 1e-8)
    assert close(index(o @ f @ o.T, o @ m @ o.T), value, 1e-8)
    if name != "composition":
        assert close(index(f @ o, m @ o), value, 1e-8) and close(index(o @ f, o @ m), value, 1e-8)
        assert not close(index(o @ f, m), value, 1e-3)


@pytest.mark.parametrize("name", [*SINGLE, *PAIRS])
def test_single_precision_and_batches(seed, name):
    """(2, 3, d, d) goes head by head, float32 comes back in float64, and a pair broadcasts."""
    w, m = normal(2, 3, D, D), normal(3, D, D)
    index = SINGLE.get(name) or (lambda a: PAIRS[name](a, m.to(a.dtype)))
    value = index(w)
    assert value.shape == (2, 3) and close(index(w.float()), value, 1e-4)
    one = SINGLE[name](w[1, 2]) if name in SINGLE else PAIRS[name](w[1, 2], m[2])
    assert one.shape == () and close(value[1, 2], one, 1e-8)


def test_an_empty_batch():
    delta, error = compatibility(normal(0, D, D), normal(0, D, D))
    assert delta.shape == error.shape == asymmetry(normal(0, D, D)).shape == (0,)
