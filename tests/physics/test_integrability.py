"""The integrability defect on fields that are gradients and on fields that are not, and energies that a flow climbs or not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.linalg import null_space
from torch import Tensor

from emformer.geometry.integrability import (
    alignment,
    best_alignment,
    defect,
    dissipation_slope,
    energy,
    energy_gradient,
    estimated_defect,
    exact_defect,
    jacobian,
    log_energy,
    project,
    relative_drop,
    variation_ratio,
    violations,
)

N, D, BETA = 12, 6, 1.5
EYE = torch.eye(D, dtype=torch.float64).unsqueeze(0)
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
Field = Callable[[Tensor], Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(normal(*shape), dim=-1)


def symmetric(heads: int = 1, scale: float = 1.0) -> Tensor:
    w = normal(heads, D, D) * scale
    return (w + w.mT) / 2


def near(found: Tensor, expected: float, tolerance: float) -> bool:
    return bool(((found - expected).abs() < tolerance).all())


def attention(form: Tensor, content: Tensor, kind: str = "softmax", beta: float = BETA) -> Field:
    """v_i = sum_h F_h sum_j a_ij x_j; `kind` is softmax, causal, plain (e^{beta s}/N) or sinkhorn."""

    def field(x: Tensor) -> Tensor:
        s = beta * torch.einsum("bnd,hde,bme->bhnm", x, form, x)
        if kind == "causal":
            s = s.masked_fill(~CAUSAL, -torch.inf)
        if kind == "sinkhorn":
            for _ in range(60):
                s = s.log_softmax(-1).log_softmax(-2)
        a = s.softmax(-1) if kind in ("softmax", "causal") else s.exp() / (1 if kind == "sinkhorn" else x.shape[1])
        return ((a @ x.unsqueeze(1)) @ content.mT).sum(1)

    return field


def weighted(form: Tensor) -> Field:
    """Softmax attention with F = M, each token times its own partition sum Z_i."""
    field = attention(form, form)

    def scaled(x: Tensor) -> Tensor:
        z = (BETA * x @ form[0] @ x.mT).exp().sum(-1, keepdim=True)
        return z * field(x)

    return scaled


def test_gradients_have_no_defect(seed):
    m, heads = symmetric(scale=0.7), symmetric(3)
    x = tokens(1, N, D)
    fields = {
        "unnormalised, M = F = I": attention(EYE, EYE, "plain"),
        "unnormalised, symmetric F = M": attention(m, m, "plain"),
        "sum of such heads": attention(heads, heads, "plain"),
        "Sinkhorn": attention(m, m, "sinkhorn"),
        "softmax times Z": weighted(m),
    }
    for name, field in fields.items():
        for space in ("ambient", "sphere"):
            assert exact_defect(field, x, space) < 1e-20, (name, space)
            assert estimated_defect(field, x, space, probes=4).value < 1e-20, (name, space)


def test_random_jacobian_is_generic(seed):
    assert float(defect(normal(200, 200))) == pytest.approx(0.5, abs=0.015)


def test_causal_attention_is_no_gradient(seed):
    assert exact_defect(attention(EYE, EYE, "causal"), tokens(1, N, D), "sphere") > 0.1


def test_hutchinson_near_exact(seed):
    m, form, content = symmetric(), normal(1, D, D), normal(1, D, D)
    x = tokens(1, N, D)
    for field in (attention(EYE, EYE, "causal"), attention(m, content), attention(form, form, "plain")):
        for space in ("ambient", "sphere", "centred"):
            found = estimated_defect(field, x, space, probes=256, seed=seed, chunk=64)
            assert ((found.value - exact_defect(field, x, space)).abs() < 0.03).all()


def test_calibration():
    """Means over ten clouds and operators (n = 12, d = 6, beta = 1.5; entries of sd .4), each as far as single draws scatter."""
    torch.manual_seed(0)
    expected = {
        "softmax I": ((0.008, 0.003), (0.007, 0.003)),
        "softmax F = M": ((0.012, 0.006), (0.009, 0.005)),
        "softmax heads": ((0.012, 0.008), (0.012, 0.008)),
        "F = P M": ((0.16, 0.05), (0.16, 0.06)),
        "causal I": ((0.07, 0.015), (0.35, 0.03)),
        "general F = M": ((0.27, 0.05), (0.27, 0.06)),
        "symmetric, F free": ((0.39, 0.08), (0.35, 0.06)),
        "general, F free": ((0.44, 0.05), (0.38, 0.05)),
    }
    found: dict[str, list[list[Tensor]]] = {name: [] for name in expected}
    for _ in range(10):
        x = tokens(1, N, D)
        m, heads = symmetric(scale=0.4), symmetric(3, 0.4)
        form, content = normal(1, D, D) * 0.4, normal(1, D, D) * 0.4
        root = normal(1, D, D)
        fields = {
            "softmax I": attention(EYE, EYE),
            "softmax F = M": attention(m, m),
            "softmax heads": attention(heads, heads),
            "F = P M": attention(m, (root @ root.mT / D + 0.1 * EYE) @ m, "plain"),
            "causal I": attention(EYE, EYE, "causal"),
            "general F = M": attention(form, form, "plain"),
            "symmetric, F free": attention(m, content, "plain"),
            "general, F free": attention(form, content),
        }
        for name, field in fields.items():
            found[name].append([exact_defect(field, x, space)[0] for space in ("ambient", "sphere")])
    for name, bounds in expected.items():
        means = torch.tensor(found[name]).mean(0)
        for mean, (value, slack) in zip(means, bounds, strict=True):
            assert float(mean) == pytest.approx(value, abs=slack), name


def test_a_preconditioner_twists_the_metric(seed):
    """F = P M: P^{-1} v is a gradient, on the sphere only if P^{-1} acts before the projection."""
    m, root = symmetric(), normal(1, D, D)
    p = root @ root.mT / D + 0.1 * EYE
    field, inverse = attention(m, p @ m, "plain"), torch.linalg.inv(p[0])
    x = tokens(1, N, D)
    assert exact_defect(field, x, "ambient") > 0.02
    for space in ("ambient", "sphere"):
        assert exact_defect(lambda x: field(x) @ inverse, x, space) < 1e-20
    assert exact_defect(lambda x: project(x, field(x), "sphere") @ inverse, x, "sphere") > 1e-3


def test_rotation_is_all_defect(seed):
    k = normal(D, D)
    k = k - k.mT
    x = tokens(2, N, D)
    assert near(exact_defect(lambda x: x @ k, x, "ambient"), 1, 1e-12)
    found = estimated_defect(lambda x: x @ k, x, "ambient", probes=5)
    assert near(found.value, 1, 1e-12)
    assert near(found.error, 0, 1e-12)


def test_tangent_frames_agree(seed):
    """The projected Jacobian is as long, and as symmetric, as the derivative in coordinates of an orthonormal frame."""
    field = attention(normal(1, D, D), normal(1, D, D))
    x = normal(1, 4, D) * 3
    for space in ("sphere", "centred"):
        centred = space == "centred"
        theta = torch.nn.functional.normalize(x - x.mean(-1, keepdim=True) if centred else x, dim=-1)[0]
        rows = [torch.stack([t, torch.ones(D).double()]) if centred else t[None] for t in theta]
        frames = torch.stack([torch.from_numpy(null_space(r.numpy())) for r in rows])  # (4, d, d - 1 or d - 2)

        def velocity(c: Tensor, theta: Tensor = theta, frames: Tensor = frames) -> Tensor:
            point = torch.nn.functional.normalize(theta + torch.einsum("ndk,nk->nd", frames, c), dim=-1)
            v = field(point[None])[0]
            return torch.einsum("ndk,nd->nk", frames, v - (v * point).sum(-1, keepdim=True) * point)

        start = torch.zeros(frames.shape[0], frames.shape[2], dtype=torch.float64)
        expected = torch.func.jacrev(velocity)(start).reshape(start.numel(), -1)
        found = jacobian(field, x, space)[0]
        assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=1e-10)
        assert float(defect(found)) == pytest.approx(float(defect(expected)), abs=1e-12)
        assert float((found @ found).trace()) == pytest.approx(float((expected @ expected).trace()), rel=1e-9)


def test_standard_error_is_honest():
    """Over 150 sets of probes the errors are what the estimate says, and none is drawn from the global generator."""
    torch.manual_seed(0)
    field, x = attention(normal(1, D, D), normal(1, D, D)), tokens(3, 5, D)
    exact = exact_defect(field, x, "sphere")
    state = torch.get_rng_state()
    found = [estimated_defect(field, x, "sphere", probes=40, seed=k, chunk=40) for k in range(150)]
    assert torch.equal(state, torch.get_rng_state())
    z = torch.stack([(f.value - exact) / f.error for f in found])
    assert z.mean().abs() < 0.3
    assert 0.85 < z.std() < 1.2
    again = estimated_defect(field, x, "sphere", probes=40, seed=3, chunk=7)
    torch.testing.assert_close(estimated_defect(field, x, "sphere", probes=40, seed=3, chunk=7).value, again.value)


def test_single_precision_is_enough_for_the_positive_control():
    """A model's own type: below 1e-6 where the field is a gradient, with weights that want gradients, under no_grad."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(symmetric().float())
    with torch.no_grad():
        for space in ("ambient", "sphere", "centred"):
            found = estimated_defect(attention(weight, weight, "plain"), normal(3, N, D).float(), space, probes=8)
            assert found.value.dtype == torch.float64
            assert found.value.max() < 1e-6
    assert weight.grad is None


