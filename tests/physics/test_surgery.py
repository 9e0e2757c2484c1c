"""Surgery: a changed copy does what it says, and the original knows nothing of it (math A, E.3, H, K)."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from builders import VOCAB, model, words
from torch import Tensor

from emformer.block import Parallel
from emformer.ffn import GELU
from emformer.kernels import L2, Sigmoid, Sinkhorn, SinkSoftmax, Softmax, TopK, Unnormalised
from emformer.masks import All, Causal, Full, Window
from emformer.model import Emformer
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import PSD, Dense, Identity, LowRank, Preconditioned, Symmetric, Tied
from emformer.parts import UserError
from emformer.placements import PostNorm, SandwichNorm, Sphere
from emformer.positions import KeyNorm, QueryNorm, RoPE
from emformer.settings import Drift, Functional
from emformer.surgery import (
    Hidden,
    canonical,
    change_mask,
    mean_ablate,
    means,
    noise,
    remove_sink,
    replace_sink,
    retie,
    shuffle,
    skip,
    swap_kernel,
    symmetrise,
)
from emformer.surgery.copies import multiplied

T = 10
GQA = LowRank(rank=4, groups=2)
BIASES: dict[str, Any] = dict(functional=Functional(), drift=Drift())
ZOO: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": BIASES,
    "grouped": dict(heads=4, form=GQA, content=GQA, **BIASES),
    "dense": dict(form=Dense(), content=Dense(), **BIASES),
    "dense form": dict(form=Dense()),
    "rope": dict(positions=[RoPE()], **BIASES),
    "rope grouped": dict(heads=4, form=GQA, content=GQA, positions=[RoPE(fraction=0.5)], **BIASES),
    "rope dense": dict(form=Dense(), positions=[RoPE()]),
    "key norm": dict(positions=[KeyNorm()]),
    "query norm, rope": dict(positions=[QueryNorm(), RoPE()]),
    "l2": dict(form=LowRank(rank=4, balanced=True), kernel=L2(), **BIASES),
    "sink": dict(kernel=SinkSoftmax(beta=0.7), **BIASES),
    "zero sink": dict(kernel=SinkSoftmax(learned=False), **BIASES),
    "sigmoid": dict(heads=4, form=GQA, content=GQA, kernel=Sigmoid(), **BIASES),
    "top": dict(kernel=TopK(k=3)),
    "dense sigmoid": dict(form=Dense(), kernel=Sigmoid(), **BIASES),
    "tied": dict(content=Tied(), kernel=Sigmoid(), **BIASES),
    "preconditioned": dict(form=GQA, heads=4, content=Preconditioned()),
    "constrained": dict(form=PSD(rank=4), content=Symmetric(rank=4), ffn=GELU()),
    "identity": dict(form=Identity(), content=Identity(learned=False)),
    "ffn": dict(ffn=GELU(), epsilon=0.5, dropout=0.1),
    "parallel": dict(ffn=GELU(), arrangement=Parallel(), drift=Drift()),
    "post norm": dict(ffn=GELU(), placement=PostNorm()),
    "sandwich": dict(ffn=GELU(), placement=SandwichNorm(), norm=LayerNorm(bias=True), drift=Drift()),
    "sphere": dict(ffn=GELU(), placement=Sphere(), epsilon=0.5, drift=Drift()),
    "shared": dict(depth=3, shared=True, ffn=GELU(), drift=Drift()),
    "full": dict(mask=Full(), form=GQA, content=GQA, heads=4),
    "sinkhorn": dict(mask=Full(), kernel=Sinkhorn(tolerance=1e-7), drift=Drift()),
}
SAMPLE = torch.randint(VOCAB, (4, T), generator=torch.Generator().manual_seed(5))
SURGERIES: dict[str, Callable[[Emformer], Emformer]] = {
    "skip": lambda m: skip(m, "attn"),
    "skip a head": lambda m: skip(m, "attn", layers=1, heads=1),
    "skip ffn": lambda m: skip(m, "ffn", layers=[0]),
    "mean": lambda m: mean_ablate(m, means(m, SAMPLE), "attn"),
    "mean of a head": lambda m: mean_ablate(m, means(m, SAMPLE), "attn", layers=[1], heads=[0]),
    "mean of ffn": lambda m: mean_ablate(m, means(m, SAMPLE), "ffn"),
    "noise left": lambda m: noise(m, 0.3, "left", seed=1),
    "noise right": lambda m: noise(m, 0.3, "right", seed=1, layers=[0]),
    "noise right on a head": lambda m: noise(m, 0.3, "right", seed=1, heads=1),
    "noise on queries": lambda m: noise(m, 0.3, "query", seed=1),
    "noise on keys": lambda m: noise(m, 0.3, "key", seed=1, relative=False),
    "noise on a head's queries": lambda m: noise(m, 0.3, "query", seed=1, heads=0),
    "noise on a head's keys": lambda m: noise(m, 0.3, "key", seed=1, heads=0),
    "remove sink": lambda m: remove_sink(m),
    "remove a head's sink": lambda m: remove_sink(m, heads=1),
    "remove first": lambda m: remove_sink(m, 0),
    "remove first for a head": lambda m: remove_sink(m, 0, heads=1),
    "replace sink": lambda m: replace_sink(m, "zero", None),
    "replace first": lambda m: replace_sink(m, "zero"),
    "replace first by its mean": lambda m: replace_sink(m, means(m, SAMPLE), heads=0),
    "symmetrise": lambda m: symmetrise(m),
    "symmetrise a head": lambda m: symmetrise(m, layers=[1], heads=[1]),
    "retie": lambda m: retie(m),
    "retie a head": lambda m: retie(m, 0.4, heads=1),
    "shuffle": lambda m: shuffle(m, 3),
    "shuffle a head's form": lambda m: shuffle(m, 3, ["form"], heads=0),
    "swap": lambda m: swap_kernel(m, Unnormalised()),
    "swap for a head": lambda m: swap_kernel(m, Sigmoid(), heads=1),
    "mask": lambda m: change_mask(m, All((m.settings.mask, Window(4)))),
    "canonical": lambda m: canonical(m),
}
SECOND: list[Callable[[Emformer], Emformer]] = [
    lambda m: skip(m, "attn", heads=0),
    lambda m: shuffle(m, 1),
    lambda m: noise(m, 0.1, "key", seed=2),
    lambda m: retie(m, heads=1),
    lambda m: mean_ablate(m, means(m, SAMPLE), "attn", heads=0),
]
REFUSED = {
    ("skip ffn", "no FFN"): {k for k, v in ZOO.items() if "ffn" not in v},
    ("mean of ffn", "no FFN"): {k for k, v in ZOO.items() if "ffn" not in v},
    ("remove sink", "not one softmax"): set(ZOO) - {"sink", "zero sink"},
    ("remove a head's sink", "not one softmax"): set(ZOO) - {"sink", "zero sink"},
    ("replace sink", "no sink with"): set(ZOO) - {"sink"},
    ("remove first", "balances columns"): {"sinkhorn"},
    ("remove first for a head", "balances columns"): {"sinkhorn"},
    ("replace first", "do not sum to one"): {"sink", "zero sink", "sigmoid", "dense sigmoid", "tied"},
    ("replace first by its mean", "do not sum to one"): {"sink", "zero sink", "sigmoid", "dense sigmoid", "tied"},
    ("symmetrise", "not linear"): {"key norm", "query norm, rope", "l2"},
    ("symmetrise a head", "not linear"): {"key norm", "query norm, rope", "l2"},
}
SAME = {("symmetrise", "identity"), ("symmetrise a head", "identity"), ("retie", "tied"), ("retie", "identity")}
SAME |= {("symmetrise", "constrained"), ("symmetrise a head", "constrained"), ("retie", "preconditioned")}
SAME |= {("swap for a head", "dense sigmoid"), ("swap for a head", "sigmoid"), ("swap for a head", "tied")}


def refusal(surgery: str, member: str) -> str | None:
    return next((why for (name, why), members in REFUSED.items() if name == surgery and member in members), None)


def snapshot(net: Emformer) -> tuple[Any, ...]:
    return net.settings, net.training, getattr(net, "surgery", ()), {k: v.clone() for k, v in net.state_dict().items()}


def states(net: Emformer, tokens: Tensor) -> Tensor:
    return torch.stack([step.after for step in net.flow(tokens)])


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).detach().abs().max())


def scores(net: Emformer, layer: int, y: Tensor) -> Tensor:
    """s_ij as the layer's factors make them, (B, H, T, T)."""
    attention = net.layer(layer).attention
    u, v = attention.factors(y, torch.arange(y.shape[1]))
    return u @ v.repeat_interleave(u.shape[1] // v.shape[1], 1).mT


def cloud(batch: int = 2, dim: int = 8) -> Tensor:
    return torch.randn(batch, T, dim, dtype=torch.float64)


def matrices(net: Emformer, layer: int = 0) -> tuple[Tensor, Tensor]:
    m, f = net.layer(layer).attention.matrices()
    return m.detach(), f.detach()


# What holds for every surgery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ZOO)
@pytest.mark.parametrize("surgery", SURGERIES)
def test_every_surgery_on_every_model(surgery, member):
    torch.manual_seed(0)
    net, tokens = model(**ZOO[member]), words(T)
    why = refusal(surgery, member)
    with torch.no_grad():
        before, outputs, state = snapshot(net), states(net, tokens), torch.get_rng_state()
        if why is not None:
            with pytest.raises(UserError, match=why):
                SURGERIES[surgery](net)
            return
        copy = SURGERIES[surgery](net)
        assert torch.equal(torch.get_rng_state(), state)
        untouched(net, copy, before)
        assert len(copy.surgery) == 1
        changed = states(copy, tokens)
        assert torch.equal(states(net, tokens), outputs), "the original computes something else"
        assert changed.isfinite().all() and changed.shape == outputs.shape
        distance = gap(changed, outputs)
        assert distance < 1e-9 if surgery == "canonical" or (surgery, member) in SAME else distance > 1e-6
        closed(copy, tokens)
        if copy.layer(0).attention.mask.causal and copy.layer(0).attention.kernel.rowwise:
            decodes(copy, tokens, changed[-1], refused="mean" in surgery and "first" not in surgery)
        again = SECOND[(list(ZOO).index(member) + list(SURGERIES).index(surgery)) % len(SECOND)](copy)
        closed(again, tokens)
        assert len(again.surgery) == 2 and again.surgery[0] == copy.surgery[0]


def untouched(net: Emformer, copy: Emformer, before: tuple[Any, ...]) -> None:
    after = snapshot(net)
    assert after[:3] == before[:3] and after[3].keys() == before[3].keys()
    assert all(torch.equal(after[3][key], value) for key, value in before[3].items())
    own = {tensor.data_ptr() for tensor in [*net.parameters(), *net.buffers()] if tensor.numel()}
    for tensor in [*copy.parameters(), *copy.buffers()]:
        assert tensor.data_ptr() not in own, "a tensor of the original"
        assert tensor.dtype in (torch.float64, torch.bool)
    assert not {id(m) for m in net.modules()} & {id(m) for m in copy.modules()}
    assert all(module.training == net.training for module in copy.modules())


def closed(net: Emformer, tokens: Tensor) -> None:
    """The stream takes in what the pieces sum to, and the mixture is that of the pattern."""
    i = torch.arange(tokens.shape[1])
    for step in net.flow(tokens):
        block = net.layer(step.layer)
        raw = step.before + block.epsilon * step.update
        place = block.place_ffn if step.point == "ffn" else block.place_attn
        assert gap(raw if place is None else place(raw), step.after) < 1e-12
        if step.point != "ffn":
            heads, rest = block.pieces(step)
            total = heads.sum(1) + rest
            assert gap((total if step.ffn is None else total + step.ffn).expand_as(step.update), step.update) < 1e-11
            a = block.attention.weights(step.read, i)
            assert gap(block.attention.mix(a, step.read), step.mixture) < 1e-10


def decodes(net: Emformer, tokens: Tensor, last: Tensor, refused: bool) -> None:
    memory = net.memory()
    *_, step = net.flow(tokens[:, :4], memory)
    found = [step.after]
    if refused:
        with pytest.raises(UserError, match="whole sequences"):
            list(net.flow(tokens[:, 4:5], memory))
        with pytest.raises(UserError, match="whole sequences"):
            net.generate(tokens, 3, seed=0)
        return
    for t in range(4, T):
        *_, step = net.flow(tokens[:, t : t + 1], memory)
        found.append(step.after)
    assert gap(torch.cat(found, 1), last) < 1e-10


def test_training_mode_and_dropout_stay(seed):
    net = model(ffn=GELU(), dropout=0.3).train()
    net.layer(1).eval()
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    found = means(net, words(T).clone())
    assert [module.training for module in net.modules()] == modes
    torch.set_rng_state(state)
    evaluated = means(deepcopy(net).eval(), words(T))
    assert all(torch.equal(found.updates[key], evaluated.updates[key]) for key in found.updates)
    assert skip(net, "attn").training


def test_a_shared_block_stays_one_while_it_can():
    net = model(**ZOO["shared"])
    for copy in (skip(net, "attn"), noise(net, 0.1, "left", 0), retie(net, layers=range(3)), swap_kernel(net, TopK(k=2))):
        assert copy.settings.shared and len(copy.blocks) == 1
    assert copy.settings.kernel == TopK(k=2)
    whole = means(net, SAMPLE)
    for copy in (
        skip(net, "attn", layers=1),
        noise(net, 0.1, "query", 0),
        mean_ablate(net, whole, "attn"),
        swap_kernel(net, TopK(k=2), layers=[0, 2]),
    ):
        assert not copy.settings.shared and len({id(block) for block in copy.blocks}) == 3
    assert [copy.settings.layer(k).kernel for k in range(3)] == [TopK(k=2), Softmax(), TopK(k=2)]
    assert net.settings.shared and len(net.blocks) == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda m: skip(m, "attn", layers=2), "no layer 2; choose from 0 … 1"),
        (lambda m: skip(m, "attn", layers=[-1]), "no layer -1"),
        (lambda m: shuffle(m, 0, heads=[0, 5]), "no head 5"),
        (lambda m: skip(m, "ffn"), "no FFN"),
        (lambda m: skip(m, "ffn", heads=[0]), "no heads"),
        (lambda m: shuffle(m, 0, ["m"]), "'m'; choose from form, content"),
        (lambda m: noise(m, -1.0, "left", 0), "sigma"),
        (lambda m: remove_sink(m, 24), "no position 24"),
        (lambda m: replace_sink(m, torch.zeros(3)), r"is \(3,\)"),
        (lambda m: replace_sink(m, means(m, words(3)), 5), "know no token"),
        (lambda m: retie(m, torch.ones(3)), "scale"),
        (lambda m: swap_kernel(m, Sinkhorn()), "causal mask"),
        (lambda m: means(m, []), "no sequence"),
        (lambda m: means(m, [words(3), words(4)]), "one length"),
        (lambda m: mean_ablate(m, means(model(dim=12), words(3)), "attn"), "do not fit"),
    ],
)
def test_mistakes_get_one_sentence(wrong, why):
    with pytest.raises(UserError, match=why):
        wrong(model())


