"""What every kernel promises: the fused mixture is the one of its weights, under every mask and every grouping."""

from __future__ import annotations

import itertools

import pytest
import torch
from builders import examples, span, stir, variants
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from emformer import parts
from emformer.kernels import L2, Kernel, Linear, Sinkhorn, Softmax
from emformer.masks import Causal, Full, Visible, visible

H, S, D = 4, 7, 8
EVERY = pytest.mark.parametrize("setting", examples(parts.Kernel))
MASKS = pytest.mark.parametrize("mask", examples(parts.Mask))
GAUSSIAN = (Softmax, L2, Linear, Sinkhorn)  # those known to keep a Gaussian cloud Gaussian
QUERIES = [S, 3, 1]  # all, or the last ones of the keys
SHAPES = {  # (G of keys, G of contents, r_M, r_F)
    "multi-head": (4, 4, 6, 6),
    "narrow content": (4, 4, 6, 3),
    "narrow form": (4, 4, 3, 6),
    "grouped keys": (2, 4, 6, 6),
    "shared content": (4, 1, 6, 2),
    "mixed groups": (1, 2, 2, 5),
    "one cloud for all": (1, 1, 8, 8),
}


def normal(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def per_head(x: Tensor) -> Tensor:
    """(B, G, S, r) -> (B, H, S, r): head h takes group h G // H."""
    return torch.stack([x[:, h * x.shape[1] // H] for h in range(H)], 1)


def pattern(mask: parts.Mask, queries: int):
    j = span(S)
    return visible(mask, j[S - queries :], S), mask.visible(j[S - queries :, None], j[None, :])


def build(setting: parts.Kernel, mask: parts.Mask, dtype=torch.float64) -> Kernel:
    torch.manual_seed(0)
    kernel = stir(setting.build(H, D)).to(dtype)
    assert isinstance(kernel, Kernel)
    if not kernel.rowwise and mask.causal:
        pytest.skip("a kernel that reads all rows has no causal mask")
    return kernel


@EVERY
@MASKS
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@torch.no_grad()
def test_the_fused_mixture_is_the_one_of_the_weights(setting, mask, dtype, close):
    kernel = build(setting, mask, dtype=dtype)
    for queries, (name, (keys, contents, rank, width)) in itertools.product(QUERIES if kernel.rowwise else [S], SHAPES.items()):
        sizes = (H, queries, rank), (keys, S, rank), (contents, S, width)
        u, v, c = (normal(2, *size, dtype=dtype) for size in sizes)
        seen, _ = pattern(mask, queries)
        mixture = kernel(u, v, c, seen)
        assert mixture.shape == (2, H, queries, width)
        expected = kernel.weights(u, v, seen) @ per_head(c)
        assert (mixture - expected).abs().max() < close * max(1.0, expected.abs().max()), (name, queries)


@EVERY
@MASKS
@torch.no_grad()
def test_weights_are_weights(setting, mask):
    """Nonnegative unless signed, exactly zero where the mask hides, sums of one as far as the kernel says so."""
    kernel = build(setting, mask)
    for queries in QUERIES if kernel.rowwise else [S]:
        seen, table = pattern(mask, queries)
        a = kernel.weights(normal(2, H, queries, 6), normal(2, 2, S, 6), seen)
        assert a.shape == (2, H, queries, S)
        assert a.isfinite().all() and (a < 0).any() == kernel.signed
        assert (a.masked_select(~table) == 0).all()
        assert a.masked_select(table).all() or kernel.sparse
        assert ((a.sum(-1) - 1).abs().max() < 1e-12) == kernel.normalised
    if kernel.value is not None:
        assert kernel.value.shape == (H, D) and not kernel.normalised


@EVERY
@MASKS
@torch.no_grad()
def test_a_constant_on_a_row_of_scores(setting, mask):
    """Nothing to a kernel that is invariant under it, something to one that is not."""
    kernel = build(setting, mask)
    if kernel.reads_factors:
        pytest.skip("the score alone does not determine the weights")
    u, v, c, seen = normal(2, H, S, 6), normal(2, H, S, 6), normal(2, H, S, 6), pattern(mask, S)[0]
    lifted = torch.cat([u, normal(2, H, S, 1)], -1), torch.cat([v, torch.ones(2, H, S, 1, dtype=v.dtype)], -1)
    weights = (kernel.weights(*lifted, seen) - kernel.weights(u, v, seen)).abs().max()
    mixture = (kernel(*lifted, c, seen) - kernel(u, v, c, seen)).abs().max()
    if kernel.row_invariant:
        assert weights < 1e-12 and mixture < 1e-12
    else:
        assert weights > 1e-3


@EVERY
@MASKS
@torch.no_grad()
def test_a_constant_on_a_column_of_scores(setting, mask):
    kernel = build(setting, mask)
    if kernel.reads_factors:
        pytest.skip("the score alone does not determine the weights")
    u, v, seen = normal(2, H, S, 6), normal(2, H, S, 6), pattern(mask, S)[0]
    lifted = torch.cat([u, torch.ones(2, H, S, 1, dtype=u.dtype)], -1), torch.cat([v, normal(2, H, S, 1)], -1)
    change = (kernel.weights(*lifted, seen) - kernel.weights(u, v, seen)).abs().max()
    alone = kernel.normalised and pattern(mask, S)[1].sum() == S  # a token that sees itself alone has weight 1 at any score
    assert (change < 1e-10) == (kernel.column_invariant or alone)


@EVERY
@MASKS
@torch.no_grad()
def test_whether_it_reads_factors(setting, mask):
    """(u G, v G^-T) has the same scores; only a kernel that says so may see a difference."""
    kernel = build(setting, mask)
    u, v, seen = normal(2, H, S, 6), normal(2, H, S, 6), pattern(mask, S)[0]
    g = normal(6, 6) + 2 * torch.eye(6, dtype=torch.float64)
    change = (kernel.weights(u @ g, v @ torch.linalg.inv(g).mT, seen) - kernel.weights(u, v, seen)).abs().max()
    assert change < 1e-8 or kernel.reads_factors
    if kernel.reads_factors and pattern(mask, S)[1].sum() > S:
        assert change > 1e-3


@EVERY
@MASKS
@torch.no_grad()
def test_a_row_needs_no_other_row(setting, mask):
    """What `rowwise` claims, and what a cache and chunks of queries rest on."""
    kernel = build(setting, mask)
    u, v, c = normal(2, H, S, 6), normal(2, H, S, 6), normal(2, H, S, 6)
    if not kernel.rowwise:
        with pytest.raises(ValueError, match="queries"):
            kernel(u[:, :, [0]], v, c, _rows(mask, [0]))
        return
    whole = kernel(u, v, c, pattern(mask, S)[0])
    alone = torch.cat([kernel(u[:, :, [k]], v, c, _rows(mask, [k])) for k in range(S)], 2)
    assert (whole - alone).abs().max() < 1e-12 * max(1.0, whole.abs().max())


def _rows(mask: parts.Mask, rows: list[int]):
    j = span(S)
    return Visible(mask.visible(j[rows][:, None], j[None, :]))


@EVERY
@MASKS
@torch.no_grad()
def test_what_is_hidden_is_not_read(setting, mask):
    """Hidden keys and contents may hold anything. (Where all rows share in the columns' sums, nothing is quite hidden.)"""
    kernel = build(setting, mask)
    if not kernel.rowwise:
        pytest.skip("not row by row")
    seen, table = pattern(mask, S)
    u, v, c = normal(2, H, S, 6), normal(2, H, S, 6), normal(2, H, S, 6)
    before = kernel(u, v, c, seen)
    for k in range(S):
        others = v.clone(), c.clone()
        for x in others:
            x[:, :, k] += 5 * normal(2, H, 6)
        after = kernel(u, *others, seen)
        blind = ~table[:, k]
        assert torch.equal(after[:, :, blind], before[:, :, blind])
        if not kernel.sparse:
            assert (after[:, :, ~blind] - before[:, :, ~blind]).abs().amax((0, 1, 3)).gt(1e-6).all()


@EVERY
@MASKS
def test_fused_and_reference_have_the_same_gradients(setting, mask):
    kernel = build(setting, mask)
    if not kernel.differentiable:
        pytest.skip("not differentiable")
    seen = pattern(mask, S)[0]
    given = [normal(1, *size).requires_grad_() for size in ((H, S, 4), (2, S, 4), (1, S, 3))]
    out = normal(1, H, S, 3)
    u, v, c = given
    own = {name: p for name, p in kernel.named_parameters() if name != "value"}  # which attention adds
    fused = torch.autograd.grad((kernel(u, v, c, seen) * out).sum(), [*given, *own.values()])
    plain = torch.autograd.grad((kernel.weights(u, v, seen) @ per_head(c) * out).sum(), [*given, *own.values()])
    assert all((a - b).abs().max() < 1e-10 * max(1.0, b.abs().max()) for a, b in zip(fused, plain, strict=True))

    def weights(u: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
        state = {f"of.{name}": p for name, p in zip(own, parameters, strict=True)}
        return torch.func.functional_call(Weights(kernel), state, (u, v, seen))

    assert torch.autograd.gradcheck(weights, (u, v, *own.values()), check_forward_ad=True)


class Weights(torch.nn.Module):
    def __init__(self, of: Kernel):
        super().__init__()
        self.of = of

    def forward(self, u: Tensor, v: Tensor, seen: Visible) -> Tensor:
        return self.of.weights(u, v, seen)


@EVERY
def test_its_state_carries_everything(setting):
    kernel, other = stir(setting.build(H, D)), setting.build(H, D)
    other.load_state_dict(kernel.state_dict())
    u, v, seen = normal(1, H, S, 4).float(), normal(1, H, S, 4).float(), pattern(Full(), S)[0]
    assert torch.equal(kernel.weights(u, v, seen), other.weights(u, v, seen))


@torch.no_grad()
def test_softmax_by_hand():
    """beta multiplies the score, and the weights are its softmax over what is visible: in both ways to compute it."""
    u, v, c, seen = normal(1, H, S, 4), normal(1, 2, S, 4), normal(1, H, S, 3), pattern(Causal(), S)[0]
    kernel = Softmax(beta=2.5).build(H, D)
    a, z = kernel.weights(u, v, seen), kernel(u, v, c, seen)
    for h, i in itertools.product(range(H), range(S)):
        power = (2.5 * v[0, h // 2, : i + 1] @ u[0, h, i]).exp()
        assert (a[0, h, i, : i + 1] - power / power.sum()).abs().max() < 1e-12
        assert (z[0, h, i] - power / power.sum() @ c[0, h, : i + 1]).abs().max() < 1e-12


@EVERY
@torch.no_grad()
def test_its_mean_field_is_what_many_tokens_give(setting):
    """None, or the context mean of a large Gaussian cloud to its own Monte-Carlo error, for every head and query."""
    kernel, rank = build(setting, Full()), 3
    root, mean = normal(D, D) / D**0.5, normal(D) / 2
    # modest scores: weights that few tokens share say nothing of many
    left, right, cov = normal(H, rank, D) / (2 * D), normal(H, rank, D) / 2, root @ root.mT
    known = kernel.mean_field(left, right, mean, cov)
    assert known is not None or not isinstance(setting, GAUSSIAN)
    if known is None:
        return
    # about as many keys in all: a kernel that balances rows against columns takes its queries from the cloud, and N x N weights
    clouds, tokens, queries = (1, 20_000, 8) if kernel.rowwise else (10, 200, 200)
    errors, size = [], []
    for y in mean + normal(clouds, tokens, D) @ root.mT:
        x = mean + 2 * normal(queries, D) @ root.mT if kernel.rowwise else y
        a = kernel.weights((x @ left.mT)[None], (y @ right.mT)[None], Visible(None))[0][:, :8]
        found, x = a @ y, x[:8]
        apart = y - found.unsqueeze(2) if kernel.normalised else y
        error = (a.unsqueeze(-1) * apart).square().sum(2)
        if not kernel.normalised:
            error = error - found.square() / tokens
        moved = x @ known.gain.mT
        errors.append((found - known.offset.unsqueeze(1) - moved) / error.sqrt())
        size.append(moved / error.sqrt())
    z, power = torch.stack(errors), torch.stack(size)
    assert (clouds**0.5 * z.mean(0)).abs().max() < 4.5
    assert power.abs().max() > 15 / clouds**0.5  # the gain is no noise here


@EVERY
@torch.no_grad()
def test_its_mean_field_takes_many_laws_at_once(setting):
    heads, dim, rank = 2, 4, 3
    kernel = stir(setting.build(heads, dim)).double()
    left, right, mean, root = normal(heads, rank, dim), normal(heads, rank, dim), normal(2, 3, dim), normal(2, 3, dim, 2)
    cov = root @ root.mT  # of rank 2
    whole = kernel.mean_field(left, right, mean, cov)
    if whole is None:
        return
    assert whole.offset.shape == (2, 3, heads, dim) and whole.gain.shape == (2, 3, heads, dim, dim)
    for k, j in itertools.product(range(2), range(3)):
        alone = kernel.mean_field(left, right, mean[k, j], cov[k, j])
        assert (whole.offset[k, j] - alone.offset).abs().max() < 1e-12
        assert (whole.gain[k, j] - alone.gain).abs().max() < 1e-12
    # where the cloud has no width its mean has none either
    off = torch.linalg.eigh(cov).eigenvectors[..., :2].mT.unsqueeze(-3)
    if kernel.normalised:
        assert (off @ whole.gain).abs().max() < 1e-6


class Calls(TorchDispatchMode):
    """Names of the operations that really ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


FUSED = [example for example in examples(parts.Kernel) if example.values[0].build(H, D).fused]


@pytest.mark.parametrize("setting", FUSED)
@MASKS
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_fused_kernel_really_takes_the_flash_path(setting, mask, training):
    """CPU flash gives way in silence where widths or head counts differ. So: nothing else is allowed, and it ran."""
    kernel = stir(setting.build(H, D))
    for queries, (keys, contents, rank, width) in itertools.product(QUERIES, SHAPES.values()):
        u, v, c = (
            torch.randn(2, *size, requires_grad=training) for size in ((H, queries, rank), (keys, S, rank), (contents, S, width))
        )
        seen, _ = pattern(mask, queries)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            kernel(u, v, c, seen)
        with Calls() as calls:
            kernel(u, v, c, seen)
        assert sum("_scaled_dot_product_flash_attention" in name for name in calls.names) == 1, calls.names
        assert not any("softmax" in name for name in calls.names), calls.names


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_the_instrument_sees_a_fallback():
    """Unequal widths, handed to torch as they are, take the quadratic path."""
    u, v, c = torch.randn(2, H, S, 6), torch.randn(2, H, S, 6), torch.randn(2, H, S, 3)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), pytest.raises(RuntimeError):
        torch.nn.functional.scaled_dot_product_attention(u, v, c)
    with Calls() as calls:
        torch.nn.functional.scaled_dot_product_attention(u, v, c)
    assert not any("flash" in name for name in calls.names)


def test_something_is_tested():
    assert Softmax in variants(parts.Kernel)
