"""What was recorded, as text: an overview by key, a key by layer and step, and runs side by side."""

from __future__ import annotations

import difflib
import math
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from emformer.intervals import FEWEST, Interval
from emformer.observables.frame import Key
from emformer.parts import UserError
from emformer.theory.outcome import Statement
from emformer.verdicts import Verdict

BELOW = 116  # characters of a line of what stands below a claim
STEPS = 8  # columns of a table by step
UNDEFINED = ".undefined"  # see `emformer.observables.Moments`
NO_ROWS = "no rows yet"


def select(records: pd.DataFrame, keys: Sequence[str], families: Sequence[str], known: Mapping[str, Key]) -> pd.DataFrame:
    """The rows of these keys and of all keys of these families: as `known`, or what stands before the dot. All, if none is named.

    Raises:
        UserError: for a key or a family of which nothing was recorded, with the nearest of which something was.
    """
    if not keys and not families:
        return records
    recorded = {str(key): _families(str(key), known) for key in records["key"].dropna().unique()}
    for kind, names, there in (("key", keys, set(recorded)), ("family", families, set().union(*recorded.values()))):
        for name in names:
            if name not in there:
                near = difflib.get_close_matches(name, there, 1)
                hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(sorted(there)) or NO_ROWS}."
                raise UserError(f"nothing was recorded of the {kind} '{name}'; {hint}")
    return records[records["key"].isin([key for key, own in recorded.items() if key in keys or own & set(families)])]


def overview(records: pd.DataFrame, known: Mapping[str, Key], width: int | None = None) -> str:
    """Run by run a line a key: at how many steps, in which layers, and of the plainest row of its last step mean ± standard
    error, null, number of prompts or points (valid/all) and place; then the definition, where it is `known`. Lines are cut at
    `width`.

    The plainest row: without parameters (so of no control), of the raw cloud, over all heads and layers, else the deepest layer.
    """
    told = []
    for run, rows in records.groupby("run", sort=False):
        steps = rows["step"].dropna().unique()
        table = [["key", "steps", "layers", "last", "", "null", "n", "at", "" if not known else "what it is"]]
        for key, own in rows.groupby("key", sort=False):
            last, layers = plainest(own), sorted(int(layer) for layer in own["layer"].dropna().unique())
            line = [str(key), str(own["step"].nunique()), _span(layers), *_cells(last), place_of(last)]
            table.append([*line, definition(str(key), known)])
        at = f" at {len(steps)} steps, {min(steps)} to {max(steps)}" if len(steps) > 1 else ""
        lines = _aligned(table, "<><><>><<")
        lines = [line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines]
        told.append("\n".join([f"{run}: {len(rows):,} rows{at}", "", *lines]))
    return "\n\n".join(told) or NO_ROWS


def by_layer(records: pd.DataFrame, known: Mapping[str, Key]) -> str:
    """Key by key and run by run a line a place, from the first layer to the last, and a column of means a step: at most `STEPS`,
    with the first and the last; of the last, standard error, null and number of prompts or points (valid/all) too."""
    told = []
    known_steps = records.dropna(subset=["step"])
    for key, run in known_steps[["key", "run"]].drop_duplicates().itertuples(index=False):
        rows = known_steps[(known_steps["key"] == key) & (known_steps["run"] == run)]
        steps = sorted(rows["step"].unique())
        count = min(STEPS, len(steps))
        shown = [steps[round(k * (len(steps) - 1) / max(1, count - 1))] for k in range(count)]
        places: dict[str, dict[int, Mapping[Hashable, Any]]] = {}
        for row in rows[rows["step"].isin(shown)].sort_values("layer", kind="stable").to_dict("records"):
            places.setdefault(place_of(row), {})[row["step"]] = row
        table = [["", *map(str, shown), "", "null", "n"]]
        for place, found in places.items():
            before = [short(found[step]["mean"]) if step in found else "" for step in shown[:-1]]
            table.append([place, *before, *(_cells(found[shown[-1]]) if shown[-1] in found else [""] * 4)])
        some = f", {count} of {len(steps)} steps" if len(steps) > count else ""
        head = [f"{key}  {definition(str(key), known)}".rstrip(), f"{run}, by step{some}", ""]
        told.append("\n".join([*head, *_aligned(table, "<" + ">" * count + "<>>")]))
    return "\n\n".join(told) or NO_ROWS