def test_lines_of_a_copy():
    net = noise(skip(model(), "attn", layers=(k for k in [1]), heads=iter([0, 1])), 0.1, "left", seed=3)
    assert net.surgery == ("skip attn (layers 1; heads 0, 1)", "noise 0.1 on left, seed 3")
    assert swap_kernel(net, TopK(k=2), layers=0).surgery[2] == "swap the kernel for TopK(beta=1.0, k=2) (layers 0)"
    assert model().surgery == ()


@pytest.mark.parametrize("member", ["plain", "grouped", "dense", "tied", "preconditioned", "constrained", "identity"])
@pytest.mark.parametrize("role", ["form", "content"])
def test_an_operator_between_two_matrices(seed, member, role):
    """W -> A W B, A on the left; the other operator stays, and all that is left is the copy's own."""
    attention = model(**ZOO[member]).layer(0).attention
    heads = attention.form.heads
    a, b = torch.randn(2, heads, 8, 8, dtype=torch.float64)
    b = b[:1].expand_as(b)
    w = dict(zip(("form", "content"), attention.matrices(), strict=True))
    new = multiplied(attention, role, a, b, torch.ones(heads, dtype=torch.bool))
    found = dict(zip(("form", "content"), new.matrices(), strict=True))
    expected = w | {role: a @ w[role] @ b}
    assert all(gap(found[key], expected[key]) < 1e-10 for key in w)
    half = new.float().matrices()  # nothing hides in an operator that is no more: all is cast
    assert all(x.dtype == torch.float32 for x in half) and gap(half[0].double(), found["form"]) < 1e-4


