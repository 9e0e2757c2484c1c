"""The content as the form in another metric: F = P M with P symmetric positive definite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.operators.base import Bound, Operator, Sizes
from emformer.operators.tied import form_of
from emformer.types import Cloud, HeadClouds, Matrices, Mixture, Queries, Rows


@dataclass(frozen=True)
class Preconditioned(Sizes, parts.Operator):
    """F_h = P M_h with one P for all heads, P = exp((B + B^T)/2) symmetric positive definite. Source: math A.1, E.3.

    In the metric P^{-1} of E this is the tied case: with M symmetric, no softmax and a full mask, a gradient. A common P is
    what several heads need for that. Starts as a multiple of the identity. A content only; d(d+1)/2 free numbers a layer.
    """

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> PreconditionedOperator:
        form = form_of(self, role, form)
        with torch.no_grad():
            start = (self.norm(role, dim, heads) / form.matrix().norm(dim=(-2, -1)).mean()).log()
        return PreconditionedOperator(form, start * torch.eye(dim)[None], {"log": 1 / self.update_std})


class PreconditionedOperator(Bound):
    """`log` (1, d, d) is B."""

    claims = ("metric",)
    generators = ("log",)

    def __init__(self, form: Operator, log: Tensor, rates: dict[str, float]):
        super().__init__(form, rates)
        self.setup_macs += 6 * form.dim**3
        self.setup_back += 48 * form.dim**3  # an exponential of twice the size
        self.log = nn.Parameter(log)

    @property
    def macs(self) -> int:
        return self.form.macs + self.dim**2

    def metric(self) -> Tensor:
        """P (d, d)."""
        return torch.linalg.matrix_exp((self.log + self.log.mT) / 2)[0]

    def left_rows(self) -> Rows:
        return self.form.left_rows() @ self.metric()

    def left(self, x: Cloud) -> Queries:
        return self.form.left(x @ self.metric())

    def lift_heads(self, z: Mixture) -> HeadClouds:
        return self.form.lift_heads(z) @ self.metric()

    def lift(self, z: Mixture) -> Cloud:
        return self.form.lift(z) @ self.metric()

    def matrix(self) -> Matrices:
        return self.metric() @ self.form.matrix()