def compared(found: pd.DataFrame, known: Mapping[str, Key], *, whole: bool) -> str:
    """A frame of `emformer.comparison.compare` as a table: a line a place, the mean of the first run, and of each other its mean,
    difference to the first and 95 % interval, with a star where q is at most 5 %. `whole`: every place; else of each key the
    plainest that most runs have, as `overview` chooses it."""
    runs = list(found["run"].unique())
    table = [["key", "at", runs[0], *(cell for run in runs[1:] for cell in (run, "difference", "95 %", ""))]]
    places = found[["key", *_PLACE]].astype(object).fillna("")
    chosen: dict[Hashable, tuple[tuple[int, Any], list[str]]] = {}
    for place, index in places.groupby(list(places.columns), sort=False).groups.items():
        rows = {row["run"]: row for row in found.loc[index].to_dict("records")}
        first = next(iter(rows.values()))
        mean = short(rows[runs[0]]["mean"]) if runs[0] in rows else ""
        line = [str(first["key"]), place_of(first), mean]
        for run in runs[1:]:
            line += _against(rows[run]) if run in rows else [""] * 4
        name = place if whole else first["key"]
        rank = len(rows), _plainness(first)
        if name not in chosen or rank >= chosen[name][0]:
            chosen[name] = rank, line
    table += [line for _, line in chosen.values()]
    lines = _aligned(table, "<<>" + ">><<" * (len(runs) - 1))
    if whole and found["key"].nunique() == 1 and len(found):
        lines.insert(0, f"{definition(str(found['key'].iloc[0]), known)}\n")
    return "\n".join(lines)


_PLACE = ("layer", "point", "head", "cloud", "param")


def verdicts(statements: Sequence[Statement]) -> str:
    """A line a claim: whether it held, what was predicted and measured (± standard error), from how many, and what it says."""
    signs = {"equals": "", "at most": "≤ ", "at least": "≥ "}
    table = [["", "predicted ± allowed", "measured", "± error", "n", "claim"]]
    for one in statements:
        expected = f"{signs[one.how]}{short(one.predicted, 4)}" if one.how in signs else ""
        spare = {"equals": "± ", "at most": "+ ", "at least": "− "}.get(one.how, "")
        allowed = f" {spare}{short(one.tolerance, 2)}" if expected and one.tolerance else ""
        error = f"± {short(one.error, 2)}" if not math.isnan(one.error) else ""
        table.append([verdict(one), expected + allowed, short(one.measured, 4), error, str(one.n), f"{one.claim} ({one.source})"])
    return "\n".join(_aligned(table, "<><<><"))


def verdict(statement: Statement) -> str:
    """Whether its claim held, in a word or two."""
    if statement.held is None:
        return "told" if statement.how == "measured" else "undefined"
    return "held" if statement.held else "NOT held"


def claims(verdicts: Sequence[Verdict]) -> str:
    """Of each claim: the verdict, the number with its interval, the range that is claimed, the null, and what it says; below it
    what the number is, and what else decides."""
    table = [["", "measured", "95 % interval", "claimed", "null", "n", "claim"]]
    for one in verdicts:
        null = short(one.null, 3) + (f" ({one.against})" if one.against else "")
        n = f"{one.measured.n:,} {one.measured.of}"
        told = [one.word, short(one.measured.value, 4), interval(one.measured), claimed(one), null, n]
        table.append([*told, f"{one.claim} ({one.source})"])
    head, *lines = _aligned(table, "<>><<<<")
    small = ["; ".join(filter(None, (one.quantity, one.reason))) for one in verdicts]
    below = [textwrap.indent(textwrap.fill(text, BELOW), "    ") for text in small]
    return "\n".join([head, *(f"{line}\n{more}" for line, more in zip(lines, below, strict=True))])


def effects(found: pd.DataFrame) -> str:
    """Of each row of `emformer.effects.effects`: the baseline's mean, the difference with its interval, its size, the corrected
    p, from how many seeds, and what may be said; below it how to read that."""
    table = [["outcome", "", "baseline", "difference", "95 % interval", "g", "p", "seeds", ""]]
    for row in found.to_dict("records"):
        size = [
            short(row["of_baseline"], 4),
            "–" if math.isnan(row["difference"]) else f"{row['difference']:+.3g}",
            interval(Interval(row["difference"], row["low"], row["high"], 0, "seeds")),
        ]
        n = f"{row['n']}" + (f" of {row['planned']}" if row["n"] < row["planned"] else "")
        table.append([row["outcome"], row["contrast"], *size, short(row["g"], 2), short(row["corrected"], 2), n, row["word"]])
    tests, few = int(found["p"].notna().sum()), int((found["n"] < FEWEST).sum())
    told = [
        *_aligned(table, "<<>><>>><"),
        "",
        f"differences by seed; the interval is of one alone, p is corrected for all {tests} tests together (Holm), g is Hedges'",
    ]
    if few:
        told.append(f"{few} of {len(found)} comparisons have too few seeds for a claim at 95 %, which takes {FEWEST}")
    return "\n".join(told)