# Ablation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["grouped", "sigmoid", "dense", "sink"])
def test_skipping_a_head_is_zeroing_its_f(seed, member):
    net, tokens = model(**ZOO[member]), words(T)
    hand = deepcopy(net)
    with torch.no_grad():
        hand.layer(1).attention.content.left_factor[1] = 0
    assert gap(skip(net, "attn", layers=1, heads=1)(tokens), hand(tokens)) < 1e-12


@pytest.mark.parametrize("member", ["sigmoid", "parallel", "post norm", "sandwich", "sphere", "ffn", "sink"])
@pytest.mark.parametrize("point", ["attn", "ffn"])
def test_skipping_a_sublayer_by_hand(seed, member, point):
    net, tokens = model(**{"ffn": GELU(), **ZOO[member]}), words(T)
    copy = skip(net, point, layers=[1])
    assert gap(states(copy, tokens)[0], states(net, tokens)[0]) == 0
    with torch.no_grad():
        x = [step for step in net.flow(tokens) if step.layer == 0][-1].after
        block = net.layer(1)

        def updated(x: Tensor, name: str) -> Tensor:
            read, shape = getattr(block, f"read_{name}"), getattr(block, f"shape_{name}")
            y = x if read is None else read(x)
            if name == point:
                update = torch.zeros_like(y)
            else:
                update = block.ffn(y) if name == "ffn" else block.attention.lift(block.attention(y, torch.arange(T)))
            return update if shape is None else shape(x, update)

        def placed(raw: Tensor, name: str) -> Tensor:
            place = getattr(block, f"place_{name}")
            return raw if place is None else place(raw)

        if member == "parallel":
            x = placed(x + updated(x, "attn") + updated(x, "ffn"), "attn")
        else:
            for name in ("attn", "ffn"):
                x = placed(x + block.epsilon * updated(x, name), name)
        assert gap(copy(tokens), net.unembed(x)) < 1e-12
    steps = list(copy.flow(tokens))
    assert len(steps) == len(list(net.flow(tokens)))
    if member not in ("sandwich", "parallel"):
        assert all(step.update.abs().max() == 0 for step in steps if step.layer == 1 and step.point == point)


