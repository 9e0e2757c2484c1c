"""The page of an experiment: what was claimed and found, and its charts to look into, in one file that needs no network.

    write(outcome, "simulations/sphere/simulation.html", title="Tokens on the sphere", facts={"beta": "4"})

Built of the sections, the style and the script of every other report.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emformer.figures.grids import limits
from emformer.figures.layout import seeded
from emformer.figures.panels import Grid, Line, Way, arced, grids, grouped, kept, lines, lost, pace, ranks, solid, ways
from emformer.files import replaced
from emformer.listing import claimed, interval, short, verdict
from emformer.parts import UserError
from emformer.report.packing import packed, spread
from emformer.report.page import page, require_plotly
from emformer.report.section import Section
from emformer.report.text import escaped, fact_list, isolated
from emformer.theory.outcome import Chart, Curves, Heat, Outcome, Paths, Statement
from emformer.verdicts import Findings, Verdict

# What the data of all charts may come to, in bytes, so that the page stays below 6 MB beside plotly's 4.8; and bytes a number.
BUDGET = 950_000
TEXT, PACKED = 7, 2.7
FRAMES, FEWEST = 150, 40  # moments of points that move, and how many of them are kept for the sake of more points
WAYS = 4_000  # points that a browser moves without a stutter
CELLS = 30_000  # of the grids of a chart
LINES = 300  # of a chart
SHORTEST = 40  # points of a line, before lines are left out
WORDS = {"equals": "{}", "at most": "at most {}", "at least": "at least {}", "measured": "–"}
VERDICTS: dict[str, str] = {"supported": "✓", "refuted": "✗", "undecided": "?", "holds": "=", "broken": "✗"}
MARKS = {"held": "✓", "NOT held": "✗", "told": "·", "undefined": "?"}


def write(outcome: Outcome | Findings, path: str | Path, *, title: str, facts: Mapping[str, str]) -> Path:
    """Write the page of an outcome or of findings, and return its path.

    One HTML file of at most 6 MB, 4.8 of them plotly; nothing in it is loaded from anywhere, and all text in it is shown as text.
    On top the statements with their verdicts; then every chart: lines that can be switched, grids whose values can be read,
    points that move with time. What a chart has too much of is left out evenly, and counted below it. Atomic, and the same
    outcome gives the same bytes.

    Args:
        title: of the page.
        facts: what was simulated, by name.

    Raises:
        UserError: if the file cannot be written; and without plotly.
        ValueError: for a chart without its columns, without rows, or with two values for one cell.
    """
    path = Path(path)
    require_plotly()
    first = verdict_section(outcome) if isinstance(outcome, Findings) else _statements(outcome)
    told = page(title, fact_list(facts.items()), (), [first, *chart_sections(outcome.charts)], {})
    try:
        with replaced(path) as partial:
            partial.write_text(told, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; an older page is as it was.") from error
    return path


def chart_sections(charts: Mapping[str, Chart], budget: int | None = None) -> list[Section]:
    """A section for each chart, which together carry about so many bytes of data: by default what a page has room for. Raises
    ValueError as `write` does."""
    shares = _shares([_need(chart) for chart in charts.values()], BUDGET if budget is None else budget)
    told = zip(charts.items(), shares, strict=True)
    return [_section(f"chart{k}", name, chart, share) for k, ((name, chart), share) in enumerate(told)]


def _note(text: str) -> str:
    return "".join(f"<p class=note>{escaped(part)}</p>" for part in text.split("\n") if part.strip())


def _head(names: Sequence[tuple[str, bool]]) -> str:
    return "".join(f"<th scope=col{' class=number' if number else ''}>{name}</th>" for name, number in names)


def verdict_section(found: Findings) -> Section:
    """The verdicts of findings as a table, and their note."""
    counted = Counter(str(one.word) for one in found.verdicts)
    words = [f"{counted[word]} {word}" for word in VERDICTS if counted[word]]
    count = sum(not one.check for one in found.verdicts)
    claims = "1 claim" if count == 1 else f"{count} claims"
    columns = [("verdict", False), ("claim", False), ("source", False), ("measured", True), ("95 % interval", True)]
    head = _head([*columns, ("claimed", True), ("null", True), ("n", True)])
    rows = "".join(map(_verdict_row, found.verdicts))
    told = (
        f"<p>{claims}: {', '.join(words) or 'none'}. A claim is supported where the whole interval lies in the claimed range, "
        "refuted where none of it does, and undecided else, or where n is below 6; each stands for itself, and intervals are not "
        "corrected for their number. The null is what chance or the control that is named would give. What holds, or is broken, "
        f"is no claim: it is so by algebra or by construction, and tests the instrument.</p>{_note(found.note)}"
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return Section("verdicts", "Verdicts", before=f"{told}<div class=wide>{table}</div>", plots=())


def _verdict_row(one: Verdict) -> str:
    kind = {"supported": "held", "refuted": "not", "holds": "told", "broken": "not", "undecided": "undefined"}[one.word]
    small = "; ".join(filter(None, (one.quantity, one.reason)))
    null = escaped(short(one.null + 0.0, 3)) + (f"<small>{isolated(one.against)}</small>" if one.against else "")
    cells = (short(one.measured.value + 0.0, 4), interval(one.measured), claimed(one))
    return (
        f'<tr class="{kind}"><td class=verdict><span aria-hidden=true>{VERDICTS[one.word]}</span> {one.word}</td>'
        f"<th scope=row>{isolated(one.claim)}<br><small>{isolated(small)}</small></th><td>{isolated(one.source)}</td>"
        + "".join(f"<td class=number>{escaped(cell)}</td>" for cell in cells)
        + f"<td class=number>{null}</td><td class=number>{one.measured.n:,} {escaped(one.measured.of)}</td></tr>"
    )


def _statements(outcome: Outcome) -> Section:
    note = _note(outcome.note)
    if not outcome.statements:
        return Section("statements", "Statements", before=f"<p>Nothing was claimed.</p>{note}", plots=())
    found = Counter(map(verdict, outcome.statements))
    words = [f"{found[word]} {word.replace('NOT', 'not')}" for word in MARKS if found[word]]
    head = _head([("claim", False), ("source", False), ("predicted", True), ("measured", True), ("n", True)])
    rows = "".join(map(_row, outcome.statements))
    told = (
        f"<p>{len(outcome.statements)} statements: {', '.join(words)}. Of what is predicted, the tolerance is in brackets; of "
        "what is measured, ± is the standard error, and n tells from how many simulations, draws or steps it is. <q>Told</q> is "
        f"a number about which nothing is claimed.</p>{note}"
    )
    table = f"<table><thead><tr><th scope=col>verdict</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return Section("statements", "Statements", before=f"{told}<div class=wide>{table}</div>", plots=())


def _row(one: Statement) -> str:
    word = verdict(one)
    allowed = f" ({short(one.tolerance, 2)})" if one.how != "measured" and one.tolerance else ""
    predicted = WORDS[one.how].format(short(one.predicted, 4)) + allowed
    # no number is told as -0
    measured = short(one.measured + 0.0, 4) + ("" if math.isnan(one.error) else f" ± {short(one.error, 2)}")
    kind = word.split()[0].lower()
    return (
        f'<tr class="{kind}"><td class=verdict><span aria-hidden=true>{MARKS[word]}</span> {word.replace("NOT", "not")}</td>'
        f"<th scope=row>{isolated(one.claim)}</th><td>{isolated(one.source)}</td><td class=number>{escaped(predicted)}</td>"
        f"<td class=number>{escaped(measured)}</td><td class=number>{one.n:,}</td></tr>"
    )


def _need(chart: Chart) -> float:
    """Bytes that a chart would take whole."""
    return float(len(chart.frame)) * (PACKED * 3 if isinstance(chart, Paths) else TEXT * (4 if "low" in chart.frame else 2))


def _shares(needs: Sequence[float], budget: int) -> list[float]:
    """Bytes for each: what it needs where that is little, of what is left an equal part."""
    shares, left = [0.0] * len(needs), float(budget)
    for count, k in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        shares[k] = left / (len(needs) - count)
        left -= min(needs[k], shares[k])
    return shares


def _section(ident: str, name: str, chart: Chart, share: float) -> Section:
    title = name.replace("_", " ")
    title = title[:1].upper() + title[1:]
    if isinstance(chart, Curves):
        kind, count, data, facts = "curves", *_curves(chart, share)
    elif isinstance(chart, Heat):
        kind, count, data, facts = "grids", *_grids(chart)
    else:
        kind, count, data, facts = "ways", *_ways(chart, share)
    left = "; ".join(fact for fact in (lost(chart), *facts) if fact)
    caption = isolated(chart.caption) + (f" <small>{escaped(left[:1].upper() + left[1:])}.</small>" if left else "")
    return Section(ident, title, caption, data, plots=[f"panel{k}" for k in range(count)], kind=kind)


def _curves(chart: Curves, share: float) -> tuple[int, dict[str, Any], list[str]]:
    found = lines(chart)
    whole = [line for panel in found.values() for line in panel]
    numbers = 4 if any(np.isfinite(line.low).any() for line in whole) else 2
    shown = set(spread(len(whole), min(LINES, max(1, int(share / (numbers * TEXT * SHORTEST))))))
    points = max(SHORTEST, int(share / (numbers * TEXT * len(shown))))
    groups = grouped([line for k, line in enumerate(whole) if k in shown])
    panels, count = [], iter(range(len(whole)))
    for name, own in found.items():
        panels.append({"title": name, "lines": [_line(line, groups, points) for line in own if next(count) in shown]})
    told = {line.group for line in whole if not line.theory}
    seeds = {group: len({line.name for line in whole if line.group == group and line.one_seed}) for group in groups}
    data = {
        "x": chart.x,
        "y": chart.y,
        "log": [chart.log_x, chart.log_y],
        "groups": [
            {"name": seeded(group, seeds[group]), "shade": rank / max(1, len(groups) - 1), "theory": group not in told}
            for group, rank in zip(groups, ranks(groups), strict=True)
        ],
        "panels": panels,
    }
    longest = max(len(line.x) for line in whole)
    facts = [f"of every line at most {points:,} of {longest:,} points drawn" if points < longest else ""]
    facts.append(f"{len(whole) - len(shown):,} of {len(whole):,} lines not drawn" if len(shown) < len(whole) else "")
    return len(panels), data, facts


def _line(line: Line, groups: Sequence[str], points: int) -> dict[str, Any]:
    kept_ = spread(len(line.x), points)
    told: dict[str, Any] = {"name": line.name, "group": groups.index(line.group), "theory": line.theory}
    told |= {"x": line.x[kept_], "y": line.y[kept_]} | ({"seed": True} if line.one_seed else {})
    if np.isfinite(line.low).any() and np.isfinite(line.high).any():
        told |= {"low": line.low[kept_], "high": line.high[kept_]}
    return told


def _grids(chart: Heat) -> tuple[int, dict[str, Any], list[str]]:
    found = grids(chart)
    low, high = limits(chart, np.concatenate([grid.values.ravel() for grid in found.values()]))
    most = int((CELLS / len(found)) ** 0.5)
    panels, left = [], 0
    for name, grid in found.items():
        columns, rows = spread(len(grid.x), most), spread(len(grid.y), most)
        own = Grid(grid.x[columns], grid.y[rows], grid.values[np.ix_(rows, columns)])
        left += grid.values.size - own.values.size
        panels.append({"title": name, "x": own.x, "y": own.y, "values": own.values})
    data = {"x": chart.x, "y": chart.y, "value": chart.value, "log": [chart.log_x, chart.log_y], "limits": [low, high]}
    return len(panels), data | {"panels": panels}, [f"{left:,} cells not drawn" if left else ""]


def _ways(chart: Paths, share: float) -> tuple[int, dict[str, Any], list[str]]:
    found = ways(chart)
    deep = solid(found)
    whole = sum(map(len, found.values()))
    moments = chart.frame["time"].nunique()
    numbers = share / PACKED / (3 if deep else 2)
    if chart.surface == "sphere":
        found = {name: [arced(way) for way in own] for name, own in found.items()}
    times = _moments([way for own in found.values() for way in own], int(np.clip(numbers / whole, FEWEST, FRAMES)))
    most = int(min(WAYS, numbers / len(times)) / len(found))
    groups = grouped([way for own in found.values() for way in own])
    panels, left, early = [], 0, False
    for name, own in found.items():
        drawn = kept(own, max(2, most))
        left += len(own) - len(drawn)
        early |= any(way.time[-1] < times[-1] for way in drawn)
        where = np.stack([_at(way, times)[:, : 3 if deep else 2] for way in drawn], axis=1)
        one = {"title": name, "names": [way.name for way in drawn], "groups": [groups.index(way.group) for way in drawn]}
        panels.append(one | {"points": packed(where)})
    data = {
        "axes": list(chart.axes),
        "surface": chart.surface,
        "solid": deep,
        "times": [short(float(time), 4) for time in times],
        "groups": groups,
        "shades": [rank / max(1, len(groups) - 1) for rank in ranks(groups)],
        "panels": panels,
    }
    facts = [f"{left:,} of {whole:,} points not drawn" if left else ""]
    facts.append(f"{len(times):,} of {moments:,} moments shown" if len(times) < moments else "")
    facts.append("a point whose time is over stays where it was last" if early else "")
    # space takes a window of the graphics card a panel, of which a browser has few: one panel at a time
    return 1 if deep else len(panels), data, facts


def _moments(moved: Sequence[Way], most: int) -> np.ndarray:
    """At most so many of all times, with the first and the last: more of them when much moves."""
    time, gone = pace(moved)
    if len(time) <= most:
        return time
    clock = (gone + np.linspace(0, 1, len(time))) / 2
    return time[np.unique(np.searchsorted(clock, np.linspace(0, 1, most) - 1e-9))]


def _at(way: Way, times: np.ndarray) -> np.ndarray:
    """Where the point is at these times (times, 3): straight on between two of its own, nowhere before the first; after the last
    it stays."""
    known = np.isfinite(way.points[:, 0])
    if not known.any():
        return np.full((len(times), 3), np.nan)
    time, points = way.time[known], way.points[known]
    found = np.stack([np.interp(times, time, axis) for axis in points.T], axis=1)
    found[times < time[0]] = np.nan
    return found
