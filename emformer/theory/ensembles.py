"""Several starts at once, each under a form M of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from emformer.positions import PositionMap
from emformer.theory.marching import march
from emformer.theory.particles import STEP, Real, Tell, idealised, simulate
from emformer.trajectory import Trajectory
from emformer.types import Cloud, Index, KeyIndex, Keys, Queries


def ensemble(
    forms: Float[Tensor, "forms d d"],
    x: Cloud,
    times: Sequence[Real],
    *,
    step: Real = STEP,
    tolerance: float | None = None,
    tell: Tell | None = None,
    **parts: Any,
) -> list[Trajectory]:
    """`simulate` of cloud b under the form M_b, all in one tensor, which costs little more than one of them while N is small.

    Each trajectory is of one prompt, and its model is `idealised` with its form: nothing remembers that others ran beside it.

    Args:
        forms: of one head, score = q^T M_b t. x: (B, N, d).
        times, step, tell: as of `simulate`. tolerance: as of `march`, which then chooses the steps after the first.
        parts: of `idealised`, all but its form.

    Raises:
        ValueError: for another number of forms than of clouds. ValueError, ArithmeticError: as `simulate` or `march`.
    """
    dim = x.shape[-1]
    if len(forms) != len(x):
        raise ValueError(f"each cloud has a form of its own, but there are {len(forms)} forms for {len(x)} clouds")
    together = idealised(dim, dtype=x.dtype, **parts)
    together.layer(0).attention.positions.append(_Forms(forms))
    if tolerance is None:
        whole = simulate(together, x, times, step=step, tell=tell)
    else:
        whole = march(together, x, times, step=step, tolerance=tolerance, tell=tell).trajectory
    found = []
    for b, form in enumerate(forms):
        mine = slice(b, b + 1)
        steps = [
            one._replace(**{name: value[mine] for name, value in one._asdict().items() if isinstance(value, Tensor)})
            for one in whole.steps
        ]
        last = whole.states[-1].read
        closing = None if last is None else last[mine]
        model = idealised(dim, form, dtype=x.dtype, **parts)
        found.append(Trajectory(steps, model=model, closing=closing, epsilon=whole.epsilon))
    return found


class _Forms(PositionMap):
    """u <- M_b^T u for prompt b: of a model whose own form is I, the score u . v is then that of M_b."""

    acts_on_keys = False
    reads_factors = True

    def __init__(self, forms: Tensor):
        super().__init__()
        self.forms: Tensor
        self.register_buffer("forms", forms.unsqueeze(1))

    def forward(self, u: Queries, v: Keys, i: Index, j: KeyIndex) -> tuple[Queries, Keys]:
        return u @ self.forms, v
