"""Family "energy": attention as minimisation, how sharp and how far its queries look, and what their keys push back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from emformer import parts
from emformer.geometry import energy
from emformer.geometry.sinks import uniform
from emformer.geometry.spectra import wide
from emformer.kernels import Kernel
from emformer.observables.base import Moments, Observation, Row
from emformer.trajectory import Chunk, Trajectory


@dataclass(frozen=True)
class Energy(parts.Observable):
    """What each query minimises, and the forces on it: rows of each head, and of their mean (of ranges weighted by |v_i^h|).

    Entropy, support, gap and range are of the weights, made to sum to one where they do not; a kernel whose weights may be
    negative has none of them. Free energies are those of a softmax of the score: other kernels have none. Forces are told of
    every kernel but those that read more of the factors than their product; see `Pull`.

    Cost: the H N^2 scores and weights in float64, and H N d (2 r + N) for the forces. Memory: H N d of a few prompts, and of the
    H N^2 numbers the trajectory's budget. Source: math B, D.9.
    """

    family: ClassVar[str] = "energy"
    keys: ClassVar[Mapping[str, str]] = {
        "attn.entropy_norm": "H(a)/log n, n >= 2 visible keys; [0, 1]; null 1 (uniform)",
        "attn.free_energy0": "-(1/beta) log mean_j e^(beta s); in units of s; null -mean s (uniform), which it never exceeds",
        "attn.range_norm": "sum a|i - j| over its value for uniform weights, n >= 8; >= 0; null 1; param 'nosink': without key 0",
        "attn.support": "e^H(a)/n, the share of its keys that a query looks at, n >= 2; (0, 1]; null 1 (uniform)",
        "attn.top_gap": "log(a_1/a_2) of the two best keys; nats; >= 0; 0 for a tie",
        "attn.reaction_ratio": "|rho|/|p|, push of the keys over pull of the query; >= 0; about 1 to 1.1 untrained",
        "attn.cos_action": "cos(v, p) of the update and the query's pull; [-1, 1]; null 0 (F of independent entries, shared by "
        "prompts)",
        "attn.cos_force": "cos(v, p + rho), against the descent of the whole free energy; [-1, 1]; null 0",
        "attn.cos_reaction": "cos(p, rho); [-1, 1]; 1 for a symmetric relevance",
    }
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def begin(self) -> Observation:
        return _Energy()


class _Energy(Observation):
    def __init__(self) -> None:
        self._moments = Moments()

    @torch.no_grad()
    def update(self, trajectory: Trajectory) -> None:
        for k in trajectory.attentions:
            at = trajectory.steps[k].layer, trajectory.steps[k].point
            pull = forces(trajectory, k)
            moved = pull.velocity.norm(dim=-1)
            for (key, param), values in queries(trajectory, k).items():
                null: Tensor | float | None = None if key == "attn.top_gap" else 1.0
                if key == "attn.free_energy0":
                    null = bounds(trajectory, k)
                mean = _weighted(values, moved) if key == "attn.range_norm" else None
                self._moments.by_head(values, *at, key, mean=mean, param=param, null=null)
            if not trajectory.block(k).attention.kernel.reads_factors:
                self._forces(at, pull)

    def _forces(self, at: tuple[int, str], pull: Pull) -> None:
        v, p, rho = pull.velocity, pull.action, pull.reaction
        whole = p + rho
        vv, pp, rr, ww = (_inner(force, force) for force in (v, p, rho, whole))
        ratio = (rr / pp.where(pp > 0, torch.nan)).sqrt()
        self._moments.by_head(ratio, *at, "attn.reaction_ratio")
        self._moments.by_head(_cosine(_inner(p, rho), pp, rr), *at, "attn.cos_reaction")
        for key, force, square in (("attn.cos_action", p, pp), ("attn.cos_force", whole, ww)):
            chance = _chance(pull.mean, force, square)
            # contents of different heads are independent
            together = chance.square().nansum(1).sqrt() / (~chance.isnan()).sum(1)
            cosine = _cosine(_inner(v, force), vv, square)
            self._moments.by_head(cosine, *at, key, null=0.0, null_sd=chance, mean_null_sd=together)

    def rows(self) -> list[Row]:
        return self._moments.rows()


def temperature(kernel: Kernel) -> float | None:
    """beta, where the kernel's weights are softmax(beta s) over what is visible; None for every other kernel."""
    scores_alone = kernel.normalised and kernel.row_invariant and kernel.rowwise
    other = kernel.column_invariant or kernel.sparse or kernel.signed or kernel.reads_factors
    return getattr(kernel, "beta", None) if scores_alone and not other else None


