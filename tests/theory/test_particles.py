"""Particles: the flow of the real blocks against right-hand sides written here, in NumPy, and another's solver."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import builders
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.utils._python_dispatch import TorchDispatchMode

import emformer as emf
from emformer import parts
from emformer.block import Parallel
from emformer.ffn import ReLU2
from emformer.kernels import L2, Hardmax, Sinkhorn, SinkSoftmax, Softmax, Unnormalised
from emformer.masks import Causal, Full
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import Dense
from emformer.placements import PostNorm, PreNorm, SandwichNorm, Sphere
from emformer.positions import RoPE
from emformer.theory.particles import autonomous, idealised, simulate, sweep, times_of, unit_vectors
from emformer.trajectory import Trajectory

N, D, BETA = 6, 3, 1.7


class Case(NamedTuple):
    """A model of the theory. `heads` 0: M = F = I."""

    space: str
    kernel: str = "softmax"
    heads: int = 0
    causal: bool = False


CASES = [
    Case("sphere"),
    Case("sphere", heads=2),
    Case("sphere", heads=1, causal=True),
    Case("sphere", "unnormalised", heads=2),
    Case("sphere", "sinkhorn", heads=1),
    Case("flat", heads=2),
    Case("flat", "l2", heads=2, causal=True),
    Case("flat", "unnormalised", heads=1),
    Case("preln", heads=2),
    Case("preln", "unnormalised", heads=1, causal=True),
]
KERNELS = {
    "softmax": Softmax(beta=BETA),
    "l2": L2(beta=BETA),
    "unnormalised": Unnormalised(beta=BETA, clip=None),
    "sinkhorn": Sinkhorn(beta=BETA, tolerance=1e-7),
}


def operators(heads: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """General M and F (H, d, d)."""
    if not heads:
        return np.eye(D)[None], np.eye(D)[None]
    form, content = np.random.default_rng(seed).normal(size=(2, heads, D, D))
    return 0.6 * form, 0.6 * content


def weights(case: Case, x: np.ndarray, form: np.ndarray) -> np.ndarray:
    """a_ij of one head."""
    s = BETA * x @ form @ x.T
    if case.kernel == "l2":  # u = M^T x against v = x
        s = -BETA / 2 * ((x @ form)[:, None] - x[None]).__pow__(2).sum(-1)
    seen = np.tril(np.ones_like(s)) if case.causal else np.ones_like(s)
    a = np.exp(s) * seen
    if case.kernel == "unnormalised":
        return a / seen.sum(1, keepdims=True)
    for _ in range(200 if case.kernel == "sinkhorn" else 0):
        a = a / a.sum(0, keepdims=True)
        a = a / a.sum(1, keepdims=True)
    return a / a.sum(1, keepdims=True)


def right(case: Case, x: np.ndarray, form: np.ndarray, content: np.ndarray) -> np.ndarray:
    """dx/dt of tokens x (N, d), of unit vectors on the sphere."""
    y = x if case.space == "flat" else x / np.linalg.norm(x, axis=1, keepdims=True)
    update = sum(weights(case, y, m) @ y @ f.T for m, f in zip(form, content, strict=True))
    return update - (update * y).sum(1, keepdims=True) * y if case.space == "sphere" else update


def truth(case: Case, x: np.ndarray, form: np.ndarray, content: np.ndarray, time: float) -> np.ndarray:
    def flat(_: float, state: np.ndarray) -> np.ndarray:
        return right(case, state.reshape(N, D), form, content).ravel()

    return solve_ivp(flat, (0, time), x.ravel(), "DOP853", rtol=1e-12, atol=1e-13).y[:, -1].reshape(N, D)


def modelled(case: Case, form: np.ndarray, content: np.ndarray, **changes: Any) -> emf.Emformer:
    given = {"form": torch.from_numpy(form), "content": torch.from_numpy(content)} if case.heads else {}
    mask = Causal() if case.causal else Full()
    return idealised(D, **given, kernel=KERNELS[case.kernel], mask=mask, space=case.space, **changes)


def start(case: Case, seed: int) -> np.ndarray:
    x = unit_vectors(1, N, D, seed)[0].numpy()
    return x if case.space == "sphere" else (0.5 + np.arange(1, N + 1)[:, None] / N) * x


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_against_another_solver(case):
    """The error falls as step^4 and as step, down to what RK4 must reach; so every stage has weights of its own."""
    seed, time = CASES.index(case), 0.5
    form, content = operators(case.heads, seed)
    x = start(case, seed)
    expected = truth(case, x, form, content, time)
    length = math.sqrt(D) if case.space == "sphere" else 1.0
    steps = np.array([1 / 16, 1 / 32, 1 / 64])
    for method, order, slack in (("rk4", 4, 0.35), ("euler", 1, 0.15)):
        errors = []
        for step in steps:
            found = simulate(modelled(case, form, content), torch.from_numpy(x)[None], [0, time], step=step, method=method)
            errors.append(np.abs(found.clouds[-1][0].numpy() / length - expected).max())
        slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert slope == pytest.approx(order, abs=slack), (method, errors)
        assert errors[-1] < (1e-6 if method == "rk4" else 0.1)


def test_numbers_are_as_exact_as_their_type():
    """M = c I and F = c I of a number are those of the matrix, in float64: 1/d is none of float32's numbers."""
    x = unit_vectors(2, N, D)
    for space in ("sphere", "flat", "preln"):
        number = simulate(idealised(D, 0.7, -1.3, space=space), x, [0, 0.5])
        matrix = simulate(idealised(D, 0.7 * torch.eye(D).double(), -1.3 * torch.eye(D).double(), space=space), x, [0, 0.5])
        torch.testing.assert_close(number.clouds[-1], matrix.clouds[-1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("space", ["sphere", "postln"])
def test_states_stay_on_the_sphere(space):
    model = idealised(D, kernel=Softmax(beta=3.0), space=space)
    method = "rk4" if space == "sphere" else "euler"
    found = simulate(model, 7 * unit_vectors(3, N, D), [0, 1, 4], step=0.5, method=method)
    for x in found.clouds:
        torch.testing.assert_close(x.norm(dim=-1), math.sqrt(D) * torch.ones(3, N).double(), rtol=1e-14, atol=0)
    if space == "sphere":  # and the velocities lie along it
        velocity = next(model.layer(0).flow(found.clouds[1], torch.arange(N), None, 0)).update
        assert (velocity * found.clouds[1]).sum(-1).abs().max() < 1e-14


def test_post_ln_by_hand():
    """theta <- normalise(theta + c A(theta)) for steps of any size; of small ones, the flow on the sphere."""
    theta = unit_vectors(1, N, D)[0].numpy()
    model = idealised(D, kernel=Softmax(beta=BETA), space="postln")
    found = simulate(model, torch.from_numpy(theta)[None], [0, 5, 10], step=5, method="euler")
    for x in found.clouds[1:]:
        theta = theta + 5 * weights(Case("flat"), theta, np.eye(D)) @ theta
        theta = theta / np.linalg.norm(theta, axis=1, keepdims=True)
        np.testing.assert_allclose(x[0].numpy() / math.sqrt(D), theta, atol=1e-14)
    small = simulate(model, torch.from_numpy(theta)[None], [0, 1], step=1e-2, method="euler").clouds[-1]
    flow = simulate(idealised(D, kernel=Softmax(beta=BETA)), torch.from_numpy(theta)[None], [0, 1]).clouds[-1]
    assert (small - flow).abs().max() < 2e-2


EVERY = [
    setting
    for setting in builders.examples(parts.Kernel)
    if hasattr(setting.values[0], "beta") and not getattr(setting.values[0], "learned", False)
]


@pytest.mark.parametrize("setting", EVERY)
@pytest.mark.parametrize("space", ["sphere", "flat"])
def test_a_sweep_is_its_simulations(setting, space):
    """At every beta, of every kernel that has one: clouds, mixtures, model and times; with a pace, those of shorter times."""
    model = idealised(D, *map(torch.from_numpy, operators(2, 0)), kernel=setting, space=space)
    x, betas, paces = 0.8 * unit_vectors(2, N, D), [0.5, 1.5], [1.0, 0.4]
    found = sweep(model, x, betas, [0, 0.3, 0.5], paces=paces, step=0.1)
    for beta, pace in zip(betas, paces, strict=True):
        changed = idealised(D, *map(torch.from_numpy, operators(2, 0)), kernel=_at(setting, beta), space=space)
        alone = simulate(changed, x, [0, 0.3 * pace, 0.5 * pace], step=0.1 * pace)
        mine = found[beta]
        assert mine.model is not None and mine.model.settings.kernel == changed.settings.kernel
        assert times_of(mine) == pytest.approx([0, 0.3 * pace, 0.5 * pace], abs=1e-15)
        for ours, theirs in zip(mine.steps, alone.steps, strict=True):
            for one, other in zip(ours[2:], theirs[2:], strict=True):
                if isinstance(one, torch.Tensor):
                    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert model.layer(0).attention.kernel.beta == getattr(setting, "beta", None)  # the model is left as it was
    assert not model.layer(0).attention.positions


def _at(setting: Any, beta: float) -> Any:
    return type(setting)(**{**vars(setting), "beta": beta})


def test_heads_sum_to_what_moved():
    """In R^d exactly, though states lie several steps apart; on the sphere up to the turning of the tangent space."""
    form, content = map(torch.from_numpy, operators(2, 1))
    x = unit_vectors(3, N, D)
    for space in ("flat", "preln"):
        for method in ("rk4", "euler"):
            model = idealised(D, form, content, space=space)
            found = simulate(model, x, [0, 0.4, 1.0], step=0.1, method=method)
            assert max(map(max, found.closure())) < 1e-14
            heads, drift = found.heads(1)
            torch.testing.assert_close(heads.sum(1) + drift, (found.clouds[2] - found.clouds[1]) / 0.6, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(found.clouds[1] + 0.6 * found.steps[1].update, found.clouds[2], rtol=0, atol=1e-14)
    gaps, errors = (0.2, 0.1, 0.05), []
    for gap in gaps:
        found = simulate(idealised(D, form, content), x, [0, gap], step=0.01)
        errors.append(max(found.closure()[0]))
    assert np.polyfit(np.log(gaps), np.log(errors), 1)[0] == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(
    "fields",
    [
        dict(placement=PreNorm(), norm=RMSNorm(), mask=Full()),
        dict(placement=PostNorm(), norm=LayerNorm(bias=True)),
        dict(placement=SandwichNorm(), norm=RMSNorm(), positions=[RoPE()]),
        dict(placement=Sphere(), norm=None, mask=Full(), kernel=Unnormalised()),
        dict(placement=PreNorm(), norm=LayerNorm(), ffn=ReLU2(), arrangement=Parallel()),
        dict(placement=PreNorm(), norm=RMSNorm(), layers={1: {"placement": Sphere(), "kernel": Softmax(beta=2.0)}}),
    ],
    ids=lambda fields: type(fields["placement"]).__name__,
)
def test_a_layer_for_ever_is_its_block_again_and_again(fields):
    """Under Euler's step eps, bit for bit: the discrete forms are the very blocks of a trained model."""
    torch.manual_seed(0)
    real = builders.model(depth=3, epsilon=0.25, **fields)
    x = torch.randn(2, N, 8, dtype=torch.float64)
    block = real.layer(1)
    found = simulate(autonomous(real, 1), x, [0, 0.25, 0.5, 0.75], step=0.25, method="euler")
    if isinstance(real.settings.layer(1).placement, Sphere):
        x = found.clouds[0]
        torch.testing.assert_close(x.norm(dim=-1), 8**0.5 * torch.ones(2, N).double())
    with torch.no_grad():
        assert torch.equal(found.clouds[0], x)
        for state in found.states[1:]:
            *_, last = block.flow(x, torch.arange(N), None, 1)
            x = last.after
            assert torch.equal(x, state.x)
            read = x if block.read_attn is None else block.read_attn(x)
            assert state.read is not None and torch.equal(read, state.read)
    assert found.model is not real and found.model is not None and len(found.model.blocks) == 1
    assert found.steps[0].point == ("block" if "arrangement" in fields else "attn")


FAMILIES = ["flow", "clustering", "wgf", "energy", "sinks", "foliation", "breathing", "operators"]


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8]], ids=str)
def test_every_observable_of_a_trained_model_applies(case):
    """All families give rows of numbers on simulations and sweeps; and where a number is known, that number."""
    model = modelled(case, *operators(case.heads, 0))
    x = unit_vectors(2, 6, D)
    times = [0, 0.5, 1]
    found = sweep(model, x, [1.0, 2.0], times)[2.0] if case.space == "sphere" else simulate(model, x, times)
    rows = emf.observe(found, FAMILIES)
    assert rows["mean"].dropna().map(math.isfinite).all()
    known = rows.dropna(subset=["mean"]).groupby("key")["mean"]
    prefixes = {key.partition(".")[0] for key in known.groups}
    assert prefixes >= {"flow", "clu", "wgf", "attn", "sink", "fol", "geo", "op"}, prefixes
    turned = [float(torch.cosine_similarity(s.before, s.after, dim=-1).acos().mean()) for s in found.steps]
    angles = rows[(rows["key"] == "flow.angular") & rows["param"].isna() & (rows["cloud"] == "read")]
    assert angles.dropna(subset=["layer"])["mean"].tolist() == pytest.approx(turned, rel=1e-6)


