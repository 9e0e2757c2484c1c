"""The controls of "wgf" read what they must on any model, and the landscape between layers is that of its forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builders import fill, model, only, told, words
from scipy.stats import spearmanr, special_ortho_group
from torch import Tensor

from emformer import surgery, theory
from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.geometry import landscape
from emformer.geometry.integrability import project
from emformer.kernels import L2, Softmax, Unnormalised
from emformer.masks import Full
from emformer.norms import LayerNorm, RMSNorm
from emformer.observables import Row
from emformer.observables.controls import GradientControls
from emformer.observables.fields import corner, of
from emformer.observables.landscape import Landscape
from emformer.observables.wgf import GradientFlow
from emformer.operators import PSD, Dense, LowRank, Tied
from emformer.parts import UserError
from emformer.placements import Sphere
from emformer.positions import RoPE
from emformer.settings import Drift, Functional
from emformer.trajectory import Trajectory, capture

FEW = GradientControls(prompts=3, probes=8)


def row(rows: list[Row], key: str, param: str | None = None, layer: int = 0) -> Row:
    return only(rows, f"wgf.{key}", layer=layer, param=param)


def test_the_gradient_corner_of_any_layer_is_a_gradient(seed):
    """Whatever the model: omega < 1e-6, R^2 = 1, no violation; in float32 too."""
    cases: list[dict[str, Any]] = [
        {"functional": Functional(), "drift": Drift()},
        {"norm": LayerNorm(bias=True), "form": Dense(score_std=5.0), "content": Dense()},
        {"norm": None, "kernel": Softmax(beta=3.0)},
        {"placement": Sphere(), "norm": None, "mask": Full(), "heads": 1},
        {"arrangement": Parallel(), "ffn": GELU(), "dtype": torch.float32},
    ]
    fields = cases[seed]
    seen = capture(model(**fields), words(7, batch=2))
    rows = told(GradientControls(prompts=2, probes=4), seen)
    space = "ambient" if fields.get("norm", True) is None and "placement" not in fields else None
    for layer in range(2):
        ideal = " ".join(filter(None, ("gradient", space)))
        assert row(rows, "omega", ideal, layer).mean < 1e-6
        assert row(rows, "r2", ideal, layer).mean == pytest.approx(1, abs=1e-6)
        assert row(rows, "viol", ideal, layer).mean == 0 and row(rows, "viol", ideal, layer).n_valid == 2
    if "drift" in fields:
        plain = told(GradientFlow(prompts=2, probes=8), seen)
        assert row(plain, "omega").mean > 0.05 and row(plain, "r2").mean < 0.95, "and the layer itself is none"


def test_the_corner_is_the_nearest_one():
    """A layer in the corner already stays what it is; of a general one M keeps its non-negative eigenvalues."""
    torch.manual_seed(0)
    fields = dict(heads=1, mask=Full(), norm=RMSNorm(gain=False), kernel=Unnormalised(clip=None))
    net = model(form=PSD(rank=8, score_std=0.5), content=Tied(scale=0.5, learned=False), **fields)
    x = capture(net, words(6)).steps[0].before
    one = of(net.layer(0))
    ideal, theta = corner(one, x), one.place(x)
    ratio = ideal.field(theta) / one.field(theta)
    assert (ratio - ratio.flatten()[0]).abs().max() < 1e-9 * ratio.abs().max(), "the same field but for its size"
    assert (ideal.forms - one.forms).abs().max() < 1e-12 * one.forms.abs().max()
    net = model(form=Dense(), **fields)
    one = of(net.layer(0))
    found = torch.linalg.eigvalsh(corner(one, x).forms[0])
    assert (found - torch.linalg.eigvalsh(one.forms[0]).clamp(min=0)).abs().max() < 1e-12
    # scores of thousands overflow no weight
    with torch.no_grad():
        net.layer(0).attention.form.left_factor.mul_(1e4)
    ideal = corner(of(net.layer(0)), x)
    assert ideal.field(theta).isfinite().all() and ideal.field(theta).abs().max() > 0


def test_shuffled_layers_are_those_of_the_surgery(seed):
    """omega and R^2 of `surgery.shuffle` with a seed for each prompt, at the cloud of the model that was not shuffled."""
    net = model(functional=Functional(), drift=Drift(), form=Dense(), content=LowRank(rank=4, groups=1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seen = capture(net, words(6, batch=3))
    lots = [capture(net, part) for part in seen.tokens.split([1, 2])]
    found = told(GradientControls(prompts=3, probes=16, seed=seed), lots)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    expected = []
    for b, tokens in enumerate(seen.tokens.split(1)):
        other = Trajectory(capture(net, tokens).steps, model=surgery.shuffle(net, seed + b))
        expected.append(told(GradientFlow(prompts=1, probes=16, seed=seed + b), other))
    for key in ("omega", "r2"):
        values = [row(rows, key).mean for rows in expected]
        assert len(set(values)) == 3 and row(found, key, "shuffled").mean == pytest.approx(sum(values) / 3, rel=1e-9)
        assert row(found, key, "shuffled").mean != row(told(GradientFlow(prompts=3, probes=16), seen), key).mean


def test_the_error_of_the_shuffle_is_that_between_shuffles():
    """Means over 6 prompts that are all one scatter between 16 seeds as their `se` says."""
    source = torch.Generator().manual_seed(5)
    form = torch.randn(1, 8, 8, generator=source, dtype=torch.float64)
    net = theory.idealised(8, form + form.mT, form + form.mT)
    seen = theory.simulate(net, theory.unit_vectors(1, 24, 8).expand(6, -1, -1), [0.0, 0.1])
    rows = [row(told(GradientControls(prompts=6, probes=1, seed=100 * s), seen), "r2", "shuffled") for s in range(16)]
    spread = torch.tensor([one.mean for one in rows]).std()
    assert 0.5 < float(torch.tensor([one.se for one in rows]).mean() / spread) < 2


def test_a_fingerprint_is_seen_against_the_shuffle():
    torch.manual_seed(0)
    net = model(dim=16, depth=1, form=PSD(rank=16, score_std=0.5), content=Tied(), mask=Full(), norm=RMSNorm(gain=False))
    seen = capture(net, words(12, batch=4))
    mine, control = told(GradientFlow(prompts=4), seen), told(GradientControls(), seen)
    assert row(mine, "omega").mean < 0.02 < 0.25 < row(control, "omega", "shuffled").mean
    assert row(mine, "r2").mean > 0.8 > 0.2 > row(control, "r2", "shuffled").mean


def test_random_velocities_have_the_null():
    torch.manual_seed(0)
    for norm, space in ((RMSNorm(), None), (LayerNorm(), None), (None, "ambient")):
        seen = capture(model(depth=1, norm=norm, epsilon=0.01), words(6, batch=12))
        rows = told(GradientControls(prompts=12, probes=1), seen)
        param = " ".join(filter(None, ("random", space)))
        r2 = row(rows, "r2", param)
        freedom = 6 * {RMSNorm: 7, LayerNorm: 6, type(None): 8}[type(norm)]
        assert r2.null == 1 / freedom and r2.mean == pytest.approx(1 / freedom, rel=0.35)
        assert row(rows, "viol", param).mean == pytest.approx(0.5, abs=0.12)
        rows += told(GradientFlow(prompts=2, probes=1), seen)
        falls = [one for one in rows if one.key in ("wgf.viol", "wgf.tv_ratio")]
        assert len(falls) == 6 and all(one.null == (None if space else 0.5) for one in falls)


def test_random_steps_are_as_long_as_the_model_s_and_others_in_every_layer():
    """Of E = e^(-|x|^2) of one token in R^3: a step as long as x in a random direction lowers it in 3 of 4, for the cosine is
    uniform (Archimedes), a short one in 2 of 4."""
    net = theory.idealised(3, -1.0, 1.0, space="flat")
    start = theory.unit_vectors(60, 1, 3)
    for time, expected in ((math.log(2), 0.75), (math.log(1.5), 0.625)):  # x' = x
        rows = told(GradientControls(prompts=60, probes=1), theory.simulate(net, start, [0.0, time]))
        viol = row(rows, "viol", "random ambient")
        assert viol.mean == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 60 / 16) ** 0.5)
    still = theory.simulate(theory.idealised(3, 1.0, 0.0), theory.unit_vectors(2, 4, 3), [0.0, 1.0, 2.0])
    rows = told(GradientControls(prompts=2, probes=1), still)
    first, second = (row(rows, "r2", "random", layer).mean for layer in (0, 1))
    assert abs(first - second) > 1e-3 * first, "the same cloud and energy, up to the rounding of its radius"


def test_who_has_no_field_has_no_rows_and_long_prompts_are_counted():
    torch.manual_seed(0)
    for fields in ({"positions": [RoPE()]}, {"kernel": L2()}):
        seen = capture(model(**fields), words(6))
        assert told(FEW, seen) == [] == told(Landscape(), seen)
    seen = capture(model(), words(6, batch=3))
    whole = told(FEW, seen)
    split = capture(seen.model, seen.tokens)
    split.budget = 2 * 6 * 6
    for one, two in zip(whole, told(FEW, split), strict=True):
        assert one[:3] == two[:3] and one.param == two.param and one.mean == pytest.approx(two.mean, rel=1e-9, abs=1e-12)
    split.budget -= 1
    lost = told(FEW, split)
    assert {(r[:3], r.param) for r in lost} == {(r[:3], r.param) for r in whole}
    assert all((r.mean, r.n_valid, r.n_dropped) == (None, 0, 3) for r in lost)
    assert row(told(Landscape(), split), "energy_rank", layer=1).n_dropped == 3
    for setting in (GradientControls, Landscape):
        with pytest.raises(UserError, match="choose at least 1 of each"):
            setting(prompts=0)


# Landscapes -----------------------------------------------------------------------------------------------------------


def symmetric(dim: int) -> Tensor:
    w = torch.randn(dim, dim, dtype=torch.float64)
    return w + w.mT + 0.3 * torch.eye(dim).double()


def test_nulls_of_likeness_are_those_of_random_eigenvectors():
    """4,000 Haar rotations by scipy: mean and standard deviation of both."""
    torch.manual_seed(0)
    dim = 6
    s, other = symmetric(dim), symmetric(dim) @ symmetric(dim)
    other = other + other.mT
    turns = torch.from_numpy(special_ortho_group(dim, seed=0).rvs(4000))
    turned = turns @ other @ turns.mT
    cosines = torch.einsum("ij,kij->k", s, turned) / (s.norm() * other.norm())
    found = landscape.cosine(s, other)
    assert float(cosines.mean()) == pytest.approx(found.null, abs=4 * found.null_sd / 4000**0.5)
    assert float(cosines.std()) == pytest.approx(found.null_sd, rel=0.05)
    overlaps = torch.tensor([landscape.overlap(s, one, 2).value for one in turned[:1000]])
    found = landscape.overlap(s, other, 2)
    assert found.null == pytest.approx(2 / 6)
    assert float(overlaps.mean()) == pytest.approx(found.null, abs=4 * found.null_sd / 1000**0.5)
    assert float(overlaps.std()) == pytest.approx(found.null_sd, rel=0.1)
    assert landscape.cosine(s, -2 * s).value == pytest.approx(-1) and landscape.overlap(s, s, 3).value == pytest.approx(1)
    assert landscape.overlap(s, -s, 3).value == pytest.approx(0, abs=1e-12)
    assert landscape.overlap(s, other, 6).value == pytest.approx(1) and landscape.overlap(s, other, 6).null_sd < 1e-15
    assert math.isnan(landscape.cosine(0 * s, s).value)
    with pytest.raises(ValueError, match="0 directions of 6"):
        landscape.overlap(s, s, 0)


def test_what_two_eigenvalues_share_is_no_direction():
    """Exactly or up to the rounding of a turn: nan for the count that cuts through them, for either form; a number for others."""
    torch.manual_seed(0)
    turn = torch.from_numpy(special_ortho_group(6, seed=0).rvs(1))
    some, tied = symmetric(6), turn @ torch.diag(torch.tensor([3.0, 2, 2, 2, 1, 0]).double()) @ turn.mT
    for form in (tied, (tied + tied.mT).float(), torch.diag(torch.tensor([3.0, 2, 2, 2, 1, 0]))):
        for count in range(1, 7):
            for pair in ((form, some), (some, form)):
                found = landscape.overlap(*pair, count)
                assert math.isnan(found.value) == (count in (2, 3)) and found.null == count / 6
    assert math.isnan(landscape.overlap(0 * some, some, 2).value)
    rows = told(Landscape(directions=3), simulated_with(1.0))
    overlap = row(rows, "form_overlap", "k=3", 1)
    assert (overlap.mean, overlap.n_valid, overlap.n_dropped) == (None, 0, 1) and row(rows, "form_cos", layer=1).mean == 1


def simulated_with(form: float) -> Trajectory:
    return theory.simulate(theory.idealised(4, form), theory.unit_vectors(2, 5, 4), [0.0, 0.1, 0.2])


def test_behind_layernorm_a_landscape_has_one_direction_less():
    """Forms that fall in every direction but that of the mean, which no token has: it is no common summit; nulls of d - 1 = 7."""
    torch.manual_seed(0)
    net = model(form=LowRank(rank=8), norm=LayerNorm(gain=False), heads=1)
    for k in range(2):
        form = net.layer(k).attention.form
        fill(form.right_factor, -form.left_factor)
    seen = capture(net, words(6))
    centre = torch.eye(8).double() - 1 / 8
    forms = [centre @ net.layer(k).attention.form.matrix().detach()[0] @ centre for k in range(2)]
    assert all(torch.linalg.eigvalsh(w)[-2] < -1e-6 for w in forms)
    # the largest eigenvalue is the 0 of the mean; of the others the first three
    first, second = (torch.linalg.eigh(w).eigenvectors[:, -4:-1] for w in forms)
    squares = torch.linalg.svdvals(first.mT @ second).square()
    rows = told(Landscape(directions=3), seen)
    overlap, cosine = row(rows, "form_overlap", "k=3", 1), row(rows, "form_cos", layer=1)
    assert overlap.mean == pytest.approx(float(squares.mean())) and overlap.null == 3 / 7
    size = float(forms[0].norm() * forms[1].norm())
    assert cosine.mean == pytest.approx(float((forms[0] * forms[1]).sum()) / size)
    assert cosine.null == pytest.approx(float(forms[0].trace() * forms[1].trace()) / 7 / size)
    assert row(told(Landscape(directions=99), seen), "form_overlap", "k=7", 1).mean == pytest.approx(1)


def test_rows_between_layers():
    torch.manual_seed(0)
    net = model(depth=3, norm=RMSNorm(gain=False), kernel=Softmax(beta=0.5))
    seen = capture(net, words(6, batch=20))
    rows = told(Landscape(directions=2), seen)
    assert {r.layer for r in rows} == {1, 2}
    forms = [net.layer(k).attention.form.matrix().detach() for k in range(3)]
    forms = [(m + m.mT) / 2 for m in forms]

    def log_energy(x: Tensor, form: Tensor) -> Tensor:
        y = math.sqrt(8) * torch.nn.functional.normalize(x, dim=-1)
        return (0.5 * torch.einsum("bnd,hde,bme->bhnm", y, form, y)).exp().sum((1, 2, 3)).log()

    for k in (1, 2):
        one, two = forms[k - 1].mean(0), forms[k].mean(0)
        cosine = row(rows, "form_cos", layer=k)
        assert cosine.mean == pytest.approx(float((one * two).sum() / (one.norm() * two.norm()))) and cosine.n_valid == 1
        first, second = (torch.linalg.eigh(w).eigenvectors[:, -2:] for w in (one, two))
        squares = torch.linalg.svdvals(first.mT @ second).square()
        overlap = row(rows, "form_overlap", "k=2", k)
        assert overlap.mean == pytest.approx(float(squares.mean())) and overlap.null == 2 / 8
        energies = [log_energy(seen.steps[j].before, forms[j]) for j in (k - 1, k)]
        rank = row(rows, "energy_rank", layer=k)
        assert rank.mean == pytest.approx(spearmanr(*energies).statistic) and rank.n_valid == 20
        assert (rank.null, rank.null_sd) == (0, pytest.approx(19**-0.5))
    some = told(Landscape(prompts=7), [capture(net, part) for part in seen.tokens.split([3, 17])])
    assert row(some, "energy_rank", layer=1).n_valid == 7
    shared = told(Landscape(), capture(model(depth=3, shared=True), words(6, batch=5)))
    assert row(shared, "form_cos", layer=2).mean == pytest.approx(1)
    same = row(told(Landscape(), capture(net, words(6, batch=1).expand(4, -1))), "energy_rank", layer=1)
    assert same.mean is None, "prompts that are all alike have no order"


def test_a_projected_field_is_what_is_compared(seed):
    """R^2 of the shuffled layer is of its tangent part: adding to the field what no direction sees changes nothing."""
    net = model(norm=RMSNorm())
    one = of(net.layer(0))
    x = capture(net, words(6)).steps[0].before
    theta = one.place(x)
    v = one.field(theta)
    assert (project(theta, v + 3 * theta, "sphere") - project(theta, v, "sphere")).abs().max() < 1e-12
    assert one.gradient(x).mul(theta).sum(-1).abs().max() < 1e-12
