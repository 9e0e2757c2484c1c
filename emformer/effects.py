"""What the factors of an ablation study do: differences between cells of one seed, their tests, controls, and claims.

All is read off the tidy table of `emformer.studies.results`. Every difference is paired: cells of one seed start from the same
random numbers and see the same batches, so what a seed adds to both is taken away; and a seed is the unit of all that is said. It
counts where every cell of a comparison ended with a finite number. What is lacking is counted, and never filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from emformer.comparison import PLACE, false_discoveries
from emformer.intervals import FEWEST, LEVEL, bootstrap, bootstrap_each
from emformer.plans import Claim, Plan
from emformer.verdicts import Verdict

Levels = Mapping[str, str]
CONTRAST = ("contrast", "factor", "level", "baseline", "at")
PAIRED = ("n", "planned", "mean", "of_baseline", "difference", "low", "high", "g", "p")
EFFECTS = ("outcome", *CONTRAST, *PAIRED, "corrected", "enough", "word")
OBSERVABLES = (*PLACE, *CONTRAST, *PAIRED, "q", "enough", "word", "tests")
MOST = 10_000  # rows of what was recorded that are told: 3 MB
DIFFERS, NO_DIFFERENCE, IDENTICAL, TOO_FEW = "differs", "no difference found", "identical", "too few seeds"


class Contrast(NamedTuple):
    """Combinations of levels that are held against others: the mean over `cells` minus the mean over `base`, seed by seed.

    `factor`, `level`, `baseline`: what differs, several with commas. `at`: what else is to be known of where, or "".
    """

    factor: str
    level: str
    baseline: str
    at: str
    cells: Sequence[Levels]
    base: Sequence[Levels]

    @property
    def name(self) -> str:
        """As "position=none against rope (ffn=none)"."""
        pairs = zip(self.factor.split(", "), self.level.split(", "), strict=True)
        where = f" ({self.at})" if self.at else ""
        return ", ".join(f"{factor}={level}" for factor, level in pairs) + f" against {self.baseline}" + where


def contrasts(plan: Plan) -> list[Contrast]:
    """Every comparison of a plan, in its order: each combination against each of its baselines; where the design is full and has
    two factors or more, also each level against its factor's first, both averaged over the levels of all other factors."""
    combinations = plan.combinations()
    found = [_contrast(plan, one, base) for one in combinations for base in plan.baselines(one)]
    if plan.design == "full" and len(plan.factors) > 1:
        for factor, levels in plan.factors.items():
            first, *others = levels
            rest = ", ".join(name for name in plan.factors if name != factor)
            of = {level: [one for one in combinations if one[factor] == level] for level in levels}
            found += [Contrast(factor, level, first, f"mean over {rest}", of[level], of[first]) for level in others]
    return found


