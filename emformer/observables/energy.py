"""Family "energy": attention as minimisation, how sharp and how far its queries look, and what their keys push back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import energy
from emformer.geometry.sinks import uniform
from emformer.geometry.spectra import wide
from emformer.kernels import Kernel
from emformer.norms import Norm
from emformer.observables.base import Moments, Observation, Row
from emformer.trajectory import Trajectory


@dataclass(frozen=True)
class Energy(parts.Observable):
    """What each query minimises, and the forces on it: rows of each head, and of their mean (of ranges weighted by |v_i^h|).

    Entropy, support, gap and range are of the weights, made to sum to one where they do not; a kernel whose weights may be
    negative has none of them. Free energies are those of a softmax of the score: other kernels have none. Forces are told of
    every kernel but those that read more of the factors than their product; see `Pull`.

    Cost: the H N^2 scores and weights in float64, and H N d (2 r + N) for the forces. Memory: H r d a layer. Source: math B, D.9.
    """

    family: ClassVar[str] = "energy"
    keys: ClassVar[Mapping[str, str]] = {
        "attn.entropy_norm": "H(a)/log n, n >= 2 visible keys; [0, 1]; null 1 (uniform)",
        "attn.free_energy0": "-(1/beta) log mean_j e^(beta s); in units of s; null -mean s (uniform), which it never exceeds",
        "attn.range_norm": "sum a|i - j| over its value for uniform weights, n >= 8; >= 0; null 1; param 'nosink': without key 0",
        "attn.support": "e^H(a)/n, the share of its keys that a query looks at, n >= 2; (0, 1]; null 1 (uniform)",
        "attn.top_gap": "log(a_1/a_2) of the two best keys; nats; >= 0; 0 for a tie",
        "attn.reaction_ratio": "|rho|/|p|, push of the keys over pull of the query; >= 0; about 1 to 1.1 untrained",
        "attn.cos_action": "cos(v, p) of the update and the query's pull; [-1, 1]; null 0 (content of independent entries)",
        "attn.cos_force": "cos(v, p + rho), against the descent of the whole free energy; [-1, 1]; null 0",
        "attn.cos_reaction": "cos(p, rho); [-1, 1]; 1 for a symmetric relevance",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def begin(self) -> Observation:
        return _Energy()


class _Energy(Observation):
    def __init__(self) -> None:
        self._moments, self._bounds = Moments(), Moments()
        self._chances: dict[tuple[int | None, str | None, str], _Chance] = {}

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        for k in trajectory.attentions:
            at = trajectory.steps[k].layer, trajectory.steps[k].point
            pull = forces(trajectory, k)
            moved = pull.velocity.norm(dim=-1)
            for (key, param), values in queries(trajectory, k).items():
                null = None if key in ("attn.free_energy0", "attn.top_gap") else 1.0
                self._moments.add(values, *at, key, heads=True, param=param, null=null)
                mean = _weighted(values, moved) if key == "attn.range_norm" else values.nanmean(1)
                self._moments.add(mean, *at, key, param=param, null=null)
                if key == "attn.free_energy0":
                    bound = bounds(trajectory, k)
                    self._bounds.add(bound, *at, key, heads=True)
                    self._bounds.add(bound.mean(1), *at, key)
            if not trajectory.block(k).attention.kernel.reads_factors:
                self._forces(at, pull)

    def _forces(self, at: tuple[int, str], pull: Pull) -> None:
        v, p, rho = pull.velocity, pull.action, pull.reaction
        whole = p + rho
        vv, pp, rr, ww = (_inner(force, force) for force in (v, p, rho, whole))
        found = {
            "attn.reaction_ratio": (rr / pp.where(pp > 0, torch.nan)).sqrt(),
            "attn.cos_action": _cosine(_inner(v, p), vv, pp),
            "attn.cos_force": _cosine(_inner(v, whole), vv, ww),
            "attn.cos_reaction": _cosine(_inner(p, rho), pp, rr),
        }
        for key, values in found.items():
            self._moments.add(values, *at, key, heads=True)
            self._moments.add(values.nanmean(1), *at, key)
        query, keyed = (pull.query, pull.left), (pull.key, pull.right)
        for key, square, factors in (("attn.cos_action", pp, [query]), ("attn.cos_force", ww, [query, keyed])):
            self._chances.setdefault((*at, key), _Chance()).add(pull.mean, square, factors)

    def rows(self) -> list[Row]:
        bounds = {(row.layer, row.point, row.key, row.head): row.mean for row in self._bounds.rows()}
        spreads: dict[tuple[int | None, str | None, str, int | None], float] = {}
        for place, chance in self._chances.items():
            each = chance.sd().tolist()
            spreads |= {(*place, head): sd for head, sd in enumerate(each)}
            spreads[*place, None] = math.hypot(*each) / len(each)  # contents of different heads are independent
        found = []
        for row in self._moments.rows():
            place = row.layer, row.point, row.key, row.head
            if place in bounds:
                row = row._replace(null=bounds[place])
            elif place in spreads and row.n_valid:
                row = row._replace(null=0.0, null_sd=spreads[place])
            found.append(row)
        return found


def temperature(kernel: Kernel) -> float | None:
    """beta, where the kernel's weights are softmax(beta s) over what is visible; None for every other kernel."""
    scores_alone = kernel.normalised and kernel.row_invariant and kernel.rowwise
    other = kernel.column_invariant or kernel.sparse or kernel.signed or kernel.reads_factors
    return getattr(kernel, "beta", None) if scores_alone and not other else None


