"""M and F themselves: symmetrised, retied, shuffled; and the gauge of their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.attention import Attention
from emformer.geometry.gauges import Gauge, apply, balanced, planes
from emformer.geometry.spectra import wide
from emformer.model import Emformer
from emformer.operators import Operator
from emformer.operators.base import Bound
from emformer.operators.lowrank import LowRankOperator
from emformer.operators.tied import TiedOperator
from emformer.parts import UserError
from emformer.positions import PositionMap
from emformer.surgery.copies import (
    Which,
    bare,
    copied,
    each,
    free,
    generator,
    known,
    maps,
    multiplied,
    plain,
    rebuilt,
    set_to,
    shifted,
)
from emformer.types import Index, KeyIndex, Keys, Queries

# Symmetry -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def symmetrise(model: Emformer, layers: Which = None, heads: Which = None) -> Emformer:
    """M <- (M + M^T)/2, with RoPE M_D <- (M_D + M_{-D}^T)/2, so that s_ij = s_ji but for biases. Source: math A.1, A.4, K.

    On the factors L <- [L, R]/2 and R <- [R, L], each half turned as before, of twice the rank and without groups; a dense M
    stays dense, but under RoPE becomes [M, I]/2 and [I, M], of rank 2d. The functional u and b_K stay what they are (both at
    once take one more r). A content tied to M keeps its F.

    Raises:
        UserError: where a kernel or a position is not linear in the factors (L2, a norm, noise): the score is no form then.
    """
    copy, chosen, marked = copied(model, "symmetrise M", layers, heads)
    for layer in chosen:
        attention = copy.layer(layer).attention
        if attention.kernel.reads_factors or any(p.reads_factors and not p.planes for p in maps(attention)):
            raise UserError(
                f"symmetrise: in layer {layer} the kernel or a position is not linear in queries and keys, so that M alone does "
                "not make the score; take it out first."
            )
        copy.layer(layer).attention = _symmetrised(attention, marked)
    return copy


def _symmetrised(attention: Attention, marked: Tensor) -> Attention:
    form, content, biases = attention.form, free(attention.content), attention.biases
    turned = any(position.reads_factors for position in maps(attention))
    key = None if biases is None else biases.right
    if form.identity_right and not turned and key is None:
        left = wide(form.left_rows())
        left = torch.where(marked.view(-1, 1, 1).to(left.device), (left + left.mT) / 2, left)
        return rebuilt(attention, form=plain(left, None, form), content=content)
    left, right = each(form)
    pick, nothing = marked.view(-1, 1, 1).to(left.device), torch.zeros_like(left)
    halves = (torch.where(pick, left / 2, left), torch.where(pick, right / 2, 0)), (right, torch.where(pick, left, 0))
    spare = () if key is None else (nothing,)
    new = plain(torch.cat([*halves[0], *spare], 1), torch.cat([*halves[1], *spare], 1), form)
    positions = [Chunks(p, form.rank) if p.reads_factors else p for p in maps(attention)]
    after = rebuilt(attention, form=new, content=content, positions=positions)
    if biases is not None and after.biases is not None:
        b, pick = biases.left, marked.unsqueeze(-1)
        none = torch.zeros_like(b)
        if key is None:
            set_to(after.biases.left, torch.cat([b, none], -1))
        else:  # L^T y/2 meets 2 b_K, so that b_Q . b_K would come twice: the spare coordinates take it off again
            assert after.biases.right is not None
            k = key.repeat_interleave(len(b) // len(key), 0)
            set_to(after.biases.left, torch.cat([b, none, torch.where(pick, b, 0)], -1))
            set_to(after.biases.right, torch.cat([torch.where(pick, 2 * k, k), none, torch.where(pick, -k, 0)], -1))
    return after


class Chunks(PositionMap):
    """A map that acts on every `rank` coordinates as it did on all of them."""

    reads_factors = True

    def __init__(self, inner: PositionMap, rank: int):
        super().__init__()
        self.inner, self.rank = inner, rank
        self.acts_on_keys = inner.acts_on_keys

    def forward(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]:
        pairs = [self.inner(a, b, i, j) for a, b in zip(u.split(self.rank, -1), v.split(self.rank, -1), strict=True)]
        queries, keys = zip(*pairs, strict=True)
        return torch.cat(queries, -1), torch.cat(keys, -1)


# Ties -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def retie(model: Emformer, scale: float | Tensor | None = None, layers: Which = None, heads: Which = None) -> Emformer:
    """F_h <- c_h M_h, with c_h = <F_h, M_h>/<M_h, M_h> where no scale is given, the nearest to F (0 where M_h = 0). math E.3.

    All heads: a `TiedOperator`, which follows M from now on. Some heads: their c M is written into the factors of F, which
    become as wide as the wider of both, without groups. M is that of no distance, M_0, under RoPE. A value bias belongs to the
    content and goes with the F that is replaced, unless that was tied, too.

    Args:
        scale: c, one number or one a head (H,).

    Raises:
        UserError: for a scale of another shape, or a layer or a head that is not there.
    """
    copy, chosen, marked = copied(model, "retie F" if scale is None else f"retie F with scale {scale}", layers, heads)
    for layer in chosen:
        attention = copy.layer(layer).attention
        form, content = attention.form, free(attention.content)
        m, f = wide(form.matrix()), wide(content.matrix())
        size = m.square().sum((-2, -1))
        if scale is None:
            c = torch.where(size > 0, (f * m).sum((-2, -1)) / size, 0)
        else:
            c = torch.as_tensor(scale, dtype=size.dtype, device=size.device)
            if c.shape not in ((), size.shape):
                raise UserError(
                    f"retie: the scale has shape {tuple(c.shape)}; give one number, or one for each of {len(size)} heads."
                )
            c = c.expand_as(size).clone()
        if marked.all():
            new = TiedOperator(form, c.to(form.left_rows()), False, {})
            after = rebuilt(attention, content=new)
            if after.value_bias is not None and not isinstance(bare(attention.content), Bound):
                set_to(after.value_bias, torch.zeros_like(after.value_bias))
        else:
            after = _retied(attention, content, c, marked)
        copy.layer(layer).attention = after
    return copy


def _retied(attention: Attention, content: Operator, c: Tensor, marked: Tensor) -> Attention:
    form = attention.form
    pick = marked.view(-1, 1, 1)
    if form.identity_right and content.identity_right:
        left = torch.where(pick.to(c.device), c.view(-1, 1, 1) * wide(form.left_rows()), wide(content.left_rows()))
        after = rebuilt(attention, content=shifted(plain(left, None, content), content, ~marked))
        return after  # the value bias (1, d) is all heads' own
    rank = max(form.rank, content.rank)
    (ml, mr), (fl, fr) = ([_padded(rows, rank) for rows in each(operator)] for operator in (form, content))
    pick = pick.to(ml.device)
    left, right = torch.where(pick, c.view(-1, 1, 1) * ml, fl), torch.where(pick, mr, fr)
    after = rebuilt(attention, content=shifted(plain(left, right, content), content, ~marked))
    if attention.value_bias is not None and after.value_bias is not None:
        bias = attention.value_bias.repeat_interleave(content.heads // content.groups, 0)
        set_to(after.value_bias, torch.where(marked.unsqueeze(-1), 0, nn.functional.pad(bias, (0, rank - content.rank))))
    return after


def _padded(rows: Tensor, rank: int) -> Tensor:
    return nn.functional.pad(rows, (0, 0, 0, rank - rows.shape[1]))


# Spectra --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def shuffle(
    model: Emformer,
    seed: int,
    which: Sequence[str] = ("form", "content"),
    layers: Which = None,
    heads: Which = None,
) -> Emformer:
    """W_h <- O_1 W_h O_2^T with independent random (Haar) O_1, O_2 in O(d): spectra kept, singular vectors random. math K.

    The null model of everything that asks how M and F fit together. Done on the factors, whose widths, singular values and
    inner space stay as they are; heads that share a right factor share O_2. A content tied to M is set free first. Cost: two QR
    of d x d a head.

    Args:
        seed: of the draws; the global generator is left alone.
        which: "form", "content", or both.

    Raises:
        UserError: for an operator, a layer or a head that is not there.
    """
    for role in which:
        known("shuffle", "which", role, ("form", "content"))
    copy, chosen, marked = copied(model, f"shuffle the singular vectors of {' and '.join(which)}, seed {seed}", layers, heads)
    roles: list[parts.Role] = [role for role in ("form", "content") if role in which]
    for layer in chosen:
        copy.layer(layer).attention = shuffled(copy.layer(layer).attention, seed, layer, roles, marked)
    return copy


@torch.no_grad()
def shuffled(
    attention: Attention,
    seed: int,
    layer: int,
    roles: Sequence[parts.Role] = ("form", "content"),
    marked: Tensor | None = None,
) -> Attention:
    """What `shuffle` makes of one layer's attention, for the heads in `marked` (H,), all where it is None. Give it a copy: what
    stays as it is, is the old one's own, and a functional that turns is turned in place."""
    heads, dim = attention.form.heads, attention.form.dim
    if marked is None:
        marked = torch.ones(heads, dtype=torch.bool)
    attention = rebuilt(attention, content=free(attention.content))
    for role in roles:
        source = generator("shuffle", role, seed, layer)
        first, second = (_haar(heads, dim, source) for _ in range(2))
        attention = multiplied(attention, role, first, second, marked)
    return attention


