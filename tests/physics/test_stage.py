"""The space that the cloud moves in, and how steps are put together: order of the depth flow, sphere, parallel blocks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from builders import model, span, words

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.masks import Full
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import PSD, Dense, Identity, Symmetric, Tied
from emformer.placements import PostNorm, PreNorm, SandwichNorm, Sphere
from emformer.positions import RoPE

T = 8


@torch.no_grad()
def end(net, tokens: torch.Tensor) -> torch.Tensor:
    *_, step = net.flow(tokens)
    return step.after


FLOWS = {
    "pre-norm": dict(placement=PreNorm()),
    "pre-norm, parallel": dict(placement=PreNorm(), arrangement=Parallel(), ffn=GELU()),
    "pre-norm, sequential": dict(placement=PreNorm(), ffn=GELU()),
    "post-norm": dict(placement=PostNorm()),
    "sandwich": dict(placement=SandwichNorm()),
    "sphere": dict(placement=Sphere(), norm=None),
    "sphere, ffn": dict(placement=Sphere(), norm=None, ffn=GELU()),
    "dense, full": dict(form=Dense(), content=Dense(), mask=Full()),
}


@pytest.mark.parametrize("name", FLOWS)
def test_depth_integrates_a_flow_at_order_one(name):
    """Shared blocks with eps = 1/L: the error against a much finer flow halves with every doubling of L."""
    errors, depths = [], [8, 16, 32, 64]
    torch.manual_seed(0)
    first = model(shared=True, depth=1, **FLOWS[name])
    tokens = words(T)

    def at(depth: int) -> torch.Tensor:
        net = model(shared=True, depth=depth, epsilon=1 / depth, **FLOWS[name])
        net.load_state_dict(first.state_dict())
        return end(net, tokens)

    finest = at(2048)
    errors = [float((at(depth) - finest).norm()) for depth in depths]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert abs(slopes[-1] - 1) < 0.1, slopes
    assert errors[-1] > 1e-4  # there is something to converge


@pytest.mark.parametrize("norm", [None, LayerNorm(), RMSNorm(gain=False)], ids=repr)
@pytest.mark.parametrize("arrangement", [None, Parallel()], ids=repr)
@torch.no_grad()
def test_tokens_stay_on_the_sphere(seed, norm, arrangement):
    """Every state has length sqrt(d), every update is tangential, whatever the step."""
    net = model(placement=Sphere(), norm=norm, arrangement=arrangement, ffn=GELU(), epsilon=3.0)
    for step in net.flow(words(T)):
        for state in (step.before, step.after):
            assert (state.norm(dim=-1) / math.sqrt(8) - 1).abs().max() < 1e-14
        assert (step.update * step.before).sum(-1).abs().max() < 1e-12 * step.update.norm(dim=-1).max()
        assert (step.after - step.before).norm(dim=-1).min() > 1e-3


@torch.no_grad()
def test_the_sphere_is_the_model_of_the_theory(seed):
    """theta' = normalise(theta + eps f P_theta sum_j a_ij theta_j), a = softmax(m d theta.theta): SA with beta = m d (E.1)."""
    m, f, eps, d = 0.5, 0.75, 0.5, 8
    net = model(
        form=Identity(scale=m, learned=False),
        content=Identity(scale=f, learned=False),
        heads=1,
        placement=Sphere(),
        norm=None,
        mask=Full(),
        epsilon=eps,
        depth=3,
    )
    tokens = words(T)
    theta = net.embed(tokens, span(T)) / math.sqrt(d)
    for step in net.flow(tokens):
        mean = (m * d * theta @ theta.mT).softmax(-1) @ theta
        tangent = mean - (mean * theta).sum(-1, keepdim=True) * theta
        theta = torch.nn.functional.normalize(theta + eps * f * tangent, dim=-1)
        assert (step.after / math.sqrt(d) - theta).abs().max() < 1e-13


@torch.no_grad()
def test_a_parallel_block_by_hand(seed):
    """x + eps (attention(norm(x)) + ffn(norm'(x))), two norms, one step."""
    net, tokens = model(arrangement=Parallel(), ffn=GELU(), epsilon=0.5, depth=1), words(T)
    (step,) = net.flow(tokens)
    block, x = net.layer(0), step.before
    attended = block.attention.lift(block.attention(block.read_attn(x), span(T)))
    fed = block.ffn(block.read_ffn(x))
    assert (step.after - (x + 0.5 * (attended + fed))).abs().max() < 1e-13
    assert step.point == "block" and (step.ffn - fed).abs().max() < 1e-13
    one_after_the_other = model(ffn=GELU(), epsilon=0.5, depth=1)
    one_after_the_other.load_state_dict(net.state_dict())
    assert (end(one_after_the_other, tokens) - step.after).abs().max() > 1e-3


