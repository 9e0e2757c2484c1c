"""The Gaussian closure: formulas against samples and iterations, equations against an independent integration, and both against
real attention layers. Formulas of reference are written in NumPy, in the letters of the sources: V = F, A = M^T."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import model, words
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from emformer import circuits
from emformer.kernels import L2, Linear, Sigmoid, Sinkhorn, Softmax
from emformer.masks import Causal, Full, Visible
from emformer.operators import LowRank
from emformer.positions import RoPE
from emformer.settings import Drift, Functional
from emformer.theory.experiments import closure as closure_experiment
from emformer.theory.experiments import gaussian as gaussian_experiment
from emformer.theory.gaussian import (
    Law,
    blow_up,
    closed_form,
    closure,
    cone,
    evolve,
    from_cone,
    limit,
    sampling,
)
from emformer.theory.particles import idealised, simulate, times_of

D = 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def spd(dim: int = D, least: float = 0.1) -> Tensor:
    root = normal(dim, dim)
    return root @ root.mT / dim + least * torch.eye(dim, dtype=torch.float64)


def flat(tilt: Tensor, content: Tensor | float, kernel=None, **more):
    """The model with A = `tilt` and V = `content`, (d, d) or (H, d, d)."""
    return idealised(tilt.shape[-1], form=tilt.mT.contiguous(), content=content, kernel=kernel, space="flat", **more)


def modest(tilt: Tensor, cov: Tensor) -> Tensor:
    """A of each head, scaled until b . Sigma b, b = A x, is 1/4 for tokens of the law on average: few tokens do not rule then."""
    mean = (tilt.mT @ cov @ tilt @ cov).diagonal(dim1=-2, dim2=-1).sum(-1)
    return tilt / (2 * mean.sqrt())[:, None, None]


def centred(cov: Tensor) -> Law:
    return Law(cov.new_zeros(cov.shape[-1]), cov)


def covariance(cloud: Tensor) -> Tensor:
    around = cloud - cloud.mean(-2, keepdim=True)
    return around.mT @ around / (cloud.shape[-2] - 1)


# ---- formulas ---------------------------------------------------------------------------------------------------------


def test_the_l2_mean_by_monte_carlo(seed):
    """J22: 2e5 keys, exp(-|Qx - Ky|^2) written out."""
    dim, rank, queries = 3, 3, 8
    kernel = L2(beta=2.0).build(1, dim)
    q, k = normal(1, rank, dim) / 2, normal(1, rank, dim) / 2
    mean, cov = normal(dim) / 2, spd(dim)
    x, y = mean + normal(queries, dim) / 2, Law(mean, cov).sample(1, 200_000, seed)[0]
    known = kernel.mean_field(q, k, mean, cov)
    weights = (-((x @ q[0].mT)[:, None] - (y @ k[0].mT)[None]).square().sum(-1)).softmax(-1)
    found = weights @ y
    error = torch.stack([weights[t].square() @ (y - found[t]).square() for t in range(queries)]).sqrt()
    z = (found - known.offset[0] - x @ known.gain[0].mT) / error
    assert z.abs().max() < 4.5
    assert ((x @ known.gain[0].mT) / error).abs().max() > 20  # there is something to be seen


def test_the_sinkhorn_gain_is_the_fixed_point_of_the_iteration(seed):
    """J22: potentials of Gaussian clouds are quadratic, f = -x^T P x/2 and g = -y^T Q y/2; scaled in turn until they stay."""
    beta = 0.7
    kernel = Sinkhorn(beta=beta).build(2, D)
    left, right, mean, cov = normal(2, 3, D), normal(2, 3, D), normal(D), spd()
    known = kernel.mean_field(left, right, mean, cov)
    inverse = np.linalg.inv(cov.numpy())
    for h in range(2):
        m = beta * (left[h].mT @ right[h]).numpy()
        g = np.zeros((D, D))
        for _ in range(20_000):
            f = m @ np.linalg.inv(inverse + g) @ m.T
            before, g = g, m.T @ np.linalg.inv(inverse + f) @ m
            if abs(g - before).max() < 1e-14:
                break
        gain = np.linalg.inv(inverse + g) @ m.T
        assert abs(known.gain[h].numpy() - gain).max() < 1e-10
        assert abs(known.offset[h].numpy() - (np.eye(D) - gain) @ mean.numpy()).max() < 1e-10


def test_the_sinkhorn_gain_of_a_singular_cloud_and_of_small_scores(seed):
    """Rank 2 of 4 is the limit of full rank; t = s - s^3 + 2 s^5 for small s, by the formula with roots of Sigma."""
    kernel = Sinkhorn().build(1, D)
    one = torch.eye(D, dtype=torch.float64)[None]
    root, left = normal(D, 2), normal(1, D, D)
    found = kernel.mean_field(left, one, normal(D), root @ root.mT).gain[0]
    near = kernel.mean_field(left, one, normal(D), root @ root.mT + 1e-9 * one[0]).gain[0]
    assert found.isfinite().all() and (found - near).abs().max() < 1e-6
    for size in (1e-3, 1e-6):
        cov, tilt = spd(), size * normal(1, D, D)
        values, vectors = torch.linalg.eigh(cov)
        half, back = (vectors * values.sqrt()) @ vectors.mT, (vectors / values.sqrt()) @ vectors.mT
        u, s, w = torch.linalg.svd(half @ tilt[0] @ half)
        series = half @ u @ (s - s**3 + 2 * s**5).diag() @ w @ back
        assert (kernel.mean_field(tilt, one, normal(D), cov).gain[0] / size - series / size).abs().max() < 1e-12


def test_the_sinkhorn_gain_of_clouds():
    """J22: the gain regressed on clouds of 1,500 particles, in the direction of the predicted one, is 1 times that within 3
    standard errors over 6 clouds; and it is the gain of the cloud's own moments, which miss those of the law by 2 %, to 1 %."""
    torch.manual_seed(0)
    dim = 3
    kernel = Sinkhorn().build(1, dim)
    left, one, law = normal(1, dim, dim) / 2, torch.eye(dim, dtype=torch.float64)[None], Law(normal(dim), spd(dim))
    ratios = []
    for y in law.sample(6, 1500, seed=1):
        keys = y[None, None]
        mean = kernel(keys @ left.mT, keys, keys, Visible(None))[0, 0]
        regressed = torch.linalg.lstsq(y - y.mean(0), mean).solution.mT
        gain, own = (kernel.mean_field(left, one, *of).gain[0] for of in (law, (y.mean(0), covariance(y))))
        ratios.append((regressed * gain).sum() / gain.square().sum())
        assert (regressed - own).norm() < 0.01 * own.norm()
    ratio = torch.stack(ratios)
    assert (ratio.mean() - 1).abs() < 3 * ratio.std() / 6**0.5


