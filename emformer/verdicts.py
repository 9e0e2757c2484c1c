"""What a study of trained models ends in: a claim, the number that was measured for it with its interval, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from emformer.intervals import FEWEST, Interval
from emformer.theory.outcome import Chart

Word = Literal["supported", "refuted", "undecided", "holds", "broken"]


class Verdict(NamedTuple):
    """One claim about models, and what was measured for it.

    The claim is that `quantity` lies in [`least`, `most`]. Where its 95 % interval lies in that range the claim is supported,
    where the two are disjoint it is refuted, and else undecided; so it is when there are too few units for an interval, or none,
    and when nothing at all sets the quantity apart from its null: an interval of one point at a null that bounds the range.
    `null`: what chance, or the control that `against` names, gives for the same quantity, nan where there is none.
    `source`: where the claim is made, as "S2 9.1". `why`: what else decides, as a control that failed; or "". `check`: what is so
    by algebra or by construction, an identity or a test of the instrument: it holds or is broken, and is no claim about models.
    """

    claim: str
    source: str
    quantity: str
    measured: Interval
    least: float = -math.inf
    most: float = math.inf
    null: float = math.nan
    against: str = ""
    why: str = ""
    check: bool = False

    @property
    def word(self) -> Word:
        low, high = self.measured.low, self.measured.high
        if not self.measured.enough or self._same:
            return "undecided"
        if self.least <= low and high <= self.most:
            return "holds" if self.check else "supported"
        if high < self.least or low > self.most:
            return "broken" if self.check else "refuted"
        return "undecided"

    @property
    def _same(self) -> bool:
        """Whether every unit lies exactly at the null, and the claim is about which side of it they lie on."""
        return self.measured.low == self.measured.high == self.null and self.null in (self.least, self.most)

    @property
    def reason(self) -> str:
        """Why there is no verdict, or what else is to be known."""
        one = self.measured
        if math.isnan(one.value):
            return self.why or "undefined on these models and this text"
        if one.n < FEWEST:
            return f"too few {one.of}: {one.n}, and an interval at 95 % takes {FEWEST}" + (f"; {self.why}" if self.why else "")
        return "; ".join(filter(None, ("no difference at all" if self._same else "", self.why)))


@dataclass(frozen=True, eq=False)
class Findings:
    """All that a study found: verdicts, the first of which is what it is about; charts; `note`: what a reader must know, in plain
    sentences, a paragraph a line."""

    verdicts: Sequence[Verdict]
    charts: Mapping[str, Chart] = field(default_factory=dict)
    note: str = ""