@torch.no_grad()
def test_a_sandwich_writes_updates_of_one_length(seed):
    net = model(placement=SandwichNorm(), norm=RMSNorm(gain=False, eps=1e-12), ffn=GELU())
    for step in net.flow(words(T)):
        assert (step.update.norm(dim=-1) / math.sqrt(8) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [4, None])
@torch.no_grad()
def test_symmetric_forms_and_rope(seed, rank):
    """s_ij = s_ji without positions; under RoPE in the factored form alone, where both factors turn alike (math A.1)."""
    tokens, i = words(T), span(T)
    for positions in ([], [RoPE()]):
        net = model(form=Symmetric(rank=rank), positions=positions, depth=1)
        (step,) = net.flow(tokens)
        u, v = net.layer(0).attention.factors(step.read, i)
        s = u @ v.mT
        gap = (s - s.mT).abs().max()
        assert gap < 1e-12 if rank or not positions else gap > 1e-2


# The energy of the attractive case grows at any step (math E.4, J 18) -------------------------------------------------


def log_energy(y: torch.Tensor, m: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """log sum_ij exp(beta y_i^T M y_j), one value a batch row."""
    return (beta * y @ m @ y.mT).flatten(1).logsumexp(1)


def drops(logs: list[torch.Tensor]) -> torch.Tensor:
    """Relative drop of E at each step: 1 - exp(d log E), positive where it falls."""
    return torch.stack([-torch.expm1(b - a) for a, b in itertools.pairwise(logs)])


@pytest.mark.parametrize("step", [0.1, 1.0, 10.0, 100.0])
@torch.no_grad()
def test_psd_energy_never_falls(seed, step):
    """On unit vectors, M = QQ^T/d, F = M, a step of its own for every token."""
    n, d = 16, 8
    q = torch.randn(d, d, dtype=torch.float64)
    m = q @ q.mT / d
    x = torch.nn.functional.normalize(torch.randn(1, n, d, dtype=torch.float64), dim=-1)
    mobility = step * torch.rand(1, n, 1, dtype=torch.float64)
    logs = [log_energy(x, m)]
    for _ in range(40):
        x = torch.nn.functional.normalize(x + mobility * (x @ m @ x.mT).softmax(-1) @ x @ m, dim=-1)
        logs.append(log_energy(x, m))
    assert drops(logs).max() <= 1e-12


@pytest.mark.parametrize("step", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("content", [Tied(scale=1.0, learned=False), Tied(scale=0.3, learned=False)], ids=repr)
@torch.no_grad()
def test_psd_energy_never_falls_through_the_real_module(seed, step, content):
    """Pre-LN, RMSNorm without gain, one head, PSD form, tied content, full mask, shared weights: the read cloud's energy."""
    net = model(
        heads=1,
        form=PSD(rank=8),
        content=content,
        mask=Full(),
        norm=RMSNorm(gain=False),
        shared=True,
        depth=40,
        epsilon=step,
        context=16,
    )
    m = net.layer(0).attention.form.matrix()[0]
    states = [one.read for one in net.flow(words(16))]
    logs = [log_energy(y, m) for y in states]
    assert drops(logs).max() <= 1e-12
    assert max(float(a) for a in logs[-1]) > max(float(a) for a in logs[0]) + 1e-3  # and it does rise


@torch.no_grad()
def test_the_instrument_sees_a_fall(seed):
    """M = F = -I, descent at a step of 100: drops of more than a tenth; at steps up to 1, none."""
    n, d = 16, 8

    def largest(step: float) -> float:
        torch.manual_seed(seed)
        x = torch.nn.functional.normalize(torch.randn(1, n, d, dtype=torch.float64), dim=-1)
        m = -torch.eye(d, dtype=torch.float64)
        logs = [log_energy(x, m)]
        for _ in range(40):
            x = torch.nn.functional.normalize(x - step * (-x @ x.mT).softmax(-1) @ x, dim=-1)
            logs.append(log_energy(x, m))
        return float(drops(logs).max())

    assert largest(100.0) > 0.1
    assert largest(1.0) <= 1e-12 and largest(0.1) <= 1e-12