@pytest.mark.parametrize("member", ["biases", "sigmoid", "parallel", "sandwich", "sphere", "post norm", "shared", "tied"])
@pytest.mark.parametrize("point", ["attn", "ffn"])
def test_the_mean_of_one_sequence_changes_nothing(seed, member, point):
    net, tokens = model(**{"ffn": GELU(), **ZOO[member]}), words(T, batch=1)
    assert gap(mean_ablate(net, means(net, tokens), point)(tokens), net(tokens)) < 1e-12
    if point == "attn":
        assert gap(mean_ablate(net, means(net, [tokens]), point, heads=0)(tokens), net(tokens)) < 1e-12


def test_means_by_hand_and_what_they_replace(seed):
    net, batches = model(**ZOO["sigmoid"], ffn=GELU(), placement=SandwichNorm()), [words(T, 3), words(T, 2)]
    found = means(net, iter(batches))
    assert found.count == 5 and found.heads[1].dtype == torch.float64
    tokens = torch.cat(batches)
    for step in net.flow(tokens):
        block = net.layer(step.layer)
        if step.point == "attn":
            z = block.attention(step.read, torch.arange(T))
            assert gap(found.heads[step.layer], block.attention.content.lift_heads(z).mean(0)) < 1e-12
            assert gap(found.updates[step.layer, "attn"], block.attention.lift(z).mean(0)) < 1e-12
            assert gap(found.reads[step.layer], step.read.mean(0)) < 1e-12
        else:
            assert gap(found.updates[step.layer, "ffn"], block.ffn(step.read).mean(0)) < 1e-12
    copy = mean_ablate(net, found, "attn", layers=1, heads=[2])
    step = next(step for step in copy.flow(tokens) if step.layer == 1)
    content, old = copy.layer(1).attention.content, net.layer(1).attention
    z = old(step.read, torch.arange(T))
    assert gap(content.lift_heads(step.mixture)[:, 2], found.heads[1][2].expand(5, -1, -1)) < 1e-12
    others = [0, 1, 3]
    assert gap(content.lift_heads(step.mixture)[:, others], old.content.lift_heads(z)[:, others]) < 1e-12
    assert gap(copy(tokens[:, :4]), copy(tokens)[:, :4]) < 1e-12  # shorter sequences are whole too
    with pytest.raises(UserError, match="at most 10"):
        copy(words(T + 1))
    twice = mean_ablate(copy, found, "attn", layers=1, heads=[0])
    step = next(step for step in twice.flow(tokens) if step.layer == 1)
    lifted = twice.layer(1).attention.content.lift_heads(step.mixture)
    assert gap(lifted[:, [0, 2]], found.heads[1][[0, 2]].expand(5, -1, -1, -1)) < 1e-12


def test_a_second_surgery_on_a_head_takes_the_place_of_the_first(seed):
    net, tokens, here = model(**ZOO["grouped"]), words(T), dict(layers=1, heads=2)
    first, second = means(net, words(T, 3)), means(net, words(T, 3))
    copy = mean_ablate(net, first, "attn", **here)
    for change in (
        lambda m: mean_ablate(m, second, "attn", **here),
        lambda m: skip(m, "attn", **here),
        lambda m: retie(m, 0.5, **here),
        lambda m: retie(m, 0.5, layers=1),
        lambda m: skip(m, "attn", layers=1),
    ):
        assert gap(change(copy)(tokens), change(net)(tokens)) < 1e-12
        assert gap(change(copy)(tokens), copy(tokens)) > 1e-6
    for change in (lambda m: shuffle(m, 1), lambda m: noise(m, 0.1, "left", 1), lambda m: retie(m, heads=[0, 1, 3])):
        one, two = change(copy), mean_ablate(change(net), first, "attn", **here)
        assert gap(one(tokens), two(tokens)) < 1e-12  # what is constant stays so


# Noise ----------------------------------------------------------------------------------------------------------------


def drawn(on: str, heads: int, sigma: float, seed: int, layer: int) -> Tensor:
    """E (H, 8, 8), read off a model whose M is the identity."""
    net = model(heads=heads, form=Identity(scale=1.0, learned=False))
    return matrices(noise(net, sigma, on, seed), layer)[0] - torch.eye(8, dtype=torch.float64)


@pytest.mark.parametrize("member", ["plain", "dense", "grouped", "rope grouped", "preconditioned", "constrained", "l2"])
@pytest.mark.parametrize("on", ["left", "right"])
def test_noise_on_m_is_a_factor(seed, member, on):
    net, sigma = model(**ZOO[member]), 0.3
    copy = noise(net, sigma, on, seed)
    for layer in range(2):
        (m, f), (changed, kept) = matrices(net, layer), matrices(copy, layer)
        e = drawn(on, len(m), sigma, seed, layer)
        form = net.layer(layer).attention.form
        if on == "right" and form.groups < len(m) and not form.identity_right:
            share = len(m) // form.groups
            e = e[::share].repeat_interleave(share, 0)
            assert copy.layer(layer).attention.form.groups == form.groups
        one = torch.eye(8, dtype=torch.float64)
        assert gap(changed, (one + e) @ m if on == "left" else m @ (one + e)) < 1e-12
        assert gap(kept, f) < 1e-12  # also where it was tied
    first, second = drawn(on, 4, sigma, seed, 0), drawn(on, 4, sigma, seed, 1)
    assert first.flatten(1).corrcoef().triu(1).abs().max() < 0.5 and (first - second).abs().min() < (first - second).abs().max()
    assert gap(drawn(on, 4, sigma, seed, 0), first) == 0
    assert gap(drawn(on, 4, sigma, seed + 1, 0), first) > 0.1 and gap(first, second) > 0.1


