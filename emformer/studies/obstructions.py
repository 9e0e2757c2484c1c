"""The obstructions experiment (math K), beyond what every ablation study says: how much of omega each factor explains, and the
standard transformer stopped where it is no better than the gradient flow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from emformer.parts import UserError
from emformer.recordings import read_records
from emformer.records import Run

FLOOR = 1e-6  # an omega below it is 0, by the control that G0 has to pass


def anova(
    table: pd.DataFrame,
    factors: Sequence[str],
    outcome: str = "omega",
    around: Mapping[str, str] | None = None,
    floor: float = FLOOR,
) -> pd.DataFrame:
    """Analysis of variance of logit(omega) over the cells of a study: an effect of each level, and one of each seed, added up.

    Each factor against the model without it (type III sums of squares): F = (SS/df)/(R/df_R), R the squares that all of them
    leave, and partial eta^2 = SS/(SS + R). Cells of one seed share their batches, so the seed is a block and not noise.

    The design of the study has no combination of two flips but the corners, so what two factors do together is in R or nowhere:
    near G0, where omega is 0, one flip is worth ten logits; near T0 hardly one. Over both corners the sum is a poor model and R
    is large; ask for each `around` its corner. Where omega is below the floor in all cells of a level there is no noise there,
    and F is larger than its law allows: read eta^2 before p.

    Args:
        table: as `table.csv` of a study: cell, the factors, seed, outcome, value. Rows without a value are left out.
        factors: columns of it.
        outcome: which rows; numbers in [0, 1].
        around: {factor: level} of a corner: of the cells that differ from it in at most one factor.
        floor: values are kept in [floor, 1 - floor], where the logit is finite.

    Returns:
        One row a factor, "seed", and "residual": source, df, ss, f, p, eta2. nan where nothing is left to divide by.

    Raises:
        UserError: for no cells, a factor that the table has not or that has one level here, values that are no share, and cells
            that do not tell the effects apart.
    """
    rows = _cells(table, factors, outcome, around)
    values = rows["value"].to_numpy(float)
    if ((values < 0) | (values > 1)).any():
        raise UserError(f"'{outcome}' has values outside [0, 1], which have no logit; choose a share such as omega.")
    y = np.log(values.clip(floor, 1 - floor)) - np.log1p(-values.clip(floor, 1 - floor))
    blocks = {name: _dummies(rows[name]) for name in factors}
    if rows["seed"].nunique() > 1:
        blocks["seed"] = _dummies(rows["seed"])
    left, rank = _residual(y, blocks)
    if rank < 1 + sum(block.shape[1] for block in blocks.values()):
        raise UserError(f"these {len(rows)} cells do not tell the effects of {', '.join(factors)} apart; run more of the design.")
    freedom = len(y) - rank
    scale = left / freedom if freedom > 0 and left > 1e-12 * float(np.square(y - y.mean()).sum()) else math.nan
    found: list[dict[str, object]] = []
    for name, block in blocks.items():
        without = {other: one for other, one in blocks.items() if other != name}
        ss, df = max(0.0, _residual(y, without)[0] - left), block.shape[1]
        f = ss / df / scale
        p = float(stats.f.sf(f, df, freedom)) if math.isfinite(f) else math.nan
        eta = ss / (ss + left) if ss + left > 0 else math.nan
        found.append({"source": name, "df": df, "ss": ss, "f": f, "p": p, "eta2": eta})
    found.append({"source": "residual", "df": freedom, "ss": left, "f": math.nan, "p": math.nan, "eta2": math.nan})
    return pd.DataFrame(found)


class Stopped(NamedTuple):
    """A run at the step at which its loss is nearest to another's: nan and step -1 where it has none."""

    step: int
    loss: float
    value: float


def stopped(target: float, losses: Mapping[int, float], values: Mapping[int, float]) -> Stopped:
    """Of the steps with a value, the one whose loss is nearest to `target`; of two that are as near, the earlier.

    A loss between two validations is on the line between them; before the first and after the last there is none.

    Args:
        target: the loss to meet.
        losses: {step: validation loss}.
        values: {step: value}; those that are not finite are left out.
    """
    nothing = Stopped(-1, math.nan, math.nan)
    known = sorted(step for step, loss in losses.items() if math.isfinite(loss))
    if not known or not math.isfinite(target):
        return nothing
    steps = [step for step, value in sorted(values.items()) if math.isfinite(value) and known[0] <= step <= known[-1]]
    if not steps:
        return nothing
    found = np.interp(steps, known, [losses[step] for step in known])
    best = int(np.abs(found - target).argmin())
    return Stopped(steps[best], float(found[best]), float(values[steps[best]]))


def matched(runs: Mapping[int, tuple[Run, Run]], keys: Sequence[str] = ("wgf.omega", "wgf.r2")) -> pd.DataFrame:
    """T0 stopped early at the loss that G0 ends with, seed by seed: what a gradient flow would have had to be compared with.

    A T0 that is no better than G0 at its task and no less a gradient has not paid for its loss with its gradient; one that starts
    out far from a gradient has it from its design. Means over layers and prompts, as the study's outcomes.

    Args:
        runs: {seed: (G0, T0)}, run folders with `val_loss` and records of these keys at several steps.
        keys: of records.

    Returns:
        One row a seed and key: seed, key, target (loss of G0), step and loss of T0 there, value, and last, its value at its end.
    """
    found: list[dict[str, object]] = []
    for seed, (ideal, real) in runs.items():
        ends = ideal.curve("val_loss")
        target = ends[max(ends)] if ends else math.nan
        records, losses = read_records(real.path), real.curve("val_loss")
        for key in keys:
            rows = records[(records["key"] == key) & records["head"].isna() & records["param"].isna()]
            values = {int(step): float(some["mean"].mean()) for step, some in rows.groupby("step") if some["mean"].notna().any()}
            one = stopped(target, losses, values)
            last = values[max(values)] if values else math.nan
            found.append({"seed": seed, "key": key, "target": target, **one._asdict(), "last": last})
    return pd.DataFrame(found, columns=["seed", "key", "target", "step", "loss", "value", "last"])


def _cells(table: pd.DataFrame, factors: Sequence[str], outcome: str, around: Mapping[str, str] | None) -> pd.DataFrame:
    lacking = [name for name in (*factors, *(around or ())) if name not in table.columns]
    if lacking:
        raise UserError(f"the table has no factor '{lacking[0]}'; its columns are {', '.join(table.columns)}.")
    rows = table[(table["outcome"] == outcome) & table["value"].notna()]
    if around is not None:
        rows = rows[sum((rows[name] != level).astype(int) for name, level in around.items()) <= 1]
    if not len(rows):
        raise UserError(f"the table has no value of '{outcome}' here; run the study, or choose another outcome.")
    single = [name for name in factors if rows[name].nunique() < 2]
    if single:
        raise UserError(f"'{single[0]}' has one level in these cells, and nothing to compare; leave it out.")
    return rows


def _dummies(column: pd.Series) -> np.ndarray:
    """(n, levels - 1): 1 at the rows of a level, the first left out."""
    levels = list(dict.fromkeys(column))
    return np.stack([(column == level).to_numpy(float) for level in levels[1:]], 1)


def _residual(y: np.ndarray, blocks: Mapping[str, np.ndarray]) -> tuple[float, int]:
    """(sum of squares that these effects leave of y, their rank with the constant)."""
    x = np.concatenate([np.ones((len(y), 1)), *blocks.values()], 1)
    solved, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    return float(np.square(y - x @ solved).sum()), int(rank)
