"""Bounds hold, are attained where they can be, and fail where their assumptions do; the two experiments on fields say so."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from emformer import theory
from emformer.geometry.energy import weights
from emformer.kernels import Softmax, Unnormalised
from emformer.masks import Causal
from emformer.observables.fields import of
from emformer.parts import UserError
from emformer.theory import bounds
from emformer.theory.experiments.bounds import Bounds
from emformer.theory.experiments.field import Field

D = 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_the_slope_is_the_derivative_in_the_query(seed):
    """1e-10 against autograd with keys frozen, several heads, causal weights; bounded in 20 draws."""
    x, form, content, beta = normal(1, 7, D), normal(2, D, D), normal(2, D, D), 0.8
    table = torch.ones(7, 7, dtype=torch.bool).tril()
    s = torch.einsum("bnd,hde,bme->bhnm", x, form, x)
    found = bounds.steepness(weights(s, table, beta), x, form, content, beta)
    for i in range(7):
        keys = x[0, : i + 1]

        def gamma(query: Tensor, keys: Tensor = keys) -> Tensor:
            a = (beta * torch.einsum("d,hde,ne->hn", query, form, keys)).softmax(-1)
            return torch.einsum("hed,hn,nd->e", content, a, keys)

        assert (found[0, i] - torch.func.jacrev(gamma)(x[0, i])).abs().max() < 1e-10
    for _ in range(20):
        x, form, content = 3 * torch.rand(1, 1).double() * normal(1, 7, D), normal(2, D, D), normal(2, D, D)
        s = torch.einsum("bnd,hde,bme->bhnm", x, form, x)
        slopes = torch.linalg.matrix_norm(bounds.steepness(weights(s, None, beta), x, form, content, beta), 2)
        assert slopes.max() <= bounds.steepness_bound(form, content, beta, bounds.radius(x))


def test_bounds_are_attained(seed):
    """A cluster along the top singular vector moves at |F| R; two opposite ones seen alike are as steep as can be; an eigenvector
    of a symmetric F runs away at e^{t |F|}."""
    content = normal(1, D, D)
    top = torch.linalg.svd(content[0])[2][0]
    x = (2.0 * top).expand(1, 5, D)
    net = theory.idealised(D, normal(1, D, D), content, space="flat")
    speed = net.layer(0).attention.update(x, torch.arange(5))[1].norm(dim=-1)
    assert speed.max() == pytest.approx(float(bounds.speed_bound(content, bounds.radius(x))), rel=1e-12)

    axis = torch.nn.functional.normalize(normal(D), dim=0)
    outer = torch.outer(axis, axis)[None]
    x = torch.stack([3 * axis, -3 * axis])[None]
    slope = bounds.steepness(torch.full((1, 1, 1, 2), 0.5).double(), x, outer, 2 * outer, 0.7)
    bound = float(bounds.steepness_bound(outer, 2 * outer, 0.7, bounds.radius(x)))
    assert torch.linalg.matrix_norm(slope[0, 0], 2) == pytest.approx(bound, rel=1e-12) and bound == pytest.approx(0.7 * 2 * 9)

    symmetric = content @ content.mT
    axis = torch.linalg.eigh(symmetric[0]).eigenvectors[:, -1]
    seen = theory.simulate(theory.idealised(D, 0.1, symmetric, space="flat"), axis.expand(1, 3, D), [0, 0.1], step=0.005)
    grown = float(bounds.radius(seen.clouds[1]))
    assert grown == pytest.approx(float(bounds.support_bound(symmetric, one(1.0), 0.1)), rel=1e-6)


def test_bounds_fail_where_their_assumptions_do():
    """Weights whose sum is not one are no mean: USA leaves every bound of speed and support behind."""
    torch.manual_seed(0)
    eye = torch.eye(D).double()[None]
    x = normal(1, 6, D)
    for kernel, bounded in ((Softmax(), True), (Unnormalised(clip=None), False)):
        net = theory.idealised(D, kernel=kernel, space="flat")
        speed = net.layer(0).attention.update(x, torch.arange(6))[1].norm(dim=-1).max()
        assert (speed <= bounds.speed_bound(eye, bounds.radius(x))) == bounded


def test_two_clouds_part_no_faster_than_allowed():
    """The rate of the largest distance at one instant, by derivatives along random perturbations, causal too; where nothing
    depends on the query all of it is what keys carry, |F|."""
    torch.manual_seed(0)
    form, content, beta = normal(1, D, D) / 2, normal(1, D, D), 1.5
    for mask in (None, Causal()):
        field = of(theory.idealised(D, form, content, Softmax(beta=beta), mask=mask, space="flat").layer(0)).field
        x = normal(1, 6, D)
        allowed = float(bounds.stability_bound(form, content, beta, bounds.radius(x)))
        pushes = torch.nn.functional.normalize(normal(200, 6, D), dim=-1)
        rates = torch.func.jvp(field, (x.repeat(200, 1, 1),), (pushes,))[1].norm(dim=-1).amax(-1)
        assert rates.max() <= allowed
    field = of(theory.idealised(D, 0.0, content, space="flat").layer(0)).field
    top = torch.linalg.svd(content[0])[2][0].repeat(1, 6, 1)
    rate = torch.func.jvp(field, (x,), (top,))[1].norm(dim=-1).max()
    assert rate == pytest.approx(float(bounds.stability_bound(0 * form, content, beta, bounds.radius(x))), rel=1e-12)


def test_an_adversary_parts_almost_as_fast_as_allowed():
    """Keys at both ends of an axis that one token sees alike; it moves along u, they along where it stands, and M makes scores of
    either. Its rate is |F| (b + sqrt(1 + b^2)) by hand, b = beta |M| R^2: nine tenths of L, and above one without the 2."""
    n, reach, beta = 601, 2.0, 0.7
    w, u, e, g = torch.eye(D).double()
    for steep in (1.0, 5.0):
        size = steep / (beta * reach**2)
        form, content = size * (torch.outer(e, g) + torch.outer(u, w)), 3 * torch.outer(u, w)
        x, push = torch.zeros(1, n, D).double(), torch.zeros(1, n, D).double()
        ends = torch.tensor([reach, -reach]).repeat(n // 2).double()
        x[0, 0], x[0, 1:] = reach * e, torch.outer(ends, w)
        push[0, 0] = u
        root = math.sqrt(1 + steep**2)
        push[0, 1:] = (w + steep * torch.outer(ends.sign(), g)) / root
        field = of(theory.idealised(D, form, content, Softmax(beta=beta), space="flat").layer(0)).field
        rate = float(torch.func.jvp(field, (x,), (push,))[1].norm(dim=-1).amax())
        assert rate == pytest.approx(3 * (steep + root), rel=0.01)
        allowed = float(bounds.stability_bound(form[None], content[None], beta, bounds.radius(x)))
        assert 0.8 * allowed < rate <= allowed


def test_how_far_two_clouds_can_part_is_the_integral_of_the_rate():
    """By quadrature where R grows as fast as it can, whatever the states; above it where R does not grow."""
    torch.manual_seed(0)
    form, content, beta = normal(2, D, D) / 2, normal(2, D, D) / 2, 0.3
    speed = float(bounds.speed_bound(content, one(1.0)))
    for values in ([0.0, 0.4, 0.5, 1.5], [0.0, 1.5]):
        times = torch.tensor(values).double()
        for growth in (speed, 0.0):
            found = bounds.parting_bound(form, content, beta, (growth * times).exp(), times)
            exact = quad(lambda t, k=growth: float(bounds.stability_bound(form, content, beta, one(math.exp(k * t)))), 0, 1.5)[0]
            if growth:
                assert float(found[-1]) == pytest.approx(exact, rel=1e-9)
            else:
                assert float(found[-1]) > 1.1 * exact
    still = bounds.parting_bound(form, 0 * content, beta, 1 + times, times)
    assert still.tolist() == [0.0, 0.0], "where nothing moves, nothing parts"


def test_a_seesaw_tips_at_the_rate_of_its_covariance():
    """sinh(k delta(t)) = sinh(k delta(0)) e^{k f R t}, k = beta m R, to 1e-8; at rest without a lift."""
    beta, m, f, reach = 0.5, 3.0, 0.8, 1.5
    operator = torch.zeros(D, D).double()
    operator[1, 0] = 1
    x = bounds.seesaw(6, D, reach)
    lifted = x.clone()
    lifted[..., 1] = 1e-2
    net = theory.idealised(D, m * operator, f * operator, Softmax(beta=beta), space="flat")
    seen = theory.simulate(net, torch.cat([x, lifted]), [0.0, 0.5, 2.0], step=0.01)
    assert (seen.clouds[2][0] - x[0]).abs().max() < 1e-12
    k = beta * m * reach
    for time, cloud in zip((0.5, 2.0), seen.clouds[1:], strict=True):
        expected = math.asinh(math.sinh(k * 1e-2) * math.exp(k * f * reach * time)) / k
        assert (cloud[1, :, 1] - expected).abs().max() < 1e-8
    assert bounds.seesaw(5, D, reach)[0, 4].abs().max() == 0


def test_a_torn_crowd_has_a_third_of_the_lipschitz_bound():
    """By the decomposition of the whole Jacobian; beta R^2 sqrt(n/2) up to its lean."""
    eye, form = torch.eye(2).double()[None], bounds.turn(2)
    assert float(torch.linalg.matrix_norm(form[0], 2)) == 1
    field = of(theory.idealised(2, form, space="flat").layer(0)).field
    for n in (16, 48):
        x = bounds.torn(n, 2, 8.0, lean=0.15)
        assert bounds.radius(x) == pytest.approx(8.0)
        jacobian = torch.func.jacrev(lambda y: field(y[None])[0])(x[0]).reshape(2 * n, 2 * n)
        found = float(torch.linalg.svdvals(jacobian)[0])
        assert found == pytest.approx(64 * (n / 2) ** 0.5, rel=0.03)
        assert float(bounds.stretch(field, x).value) == pytest.approx(found, rel=1e-6)
        assert 0.3 < found / float(bounds.lipschitz_bound(form, eye, 1.0, bounds.radius(x), n)) <= 1


def test_stretch_is_the_largest_singular_value():
    """Of the whole Jacobian, by numpy's decomposition, to 1e-6; below the bound, and the bound is below it without sqrt(n)."""
    torch.manual_seed(0)
    form, content = normal(2, D, D) / 2, normal(2, D, D)
    field = of(theory.idealised(D, form, content, space="flat").layer(0)).field
    x = normal(2, 6, D)
    found = bounds.stretch(field, x, iterations=120)
    for b in range(2):
        jacobian = torch.func.jacrev(lambda y: field(y[None])[0])(x[b]).reshape(6 * D, 6 * D)
        assert float(found.value[b]) == pytest.approx(float(torch.linalg.svdvals(jacobian)[0]), rel=1e-6)
    assert (found.value <= bounds.lipschitz_bound(form, content, 1.0, bounds.radius(x), 6)).all()
    assert found.change.abs().max() < 1e-6
    none = bounds.lipschitz_bound(0 * form, content, 1.0, bounds.radius(x), 9)  # a mean of nine tokens, three times |F|
    assert (none - 3 * bounds.speed_bound(content, one(1.0))).abs().max() < 1e-12
    with pytest.raises(ValueError, match="at least one step"):
        bounds.stretch(field, x, 0)