def test_the_size_of_noise():
    one = model(dim=64, heads=4, form=Identity(scale=1.0, learned=False))
    e = 8 * (matrices(noise(one, 0.1, "left", 7))[0] - torch.eye(64, dtype=torch.float64)) / 0.1
    assert abs(e.std() - 1) < 0.03 and abs(e.mean()) < 4 / math.sqrt(e.numel())
    assert abs(e.diagonal(dim1=1, dim2=2).mean()) < 4 / 16 and e.flatten(1).corrcoef().triu(1).abs().max() < 4 / 64
    net = model(dim=64, heads=4, form=LowRank(rank=16))
    old = matrices(net)[0]
    for on in ("left", "right"):
        size = (matrices(noise(net, 0.1, on, 3))[0] - old).norm(dim=(1, 2)) / old.norm(dim=(1, 2))
        assert (size / 0.1 - 1).abs().max() < 0.1


def test_noise_on_some_heads_of_a_group_leaves_the_others(seed):
    net = model(**ZOO["rope grouped"])
    y = cloud()
    for change in (
        lambda m: noise(m, 0.3, "right", 0, heads=[1, 2, 3]),
        lambda m: noise(m, 0.3, "key", 0, heads=[1, 2, 3]),
        lambda m: noise(m, 0.3, "query", 0, heads=[1, 2, 3]),
        lambda m: noise(m, 0.3, "left", 0, heads=[1, 2, 3]),
        lambda m: shuffle(m, 0, ["form"], heads=[1, 2, 3]),
    ):
        was, now = scores(net, 0, y), scores(change(net), 0, y)
        assert gap(was[:, 0], now[:, 0]) < 1e-12
        assert all(gap(was[:, h], now[:, h]) > 1e-2 for h in (1, 2, 3))
    whole, part = noise(net, 0.3, "right", 0), noise(net, 0.3, "right", 0, heads=[1, 2, 3])
    assert gap(matrices(whole)[0][1:], matrices(part)[0][1:]) < 1e-12


def test_right_noise_acts_on_what_the_key_is_read_from(seed):
    """s_ij = y^T (M (I + E)) y' + u^T (I + E) y': the key's token goes to (I + E) y', dense or factored."""
    for form in (LowRank(rank=4), Dense()):
        net = model(heads=1, form=form, **BIASES)
        copy, y = noise(net, 0.3, "right", seed), cloud()
        e = drawn("right", 1, 0.3, seed, 0)[0]
        old = net.layer(0).attention
        u, v = old.factors(y, torch.arange(T))[0], old.factors(y @ (torch.eye(8) + e).mT, torch.arange(T))[1]
        assert gap(scores(copy, 0, y), u @ v.mT) < 1e-12


@pytest.mark.parametrize("member", ["plain", "grouped", "rope", "key norm", "dense", "rope dense"])
def test_noise_on_queries_leaves_keys_alone_and_the_other_way_round(seed, member):
    net, y, i = model(**ZOO[member]), cloud(3), torch.arange(T)
    u, v = net.layer(0).attention.factors(y, i)
    for on, still, moved in (("query", 1, 0), ("key", 0, 1)):
        copy = noise(net, 0.2, on, seed)
        found = copy.layer(0).attention.factors(y, i)
        assert torch.equal(found[still], (u, v)[still])
        assert gap(found[moved], (u, v)[moved]) > 1e-2
        again = copy.layer(0).attention.factors(y, i)
        assert torch.equal(found[moved], again[moved])
        assert gap(noise(net, 0.2, on, seed + 1).layer(0).attention.factors(y, i)[moved], found[moved]) > 1e-2
        assert copy.layer(0).attention.absorbable == (net.layer(0).attention.absorbable and (on == "query" or "dense" in member))
        other = copy.layer(1).attention.positions[0]._draw(found[moved], i)
        assert gap(other, copy.layer(0).attention.positions[0]._draw(found[moved], i)) > 0.1


def test_the_law_of_run_time_noise():
    net = model(heads=2, form=LowRank(rank=16), dim=16)
    y, i = torch.randn(20, 24, 16, dtype=torch.float64), torch.arange(24)
    u, v = net.layer(0).attention.factors(y, i)
    for on, which, x in (("query", 0, u), ("key", 1, v)):
        n = noise(net, 0.1, on, 3, relative=False).layer(0).attention.factors(y, i)[which] - x
        assert abs(n.std() / 0.1 - 1) < 0.02 and abs(n.mean()) < 4 * 0.1 / math.sqrt(n.numel())
        flat = n.transpose(0, 2).flatten(1)  # rows: positions
        assert flat.corrcoef().triu(1).abs().max() < 0.2 and n.flatten(1).corrcoef().triu(1).abs().max() < 0.2
        relative = noise(net, 0.1, on, 3).layer(0).attention.factors(y, i)[which] - x
        assert gap(relative, n * x.square().mean(-1, keepdim=True).sqrt()) < 1e-12
    assert net.layer(0).attention.positions._modules == {}


def test_kl_of_key_noise_follows_its_law():
    """KL ~ (sigma^2/2) |q|^2 (1 - sum a^2) for independent noise of size sigma on the keys (math H.1)."""
    torch.manual_seed(0)
    net, y, i, sigma = model(heads=1, mask=Full()), cloud(400), torch.arange(T), 1e-2
    attention = net.layer(0).attention
    a, (u, _) = attention.weights(y, i), attention.factors(y, i)
    b = noise(net, sigma, "key", 1, relative=False).layer(0).attention.weights(y, i)
    expected = sigma**2 / 2 * u.square().sum(-1) * (1 - a.square().sum(-1))
    assert abs((a * (a / b).log()).sum() / expected.sum() - 1) < 0.05


# Sinks ----------------------------------------------------------------------------------------------------------------


def test_without_the_kernels_sink_rows_are_divided_by_their_mass(seed):
    for member in ("sink", "zero sink"):
        net, y, i = model(**ZOO[member]), cloud(), torch.arange(T)
        copy = remove_sink(net)
        old, new = net.layer(0).attention, copy.layer(0).attention
        a = old.weights(y, i)
        lifted = new.weights(y, i)
        assert gap(lifted, a / a.sum(-1, keepdim=True)) < 1e-12
        r = old.content.right(y) + old.value_bias.unsqueeze(1)  # b_V becomes part of the drift: rows sum to one
        expected = old.content.lift(lifted @ r) + old.drift
        assert gap(new.lift(new(y, i)), expected) < 1e-12
        assert copy.settings.kernel == Softmax(beta=net.settings.kernel.beta) and new.kernel.value is None
        part = remove_sink(net, heads=[1]).layer(0).attention.weights(y, i)
        assert torch.equal(part[:, 0], a[:, 0]) and gap(part[:, 1], lifted[:, 1]) < 1e-12