def test_a_gradient_flow_is_seen_as_one():
    """USA with symmetric F = M: no defect, all of it along the gradient, no fall; and SA, but for its mobility."""
    m = torch.from_numpy(operators(1, 0)[0])
    m = m + m.mT
    found = simulate(idealised(D, m, m, kernel=Unnormalised(clip=None)), unit_vectors(4, N, D), [0, 0.02, 0.04], step=0.01)
    rows = emf.observe(found, ["wgf"])
    value = rows[rows["param"].isna()].groupby("key")["mean"].first()  # of the model, not of its controls
    assert value["wgf.omega"] < 1e-20
    assert value["wgf.r2"] == pytest.approx(1, abs=1e-12)
    assert value["wgf.viol"] == 0
    assert value["wgf.dissip_slope"] == pytest.approx(1, abs=0.1)


def test_what_was_simulated_can_be_kept(tmp_path):
    model = modelled(CASES[5], *operators(2, 0))
    found = simulate(model, unit_vectors(2, N, D), [0, 0.5, 2.0])
    found.save(tmp_path / "flow")
    again = Trajectory.load(tmp_path / "flow", model)
    assert again.epsilon == found.epsilon and times_of(again) == [0, 0.5, 2.0]
    assert all(torch.equal(a, b) for a, b in zip(again.clouds, found.clouds, strict=True))
    torch.testing.assert_close(again.pattern(1), found.pattern(1))