def test_a_crowd_stretches_as_the_root_of_its_number():
    """|J| = sqrt(n) up to what the one token does by itself, exactly so in the limit of sharp weights."""
    field = of(theory.idealised(D, space="flat").layer(0)).field
    counts = torch.tensor([8.0, 32.0, 128.0]).double()
    found = torch.stack([bounds.stretch(field, bounds.crowd(int(n), D, 9.0)).value for n in counts], 1)
    assert (found[0] / counts.sqrt()).sub(1).abs().max() < 1e-3
    growth = bounds.exponent(counts, torch.cat([found, 2 * counts.pow(0.7)[None]]))
    assert growth.exponent == pytest.approx(0.6, abs=1e-3) and growth.error == pytest.approx(0.1, abs=1e-3)
    assert math.isnan(bounds.exponent(counts, found).error)
    # with weights that are flat nobody looks at the one, and means move as 1/n
    flat = bounds.stretch(of(theory.idealised(D, 0.0, space="flat").layer(0)).field, bounds.crowd(32, D, 9.0)).value
    assert float(flat) == pytest.approx(1, abs=1e-9)


def test_what_the_experiment_on_bounds_finds():
    outcome = Bounds(draws=2, tokens=8, heads=2, counts=(8, 32), time=0.5).run(lambda share, word: None)
    claimed = [one for one in outcome.statements if one.how != "measured"]
    assert len(claimed) == 10 and all(one.held for one in claimed), [one for one in claimed if not one.held]
    ratios = [one.measured for one in claimed if one.how == "at most" and one.predicted == 1]
    assert len(ratios) == 6 and all(0.003 < ratio < 1 for ratio in ratios), "bounds that are neither broken nor empty"
    near = [one for one in claimed if one.how == "at least"]
    assert len(near) == 2 and all(one.predicted == 0.25 and 0.3 < one.measured < 0.5 for one in near), "adversaries"
    seesaw = next(one for one in near if "seesaw" in one.claim)  # linear, b = 4 and |F| = 1, states .025 apart
    assert seesaw.measured == pytest.approx(4 * 0.025 / (0.025 + 4 * math.expm1(0.05)), rel=1e-4)
    assert {one.n for one in claimed if one.claim.startswith("|Gamma|")} == {4}
    single = Bounds(draws=2, tokens=4, dim=2, heads=1, counts=(4, 8), time=0.2).run(lambda share, word: None)
    assert {one.n for one in single.statements if one.claim.startswith("|Gamma|")} == {2}, "one head is no second draw"
    assert set(outcome.charts["parting"].frame["line"]) == {"largest |x - x'|", "theory: the bound"}
    assert outcome.trajectories["one head"].prompts == 2
    for wrong in ({"dim": 1}, {"counts": (8, 8)}, {"apart": 0.0}, {"beta": 0.0}):
        with pytest.raises(UserError, match="Bounds: choose"):
            Bounds(**wrong)


