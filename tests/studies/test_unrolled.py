"""The unrolled sum: an identity where nothing reshapes the stream, and none where something does."""

from __future__ import annotations

import pytest
import torch
from builders import model
from studied import small, subject, write

from emformer.block import Parallel, PostNorm
from emformer.ffn import GELU
from emformer.norms import LayerNorm
from emformer.operators import Dense
from emformer.placements import SandwichNorm, Sphere
from emformer.settings import Drift
from emformer.studies.claims.unrolled import ROUNDING, Unrolled
from emformer.verdicts import Findings


def silent(share: float, word: str) -> None:
    pass


def shares(findings: Findings) -> list[float]:
    return findings.charts["shares"].frame.sort_values("x")["y"].tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"ffn": GELU(), "drift": Drift(), "norm": LayerNorm(bias=True), "epsilon": 0.5},
        {"ffn": GELU(), "arrangement": Parallel()},
        {"ffn": GELU(), "placement": SandwichNorm()},
        {"norm": None, "depth": 1},
        {"dtype": torch.bfloat16},
    ],
    ids=["sequential", "parallel", "sandwich", "bare", "few bits"],
)
def test_the_sum_of_all_updates_is_the_last_state(fields):
    findings = Unrolled().run([subject(small(**fields))], silent)
    holds = findings.verdicts[0]
    assert holds.word == "holds" and 0 <= holds.measured.value < ROUNDING and not holds.why
    assert sum(shares(findings)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("placement", [PostNorm(), Sphere()], ids=["post", "sphere"])
def test_what_acts_on_the_stream_itself_breaks_it_and_the_study_says_why(placement):
    findings = Unrolled().run([subject(small(placement=placement, ffn=GELU()))], silent)
    holds = findings.verdicts[0]
    assert holds.word == "broken" and holds.measured.low > 100 * ROUNDING
    assert "acts on the stream" in holds.reason


def test_shares_are_those_of_the_terms():
    """Without attention weights that matter: F = 1 and -3/2 of tokens that see themselves alone: x, 2x, -x."""
    net = model(8, torch.float32, depth=2, heads=1, norm=None, form=Dense(), content=Dense())
    with torch.no_grad():
        net.embedding.weight.copy_(torch.eye(8))
    for layer, size in enumerate((1.0, -1.5)):
        write(net, layer, 60 * torch.eye(8), size * torch.eye(8))
    tokens = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(k)) for k in range(8)])
    findings = Unrolled().run([subject(net, tokens)], silent)
    assert shares(findings) == pytest.approx([-1.0, -1.0, 3.0], abs=1e-4)  # of the last state -x
    assert findings.verdicts[0].word == "holds"
    kept = findings.verdicts[1]  # of orthogonal terms x, x, -3x the first would have 1/11
    assert kept.word == "refuted" and kept.measured.value == pytest.approx(-1 - 1 / 11, abs=1e-4)


def test_updates_that_know_nothing_of_the_embedding_leave_it_its_share():
    """Layers write each word elsewhere, at right angles: the embedding is no more and no less than one of the terms."""
    net = model(4, torch.float32, dim=12, depth=2, heads=1, norm=None, form=Dense(), content=Dense())
    with torch.no_grad():
        net.embedding.weight.copy_(torch.eye(4, 12))
    for layer, size in enumerate((1.0, 2.0)):
        content = torch.zeros(12, 12)
        content[4 * (layer + 1) + torch.arange(4), torch.arange(4)] = size
        write(net, layer, 80 * torch.eye(12), content)
    tokens = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(k)) for k in range(8)])
    findings = Unrolled().run([subject(net, tokens)], silent)
    assert shares(findings) == pytest.approx([1 / 6, 1 / 6, 4 / 6], abs=1e-4)
    assert findings.verdicts[1].measured.value == pytest.approx(0, abs=1e-4)
