"""Sinkhorn attention: weights that sum to one over keys and over queries."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emformer import parts
from emformer.kernels.base import Affine, Direct, Tempered, scores
from emformer.masks import Visible
from emformer.parts import UserError
from emformer.types import Keys, Queries, Rows, Weights


@dataclass(frozen=True)
class Sinkhorn(Tempered, parts.Kernel):
    """a_ij = exp(beta s_ij + f_i + g_j), doubly stochastic. Source: math A.2, A.8, E.6; Sander et al. 2022, S3.

    The potentials f and g take up any function of the query and any function of the key, so no bias counts. Not under a causal
    mask: a triangular doubly stochastic matrix is the identity.

    Rows and columns are scaled in turn until no column sum is further than `tolerance` from 1, with Newton's method where that is
    slow. One last Newton step on the condition then makes the result exact to second order and, as the derivative of that
    step is the implicit one, makes gradients exact however many iterations there were, in forward and in reverse mode. Cost:
    two passes over the weights an iteration, and an N x N solve.

    Args:
        tolerance: largest error of a column sum before the Newton step; after it, its square.
        iterations: at most this many before Newton's method; a warning says if both were too few.
    """

    tolerance: float = 1e-4
    iterations: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tolerance < 1 or self.iterations < 1:
            raise UserError(
                f"Sinkhorn: tolerance is {self.tolerance} and iterations {self.iterations}; choose one in (0, 1) and at least 1."
            )

    @classmethod
    def examples(cls) -> Sequence[Sinkhorn]:
        return [cls(tolerance=1e-6), cls(beta=0.5, tolerance=1e-6)]

    def build(self, heads: int, dim: int) -> SinkhornKernel:
        return SinkhornKernel(self.beta, self.tolerance, self.iterations)


class SinkhornKernel(Direct):
    normalised = True
    row_invariant = True
    column_invariant = True
    rowwise = False

    def __init__(self, beta: float, tolerance: float, iterations: int):
        super().__init__()
        self.beta, self.tolerance, self.iterations = beta, tolerance, iterations

    def weights(self, u: Queries, v: Keys, visible: Visible) -> Weights:
        s = self.beta * scores(u, v)
        if s.shape[-1] != s.shape[-2]:
            raise ValueError("Sinkhorn attention needs all queries at once: it balances them against all keys")
        if s.dtype in (torch.bfloat16, torch.float16):
            s = s.float()  # eight bits cannot hold a sum to one
        if visible.table is not None:
            s = s.masked_fill(~visible.table, float("-inf"))
        with torch.autocast(s.device.type, enabled=False):
            g, converged = self._potential(s.detach())
            step = _newton(s, g)
            if not converged:  # far from the solution a step may lead anywhere: its derivative alone is taken
                step = step - step.detach()
            return (s + g + step).softmax(-1).to(u.dtype)

    @torch.no_grad()
    def _potential(self, s: Tensor) -> tuple[Tensor, bool]:
        """g (…, 1, N), and whether it is so close that one more Newton step is exact."""
        g, error = _scaled(s, self.tolerance, self.iterations)
        for _ in range(_NEWTON):  # sharp scores: scaling creeps where Newton, once near, squares the error
            if error < self.tolerance:
                return g, True
            step = _newton(s, g)
            for length in (1.0, 0.5, 0.25, 0.1, 0.01):
                after = _error(s, g + length * step)
                if after < error:
                    break
            else:
                break
            g, error = g + length * step, after
        if error < self.tolerance:
            return g, True
        warnings.warn(
            f"Sinkhorn: after {self.iterations} iterations a column still sums to 1 ± {error:.1g}; "
            "raise iterations, or lower beta",
            stacklevel=2,
        )
        return g, False

    def macs(self, keys: int, visible: float, rank: int, width: int) -> int:
        # about ten iterations of two passes over the weights; P^T P and a solve, for all queries together
        return keys * (rank + width + 20) + keys * keys * 4 // 3

    def mean_field(self, left: Rows, right: Rows, mean: Tensor, cov: Tensor) -> Affine:
        # Given its query a key is Gaussian again, of covariance C = S (1 - t^2) S^T for a root S of Sigma and t the correlations
        # that solve t = s (1 - t^2), s the singular values of beta S^T M^T S. So 1 - t^2 = 2/(1 + sqrt(1 + 4 s^2)): nothing
        # cancels where s is small, and as Sigma is not inverted it may be singular (math E.6).
        values, vectors = torch.linalg.eigh(cov)
        root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)).unsqueeze(-3)
        tilt = self.beta * (right.mT @ left)
        axes, s, _ = torch.linalg.svd(root.mT @ tilt @ root)
        rest = root @ axes * (2 / (1 + (1 + 4 * s.square()).sqrt())).sqrt().unsqueeze(-2)
        gain = rest @ rest.mT @ tilt
        mean = mean.unsqueeze(-2)
        return Affine(mean - (gain @ mean.unsqueeze(-1)).squeeze(-1), gain)


_NEWTON = 30  # steps at most


def _scaled(s: Tensor, tolerance: float, iterations: int) -> tuple[Tensor, float]:
    """The potential g by scaling rows and columns in turn, and the largest error of a column sum."""
    # scaling exp(s) itself: products, where logarithms would cost an exp for every weight each time
    k = (s - s.amax(-1, keepdim=True)).exp()
    b = torch.ones_like(s[..., :1])
    kt, error = k.mT, float("inf")
    for step in range(iterations):
        columns = kt @ (1 / (k @ b))
        last = step == iterations - 1
        if step % 3 == 2 or last:  # looking costs a synchronisation
            error = float((b * columns - 1).abs().max())
            if last or not error >= tolerance:
                break
        b = 1 / columns
    g = b.log().mT
    if error < float("inf") and bool(g.isfinite().all()):
        return g, error
    # a column so far below the others that its scale is no number of this type: in logarithms then
    g = torch.zeros_like(g)
    for _ in range(iterations):
        columns = (s + g).log_softmax(-1).logsumexp(-2, keepdim=True)
        error = float((columns.exp() - 1).abs().max())
        if error < tolerance:
            break
        g = g - columns
    return g, _error(s, g)


def _error(s: Tensor, g: Tensor) -> float:
    return float(((s + g).softmax(-1).sum(-2) - 1).abs().max())


def _newton(s: Tensor, g: Tensor) -> Tensor:
    """The Newton step (…, 1, N) on g towards column sums of 1, with g and the step's matrix held fixed.

    With P = softmax(s + g) over keys, rows are exact, the condition is the gradient of a convex function of g, and its matrix
    diag(column sums) - P^T P. A constant on g changes nothing; the matrix of ones keeps the step free of it.
    """
    p = (s + g).softmax(-1)
    columns, fixed = p.sum(-2), p.detach()
    count = p.shape[-1]
    one = torch.eye(count, dtype=p.dtype, device=p.device)
    # where P is nearly a permutation the system is nearly singular; the ridge leaves such directions alone
    matrix = (columns.detach() + 10 * torch.finfo(p.dtype).eps).unsqueeze(-1) * one + 1 / count - fixed.mT @ fixed
    return -torch.linalg.solve(matrix, (columns - 1).unsqueeze(-1)).mT
