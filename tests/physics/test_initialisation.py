"""At initialisation every parameterisation has the statistics of QKV attention (math I, J 25)."""

from __future__ import annotations

import math

import pytest
import torch
from builders import cloud

from emformer.operators import Dense, LowRank

D, HEADS, R, N = 128, 4, 32, 128  # d/heads = r
FORMS = {
    "low-rank": LowRank(rank=R),
    "grouped": LowRank(rank=R, groups=2),
    "dense": Dense(),
    "qkv product": Dense(init="qkv_product"),
}


def draws(part, heads: int = HEADS, role="form", count: int = 16):
    """64 heads: `count` operators of `heads` heads, so that d/heads stays the head's width."""
    for _ in range(count):
        yield part.build(role, D, heads).double()


def tokens(count: int = N) -> torch.Tensor:
    """Unit-variance tokens, as a norm makes them: |y|^2 = d."""
    y = cloud(count, D, 1)
    return y / y.norm(dim=-1, keepdim=True) * math.sqrt(D)


def scores(form, y: torch.Tensor) -> torch.Tensor:
    """(H, N, N) by the matrix, not the factors."""
    return torch.einsum("bid,hde,bje->hij", y, form.matrix(), y)


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_scores_have_unit_variance(name):
    values = []
    for seed in range(4):
        torch.manual_seed(seed)
        y = tokens()
        values += [scores(form, y) for form in draws(FORMS[name])]
    values = torch.cat(values)
    assert len(values) == 4 * 64
    assert abs(values.std() - 1) < 0.03
    assert abs(values.mean()) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("part", [LowRank(rank=R, score_std=0.3), Dense(score_std=0.3)], ids=repr)
def test_the_score_can_be_chosen(part):
    torch.manual_seed(0)
    y = tokens()
    assert abs(torch.cat([scores(form, y) for form in draws(part)]).std() - 0.3) < 0.015


@torch.no_grad()
def entropy(part) -> float:
    """Mean attention entropy in units of log n, over 64 heads and a full mask."""
    y = tokens()
    a = torch.cat([scores(form, y) for form in draws(part)]).softmax(-1)
    return (-(a * a.log()).sum(-1).mean() / math.log(N)).item()


@pytest.mark.parametrize("name", ["dense", "qkv product"])
def test_attention_is_as_wide_as_that_of_qkv(seed, name):
    expected = entropy(LowRank(rank=R))
    assert 0.8 < expected < 0.98  # neither uniform nor one-hot
    assert abs(entropy(FORMS[name]) - expected) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("part", [LowRank(rank=R), Dense(), Dense(init="qkv_product")], ids=repr)
def test_the_update_of_a_token_has_unit_variance(part):
    """F_ij ~ N(0, 1/(dH)): the heads together map unit-variance tokens to unit variance."""
    torch.manual_seed(0)
    y = tokens()
    moved = torch.cat([torch.einsum("bid,hfd->bif", y, content.matrix()) for content in draws(part, role="content")])
    assert abs(moved.std() - 1) < 0.03


@torch.no_grad()
def test_a_symmetric_draw_is_symmetric_with_the_same_scores():
    torch.manual_seed(0)
    form = Dense(init="symmetric").build("form", D, HEADS).double()
    assert torch.equal(form.matrix(), form.matrix().mT)
    above = form.matrix()[:, *torch.triu_indices(D, D, 1)]
    assert abs(above.std() * D - 1) < 0.03


@torch.no_grad()
def test_spectra_differ_where_moments_agree():
    """|M|_2: 2/sqrt(d) for a free matrix, larger for a product; qkv_product has the product's rank."""
    torch.manual_seed(0)
    names = "dense", "qkv product", "low-rank"
    free, product, factored = (FORMS[name].build("form", D, HEADS).matrix() for name in names)
    top = [torch.linalg.svdvals(m)[:, 0].mean() for m in (free, product, factored)]
    assert abs(top[0] * math.sqrt(D) / 2 - 1) < 0.05
    assert abs(top[1] / top[2] - 1) < 0.1 and top[1] > 1.5 * top[0]
    assert torch.linalg.matrix_rank(product.double(), rtol=1e-4).tolist() == [R] * HEADS


def change_of_a_sign_step(form, gradient: torch.Tensor, rates: dict[str, float]) -> float:
    """First-order change <G, dM> when every parameter moves by its rate times the sign of its gradient."""
    names, parameters = zip(*form.named_parameters(), strict=True)
    grads = torch.autograd.grad((gradient * form.matrix()).sum(), parameters)
    return sum(rates.get(name, 1.0) * g.abs().sum().item() for name, g in zip(names, grads, strict=True))


def test_a_sign_step_moves_a_free_matrix_further(seed):
    """By d / (2 sqrt(r)) than the factors of U V^T / sqrt(r); `rates` take exactly that back.

    The left factor holds U / sqrt(r), and its rate 1/sqrt(r) moves it as U would move.
    """
    dense, factored = Dense().build("form", D, HEADS).double(), LowRank(rank=R).build("form", D, HEADS).double()
    expected = D / (2 * math.sqrt(R))
    for gradient in (torch.randn(HEADS, D, D, dtype=torch.float64), _of_a_loss(dense)):
        factors = change_of_a_sign_step(factored, gradient, factored.rates)
        assert abs(change_of_a_sign_step(dense, gradient, {}) / factors / expected - 1) < 0.1
        assert abs(change_of_a_sign_step(dense, gradient, dense.rates) / factors - 1) < 0.1


def _of_a_loss(form) -> torch.Tensor:
    """dL/dM of a loss that pulls attention towards random targets."""
    y = tokens(4 * N)
    matrix = form.matrix().detach().requires_grad_()
    chosen = torch.randint(4 * N, (HEADS, 4 * N, 1))
    score = torch.einsum("bid,hde,bje->hij", y, matrix, y)
    return torch.autograd.grad(-score.log_softmax(-1).gather(-1, chosen).mean(), matrix)[0]


@pytest.mark.parametrize(("dim", "heads"), [(8, 2), (128, 4), (96, 12)])
def test_rates(dim, heads):
    rank = dim // heads
    assert Dense().build("form", dim, heads).rates == {"left_factor": pytest.approx(2 * math.sqrt(rank) / dim)}
    assert Dense().build("content", dim, heads).rates == {"left_factor": pytest.approx(1 / math.sqrt(heads))}
    assert LowRank(rank=4).build("form", dim, heads).rates == {"left_factor": 0.5, "right_factor": 1.0}
    assert LowRank(rank=16, balanced=True).build("form", dim, heads).rates == {"left_factor": 0.5, "right_factor": 0.5}
    assert LowRank(rank=4).build("content", dim, heads).rates == {}