@pytest.mark.parametrize("member", ["plain", "sigmoid", "l2", "rope", "full", "sink"])
@pytest.mark.parametrize("position", [0, 3])
def test_without_a_token_as_sink(seed, member, position):
    net, y, i = model(**ZOO[member]), cloud(), torch.arange(T)
    for heads in (None, [1]):
        copy = remove_sink(net, position, heads=heads)
        old, new = net.layer(0).attention, copy.layer(0).attention
        a, b = old.weights(y, i), new.weights(y, i)
        others = i != position
        assert b[:, 1, others, position].abs().max() == 0 and (b[:, 1, position, position] > 0).all()
        if heads is None:
            assert (b[:, :, others, position] == 0).all() and copy.settings.mask == All((net.settings.mask, Hidden(position)))
        else:
            assert torch.equal(b[:, 0], a[:, 0]) and copy.settings == net.settings
        if old.kernel.normalised:
            rest = a[:, 1].clone()
            rest[:, others, position] = 0
            assert gap(b[:, 1], rest / rest.sum(-1, keepdim=True)) < 1e-12


@pytest.mark.parametrize("member", ["biases", "grouped", "dense", "dense form", "rope dense", "l2", "full"])
def test_another_content_for_the_first_token(seed, member):
    """D_i = (1 - lam) F m_rest + lam F y_0 with F y_0 replaced, for i > 0 and for the chosen heads (math H.2)."""
    net, y, i = model(**ZOO[member]), cloud(), torch.arange(T)
    old = net.layer(0).attention
    a, f = old.weights(y, i), matrices(net)[1]
    heads = len(f)
    drift = 0.0 if old.drift is None else old.drift
    vectors = torch.randn(heads, 8, dtype=torch.float64)
    for value, chosen in (("zero", None), (vectors, None), (vectors[0], [1]), ("zero", [0])):
        copy = replace_sink(net, value, heads=chosen)
        new = copy.layer(0).attention
        assert gap(new.content.matrix(), f) == 0
        given = torch.zeros(heads, 8, dtype=torch.float64) if isinstance(value, str) else value.expand(heads, 8)
        keys = y[:, None].repeat(1, heads, 1, 1)  # what each head reads in place of the tokens
        marked = list(range(heads)) if chosen is None else chosen
        keys[:, marked, 0] = given[marked]
        expected = torch.einsum("hde,bhie->bid", f, a @ keys)
        expected[:, 0] = torch.einsum("hde,bhe->bd", f, a[:, :, 0] @ y)  # the token itself reads what it read
        assert gap(new.lift(new(y, i)), expected + drift) < 1e-12


def test_the_mean_first_token(seed):
    net = model(**ZOO["biases"])
    one = words(T)
    one[:, 0] = 4
    assert gap(replace_sink(net, means(net, one))(one), net(one)) < 1e-12  # the trap of H.2
    tokens = words(T, 6)
    found = means(net, tokens)
    assert gap(replace_sink(net, found)(tokens), net(tokens)) > 1e-4
    copy = replace_sink(net, found, layers=[0])
    assert gap(copy(tokens), replace_sink(net, found.reads[0][0], layers=0)(tokens)) == 0
    both = replace_sink(replace_sink(net, "zero", heads=0), found.reads[0][0], layers=0, heads=1)
    hand = replace_sink(net, torch.stack([torch.zeros(8).double(), found.reads[0][0]]), layers=0)
    y, i = cloud(), torch.arange(T)
    assert gap(both.layer(0).attention(y, i), hand.layer(0).attention(y, i)) < 1e-12
    turned = replace_sink(replace_sink(net, found.reads[0][0], layers=0, heads=1), "zero", heads=0)
    assert gap(turned.layer(0).attention(y, i), hand.layer(0).attention(y, i)) < 1e-12
    with pytest.raises(UserError, match="do not sum to one"):
        replace_sink(both, "zero", position=1)  # two sinks have not one mass
    shared = model(**ZOO["shared"])
    found = means(shared, tokens)
    copy = replace_sink(shared, found)
    assert all(torch.equal(copy.layer(k).attention.kernel.value[1], found.reads[k][0]) for k in range(3))


def test_the_vector_of_the_kernels_sink(seed):
    net, y, i = model(**ZOO["sink"]), cloud(), torch.arange(T)
    value = torch.randn(8, dtype=torch.float64)
    copy = replace_sink(net, value, None, heads=1)
    old, new = net.layer(0).attention, copy.layer(0).attention
    assert torch.equal(old.weights(y, i), new.weights(y, i))
    left = 1 - old.weights(y, i).sum(-1, keepdim=True)
    moved = (left[:, 1] * (value - old.kernel.value[1])) @ matrices(net)[1][1].mT
    assert gap(new.lift(new(y, i)), old.lift(old(y, i)) + moved) < 1e-12


# Symmetry, ties, spectra ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["plain", "grouped", "dense", "dense form", "rope", "rope grouped", "rope dense", "sigmoid"])
def test_symmetric_scores(seed, member):
    bare = {k: v for k, v in ZOO[member].items() if k not in BIASES}
    net, y = model(**bare), cloud()
    copy = symmetrise(net)
    was, now = scores(net, 0, y), scores(copy, 0, y)
    assert gap(now, now.mT) < 1e-12 and gap(was, was.mT) > 0.1
    assert gap(now, (was + was.mT) / 2) < 1e-12
    m = matrices(net)[0]
    assert gap(matrices(copy)[0], (m + m.mT) / 2) < 1e-12
    part = scores(symmetrise(net, heads=[1]), 0, y)
    assert gap(part[:, 0], was[:, 0]) < 1e-12 and gap(part[:, 1], now[:, 1]) < 1e-12


@pytest.mark.parametrize("member", ["biases", "grouped", "dense", "dense sigmoid", "rope", "rope grouped", "sigmoid", "tied"])
def test_biases_outlive_symmetrisation(seed, member):
    """s - s(no biases) is what it was: u, w and c0 stay, turned by RoPE as before."""
    net, y = model(**ZOO[member]), cloud()

    def of_biases(net: Emformer) -> Tensor:
        without = deepcopy(net)
        with torch.no_grad():
            for bias in without.layer(0).attention.biases.parameters():
                bias.zero_()
        return scores(net, 0, y) - scores(without, 0, y)

    for heads in (None, [0]):
        assert gap(of_biases(symmetrise(net, heads=heads)), of_biases(net)) < 1e-12
    assert gap(matrices(symmetrise(net))[1], matrices(net)[1]) < 1e-12