def test_alignment(seed):
    """A field that climbs or descends the energy has R2 = 1; one that does not know it has its null."""
    m = symmetric()
    x = tokens(3, N, D) * 5
    theta = x / 5
    gradient = energy_gradient(x, m, BETA)[:, 0]
    v = attention(m, m, "plain")(theta)
    for sign in (1, -2):
        assert near(alignment(sign * v, gradient, x, "sphere"), 1, 1e-12)
    assert (alignment(attention(m, normal(1, D, D))(theta), gradient, x, "sphere") < 0.95).all()
    many, cloud = normal(4000, N, D), normal(1, N, D).expand(4000, -1, -1)
    for space, dims in (("ambient", D), ("sphere", D - 1), ("centred", D - 2)):
        along = normal(1, N, D).expand(4000, -1, -1)
        assert float(alignment(many, along, cloud, space).mean()) == pytest.approx(1 / (N * dims), rel=0.1)


def test_best_alignment(seed):
    x = tokens(4, N, D)
    gradients = energy_gradient(x, symmetric(3), BETA)
    c = torch.rand(3, dtype=torch.float64) + 0.1
    mixture = torch.einsum("h,bhnd->bnd", c, gradients)
    assert near(best_alignment(mixture, gradients, x, "sphere"), 1, 1e-12)
    v = normal(4, N, D)
    found = best_alignment(v, gradients[:, :2], x, "sphere")
    angles = torch.linspace(0, math.pi / 2, 2001, dtype=torch.float64)
    for b in range(4):
        scan = torch.stack([gradients[b, 0] * t.cos() + gradients[b, 1] * t.sin() for t in angles])
        tangent = project(x[b], v[b], "sphere")
        inner = (scan * tangent).sum((-2, -1)) / (scan.norm(dim=(-2, -1)) * tangent.norm())
        assert float(found[b]) == pytest.approx(float(inner.clamp(min=0).max()) ** 2, abs=1e-4)
    axes = torch.zeros(1, 4, N * D, dtype=torch.float64)
    axes[0, range(4), range(4)] = 1
    many = normal(2000, N, D)
    blind = best_alignment(many, axes.view(1, 4, N, D).expand(2000, -1, -1, -1), many, "ambient")
    assert float(blind.mean()) == pytest.approx(4 / (2 * N * D), rel=0.1)
    alone = alignment(v, gradients[:, 0], x, "sphere")
    up = (project(x, v, "sphere") * gradients[:, 0]).sum((-2, -1)) > 0
    torch.testing.assert_close(best_alignment(v, gradients[:, :1], x, "sphere"), alone * up, atol=1e-12, rtol=0)


