"""What every model promises, whatever it is composed of: flow, symmetry, precision, generation."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import VOCAB, examples, fill, model, span, stir, words
from jsonargparse import ArgumentParser
from torch.nn import functional

import emformer
from emformer import parts
from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.kernels import L2, Linear, Sigmoid, Sinkhorn, SinkSoftmax, Unnormalised
from emformer.masks import All, Causal, Full, Window
from emformer.model import Emformer, choose
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import PSD, Dense, Identity, LowRank, Operator, Preconditioned, Symmetric, Tied
from emformer.operators.dense import DenseOperator
from emformer.operators.lowrank import LowRankOperator
from emformer.parts import UserError
from emformer.placements import PostNorm, PreNorm, SandwichNorm, Sphere
from emformer.positions import RoPE
from emformer.settings import Drift, Embedding, Functional, Learned, Model, Transform

T = 10


def _operator(part: parts.Operator) -> dict[str, Any]:
    try:
        part.build("form", 8, 2)
    except UserError:  # a content only
        return {"content": part}
    return {"form": part, "content": part}


def _kernel(kernel: parts.Kernel) -> dict[str, Any]:
    return {"kernel": kernel, "mask": Causal() if kernel.build(2, 8).rowwise else Full()}


# every example of every kind of part, in a model
CHANGES = {
    parts.Operator: _operator,
    parts.Kernel: _kernel,
    parts.Position: lambda part: {"positions": [part]},
    parts.Mask: lambda part: {"mask": part},
    parts.Norm: lambda part: {"norm": part},
    parts.FFN: lambda part: {"ffn": part},
    parts.Placement: lambda part: {"placement": part, "ffn": GELU()},
    parts.Arrangement: lambda part: {"arrangement": part, "ffn": GELU()},
}
AFFINE = {"functional": Functional(), "drift": Drift()}
COMPOSED = [
    pytest.param({"functional": Functional(), "drift": Drift(), "ffn": GELU()}, id="functional, drift"),
    pytest.param({"functional": Functional(), "drift": Drift(), "positions": [RoPE()]}, id="functional, drift, rope"),
    pytest.param({"embedding": Embedding(0.5, 0.3, positions=Learned(0.5)), "shared": True}, id="learned, shared"),
    pytest.param(
        {"embedding": Embedding(0.5, 0.3, norm=LayerNorm(bias=True), transform=Transform(LayerNorm(bias=True)), bias=True)},
        id="embedding norm, transform, bias",
    ),
    pytest.param({"embedding": Embedding(0.5, 0.3, transform=Transform())}, id="transform without norm"),
    pytest.param({"form": Dense(), "positions": [RoPE()], "epsilon": 0.5, "ffn": GELU()}, id="dense form, rope, step"),
    pytest.param({"norm": None, "epsilon": 0.3}, id="no norm"),
    pytest.param({"layers": {1: {"form": Dense(), "norm": LayerNorm(bias=True), "epsilon": 0.5}}}, id="mixed layers"),
    *(  # kernels that notice b_K, with a form that stays absorbable, and no drift: what folding must not forget
        pytest.param({"kernel": kernel, "form": Dense(), "content": Tied(learned=False), "functional": Functional()}, id=name)
        for kernel in (Sigmoid(), Linear(), Unnormalised(), SinkSoftmax(learned=False))
        for name in [f"{kernel}, b_K"]
    ),
    pytest.param({"kernel": SinkSoftmax(), "ffn": GELU()} | AFFINE, id="sink, functional, drift"),
    pytest.param({"kernel": SinkSoftmax(), "content": LowRank(rank=2, groups=1)} | AFFINE, id="sink, grouped narrow content"),
    pytest.param({"kernel": Sigmoid(), "form": Dense(), "content": Dense(), "drift": Drift()}, id="sigmoid, dense, drift"),
    pytest.param({"kernel": Unnormalised(), "positions": [RoPE()]} | AFFINE, id="unnormalised, rope, functional, drift"),
    pytest.param({"kernel": Linear(), "mask": Full()} | AFFINE, id="linear, full"),
    pytest.param({"kernel": L2(), "form": PSD(rank=4), "positions": [RoPE()]} | AFFINE, id="l2, psd, rope"),
    pytest.param({"kernel": Sinkhorn(), "mask": Full(), "drift": Drift(), "placement": Sphere()}, id="sinkhorn, sphere"),
    pytest.param({"form": Symmetric(rank=4), "content": Tied(), "positions": [RoPE()]} | AFFINE, id="symmetric, tied, rope"),
    pytest.param({"form": Identity(), "content": Identity(), "placement": Sphere(), "epsilon": 0.5}, id="theory"),
    pytest.param({"form": LowRank(rank=4, groups=1), "content": Preconditioned(), "shared": True}, id="metric, shared"),
    *(
        pytest.param({"placement": placement, "ffn": GELU(), "drift": Drift(), "norm": norm, "epsilon": 0.5} | more, id=name)
        for placement, norm in (
            (SandwichNorm(), LayerNorm(bias=True)),
            (Sphere(), LayerNorm()),
            (Sphere(), None),
            (PostNorm(), LayerNorm(bias=True)),
            (PreNorm(), RMSNorm()),
        )
        for arrangement in (None, Parallel())
        for more, name in [({"arrangement": arrangement}, f"{placement}, {norm}, {arrangement}, drift, step")]
    ),
]
SINGLE = [
    pytest.param(change(example.values[0]), id=str(example.id)) for kind, change in CHANGES.items() for example in examples(kind)
]
EVERY = pytest.mark.parametrize("fields", SINGLE + COMPOSED)


# The flow -------------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_the_flow_closes(fields):
    """after = place(before + eps update), update = sum_h D^h + g, and each step starts where the last one ended."""
    net, tokens = model(**fields), words(T)
    x = net.embed(tokens, span(T))
    points = []
    for step in net.flow(tokens):
        block = net.layer(step.layer)
        points.append((step.layer, step.point))
        assert torch.equal(step.before, x)
        read, place = (block.read_ffn, block.place_ffn) if step.point == "ffn" else (block.read_attn, block.place_attn)
        raw = step.before + block.epsilon * step.update
        assert (step.read - (read(step.before) if read else step.before)).abs().max() < 1e-12
        assert (step.after - (place(raw) if place else raw)).abs().max() < 1e-12
        if net.settings.placement.closes:  # the raw stream is a plain sum
            assert (step.after - step.before - block.epsilon * step.update).abs().max() < 1e-12
        if step.point == "ffn":
            assert step.mixture is None and step.ffn is None
            fed = block.ffn(step.read)
            assert (step.update - (block.shape_ffn(x, fed) if block.shape_ffn else fed)).abs().max() < 1e-12
            with pytest.raises(ValueError, match="heads"):
                net.head_updates(step)
        else:
            heads, drift = block.pieces(step)
            assert torch.equal(heads, net.head_updates(step))
            assert heads.shape == (2, net.settings.heads, T, net.settings.dim)
            beside = 0 if step.ffn is None else step.ffn
            assert (heads.sum(1) + drift + beside - step.update).abs().max() < 1e-12
            alone = block.attention.lift(step.mixture)
            shaped = block.shape_attn(x, alone) if block.shape_attn else alone
            assert (shaped + beside - step.update).abs().max() < 1e-12
            if step.ffn is not None:
                fed = block.ffn(x if block.read_ffn is None else block.read_ffn(x))
                assert (beside - (block.shape_ffn(x, fed) if block.shape_ffn else fed)).abs().max() < 1e-12
        x = step.after
    per_block = {(False, False): ["attn"], (True, False): ["attn", "ffn"], (True, True): ["block"]}
    found = [(net.layer(k).ffn is not None, net.settings.layer(k).arrangement is not None) for k in range(net.settings.depth)]
    assert points == [(k, p) for k, has in enumerate(found) for p in per_block[has]]


@EVERY
@torch.no_grad()
def test_forward_unembeds_the_last_state(fields):
    net, tokens = model(**fields), words(T)
    *_, step = net.flow(tokens)
    logits = net(tokens)
    assert torch.equal(net.unembed(step.after), logits)
    assert logits.shape == (2, T, VOCAB) and logits.isfinite().all()
    assert logits.std() > 0.1


@EVERY
@torch.no_grad()
def test_the_pattern_explains_the_mixture(fields):
    """The reference weights times the contents are the mixture that the flow went on with."""
    net = model(**fields)
    for step in net.flow(words(T)):
        if step.point != "ffn":
            layer = net.layer(step.layer).attention
            a = layer.weights(step.read, span(T))
            assert (layer.mix(a, step.read) - step.mixture).abs().max() < 1e-12
            c = layer.content.right(step.read)
            z = a @ torch.stack([c[:, h * c.shape[1] // layer.content.heads] for h in range(layer.content.heads)], 1)
            rest = 1 - a.sum(-1, keepdim=True)
            if layer.kernel.value is not None:  # the sink's value is a vector of E, met with the mass that tokens leave
                z = z + layer.content.project(rest * layer.kernel.value.unsqueeze(1))
            if layer.value_bias is not None:
                share = layer.content.heads // layer.content.groups
                z = z + (1 - rest) * layer.value_bias.repeat_interleave(share, 0).unsqueeze(1)
            assert (z - step.mixture).abs().max() < 1e-12


@EVERY
@torch.no_grad()
def test_a_causal_model_decodes_what_it_computes(fields):
    net, tokens = model(**fields), words(T)
    layers = [net.layer(k).attention for k in range(net.settings.depth)]
    if not all(layer.mask.causal and layer.kernel.rowwise for layer in layers):
        pytest.skip("not causal")
    memory = net.memory()
    states = [step.after for piece in tokens.split([4, *[1] * (T - 4)], 1) for *_, step in [net.flow(piece, memory)]]
    assert (net.unembed(torch.cat(states, 1)) - net(tokens)).abs().max() < 1e-10
    assert [m.numbers for m in memory] == [layer.cache_numbers for layer in layers]


def test_a_full_memory_says_so():
    net = model(context=4)
    memory = net.memory()
    list(net.flow(words(4), memory))
    with pytest.raises(ValueError, match="4"):
        list(net.flow(words(1), memory))


@pytest.mark.parametrize("seen", [0, 4])
def test_positions_that_were_never_learned_are_refused(seen):
    """In one piece, and as the continuation of a memory with more room than there are positions."""
    net = model(context=4, embedding=Embedding(positions=Learned()))
    memory = net.memory(8)
    if seen:
        list(net.flow(words(seen), memory))
    with pytest.raises(ValueError, match="position"):
        list(net.flow(words(5 - seen), memory))


@EVERY
def test_every_parameter_learns(fields):
    net, tokens = model(**fields), words(T)
    if not all(net.layer(k).attention.kernel.differentiable for k in range(net.settings.depth)):
        pytest.skip("not trainable")
    functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@EVERY
@torch.no_grad()
def test_a_state_rebuilds_the_model(fields):
    net, tokens = model(**fields), words(T)
    twin = Emformer(net.vocab, **{f: getattr(net.settings, f) for f in net.settings.__dataclass_fields__}).double().eval()
    assert not torch.equal(twin(tokens), net(tokens))
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(tokens), net(tokens))
    assert all(name.replace(".", "_").isidentifier() for name in net.state_dict())
    assert len(net.state_dict()) == len(list(net.named_parameters())) + len(list(net.named_buffers()))


# Symmetries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(CHANGES[kind](example.values[0]), id=str(example.id))
        for kind in CHANGES
        if kind not in (parts.Mask, parts.Position)
        for example in examples(kind)
    ],
)
@torch.no_grad()
def test_without_mask_and_positions_order_means_nothing(seed, fields):
    net, tokens, order = model(**(fields | {"mask": Full()})), words(T), torch.randperm(T)
    assert (net(tokens[:, order]) - net(tokens)[:, order]).abs().max() < 1e-12


@pytest.mark.parametrize(
    "fields",
    [{"mask": Causal()}, {"mask": Full(), "positions": [RoPE()]}, {"mask": Window(size=3)}],
    ids=["causal", "rope", "window"],
)
@torch.no_grad()
def test_mask_and_positions_give_order_a_meaning(fields):
    torch.manual_seed(0)
    net, tokens, order = model(**fields), words(T), torch.randperm(T)
    assert (net(tokens[:, order]) - net(tokens)[:, order]).abs().max() > 1e-2


def rotated(net: Emformer, q: torch.Tensor, **fields) -> Emformer:
    """The same model in the coordinates x' = Q x of E."""
    twin = model(**fields)
    twin.load_state_dict(net.state_dict())
    for weight in (twin.embedding.weight, twin.unembedding.weight, twin.positions):
        if weight is not None:
            fill(weight, weight @ q.mT)
    for block in twin.blocks:
        attention = block.attention
        attention.form, attention.content = turned(attention.form, q), turned(attention.content, q)
        for vector in (attention.drift, attention.kernel.value):
            if vector is not None:
                fill(vector, vector @ q.mT)
        if attention.biases is not None and attention.form.identity_right:
            fill(attention.biases.left, attention.biases.left @ q.mT)
        if attention.value_bias is not None and attention.content.identity_right:
            fill(attention.value_bias, attention.value_bias @ q.mT)
    return twin