@pytest.mark.parametrize("member", ["plain", "grouped", "dense", "dense form", "rope grouped", "tied", "l2"])
def test_retied(seed, member):
    net = model(**{**ZOO[member], **({"content": GQA} if member == "rope grouped" else {})})
    m, f = matrices(net)
    copy = retie(net, 0.7)
    assert gap(matrices(copy)[1], 0.7 * m) < 1e-12
    c = torch.stack(
        [torch.linalg.lstsq(a.reshape(-1, 1), b.reshape(-1)[:, None]).solution[0, 0] for a, b in zip(m, f, strict=True)]
    )
    assert gap(matrices(retie(net))[1], c.view(-1, 1, 1) * m) < 1e-12
    part = matrices(retie(net, heads=[1]))[1]
    assert gap(part[0], f[0]) < 1e-12 and gap(part[1], c[1] * m[1]) < 1e-12
    scale = torch.arange(len(m)).double()
    assert gap(matrices(retie(net, scale))[1], scale.view(-1, 1, 1) * m) < 1e-12
    fresh = retie(net, 2.0)  # a tie follows M
    with torch.no_grad():
        for parameter in fresh.layer(0).attention.form.parameters():
            parameter.mul_(1.5)
    now = matrices(fresh)
    assert gap(now[1], 2 * now[0]) < 1e-12


@pytest.mark.parametrize("form", [GQA, LowRank(rank=6), Dense()], ids=repr)
def test_the_value_bias_goes_with_the_f_that_is_replaced(seed, form):
    net, y, i = model(**{**ZOO["sigmoid"], "form": form}), cloud(), torch.arange(T)
    old = net.layer(0).attention
    was = old.content.lift_heads(old(y, i))
    means = old.weights(y, i) @ y.unsqueeze(1)
    tied = 0.5 * means @ matrices(net)[0].mT
    for heads in (None, [1, 2]):
        new = retie(net, 0.5, heads=heads).layer(0).attention
        now = new.content.lift_heads(new(y, i))
        for head in range(4):
            expected = tied if heads is None or head in heads else was
            assert gap(now[:, head], expected[:, head]) < 1e-12


@pytest.mark.parametrize("member", ["plain", "grouped", "dense", "rope grouped", "key norm", "l2", "constrained", "tied"])
def test_shuffling_keeps_spectra_and_the_inner_space(seed, member):
    net = model(**ZOO[member])
    copy = shuffle(net, seed)
    for layer in range(2):
        for old, new in zip(matrices(net, layer), matrices(copy, layer), strict=True):
            assert gap(torch.linalg.svdvals(new), torch.linalg.svdvals(old)) < 1e-12
            assert gap(new, old) > 1e-2
        for role in ("form", "content"):
            old, new = (getattr(x.layer(layer).attention, role) for x in (net, copy))
            assert (old.groups, old.rank, old.identity_right) == (new.groups, new.rank, new.identity_right)
            if not old.identity_right:
                assert gap(new.left_rows() @ new.left_rows().mT, old.left_rows() @ old.left_rows().mT) < 1e-12
                assert gap(new.right_rows() @ new.right_rows().mT, old.right_rows() @ old.right_rows().mT) < 1e-12
    m, f = matrices(shuffle(net, seed, ["form"]))
    assert gap(f, matrices(net)[1]) < 1e-12 and gap(m, matrices(copy)[0]) < 1e-12
    m, f = matrices(shuffle(net, seed, ["content"]))
    assert gap(m, matrices(net)[0]) == 0 and gap(f, matrices(copy)[1]) < 1e-12
    assert gap(matrices(shuffle(net, seed))[0], matrices(copy)[0]) == 0
    assert gap(matrices(shuffle(net, seed + 1))[0], matrices(copy)[0]) > 1e-2
    assert gap(matrices(copy, 0)[0], matrices(shuffle(net, seed, layers=0), 0)[0]) == 0


def test_shuffled_singular_vectors_are_uniform():
    """Over many heads of one M = I: W = O_1 O_2^T is Haar, with entries of mean 0, mean square 1/d and E (tr W)^2 = 1."""
    one = Identity(scale=1.0, learned=False)
    form, w = matrices(shuffle(model(dim=8, heads=512, depth=1, form=one, content=one), 11))
    assert abs((form * w).sum((1, 2)).mean()) < 0.2  # M and F are turned independently
    assert gap(w @ w.mT, torch.eye(8, dtype=torch.float64).expand_as(w)) < 1e-12
    assert w.mean(0).abs().max() < 4 / math.sqrt(8 * 512)
    assert (w.square().mean(0) * 8 - 1).abs().max() < 0.35
    assert abs(w.diagonal(dim1=-2, dim2=-1).sum(-1).square().mean() - 1) < 0.3
    assert abs(torch.linalg.det(w).mean()) < 0.2  # both halves of O(d)
    x = torch.zeros(8, 8, dtype=torch.float64)
    x[0, 0] = 1  # singular vectors of a matrix that is not a multiple of the identity: both sides random, and independent
    one = model(dim=8, heads=512, depth=1, form=Dense())
    with torch.no_grad():
        one.layer(0).attention.form.left_factor.copy_(x.expand(512, 8, 8))
    m = matrices(shuffle(one, 11))[0]
    assert (m.square().mean(0) * 64 - 1).abs().max() < 0.6 and abs(m.diagonal(dim1=-2, dim2=-1).sum(-1).mean()) < 0.1


