"""Spectral retention: S2's idealised operators reproduced, and models whose steps are known to keep or lose a spectrum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import fill
from studied import small, subject

from emformer.ffn import GELU
from emformer.geometry.retention import condition_number
from emformer.geometry.retention import retention as rho_of
from emformer.intervals import bootstrap
from emformer.kernels import Sigmoid
from emformer.masks import Full, Window
from emformer.operators import Dense
from emformer.parts import UserError
from emformer.positions import RoPE
from emformer.studies.claims.retention import SETUPS, Retention, Table, further, idealised, law, one_hot, transports
from emformer.surgery import skip
from emformer.surgery.copies import generator
from emformer.training import MaskedToken

DRAWS = 200


@pytest.fixture(scope="module")
def tables():
    return idealised(DRAWS)


def found(net, **about):
    """The verdicts by their quantity, of few draws."""
    return {one.quantity: one for one in Retention(draws=8).run([subject(net, **about)], lambda *_: None).verdicts}


STEP = "|log rho| of X -> X', mean over attention and FFN steps"
SHAPE = "|log| of the ratio of |X|_*/|X|_F after and before a step, mean over steps"
BEYOND = f"{STEP}, less that of random steps"
MIXED = "rho(A; Y) on the cloud that a head reads, mean over heads"
RANK = "(erank(I + A) - erank(A))/n, mean over heads"
KAPPA = "log10 kappa(A) - log10 kappa(I + A), mean over heads"


@pytest.mark.parametrize(
    ("name", "mixing", "spread", "retrieval", "condition"),
    [
        ("C1", 0.0373, 0.0031, (0.611, 0.065), (11.8e3, 7.7e3, 20.9e3)),
        ("C2", 0.0366, 0.0048, (0.661, 0.068), (12.8e3, 4.5e3, 62e3)),
        ("C3", 0.0362, None, (0.683, None), (6.8e3, None, None)),
    ],
)
def test_the_set_ups_give_their_published_numbers(tables, name, mixing, spread, retrieval, condition):
    """Both sides are means of 200 draws: four standard errors of the difference."""
    table, error = tables[name], 4 * math.sqrt(2 / DRAWS)
    for values, mean, sd in ((table.mixing, mixing, spread), (table.retrieval, *retrieval)):
        assert abs(values.mean() - mean) < error * values.std() + 5e-5, "and the rounding of what is told"
        assert sd is None or abs(values.std() / sd - 1) < error / math.sqrt(2) + 0.02
    kappa = 10**table.condition
    median, low, high = condition
    # the error of a median, in the logarithm, is about 1.25 sd/sqrt(n) of a Gaussian of the same quartiles
    quartiles = np.quantile(table.condition, [0.25, 0.75])
    assert abs(math.log10(np.median(kappa) / median)) < 1.25 * error * (quartiles[1] - quartiles[0]) / 1.35
    if low is not None:  # about 80 % of the draws
        assert 0.05 < (kappa < low).mean() + (kappa > high).mean() < 0.35
    assert np.isinf(table.retrieval_condition).all(), "no random one-hot map is one to one"


def test_transport_keeps_everything_and_retrieval_what_it_reaches():
    random = generator("test")
    op, x = transports(20, 32, random), torch.randn(40, 32, 64, dtype=torch.float64, generator=random)
    assert (rho_of(op, x) - 1).abs().max() < 1e-12 and (condition_number(op) - 1).abs().max() < 1e-12
    assert (op[:20].sum(1) == 1).all() and (op[:20].sum(2) == 1).all(), "permutations"
    assert ((op[20:] @ op[20:].mT) - torch.eye(32)).abs().max() < 1e-12, "rotations"
    maps = one_hot(300, 32, random)
    assert (maps.sum(-1) == 1).all() and set(maps.unique().tolist()) == {0.0, 1.0}
    rank = torch.linalg.matrix_rank(maps).double()
    assert abs(rank.mean() / 32 - (1 - (31 / 32) ** 32)) < 0.01
    assert torch.equal(rank, (maps.sum(1) > 0).double().sum(-1)), "as many as there are tokens that are read"
    # rho of a one-hot map: singular values are roots of how often a token is read, where tokens are orthogonal
    read = maps.sum(1).sqrt().sum(-1) / 32
    assert (rho_of(maps, torch.eye(32, dtype=torch.float64)) - read).abs().max() < 1e-12


def test_mixing_is_a_number_about_n():
    assert abs(law(48, 40) * 48 - 1.18) < 0.06
    assert law(8, 40) > 3.5 * law(32, 40)
    assert SETUPS["C1"].k == SETUPS["C1"].power == 3 and SETUPS["C2"].power == 1


def test_a_row_is_explained_by_what_made_it_and_by_nothing_else():
    random = np.random.default_rng(0)

    def table(mixing, condition, retrieval):
        draws = random.standard_normal((3, 400))
        a, b, c = (np.array([mixing, condition, retrieval])[:, None] + np.array([[0.003], [0.2], [0.06]]) * draws).tolist()
        return Table(np.array(a), np.array(b), np.array(c), np.full(400, np.inf))

    assert further(table(0.0358, math.log10(10758), 0.6261)).mean() > 0.9
    for other in ((0.048, 4.03, 0.6261), (0.0358, 4.9, 0.6261), (0.0358, 4.03, 0.9)):
        assert further(table(*other)).mean() < 0.02
    assert bootstrap(further(table(0.0358, 4.9, 0.6261)), of="draws").high < 0.05


def test_no_step_is_an_isometry():
    net = skip(skip(small(depth=2, ffn=GELU(), dtype=torch.float64), "attn"), "ffn")
    seen = found(net)
    assert seen[STEP].measured.value < 1e-12 and seen[STEP].word == "supported"
    assert seen[SHAPE].measured.value < 1e-12 and seen[SHAPE].word == "supported"
    assert seen[BEYOND].word == "undecided" and "no difference at all" in seen[BEYOND].reason, "nothing is no better than nothing"
    assert "0.00 |X|" in seen[STEP].why


def test_attention_to_oneself_scales_the_cloud():
    """A = I and F = I/2 a head of two: X' = 2 X."""
    net = small(depth=1, norm=None, content=Dense(), mask=Window(1), dtype=torch.float64)
    fill(net.blocks[0].attention.content.left_factor, torch.eye(8, dtype=torch.float64).expand(2, 8, 8) / 2)
    seen = found(net)
    assert abs(seen[STEP].measured.value - math.log(2)) < 1e-12 and seen[STEP].word == "refuted"
    assert seen[SHAPE].measured.value < 1e-12 and seen[SHAPE].word == "supported"
    assert seen[BEYOND].measured.value > 0, "a random step of length |X| goes less far along X than X itself"
    assert abs(seen[MIXED].measured.value - 1) < 1e-12 and seen[MIXED].word == "refuted"
    assert abs(seen[MIXED].null - 1) < 1e-12, "one visible token: uniform weights are the same"
    for quantity in (RANK, KAPPA):
        assert abs(seen[quantity].measured.value) < 1e-12 and seen[quantity].word == "broken"