def turned(operator: Operator, q: torch.Tensor) -> Operator:
    """W -> Q W Q^T, whatever W is parameterised by, as an operator of free factors."""
    left, right = operator.left_rows() @ q.mT, operator.right_rows()
    return DenseOperator(q @ left, {}) if right is None else LowRankOperator(left, right @ q.mT, {})


ROTATABLE = {
    **{f"form and content {example.id}": _operator(example.values[0]) for example in examples(parts.Operator)},
    **{f"kernel {example.id}": _kernel(example.values[0]) | {"drift": Drift()} for example in examples(parts.Kernel)},
    "sandwich": dict(placement=SandwichNorm()),
    "sphere": dict(placement=Sphere(), epsilon=0.5),
    "low-rank": {},
    "grouped": dict(form=LowRank(rank=4, groups=1), content=LowRank(rank=2)),
    "low-rank, rope": dict(positions=[RoPE()]),
    "dense": dict(form=Dense(), content=Dense(), functional=Functional()),
    "dense form": dict(form=Dense(), drift=Drift(), functional=Functional()),
    "learned positions": dict(embedding=Embedding(1.0, 0.3, positions=Learned(std=0.5)), mask=Full()),
    "post-norm": dict(placement=PostNorm()),
    "window": dict(mask=All(masks=(Causal(), Window(size=3))), functional=Functional(), drift=Drift(), shared=True),
}


