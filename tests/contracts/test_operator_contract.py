"""What every operator promises, whatever its file: one object, its factors and its matrix (math A.1, A.5)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import cloud, examples, stir
from torch import Tensor

from emformer import parts
from emformer.operators import LowRank, Operator
from emformer.parts import UserError
from emformer.training import AdamW, Muon

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
    left, right = w.left_rows(), w.right_rows()
    assert left.shape == (heads, w.rank, D)
    assert (right is None) == w.identity_right
    if w.identity_right:
        assert (w.groups, w.rank) == (1, D)
        assert torch.equal(w.right(x)[:, 0], x)
        assert (left.mT - w.matrix()).abs().max() < 1e-12
    else:
        assert right.shape == (w.groups, w.rank, D)
        assert (left.mT @ right.repeat_interleave(heads // w.groups, 0) - w.matrix()).abs().max() < 1e-12
    assert w.macs > 0 and w.setup_macs >= 0
    assert set(w.claims) <= CLAIMS.keys()


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
    if arguments and call(*arguments).requires_grad:
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


# What a constrained operator claims --------------------------------------------------------------------------------------


def _of_form(w: Operator) -> Tensor:
    return getattr(w, "form").matrix()  # noqa: B009


def _scalar(w: Operator) -> Tensor:
    m = w.matrix()
    return m - m.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1) * torch.eye(D, dtype=m.dtype)


def _orthogonal(w: Operator) -> Tensor:
    gram = w.matrix() @ w.matrix().mT
    return gram / gram.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1) - torch.eye(D, dtype=gram.dtype)


def _tied(w: Operator) -> Tensor:
    f, m = w.matrix(), _of_form(w)
    return f - (f * m).sum((-2, -1), keepdim=True) / m.square().sum((-2, -1), keepdim=True) * m


def _metric(w: Operator) -> Tensor:
    """F_h = P M_h: one P for all heads that is symmetric and positive, found by least squares from heads side by side."""
    f, m = torch.cat(list(w.matrix()), -1), torch.cat(list(_of_form(w)), -1)
    p = torch.linalg.lstsq(m.mT, f.mT).solution.mT
    if torch.linalg.matrix_rank(m) == D:
        assert torch.linalg.eigvalsh((p + p.mT) / 2).min() > 0
        assert (p - p.mT).abs().max() < 1e-5 * p.abs().max()
    return p @ m - f


CLAIMS = {  # what is zero
    "symmetric": lambda w: w.matrix() - w.matrix().mT,
    "skew": lambda w: w.matrix() + w.matrix().mT,
    "psd": lambda w: torch.linalg.eigvalsh((w.matrix() + w.matrix().mT) / 2).clamp(max=0),
    "orthogonal": _orthogonal,
    "scalar": _scalar,
    "tied": _tied,
    "metric": _metric,
}


@EVERY
@ROLES
@pytest.mark.parametrize("optimizer", [AdamW(rate=0.1, weight_decay=0.5), Muon(rate=0.1, weight_decay=0.5)], ids=["adam", "muon"])
def test_claims_survive_the_optimiser(setting, role, optimizer):
    """Large steps along random gradients, weight decay on: what is claimed still holds, to rounding."""
    w = build(setting, role)
    before = w.matrix().detach().clone()
    if any(True for _ in w.parameters()):
        step = optimizer.build(w)
        for _ in range(10):
            for parameter in w.parameters():
                parameter.grad = torch.randn_like(parameter)
            step.step()
        assert (w.matrix() - before).abs().max() > 1e-3
    with torch.no_grad():
        size = w.matrix().abs().max()
        for claim in w.claims:
            assert CLAIMS[claim](w).abs().max() < 1e-12 * max(1.0, float(size)), claim


@EVERY
@ROLES
@torch.no_grad()
def test_claims_hold_in_single_precision(setting, role):
    w = build(setting, role).float()
    for owner in getattr(w, "_form", ()):
        owner.float()
    for claim in w.claims:
        assert CLAIMS[claim](w).abs().max() < 1e-5, claim


@torch.no_grad()
def test_the_instrument_sees_what_is_not_so():
    w = build(LowRank(rank=8), "content")
    form = LowRank(rank=8).build("form", D, 2).double()
    w._form = (form,)
    type(w).form = property(lambda self: self._form[0])
    try:
        for claim in CLAIMS.keys() - {"metric"}:
            assert CLAIMS[claim](w).abs().max() > 1e-2, claim
    finally:
        del type(w).form


@EVERY
@ROLES
@torch.no_grad()
def test_its_size_at_the_start(setting, role):
    """|M_h|_F = score_std and |F_h|_F = update_std sqrt(d/H), for every parameterisation (math I)."""
    dim, heads = 64, 16
    torch.manual_seed(0)
    form = LowRank(rank=4).build("form", dim, heads)
    if getattr(setting, "scale", None) is not None:
        pytest.skip("its size is given")
    setting = dataclasses.replace(setting, score_std=0.5, update_std=0.25)
    try:
        w = setting.build(role, dim, heads, form if role == "content" else None)
    except UserError:
        pytest.skip("a content only")
    size = w.matrix().square().sum((-2, -1)).mean().sqrt()
    assert size == pytest.approx(0.5 if role == "form" else 0.25 * (dim / heads) ** 0.5, rel=0.15)
