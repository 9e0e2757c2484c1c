"""Sections of a comparison: what was recorded of several runs, and how far it lies from the first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import pandas as pd

from emformer.comparison import LEVEL, PLACE, remarks
from emformer.listing import definition, place_of, plainest, short
from emformer.observables.frame import Key
from emformer.report.section import Section
from emformer.report.sources import Source
from emformer.report.text import escaped, isolated

MOST = 3_000  # differences that are drawn; all are in the CSV of emformer compare


def sections(found: pd.DataFrame, known: Mapping[str, Key], ids: Mapping[str, str]) -> Iterator[Section]:
    """The sections of a frame of `emformer.comparison.compare`, whose runs have the names that are shown."""
    yield _forest(found, known)
    yield _table(found, known, ids)


def short_names(runs: Sequence[str]) -> list[str]:
    """The last part of each path; where two would be the same, the whole."""
    last = [PurePath(run).name for run in runs]
    return [name if last.count(name) == 1 else run for name, run in zip(last, runs, strict=True)]


def side_by_side(sources: Sequence[Source]) -> str:
    """The facts of each run in a table, those in which they differ in bold; as HTML."""
    names = list(dict.fromkeys(name for source in sources for name, _ in source.facts))
    facts = [dict(source.facts) for source in sources]
    head = "".join(f"<th scope=col>{isolated(name)}</th>" for name in short_names([source.name for source in sources]))
    lines = []
    for name in names:
        values = [fact.get(name, "–") for fact in facts]
        differs = " class=differs" if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{isolated(value)}</td>" for value in values)
        lines.append(f"<tr{differs}><th scope=row>{escaped(name)}</th>{cells}</tr>")
    return f"<div class=wide><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _forest(found: pd.DataFrame, known: Mapping[str, Key]) -> Section:
    runs = list(found["run"].unique())
    drawn = found[found["difference"].notna()]
    rows = drawn.head(MOST)
    stand = {str(key): _plain(own) for key, own in rows.groupby("key", sort=False)}
    told = [
        {
            "key": str(row["key"]),
            "at": place_of(row),
            "run": runs.index(row["run"]) - 1,
            "difference": row["difference"],
            "low": row["low"],
            "high": row["high"],
            "q": row["q"],
            "mean": row["mean"],
            "stands": place_of(stand[str(row["key"])]) == place_of(row),
        }
        for row in rows.to_dict("records")
    ]
    said = " ".join(f"{escaped(one)}." for one in remarks(found))
    left = f" {len(drawn) - len(rows):,} more are not drawn; emformer compare --csv writes all." if len(drawn) > len(rows) else ""
    caption = (
        f"Differences to {isolated(runs[0])} with 95 % intervals: all keys in units of the half width of their interval, so that "
        "beyond ±1 an interval leaves 0 out; or one key, place by place, in its own unit. Full points differ at a false "
        f"discovery rate of 5 %, open ones do not, crosses have no interval. {said}{left} "
        '<span class="meaning"></span>'
    )
    definitions = {key: definition(key, known) for key in stand}
    return Section(
        "forest",
        "Differences",
        caption,
        {"rows": told, "runs": runs[1:], "base": runs[0], "definitions": definitions, "what": "key", "p": "q"},
    )


def _plain(rows: pd.DataFrame) -> Mapping[Any, Any]:
    """The place that stands for a key: the plainest that has an interval, else the plainest."""
    tested = rows[rows["low"].notna()]
    return plainest((tested if len(tested) else rows).assign(step=0))


def _table(found: pd.DataFrame, known: Mapping[str, Key], ids: Mapping[str, str]) -> Section:
    runs = list(found["run"].unique())
    lines = []
    for key, own in found.groupby("key", sort=False):
        if own["difference"].isna().all():
            continue
        stand = _plain(own[own["difference"].notna()])
        same = own
        for name in PLACE[1:]:
            same = same[same[name].isna() if pd.isna(stand[name]) else (same[name] == stand[name]).fillna(False)]
        by_run = {row["run"]: row for row in same.to_dict("records")}
        link = f'<a href="#{ids[str(key)]}">'
        cells = f"<td class=number>{link}{_number(by_run.get(runs[0]), 'mean')}</a></td>"
        for run in runs[1:]:
            row = by_run.get(run)
            span = "" if row is None or math.isnan(row["low"]) else f"[{short(row['low'], 2)}, {short(row['high'], 2)}]"
            star = " class=differs" if row is not None and row["q"] <= LEVEL else ""
            cells += (
                f"<td class=number>{link}{_number(row, 'mean')}</a></td><td "
                f"class=number>{link}{_number(row, 'difference')}</a></td><td{star}>{escaped(span)}</td>"
            )
        lines.append(f"<tr><th scope=row>{isolated(key)}</th><td>{escaped(place_of(stand))}</td>{cells}</tr>")
    head = "".join(
        f"<th scope=col>{isolated(name)}</th><th scope=col>difference</th><th scope=col>95 %</th>" for name in runs[1:]
    )
    before = (
        "<p>Of each key the plainest place that was recorded of the runs. An interval in bold: it differs at a false discovery "
        "rate of 5 %. Every number leads to its definition.</p><div class=wide><table><thead><tr><th scope=col>key</th><th "
        f"scope=col>at</th><th scope=col>{isolated(runs[0])}</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    return Section("numbers", "Side by side", before=before, plots=())


def _number(row: Mapping[Any, Any] | None, name: str) -> str:
    if row is None or math.isnan(row[name]):
        return ""
    return escaped(short(row[name]) if name == "mean" else f"{row[name]:+.3g}")