def test_linear_attention_is_exact_for_any_cloud():
    torch.manual_seed(0)
    kernel = Linear(beta=0.7).build(2, D)
    left, right, y = normal(2, 3, D), normal(2, 3, D), normal(50, D).exp()
    x = normal(6, D)
    found = kernel((x @ left.mT)[None], (y @ right.mT)[None], y[None, None], Visible(None))[0]
    around = y - y.mean(0)
    known = kernel.mean_field(left, right, y.mean(0), around.mT @ around / 50)
    assert (found - known.offset.unsqueeze(1) - x @ known.gain.mT).abs().max() < 1e-12


# ---- equations --------------------------------------------------------------------------------------------------------


def root_of(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values)) @ vectors.T


def speed(name: str, v: np.ndarray, a: np.ndarray, q: np.ndarray, k: np.ndarray, alpha: np.ndarray, cov: np.ndarray):
    """(alpha', Sigma') as math E.6 writes them, for one head."""
    one = np.eye(len(alpha))
    if name == "softmax":
        return v @ (one + cov @ a) @ alpha, v @ cov @ a @ cov + cov @ a.T @ cov @ v.T
    if name == "L2":
        c = np.linalg.inv(one + 2 * cov @ k.T @ k)
        b = 2 * v @ c @ cov @ k.T @ q
        return v @ c @ (one + 2 * cov @ k.T @ q) @ alpha, b @ cov + cov @ b.T
    half = root_of(cov)
    u, s, w = np.linalg.svd(half @ a @ half)
    g = half @ u @ np.diag((-1 + np.sqrt(1 + 4 * s**2)) / (2 * s)) @ w @ np.linalg.inv(half)
    return v @ alpha, v @ g @ cov + cov @ g.T @ v.T


@pytest.mark.parametrize("name", ["softmax", "L2", "Sinkhorn"])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_law_follows_its_equations(name, heads):
    """Mean and covariance against scipy on the published right-hand sides, factors and heads included."""
    torch.manual_seed(3)
    kernel = {"softmax": Softmax(), "L2": L2(beta=2.0), "Sinkhorn": Sinkhorn()}[name]
    form = LowRank(rank=3)
    layer = idealised(D, form=form, content=LowRank(rank=3), kernel=kernel, heads=heads, space="flat")
    attention = layer.layer(0).attention
    q, k = attention.form.left_rows().numpy(), attention.form.right_rows().numpy()
    v = attention.content.matrix().numpy()
    law = Law(normal(D), spd())

    def right(t: float, y: np.ndarray) -> np.ndarray:
        alpha, cov = y[:D], y[D:].reshape(D, D)
        told = [speed(name, v[h], k[h].T @ q[h], q[h], k[h], alpha, cov) for h in range(heads)]
        return np.concatenate([sum(t[0] for t in told), sum(t[1] for t in told).ravel()])

    times = [0.0, 0.3, 1.0]
    start = np.concatenate([law.mean.numpy(), law.cov.numpy().ravel()])
    expected = solve_ivp(right, (0, 1), start, method="DOP853", rtol=1e-11, atol=1e-13, t_eval=times).y.T
    found = evolve(closure(layer), law, 1.0, times, tolerance=1e-12)
    assert found.times.tolist() == times and math.isinf(found.stopped) and math.isinf(found.blow_up)
    assert np.abs(found.means.numpy() - expected[:, :D]).max() < 1e-8
    assert np.abs(found.covs.numpy().reshape(3, -1) - expected[:, D:]).max() < 1e-8
    assert np.abs(expected[-1] - expected[0]).max() > 0.05
    own = evolve(closure(layer), law, 1.0)
    assert own.times[0] == 0 and own.times[-1] == 1 and (own.end.cov - found.end.cov).abs().max() < 1e-6


