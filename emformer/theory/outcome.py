"""What an experiment finds: statements that held or did not, charts, and the trajectories themselves.

A chart is data and what its axes are called; `emformer.figures.charts` draws it for paper, `emformer.report.charts` for a page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import pandas as pd

from emformer.trajectory import Trajectory

How = Literal["equals", "at most", "at least", "measured"]


class Statement(NamedTuple):
    """One claim, and the number that was measured for it.

    `measured` should be `how` `predicted`: "equals", within `tolerance` (absolute); "at most" or "at least", with `tolerance` to
    spare; "measured" claims nothing, and tells a number. `n`: how many simulations (or draws, steps …) it is from. `error`: its
    standard error, nan where there is none. `source`: paper and section.
    """

    claim: str
    source: str
    how: How
    predicted: float
    measured: float
    tolerance: float = 0.0
    n: int = 1
    error: float = math.nan

    @property
    def held(self) -> bool | None:
        """Whether the claim held; None where nothing is claimed, or the number is undefined."""
        if self.how == "measured" or math.isnan(self.measured):
            return None
        miss = self.measured - self.predicted
        return {"equals": abs(miss), "at most": miss, "at least": -miss}[self.how] <= self.tolerance


@dataclass(frozen=True, eq=False)
class Curves:
    """Lines y over x: a frame of columns panel, line, x, y and, where known, low and high (a band, of 95 % unless the caption
    says otherwise). `panel` and `line` are words; a line whose name begins with "theory" is drawn dashed."""

    frame: pd.DataFrame
    caption: str
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, eq=False)
class Heat:
    """Values on a grid: a frame of columns panel, x, y, value. `limits` of the colours, or None for those of the values. A cell
    without a row, or with nan, is undefined, which is drawn grey and counted."""

    frame: pd.DataFrame
    caption: str
    x: str
    y: str
    value: str
    limits: tuple[float, float] | None = None
    log_y: bool = False
    log_x: bool = False


@dataclass(frozen=True, eq=False)
class Paths:
    """Points that move: a frame of columns panel, path, time, x, y, z (z nan throughout where the space is a plane), of each path
    in the order of time. `surface`: what is drawn around them: a unit "sphere", "circle" (in a plane), the "cone"
    z = sqrt(x^2 + y^2), or None."""

    frame: pd.DataFrame
    caption: str
    axes: tuple[str, str, str]
    surface: Literal["sphere", "circle", "cone"] | None = None


Chart = Curves | Heat | Paths


@dataclass(frozen=True, eq=False)
class Outcome:
    """All that an experiment found. `trajectories` are those that observables are to look at, by a name that says what they are;
    `note`: what a reader must know, in plain sentences."""

    statements: Sequence[Statement]
    charts: Mapping[str, Chart] = field(default_factory=dict)
    trajectories: Mapping[str, Trajectory] = field(default_factory=dict)
    note: str = ""