def _haar(count: int, dim: int, source: torch.Generator) -> Tensor:
    """Independent, uniformly distributed orthogonal matrices (count, dim, dim), in float64."""
    q, r = torch.linalg.qr(torch.randn(count, dim, dim, generator=source, dtype=torch.float64))
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


# Gauge ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def canonical(model: Emformer, layers: Which = None) -> Emformer:
    """The same function with the factors of every `LowRank` operator in their canonical gauge. Source: math A.3, A.4, H.1.

    Contents, and forms whose factors nobody reads, become balanced, sum_h L_h^T L_h = R^T R. Under one RoPE a form takes the
    gauge that its planes leave free. Where something else reads the factors (L2, a norm, noise) the form stays. Biases go along;
    a content tied to a form follows it.

    Raises:
        UserError: for factors whose rank is below their width, and for several RoPE in a row.
    """
    copy, chosen, _ = copied(model, "canonical gauge", layers)
    for layer in chosen:
        attention = copy.layer(layer).attention
        form, content = attention.form, bare(attention.content)
        try:
            gauge = _gauge_of_form(attention, layer)
            if gauge is not None and isinstance(form, LowRankOperator):
                _regauge(form, gauge)
                if attention.biases is not None:
                    left = attention.biases.left
                    _set_wide(left, wide(left).unflatten(0, (form.groups, -1)) @ gauge.forward)
                    _turn(attention.biases.right, gauge)
                if isinstance(content, Bound):  # its right factor is the form's
                    _turn(attention.value_bias, gauge)
            if isinstance(content, LowRankOperator):
                gauge = balanced(*_groups(content))
                _regauge(content, gauge)
                _turn(attention.value_bias, gauge)
        except ValueError as error:
            raise UserError(f"canonical: layer {layer}: {error}") from error
    return copy


