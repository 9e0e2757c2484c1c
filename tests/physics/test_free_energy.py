"""Free energy, entropy, means, forces: identities that hold to rounding, and closed forms for uniform and sharp attention."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from emformer.geometry.energy import (
    attention_mean,
    attention_range,
    excess,
    forces,
    query_jacobian,
    reaction,
    residual,
    rows,
    scores,
    total_free_energy,
    variational,
    weights,
)

B, H, N, D = 2, 3, 7, 5
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
TABLES = {"full": None, "causal": CAUSAL, "window": CAUSAL & ~CAUSAL.tril(-3)}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cloud (B, N, d), M and F (H, d, d), u (H, d)."""
    return normal(B, N, D), normal(H, D, D) / 2, normal(H, D, D) / 2, normal(H, D)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_excess_is_divergence(seed, beta):
    """F(p) - F* = KL(p | a)/beta for 100 distributions, KL written out."""
    s = normal(1, 1, 1, N).expand(100, 1, N, N) * 2
    for name, table in TABLES.items():
        a = weights(s, table, beta)
        p = torch.distributions.Dirichlet(torch.ones(N).double()).sample((100, 1, N))
        if table is not None:
            p = p * table
        p = p / p.sum(-1, keepdim=True)
        terms = torch.where(p > 0, p * (p / a).log(), 0.0)
        best = rows(s, table, beta).free_energy
        close(variational(p, s, beta) - best, terms.sum(-1) / beta)
        close(excess(p, s, table, beta), terms.sum(-1) / beta)
        close(variational(a, s, beta), best)
        assert (excess(p, s, table, beta) > 0).sum() >= 100 * (N - 1), name  # the first causal query has no choice
        assert excess(a, s, table, beta).abs().max() < 1e-12


@pytest.mark.parametrize("name", TABLES)
def test_derivatives_in_beta_and_scores(seed, name):
    """dF*/dbeta = H/beta^2, dH/dbeta = -beta Var_a(s), dF*/ds = -a."""
    table = TABLES[name]
    s = normal(B, H, N, N)
    for value in (0.3, 1.0, 4.0):
        beta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        a = weights(s, table, value)
        found = rows(s, table, beta)
        (slope,) = torch.autograd.grad(found.free_energy.sum(), beta, retain_graph=True)
        close(slope, found.entropy.sum().detach() / value**2, 1e-8)
        (fall,) = torch.autograd.grad(found.entropy.sum(), beta)
        mean = (a * s).sum(-1, keepdim=True)
        close(fall, -value * (a * (s - mean).square()).sum(), 1e-8)
        movable = s.clone().requires_grad_()
        (pull,) = torch.autograd.grad(rows(movable, table, value).free_energy.sum(), movable)
        close(pull, -a, 1e-12)


@pytest.mark.parametrize("name", TABLES)
def test_rows_against_definitions(seed, name):
    table, beta = TABLES[name], 1.7
    s = normal(B, H, N, N) * 3
    found, a = rows(s, table, beta), weights(s, table, beta)
    seen = torch.ones(N, N).double() if table is None else table.double()
    n = seen.sum(-1)
    close(a.sum(-1), torch.ones(B, H, N).double())
    assert not a[..., ~seen.bool()].any()
    plain = -torch.where(a > 0, a * a.clamp(min=1e-300).log(), 0.0).sum(-1)
    close(found.entropy, plain)
    close(found.entropy_norm, torch.where(n > 1, plain / n.log(), torch.nan))
    close(found.divergence, n.log() - plain)
    close(found.support, plain.exp())
    close(found.ess, 1 / a.square().sum(-1))
    sums = ((beta * s).exp() * seen).sum(-1)
    close(found.free_energy, -sums.log() / beta)
    close(found.free_energy0, -(sums / n).log() / beta)
    best = a.sort(-1, descending=True).values
    close(found.gap, torch.where(n > 1, (best[..., 0] / best[..., 1]).log(), torch.nan))
    top = s.masked_fill(~seen.bool(), -torch.inf).amax(-1)
    mean = (s * seen).sum(-1) / n
    slack = 1e-12
    assert (found.free_energy <= -top + slack).all()
    assert (found.free_energy >= -top - n.log() / beta - slack).all()
    assert (found.free_energy0 >= -top - slack).all()
    assert (found.free_energy0 <= -mean + slack).all()
    assert (found.ess <= found.support + slack).all()
    assert (found.ess >= 1 - slack).all()