def test_same_seed_same_bits_and_nobody_elses_generator():
    state = torch.get_rng_state()
    a, b = (unit_vectors(2, 5, 4, seed) for seed in (3, 3))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a, b) and not torch.equal(a, unit_vectors(2, 5, 4, 4))
    torch.testing.assert_close(a.norm(dim=-1), torch.ones(2, 5).double())
    many = unit_vectors(1, 20_000, 3)[0]
    assert many.mean(0).abs().max() < 4 / math.sqrt(3 * 20_000)
    torch.testing.assert_close(many.mT @ many / 20_000, torch.eye(3).double() / 3, atol=0.01, rtol=0)
    flows = [simulate(idealised(4), a, [0, 1]).clouds[-1] for _ in range(2)]
    assert torch.equal(*flows)
    alone = simulate(idealised(4), a[1:], [0, 1]).clouds[-1]
    torch.testing.assert_close(flows[0][1:], alone, rtol=0, atol=1e-14)  # prompts do not see each other


def test_single_precision():
    form, content = map(torch.from_numpy, operators(2, 0))
    x = unit_vectors(2, N, D)
    exact = simulate(idealised(D, form, content), x, [0, 2])
    single = simulate(idealised(D, form, content, dtype=torch.float32), x.float(), [0, 2])
    assert {t.dtype for t in (single.clouds[-1], single.steps[0].mixture)} == {torch.float32}
    assert (single.clouds[-1] - exact.clouds[-1]).abs().max() < 1e-4
    assert not any(p.requires_grad for p in idealised(D, form).parameters())