def test_what_the_experiment_on_fields_finds():
    """Zeros to rounding and the order of the obstructions with four draws; numbers of the table are for more."""
    shares: list[float] = []
    outcome = Field(draws=4, betas=(1.0,), dim=4, tokens=6).run(lambda share, word: shares.append(share))
    zeros = [one for one in outcome.statements if one.tolerance == 1e-20]
    assert len(zeros) == 12 and all(one.held and one.n == 4 for one in zeros)
    order = [one for one in outcome.statements if one.source == "math K"]
    assert len(order) == 3 and all(one.measured + 2 * one.error > 0 for one in order)
    causal = next(one for one in outcome.statements if one.predicted == 0.348)
    assert causal.measured > 0.1 and "sphere" in causal.claim
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    frame = outcome.charts["defect"].frame
    assert set(frame["panel"]) == {"ambient", "sphere"} and (frame["low"] <= frame["y"]).all()
    for wrong in ({"dim": 2}, {"draws": 3}, {"betas": (0.0,)}, {"scale": 0.0}):
        with pytest.raises(UserError, match="Field: choose"):
            Field(**wrong)


def test_an_order_is_one_beyond_two_standard_errors():
    """Of four draws each: by 1 +- .1 it is, by 1 +- .58 it is not; by hand."""
    ladder = ("softmax, F = M", "USA, F = P M", "USA, M general, F = M", "softmax, M general, F free")
    steps = ([0.8, 1.0, 1.2, 1.0], [0.0, 0.0, 2.0, 2.0], [-1.0, -1.0, -1.0, -1.0])
    told, values = {(ladder[0], "ambient"): torch.zeros(4).double()}, torch.zeros(4).double()
    for name, step in zip(ladder[1:], steps, strict=True):
        values = values + torch.tensor(step).double()
        told[name, "ambient"] = values
    found = list(Field()._orders(told))
    assert [one.held for one in found] == [True, False, False]
    assert [one.measured for one in found] == pytest.approx([1 - 2 * math.sqrt(0.08 / 3 / 4), 1 - 2 / math.sqrt(3), -1])