def commuting(seed: int):
    """(model, law, B, t*) with V, A and Sigma0 of common axes, those of the coordinates, redrawn until something grows."""
    generator = np.random.default_rng(seed)
    while True:
        v, a, s = generator.normal(size=D), generator.normal(size=D), generator.uniform(0.2, 1.5, size=D)
        if (top := (2 * v * a * s).max()) > 0.05:
            break
    v, a, s = (torch.from_numpy(x) for x in (v, a, s))
    return flat(a.diag(), v.diag()), centred(s.diag()), (2 * v * a).diag(), 1 / top


def test_the_closed_form(seed):
    """J21: against DOP853 at .9 t*, and the time of the blow-up."""
    layer, law, b, last = commuting(seed)
    gaussian = closure(layer)
    assert gaussian.commutes(law.cov) and (gaussian.growth() - b).abs().max() < 1e-14
    assert float(blow_up(gaussian, law.cov)) == pytest.approx(last, rel=1e-12)
    v, a = gaussian.content[0].numpy(), gaussian.tilt[0].numpy()

    def right(t: float, y: np.ndarray) -> np.ndarray:
        return speed("softmax", v, a, v, v, np.zeros(D), y.reshape(D, D))[1].ravel()

    run = solve_ivp(right, (0, 0.9 * last), law.cov.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-14)
    formula = closed_form(gaussian, law.cov, 0.9 * last)
    assert np.abs(run.y[:, -1] - formula.numpy().ravel()).max() < 1e-8 * float(formula.abs().max())
    assert (evolve(gaussian, law, 0.9 * last, tolerance=1e-12).end.cov - formula).abs().max() < 1e-8 * formula.abs().max()
    blown = evolve(gaussian, law, 2 * last)
    assert blown.stopped <= blown.blow_up and blown.blow_up == pytest.approx(last, rel=1e-2)
    assert blown.end.cov.trace() >= 1e8
    with pytest.raises(ValueError, match="infinitely wide"):
        closed_form(gaussian, law.cov, last)


def test_the_sign_of_b_decides(seed):
    """With F = 1, which commutes with everything, M and Sigma general: a blow-up iff B has a positive eigenvalue (S3), and then
    when and along what the formula says; else the limit, of rank dim ker B."""
    tilt, law = normal(D, D), centred(spd())
    values, vectors = torch.linalg.eigh(tilt + tilt.mT)
    for count in (0, 1, 2):  # eigenvalues of B at 0, the others below
        kept = values - values[-1] - 0.5
        kept[D - count :] = 0
        form = (tilt - tilt.mT) / 2 + (vectors * kept / 2) @ vectors.mT
        gaussian = closure(flat(form, 1.0))
        assert gaussian.commutes(law.cov) and math.isinf(blow_up(gaussian, law.cov))
        found = evolve(gaussian, law, 20.0)
        assert math.isinf(found.stopped) and found.times[-1] == 20
        assert (closed_form(gaussian, law.cov, 20.0) - found.end.cov).abs().max() < 1e-7
        end = limit(gaussian, law.cov)
        assert (closed_form(gaussian, law.cov, 1e8) - end).abs().max() < 1e-7
        assert (torch.linalg.eigvalsh(end) > 1e-9).sum() == count
        axes = vectors[:, D - count :]
        formula = axes @ torch.linalg.inv(axes.mT @ torch.linalg.inv(law.cov) @ axes) @ axes.mT
        assert (end - formula).abs().max() < 1e-12
    kept = values - values[-1] + 0.5
    gaussian = closure(flat((tilt - tilt.mT) / 2 + (vectors * kept / 2) @ vectors.mT, 1.0))
    found = evolve(gaussian, law, 100.0)
    assert found.blow_up == pytest.approx(float(blow_up(gaussian, law.cov)), rel=1e-2)
    half = torch.from_numpy(root_of(law.cov.numpy()))
    axis = half @ torch.linalg.eigh(half @ gaussian.growth() @ half).eigenvectors[:, -1]
    shape = found.end.cov / found.end.cov.trace()
    assert (shape - axis.outer(axis) / axis.square().sum()).abs().max() < 1e-6
    with pytest.raises(ValueError, match="no limit"):
        limit(gaussian, law.cov)