def queries(trajectory: Trajectory, k: int) -> dict[tuple[str, str | None], Tensor]:
    """What step k says of every query, (B, H, T) in float64 by (key, param); only what its kernel defines."""
    kernel, visible = trajectory.block(k).attention.kernel, trajectory.visible(k)
    if kernel.signed:
        return {}
    a, beta = trajectory.pattern(k), temperature(kernel)
    told = energy.rows(a.log(), visible) if beta is None else energy.rows(trajectory.scores(k), visible, beta)
    far = energy.attention_range(a, visible)
    count = visible.sum(-1).to(told.support)
    found: dict[tuple[str, str | None], Tensor] = {("attn.entropy_norm", None): told.entropy_norm}
    if beta is not None:
        found["attn.free_energy0", None] = told.free_energy0
    return found | {
        ("attn.range_norm", None): far.normalised,
        ("attn.range_norm", "nosink"): far.without_sink,
        ("attn.support", None): told.support / count.where(count > 1, torch.nan),
        ("attn.top_gap", None): told.gap,
    }


def bounds(trajectory: Trajectory, k: int) -> Tensor:
    """-mean_j s_ij over visible keys, (B, H, T): the free energy of a query that looks at all of them alike."""
    return -(wide(trajectory.scores(k)) * uniform(trajectory.visible(k))).sum(-1)


class Pull(NamedTuple):
    """The forces on the bare cloud yhat that step k reads, y = A yhat + b, per head, and what they are made of.

    action p_i = sum_j a_ij ds_ij/dyhat_i, reaction rho_j = sum_i a_ij ds_ij/dyhat_j: where a is a softmax of the score, minus the
    gradients of the free energy sum_i F*_i in the query slot and in the key slot. Biases and positions are part of s. What is
    constant along a row of scores is left out of the action where no position turns the keys and the kernel does not notice
    it: it is gauge. In closed form p_i = sum_j a_ij M_eff yhat_j and rho_j = sum_i a_ij (M_eff^T yhat_i + u_eff) then.

    `velocity` v_i = F_eff sum_j a_ij yhat_j, what the head writes but for constants. `mean` A sum_j a_ij yhat_j. `query` and
    `key` (B, H, T, r) are p and rho before the operator's rows `left` and `right` (H, r, d), A folded in. Source: math B, A.6.
    """

    velocity: Tensor
    mean: Tensor
    query: Tensor
    key: Tensor
    left: Tensor
    right: Tensor

    @property
    def action(self) -> Tensor:
        return self.query @ self.left

    @property
    def reaction(self) -> Tensor:
        return self.key @ self.right


