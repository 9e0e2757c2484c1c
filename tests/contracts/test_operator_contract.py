"""What every operator promises, whatever its file: one object, its factors and its matrix (math A.1, A.5)."""

from __future__ import annotations

import pytest
import torch
from builders import cloud, examples, stir
from torch import Tensor

from emformer import parts
from emformer.operators import LowRank, Operator
from emformer.parts import UserError

D, T = 8, 5
EVERY = pytest.mark.parametrize("setting", examples(parts.Operator))
ROLES = pytest.mark.parametrize("role", ["form", "content"])
HEADS = pytest.mark.parametrize("heads", [2, 4])


def build(setting: parts.Operator, role: parts.Role, heads: int = 2) -> Operator:
    """The module; a content gets a form, in case it is tied to one. A variant may refuse one role, not both."""
    torch.manual_seed(heads)
    given = LowRank(rank=4).build("form", D, heads).double()
    try:
        built = setting.build(role, D, heads, given if role == "content" else None)
    except UserError:
        other = setting.build("content" if role == "form" else "form", D, heads, given)
        assert isinstance(other, Operator)
        pytest.skip(f"serves only as the other role than {role}")
    return stir(built).double()


def group(operator: Operator, head: int) -> int:
    return head * operator.groups // operator.heads


@EVERY
@ROLES
@HEADS
def test_it_says_what_it_is(setting, role, heads):
    w = build(setting, role, heads)
    assert isinstance(w, Operator)
    assert (w.dim, w.heads) == (D, heads)
    assert w.heads % w.groups == 0
    assert set(w.rates) <= {name for name, _ in w.named_parameters()} and all(rate > 0 for rate in w.rates.values())
    assert w.matrix().shape == (heads, D, D)
    x = cloud(T, D)
    assert w.left(x).shape == (2, heads, T, w.rank)
    assert w.right(x).shape == (2, w.groups, T, w.rank)
    if w.identity_right:
        assert (w.groups, w.rank) == (1, D)
        assert torch.equal(w.right(x)[:, 0], x)


@EVERY
@ROLES
@HEADS
@torch.no_grad()
def test_left_times_right_is_the_score_of_the_matrix(setting, role, heads):
    w = build(setting, role, heads)
    x, y = cloud(T, D), cloud(T + 2, D)
    u, v, matrix = w.left(x), w.right(y), w.matrix()
    for h in range(heads):
        expected = torch.einsum("bid,de,bje->bij", x, matrix[h], y)
        assert (u[:, h] @ v[:, group(w, h)].mT - expected).abs().max() < 1e-12


@EVERY
@ROLES
@HEADS
@torch.no_grad()
def test_lift_after_right_is_the_action_of_the_matrix(setting, role, heads):
    w = build(setting, role, heads)
    x = cloud(T, D)
    z = torch.stack([w.right(x)[:, group(w, h)] for h in range(heads)], 1)
    by_head = torch.einsum("hfe,bte->bhtf", w.matrix(), x)
    assert (w.lift_heads(z) - by_head).abs().max() < 1e-12
    assert (w.lift(z) - by_head.sum(1)).abs().max() < 1e-12


@EVERY
@ROLES
@HEADS
@torch.no_grad()
def test_lift_is_the_sum_over_heads(setting, role, heads):
    w = build(setting, role, heads)
    z = torch.randn(2, heads, T, w.rank, dtype=torch.float64)
    assert (w.lift(z) - w.lift_heads(z).sum(1)).abs().max() < 1e-12


@EVERY
@ROLES
@HEADS
@torch.no_grad()
def test_pull_and_project_are_the_adjoint_and_the_copy_of_right(setting, role, heads):
    w = build(setting, role, heads)
    x, u = cloud(T, D), torch.randn(2, heads, T, w.rank, dtype=torch.float64)
    m = torch.randn(2, heads, T, D, dtype=torch.float64)
    pulled, projected = w.pull(u), w.project(m)
    assert pulled.shape == m.shape and projected.shape == u.shape
    for h in range(heads):
        right = w.right(x)[:, group(w, h)]
        assert ((pulled[:, h] * x).sum(-1) - (u[:, h] * right).sum(-1)).abs().max() < 1e-12  # <R u, x> = <u, R^T x>
        assert (projected[:, h] - w.right(m[:, h])[:, group(w, h)]).abs().max() < 1e-12
    gradient = torch.einsum("bte,hef->bhtf", x, w.matrix())  # M^T q, with q^T M t = <M^T q, t>
    assert (w.pull(w.left(x)) - gradient).abs().max() < 1e-12


@EVERY
@ROLES
@HEADS
@torch.no_grad()
def test_the_rank_is_no_larger_than_said(setting, role, heads):
    w = build(setting, role, heads)
    assert all(rank <= w.rank for rank in torch.linalg.matrix_rank(w.matrix()).tolist())


@EVERY
@ROLES
@HEADS
@torch.no_grad()
def test_relevance_gradients_of_a_group_share_a_subspace(setting, role, heads):
    """rank of [M_h^T]_{h in g} side by side <= r (math A.5)."""
    w = build(setting, role, heads)
    for g in range(w.groups):
        members = [m.mT for h, m in enumerate(w.matrix()) if group(w, h) == g]
        assert len(members) == heads // w.groups
        assert torch.linalg.matrix_rank(torch.cat(members, -1)) <= w.rank


@EVERY
@ROLES
@pytest.mark.parametrize("method", ["left", "right", "pull", "project", "lift_heads", "lift", "matrix"])
def test_gradients(setting, role, method):
    """Every method is differentiable in its argument and in the parameters."""
    w = build(setting, role)
    names = dict(w.named_parameters())
    shape = {
        "left": (1, 3, D),
        "right": (1, 3, D),
        "project": (1, 2, 3, D),
    }.get(method, (1, 2, 3, w.rank))
    x = () if method == "matrix" else (torch.randn(shape, dtype=torch.float64, requires_grad=True),)

    def call(*given: Tensor) -> Tensor:
        state = {f"of.{name}": given[k] for k, name in enumerate(names)}
        return torch.func.functional_call(_Call(w, method), state, given[len(names) :])

    arguments = (*(p.detach().clone().requires_grad_() for p in names.values()), *x)
    if call(*arguments).requires_grad:
        assert torch.autograd.gradcheck(call, arguments)


class _Call(torch.nn.Module):
    def __init__(self, of: Operator, method: str):
        super().__init__()
        self.of, self.method = of, method

    def forward(self, *given: Tensor) -> Tensor:
        return getattr(self.of, self.method)(*given)


@EVERY
@ROLES
@torch.no_grad()
def test_the_state_carries_everything(setting, role):
    """Another draw, the same state: the same operator. No form's parameters in a content's state."""
    w, other = build(setting, role), build(setting, role)
    for parameter in other.parameters():
        parameter.normal_()
    assert len(w.state_dict()) == len(list(w.parameters())) + len(list(w.buffers()))
    other.load_state_dict(w.state_dict())
    assert torch.equal(w.matrix(), other.matrix())
    x = cloud(T, D)
    assert torch.equal(w.left(x), other.left(x)) and torch.equal(w.right(x), other.right(x))


@EVERY
@ROLES
@torch.no_grad()
def test_seeds_draw_it(setting, role):
    """`build` draws from the global generator and from nothing else."""
    a, b = build(setting, role), build(setting, role)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
