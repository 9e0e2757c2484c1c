"""Contents tied to the form: the cases in which attention can be a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.operators.base import Bound, Operator, Sizes, constant, per_head
from emformer.parts import UserError
from emformer.types import Cloud, HeadClouds, Matrices, Mixture, Queries, Rows


@dataclass(frozen=True)
class Tied(Sizes, parts.Operator):
    """F = c M: what a token takes from others is what made them relevant. Source: math A.1, E.3. A content only.

    With M symmetric, no softmax and a full mask, attention is then the gradient of an energy.

    Args:
        scale: c at the start; null for the size that every content starts with.
        learned: learn one c a head.
    """

    scale: float | None = None
    learned: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and not abs(self.scale) <= 1e6:
            raise UserError(f"Tied: scale is {self.scale}; choose a number of modest size.")

    @classmethod
    def examples(cls) -> Sequence[Tied]:
        return [cls(), cls(scale=0.5, learned=False)]

    def build(self, role: parts.Role, dim: int, heads: int, form: nn.Module | None = None) -> TiedOperator:
        form = form_of(self, role, form)
        target = self.norm(role, dim, heads)
        with torch.no_grad():
            start = target / form.matrix().norm(dim=(-2, -1)) if self.scale is None else torch.full((heads,), self.scale)
        return TiedOperator(form, start, self.learned, {"scale": target})


class TiedOperator(Bound):
    """`scale` (H,) is c: a parameter where it is learned, else a buffer."""

    claims = ("tied",)
    scale: Tensor

    def __init__(self, form: Operator, scale: Tensor, learned: bool, rates: dict[str, float]):
        super().__init__(form, rates if learned else {})
        constant(self, "scale", scale, learned)

    @property
    def macs(self) -> int:
        return self.form.macs

    def left_rows(self) -> Rows:
        return per_head(self.scale) * self.form.left_rows()

    def left(self, x: Cloud) -> Queries:
        return per_head(self.scale) * self.form.left(x)

    def lift_heads(self, z: Mixture) -> HeadClouds:
        return self.form.lift_heads(per_head(self.scale) * z)

    def lift(self, z: Mixture) -> Cloud:
        return self.form.lift(per_head(self.scale) * z)

    def matrix(self) -> Matrices:
        return per_head(self.scale) * self.form.matrix()


def form_of(setting: parts.Operator, role: parts.Role, form: nn.Module | None) -> Operator:
    """The form that a content is tied to. Raises `UserError` where there is none."""
    if role == "form" or not isinstance(form, Operator):
        raise UserError(
            f"{type(setting).__name__} ties a content to its form, so it cannot be the form itself; name it as content."
        )
    return form