def cells(found: pd.DataFrame, most: int = 12) -> str:
    """The outcomes of the cells of a study, at most so many cells, the least of the first outcome first."""
    names = list(found["outcome"].unique())
    values = found.pivot(index="cell", columns="outcome", values="value")[names].sort_values(names[0], kind="stable")
    rows = [[str(cell), *(short(value, 4) for value in line)] for cell, *line in values.head(most).itertuples()]
    more = [f"and {len(values) - most} more"] if len(values) > most else []
    return "\n".join([*_aligned([["", *names], *rows], "<" + ">" * len(names)), *more])


def interval(one: Interval) -> str:
    """As "[1.2, 3.4]"; undefined is a dash."""
    return "–" if math.isnan(one.low) else f"[{short(one.low + 0.0, 3)}, {short(one.high + 0.0, 3)}]"


def claimed(one: Verdict) -> str:
    """The range that a claim names, as "≥ 0"."""
    if math.isinf(one.least) or math.isinf(one.most):
        return f"≤ {short(one.most, 3)}" if math.isinf(one.least) else f"≥ {short(one.least, 3)}"
    return f"{short(one.least, 3)} … {short(one.most, 3)}"


def _against(row: Mapping[Hashable, Any]) -> list[str]:
    """Mean, difference, its interval, and a star."""
    if math.isnan(row["difference"]):
        return [short(row["mean"]), "", "", ""]
    span = "" if math.isnan(row["low"]) else f"[{short(row['low'], 2)}, {short(row['high'], 2)}]"
    return [short(row["mean"]), f"{row['difference']:+.3g}", span, "*" if row["q"] <= 0.05 else ""]


def _families(key: str, known: Mapping[str, Key]) -> set[str]:
    own = known.get(key) or known.get(key.removesuffix(UNDEFINED))
    return {key.partition(".")[0]} | ({own.family} if own else set())


def definition(key: str, known: Mapping[str, Key]) -> str:
    """What a key means, in a line; "" for one that is not `known`."""
    if key in known:
        return known[key].definition
    return f"share of tokens for which {key.removesuffix(UNDEFINED)} is undefined" if key.endswith(UNDEFINED) else ""


def plainest(rows: pd.DataFrame) -> Mapping[Hashable, Any]:
    """Of the rows of one key the one that stands for it: of the last step, without parameters (so of no control), of the raw
    cloud, over all heads and layers, else of the deepest layer."""
    newest = rows[rows["step"] == rows["step"].max()].to_dict("records") or rows.to_dict("records")
    return max(reversed(newest), key=_plainness)


def _plainness(row: Mapping[Hashable, Any]) -> tuple[int, bool, bool, float]:
    words = 0 if pd.isna(row["param"]) else len(row["param"].split())
    return -words, row["cloud"] == "raw", bool(pd.isna(row["head"])), math.inf if pd.isna(row["layer"]) else float(row["layer"])


def place_of(row: Mapping[Hashable, Any]) -> str:
    """As "layer 3 attn head 0 centred k=4", without what is undefined; the raw cloud goes without saying."""
    words = ["all layers" if pd.isna(row["layer"]) else f"layer {row['layer']}", row["point"]]
    words += [row["head"] if pd.isna(row["head"]) else f"head {row['head']}", row["cloud"], row["param"]]
    return " ".join(word for word in words if not pd.isna(word) and word != "raw")


def _cells(row: Mapping[Hashable, Any]) -> list[str]:
    """Mean, ± standard error, null, and how many were valid."""
    error = f"± {short(row['se'], 2)}" if not math.isnan(row["se"]) else ""
    null = "" if math.isnan(row["null"]) else short(row["null"])
    if not math.isnan(row["null_sd"]):
        null += f" ± {short(row['null_sd'], 2)}"
    n = f"{row['n_valid']}/{row['n_valid'] + row['n_dropped']}" if row["n_dropped"] else str(row["n_valid"])
    return [short(row["mean"]), error, null, n]


def short(value: float, digits: int = 3) -> str:
    """Rounded to so many digits, from 1 to a billion without an exponent; undefined is a dash."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if 10**digits - 0.5 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def _span(layers: Sequence[int]) -> str:
    """As "0–3", or "0, 2" where some are left out."""
    whole = len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}–{layers[-1]}" if whole else ", ".join(map(str, layers)) or "–"


def _aligned(table: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of a table; `sides`: "<" or ">" for each column."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    gaps = [f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)]
    return ["  ".join(gap.format(cell) for gap, cell in zip(gaps, line, strict=True)).rstrip() for line in table]