def _gauge_of_form(attention: Attention, layer: int) -> Gauge | None:
    form = attention.form
    readers = [position for position in maps(attention) if position.reads_factors]
    if not isinstance(form, LowRankOperator) or attention.kernel.reads_factors or any(not p.planes for p in readers):
        return None
    if len(readers) > 1:
        raise UserError("several positions turn the factors, and no gauge is known that suits them all; use one.")
    return planes(*_groups(form), readers[0].planes) if readers else balanced(*_groups(form))


def _groups(operator: LowRankOperator) -> tuple[Tensor, Tensor]:
    return operator.left_factor.unflatten(0, (operator.groups, -1)), operator.right_factor


def _regauge(operator: LowRankOperator, gauge: Gauge) -> None:
    left, right = apply(*_groups(operator), gauge)
    set_to(operator.left_factor, left.flatten(0, 1))
    set_to(operator.right_factor, right)


def _turn(bias: nn.Parameter | None, gauge: Gauge) -> None:
    """b <- G^-1 b for a bias (G, r) beside the right factor."""
    if bias is not None:
        _set_wide(bias, gauge.inverse @ wide(bias).unsqueeze(-1))


def _set_wide(parameter: nn.Parameter, value: Tensor) -> None:
    set_to(parameter, value.reshape(parameter.shape).to(parameter))
