"""Family "foliation": how queries slice the space into leaves of equal score, alike or not, and how positions tilt them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import leaves, sinks
from emformer.geometry.spectra import wide
from emformer.observables.base import Moments, Observation, Row
from emformer.parts import UserError
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Foliation(parts.Observable):
    """Leaves and gradients of every head, and of their mean over heads.

    Gradients r_i are effective, those of the score in the bare cloud yhat that the norm makes, at the offset 0 where positions
    turn the keys. Kernels that read more of the factors than the score have no such leaves and no rows; keys that a position does
    more to than turn them have scores, but no gradients.

    Cost a layer: the H N^2 scores a few times in float64, within the trajectory's budget; H N r^2 for gradients of width r, again
    for every offset, and one decomposition of them. Source: math C, A.4.

    Args:
        offsets: Delta = j - i of the tilt, of which those that a prompt is too short for are left out.
    """

    offsets: Sequence[int] = (-1, -2, -4, -8, -16, -32)

    family: ClassVar[str] = "foliation"
    keys: ClassVar[Mapping[str, str]] = {
        "fol.gap_nats": "beta (s_1 - s_2) of the two highest distinct leaves; nats; > 0; e^gap is the ratio of their weights",
        "fol.multiplicity": "tokens on the highest leaf; >= 1; null 1 (no two tokens alike)",
        "fol.spread": "standard deviation of s over what a query sees; in units of s; >= 0",
        "fol.resolution": "|r|, the most that the score can change a unit of length; in units of s; >= 0",
        "fol.undirected": "share of gradients too short to have a direction; [0, 1]; null 0",
        "fol.aniso": "mean cosine between the gradients of a prompt; [-1/(N-1), 1]; null 0, sd that of independent "
        "isotropic tokens",
        "fol.common_share": "|mean r|^2/mean |r|^2, a bias blind to the query; [0, 1]; null 1/N",
        "fol.common_corr": "correlation of <mean r, y_j> with the mean weight of token j; [-1, 1]; null 0, sd 1/sqrt(N-1)",
        "fol.erank": "effective rank of the gradients of a prompt; 1 .. min(N, rank M + 1)",
        "fol.tilt": "mean angle between the gradients at offset Delta and at 0; radians; [0, pi]; null 0 (no position)",
        "fol.norm_ratio": "mean |r(Delta)|/|r(0)|; >= 0; null 1 (no position, or an isometry)",
        "fol.coherence": "least |Delta| of the offsets at which the mean cosine of the tilt is below 1/2; tokens; undefined "
        "where it is longer than all of them",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        offsets = tuple(self.offsets)  # YAML gives a list
        if 0 in offsets or len(set(offsets)) < len(offsets):
            raise UserError(f"Foliation: offsets are {list(offsets)}; choose distinct whole numbers other than 0.")
        object.__setattr__(self, "offsets", offsets)

    def begin(self) -> Observation:
        return _Foliation(self.offsets)


class _Foliation(Observation):
    def __init__(self, offsets: Sequence[int]):
        self._offsets, self._moments = offsets, Moments()

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        for k in trajectory.attentions:
            at = trajectory.steps[k].layer, trajectory.steps[k].point
            for key, values in queries(trajectory, k).items():
                self._moments.by_head(values, *at, key, null=1.0 if key == "fol.multiplicity" else None)
            field = gradients(trajectory, k)
            if field is not None:
                self._gradients(trajectory, k, at, field)

    def _gradients(self, trajectory: Trajectory, k: int, at: tuple[int, str], field: Gradients) -> None:
        add, core, form = self._moments.by_head, field.core, trajectory.block(k).attention.form
        flat = field.coefficients(0) @ core
        tokens = flat.shape[-2]
        add(flat.norm(dim=-1), *at, "fol.resolution")
        add(leaves.without_direction(flat) / tokens, *at, "fol.undirected", null=0.0)
        each, whole = chance(form.left_rows(), core, field.fold)
        pairs = leaves.anisotropy_sd(tokens, 1) if tokens > 1 else math.nan
        sds = pairs * torch.tensor(each, dtype=torch.float64).sqrt()
        add(leaves.anisotropy(flat), *at, "fol.aniso", null=0.0, null_sd=sds, mean_null_sd=pairs * math.sqrt(whole))
        add(leaves.common_share(flat), *at, "fol.common_share", null=1 / tokens)
        add(leaves.gradient_rank(flat), *at, "fol.erank")
        if field.turned:
            self._tilt(at, field, core, tokens)
        else:
            total, (_, seen) = 0.0, trajectory.counts(k)
            for chunk in trajectory.chunks(k):
                total = total + sinks.received(chunk.pattern, chunk.visible)
            # before the norm is folded in: on the read cloud the same up to a constant
            read = trajectory.steps[k].read
            common = form.pull(field.coefficients(0).mean(-2, keepdim=True).to(read))
            spread = 1 / math.sqrt(tokens - 1) if tokens > 1 else None
            add(leaves.common_correlation(common, read, total / seen), *at, "fol.common_corr", null=0.0, null_sd=spread)

    def _tilt(self, at: tuple[int, str], field: Gradients, core: Tensor, tokens: int) -> None:
        offsets, add = [offset for offset in self._offsets if abs(offset) < tokens], self._moments.by_head
        if not offsets:
            return
        found = leaves.tilt(lambda offset: field.coefficients(offset) @ core, offsets)
        for column, offset in enumerate(offsets):
            add(found.angle[..., column], *at, "fol.tilt", null=0.0, param=f"delta={offset}")
            add(found.norm_ratio[..., column], *at, "fol.norm_ratio", null=1.0, param=f"delta={offset}")
        add(found.coherence, *at, "fol.coherence")

    def rows(self) -> list[Row]:
        return self._moments.rows()


def queries(trajectory: Trajectory, k: int) -> dict[str, Tensor]:
    """What step k says of every query with a choice, one that sees two tokens or more: (B, H, T') in float64 by key.

    Nothing of a kernel that does not read scores alone. The gap is there where the kernel knows a temperature, and what it does
    with the scores is not undone by what it adds to a column, or by a sign.
    """
    kernel = trajectory.block(k).attention.kernel
    if kernel.reads_factors:
        return {}
    beta = None if kernel.column_invariant or kernel.signed else getattr(kernel, "beta", None)
    told: dict[str, list[Tensor]] = {}
    for chunk in trajectory.chunks(k):
        chooses = chunk.visible.sum(-1) >= 2
        top = leaves.top_gap(chunk.scores, chunk.visible, 1.0 if beta is None else float(beta))
        found = {"fol.spread": leaves.leaf_spread(chunk.scores, chunk.visible), "fol.multiplicity": top.multiplicity}
        if beta is not None:
            found["fol.gap_nats"] = top.gap
        for key, values in found.items():
            told.setdefault(key, []).append(values[..., chooses])
    return {key: torch.cat(values, -1) for key, values in told.items()}


class Gradients(NamedTuple):
    """Effective relevance gradients r_i(Delta) = `coefficients(Delta)` (B, H, T, r) @ `rows` (H, r, d), in float64.

    `turned`: whether they depend on Delta. `fold` A (d, d) of the norm, None where it is the identity; it is part of `rows`.
    """

    coefficients: Callable[[int], Tensor]
    rows: Tensor
    turned: bool
    fold: Tensor | None

    def at(self, offset: int = 0) -> Tensor:
        """r(Delta) (B, H, T, d)."""
        return self.coefficients(offset) @ self.rows

    @property
    def core(self) -> Tensor:
        """(H, r, min(r, d)) or (1, d, d): in place of `rows` it leaves all lengths and angles as they are. Cost H r^2 d."""
        return torch.linalg.qr(self.rows.mT, mode="r").R.mT


@torch.no_grad()
def gradients(trajectory: Trajectory, k: int) -> Gradients | None:
    """The gradients of step k, biases and positions in them: on the bare cloud, y = A yhat + b, s_ij = <r_i(j - i), yhat_j> +
    c_i(j - i), where c is independent of the token j, and of its place too unless positions turn the keys.

    None where the score is not linear in the key: of a kernel that reads the factors, or a position that does more to keys than
    turn planes. Of a position that turns keys, the adjoint acts on the query: r_i(Delta) = A^T R (turn_{i + Delta})^T turn_i u_i.
    """
    attention, y = trajectory.block(k).attention, trajectory.steps[k].read
    form, positions = attention.form, list(attention.positions)
    if attention.kernel.reads_factors or any(p.acts_on_keys and p.reads_factors and not p.planes for p in positions):
        return None
    i = torch.arange(y.shape[1], device=y.device)
    u = attention.queries(y)
    turned = any(position.acts_on_keys for position in positions)
    placed = attention.place(u, torch.zeros_like(u), i, i)[0]

    def coefficients(offset: int) -> Tensor:
        if not turned:
            return wide(placed)
        with torch.enable_grad():
            keys = torch.zeros_like(u, requires_grad=True)  # any will do: the map is linear in them
            return wide(torch.autograd.grad(attention.place(u, keys, i, i + offset)[1], keys, placed)[0])

    a, _ = trajectory.fold(k)
    fold = None if a is None else wide(a)
    right = form.right_rows()
    rows = torch.eye(form.dim, dtype=y.dtype, device=y.device).unsqueeze(0) if right is None else right
    rows = wide(rows) if fold is None else wide(rows) @ fold
    return Gradients(coefficients, rows.repeat_interleave(form.heads // form.groups if len(rows) > 1 else 1, 0), turned, fold)


def chance(reads: Tensor, core: Tensor, fold: Tensor | None) -> tuple[list[float], float]:
    """Mean squares of the cosine of W_h^T y and W_h^T y', y and y' independent and isotropic: by head, and of their mean.

    1/D where W_h is a multiple of a projector onto D dimensions, more where it stretches them unequally; heads that see the same
    tokens are not independent of each other. Estimated to about 1 % from all pairs of 256 Gaussian tokens. nan of W = 0. Cost
    256 H r (d + 256).

    Args:
        reads: rows (H, r, d) of the factor that meets the token.
        core: (H or 1, r, p), with W_h = reads_h^T core_h Q_h and any Q_h of orthonormal rows.
        fold: A (d, d) of the norm before.
    """
    reads = wide(reads) if fold is None else wide(reads) @ fold
    count, generator = 256, torch.Generator().manual_seed(0)
    tokens = torch.randn(reads.shape[-1], count, generator=generator, dtype=torch.float64).to(reads.device)
    images = (core.mT @ (reads @ tokens)).mT
    units = images / images.norm(dim=-1, keepdim=True)
    cosines = units @ units.mT
    each, whole = ((c.square().sum((-2, -1)) - count) / (count * (count - 1)) for c in (cosines, cosines.nanmean(0)))
    return each.tolist(), float(whole)
