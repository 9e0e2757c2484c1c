"""The study of norms on queries and on keys: what it measures, on models where the answer is known (math H.1, S2 4)."""

from __future__ import annotations

import math

import pytest
import torch
from studied import VOCAB, small, subject

from emformer.ffn import GELU
from emformer.kernels import L2
from emformer.masks import Full
from emformer.model import Emformer
from emformer.norms import RMSNorm
from emformer.operators import Dense, LowRank
from emformer.parts import UserError
from emformer.positions import KeyNorm, QueryNorm, RoPE
from emformer.settings import Drift, Functional
from emformer.studies.claims.qk_norm import QKNorm, _gains, normalised
from emformer.training import MaskedToken

GQA = LowRank(rank=4, groups=2)
BIASED = dict(functional=Functional(), drift=Drift())


def quiet(share: float, word: str) -> None:
    pass


def verdicts(*subjects):
    found = QKNorm().run(subjects, quiet)
    names = ("ratio", "trained", "harmless", "dangerous", "first q", "first k", "pairs q", "pairs k", "loss")
    return dict(zip(names, found.verdicts, strict=True)), found


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("heads, part", [(2, LowRank(rank=4)), (4, GQA)], ids=["plain", "grouped"])
def test_the_norm_is_that_of_a_built_model(side, heads, part):
    fields = dict(heads=heads, form=part, content=part, positions=[RoPE()], **BIASED)
    net = small(dtype=torch.float64, **fields)
    gains = {(side, layer): torch.full((heads,), 1.7, dtype=torch.float64) for layer in range(2)}
    norm = QueryNorm(1.7) if side == "query" else KeyNorm(1.7 / 2)
    built = Emformer(VOCAB, **(vars(net.settings) | dict(positions=[norm, RoPE()]))).double().eval()
    built.load_state_dict(net.state_dict())
    tokens = torch.arange(20).view(2, 10)
    assert (normalised(net, side, gains)(tokens) - built(tokens)).abs().max() < 1e-12
    one = normalised(net, side, gains, 1)(tokens)
    assert (one - built(tokens)).abs().max() > 1e-6 < (one - net(tokens)).abs().max()


@torch.no_grad()
def test_gains_keep_the_size_of_scores_and_the_length_of_vectors():
    net = small(dtype=torch.float64, heads=4, form=GQA, content=GQA, positions=[RoPE()], **BIASED)
    one = subject(net, prompts=5)
    gains, lengths, spreads = _gains(one, net)
    i = torch.arange(16)
    y = next(net.flow(one.tokens)).read
    attention = net.layer(0).attention
    u, v = attention.factors(y, i)
    v = v.repeat_interleave(2, 1)

    def size(u, v):
        rows = [torch.einsum("bhr,bhjr->bhj", u[:, :, t], v[:, :, : t + 1]).var(-1, correction=0) for t in range(1, 16)]
        return torch.stack(rows).sum((0, 1))

    unit = {"query": (u / u.norm(dim=-1, keepdim=True), v), "key": (u, v / v.norm(dim=-1, keepdim=True))}
    for side, (a, b) in unit.items():
        assert (gains[side, 0] ** 2 * size(a, b) / size(u, v) - 1).abs().max() < 1e-10
    assert (lengths["query", 0] / u.norm(dim=-1).mean((0, 2)) - 1).abs().max() < 1e-12
    assert (lengths["key", 0] / v.norm(dim=-1).mean((0, 2)) - 1).abs().max() < 1e-12
    assert 0.1 < spreads["query"] < 1 and 0.1 < spreads["key"] < 1


def test_queries_keep_their_order_and_keys_do_not():
    """What it says is what one finds row by row."""
    net = small(depth=1, positions=[RoPE()], **BIASED)
    one = subject(net, prompts=6)
    found, findings = verdicts(one)
    assert found["first q"].measured[:3] == found["pairs q"].measured[:3] == (0, 0, 0)
    assert (
        found["first q"].word == found["pairs q"].word == "holds"
        and found["first k"].word == found["pairs k"].word == "supported"
    )
    with torch.no_grad():
        net = net.double()
        u, v = net.layer(0).attention.factors(next(net.flow(one.tokens)).read, torch.arange(16))
        s, length = u @ v.mT, v.norm(dim=-1).unsqueeze(-2)
        first, pairs = [], []
        for t in range(1, 16):
            x, y = s[:, :, t, : t + 1], (s / length)[:, :, t, : t + 1]
            first.append((x.argmax(-1) != y.argmax(-1)).double())
            a, b = ((z.unsqueeze(-1) - z.unsqueeze(-2)).sign() for z in (x, y))
            pairs.append((a * b < 0).sum((-1, -2)) / (t * (t + 1)))
    assert abs(found["first k"].measured.value - torch.stack(first).mean()) < 1e-6
    assert abs(found["pairs k"].measured.value - torch.stack(pairs).mean()) < 1e-6
    assert set(findings.charts["layers"].frame["line"]) == {"queries normalised", "keys normalised"}


def test_keys_of_one_length_have_nothing_to_lose():
    """M whole on a cloud of one radius: a norm of the key is a number, and the model stays what it was."""
    net = small(norm=RMSNorm(gain=False), form=Dense(), content=Dense())
    found, _ = verdicts(subject(net, prompts=8))
    assert found["first k"].measured.value == found["pairs k"].measured.value == 0
    assert found["first k"].word == found["pairs k"].word == found["dangerous"].word == "refuted"
    assert found["dangerous"].measured.value < 1e-6 and found["ratio"].word == "refuted"


def test_a_planted_danger_is_found():
    """Keys of very different lengths, which are all that tells them apart: without lengths attention is lost."""
    source = torch.Generator().manual_seed(0)
    net = small(depth=1, heads=1, norm=None, form=LowRank(rank=2), content=LowRank(rank=8))
    with torch.no_grad():
        chosen = torch.rand(VOCAB, 2, generator=source)
        net.embedding.weight[:, 0] = 1 + 0.1 * chosen[:, 0]  # queries, almost alike
        net.embedding.weight[:, 1] = 1.0 + 5.0 * (chosen[:, 1] < 0.2)  # keys: one in five is long
        form = net.layer(0).attention.form
        form.left_factor.zero_()[0, 0, 0] = 1.5
        form.right_factor.zero_()[0, 0, 1] = 1.0
    found, _ = verdicts(subject(net, prompts=12))
    assert found["dangerous"].word == "supported" and found["harmless"].word == "supported" and found["ratio"].word == "supported"
    assert found["harmless"].measured.value < 1e-4 and found["first k"].measured.value == 0  # keys are one then: no order left


def test_other_models_and_what_it_says_of_them():
    masked = subject(small(mask=Full(), ffn=GELU()), objective=MaskedToken())
    found, _ = verdicts(masked)
    assert math.isnan(found["loss"].measured.value) and "not what this model was trained for" in found["loss"].reason
    assert found["first q"].measured.value == 0 < found["first k"].measured.value
    for fields, why in (
        (dict(kernel=L2(), form=LowRank(rank=4, balanced=True)), "reads queries and keys beside"),
        (dict(positions=[QueryNorm(), RoPE()]), "normalises queries or keys already"),
    ):
        with pytest.raises(UserError, match=why):
            verdicts(subject(small(**fields), prompts=2))