@pytest.mark.parametrize("name", ROTATABLE)
@torch.no_grad()
def test_no_direction_of_space_is_special(seed, name):
    """RMSNorm without gain and no FFN: rotating E changes no logit."""
    fields = dict(norm=RMSNorm(gain=False)) | ROTATABLE[name]
    net, tokens = model(**fields), words(T)
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert (rotated(net, q, **fields)(tokens) - net(tokens)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "fields",
    [{"norm": LayerNorm(gain=False)}, {"norm": RMSNorm()}, {"form": Dense(), "positions": [RoPE()]}],
    ids=["mean removed", "gain", "planes of dense rope"],
)
@torch.no_grad()
def test_what_does_single_directions_out_is_seen(fields):
    torch.manual_seed(0)
    fields = dict(norm=RMSNorm(gain=False)) | fields
    net, tokens = model(**fields), words(T)
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert (rotated(net, q, **fields)(tokens) - net(tokens)).abs().max() > 1e-3


@torch.no_grad()
def test_a_shared_block_is_one_flow(seed):
    """Applying the L-layer model twice is the 2L-layer model (math A.1)."""
    net, tokens = model(shared=True, depth=2, ffn=GELU()), words(T)
    double = model(shared=True, depth=4, ffn=GELU())
    double.load_state_dict(net.state_dict())
    *_, step = net.flow(tokens)
    x = step.after
    for index in range(2):
        for again in net.layer(index).flow(x, span(T), None, index):
            x = again.after
    assert (net.unembed(x) - double(tokens)).abs().max() < 1e-12