def test_progress_is_told():
    shares: list[float] = []
    simulate(idealised(D), unit_vectors(1, N, D), [0, 0.3, 1.0], step=0.1, tell=shares.append)
    assert shares == pytest.approx([k / 10 for k in range(1, 11)])
    shares.clear()
    sweep(idealised(D), unit_vectors(1, N, D), [1.0, 2.0], [0, 0.25], step=0.1, tell=shares.append)
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.size = max(self.size, one.numel())
        return out


@pytest.mark.parametrize("kernel", [Softmax(beta=4.0), L2()], ids=repr)
@pytest.mark.parametrize("space", ["sphere", "flat", "preln"])
@pytest.mark.parametrize("method", ["rk4", "euler"])
def test_memory_is_linear_in_tokens(kernel, space, method):
    """No tensor of a step has N^2 numbers; the instrument sees those of a kernel that holds its weights."""
    count = 400
    x = unit_vectors(1, count, D)
    with Largest() as largest:
        simulate(idealised(D, kernel=kernel, space=space), x, [0, 0.1], step=0.1, method=method)
    assert largest.size <= count * (2 * D + 2)
    with Largest() as largest:
        simulate(idealised(D, kernel=Unnormalised(), space=space), x, [0, 0.1], step=0.1, method=method)
    assert largest.size >= count**2