@torch.no_grad()
def forces(trajectory: Trajectory, k: int) -> Pull:
    """The `Pull` of step k, (B, H, T, d), in the clouds' type.

    Only the positions are differentiated: the score is a product of factors, and these are linear in the cloud. Cost
    H N d (N + 3 r) and 2 N^2 r.
    """
    attention, step = trajectory.block(k).attention, trajectory.steps[k]
    form, content, biases, y, a = attention.form, attention.content, attention.biases, step.read, trajectory.pattern(k)
    fold, shift = _fold(trajectory.block(k).read_attn, y)
    bare = y if shift is None else y - shift
    share = form.heads // form.groups
    i = torch.arange(y.shape[1], device=y.device)

    u, v = form.left(y), form.right(y)
    if biases is not None:
        u = u + biases.left.unsqueeze(1)
        v = v if biases.right is None else v + biases.right.unsqueeze(1)

    def place(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for position in attention.positions:
            u, v = position(u, v, i, i)
        return u, v

    after, pull = torch.func.vjp(place, u, v)[:2]
    placed, keys = after
    if attention.kernel.row_invariant and not any(position.acts_on_keys for position in attention.positions):
        keys = form.right(bare)
    query, key = a @ keys.repeat_interleave(share, 1), a.mT @ placed
    if len(attention.positions):
        # heads that share keys are pulled one after the other: a pull adds up what arrives at the same key
        pulled = [pull((query, some)) for some in key.unflatten(1, (form.groups, share)).unbind(2)]
        query, key = pulled[0][0], torch.stack([one for _, one in pulled], 2).flatten(1, 2)

    left, right = form.left_rows(), form.right_rows()
    if fold is not None:
        left = left @ fold
        right = fold.unsqueeze(0) if right is None else right @ fold
    elif right is None:
        right = torch.eye(form.dim, dtype=y.dtype, device=y.device).unsqueeze(0)
    mean = a @ bare.unsqueeze(1)
    velocity = content.lift_heads(content.project(mean))
    return Pull(velocity, mean, query, key, left, right.repeat_interleave(share, 0))


def _fold(norm: object, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(A, b) of the norm that the read cloud came through; None where there is nothing to fold."""
    if not isinstance(norm, Norm):
        return None, None
    a, b = norm.affine(y.shape[-1])
    return a.to(y), b.to(y) if b.any() else None


class _Chance:
    """The standard deviation of the mean over prompts of cos(F m, w), if the entries of F were independent.

    Prompts share their F, so that it does not fall with their number as it would for independent ones: for d large it is
    |mean_b W_b^T M_b|_F/sqrt(d), W_b and M_b (T, d) of Frobenius norm 1. Of one prompt with w = M m and isotropic M that is
    1/sqrt(d PR), PR the participation ratio of the uncentred m (math 0.1).
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._count: Tensor | float = 0.0

    def add(self, mean: Tensor, square: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """m (B, H, T, d), |w|^2 (B, H), and w as a sum of coefficients (B, H, T, r), narrower, times rows (H, r, d)."""
        scale = (_inner(mean, mean) * square).sqrt()
        known = scale > 0
        weight = (1 / scale).where(known, 0.0).to(mean)[:, :, None, None]
        tokens = mean.transpose(0, 1).flatten(1, 2)
        sums = [wide((weight * some).transpose(0, 1).flatten(1, 2).mT @ tokens) for some, _ in factors]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._rows = [wide(rows) for _, rows in factors]
        self._count = self._count + known.sum(0)

    def sd(self) -> Tensor:
        """(H,); nan of no prompt."""
        whole = sum(rows.mT @ sums for rows, sums in zip(self._rows, self._sums, strict=True))
        assert isinstance(whole, Tensor)
        return torch.linalg.matrix_norm(whole) / (self._count * math.sqrt(whole.shape[-1]))


def _inner(p: Tensor, q: Tensor) -> Tensor:
    """<p, q> over the cloud (B, H), summed in the clouds' type."""
    return wide((p * q).sum((-2, -1)))


def _cosine(inner: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """From the inner product and both squares."""
    scale = (first * second).sqrt()
    return (inner / scale.where(scale > 0, torch.nan)).clamp(-1, 1)


def _weighted(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over heads (B, T) of values (B, H, T), those that are undefined left out."""
    weight = weight.where(~values.isnan(), 0.0)
    return (weight * values.nan_to_num()).sum(1) / weight.sum(1)