def queries(trajectory: Trajectory, k: int) -> dict[tuple[str, str | None], Tensor]:
    """What step k says of every query, (B, H, T) in float64 by (key, param); only what its kernel defines."""
    kernel = trajectory.block(k).attention.kernel
    if kernel.signed:
        return {}
    beta = temperature(kernel)
    told = [_queries(chunk, beta) for chunk in trajectory.chunks(k)]
    return {key: torch.cat([one[key] for one in told], 2) for key in told[0]}


def _queries(chunk: Chunk, beta: float | None) -> dict[tuple[str, str | None], Tensor]:
    told = energy.rows(chunk.pattern.log() if beta is None else chunk.scores, chunk.visible, 1.0 if beta is None else beta)
    far = energy.attention_range(chunk.pattern, chunk.visible, chunk.queries.start)
    count = chunk.visible.sum(-1).to(told.support)
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
    return torch.cat([-(wide(chunk.scores) * uniform(chunk.visible)).sum(-1) for chunk in trajectory.chunks(k)], 2)


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
    H N d (N + 3 r) and 2 N^2 r; memory 6 H N d.
    """
    attention, step = trajectory.block(k).attention, trajectory.steps[k]
    form, content, y = attention.form, attention.content, step.read
    fold, shift = trajectory.fold(k)
    bare = y if shift is None else y - shift
    share = form.heads // form.groups
    i = torch.arange(y.shape[1], device=y.device)

    after, pull = torch.func.vjp(lambda u, v: attention.place(u, v, i, i), attention.queries(y), attention.keys(y))[:2]
    placed, keys = after
    if attention.kernel.row_invariant and not any(position.acts_on_keys for position in attention.positions):
        keys = form.right(bare)
    keys, key = keys.repeat_interleave(share, 1), torch.zeros_like(placed)
    queries, means = [], []
    for chunk in trajectory.chunks(k):
        a = chunk.pattern
        queries.append(a @ keys)
        means.append(a @ bare.unsqueeze(1))
        key += a.mT @ placed[:, :, chunk.queries]
    query, mean = torch.cat(queries, 2), torch.cat(means, 2)
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
    velocity = content.lift_heads(content.project(mean))
    return Pull(velocity, mean, query, key, left, right.repeat_interleave(share, 0))


def _chance(mean: Tensor, force: Tensor, square: Tensor) -> Tensor:
    """The standard deviation (B, H) of cos(F m, w) of a prompt, if the entries of F were independent: |W^T M|_F/(|W| |M| sqrt d).

    m and w (B, H, T, d), `square` |w|^2. With w = M m and isotropic M that is 1/sqrt(d PR), PR the participation ratio of the
    uncentred m (math 0.1). Prompts share their F: of their mean it falls more slowly than with their number.
    """
    size = (_inner(mean, mean) * square).sqrt()
    if mean.shape[-2] < mean.shape[-1]:
        overlap = _inner(mean @ mean.mT, force @ force.mT).clamp(min=0)
    else:  # the same trace, of d x d matrices
        across = mean.mT @ force
        overlap = _inner(across, across)
    return (overlap / mean.shape[-1]).sqrt() / size.where(size > 0, torch.nan)


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