def test_without_commutation_the_sign_of_b_decides_nothing():
    """B = 0 and a blow-up; B < 0 and a limit that is not zero; a blow-up that makes the cloud round. In closed form."""
    one = torch.eye(2, dtype=torch.float64)
    first, mirror, turn = one * torch.tensor([1.0, 0.0]), one * torch.tensor([1.0, -1.0]), one.flip(0) * torch.tensor([-1.0, 1.0])
    cov = torch.tensor([[0.7, -0.4], [-0.4, 0.9]], dtype=torch.float64)
    corner = torch.tensor([[0.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    gaussian = closure(flat(corner, first))
    assert (gaussian.growth() == 0).all() and not gaussian.commutes(cov)
    assert evolve(gaussian, centred(cov), 10.0).blow_up == pytest.approx(1 / 0.4, rel=1e-3)
    assert math.isinf(evolve(gaussian, centred(cov * torch.tensor([[1, -1], [-1, 1]])), 10.0).blow_up)

    gaussian = closure(flat(-mirror, mirror))
    assert (gaussian.growth() + 2 * one).abs().max() == 0 and not gaussian.commutes(cov)
    line = torch.tensor([[0.4, -0.4], [-0.4, 0.4]], dtype=torch.float64)
    assert (evolve(gaussian, centred(cov), 100.0).end.cov - line).abs().max() < 1e-8

    x, y, z = cone(cov).tolist()
    found = evolve(closure(flat(turn.mT.contiguous(), turn)), centred(cov), 10.0)
    assert found.blow_up == pytest.approx(math.atanh(math.hypot(x, y) / z) / math.hypot(x, y), rel=1e-3)
    assert (found.end.cov / found.end.cov.trace() - one / 2).abs().max() < 1e-6


def test_clouds_on_the_line():
    """Softmax s0/(1 - 2 v a s0 t), L2 and Sinkhorn by their implicit solutions; rates 2 v q/k and 2 v in the end (J22); and only
    softmax blows up: not L2 alone is free of it, as S3 has it, Sinkhorn attention is too."""
    v, start = 0.5, 0.8
    one = torch.ones(1, 1, dtype=torch.float64)
    law = centred(start * one)
    found = evolve(closure(flat(one, v * one)), law, 5.0, [0.5, 1.0])
    assert found.covs[:, 0, 0].tolist() == pytest.approx([start / (1 - 2 * v * start * t) for t in (0.5, 1.0)], rel=1e-7)
    assert found.blow_up == pytest.approx(1 / (2 * v * start), rel=1e-2)
    for kernel, slowness in (
        (L2(beta=2.0), lambda s: (1 + 2 * s) / (4 * v * s * s)),
        (Sinkhorn(), lambda s: 1 / (v * (math.sqrt(1 + 4 * s * s) - 1))),
    ):
        gaussian = closure(flat(one, v * one, kernel))
        found = evolve(gaussian, law, 24.0, [1.0, 20.0, 24.0], largest=1e30)
        assert math.isinf(found.stopped) and math.isinf(found.blow_up)
        width = found.covs[:, 0, 0].tolist()
        assert quad(slowness, start, width[0], epsabs=1e-12)[0] == pytest.approx(1.0, rel=1e-7)
        assert math.log(width[2] / width[1]) / 4 == pytest.approx(2 * v, abs=1e-3)
        gone = evolve(gaussian, law, 24.0, largest=1e8)  # passes the largest trace, but not in a blow-up
        assert gone.stopped < 24 and math.isinf(gone.blow_up)
    slow = closure(flat(3 * one, v * one, L2(beta=2.0)))  # q = 3
    found = evolve(slow, law, 12.0, [10.0, 12.0], largest=1e30)
    assert float((found.covs[1] / found.covs[0]).log() / 2) == pytest.approx(2 * v * 3, abs=1e-3)


def test_a_blow_up_is_told_from_growth_whenever_it_begins():
    """On the line, v = 1/2: softmax is infinite at 1/s0, be s0 so wide that it is at once or so narrow that it takes long; L2 and
    Sinkhorn attention wait as long (at s0 = .001 for 27 and 52 times as long as the last hundredfold takes) and never are."""
    one = torch.ones(1, 1, dtype=torch.float64)
    for start in (1e-3, 1.0, 5e6, 9.9e7):
        found = evolve(closure(flat(one, one / 2)), centred(start * one), 5000.0)
        assert found.blow_up == pytest.approx(1 / start, rel=1e-7)
        assert found.stopped < found.blow_up and found.end.cov.trace() >= max(1e8, 100 * start)
        for kernel in (L2(beta=2.0), Sinkhorn()):
            found = evolve(closure(flat(one, one / 2, kernel)), centred(start * one), 5000.0)
            assert found.stopped < 1100 and math.isinf(found.blow_up)
    found = evolve(closure(flat(one, one / 2, L2(beta=2.0))), centred(one), 5000.0, largest=1e50)
    assert found.stopped < 120 and math.isinf(found.blow_up)


def unit(dim: int, i: int, j: int) -> Tensor:
    one = torch.eye(dim, dtype=torch.float64)
    return one[i].outer(one[j])


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_blow_ups_of_other_powers(power):
    """Two heads, on diagonal clouds: b' = 2 b^2 and a' = 2 p a b, so that a = (1 - 2t)^-p, infinite at 1/2 for every p."""
    tilt = torch.stack([power * unit(2, 1, 0), unit(2, 1, 1)])
    gaussian = closure(flat(tilt, torch.stack([unit(2, 0, 1), unit(2, 1, 1)])))
    assert evolve(gaussian, centred(torch.eye(2, dtype=torch.float64)), 10.0).blow_up == pytest.approx(0.5, rel=1e-6)


def test_growth_that_quickens_is_no_blow_up():
    """Softmax too can grow exponentially: a' = a and c' = 10 c (2 heads, b = 1), c overtaking a anywhere in the last two decades;
    and doubly so, a' = 2 a b, b' = 2 b."""
    overtaking = torch.stack([0.5 * unit(3, 1, 0), 5.0 * unit(3, 1, 2)])
    gaussian = closure(flat(overtaking, torch.stack([unit(3, 0, 1), unit(3, 2, 1)])))
    for size in (-6, -3, -1, 0, 1, 2, 4):
        found = evolve(gaussian, centred(torch.tensor([1e6, 1.0, 10.0**size], dtype=torch.float64).diag()), 50.0)
        assert found.stopped < 50 and math.isinf(found.blow_up)
    slow = closure(flat(torch.stack([unit(3, 1, 0), unit(3, 2, 1)]), torch.stack([unit(3, 0, 1), unit(3, 1, 2)])))
    found = evolve(slow, centred(torch.eye(3, dtype=torch.float64)), 10.0)
    assert found.stopped == pytest.approx(math.log(1 + math.log(1e8)) / 2, rel=1e-3) and math.isinf(found.blow_up)


def test_terms_that_cancel_leave_no_growth():
    """F = .3 and M skew in turned axes: B is 0 to rounding, which is no eigenvalue; the cloud stays as it is."""
    torch.manual_seed(0)
    sizes = []
    for _ in range(5):
        root = normal(3, 3)
        basis = torch.linalg.qr(normal(3, 3)).Q
        gaussian = closure(flat(basis @ (root - root.mT) @ basis.mT, 0.3))
        cov = spd(3)
        sizes.append(float(gaussian.growth().abs().max()))
        assert math.isinf(blow_up(gaussian, cov))
        assert torch.equal(limit(gaussian, cov), cov) and (closed_form(gaussian, cov, 100.0) - cov).abs().max() < 1e-12
    assert 0 < max(sizes) < 1e-14
    tiny = closure(flat(1e-20 * torch.eye(2, dtype=torch.float64), 1.0))  # small, but nothing cancels
    assert float(blow_up(tiny, torch.eye(2, dtype=torch.float64))) == pytest.approx(5e19)
    with pytest.raises(ValueError, match="no limit"):
        limit(tiny, torch.eye(2, dtype=torch.float64))


def test_heads_that_cancel_solve_the_closed_form_without_commuting():
    """`commutes` is sufficient, not necessary: F and -F with one M move nothing."""
    torch.manual_seed(1)
    tilt, content, cov = normal(3, 3), normal(3, 3), spd(3)
    gaussian = closure(flat(torch.stack([tilt, tilt]), torch.stack([content, -content])))
    assert not gaussian.commutes(cov)
    assert (evolve(gaussian, centred(cov), 1.0).end.cov - closed_form(gaussian, cov, 1.0)).abs().max() < 1e-12


def test_one_residual_step_is_exact():
    """(1 + eps G) Sigma (1 + eps G)^T: a sample moved by the affine map has exactly these moments; eps -> 0 is the flow."""
    torch.manual_seed(0)
    gaussian = closure(flat(normal(2, D, D), normal(2, D, D)))
    y = normal(40, D)
    law = Law(y.mean(0), covariance(y))
    offset, gain = gaussian.field(law)
    moved = y + 0.3 * (offset + y @ gain.mT)
    after = gaussian.step(law, 0.3)
    assert (after.mean - moved.mean(0)).abs().max() < 1e-12 and (after.cov - covariance(moved)).abs().max() < 1e-12
    tiny, way = gaussian.step(law, 1e-6), gaussian.velocity(law)
    assert ((tiny.cov - law.cov) / 1e-6 - way.cov).abs().max() < 1e-3 * way.cov.abs().max()
    assert ((tiny.mean - law.mean) / 1e-6 - way.mean).abs().max() < 1e-6 * way.mean.abs().max()


def test_growth_is_that_of_the_circuits():
    torch.manual_seed(0)
    layer = flat(normal(3, D, D), normal(3, D, D), Softmax(beta=0.6))
    found = torch.linalg.eigvalsh(closure(layer).growth())
    assert (found - circuits.growth(layer.layer(0)).values).abs().max() < 1e-12


# ---- real layers and particles ----------------------------------------------------------------------------------------


def test_the_error_of_many_tokens(seed):
    """J21: a real layer, N = 1024, d = 8, 300 clouds, queries with b^T Sigma b <= 1 apart from the cloud, and of it: squared
    error over the formula, and the effective number of tokens."""
    dim, tokens, clouds, queries = 8, 1024, 300, 16
    tilt, content = normal(dim, dim) / dim, normal(dim, dim) / dim**0.5
    law = Law(normal(dim) / 2, spd(dim))
    layer = flat(tilt, content)
    attention = layer.layer(0).attention
    offset = content @ law.mean
    gain = content @ law.cov @ tilt
    other = law.sample(clouds, queries, seed=100 + seed)
    ratio = {"apart": [], "of it": [], "effective": []}
    for k in range(clouds):
        y = law.sample(1, tokens, seed=1000 * seed + k)
        for name, x in (("apart", other[k]), ("of it", y[0, :queries])):
            b = x @ tilt.mT
            stretch = ((b @ law.cov) * b).sum(-1)
            pull = (b @ law.cov @ content.mT).square().sum(-1)
            formula = stretch.exp() * ((content @ law.cov @ content.mT).trace() + pull) / tokens
            u = attention.form.left(x[None])
            z = attention.kernel(u, attention.form.right(y), attention.content.right(y), Visible(None))
            square = (attention.lift(z)[0] - offset - x @ gain.mT).square().sum(-1)
            near = stretch <= 1
            ratio[name].append((square / formula)[near].mean())
            if name == "apart":
                weights = attention.kernel.weights(u, attention.form.right(y), Visible(None))[0, 0]
                ratio["effective"].append((1 / weights.square().sum(-1) * stretch.exp() / tokens)[near].mean())
        if k == 0:
            told = sampling(closure(layer), law, x, tokens)
            assert (told.error / formula - 1).abs().max() < 1e-10
            assert (told.effective[0] * stretch.exp() / tokens - 1).abs().max() < 1e-10
    assert torch.stack(ratio["apart"]).mean() == pytest.approx(1.0, abs=0.12)
    assert torch.stack(ratio["of it"]).mean() == pytest.approx(1.0, abs=0.12)
    assert torch.stack(ratio["effective"]).mean() == pytest.approx(1.0, abs=0.02)


def test_the_error_of_two_heads_that_share_their_tokens():
    """Heads with the same keys err together: the formula with its cross terms, which one without them misses."""
    torch.manual_seed(0)
    dim, tokens, clouds = 3, 1024, 400
    tilt, content = normal(2, dim, dim) / 4, normal(2, dim, dim)
    content[1] = content[0] + content[1] / 4
    layer, law = flat(tilt, content), centred(spd(dim))
    attention, gaussian = layer.layer(0).attention, closure(layer)
    x = normal(4, dim) / 2
    offset, gain = gaussian.field(law)
    y = law.sample(clouds, tokens, seed=5)
    u = attention.form.left(x.expand(clouds, -1, -1))
    z = attention.kernel(u, attention.form.right(y), attention.content.right(y), Visible(None))
    square = (attention.lift(z) - offset - x @ gain.mT).square().sum(-1).mean(0)
    told = sampling(gaussian, law, x, tokens)
    assert (square / told.error).mean() == pytest.approx(1.0, abs=0.12)
    alone = sum(sampling(closure(flat(tilt[[h]], content[[h]])), law, x, tokens).error for h in range(2))
    assert (told.error / alone).mean() > 1.5


def test_the_error_of_heads_that_have_nothing_in_common(seed):
    """The double sum over heads, term by term: <F_h Sigma b_k, F_k Sigma b_h>, where k and h change places."""
    dim, heads, tokens = 4, 3, 100
    tilt, content, law = normal(heads, dim, dim) / 4, normal(heads, dim, dim), Law(normal(dim), spd(dim))
    x = normal(5, dim)
    told = sampling(closure(flat(tilt, content, Softmax(beta=0.7))), law, x, tokens)
    a, f, cov = tilt.numpy(), content.numpy(), law.cov.numpy()
    for t, query in enumerate(x.numpy()):
        b = [0.7 * a[h] @ query for h in range(heads)]
        error = 0.0
        for h in range(heads):
            assert float(told.effective[h, t]) == pytest.approx(tokens * math.exp(-b[h] @ cov @ b[h]), rel=1e-12)
            for k in range(heads):
                both = np.trace(f[h] @ cov @ f[k].T) + (f[h] @ cov @ b[k]) @ (f[k] @ cov @ b[h])
                error += math.exp(b[h] @ cov @ b[k]) * both / tokens
        assert float(told.error[t]) == pytest.approx(error, rel=1e-12)


def slope(sizes: list[int], errors: list[Tensor]) -> float:
    return float(np.polyfit(np.log(sizes), np.log([float(e.mean()) for e in errors]), 1)[0])


def test_the_covariance_after_a_layer_errs_as_one_over_root_n(seed):
    """J21, by the real block: 100 clouds each of 64 … 1024 tokens."""
    dim, sizes, epsilon = 3, [64, 128, 256, 512, 1024], 0.5
    law = Law(normal(dim) / 2, spd(dim))
    layer = flat(modest(normal(2, dim, dim), law.cov), normal(2, dim, dim))
    expected, errors = closure(layer).step(law, epsilon), []
    for size in sizes:
        y = law.sample(100, size, seed=size)
        after = y + epsilon * next(layer.layer(0).flow(y, torch.arange(size), None, 0)).update
        errors.append(torch.linalg.matrix_norm(covariance(after) - expected.cov))
    assert slope(sizes, errors) == pytest.approx(-0.5, abs=0.1)
    moved = torch.linalg.matrix_norm(expected.cov - law.cov)
    assert torch.linalg.matrix_norm(covariance(after).mean(0) - expected.cov) < 0.1 * moved


@pytest.mark.parametrize("mask", [Full(), Causal()], ids=["full", "causal"])
def test_particles_follow_the_closure(mask):
    """The flow of `simulate`, under a causal mask too (of its later tokens), at all times; the error falls as n^-1/2."""
    torch.manual_seed(1)
    dim, sizes, times = 2, [32, 128, 512], [0.0, 0.5, 1.0]
    law = Law(normal(dim) / 2, spd(dim))
    content = normal(2, dim, dim)
    content = content / (4 * torch.linalg.matrix_norm(content, 2))[:, None, None]  # no blow-up before time 2
    layer = flat(modest(normal(2, dim, dim), law.cov), content, mask=mask)
    expected, errors = evolve(closure(layer), law, 1.0, times), []
    assert expected.times.tolist() == times
    for size in sizes:
        clouds = law.sample(60, size, seed=size)
        flow = simulate(layer, clouds, times, step=0.5)
        assert times_of(flow) == times
        seen = torch.stack([covariance(cloud[:, size // 2 if mask.causal else 0 :]) for cloud in flow.clouds])
        errors.append(torch.linalg.matrix_norm(seen - expected.covs.unsqueeze(1)).mean(0))
    assert slope(sizes, errors) == pytest.approx(-0.5, abs=0.1)
    moved = torch.linalg.matrix_norm(expected.covs[-1] - law.cov)
    assert torch.linalg.matrix_norm(seen[-1].mean(0) - expected.covs[-1]) < 0.1 * moved
    late = flow.clouds[-1][:, size // 2 :].mean((0, 1)) - expected.means[-1]
    assert late.norm() < 0.1 * (expected.means[-1] - law.mean).norm()


# ---- small print ------------------------------------------------------------------------------------------------------


def test_the_cone():
    torch.manual_seed(0)
    cov = torch.stack([spd(2) for _ in range(20)])
    x, y, z = cone(cov).unbind(-1)
    values, radius = torch.linalg.eigvalsh(cov), torch.hypot(x, y)
    assert (values - torch.stack([z - radius, z + radius], -1) / 2).abs().max() < 1e-12
    assert (torch.linalg.det(cov) - (z**2 - x**2 - y**2) / 4).abs().max() < 1e-12
    assert (from_cone(cone(cov)) - cov).abs().max() < 1e-15
    edge = normal(20, 2)
    on = cone(edge.unsqueeze(-1) * edge.unsqueeze(-2))
    assert (torch.hypot(on[:, 0], on[:, 1]) - on[:, 2]).abs().max() < 1e-12  # rank one
    turned = cone(torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    assert turned.tolist() == [1.0, 1.0, 3.0]


def test_samples_have_the_law():
    law = Law(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64))  # of rank 1
    drawn = law.sample(2, 20_000, seed=4)
    assert drawn.shape == (2, 20_000, 3) and torch.equal(drawn, law.sample(2, 20_000, seed=4))
    assert not torch.equal(drawn, law.sample(2, 20_000, seed=5))
    assert (drawn.mean(1) - law.mean).abs().max() < 0.04 and (covariance(drawn) - 1).abs().max() < 0.05
    assert ((drawn - law.mean)[..., 0] - (drawn - law.mean)[..., 2]).abs().max() < 1e-7


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "a norm or a sphere"),
        ({"norm": None, "positions": (RoPE(),)}, "positions"),
        ({"norm": None, "functional": Functional()}, "biases"),
        ({"norm": None, "kernel": Sigmoid()}, "SigmoidKernel"),
    ],
    ids=["norm", "positions", "biases", "kernel"],
)
def test_what_has_no_closure_says_so(changes, named):
    with pytest.raises(ValueError, match=named):
        closure(model(ffn=None, **changes))


def test_a_layer_of_a_model():
    """Factors in groups, a drift, a layer that is not the first: field and block agree on a large cloud."""
    torch.manual_seed(0)
    net = model(ffn=None, norm=None, drift=Drift(), mask=Full())
    gaussian = closure(net, 1)
    law = Law(normal(8) / 4, spd(8))
    y = law.sample(1, 6_000, seed=1)
    update = next(net.layer(1).flow(y, torch.arange(6_000), None, 1)).update[0]
    offset, gain = gaussian.field(law)
    predicted = offset + y[0] @ gain.mT
    assert (update - predicted).square().sum(-1).median() < 3e-3 * update.var(0).sum()
    assert (gaussian.drift != 0).any() and net(words(5)).isfinite().all()


def test_mistakes():
    one = torch.eye(2, dtype=torch.float64)
    soft, near = closure(flat(one, 1.0)), closure(flat(one, 1.0, L2()))
    with pytest.raises(ValueError, match="closed form"):
        near.commutes(one)
    for formula in (blow_up, limit, lambda gaussian, cov: closed_form(gaussian, cov, 1.0)):
        with pytest.raises(ValueError, match="closed form"):
            formula(near, one)
    with pytest.raises(ValueError, match="softmax"):
        sampling(near, centred(one), one, 10)
    for times in ([1.0, 0.5], [-1.0], [2.0], []):
        with pytest.raises(ValueError, match="ascend"):
            evolve(soft, centred(one), 1.0, times)
    with pytest.raises(ValueError, match="at the start"):
        evolve(soft, centred(one), 1.0, largest=2.0)
    with pytest.raises(ArithmeticError, match="finite"):  # the mean grows as e^t
        evolve(closure(flat(-one, 1.0)), Law(torch.ones(2, dtype=torch.float64), one), 1e5, tolerance=1e-2)


# ---- experiments ------------------------------------------------------------------------------------------------------


def test_the_cone_experiment_holds():
    found = gaussian_experiment.Gaussian.examples()[0].run(lambda share, word: None)
    assert [one.claim for one in found.statements if one.held is False] == []
    assert len(found.statements) > 25
    for name, case in (("cone", gaussian_experiment.CONVERGENT), ("normalised", gaussian_experiment.NORMALISED)):
        frame = found.charts[name].frame
        assert set(frame["panel"]) == set(case) and frame.groupby(["panel", "path"]).ngroups == 2 * len(case)
        assert (frame.groupby(["panel", "path"])["time"].diff().dropna() > 0).all()
        assert (np.hypot(frame["x"], frame["y"]) <= (frame["z"] if name == "cone" else 1) + 1e-9).all()


def test_the_closure_experiment_finds_what_s3_missed():
    found = closure_experiment.Closure.examples()[0].run(lambda share, word: None)
    by_claim = {one.claim: one for one in found.statements}
    assert len(by_claim) == len(found.statements) >= 20
    missed = [one for one in found.statements if one.source.startswith("S3") and one.held is False]
    assert [one.measured for one in missed] == [2.0] and "Sinkhorn" in found.note
    found.trajectories["particles"].assert_closure()


def test_no_two_clouds_of_the_closure_experiment_are_of_one_seed(monkeypatch):
    """Nor of the seed that operators are drawn from; only those sizes that all runs share come again."""
    seeds, sample = [], Law.sample

    def seen(law: Law, prompts: int, tokens: int, seed: int = 0) -> Tensor:
        seeds.append(seed)
        return sample(law, prompts, tokens, seed)

    monkeypatch.setattr(Law, "sample", seen)
    closure_experiment._means(0, 200)
    closure_experiment._balanced(0, 4, 200)
    closure_experiment._sampling(0, 4, 128)
    assert len(seeds) == 6 + 1 + 5
    by_part = seeds[:6], seeds[6:7], seeds[7:]
    assert all(len(set(part)) == len(part) and min(part) > 1000 for part in by_part)
    seeds.clear()
    closure_experiment._particles(0, 4, 128, lambda share, word: None)
    assert len(set(seeds)) == 2 + 1 and min(seeds) > 1000