def effects(table: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The difference that every contrast of a plan makes to every outcome.

    Over n seeds with differences d_1 … d_n, of mean m and standard deviation s:

        difference, low, high   m, and its 95 % interval by the bootstrap over seeds (`emformer.intervals`)
        g                       J(n-1) m/s with J(k) = Gamma(k/2)/(sqrt(k/2) Gamma((k-1)/2)), Hedges' g of pairs: without bias for
                                normal d, its null 0. In units of the spread of d, not of the outcome
        p                       of m = 0, two-sided: t = m sqrt(n)/s in Student's law of n - 1 degrees of freedom
        corrected               p corrected for all tests of this frame together that have seeds enough (Holm 1979): called
                                different at 5 %, in 95 % of studies no contrast is that does nothing, whatever the others do

    The test is Student's, and not of flipped signs, which assumes less: of 6 seeds the smallest p of that is 1/32, and no
    correction for two tests or more leaves it below 5 %. The interval is of one comparison alone and not corrected: of many,
    some leave out 0 where nothing differs. What may be said is `word`.

    In 1,000 simulated studies of six seeds, sixteen tests and one planted effect, 4 % called anything else different; the planted
    one was found in 85 %, where the level .05/16 of the non-central t gives 83 %, and its interval held it in 93.4 %.

    Args:
        table: of `emformer.studies.results.table`.

    Returns:
        `EFFECTS`, a row an outcome and contrast. n: seeds of which all cells ended with a finite number, of those `planned`;
        mean, of_baseline: of the outcome over these. enough: n >= 6. word: "differs" (enough, and corrected <= .05), "no
        difference found", "identical" (0 on every seed: nothing is tested), or "too few seeds", whatever the numbers say.
        Undefined is nan: p for n < 2 and of identical cells, corrected for n < 6, g for n < 3 and where d has no spread. Where d
        has no spread and is not 0, p is 0.
    """
    found, grid = contrasts(plan), _outcomes(table, plan)
    cells, base = grid.sides(found)
    columns = paired(cells, base)
    ends = np.array([(one.low, one.high) for one in bootstrap_each(cells - base)]).reshape(-1, 2)
    # of equal differences the draws differ by rounding, which is no interval
    columns["low"], columns["high"] = np.where(columns["sd"] == 0, columns["difference"], ends.T)
    columns["outcome"] = np.repeat(np.array(list(plan.outcomes), dtype=object), len(found))
    columns["corrected"] = holm(np.where(columns["n"] >= FEWEST, columns["p"], np.nan))
    return _frame(columns, "corrected", grid, found)[list(EFFECTS)]


def observables(records: pd.DataFrame, table: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The difference that every contrast makes to everything recorded: to look around, and no ground for a claim.

    Place by place and paired by seed, as in `effects`, but for two things. `low` and `high` are Student's interval, because there
    are thousands. `q` is p corrected for all `tests` of this kind together by their rate of false discoveries (Benjamini and
    Hochberg 1995): of all that is called different, 5 % are expected not to be. Cost: seconds for 50 cells of 5,000 places.

    Args:
        records: a row a cell and place: "cell", `PLACE`, "mean".
        table: which levels and which seed a cell is of.

    Returns:
        `OBSERVABLES`, a row a place and contrast, where both have a number; of more than `MOST` those of smallest p. `q` and
        `tests` are of all.
    """
    found = contrasts(plan)
    place = records.groupby(list(PLACE), sort=False, dropna=False).ngroup().to_numpy()
    first = np.unique(place, return_index=True)[1]
    grid = _Grid.of(table, plan, len(first), place, records["cell"], records["mean"].to_numpy(float))
    columns = paired(*grid.sides(found))
    n = columns["n"]
    half = special.stdtrit(np.maximum(n - 1, 1), 1 - LEVEL / 2) * columns["sd"] / np.sqrt(np.maximum(n, 1))
    columns |= {"low": columns["difference"] - half, "high": columns["difference"] + half}
    columns |= {"q": false_discoveries(columns["p"])}
    known = np.flatnonzero(n > 0)
    kept = np.sort(known[np.argsort(columns["p"][known], kind="stable")[:MOST]])  # nan comes last
    told = _frame(columns, "q", grid, found, kept).assign(tests=int(np.isfinite(columns["p"]).sum()))
    where = records[list(PLACE)].iloc[first[kept // max(1, len(found))]].reset_index(drop=True)
    return pd.concat([where, told], axis=1)[list(OBSERVABLES)]


def claims(table: pd.DataFrame, plan: Plan) -> list[Verdict]:
    """A verdict for each claim of a plan, with its interval over seeds: of the difference to the baseline, or to another outcome,
    whose null is 0; or of the outcome itself. Each stands for itself, and is not corrected for the others. Where no seed differs
    at all, a bound of 0 is neither kept nor broken."""
    grid = _outcomes(table, plan)
    found = []
    for name, one in plan.claims.items():
        levels = plan.whole(one.levels)
        base = plan.baselines(levels)[0] if one.difference else None
        values = _claimed(grid, plan, one, levels)
        if base is not None:
            values = values - _claimed(grid, plan, one, base)
        quantity = one.outcome if one.minus is None else f"{one.outcome} - {one.minus}"
        against = one.minus or ""
        if base is None:
            quantity += f" at {_named(plan, levels)}"
        else:
            contrast = _contrast(plan, levels, base)
            quantity, against = f"{quantity}: {contrast.name}", f"{contrast.factor}={contrast.baseline}"
        lost = grid.there[grid.row(levels)].sum() - np.isfinite(values).sum()
        found.append(
            Verdict(
                claim=name,
                source=one.source,
                quantity=quantity,
                measured=bootstrap(values, of="seeds"),
                least=-math.inf if one.least is None else one.least,
                most=math.inf if one.most is None else one.most,
                null=0.0 if against else math.nan,
                against=against,
                why=f"{lost} seeds lack a value" if lost else "",
            )
        )
    return found


def failures(table: pd.DataFrame, plan: Plan) -> list[str]:
    """The controls of a plan that do not hold, a clause each: the mean over seeds is out of range, a cell that ended has no
    value, or fewer ended than `FEWEST` (than were planned, where those are fewer). Cells that did not end are left out."""
    found = []
    for name, one in plan.controls.items():
        rows = table[table["outcome"] == one.outcome]
        for factor, level in plan.whole(one.levels).items():
            rows = rows[rows[factor] == level]
        least, most = (-math.inf if one.least is None else one.least), (math.inf if one.most is None else one.most)
        known = np.isfinite(rows["value"].astype(float))
        value, lost, n = float(rows.loc[known, "value"].mean()), rows.loc[~known, "cell"], int(known.sum())
        if (rows.loc[~known, "status"] == "finished").any() or n < max(1, min(FEWEST, len(rows))):
            which = f": {', '.join(lost[:3])}{' …' * (len(lost) > 3)}" if len(lost) else ""
            found.append(f"of '{name}' {len(lost)} of {len(rows)} cells have no {one.outcome}{which}")
        elif not least <= value <= most:
            found.append(f"'{name}': {one.outcome} is {value:.4g} over {n} cells, not in [{least:g}, {most:g}]")
    return found


def paired(cells: np.ndarray, base: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of paired numbers (n, k), column by column, each (k,): n, mean, of_baseline, difference, sd of the differences,
    g and p, as `effects` defines them. Pairs with a number that is not finite are left out."""
    with np.errstate(invalid="ignore", divide="ignore"):
        differences = cells - base
        known = np.isfinite(differences)
        n = known.sum(0)
        mean, of_baseline, m = (np.where(known, one, 0.0).sum(0) / n for one in (cells, base, differences))
        sd = np.sqrt((np.where(known, differences - m, 0.0) ** 2).sum(0) / np.maximum(n - 1, 0))
        low, high = (np.where(known, differences, inf) for inf in (np.inf, -np.inf))
        even = (low.min(0, initial=np.inf) == high.max(0, initial=-np.inf)) & (n > 1)
        # the mean of equal numbers is rounded, and their spread would be that of rounding
        m, sd = np.where(even, low.min(0, initial=np.inf), m), np.where(even, 0.0, sd)
        g = np.where((n > 2) & (sd > 0), _hedges(n - 1) * m / sd, np.nan)
        p = 2 * special.stdtr(np.maximum(n - 1, 1), -np.abs(m) * np.sqrt(n) / sd)
    return {"n": n, "mean": mean, "of_baseline": of_baseline, "difference": m, "sd": sd, "g": g, "p": p}


def holm(p: np.ndarray) -> np.ndarray:
    """p-values of m tests corrected so that at a level of 5 % any error at all has a probability of 5 %: (m - k) p_(k) for k = 0,
    1 … from the least p up, never falling, at most 1. What is nan is no test."""
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    found = np.full(len(p), np.nan)
    found[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return found


# ----------------------------------------------------------------------------------------------------------------------


class _Grid(NamedTuple):
    """Numbers of m outcomes, or m places, by combination and seed, nan where there is none; and where cells are `there`."""

    index: Mapping[tuple[str, ...], int]
    values: np.ndarray  # (m, C, S)
    there: np.ndarray  # (C, S)

    @classmethod
    def of(cls, table: pd.DataFrame, plan: Plan, m: int, rows: np.ndarray, cells: pd.Series, numbers: np.ndarray) -> _Grid:
        """`numbers` of the rows 0 … m - 1 and these cells, which `table` places."""
        known = table.drop_duplicates("cell")
        index = {tuple(one.values()): k for k, one in enumerate(plan.combinations())}
        seeds = {seed: k for k, seed in enumerate(sorted(known["seed"].unique()))}
        there = np.zeros((len(index), len(seeds)), dtype=bool)
        place = {}
        levels = map(tuple, known[list(plan.factors)].to_numpy(object))
        for cell, seed, key in zip(known["cell"], known["seed"], levels, strict=True):
            if key in index:
                there[index[key], seeds[seed]] = True
                place[cell] = index[key] * len(seeds) + seeds[seed]
        values = np.full((m, there.size), np.nan)
        at = cells.map(place).to_numpy(float)
        good = np.isfinite(at) & np.isfinite(numbers)
        values[rows[good], at[good].astype(int)] = numbers[good]
        return cls(index, values.reshape(m, *there.shape), there)

    def row(self, levels: Levels) -> int:
        return self.index[tuple(levels.values())]

    def of_outcome(self, plan: Plan, outcome: str, levels: Levels) -> np.ndarray:
        """(S,) of one outcome."""
        return self.values[list(plan.outcomes).index(outcome), self.row(levels)]

    def sides(self, found: Sequence[Contrast]) -> tuple[np.ndarray, np.ndarray]:
        """Cells and baselines of each contrast, (S, m K): first all contrasts of the first row."""
        shape = (len(self.values), len(found), self.there.shape[1])
        sides = np.empty((2, *shape))
        for k, one in enumerate(found):
            for side, some in enumerate((one.cells, one.base)):
                sides[side, :, k] = self.values[:, [self.index[tuple(levels.values())] for levels in some]].mean(1)
        cells, base = sides.reshape(2, -1, shape[-1])
        return cells.T, base.T

    def planned(self, one: Contrast) -> int:
        """Seeds of which every cell is in the study."""
        return int(self.there[[self.index[tuple(levels.values())] for levels in (*one.cells, *one.base)]].all(0).sum())


def _outcomes(table: pd.DataFrame, plan: Plan) -> _Grid:
    which = table["outcome"].map({name: k for k, name in enumerate(plan.outcomes)}).to_numpy(int)
    return _Grid.of(table, plan, len(plan.outcomes), which, table["cell"], table["value"].to_numpy(float))


def _claimed(grid: _Grid, plan: Plan, one: Claim, levels: Levels) -> np.ndarray:
    """(S,) of what a claim is of, in these cells."""
    values = grid.of_outcome(plan, one.outcome, levels)
    return values if one.minus is None else values - grid.of_outcome(plan, one.minus, levels)


def _frame(
    columns: Mapping[str, np.ndarray], corrected: str, grid: _Grid, found: Sequence[Contrast], rows: np.ndarray | None = None
) -> pd.DataFrame:
    """Statistics of rows m K with the contrasts that they are of, and what may be said of them."""
    kept = np.arange(len(columns["n"])) if rows is None else rows
    which = kept % max(1, len(found))
    told = {name: values[kept] for name, values in columns.items()}
    for name in CONTRAST:
        told[name] = np.array([one.name if name == "contrast" else getattr(one, name) for one in found], dtype=object)[which]
    told["planned"] = np.array([grid.planned(one) for one in found], dtype=int)[which]
    told["enough"] = told["n"] >= FEWEST
    differ = np.where(told[corrected] <= LEVEL, DIFFERS, NO_DIFFERENCE)
    same = (told["difference"] == 0) & (told["sd"] == 0)
    told["word"] = np.where(told["enough"], np.where(same, IDENTICAL, differ), TOO_FEW)
    return pd.DataFrame(told)


def _contrast(plan: Plan, cells: Levels, base: Levels) -> Contrast:
    """One combination against another, named by what differs, and by what both have that is no baseline."""
    changed = [name for name in cells if cells[name] != base[name]]
    first = plan.whole({})
    at = ", ".join(f"{name}={cells[name]}" for name in cells if name not in changed and cells[name] != first[name])
    words = (", ".join(changed), *(", ".join(one[name] for name in changed) for one in (cells, base)))
    return Contrast(*words, at, [cells], [base])


def _named(plan: Plan, levels: Levels) -> str:
    """A combination by what is not at the baseline."""
    first = plan.whole({})
    return ", ".join(f"{name}={level}" for name, level in levels.items() if level != first[name]) or "the baseline"


def _hedges(freedom: np.ndarray) -> np.ndarray:
    half = np.maximum(freedom, 1) / 2
    return np.exp(special.gammaln(half) - special.gammaln(np.maximum(half - 0.5, 0.5))) / np.sqrt(half)