@pytest.mark.parametrize("times", [[0.0], [0.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.5, 1.0], [0.0, math.inf], [0.0, math.nan], []])
def test_times_ascend_from_zero(times):
    with pytest.raises(ValueError, match="times ascend from 0"):
        simulate(idealised(D), unit_vectors(1, N, D), times)


def test_mistakes():
    x = unit_vectors(1, N, D)
    for step in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="it must be positive"):
            simulate(idealised(D), x, [0, 1], step=step)
    with pytest.raises(ValueError, match=r"operators are matrices \(3, 3\) or \(H, 3, 3\), not \(3, 4\)"):
        idealised(D, torch.ones(3, 4))
    with pytest.raises(ValueError, match="not \\(3,\\)"):
        idealised(D, content=torch.ones(3))
    torch.manual_seed(0)
    deep = builders.model(depth=2)
    y = torch.randn(1, N, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"take one of them: autonomous\(model, layer\)"):
        simulate(deep, y, [0, 1])
    fed = builders.model(ffn=ReLU2())
    with pytest.raises(ValueError, match=r"leave it out: autonomous\(model, layer, ffn=False\)"):
        simulate(autonomous(fed, 0), y, [0, 1])
    assert len(simulate(autonomous(fed, 0, ffn=False), y, [0, 1]).steps) == 1
    assert fed.layer(0).ffn is not None and fed.settings.ffn is not None
    with pytest.raises(ValueError, match="take the method 'euler'"):
        simulate(idealised(D, space="postln"), x, [0, 1])
    with pytest.raises(ValueError, match="Hardmax"):
        sweep(idealised(D, kernel=Hardmax()), x, [1.0], [0, 1])
    with pytest.raises(ValueError, match="simulate one beta at a time"):
        sweep(idealised(D, kernel=SinkSoftmax()), x, [1.0], [0, 1])
    for space in ("sphere", "preln"):  # not in R^d, where 0 is a place like any other
        at_zero = torch.cat([x[:, 1:], 0 * x[:, :1]], 1)
        for run in (lambda one, y: simulate(one, y, [0, 1]), lambda one, y: sweep(one, y, [1.0, 2.0], [0, 1])):
            with pytest.raises(ValueError, match="a token has no direction"):
                run(idealised(D, space=space), at_zero)
    assert simulate(idealised(D, space="flat"), at_zero, [0, 1]).clouds[-1].isfinite().all()
    with pytest.raises(ArithmeticError, match="no longer finite at time 100"):
        simulate(idealised(D, content=50.0, space="flat"), x, [0, 50, 100, 200], step=0.5, method="euler")


def test_settings_in_place_of_matrices():
    """Parts build M and F in the model's own units, so many heads as are asked for."""
    torch.manual_seed(0)
    model = idealised(4, Dense(), Dense(init="symmetric"), heads=3, space="flat")
    form, content = model.layer(0).attention.matrices()
    assert form.shape == content.shape == (3, 4, 4)
    torch.testing.assert_close(content, content.mT)
    theirs, given = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 4, 4))), 2.0
    form, content = idealised(4, theirs, given).layer(0).attention.matrices()
    torch.testing.assert_close(form, theirs / 4, rtol=1e-14, atol=0)  # on the sphere of radius sqrt(d)
    torch.testing.assert_close(content, given * torch.eye(4).double().expand(2, 4, 4), rtol=1e-14, atol=0)


def test_what_does_not_fit_the_model_is_refused():
    with pytest.raises(ValueError, match=r"'flatt' is no space; choose one of sphere, flat"):
        inspect.unwrap(idealised)(3, space="flatt")  # past the checks of types that tests run under
    with pytest.raises(ValueError, match=r"dimension 3 in torch\.float64, and the cloud of 4"):
        simulate(idealised(3), unit_vectors(1, 5, 4), [0.0, 1.0])
    with pytest.raises(ValueError, match=r"cloud of 3 in torch\.float32"):
        sweep(idealised(3), unit_vectors(1, 5, 3, dtype=torch.float32), [1.0], [0.0, 1.0])
