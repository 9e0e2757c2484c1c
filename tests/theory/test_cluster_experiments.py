"""Causal clustering as it must be, and the experiments on clusters, planes and waiting times: small, and they hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import iv

from emformer.kernels import Softmax
from emformer.masks import Full
from emformer.parts import UserError
from emformer.theory import idealised, simulate, unit_vectors
from emformer.theory.experiments.causal import CausalClustering, _by_content
from emformer.theory.experiments.phase import Phase
from emformer.theory.experiments.space import Space
from emformer.theory.experiments.staircase import Staircase
from emformer.theory.outcome import Statement

# what is checked of annotations in this process would take ten times as long as the steps themselves
APART = """
import json
from emformer.theory.experiments.causal import CausalClustering
from emformer.theory.experiments.phase import Phase
from emformer.theory.experiments.space import Space
from emformer.theory.experiments.staircase import Staircase

told = {}
for one in (
    CausalClustering(dims=(3,), tokens=16, seeds=5, beta=1.0, time=300.0, step=0.1, contents=2, content_time=50.0),
    Space(tokens=16, seeds=2, time=15.0, step=0.1),
    Staircase(tokens=8, betas=(5.0, 6.0, 7.0), stairs=(9.0,), time=250.0, kept=120),
    Phase(dims=(2,), tokens=64, largest=64.0, seeds=4, time=20.0, early=20.0),
):
    words = []
    outcome = one.run(lambda share, word: words.append(share))
    told[one.name] = {
        "statements": [[*statement] for statement in outcome.statements],
        "shares": words,
        "rows": {name: len(chart.frame) for name, chart in outcome.charts.items()},
        "trajectories": list(outcome.trajectories),
    }
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict:
    done = subprocess.run([sys.executable, "-c", APART], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def statements(told: dict, name: str, *words: str) -> list[Statement]:
    """Those whose claims have all the words; at least one."""
    found = [Statement(*one) for one in told[name]["statements"]]
    found = [one for one in found if all(word in one.claim for word in words)]
    assert found, words
    return found


def test_all_tokens_come_to_the_first_one_that_never_moves(told):
    """math J20: n = 16, d = 3, V = I, beta = 1, a normal M for each of the seeds 0 … 4, t = 300 in steps of 0.1."""
    (far,) = statements(told, "causal", "V = I", "farthest")
    (moved,) = statements(told, "causal", "V = I", "moves")
    assert far.n == moved.n == 5
    assert far.measured < 1e-6 and far.tolerance == 1e-6
    assert moved.measured < 1e-12 and moved.tolerance == 1e-12


def test_with_a_full_mask_the_first_token_does_move():
    """The instrument: what is 0 above need not be."""
    x = unit_vectors(1, 8, 3)
    moved = simulate(idealised(3, mask=Full()), x, [0.0, 1.0]).clouds
    assert (moved[1] - moved[0])[:, 0].abs().max() > 0.1


def test_the_first_token_follows_the_exponential_of_its_content(told):
    (own,) = statements(told, "causal", "Oja")
    (top,) = statements(told, "causal", "top eigenvector")
    assert own.measured < 1e-10 and top.measured < 1e-6 and own.n == 10


def test_starts_with_one_content_are_not_independent(told):
    """5 starts with each of 2 V are 2 numbers: with (0.2, 0.6) and (1, 1), means .4 and 1, their error is .3."""
    shares = torch.tensor([[0.2, 0.6], [1.0, 1.0]], dtype=torch.float64)
    assert _by_content(shares) == pytest.approx((0.7, 0.0, 2, 0.3))
    assert _by_content(shares.repeat(1, 3)) == pytest.approx((0.7, 0.0, 2, 0.3))  # to repeat them tells nothing more
    assert math.isnan(_by_content(shares[:1])[-1])
    assert [one.n for one in statements(told, "causal", "V symmetric", "share")] == [2, 2]


@pytest.mark.parametrize("name", ["space", "staircase", "phase"])
def test_what_is_claimed_holds(told, name):
    for one in statements(told, name):
        assert one.held is not False, one
    assert told[name]["shares"] == sorted(told[name]["shares"]) and told[name]["shares"][-1] <= 1
    assert all(told[name]["rows"].values()) and told[name]["trajectories"]


def test_nothing_that_is_claimed_is_left_out(told):
    """So many claims there are; `measured` ones beside."""
    claims = {name: sum(one.how != "measured" for one in statements(told, name)) for name in told}
    assert claims == {"causal": 5, "space": 14, "staircase": 8, "phase": 2}


def test_the_error_of_an_exponent_is_between_starts():
    """Counts whose exponent is 1/2 + small z of the start: the standard error of a mean, small sd(z)/sqrt(n)."""
    seeds, small = 6, 1e-4
    z = torch.randn(seeds, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    betas = 2.0 ** np.arange(3, 8)
    counts = betas[:, None] ** (0.5 + small * z)
    (found, _) = Phase(seeds=seeds, dims=(2,))._exponent(2, "circle", betas, counts)
    assert found.measured == pytest.approx(0.5 + small * z.mean(), abs=1e-7)
    assert found.error == pytest.approx(small * z.std(ddof=1) / math.sqrt(seeds), rel=1e-2)


def test_some_start_needs_more_than_one_plane(told):
    """Else three planes were no more than one."""
    (one,) = statements(told, "space", "1 plane")
    assert one.measured > 1e-3


def test_the_wave_that_grows_on_the_circle():
    """The rate k^2 I_k(beta)/(beta I_0(beta)) of a small wave of density, by which clusters are as many as they are."""
    beta, n, k, small, time = 6.0, 48, 3, 1e-6, 0.5
    grid = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    angle = grid + small * torch.sin(k * grid)
    x = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(0)
    end = simulate(idealised(2, kernel=Softmax(beta=beta)), x, [0.0, time], step=0.05).clouds[-1][0]
    moved = torch.remainder(torch.atan2(end[:, 1], end[:, 0]) - grid + math.pi, 2 * math.pi) - math.pi
    amplitude = float(2 / n * (moved * torch.sin(k * grid)).sum())
    assert math.log(amplitude / small) / time == pytest.approx(k**2 * iv(k, beta) / beta / iv(0, beta), rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Space(time=1.0),
        lambda: Space(step=1.0),
        lambda: Staircase(tokens=10),
        lambda: Staircase(betas=(4.0, 4.0, 4.0)),
        lambda: Phase(early=50.0),
        lambda: Phase(dims=()),
        lambda: CausalClustering(dims=(1,)),
        lambda: CausalClustering(beta=0.0),
    ],
)
def test_settings_without_sense(make):
    with pytest.raises(UserError):
        make()


def test_too_short_a_wait_is_said():
    with pytest.raises(ArithmeticError, match="smaller betas"):
        Staircase(tokens=8, betas=(8.0, 9.0, 10.0), stairs=(3.0,), two=False, time=10.0, kept=30, tolerance=1e-2).run(
            lambda share, word: None
        )