def test_limits_of_temperature():
    torch.manual_seed(0)
    s = normal(B, H, N, N)
    s[..., 3] = s[..., 4] = s.amax(-1) + 1  # two keys share the maximum
    cold = rows(s, None, 1e6)
    close(cold.entropy, torch.full((B, H, N), math.log(2), dtype=torch.float64))
    close(cold.ess, torch.full((B, H, N), 2.0, dtype=torch.float64))
    assert not cold.gap.any()
    warm = rows(s, CAUSAL, 1e-9)
    close(warm.entropy_norm[..., 1:], torch.ones(B, H, N - 1).double(), 1e-9)
    assert warm.entropy_norm[..., 0].isnan().all()
    uniform = rows(torch.full((1, 1, N, N), 1e4), CAUSAL)
    n = CAUSAL.sum(-1).double()
    close(uniform.support[0, 0], n)
    close(uniform.ess[0, 0], n)
    assert uniform.divergence.abs().max() < 1e-12
    assert (uniform.entropy <= n.log()).all()
    close(uniform.free_energy0, torch.full((1, 1, N), -1e4, dtype=torch.float64), 1e-12)


def test_action_and_reaction_are_the_gradient(seed):
    """-grad G = sum_h A X M^T + A^T X M + (A^T 1) u^T, full and causal, and in float32 the same numbers in float64."""
    x, form, _, functional = case()
    for table in TABLES.values():
        for u in (None, functional):
            for beta in (1.0, 2.5):
                point = x.clone().requires_grad_()
                (slope,) = torch.autograd.grad(total_free_energy(point, form, table, beta, u).sum(), point)
                a = weights(scores(x, form, u), table, beta)
                action, back = forces(a, x, form, u)
                close((action + back).sum(1), -slope)
    close(
        total_free_energy(x, form, CAUSAL),
        rows(torch.einsum("bnd,hde,bme->bhnm", x, form, x), CAUSAL).free_energy.sum((1, 2)),
    )


def test_reaction_against_loops(seed):
    x, form, content, functional = case()
    for u in (None, functional):
        a = weights(scores(x, form, u), CAUSAL)
        found = reaction(a, x, form, content, u)
        for b in range(B):
            for h in range(H):
                p, rho, v = (torch.zeros(N, D).double() for _ in range(3))
                for i in range(N):
                    for j in range(N):
                        p[i] += a[b, h, i, j] * (form[h] @ x[b, j])
                        v[i] += a[b, h, i, j] * (content[h] @ x[b, j])
                        rho[i] += a[b, h, j, i] * (form[h].T @ x[b, j] + (0 if u is None else u[h]))

                def cos(one: Tensor, other: Tensor) -> Tensor:
                    return (one * other).sum() / (one.norm() * other.norm())

                close(found.ratio[b, h], rho.norm() / p.norm())
                close(found.cos_action[b, h], cos(v, p))
                close(found.cos_descent[b, h], cos(v, p + rho))
                close(found.cos_reaction[b, h], cos(p, rho))


def test_reaction_where_it_is_known():
    """F = M: the update is the action. Symmetric M under one relevance for all pairs: the reaction is the action."""
    torch.manual_seed(0)
    x, form, content, _ = case()
    found = reaction(weights(scores(x, form), CAUSAL), x, form, 3 * form)
    close(found.cos_action, torch.ones(B, H).double())
    close(reaction(weights(scores(x, form)), x, form, -form).cos_action, -torch.ones(B, H).double())
    form = form + form.mT
    s = normal(B, H, N, N)
    even = (s + s.mT).exp()
    for _ in range(2000):  # D K D is symmetric, and doubly stochastic for the right D
        scale = even.sum(-1).rsqrt()
        even = even * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    action, back = forces(even, x, form)
    close(action, back)
    found = reaction(even, x, form, content)
    close(found.ratio, torch.ones(B, H).double())
    close(found.cos_reaction, torch.ones(B, H).double())
    close(found.cos_action, found.cos_descent)


def test_reaction_at_initialisation():
    """Unit-score operators on normed tokens: a ratio of 1.0 to 1.1, a cosine around 0 with sd 1/sqrt(d PR)."""
    torch.manual_seed(0)
    n, d, heads = 48, 64, 24
    y = torch.nn.functional.layer_norm(normal(6, n, d), (d,))
    form, content = normal(heads, d, d) / d, normal(heads, d, d) / math.sqrt(d)
    a = weights(scores(y, form))
    found = reaction(a, y, form, content)
    assert 0.95 < found.ratio.mean() < 1.15
    values = torch.linalg.svdvals(attention_mean(a, y)).square()
    ratio = values.sum(-1).square() / values.square().sum(-1)
    assert found.cos_action.mean().abs() < 0.02
    assert found.cos_action.std() == pytest.approx(float((d * ratio).rsqrt().mean()), rel=0.15)