# Modes and precision --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dropout_acts_in_training_only():
    fields = dict(ffn=GELU(), dropout=0.5)
    net, tokens = model(**fields), words(T)
    without = model(ffn=GELU())
    without.load_state_dict(net.state_dict())
    assert torch.equal(net(tokens), without(tokens)) and torch.equal(net(tokens), net(tokens))
    net.train()
    assert (net(tokens) - net(tokens)).abs().max() > 1e-2
    for step in net.flow(tokens):
        if (step.layer, step.point) == (0, "attn"):
            assert 0.2 < (step.before == 0).double().mean() < 0.8  # on the embedding
        assert 0.2 < (step.after == step.before).double().mean() < 0.8  # and on every update
    without.train()
    assert torch.equal(without(tokens), without(tokens))


@EVERY
def test_autocast_stays_close(fields):
    """bfloat16 keeps 8 bits: states agree within 5 % of their length, and gradients are finite."""
    torch.manual_seed(0)
    net, tokens = model(dtype=torch.float32, **fields), words(T)
    exact = net(tokens).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(tokens)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    loss.backward()
    error = (logits.float() - exact).norm() / exact.norm()
    if not any(net.layer(k).attention.kernel.sparse for k in range(2)):  # else which tokens are taken hangs on a bit
        assert 0 < error < 0.05
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())


