"""A trajectory closes: every step is the sum of what its heads, the drift and the FFN add, placed where the placement says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import examples, model, words
from safetensors.torch import load_file, save_file

import emformer.trajectory
from emformer import parts
from emformer.block import Parallel
from emformer.ffn import GELU, ReLU2
from emformer.kernels import SinkSoftmax, Unnormalised
from emformer.model import Emformer
from emformer.norms import LayerNorm, RMSNorm
from emformer.parts import UserError
from emformer.placements import PostNorm, PreNorm, SandwichNorm, Sphere
from emformer.positions import RoPE
from emformer.settings import Drift, Functional
from emformer.trajectory import ClosureError, Trajectory, capture, captures, evaluating

PLACEMENTS = [PreNorm(), PostNorm(), SandwichNorm(), Sphere()]


def compositions() -> Iterator[dict[str, Any]]:
    """Every placement, sequential and parallel, with norms that have everything, drift, and kernels whose rows are not 1."""
    for placement, arrangement, epsilon in itertools.product(PLACEMENTS, [None, Parallel()], [1.0, 0.5]):
        yield {"placement": placement, "arrangement": arrangement, "epsilon": epsilon, "ffn": GELU(bias=True), "drift": Drift()}
    for placement in PLACEMENTS:
        yield {"placement": placement, "norm": LayerNorm(bias=True), "ffn": ReLU2(), "kernel": SinkSoftmax(), "drift": Drift()}
        yield {"placement": placement, "kernel": Unnormalised(), "drift": Drift(), "functional": Functional(), "dropout": 0.3}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_the_stream_is_a_sum_of_everything_that_was_added(seed, dtype, limit):
    """x^L = x^0 + eps sum (D^h + g + D^ffn) step by step, for every placement and parallel blocks."""
    for change in compositions():
        net = model(dtype=dtype, positions=[RoPE()], **change).train()
        found = capture(net, words(7))
        assert net.training, "capture leaves the model as it was"
        assert len(found.states) == len(found.steps) + 1 and found.states[0].point == "embed"
        for k, step in enumerate(found.steps):
            epsilon, block = found.epsilon[k], found.block(k)
            summed = torch.zeros_like(step.before)
            if step.mixture is not None:
                heads, drift = found.heads(k)
                summed = heads.sum(1) + drift
                weight = step.update.square().sum(-1)
                apart = step.update - heads.sum(1) - (0 if step.ffn is None else step.ffn)  # the drift, as it arrives
                pieces = [*heads.unbind(1), apart] + ([] if step.ffn is None else [step.ffn])
                shares = torch.stack([(piece * step.update).sum(-1) / weight for piece in pieces])
                assert (shares.sum(0) - 1).abs().max() < limit * 100, "shares sum to one, the constant included"
                if step.ffn is not None:
                    summed = summed + step.ffn
            else:
                summed = step.update
            raw = step.before + epsilon * summed
            place: Any = block.place_ffn if step.point == "ffn" else block.place_attn
            placed = raw if place is None else place(raw)
            assert (placed - step.after).norm() <= limit * step.after.norm(), (change, k)
        if not isinstance(change["placement"], PostNorm | Sphere):
            total = found.clouds[0] + sum(e * step.update for e, step in zip(found.epsilon, found.steps, strict=True))
            assert (total - found.clouds[-1]).norm() <= limit * found.clouds[-1].norm()
        with torch.no_grad():
            net.eval()
            logits = net.unembedding(found.states[-1].read)  # the read cloud of the last state is what is unembedded
            assert (logits - net(found.tokens)).abs().max() < limit * 100


def test_every_operator_kernel_position_and_mask_closes():
    for kind, field in ((parts.Operator, "form"), (parts.Kernel, "kernel"), (parts.Position, "positions"), (parts.Mask, "mask")):
        for example in examples(kind):
            part = example.values[0]
            change: dict[str, Any] = {field: [part] if field == "positions" else part}
            try:
                net = model(**change, ffn=ReLU2(), placement=SandwichNorm(), drift=Drift())
            except UserError:
                continue  # contents that need a form, kernels that need a full mask: the contract suite builds those
            assert max(map(max, capture(net, words(6)).closure())) < 1e-10


def test_patterns_are_those_of_the_flow(seed):
    net = model(positions=[RoPE()], functional=Functional(), ffn=GELU())
    found = capture(net, words(9))
    for k in found.attentions:
        step, attention = found.steps[k], found.block(k).attention
        a = found.pattern(k)
        assert found.pattern(k) is a and (a.sum(-1) - 1).abs().max() < 1e-12
        assert (a[..., ~found.visible(k)] == 0).all()
        assert (attention.mix(a, step.read) - step.mixture).abs().max() < 1e-12
        s = found.scores(k).masked_fill(~found.visible(k), -torch.inf)
        assert (s.softmax(-1) - a).abs().max() < 1e-12
    found.forget()
    assert not found._patterns
    with pytest.raises(ValueError, match="no heads"):
        found.heads(1)


def test_a_part_that_shows_something_else_than_it_computes_is_caught():
    net = model(ffn=GELU(), drift=Drift())
    block = net.layer(1)
    honest = block.attention.content.lift_heads
    block.attention.content.lift_heads = lambda z: 1.001 * honest(z)  # type: ignore[method-assign]
    with pytest.raises(ClosureError, match="layer 1 at 'attn'"):
        capture(net, words(5))
    net = model()
    with torch.no_grad():
        net.embedding.weight.fill_(torch.nan)
    with pytest.raises(ClosureError, match="not finite"):
        capture(net, words(5))


def test_some_prompts_are_looked_at_and_all_are_finite(monkeypatch: pytest.MonkeyPatch):
    """Of many prompts one shows heads that do not add up, and in whichever a number is not finite, it is found."""
    monkeypatch.setattr(emformer.trajectory, "CHECKED", 1)
    looked: list[int] = []
    whole = Trajectory.closure
    monkeypatch.setattr(Trajectory, "closure", lambda self: looked.append(self.prompts) or whole(self))
    net, tokens = model(ffn=GELU()), torch.zeros(7, 5, dtype=torch.long)
    capture(net, tokens)
    assert looked == [1]
    monkeypatch.setattr(emformer.trajectory, "CHECKED", 2 * 2 * 5 * 8)  # H T d numbers of two prompts, or of one more
    capture(net, tokens)
    assert looked == [1, 2]
    honest = net.layer(0).attention.content.lift_heads
    net.layer(0).attention.content.lift_heads = lambda z: 1.001 * honest(z)  # type: ignore[method-assign]
    with pytest.raises(ClosureError, match="layer 0 at 'attn'"):
        capture(net, tokens)
    net = model(ffn=GELU())
    with torch.no_grad():
        net.embedding.weight[3] = torch.nan
    tokens[5, 2] = 3
    with pytest.raises(ClosureError, match="not finite"):
        capture(net, tokens)


def test_halves_of_a_parallel_block_are_either_share_alone():
    net = model(arrangement=Parallel(), ffn=GELU(), epsilon=0.5)
    found = capture(net, words(6))
    attended, fed = found.halves(0)
    step = found.steps[0]
    assert (attended + fed - step.before - step.after).abs().max() < 1e-12
    assert (fed - step.before - 0.5 * step.ffn).abs().max() < 1e-12
    with pytest.raises(ValueError, match="no parallel block"):
        capture(model(ffn=GELU()), words(6)).halves(0)


def test_a_file_gives_back_what_was_captured(tmp_path: Path, seed):
    net = model(arrangement=Parallel(), ffn=GELU(), epsilon=0.5, drift=Drift())
    tokens = words(6)
    found = capture(net, tokens, tokens % 3)
    path = tmp_path / "one.safetensors"
    found.save(path)
    again = Trajectory.load(path, net)
    for a, b in zip(found.states, again.states, strict=True):
        assert a[:2] == b[:2] and torch.equal(a.x, b.x) and torch.equal(a.read, b.read)
    for a, b in zip(found.steps, again.steps, strict=True):
        assert torch.equal(a.update, b.update) and torch.equal(a.mixture, b.mixture) and torch.equal(a.ffn, b.ffn)
    assert torch.equal(again.tokens, tokens) and torch.equal(again.labels, tokens % 3) and again.epsilon == found.epsilon
    again.assert_closure()
    assert torch.equal(again.heads(0)[0], found.heads(0)[0])
    bare = Trajectory.load(path)
    assert bare.attentions == [] and bare.prompts == 2
    with pytest.raises(ValueError, match="no model"):
        bare.heads(0)
    assert load_file(path)["clouds.0"].shape == (2, 6, 8), "anybody can read it"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.safetensors"]


def test_files_that_are_no_trajectory_are_refused(tmp_path: Path):
    torn, foreign = tmp_path / "torn", tmp_path / "foreign"
    found = capture(model(), words(5))
    found.save(torn)
    torn.write_bytes(torn.read_bytes()[:-9])
    save_file({"x": torch.ones(2)}, foreign)
    for path, said in ((torn, "cannot be read"), (foreign, "cannot be read"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=said):
            Trajectory.load(path)
    with pytest.raises(UserError, match="cannot write"):
        found.save(tmp_path / "missing" / "one")


def test_foreign_clouds_are_a_trajectory_without_a_model():
    clouds = torch.randn(4, 2, 5, 3, dtype=torch.float64)
    found = Trajectory.from_clouds(clouds, points=[(0, "attn"), (0, "ffn"), (1, "block")])
    assert [state[:2] for state in found.states] == [(0, "embed"), (0, "attn"), (0, "ffn"), (1, "block")]
    assert all(torch.equal(a, b) for a, b in zip(found.clouds, clouds, strict=True))
    assert all(state.read is None for state in found.states)
    assert torch.equal(found.steps[1].update, clouds[2] - clouds[1])
    reads = Trajectory.from_clouds(clouds, reads=list(2 * clouds))
    assert torch.equal(reads.states[3].read, 2 * clouds[3]) and reads.steps[2].point == "block"
    for bad in (clouds[:1], [clouds[0], clouds[1][:1]], clouds[:, 0]):
        with pytest.raises(ValueError, match="at least two clouds"):
            Trajectory.from_clouds(bad)
    with pytest.raises(ValueError, match="3 points"):
        Trajectory.from_clouds(clouds, points=[(0, "attn")])


def test_prompts_in_chunks_are_the_same_prompts():
    net = model(ffn=GELU())
    tokens = words(6, batch=5)
    whole, some = capture(net, tokens), list(captures(net, tokens, tokens, chunk=2))
    assert [one.prompts for one in some] == [2, 2, 1]
    together = torch.cat([one.clouds[-1] for one in some])
    assert (together - whole.clouds[-1]).abs().max() < 1e-12


def test_recording_leaves_modes_and_generators_alone():
    net: Emformer = model(dropout=0.5, norm=RMSNorm()).train()
    net.layer(0).attention.eval()
    before = torch.get_rng_state()
    capture(net, words(5).clone())
    torch.set_rng_state(before)
    tokens = torch.arange(5)[None]
    capture(net, tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training and not net.layer(0).attention.training and net.layer(1).attention.training
    with pytest.raises(RuntimeError), evaluating(net):
        assert not net.training
        raise RuntimeError
    assert net.training
