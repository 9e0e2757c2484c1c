"""Penalties on M and F themselves, whatever parameterises them: proximal steps after every step of the optimiser.

Weight decay means something else for every parameterisation: on a d x d matrix it shrinks all singular values alike, on factors
it acts as the nuclear norm and lowers the rank (math I). A penalty here is a function of W alone, and so comparable. It is
decoupled: no gradient, no state, nothing of the optimiser's, hence the same after a resume. Its amount is a function of the
step, weight times the schedule's factor, and is not multiplied by the learning rate.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from emformer import parts
from emformer.block import Block
from emformer.geometry.spectra import wide
from emformer.model import Emformer
from emformer.operators import Operator
from emformer.operators.base import Bound
from emformer.parts import UserError

Which = Literal["form", "content", "both"]


@dataclass(frozen=True)
class _Shrinkage(parts.Penalty):
    """What both penalties do alike.

    For every W that is free (Dense, LowRank) or constrained to a cone or a space that the step does not leave (Symmetric without
    rank, Skew, Split, PSD): the step is then that of the constrained problem, too. Others are refused. In W = L R^T the left
    factor alone changes: R may be shared by heads, and a direction that is lost can still be learned again. (PSD has one factor
    only; a direction in which it is 0 has no gradient and stays lost.) A content tied to its form shrinks with it.
    """

    weight: float
    which: Which = "both"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"{type(self).__name__}: weight is {self.weight}; choose a number from 0 up.")

    @torch.no_grad()
    def shrink(self, model: nn.Module, factor: float) -> None:
        amount = self.weight * factor
        for place, operator in _operators(model, self):
            if amount:
                rows = operator.left_rows()
                try:
                    left = self._step(operator, amount)
                except torch.linalg.LinAlgError as error:
                    raise UserError(
                        f"{type(self).__name__}: {place} has no singular values, because its weights are not finite: training "
                        "stopped, and the last checkpoint is good; try a smaller learning rate."
                    ) from error
                # where a device has no float64 this is its own type
                operator.assign(left if left.device == rows.device else left.to(rows.dtype).to(rows.device))

    @abstractmethod
    def _step(self, operator: Operator, amount: float) -> Tensor:
        """The rows (H, r, d) of the new L_h^T, in float64."""


@dataclass(frozen=True)
class Nuclear(_Shrinkage):
    """The proximal step of weight |W_h|_*: every singular value falls by `weight` and stops at 0. Source: math I.

    The rank falls, singular vectors stay. Exact for the penalty by itself; with the step before it, proximal gradient descent.
    Cost a step: an SVD for each head of d x d operators (d^3; on one core 3 ms at d = 128, 15 ms at d = 256), of r x r for
    factors (d r^2; 0.3 ms at r = 32, d = 128).

    Args:
        weight: what a singular value loses per step at the full learning rate. A form starts with singular values of about
            2/sqrt(d) (Dense) or 1/sqrt(r) (LowRank): 1e-5 to 1e-3 is the range to look in.
        which: "form", "content" or "both".
    """

    @classmethod
    def examples(cls) -> Sequence[Nuclear]:
        return [cls(weight=0.01), cls(weight=0.02, which="form"), cls(weight=0.02, which="content")]

    def _step(self, operator: Operator, amount: float) -> Tensor:
        return thresholded(operator.left_rows(), _right(operator), amount)


@dataclass(frozen=True)
class Frobenius(_Shrinkage):
    """The proximal step of weight |W_h|_F^2/2: W <- W/(1 + weight). Source: math I.

    What weight decay is for a d x d matrix, here for M and F of every parameterisation: no singular value falls faster than
    another. Cost a step: d r a head.

    Args:
        weight: share of W that is lost per step at the full learning rate (for small weights).
        which: "form", "content" or "both".
    """

    @classmethod
    def examples(cls) -> Sequence[Frobenius]:
        return [cls(weight=0.01), cls(weight=0.02, which="form"), cls(weight=0.02, which="content")]

    def _step(self, operator: Operator, amount: float) -> Tensor:
        return wide(operator.left_rows()) / (1 + amount)


def thresholded(left: Tensor, right: Tensor | None, amount: float) -> Tensor:
    """The rows (H, r, d) of L'^T with L' R^T = U (S - amount)_+ V^T, where L R^T = U S V^T; right None: R = I. In float64.

    L' = U G U^T L with G = (S - amount)_+/S: nothing is inverted, R may have any rank. With L = Q T and R = Q_R T_R only
    T T_R^T (r x r) is decomposed. What of L does not reach W (where R has no full rank) is dropped.
    """
    rows = wide(left)
    if right is None:
        u, s, vh = torch.linalg.svd(rows)  # rows are W^T
        return (u * (s - amount).clamp(min=0).unsqueeze(-2)) @ vh
    q, t = torch.linalg.qr(rows.mT)
    core = t @ torch.linalg.qr(wide(right).mT, mode="r").R.mT
    a, s, _ = torch.linalg.svd(core)
    gain = torch.where(s > amount, (s - amount) / s, 0)  # 0/0 is taken nowhere
    return ((q @ (a * gain.unsqueeze(-2))) @ (a.mT @ t)).mT


def _right(operator: Operator) -> Tensor | None:
    rows = operator.right_rows()
    return None if rows is None else rows.repeat_interleave(operator.heads // operator.groups, 0)


def _operators(model: nn.Module, penalty: _Shrinkage) -> Iterator[tuple[str, Operator]]:
    """What the penalty acts on, each operator once, and what to call it. Raises `UserError` for one that it cannot act on."""
    name = type(penalty).__name__
    if not isinstance(model, Emformer):
        raise UserError(f"{name}: a {type(model).__name__} has no forms and contents; penalties are for an Emformer.")
    for layer, block in enumerate(model.blocks):  # blocks that all layers share are there once
        attention, settings = cast(Block, block).attention, model.settings.layer(layer)
        for role, operator, setting in (
            ("form", attention.form, settings.form),
            ("content", attention.content, settings.content),
        ):
            if penalty.which not in (role, "both"):
                continue
            if isinstance(operator, Bound):
                if penalty.which == "both":  # it shrinks with its form, once
                    continue
                raise UserError(
                    f"{name}: the content of layer {layer}, {setting}, is bound to its form and cannot shrink by itself; "
                    "choose which: form, or which: both."
                )
            if not operator.assignable:
                raise UserError(
                    f"{name}: the {role} of layer {layer}, {setting}, cannot take the step and stay what it is; "
                    "penalties are for Dense, LowRank, Symmetric without rank, Skew, Split and PSD."
                )
            yield f"the {role} of layer {layer}", operator
