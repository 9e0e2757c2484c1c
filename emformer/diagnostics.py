"""What a model's operators are, read off its weights: no text, no pass through the model.

Everything is told of the *effective* operators, those that act on the bare normalised cloud (math A.6), computed in float64 from
parameters that are widened before anything is multiplied: a product of factors of width r then has rank r to the last bit, which
the compatibility defect asks for. The inverse temperature beta of a kernel is not part of M.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from emformer.block import Block
from emformer.geometry.spectra import (
    asymmetry,
    attraction,
    compatibility,
    compatibility_sphere,
    effective_rank_of,
    eigenvalues,
    singular_values,
    stable_rank_of,
)
from emformer.model import Emformer
from emformer.norms import Norm
from emformer.operators import Operator

ROWS = 64  # a table of more heads than that is told by layers

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Effective(NamedTuple):
    """One layer on the bare cloud yhat = Pi x / s(x), in float64. With a_ij the weights and mhat_i = sum_j a_ij yhat_j:

        s_ij = yhat_i^T form yhat_j + functional . yhat_j + query . yhat_i + constant
        D_i  = sum_h content mhat_i^h + drift          where the weights sum to one

    `form` M_eff (H, d, d), `functional` u_eff (H, d), `content` F_eff (H, d, d), `drift` g_eff (d,). `query` w (H, d) and
    `constant` c0 (H,) are constant along a row of scores: of no effect in a kernel that is `row_invariant`, and there for the
    others. `shift` (H, d) is what head h gives to the drift, F_h b and its value bias: weights of mass sum_j a_ij != 1 give
    their mass of it, D_i = sum_h (content mhat_i^h - (1 - mass_i^h) shift_h) + drift.
    """

    form: Tensor
    functional: Tensor
    content: Tensor
    drift: Tensor
    query: Tensor
    constant: Tensor
    shift: Tensor


@torch.no_grad()
def effective(block: Block) -> Effective:
    """The layer with the norm that it reads through folded in: with (A, b) = `Norm.affine`, so that y = A yhat + b,

        M_eff = A^T M A,   u_eff = A^T (M^T b + u),   F_eff = F A,   g_eff = g + sum_h F_h b.

    A = I, b = 0 where there is no norm before attention (PostNorm, none). A b_K gives w = L b_K and c0 = b_Q . b_K; folded,
    w_eff = A^T (M b + w) and c0_eff = b^T M b + (u + w) . b + c0.

    What no matrix tells is left out. Positions: M, u and w are those of offset 0 under RoPE (at others M_D = L R_D R^T), and
    maps or kernels that do more to the factors (QueryNorm, KeyNorm, L2) make scores that are no form at all. What a kernel's
    sink gives, (1 - mass) F value, and what a surgery adds by position, are no part of the drift. The second norm of a
    SandwichNorm scales every update by its size, and the projection of a Sphere by its place: F_eff and g_eff are before them.
    On the sphere of math E.1, whose tokens are unit vectors, M is d times M_eff.

    Cost H d^3, and a float64 copy of the layer's operators. Source: math A.2, A.6.
    """
    attention = block.attention
    # together, because a tied content refers to its form
    form, content = _doubled(nn.ModuleList([attention.form, attention.content]))
    assert isinstance(form, Operator) and isinstance(content, Operator)
    m, f = form.matrix(), content.matrix()
    heads, dim = m.shape[:2]
    u, w, constant = m.new_zeros(heads, dim), m.new_zeros(heads, dim), m.new_zeros(heads)
    biases = attention.biases
    if biases is not None:
        u = _on_heads(form.right_rows(), biases.left, heads)
        if biases.right is not None:
            key = biases.right.to(m).repeat_interleave(heads // form.groups, 0)
            w = _on_heads(form.left_rows(), key, heads)
            constant = (biases.left.to(m) * key).sum(-1)
    shift = m.new_zeros(heads, dim)
    if attention.value_bias is not None:
        value = attention.value_bias.repeat_interleave(heads // content.groups, 0)
        shift = _on_heads(content.left_rows(), value, heads)
    if block.read_attn is not None:
        a, b = _affine(block.read_attn, m)
        constant = constant + (m @ b) @ b + (u + w) @ b
        u, w, shift = (m.mT @ b + u) @ a, (m @ b + w) @ a, shift + f @ b
        m, f = a.mT @ m @ a, f @ a
    drift = shift.sum(0) if attention.drift is None else shift.sum(0) + attention.drift.to(m)
    return Effective(m, u, f, drift, w, constant, shift)


class Factors(NamedTuple):
    """The effective operators of one layer by the rows of their factors, in float64: M_h = form_left_h^T form_right_h (H, r, d),
    F_h likewise, r the width of the factors."""

    form_left: Tensor
    form_right: Tensor
    content_left: Tensor
    content_right: Tensor


@torch.no_grad()
def factors(block: Block) -> Factors:
    """`effective` without multiplying out: M_eff = (A^T L) (A^T R)^T and F_eff = L (A^T R)^T. Cost H r d^2."""
    attention = block.attention
    form, content = _doubled(nn.ModuleList([attention.form, attention.content]))
    assert isinstance(form, Operator) and isinstance(content, Operator)
    told: list[Tensor] = []
    for operator in (form, content):
        left, right = operator.left_rows(), operator.right_rows()
        if right is None:
            right = torch.eye(operator.dim, dtype=left.dtype, device=left.device).unsqueeze(0)
        if block.read_attn is not None:
            a, _ = _affine(block.read_attn, left)
            left, right = left @ a if operator is form else left, right @ a
        told += [left.detach(), right.repeat_interleave(operator.heads // len(right), 0).detach()]
    return Factors(*told)


class Diagnosis(NamedTuple):
    """One head, on effective operators, in float64. `_form` is of M, `_content` of F.

    `asym` a = |K|^2/|W|^2 (key op.asym), in [0, 1], null (d - 1)/2d; `attraction` pi (op.attraction), in [0, 1], null 1/2;
    `compat` delta(F, M) (op.compat), in [0, 1], an upper bound that is above the defect by `compat_error` at most, null: a
    shuffled F, .84 to .89; `compat_sphere` in [0, 1], null 1 - 1/d^2; `norm` |W|_F, in units of W; `rank` the effective rank
    exp H of the singular values, in [1, d]; `stable` the stable rank |W|_F^2/|W|_2^2, in [1, rank]; `top` the largest singular
    value |W|_2, in units of W. nan is 0/0 (W = 0; no symmetric part for
    `attraction`), or in `compat` that it was not computed.
    """

    layer: int
    head: int
    asym_form: float
    asym_content: float
    attraction_form: float
    attraction_content: float
    compat: float
    compat_error: float
    compat_sphere: float
    norm_form: float
    norm_content: float
    rank_form: float
    rank_content: float
    stable_form: float
    stable_content: float
    top_form: float
    top_content: float


@torch.no_grad()
def diagnose(model: Emformer, widest: int = 256, limit: int = 200) -> list[Diagnosis]:
    """Every head of every layer, layer by layer; blocks that all layers share are told once, as layer 0.

    Cost a head: 20 k^3 and about 100 r^3 for delta, r the rank of M, k = min(d, 2 (r_M + r_F)): operators that are narrower than
    the space are looked at in the subspace that both of them live in. On one core about 10 ms at r = 32, 50 ms for d x d
    matrices of d = 128, 0.3 s at d = 256.

    Args:
        widest: heads whose M has a factor wider than this get no delta (nan): it would take seconds a head.
        limit: most steps of the search for delta; `compat_error` tells what is left open.
    """
    found = []
    for layer in _distinct(model):
        m, f, rank = _cores(model.layer(layer))
        delta, error = torch.full((2, len(m)), torch.nan, dtype=m.dtype)
        if rank <= widest:
            delta, error = compatibility(f, m, limit=limit)
        singular = [singular_values(w) for w in (m, f)]
        columns = [
            *(asymmetry(w) for w in (m, f)),
            *(attraction(w) for w in (m, f)),
            delta,
            error,
            compatibility_sphere(f, m),
            *(torch.linalg.matrix_norm(w) for w in (m, f)),
            *(effective_rank_of(s) for s in singular),
            *(stable_rank_of(s) for s in singular),
            *(s[:, 0] for s in singular),
        ]
        values = torch.stack([column.cpu() for column in columns], -1).tolist()
        found += [Diagnosis(layer, head, *row) for head, row in enumerate(values)]
    return found


class Spectra(NamedTuple):
    """Of one layer's effective operators, in float64 and in units of W: singular values (H, d), descending, and complex
    eigenvalues (H, d) by descending modulus."""

    singular_form: Tensor
    singular_content: Tensor
    eigen_form: Tensor
    eigen_content: Tensor


@torch.no_grad()
def spectra(model: Emformer) -> list[Spectra]:
    """The spectra of M and F of every layer; one entry alone where all layers share a block. Cost 25 d^3 a head."""
    found = []
    for layer in _distinct(model):
        folded = effective(model.layer(layer))
        m, f = folded.form, folded.content
        found.append(Spectra(singular_values(m), singular_values(f), eigenvalues(m), eigenvalues(f)))
    return found


COLUMNS: tuple[tuple[str, str, str], ...] = (  # field, heading, format
    ("asym_form", "a(M)", ".3f"),
    ("asym_content", "a(F)", ".3f"),
    ("attraction_form", "pi(M)", ".3f"),
    ("attraction_content", "pi(F)", ".3f"),
    ("compat", "delta", ".3f"),
    ("compat_sphere", "sphere", ".3f"),
    ("norm_form", "|M|", ".3g"),
    ("norm_content", "|F|", ".3g"),
    ("rank_form", "rank M", ".1f"),
    ("rank_content", "rank F", ".1f"),
)


def table(rows: Sequence[Diagnosis]) -> str:
    """The heads as text, with what each column would be for random operators: a line a head, or, of more than 64 heads, three
    lines a layer, its mean, least and greatest value. Values that are nan are in no mean; the last line counts them."""
    lines = [
        "of form M and content F, norm folded in: a asymmetry, pi attraction, |.| Frobenius norm, rank exp(entropy of s_i/sum s)",
        "of both: delta = min |F - P M|/|F| over P >= 0 (0: F = P M), sphere = 1 - cos^2(F, M) (0: F = c M)",
        "null (random operators): a (d-1)/2d, pi 1/2, delta .84 (full rank) to .96 (rank d/12), sphere 1 - 1/d^2",
        "",
        f"{'layer':<6}{'head':<6}" + "".join(f"{heading:>8}" for _, heading, _ in COLUMNS),
    ]
    if len(rows) <= ROWS:
        lines += [_line(row.layer, str(row.head), [[getattr(row, name)] for name, _, _ in COLUMNS], _mean) for row in rows]
    else:
        for layer in sorted({row.layer for row in rows}):
            columns = [[getattr(row, name) for row in rows if row.layer == layer] for name, _, _ in COLUMNS]
            lines += [_line(layer, word, columns, of) for word, of in (("mean", _mean), ("min", min), ("max", max))]
    # nothing is left out silently
    lost = sum(math.isnan(getattr(row, name)) for row in rows for name, _, _ in COLUMNS)
    if lost:
        lines.append(
            f"{lost} of {len(rows) * len(COLUMNS)} values are nan: 0/0 (W = 0, or pi of a skew W), or M too wide for delta"
        )
    loose = max((row.compat_error for row in rows if not math.isnan(row.compat_error)), default=0.0)
    if loose > 0.0005:  # it would show
        lines.append(f"delta is an upper bound, at most {loose:.3f} above the defect")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _line(layer: int, word: str, columns: Sequence[list[float]], of: Callable[[list[float]], float]) -> str:
    cells = []
    for values, (_, _, shown) in zip(columns, COLUMNS, strict=True):
        kept = [value for value in values if not math.isnan(value)]
        cells.append(f"{of(kept) if kept else math.nan:>8{shown}}")
    return f"{layer:<6}{word:<6}" + "".join(cells)


# ----------------------------------------------------------------------------------------------------------------------


def _distinct(model: Emformer) -> range:
    """The layers with a block of their own."""
    return range(len(model.blocks))


def _doubled(module: AnyModule) -> AnyModule:
    """A float64 copy, on the CPU where the device has no such numbers."""
    twin = copy.deepcopy(module)
    parameter = next(twin.parameters(), None)
    return (twin.cpu() if parameter is not None and parameter.device.type == "mps" else twin).double()


def _affine(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """(A, b) of a norm, beside `like` (…, d), of its type."""
    twin = _doubled(norm)
    assert isinstance(twin, Norm)
    a, b = twin.affine(like.shape[-1])
    return a.to(like), b.to(like)


def _on_heads(rows: Tensor | None, coefficients: Tensor, heads: int) -> Tensor:
    """W_h c_h (H, d) for the rows (G, r, d) of W^T and c (H, r); rows None: the identity."""
    if rows is None:
        return coefficients.double().clone()
    each = rows.repeat_interleave(heads // len(rows), 0)
    return (coefficients.to(each).unsqueeze(1) @ each).squeeze(1)


def _cores(block: Block) -> tuple[Tensor, Tensor, int]:
    """(M, F, r) of a block: both effective operators (H, k, k) in an orthonormal basis of a subspace that holds the row and
    column spaces of both, where there is one narrower than E, and the width of M's factors.

    Nothing of a `Diagnosis` changes: with Q the basis, W = Q C Q^T has the singular values and the asymmetry of C, a symmetric
    part of the same spectrum but for zeros, and the best P of the defect has no part outside of Q.
    """
    form, content = block.attention.form, block.attention.content
    if 2 * (form.rank + content.rank) >= form.dim:
        folded = effective(block)
        return folded.form, folded.content, form.rank
    rows = factors(block)
    basis = torch.linalg.qr(torch.cat(rows, 1).mT, mode="r").R
    ml, mr, fl, fr = basis.split([len(piece[0]) for piece in rows], -1)
    return ml @ mr.mT, fl @ fr.mT, form.rank