@EVERY
@torch.no_grad()
def test_decoding_under_autocast_stays_close(fields):
    torch.manual_seed(0)
    net, tokens = model(dtype=torch.float32, **fields), words(T)
    if not all(net.layer(k).attention.mask.causal and not net.layer(k).attention.kernel.sparse for k in range(2)):
        pytest.skip("not causal, or takes tokens by a bit")
    exact, memory = net(tokens), net.memory()
    with torch.autocast("cpu", torch.bfloat16):
        pieces = tokens.split([4, *[1] * (T - 4)], 1)
        logits = torch.cat([net.unembed(step.after) for piece in pieces for *_, step in [net.flow(piece, memory)]], 1)
    assert (logits.float() - exact).norm() / exact.norm() < 0.05


COMPILED = """
import torch
from emformer.block import PreNorm
from emformer.ffn import GELU
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.operators import LowRank
from emformer.positions import RoPE
torch.manual_seed(0)
net = Emformer(
    11, dim=8, depth=2, heads=2, form=LowRank(rank=4, groups=1), content=LowRank(rank=2), kernel=Softmax(),
    mask=Causal(), placement=PreNorm(), norm=RMSNorm(), ffn=GELU(), positions=[RoPE()],
).eval()
tokens = torch.randint(11, (2, 12))
with torch.no_grad():
    expected = net(tokens)
    error = (torch.compile(net, fullgraph=True)(tokens) - expected).abs().max() / expected.abs().max()
print(error.item())
assert error < 1e-5
"""


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_it_compiles_as_one_graph(tmp_path):
    """In a process of its own: checked annotations are not compilable, and nobody compiles them."""
    root = str(Path(emformer.__file__).parents[1])
    there = os.environ | {"PYTHONPATH": root, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=there, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


TRACED = """
import sys
import torch
from torch.nn import functional
from builders import model, words
from test_model_contract import COMPOSED, SINGLE

cases = (SINGLE + COMPOSED)[:: int(sys.argv[1])]
for case in cases:
    torch.manual_seed(0)
    torch._dynamo.reset()
    fields = case.values[0]
    net, tokens = model(**({} if "layers" in fields else {"depth": 1}) | fields), words(10)
    # a kernel that iterates to a tolerance looks at numbers, and so breaks the graph
    whole = all(net.layer(k).attention.kernel.rowwise for k in range(net.settings.depth))
    traced = torch.compile(net, backend="aot_eager", fullgraph=whole)
    found = []
    for one in (net, traced):
        logits = one(tokens)
        net.zero_grad()
        functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        found.append([logits.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    error = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    if not error < 1e-9:
        print(case.id, error)
        sys.exit(1)
print(len(cases))
"""


@pytest.mark.slow
def test_every_variant_is_traced_with_the_same_numbers(tmp_path, pytestconfig):
    """`torch.compile` up to the point where code is generated: graphs are captured, functionalised and differentiated.

    Every fifth variant; with --thorough all.
    """
    stride = 1 if pytestconfig.getoption("thorough") else 5
    here = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (here.parent, here, here / "contracts")))
    there = os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TRACED, str(stride)], env=there, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert int(done.stdout) == len((SINGLE + COMPOSED)[::stride])


