"""The page of an ablation study: what was varied, what that changed, and everything recorded, level by level.

write("ablations/position", plan, table, effects, verdicts, failed={})
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emformer.files import replaced
from emformer.intervals import FEWEST, LEVEL
from emformer.listing import short
from emformer.parts import UserError
from emformer.plans import Measure, Plan
from emformer.report.charts import verdict_section
from emformer.report.levels import curve_section, losses, observable_section, spelt
from emformer.report.page import page, require_plotly
from emformer.report.section import Section
from emformer.report.text import escaped, fact_list, isolated
from emformer.verdicts import Findings, Verdict

ROWS = 300  # of a table
STATUS = ("finished", "failed", "missing")
EFFECTS = (  # columns of the table of differences, and whether they are numbers
    ("finding", False),
    ("outcome", False),
    ("what is changed", False),
    ("baseline", True),
    ("with it", True),
    ("difference", True),
    ("95 % interval", True),
    ("g", True),
    ("p corrected", True),
    ("seeds", True),
)


def write(
    folder: str | Path,
    plan: Plan,
    table: pd.DataFrame,
    effects: pd.DataFrame,
    verdicts: Sequence[Verdict],
    failed: Mapping[str, str],
) -> Path:
    """Write report.html of a study, and return its path.

    One HTML file of at most 6 MB, 4.8 of them plotly; nothing in it is loaded from anywhere, and all text in it is shown as text.
    What stands on too few seeds is said on top. What is too much for a page is left out and counted. Atomic, and the same study
    gives the same bytes.

    Args:
        folder: of the study, where the run folders of its cells are.
        plan: of it.
        table: of table.csv, a row a cell and outcome. effects: of effects.csv; empty for a study without comparisons.
        verdicts: of its claims.
        failed: {cell: why} of those that did not end well.

    Raises:
        UserError: if the file cannot be written; and without plotly.
    """
    folder, path = Path(folder), Path(folder) / "report.html"
    require_plotly()
    sections = [*_forest(plan, effects), *_trials(plan, table)]
    if verdicts:
        sections.append(verdict_section(Findings(verdicts)))
    sections += curve_section(losses(folder, plan))
    sections += observable_section(folder, plan)
    sections += _differences(effects)
    sections += _failures(failed)
    told = page(plan.title, fact_list(_facts(plan, table)), _warnings(table, effects, failed), sections, {})
    try:
        with replaced(path) as partial:
            partial.write_text(told, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; an older page is as it was.") from error
    return path


# ----------------------------------------------------------------------------------------------------------------------


def _facts(plan: Plan, table: pd.DataFrame) -> Iterator[tuple[str, str]]:
    cells = table.drop_duplicates("cell")["status"].value_counts()
    yield "cells", f"{cells.sum()}: " + ", ".join(f"{cells[word]} {word}" for word in STATUS if word in cells)
    yield "seeds", str(plan.seeds)
    for name, levels in plan.factors.items():
        yield f"factor {name}", ", ".join(f"{level}{' (baseline)' * (not k)}" for k, level in enumerate(levels))
    for name, one in plan.search.items():
        kind = ", evenly in the logarithm" * one.log + ", whole numbers" * one.whole
        yield f"search {name}", f"{one.low:g} to {one.high:g}{kind}"
    if len(plan.factors) > 1:
        yield "design", plan.design
    for name, one in plan.outcomes.items():
        yield f"outcome {name}", _measure(one)
    for name, one in plan.controls.items():  # without which there is no page
        yield f"control {name}", f"{one.outcome} is in [{_bound(one.least, '-∞')}, {_bound(one.most, '∞')}]"
    yield "base", plan.base if isinstance(plan.base, str) else ", ".join(plan.base)
    if plan.settings:
        yield "settings on top", json.dumps(plan.settings, ensure_ascii=False)


def _bound(value: float | None, none: str) -> str:
    return none if value is None else short(value, 4)


def _measure(one: Measure) -> str:
    where = f" at {spelt(one.where)}" if one.where else ""
    return f"{one.metric or one.record}{where}, {one.at}"


def _warnings(table: pd.DataFrame, effects: pd.DataFrame, failed: Mapping[str, str]) -> Iterator[str]:
    """What a reader must know before anything else, in plain sentences."""
    seeds = effects["n"].to_numpy(int) if len(effects) else np.array([], dtype=int)
    if few := int((seeds < FEWEST).sum()):
        yield (
            f"Too few seeds: {few} of {len(effects)} differences rest on fewer than {FEWEST} (as few as {seeds.min()}), "
            "which support no claim at 95 %. What is said of them here is a number, and no finding."
        )
    missing = table.loc[table["status"] == "missing", "cell"].nunique()
    cells = table["cell"].nunique()
    if failed:
        yield f"{len(failed)} of {cells} cells failed, see below; what is compared with them rests on fewer seeds."
    if missing:
        yield f"{missing} of {cells} cells have not run."
    undefined = table[(table["status"] == "finished") & ~np.isfinite(table["value"])]
    if len(undefined):
        names = ", ".join(dict.fromkeys(undefined["outcome"].astype(str)))
        yield f"{len(undefined)} outcomes of finished cells are undefined ({names}); they are left out, and not counted in n."


def _forest(plan: Plan, effects: pd.DataFrame) -> Iterator[Section]:
    """Every difference, outcome by outcome as a forest."""
    if not len(effects):
        return
    shown = effects.head(ROWS)
    told = ", ".join(f"{escaped(word)} {count}" for word, count in effects["word"].value_counts().items())
    drawn = [
        {
            "key": str(row["outcome"]),
            "at": str(row["contrast"]),
            "run": 0,
            "difference": row["difference"],
            "low": row["low"],
            "high": row["high"],
            "q": row["corrected"],
            "sure": row["word"] == "differs",
            "mean": row["mean"],
            "stands": False,
        }
        for row in shown.to_dict("records")
        if math.isfinite(row["difference"])
    ]
    caption = (
        "Differences to the baseline, paired by seed, with 95 % intervals of each alone. Full points differ after correction, "
        'open ones do not or rest on too few seeds, crosses have no interval. <span class="meaning"></span>'
    )
    definitions = {name: _measure(one) for name, one in plan.outcomes.items()}
    data = {
        "rows": drawn,
        "runs": ["mean"],
        "base": "the baseline",
        "definitions": definitions,
        "what": "outcome",
        "p": "p corrected",
    }
    before = f"<p>{len(effects)} differences between cells of one seed: {told}.</p>"
    yield Section("effects", "What the factors change", caption, data if drawn else None, before=before, kind="forest")


def _differences(effects: pd.DataFrame) -> Iterator[Section]:
    """Every difference in a table."""
    if not len(effects):
        return
    shown = effects.head(ROWS)
    left = f" The table shows {len(shown)} of {len(effects)}; effects.csv has all." if len(shown) < len(effects) else ""
    told = (
        "<p>Mean and 95 % interval are over seeds; g is Hedges' effect size in standard deviations of the difference; p is "
        f"corrected for all differences in this table together, and what is below {LEVEL:g} differs.{left}</p>"
    )
    head = "".join(f"<th scope=col{' class=number' if number else ''}>{name}</th>" for name, number in EFFECTS)
    rows = "".join(_effect(row) for row in shown.to_dict("records"))
    body = f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    yield Section("differences", "All differences", before=told + body, plots=())


def _effect(row: Mapping[Any, Any]) -> str:
    """A row of the table of differences."""
    low, high = row["low"], row["high"]
    span = "–" if math.isnan(low) else f"[{short(low + 0.0, 3)}, {short(high + 0.0, 3)}]"
    seeds = f"{row['n']:.0f}" + (f" of {row['planned']:.0f}" if row["n"] != row["planned"] else "")
    p = "–" if math.isnan(row["corrected"]) else f"{row['corrected']:.2g}"
    numbers = [
        short(row["of_baseline"], 4),
        short(row["mean"], 4),
        short(row["difference"] + 0.0, 3),
        span,
        short(row["g"] + 0.0, 2),
        p,
    ]
    cells = "".join(f"<td class=number>{escaped(text)}</td>" for text in (*numbers, seeds))
    differs = " class=differs" if row["word"] == "differs" else ""
    return (
        f"<tr{differs}><td>{escaped(row['word'])}</td><td>{isolated(row['outcome'])}</td>"
        f"<th scope=row>{isolated(row['contrast'])}</th>{cells}</tr>"
    )


def _trials(plan: Plan, table: pd.DataFrame) -> Iterator[Section]:
    """The trials of a search with their means over seeds, the least of the first outcome first."""
    if not plan.search:
        return
    first, names = next(iter(plan.outcomes)), [*plan.search, *plan.outcomes]
    ended = table[table["status"] == "finished"]
    means = ended.pivot_table("value", list(plan.search), "outcome", sort=False).reset_index().reindex(columns=names)
    means = means.dropna(subset=[first]).sort_values(first, kind="stable")
    head = "".join(f"<th scope=col class=number>{isolated(name)}</th>" for name in names)
    rows = "".join(
        f"<tr>{''.join(f'<td class=number>{escaped(short(float(row[name]), 4))}</td>' for name in names)}</tr>"
        for row in means.head(ROWS).to_dict("records")
    )
    told = f"<p>{len(means)} trials that ended with {isolated(first)}, the least first; means over seeds.</p>"
    body = f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    yield Section("trials", "Trials", before=told + body, plots=())


def _failures(failed: Mapping[str, str]) -> Iterator[Section]:
    if failed:
        lines = "".join(
            f"<tr><th scope=row>{isolated(cell)}</th><td>{isolated(why or '–')}</td></tr>"
            for cell, why in list(failed.items())[:ROWS]
        )
        head = "<tr><th scope=col>cell</th><th scope=col>the last line of its log</th></tr>"
        body = f"<div class=wide><table><thead>{head}</thead><tbody>{lines}</tbody></table></div>"
        yield Section("failed", "Cells that failed", before=f"<p>The same command tries them again.</p>{body}", plots=())