def test_energy_and_its_gradient(seed):
    form = normal(2, D, D)
    x = normal(3, N, D)
    theta = torch.nn.functional.normalize(x, dim=-1)
    plain = (BETA * torch.einsum("bnd,hde,bme->bhnm", theta, form, theta)).exp().sum((-2, -1))
    torch.testing.assert_close(energy(x, form, BETA), plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_energy(x, form, BETA), plain.log(), rtol=1e-12, atol=0)
    for space in ("ambient", "sphere", "centred"):
        move = x.clone().requires_grad_()
        value = log_energy(move, form, BETA, space)[:, 1]
        (slope,) = torch.autograd.grad(value.sum(), move)
        centre = x - x.mean(-1, keepdim=True) if space == "centred" else x
        scale = 1 if space == "ambient" else centre.norm(dim=-1, keepdim=True)  # the norm divides by it
        torch.testing.assert_close(energy_gradient(x, form, BETA, space)[:, 1], slope * scale, rtol=1e-10, atol=1e-12)
    one = theta[:, :1].expand(3, N, D)
    top = log_energy(one, EYE, BETA) - BETA - 2 * math.log(N)
    assert near(top, 0, 1e-12)
    assert (log_energy(x, EYE, BETA) - BETA - 2 * math.log(N) < 0).all()
    assert energy(x, 1e4 * EYE).isnan().all()
    assert log_energy(x, 1e4 * EYE).isfinite().all()