def test_uniform_weights_are_the_null():
    net = small(depth=1, norm=None, mask=Full(), dtype=torch.float64)
    with torch.no_grad():
        for one in net.blocks[0].attention.form.parameters():
            one.zero_()
    about = subject(net, prompts=8, length=16, objective=MaskedToken())
    seen = {one.quantity: one for one in Retention(draws=8).run([about], lambda *_: None).verdicts}
    x = net.embedding(about.tokens).detach().numpy()
    nuclear = np.array([np.linalg.norm(one, "nuc") for one in x])
    flat = 4 * np.linalg.norm(x.mean(1), axis=-1) / nuclear  # sqrt(16) |mean| is all that is left
    assert abs(seen[MIXED].measured.value - flat.mean()) < 1e-10 and abs(seen[MIXED].null - flat.mean()) < 1e-10
    # I + 11^T/n has the singular values 2 and 1; a rank of one is singular and counts as 1/(n eps)
    largest = -math.log10(16 * torch.finfo(torch.float64).eps)
    assert abs(seen[KAPPA].measured.value - (largest - math.log10(2))) < 1e-9
    p = np.array([2.0] + [1.0] * 15) / 17
    assert abs(seen[RANK].measured.value - (math.exp(-(p * np.log(p)).sum()) - 1) / 16) < 1e-9
    assert "100%" in seen[KAPPA].why and "triangular" not in seen[KAPPA].why


def test_the_numbers_of_a_model_are_those_of_its_clouds():
    net = small(depth=2, ffn=GELU(), positions=[RoPE()], dtype=torch.float64)
    about = subject(net)
    findings = Retention(draws=8).run([about], lambda *_: None)
    seen = {one.quantity: one for one in findings.verdicts}
    kept, patterns = [], []
    for trajectory in about.trajectories(size=3):
        sizes = np.array([[np.linalg.norm(x, "nuc") for x in cloud.numpy()] for cloud in trajectory.clouds])
        kept.append(np.abs(np.diff(np.log(sizes), axis=0)).mean(0))
        for k in trajectory.attentions:
            y = trajectory.steps[k].read.numpy()
            for a, read in zip(trajectory.pattern(k).numpy(), y, strict=True):
                patterns.append([np.linalg.norm(head @ read, "nuc") / np.linalg.norm(read, "nuc") for head in a])
    assert abs(seen[STEP].measured.value - np.concatenate(kept).mean()) < 1e-12
    assert abs(seen[MIXED].measured.value - np.mean(patterns)) < 1e-12
    assert "triangular" in seen[KAPPA].why
    frame = findings.charts["steps"].frame
    assert set(frame["line"]) == {"trained", "untrained", "random steps of the same length"} and frame["x"].max() == 4
    assert findings.note.count("\n") == 4 and "rho and kappa are 1" in findings.note


def test_a_kernel_whose_rows_do_not_sum_to_one_has_no_uniform_null():
    seen = found(small(depth=1, kernel=Sigmoid()))
    assert math.isnan(seen[MIXED].null) and "do not sum to one" in seen[MIXED].why


def test_few_draws_are_refused():
    with pytest.raises(UserError, match="draws is 7; choose at least 8"):
        Retention(draws=7)
