"""Family "wgf": the gradient corner reads as a gradient flow, and every departure from it is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from builders import model, words
from torch import Tensor

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.geometry import integrability
from emformer.geometry.integrability import project
from emformer.geometry.paths import direction
from emformer.kernels import L2, Hardmax, Linear, Sigmoid, SinkSoftmax, Softmax, Unnormalised
from emformer.masks import Causal, Full
from emformer.model import Emformer
from emformer.norms import LayerNorm, RMSNorm
from emformer.observables import Row
from emformer.observables.wgf import GradientFlow, layer
from emformer.operators import PSD, Dense, Identity, LowRank, Symmetric, Tied
from emformer.parts import UserError
from emformer.placements import PostNorm, SandwichNorm, Sphere
from emformer.positions import KeyNorm, RoPE
from emformer.settings import Drift, Functional
from emformer.trajectory import Trajectory, capture

GIVEN: dict[str, Any] = {"functional": Functional(), "drift": Drift()}
TIED = Tied(scale=0.5, learned=False)


def found(trajectories: Trajectory | Sequence[Trajectory], **settings: int) -> list[Row]:
    observation = GradientFlow(**({"probes": 4} | settings)).begin()
    for one in [trajectories] if isinstance(trajectories, Trajectory) else trajectories:
        observation.update(one)
    return observation.rows()


def only(rows: list[Row], key: str, layer: int | None = 0, param: str | None = None) -> Row:
    (row,) = [r for r in rows if (r.key, r.layer, r.param) == (f"wgf.{key}", layer, param)]
    return row


def corner(**change: Any) -> Emformer:
    """Everything that a gradient flow asks for: symmetric M >= 0, F = c M, weights of no row, a full mask, small steps."""
    fields = dict(form=PSD(rank=8, score_std=0.5), content=TIED, kernel=Unnormalised(clip=None), mask=Full(), heads=1)
    return model(**(fields | {"norm": RMSNorm(gain=False), "epsilon": 0.003} | change))


def field(trajectory: Trajectory, k: int = 0) -> tuple[Tensor, Any]:
    """The field at the cloud of step k, and the layer."""
    one = layer(trajectory, k)
    assert one is not None
    x = trajectory.steps[k].before.double()
    return one.field(x if one.space == "ambient" else direction(x, one.space == "centred")), one


def test_the_field_is_what_the_layer_adds():
    """Through effective operators on unit directions: gains, biases, functionals, masses, sinks and drift."""
    torch.manual_seed(0)
    norms = [RMSNorm(eps=1e-14), LayerNorm(bias=True, eps=1e-14), LayerNorm(gain=False, eps=1e-14), None]
    for norm in norms:
        for kernel in (Softmax(beta=0.5), SinkSoftmax(), Sigmoid(), Unnormalised(), Linear()):
            seen = capture(model(norm=norm, kernel=kernel, form=LowRank(rank=4, groups=1), **GIVEN), words(6))
            for k, step in enumerate(seen.steps):
                found_here, one = field(seen, k)
                assert (found_here - step.update).abs().max() < 1e-9 * step.update.abs().max()
                centred = isinstance(norm, LayerNorm)
                assert one.space == ("ambient" if norm is None else "centred" if centred else "sphere")
    for norm in (None, RMSNorm(eps=1e-14)):
        seen = capture(model(norm=norm, placement=Sphere()), words(6))
        velocity, one = field(seen)
        theta = direction(seen.steps[0].before)
        assert one.space == "sphere" and (project(theta, velocity, "sphere") - seen.steps[0].update).abs().max() < 1e-12
    assert field(capture(model(placement=PostNorm()), words(6)))[1].space == "ambient"


def test_the_gradient_corner_is_seen_as_one(seed):
    """Float32: no rotation, full alignment, no fall of any energy, and the slope of small steps."""
    for norm in (RMSNorm(gain=False), None):
        seen = capture(corner(dtype=torch.float32, shared=True, norm=norm), words(7))
        rows, param = found(seen), None if norm else "ambient"
        for k in range(2):
            assert only(rows, "omega", k, param).mean < 1e-20
            assert only(rows, "r2", k, param).mean == pytest.approx(1, abs=1e-9)
            assert only(rows, "viol", k, param).mean == only(rows, "tv_ratio", k, param).mean == 0
            slope = only(rows, "dissip_slope", k, param)
            assert slope.mean == pytest.approx(1, abs=0.05) and slope.n_valid == 2
        fixed = "fixed" if norm else "fixed ambient"
        assert only(rows, "viol", None, fixed).mean == only(rows, "tv_ratio", None, fixed).mean == 0
    for epsilon in (1.0, 100.0):  # no step is too long while M >= 0
        rows = found(capture(corner(epsilon=epsilon), words(7)))
        assert only(rows, "viol").mean == only(rows, "viol", 1).mean == 0
    several = found(capture(corner(heads=2), words(7)))
    assert only(several, "omega").mean < 1e-20
    assert only(several, "r2").mean == pytest.approx(1, abs=1e-9) == only(several, "r2", param="best").mean


def test_every_departure_is_seen():
    """Math K: free content above all, then a general form and the causal mask, softmax least."""
    torch.manual_seed(0)
    omega = {}
    for name, change in {
        "softmax": {"kernel": Softmax()},
        "causal": {"mask": Causal()},
        "general": {"form": Dense()},
        "free": {"content": Dense()},
    }.items():
        rows = found(capture(corner(**({"form": Symmetric()} | change)), words(8, batch=4)), probes=16)
        omega[name] = only(rows, "omega").mean
        assert only(rows, "r2").mean < 1 - 1e-4 and only(rows, "r2").null == 1 / (8 * 7)
    assert omega["free"] > omega["general"] > omega["softmax"] > 1e-6
    assert omega["free"] > 0.25 and omega["causal"] > omega["softmax"]
    one = {"form": Identity(scale=1 / 8, learned=False), "content": Identity(scale=1.0, learned=False)}
    rows = found(capture(corner(**one, kernel=Softmax(), mask=Causal()), words(12)), probes=32)
    assert only(rows, "omega").mean > 0.1


def test_softmax_of_one_head_is_a_gradient_times_its_partition_sums():
    torch.manual_seed(0)
    for norm in (RMSNorm(gain=False), LayerNorm(gain=False), None):
        seen = capture(corner(form=Symmetric(), kernel=Softmax(beta=2.0), norm=norm), words(7))
        rows = found(seen)
        plain, z = (None, "z") if norm else ("ambient", "z ambient")
        assert only(rows, "omega", param=plain).mean > 1e-8 and only(rows, "omega", param=z).mean < 1e-20
        assert only(rows, "omega", param=plain).null == 0.5
    for change in ({"heads": 2, "kernel": Softmax()}, {"kernel": Sigmoid()}):
        rows = found(capture(corner(form=Symmetric(), **change), words(7)))
        assert not [row for row in rows if row.param == "z"]


def test_the_estimate_is_the_defect_of_the_field():
    torch.manual_seed(0)
    for norm in (LayerNorm(bias=True), None):
        seen = capture(model(norm=norm, depth=1, **GIVEN), words(5, batch=3))
        _, one = field(seen)
        exact = integrability.exact_defect(one.field, seen.steps[0].before, one.space)
        row = only(found(seen, probes=256), "omega", param=one.param)
        assert row.mean == pytest.approx(float(exact.mean()), abs=0.03) and row.n_valid == 3
        assert row.sd == pytest.approx(float(exact.std()), abs=0.03)


def test_a_flow_that_descends_falls_everywhere():
    """F = -c M: the same field but for its sign. Energy falls at every step as predicted; long steps do what they like."""
    torch.manual_seed(0)
    rows = found(capture(corner(content=Tied(scale=-0.5, learned=False)), words(7)))
    assert only(rows, "omega").mean < 1e-20 and only(rows, "r2").mean == pytest.approx(1, abs=1e-9)
    assert only(rows, "viol").mean == only(rows, "tv_ratio").mean == 1
    assert only(rows, "dissip_slope").mean == pytest.approx(1, abs=0.05)
    long = found(capture(corner(content=Tied(scale=-0.5, learned=False), epsilon=100.0), words(7)))
    assert abs(only(long, "dissip_slope").mean - 1) > 0.5


def test_ratios_and_slopes_against_their_definitions():
    """Free content: some prompts climb and some do not; energies written out."""
    torch.manual_seed(6)
    net = model(depth=1, kernel=Softmax(beta=0.5), norm=RMSNorm(gain=False))
    seen = capture(net, words(6, batch=16))
    rows, forms = found(seen, prompts=16), net.layer(0).attention.form.matrix().detach()

    def log_energy(x: Tensor, form: Tensor) -> Tensor:
        y = math.sqrt(8) * torch.nn.functional.normalize(x, dim=-1)
        s = 0.5 * torch.einsum("bnd,hde,bme->bhnm", y, (form + form.mT) / 2, y)
        return s.exp().sum((1, 2, 3)).log()

    step = seen.steps[0]
    x = step.before.clone().requires_grad_()
    before = log_energy(x, forms)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    change = (log_energy(step.after, forms) - before).detach()
    predicted = (gradient * (step.after - step.before)).sum((1, 2))
    assert only(rows, "viol").mean == pytest.approx(float((change < 0).double().mean()))
    ratio = only(rows, "tv_ratio")
    assert ratio.mean == pytest.approx(float(-change.clamp(max=0).sum() / change.abs().sum()))
    slope = only(rows, "dissip_slope")
    assert slope.mean == pytest.approx(float((change * predicted).sum() / predicted.square().sum()), rel=1e-9)
    assert (ratio.n_valid, slope.n_valid, ratio.null) == (16, 16, 0.5) and 0 < ratio.mean < 1
    # jackknife of the ratio
    left_out = torch.stack([-c.clamp(max=0).sum() / c.abs().sum() for c in (change[torch.arange(16) != b] for b in range(16))])
    assert ratio.se == pytest.approx(float((left_out - left_out.mean()).square().sum().mul(15 / 16).sqrt()), rel=0.2)
    # one energy over depth, of the mean form
    energies = torch.stack([log_energy(cloud, forms.mean(0, keepdim=True)) for cloud in seen.clouds]).diff(dim=0)
    assert only(rows, "viol", None, "fixed").mean == pytest.approx(float((energies < 0).double().mean()))
    told = only(rows, "tv_ratio", None, "fixed").mean
    assert told == pytest.approx(float((-energies.clamp(max=0).sum(0) / energies.abs().sum(0)).mean()))


def test_prompts_chunks_and_generators():
    torch.manual_seed(0)
    net, tokens = model(), words(6, batch=7)
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in net.state_dict().items()}
    whole = found(capture(net, tokens), prompts=5)
    chunked = found([capture(net, some) for some in tokens.split([2, 1, 4])], prompts=5)
    assert len(whole) == len(chunked) > 0
    for one, two in zip(whole, chunked, strict=True):
        assert one[:3] == two[:3] and one[6:8] == two[6:8] and one[10:] == two[10:]
        for first, second in zip((*one[3:6], *one[8:10]), (*two[3:6], *two[8:10]), strict=True):
            assert (first is None) == (second is None) and (first is None or first == pytest.approx(second, rel=1e-6))
    assert {row.n_valid for row in whole} == {5}
    assert found(capture(net, tokens), prompts=5) == whole
    assert only(found(capture(net, tokens), seed=1), "omega").mean != only(found(capture(net, tokens)), "omega").mean
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    alone = only(found(capture(net, tokens), prompts=1, probes=64), "omega")
    assert alone.sd is None and 0 < alone.se < 0.1, "one prompt: the error of its probes"
    with pytest.raises(UserError, match="choose at least 1"):
        GradientFlow(prompts=0)


def test_layers_without_a_field_have_no_rows():
    torch.manual_seed(0)
    changes = ({"positions": [RoPE()]}, {"positions": [KeyNorm()]}, {"kernel": L2()}, {"kernel": Hardmax()})
    for change in changes:
        assert found(capture(model(**change), words(6))) == []
    rows = found(capture(model(layers={1: {"positions": [RoPE()]}}), words(6)))
    assert {row.layer for row in rows} == {0}, "no energy of all layers either"
    assert found(Trajectory.from_clouds(torch.randn(3, 2, 5, 8))) == []


def test_of_a_parallel_block_attention_alone_climbs():
    """The FFN beside it goes where it likes: the whole step falls for some prompts."""
    torch.manual_seed(0)
    seen = capture(corner(arrangement=Parallel(), ffn=GELU(update_std=20.0)), words(7, batch=8))
    rows, one = found(seen), layer(seen, 0)
    assert only(rows, "viol", param="parallel").mean == only(rows, "tv_ratio", param="parallel").mean == 0
    assert only(rows, "dissip_slope", param="parallel").mean == pytest.approx(1, abs=0.05)
    before, after = (integrability.log_energy(x, one.forms, one.beta, one.space) for x in seen.clouds[:2])
    assert (after < before).any(), "the test means nothing"


def test_other_blocks_and_degenerate_prompts():
    torch.manual_seed(0)
    rows = found(capture(model(arrangement=Parallel(), ffn=GELU(), depth=1), words(6)))
    assert {(row.key, row.param) for row in rows if row.layer == 0} == {
        ("wgf.omega", None),
        ("wgf.r2", None),
        ("wgf.r2", "best"),
        ("wgf.viol", "parallel"),
        ("wgf.tv_ratio", "parallel"),
        ("wgf.dissip_slope", "parallel"),
    }
    assert {row.point for row in rows if row.layer == 0} == {"block"}
    assert found(capture(model(placement=SandwichNorm()), words(6)))
    net = model(norm=LayerNorm())
    lonely = found(capture(net, words(1)))
    same = found(capture(net, torch.zeros(2, 5, dtype=torch.long)))
    with torch.no_grad():
        net.embedding.weight.zero_()
    nowhere = found(capture(net, words(5)))
    for rows in (lonely, same, nowhere):
        for row in rows:
            assert row.mean is None or math.isfinite(row.mean), row
    assert only(nowhere, "omega").mean is None and only(nowhere, "omega").n_dropped == 2
    assert only(nowhere, "tv_ratio").mean is None and only(nowhere, "dissip_slope").n_dropped == 2
