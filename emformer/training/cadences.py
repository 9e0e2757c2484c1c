"""When to record: cadences over optimiser steps. All of them record the last step too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emformer import parts
from emformer.parts import UserError


@dataclass(frozen=True)
class Every(parts.Cadence):
    """Steps 0, n, 2n … and the last.

    Args:
        steps: n.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"Every: steps is {self.steps}; choose at least 1.")

    @classmethod
    def examples(cls) -> Sequence[Every]:
        return [cls(10)]

    def due(self, step: int, max_steps: int) -> bool:
        return step % self.steps == 0 or step == max_steps


@dataclass(frozen=True)
class LogSpaced(parts.Cadence):
    """Step 0 and `count - 1` more that grow by a constant factor from `first` to the last: most of what happens, happens early.

    Of steps that round to the same number one remains. The steps depend on max_steps: a run that is continued to a larger
    max_steps records by the new spacing from where it is.

    Args:
        count: of records, step 0 and the last included; 1 is the last alone.
        first: the first step after 0.
    """

    count: int = 8
    first: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or self.first < 1:
            raise UserError(f"LogSpaced: count is {self.count} and first {self.first}; choose at least 1.")

    def due(self, step: int, max_steps: int) -> bool:
        return step in self.steps(max_steps)

    def steps(self, max_steps: int) -> list[int]:
        """All steps at which something is recorded, ascending."""
        if self.count == 1:
            return [max_steps]
        first, gaps = min(self.first, max_steps), max(1, self.count - 2)
        grown = (
            [round(first * (max_steps / first) ** (k / gaps)) for k in range(self.count - 1)] if self.count > 2 else [max_steps]
        )
        return sorted({0, *grown, max_steps})


@dataclass(frozen=True)
class AtEnd(parts.Cadence):
    """The last step alone."""

    def due(self, step: int, max_steps: int) -> bool:
        return step == max_steps
