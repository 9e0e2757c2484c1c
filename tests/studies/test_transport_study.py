"""The flow study: fields whose omega is known, and clouds whose optimal coupling is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from studied import small, subject, write

from emformer.masks import Full
from emformer.model import Emformer
from emformer.norms import LayerNorm
from emformer.observables.wgf import GradientFlow
from emformer.operators import PSD, Dense, Tied
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.settings import Drift
from emformer.studies.claims import transport
from emformer.studies.claims.transport import Flow, _fields
from emformer.studies.subjects import Subject
from emformer.trajectory import capture
from emformer.verdicts import Findings, Verdict


def silent(share: float, word: str) -> None:
    pass


def by_claim(findings: Findings, words: str) -> Verdict:
    (found,) = [one for one in findings.verdicts if words in one.claim]
    return found


@pytest.mark.parametrize(
    "fields", [{}, {"norm": LayerNorm(bias=True), "drift": Drift()}, {"norm": None, "mask": Full()}], ids=["rms", "layer", "none"]
)
def test_the_field_is_that_of_the_observable(fields):
    """The same omega and R^2 as the family "wgf", which builds its field from the effective operators."""
    net = small(depth=2, dtype=torch.float64, **fields)
    trajectory = capture(net, subject(net).tokens[:1])
    found = _fields(trajectory, net, "", 8, 3)
    observation = GradientFlow(prompts=1, probes=8, seed=3).begin()
    observation.update(trajectory)
    rows = [row for row in observation.rows() if row.param in (None, "ambient")]
    for name in ("omega", "r2"):
        expected = [row.mean for row in rows if row.key == f"wgf.{name}"]
        assert found[name] == pytest.approx(expected, rel=1e-9)


def short(net: Emformer, prompts: int = 6) -> Subject:
    return subject(net, prompts=prompts, length=8)


def tied() -> Emformer:
    """Half way into the gradient corner: one head, M positive semidefinite, F = M, a full mask; the softmax is what is left."""
    return small(depth=2, heads=1, mask=Full(), form=PSD(rank=4), content=Tied())


def test_a_tied_model_has_the_fingerprint():
    findings = Flow(probes=4).run([short(tied())], silent)
    assert findings.verdicts[0].word == "supported" and by_claim(findings, "climbs its energy").word == "supported"
    assert findings.verdicts[0].measured.value < -0.1


def test_random_operators_have_none():
    """Shuffled, they are what they were."""
    net = small(depth=2, heads=1, form=Dense(), content=Dense(), dtype=torch.float64)
    findings = Flow(probes=4).run([short(net)], silent)
    assert findings.verdicts[0].word != "supported" and by_claim(findings, "climbs its energy").word != "supported"
    assert by_claim(findings, "is a gradient flow").word == "refuted"


def test_positions_leave_no_energy_and_that_is_said():
    """The instrument is proven on the layers without them."""
    findings = Flow(probes=2).run([short(small(positions=[RoPE()]))], silent)
    climbs = by_claim(findings, "climbs its energy")
    assert math.isnan(climbs.measured.value) and climbs.word == "undecided" and "form M" in climbs.reason
    assert math.isfinite(findings.verdicts[0].measured.value)
    assert "single form" in findings.note


@pytest.mark.parametrize(
    ("corners", "said"), [([math.nan, 1e-3], "1.0e-03"), ([math.nan, math.nan], "prove")], ids=["broken", "none"]
)
def test_without_an_instrument_that_works_nothing_is_claimed_of_fields(monkeypatch, corners, said):
    monkeypatch.setattr(transport, "_corners", lambda trajectory, seed: np.array(corners))
    findings = Flow(probes=2).run([short(small(depth=2), 2)], silent)
    for verdict in findings.verdicts[:3]:
        assert verdict.word == "undecided" and math.isnan(verdict.measured.value) and said in verdict.reason
    assert math.isfinite(findings.verdicts[3].measured.value)


def test_models_that_see_the_same_prompts_have_probes_of_their_own():
    one = short(small(depth=1), 2)
    single, pair = (Flow(probes=2).run([one] * count, silent).verdicts[2].measured.value for count in (1, 2))
    assert single != pair and pair == pytest.approx(single, abs=0.2)


def test_tokens_that_change_places_are_no_optimal_transport():
    """Two words, of which each becomes the other: nothing has to move. A step that scales the cloud is optimal."""
    tokens = (torch.arange(6 * 12).view(6, 12) + torch.arange(6)[:, None]) % 2
    for flip, word in ((-2.0, "refuted"), (0.5, "supported")):
        net = small(depth=1, heads=1, norm=None, mask=Full(), form=Dense(), content=Dense())
        with torch.no_grad():
            net.embedding.weight[0] = torch.eye(8)[0]
            net.embedding.weight[1] = -torch.eye(8)[0]
        write(net, 0, 50 * torch.eye(8), flip * torch.eye(8))
        findings = Flow(probes=2).run([subject(net, tokens)], silent)
        ratio = by_claim(findings, "optimal transport")
        assert ratio.word == word
        assert ratio.measured.value == pytest.approx(0.0 if word == "refuted" else 1.0, abs=0.35 if word == "refuted" else 1e-6)


def test_short_prompts_are_refused():
    with pytest.raises(UserError, match="--length"):
        Flow().run([subject(small(), length=2)], silent)
    with pytest.raises(UserError, match="probes"):
        Flow(probes=1)