# Swaps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [Softmax(beta=0.5), TopK(k=3), L2(), Sigmoid(), SinkSoftmax(), Unnormalised()], ids=repr)
@pytest.mark.parametrize("member", ["plain", "rope", "dense", "grouped"])
def test_a_swapped_kernel_is_a_built_one(seed, member, kernel):
    net, tokens = model(**ZOO[member]), words(T)
    copy = swap_kernel(net, kernel)
    built = Emformer(VOCAB, **vars(copy.settings)).double().eval()
    assert built.settings.kernel == kernel
    built.load_state_dict(copy.state_dict())
    assert gap(copy(tokens), built(tokens)) == 0
    mine, state = net.state_dict(), copy.state_dict()
    assert mine.keys() <= state.keys() and all(torch.equal(state[key], value) for key, value in mine.items())
    assert all(value.abs().max() == 0 for key, value in state.items() if key not in mine)
    assert gap(swap_kernel(copy, net.settings.kernel)(tokens), net(tokens)) < 1e-12  # and back
    some = swap_kernel(net, kernel, layers=[1])
    assert [some.settings.layer(k).kernel for k in range(2)] == [net.settings.kernel, kernel]
    built = Emformer(VOCAB, **vars(some.settings)).double().eval()
    built.load_state_dict(some.state_dict())
    assert gap(some(tokens), built(tokens)) == 0


def test_what_a_kernel_does_not_see_goes_where_it_belongs(seed):
    """From rows that do not sum to one to rows that do: b_V is a drift; b_K is nothing, but not to L2."""
    net, y, i = model(**ZOO["sigmoid"]), cloud(), torch.arange(T)
    old = net.layer(0).attention
    new = swap_kernel(net, Softmax()).layer(0).attention
    u, v = old.factors(y, i)
    s = u @ v.repeat_interleave(2, 1).mT
    a = s.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    c = (old.content.right(y) + old.value_bias.unsqueeze(1)).repeat_interleave(2, 1)
    assert new.biases.right is None and new.value_bias is None
    assert gap(new.lift(new(y, i)), old.content.lift(a @ c) + old.drift) < 1e-12
    near = swap_kernel(net, L2()).layer(0).attention
    distance = (u.unsqueeze(-2) - v.repeat_interleave(2, 1).unsqueeze(-3)).square().sum(-1)
    a = (-distance / 2).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    assert gap(near.weights(y, i), a) < 1e-12 and gap(near.factors(y, i)[1], v) == 0


def test_a_sink_is_kept_by_another_temperature(seed):
    net = model(**ZOO["sink"])
    copy = swap_kernel(net, SinkSoftmax(beta=2.0))
    assert torch.equal(copy.layer(0).attention.kernel.value, net.layer(0).attention.kernel.value)
    part = swap_kernel(net, Softmax(), heads=0).layer(0).attention
    assert torch.equal(part.kernel.value[1], net.layer(0).attention.kernel.value[1]) and (part.kernel.value[0] == 0).all()


def test_a_changed_mask_is_a_built_one(seed):
    net, tokens = model(**ZOO["biases"]), words(T)
    mask = All((Causal(), Window(3)))
    copy = change_mask(net, mask)
    built = model(**ZOO["biases"], mask=mask)
    built.load_state_dict(net.state_dict())
    assert gap(copy(tokens), built(tokens)) == 0 and copy.settings.mask == mask
    some = change_mask(copy, Full(), layers=0)
    assert [some.settings.layer(k).mask for k in range(2)] == [Full(), mask]
    assert [some.layer(k).attention.mask for k in range(2)] == [Full(), mask]
    again = change_mask(some, Causal())
    assert again.settings == net.settings and gap(again(tokens), net(tokens)) == 0
    assert len(again.surgery) == 3


def test_hidden_by_hand():
    i = torch.arange(4)
    assert Hidden(1).visible(i[:, None], i[None, :]).int().tolist() == [[1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1]]


# Gauge ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["plain", "grouped", "rope", "rope grouped", "sigmoid", "tied", "l2", "key norm", "sink"])
def test_the_canonical_gauge_of_a_model(seed, member):
    net, tokens = model(**ZOO[member]), words(T)
    copy = canonical(net)
    assert gap(copy(tokens), net(tokens)) < 1e-10
    for layer in range(2):
        old, new = net.layer(layer).attention, copy.layer(layer).attention
        gauged = {"content": new.content, "form": new.form}
        if member in ("l2", "key norm"):
            assert torch.equal(new.form.left_factor, old.form.left_factor)
            del gauged["form"]
        if member.startswith("rope"):
            form, width = gauged.pop("form"), new.positions[0].planes
            left = form.left_rows().unflatten(0, (form.groups, -1))[..., :width, :].transpose(1, 2).flatten(2)
            planes = [rows.unflatten(1, (2, -1)).transpose(1, 2) for rows in (left, form.right_rows()[:, :width])]
            assert gap(planes[0].norm(dim=(-1, -2)), planes[1].norm(dim=(-1, -2))) < 1e-10
            assert gap(form.left_factor, old.form.left_factor) > 1e-3
        for operator in gauged.values():
            if operator is new.content and member == "tied":
                continue
            left = operator.left_rows().unflatten(0, (operator.groups, -1))
            gram = (left @ left.mT).sum(1)
            assert gap(gram, operator.right_rows() @ operator.right_rows().mT) < 1e-10
            assert gap(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))) < 1e-10
    again = canonical(copy)
    assert all(gap(value, again.state_dict()[key]) < 1e-9 for key, value in copy.state_dict().items())


def test_the_canonical_gauge_forgets_the_gauge(seed):
    net = model(**BIASES)
    other = deepcopy(net)
    with torch.no_grad():
        for block in other.blocks:
            for operator in (block.attention.form, block.attention.content):
                for head in range(2):
                    g = torch.eye(4, dtype=torch.float64) + 0.3 * torch.randn(4, 4, dtype=torch.float64)
                    operator.left_factor[head] = g.mT @ operator.left_factor[head]
                    operator.right_factor[head] = torch.linalg.inv(g) @ operator.right_factor[head]
                    if operator is block.attention.form:
                        block.attention.biases.left[head] = block.attention.biases.left[head] @ g
    one, two = canonical(net).state_dict(), canonical(other).state_dict()
    assert all(gap(one[key], two[key]) < 1e-9 for key in one)


def test_canonical_refuses_what_has_no_gauge():
    with pytest.raises(UserError, match="layer 0: several"):
        canonical(model(positions=[RoPE(), RoPE(base=100.0)]))
    with pytest.raises(UserError, match=r"layer 1: .*rank"):
        canonical(skip(model(), "attn", layers=1, heads=0))
    net = model(norm=RMSNorm(), form=Dense(), content=Dense())
    assert gap(canonical(net)(words(T)), net(words(T).clone())) >= 0  # nothing to do, and nothing done
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in canonical(net).state_dict().items())