# Generation -----------------------------------------------------------------------------------------------------------


def test_a_seed_determines_what_is_generated():
    net, prompt = model(), words(3)
    state = torch.get_rng_state()
    first, again, other = (net.generate(prompt, 15, seed=s) for s in (1, 1, 2))
    net.generate(prompt, 3)
    assert torch.equal(torch.get_rng_state(), state), "generation has a generator of its own"
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:, :3], prompt) and first.shape == (2, 18)
    assert first.min() >= 0 and first.max() < VOCAB
    torch.manual_seed(5)
    assert torch.equal(net.generate(prompt, 15, seed=1), first)


@torch.no_grad()
def greedy(net: Emformer, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Without a cache: the most probable token; a full context starts again from its later half."""
    context = net.settings.context
    window = tokens[:, -context:]
    for _ in range(count):
        new = net(window)[:, -1].argmax(-1, keepdim=True)
        tokens, window = torch.cat([tokens, new], 1), torch.cat([window, new], 1)
        if window.shape[1] > context:
            window = window[:, -(context // 2) :]
    return tokens


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"positions": [RoPE()], "ffn": GELU()},
        {"form": Dense(), "content": Dense(), "positions": [RoPE()]},
        {"embedding": Embedding(1.0, 0.3, positions=Learned(std=0.5))},
        {"form": LowRank(rank=1), "content": LowRank(rank=1), "mask": All(masks=(Causal(), Window(size=3)))},
    ],
    ids=["low-rank", "rope", "dense rope", "learned", "window"],
)
@pytest.mark.parametrize("length", [1, 5, 8, 20])
def test_greedy_generation_by_cache_goes_beyond_the_context(seed, fields, length):
    net, prompt = model(context=8, **fields), words(length)
    expected = greedy(net, prompt, 30)
    assert torch.equal(net.generate(prompt, 30, temperature=0.0), expected)
    assert torch.equal(net.generate(prompt, 30, top_k=1, seed=seed), expected)
    assert torch.equal(net.generate(prompt, 30, top_p=1e-9, seed=seed), expected)


def drawn(count: int, **settings) -> torch.Tensor:
    """Frequencies of the tokens of probabilities .5, .3, .15, .05 (in another order) over many draws."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().repeat(count, 1) + 3.0
    defaults = dict(temperature=1.0, top_k=None, top_p=None)
    tokens = choose(logits, **(defaults | settings), generator=torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=4) / count


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.49, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.81, {0, 1, 3}), (0.96, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_smallest_set(top_p, kept):
    frequency = drawn(4000, top_p=top_p)
    assert set(frequency.nonzero().flatten().tolist()) == kept
    chosen = torch.tensor([0.15, 0.5, 0.05, 0.3]) * torch.tensor([float(k in kept) for k in range(4)])
    assert (frequency - chosen / chosen.sum()).abs().max() < 0.03


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})])
def test_top_k_keeps_the_most_probable(top_k, kept):
    assert set(drawn(4000, top_k=top_k).nonzero().flatten().tolist()) == kept