def test_mean_minimises_and_residual_is_the_minimum(seed):
    """J(m + delta) - J(m) = |delta|^2 with |delta| = 1; J(m) = sum a |y|^2 - |m|^2."""
    y, form, content, _ = case()
    a = weights(scores(y, form), CAUSAL)
    m = attention_mean(a, y)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (a * (z.unsqueeze(3) - y.unsqueeze(2)).square().sum(-1)).sum(-1)

    cloud = y.unsqueeze(1).expand(B, H, N, D)
    for _ in range(5):
        delta = torch.nn.functional.normalize(normal(B, H, N, D), dim=-1)
        close(loss(m + delta, cloud) - loss(m, cloud), torch.ones(B, H, N).double())
    close(residual(a, y), loss(m, cloud))
    close(residual(a, y), (a * y.square().sum(-1)[:, None, None]).sum(-1) - m.square().sum(-1))
    mapped = torch.einsum("hde,bne->bhnd", content, y)
    close(residual(a, y, content), loss(a @ mapped, mapped))


def test_residual_of_sharp_attention_keeps_its_digits():
    """Weights 1 - 2t, t and t on three points of size 1e6 and distance .4, against exact fractions."""
    points = [1e6 / 3, 1e6 / 3 + 0.37, 1e6 / 3 - 0.41]
    y = torch.tensor([points, [p / 7 for p in points]], dtype=torch.float64).mT.unsqueeze(0)
    for t in (2.0**-10, 2.0**-30, 2.0**-50):
        row = torch.tensor([1 - 2 * t, t, t], dtype=torch.float64)
        columns = [([Fraction(x) for x in column], [Fraction(w) for w in row.tolist()]) for column in y[0].mT.tolist()]
        exact = sum(
            sum(w * x * x for x, w in zip(xs, ws, strict=True)) - sum(w * x for x, w in zip(xs, ws, strict=True)) ** 2
            for xs, ws in columns
        )
        found = residual(row.expand(1, 1, 3, 3), y)
        assert found[0, 0, 0] == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_query_jacobian(seed, beta):
    """beta F Cov M^T against autograd in the query with keys frozen, and against its bound."""
    y, form, content, functional = case()

    def gamma(query: Tensor, h: int, keys: Tensor) -> Tensor:
        a = (beta * (keys @ (form[h].T @ query + functional[h]))).softmax(-1)
        return content[h] @ (a @ keys)

    a = weights(scores(y, form, functional), CAUSAL, beta)
    found = query_jacobian(a, y, form, content, beta)
    for b, h, i in [(0, 0, 0), (0, 1, 4), (1, 2, 6)]:
        exact = torch.func.jacrev(gamma)(y[b, i], h, y[b, : i + 1])
        close(found[b, h, i], exact)
    close(query_jacobian(a[:, :, 2:4], y, form, content, beta), found[:, :, 2:4], 1e-12)


def test_query_jacobian_bound():
    torch.manual_seed(0)
    for beta in (1.0, 2.0):
        y, form, content = normal(1000, N, D), normal(1, D, D), normal(1, D, D)
        a = weights(scores(y, form), None, beta)
        norms = torch.linalg.matrix_norm(query_jacobian(a, y, form, content, beta), ord=2)
        sizes = torch.linalg.matrix_norm(form, ord=2) * torch.linalg.matrix_norm(content, ord=2)
        assert (norms <= beta * sizes * y.norm(dim=-1).amax(-1).square().view(-1, 1, 1)).all()