def test_flow_of_a_semidefinite_form_never_falls(seed):
    """And the instrument sees the falls of a repulsive one."""
    root = normal(1, D, D)
    m = root @ root.mT / D
    mobility = torch.rand(1, N, 1, dtype=torch.float64) * 2
    for step in (0.1, 1.0, 10.0, 100.0):
        x, logs = tokens(1, N, D), []
        for _ in range(20):
            logs.append(log_energy(x, m, BETA))
            x = torch.nn.functional.normalize(x + step * mobility * attention(m, m)(x), dim=-1)
        change = torch.stack(logs).diff(dim=0)
        assert relative_drop(torch.stack(logs)[:-1], torch.stack(logs)[1:]).max() < 1e-12
        assert violations(change, 1e-12).sum() == 0
        assert variation_ratio(change).max() < 1e-10
    x = tokens(1, 16, 8)
    minus = -torch.eye(8, dtype=torch.float64)[None]
    logs = []
    for _ in range(10):
        logs.append(log_energy(x, minus))
        x = torch.nn.functional.normalize(x + 100 * attention(minus, minus, beta=1.0)(x), dim=-1)
    logs = torch.stack(logs)
    assert relative_drop(logs[:-1], logs[1:]).max() > 0.1
    assert violations(logs.diff(dim=0)[:2]).min() == 1
    assert variation_ratio(logs.diff(dim=0)).min() > 0.9


def test_dissipation_slope(seed):
    """Of the changes of log E on <grad log E, step>: 1 for small steps, and away from it for long ones."""
    form, content = symmetric(), normal(1, D, D)
    x = tokens(200, N, D)
    found = {}
    for size in (1e-4, 1.0):
        step = size * project(x, attention(form, content)(x), "sphere")
        predicted = (energy_gradient(x, form, BETA)[:, 0] * step).sum((-2, -1))
        after = torch.nn.functional.normalize(x + step, dim=-1)
        change = (log_energy(after, form, BETA) - log_energy(x, form, BETA))[:, 0]
        found[size] = dissipation_slope(change, predicted)
    assert found[1e-4].slope == pytest.approx(1, abs=1e-3)
    assert abs(found[1.0].slope - 1) > 0.02
    assert found[1e-4].n_valid == 200