def test_temperature_divides_the_logits():
    for temperature in (0.5, 2.0):
        power = torch.tensor([0.15, 0.5, 0.05, 0.3]) ** (1 / temperature)
        assert (drawn(20000, temperature=temperature) - power / power.sum()).abs().max() < 0.015
    assert drawn(10, temperature=0.0)[1] == 1


def test_rows_of_a_batch_do_not_meet():
    net, prompt = model(), words(4)
    both = net.generate(prompt, 12, temperature=0.0)
    assert all(torch.equal(both[[k]], net.generate(prompt[[k]], 12, temperature=0.0)) for k in range(2))


def test_streaming_is_generating():
    net, prompt = model(), words(4)
    stream = torch.stack(list(net.stream(prompt, 12, seed=3)), 1)
    assert torch.equal(torch.cat([prompt, stream], 1), net.generate(prompt, 12, seed=3))


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_mode_as_it_was(training):
    net = model(dropout=0.5).train(training)
    a, b = net.generate(words(3), 5, seed=0), net.generate(words(3), 0)
    assert net.training == training and b.shape == (2, 3)
    assert not a.is_inference()


def test_between_two_tokens_the_caller_is_left_alone():
    """A stream may be consumed in the middle of anything: gradients are on again at every token, and after a break."""
    net = model()
    for count, _ in enumerate(net.stream(words(3), 5, seed=0)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        if count == 2:
            break
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("mask", [Full(), Window(size=3)], ids=repr)
def test_a_model_that_is_not_causal_cannot_generate(mask):
    with pytest.raises(UserError, match="causal"):
        model(mask=mask).generate(words(3), 2)
    with pytest.raises(UserError, match="causal"):
        model(layers={1: {"mask": mask}}).generate(words(3), 2)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"tokens": torch.zeros(1, 0).long()}],
    ids=repr,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="generate"):
        model().generate(**({"tokens": words(3), "count": 2} | wrong))


# Settings -------------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_settings_survive_as_yaml(fields):
    """`parts.plain`, written to a file and parsed, gives the same model: the same plain data, the same logits."""
    net, tokens = model(**fields), words(T)
    plain = parts.plain(net.settings)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Model, nested_key=None, as_group=False)
    read = vars(parser.instantiate(parser.parse_object(yaml.safe_load(yaml.safe_dump(plain)))))
    twin = Emformer(net.vocab, **read).double().eval()
    assert parts.plain(twin.settings) == plain
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(tokens), net(tokens))


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"heads": 0},
        {"dropout": 1.0},
        {"layers": {2: {}}},
        {"layers": {0: {"depth": 3}}},
        {"shared": True, "layers": {0: {"epsilon": 0.5}}},
        {"form": LowRank(rank=3), "positions": [RoPE()]},
        {"form": LowRank(rank=4, groups=3)},
    ],
    ids=repr,
)
def test_what_cannot_be_built_is_refused_in_a_sentence(wrong):
    with pytest.raises(UserError) as error:
        model(**wrong)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_layers_see_their_own_settings():
    net = model(depth=3, layers={1: {"form": Dense(), "ffn": GELU()}})
    kinds = [type(net.layer(k).attention.form).__name__ for k in range(3)]
    assert kinds[0] == kinds[2] != kinds[1]
    assert [net.layer(k).ffn is None for k in range(3)] == [True, False, True]


def test_every_pair_of_form_and_content_works_together():
    forms = [example.values[0] for example in examples(parts.Operator) if "form" in _operator(example.values[0])]
    for form, content in itertools.product(forms, examples(parts.Operator)):
        net = stir(model(form=form, content=content.values[0], depth=1))
        assert net(words(T)).isfinite().all()