def test_range_of_uniform_attention_is_its_null():
    n = 20
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    a = causal.double() / causal.double().sum(-1, keepdim=True)
    found = attention_range(a.expand(1, 1, n, n), causal)
    i = torch.arange(1, n + 1).double()
    close(found.range[0, 0], (i - 1) / 2)
    for ratio in (found.normalised[0, 0], found.without_sink[0, 0]):
        assert ratio[:7].isnan().all(), "the first seven queries are not compared"
        close(ratio[7:], torch.ones(n - 7).double())
    full = attention_range(torch.full((1, 1, n, n), 1 / n))
    close(full.normalised, torch.ones(1, 1, n).double(), 1e-6)  # 1/n in float32
    near = attention_range(torch.eye(n).expand(1, 1, n, n), causal)
    assert not near.range.any()
    assert not near.normalised[..., 7:].any()
    sink = torch.zeros(1, 1, n, n, dtype=torch.float64)
    sink[..., 0] = 1
    found = attention_range(sink, causal)
    close(found.normalised[0, 0, 7:], torch.full((n - 7,), 2.0, dtype=torch.float64))
    assert found.without_sink.isnan().all()
    half = attention_range((sink + a) / 2, causal)
    close(half.without_sink[0, 0, 7:], torch.ones(n - 7).double())
    close(half.normalised[0, 0, 7:], torch.full((n - 7,), 1.5, dtype=torch.float64))


def test_rows_do_not_see_the_future(seed):
    """Bit for bit: a changed token changes no query before it."""
    y, form, _, functional = case()
    e = 4
    other = y.clone()
    other[:, e] += normal(B, D)
    found = []
    for cloud in (y, other):
        s = scores(cloud, form, functional)
        a = weights(s, CAUSAL)
        found.append([*rows(s, CAUSAL), *attention_range(a, CAUSAL), residual(a, cloud), attention_mean(a, cloud)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one[:, :, :e].nan_to_num(9), two[:, :, :e].nan_to_num(9))
    for one, two in zip(found[0][:8], found[1][:8], strict=True):
        assert not torch.equal(one[:, :, e:], two[:, :, e:])


def test_weights_of_any_kernel_are_scores():
    """log a at beta = 1 gives the entropies and gaps of a, zeros included."""
    torch.manual_seed(0)
    a = torch.rand(B, H, N, N, dtype=torch.float64)
    a[..., 2] = 0
    a = a / a.sum(-1, keepdim=True)
    found = rows(a.log())
    close(found.entropy, torch.special.entr(a).sum(-1))
    close(found.ess, 1 / a.square().sum(-1))
    close(found.free_energy, torch.zeros(B, H, N).double())
    one = torch.eye(N).expand(1, 1, N, N)
    hard = rows(one.log())
    assert not hard.entropy.any()
    assert hard.gap.isnan().all(), "nothing is comparable with a weight 0"
    assert excess(torch.full((1, 1, N, N), 1 / N), one.log()).isnan().all()
    assert variational(torch.full((1, 1, N, N), 1 / N), one.log()).isnan().all()
    close(excess(one.double(), one.log()), torch.zeros(1, 1, N).double())


def test_degenerate_clouds_are_finite_or_nan():
    torch.manual_seed(0)
    _, form, content, functional = case()
    zero, constant = torch.zeros(B, N, D), torch.full((B, N, D), 3.0)
    double = normal(B, N, D)
    double[:, 1] = double[:, 0]
    for y in (zero, constant, double, double * 1e3, double.float(), normal(B, 1, D)):
        n = y.shape[1]
        table = CAUSAL[:n, :n]
        s = scores(y, form)
        a = weights(s, table)
        known = rows(s, table)
        for values in (*known, *attention_range(a, table), residual(a, y), *reaction(a, y, form, content, functional)):
            assert values.dtype == torch.float64
            assert not values.isinf().any()
        assert known.entropy_norm.isnan().sum() == B * H, "the first query alone has no choice"
        assert known.free_energy0.isfinite().all()
        assert (residual(a, y) >= 0).all()
    assert reaction(weights(scores(zero, form)), zero, form, content).ratio.isnan().all()
    assert reaction(weights(scores(zero, form)), zero, form, content).cos_action.isnan().all()
    close(rows(scores(zero, form), CAUSAL).support[0, 0], torch.arange(1, N + 1).double())
    lonely = rows(normal(B, H, 1, 1))
    assert not lonely.entropy.any()
    assert lonely.gap.isnan().all()
    broken = normal(1, 1, N, N)
    broken[0, 0, 2, 1] = torch.inf
    broken[0, 0, 5, 1] = torch.nan
    broken[0, 0, 6] = -torch.inf
    for values in rows(broken):
        assert values.isnan()[0, 0].nonzero().flatten().tolist() == [2, 5, 6]


def test_mistakes():
    s = normal(1, 1, N, N)
    table = CAUSAL & ~torch.eye(N, dtype=torch.bool)
    for call in (rows, weights, lambda s, table: excess(s.softmax(-1), s, table)):
        with pytest.raises(ValueError, match="sees no key"):
            call(s, table)