def test_slope_and_its_error():
    torch.manual_seed(0)
    x = normal(300, 50) + 2
    slopes = [dissipation_slope(0.7 * row + normal(50), row) for row in x]
    z = torch.tensor([(s.slope - 0.7) / s.error for s in slopes])
    assert z.mean().abs() < 0.2
    assert z.std() == pytest.approx(1, abs=0.12)
    holes = torch.tensor([1.0, math.nan, 3.0, 4.0]), torch.tensor([2.0, 1.0, math.inf, 8.0])
    assert dissipation_slope(*holes) == (0.5, 0.0, 2, 2)
    assert math.isnan(dissipation_slope(torch.ones(1), torch.ones(1)).error)
    assert math.isnan(dissipation_slope(torch.ones(3), torch.zeros(3)).slope)
    assert math.isnan(dissipation_slope(torch.ones(0), torch.ones(0)).slope)


def test_falls_of_a_sequence():
    steps = torch.tensor([[1.0, 0.0, -1.0, 1.0], [2.0, 0.0, -2.0, -3.0], [0.0, 0.0, -1.0, math.nan]])
    torch.testing.assert_close(
        variation_ratio(steps), torch.tensor([0.0, math.nan, 1.0, math.nan], dtype=torch.float64), equal_nan=True
    )
    assert float(variation_ratio(torch.tensor([3.0, -1.0]))) == pytest.approx(0.25)
    flags = violations(torch.tensor([1.0, -1.0, -1e-9, 0.0, math.nan]), 1e-8)
    torch.testing.assert_close(flags, torch.tensor([0.0, 1, 0, 0, math.nan], dtype=torch.float64), equal_nan=True)
    torch.manual_seed(0)
    blind = normal(10, 1000)
    assert float(variation_ratio(blind).mean()) == pytest.approx(0.5, abs=0.02)
    assert float(violations(blind).mean()) == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(
        relative_drop(torch.zeros(2), torch.tensor([-1.0, 1.0])), 1 - torch.tensor([-1.0, 1.0]).double().exp()
    )
    assert relative_drop(torch.zeros(1), torch.full((1,), 1e4)).isnan().all()


def test_undefined_is_nan_in_its_own_prompt():
    torch.manual_seed(0)
    field = attention(normal(1, D, D), normal(1, D, D))
    x = normal(4, N, D)
    x[1, 3] = 0  # no direction
    x[2] = x[2, :1]  # one point
    gradients = energy_gradient(x, normal(2, D, D), BETA)
    v = normal(4, N, D)
    for found in (
        exact_defect(field, x, "sphere"),
        estimated_defect(field, x, "sphere", 6).value,
        estimated_defect(field, x, "sphere", 6).error,
        log_energy(x, EYE)[:, 0],
        alignment(v, gradients[:, 0], x, "sphere"),
        best_alignment(v, gradients, x, "sphere"),
    ):
        assert found.isnan().tolist() == [False, True, False, False]
    still: Field = lambda x: 0 * x  # noqa: E731
    assert exact_defect(still, x, "ambient").isnan().all()
    assert estimated_defect(still, x, "ambient", 6).value.isnan().all()
    one = estimated_defect(field, x[:, :1], "sphere", 1)
    assert one.value.isfinite().all()
    assert one.error.isnan().all()
    assert exact_defect(field, x[:1, :1], "sphere").isfinite().all()
    assert alignment(0 * v, v, x, "ambient").isnan().all()
    assert best_alignment(v, 0 * gradients, x, "ambient").isnan().all()
    some = torch.stack([v, 0 * v], 1)
    assert near(best_alignment(v, some, x, "ambient"), 1, 1e-12)
    with pytest.raises(ValueError, match="at least one probe"):
        estimated_defect(field, x, "sphere", 0)
