"""Sections of records: every key by depth and training step, breathing, motion, and the last number of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from emformer.figures.frames import at, every, label, pick, places, steps
from emformer.listing import definition, place_of, plainest, short
from emformer.observables.frame import Key
from emformer.report.section import Section
from emformer.report.text import escaped, isolated

NUMBERS = 25_000  # of all series together, some eight characters each
BREATHING = ("geo.id_twonn", "breath.b_attn", "breath.b_mlp", "breath.sawtooth", "breath.p_value")
MOTION = ("flow.speed_rel", "flow.w2")
EXPLAINED = {
    "flow.speed_rel": "how long a step is against the token it moves, |D| / |x|",
    "flow.w2": "the least mean distance by which the cloud before a step can be carried onto the cloud after it",
}


def sections(records: pd.DataFrame, known: Mapping[str, Key]) -> Iterator[Section]:
    """The sections of one run's records. The last but one carries all series; those before it draw from them."""
    told = gathered(records)
    keys = {one["key"] for one in told}
    if "geo.id_twonn" in keys:
        yield _breathing(records)
    if keys & set(MOTION):
        yield _motion(records, keys)
    yield _explorer(told, known)


def gathered(records: pd.DataFrame) -> list[dict[str, Any]]:
    """Every key of all heads together, cloud by cloud and param by param: its places, its training steps, and by step and place
    mean, standard error and null; nan where there is none. Where all would be too much, training steps are left out, evenly but
    for the first and the last.

    A place is a state, or a step of the flow, as "1a", with its layer; or the whole flow, as "all"."""
    rows = records[records["head"].isna()]
    found = [_series(own, *name) for name, own in rows.groupby(["key", "cloud", "param"], sort=False, dropna=False)]
    while sum(map(_numbers, compact(found))) > NUMBERS and any(len(one["steps"]) > 2 for one in found):
        found = [_thinned(one) for one in found]
    return found


def _series(own: pd.DataFrame, key: str, cloud: str, param: object) -> dict[str, Any]:
    layer = own["layer"].to_numpy(float, na_value=np.nan)
    whole = bool(np.isnan(layer).all())
    step = own["step"].to_numpy(float, na_value=0)
    point = own["point"].to_numpy(object, na_value="")
    if whole:
        where: list[tuple[float, str]] = [(math.nan, "all")]
        index = [0] * len(own)
    else:
        known = places(pd.DataFrame({"layer": layer, "point": point}).dropna())
        where = [(float(k), p) for k, p in known]
        rank = {one: k for k, one in enumerate(known)}
        index = [rank.get((int(k), p), -1) if not math.isnan(k) else -1 for k, p in zip(layer, point, strict=True)]
    when = sorted(set(step.tolist()))
    column = {value: k for k, value in enumerate(when)}
    grids = {name: np.full((len(when), len(where)), np.nan) for name in ("mean", "se", "null", "null_sd")}
    for name, values in grids.items():
        numbers = own[name].to_numpy(float)
        for s, k, value in zip(step, index, numbers, strict=True):
            if k >= 0:
                values[column[s], k] = value
    n = own["n_valid"]
    return {
        "key": str(key),
        "cloud": str(cloud) if not pd.isna(cloud) else "",
        "param": str(param) if not pd.isna(param) else "",
        "places": ["all" if whole else label((int(k), p)) for k, p in where],
        "layers": [k for k, _ in where],
        "points": [p for _, p in where],
        "steps": when,
        "n": [int(n.min()), int(n.max())],
        **grids,
    }


def _thinned(one: dict[str, Any]) -> dict[str, Any]:
    """With every second step, and the first and the last."""
    count = len(one["steps"])
    if count <= 2:
        return one
    kept = sorted({*range(0, count, 2), count - 1})
    grids = {name: one[name][kept] for name in ("mean", "se", "null", "null_sd")}
    return one | grids | {"steps": [one["steps"][k] for k in kept]}


def _numbers(one: dict[str, Any]) -> int:
    return sum(np.size(one[name]) for name in ("mean", "se", "null", "null_sd") if name in one)


def compact(told: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The series for a page: grids that say nothing are left out, and one number stands for a grid of equal ones."""
    found = []
    for one in told:
        small = dict(one)
        for name in ("se", "null", "null_sd"):
            values = one[name]
            if not np.isfinite(values).any():
                del small[name]
            elif (values == values.flat[0]).all():
                small[name] = float(values.flat[0])
        found.append(small)
    return found


def _breathing(records: pd.DataFrame) -> Section:
    raw = pick(records, "geo.id_twonn")
    when = steps(raw) or steps(pick(records, "geo.id_twonn", cloud="read"))
    last = at(raw, when[-1])
    n = int(last["n_valid"].max()) if len(last) else 0
    verdict = [text for cloud in ("raw", "read") if (text := _verdict(records, cloud))]
    beside = ["the untrained model (grey)"] if when[0] == 0 < when[-1] else []
    beside += ["the same words in random order (purple, as recorded last before)"] if len(_shuffled(records)) else []
    caption = (
        f"The intrinsic dimension of the cloud (TwoNN, n ≤ {n:,} points, one a prompt) from state to state: X⁰ embedded, then "
        "after attention (a) and after the FFN (f) of each layer. Bars are 95 % intervals. In a sawtooth the dimension rises "
        "over attention (orange ground) and falls over the FFN (blue ground). "
        + (f"Beside it: {' and '.join(beside)}. " if beside else "")
        + "Estimates fall short by an amount that depends on n: "
        f"compare at equal n only. States whose points repeat have no dimension. {' '.join(verdict)} Below: rise over attention "
        "and FFN"
        + (" by training step" if len(when) > 1 else "")
        + ", mean over layers, with bars of 1.96 mean standard errors; "
        "chance gives 0."
    )
    return Section(
        "breathing", "Breathing: dimension from state to state", caption, {}, plots=("plot", "training"), keys=BREATHING
    )


def _shuffled(records: pd.DataFrame) -> pd.DataFrame:
    return records[(records["key"] == "geo.id_twonn") & (records["param"] == "shuffled")]


def _verdict(records: pd.DataFrame, cloud: str) -> str:
    rows = every(records, "breath.sawtooth", cloud=cloud, total=True)
    rows = rows[rows["param"] == ""]
    if rows.empty:
        return ""
    step = steps(rows)[-1]
    share, null = at(rows, step)[["mean", "null"]].iloc[0]
    blocks = int(at(rows, step)["n_valid"].iloc[0])
    if not np.isfinite(share):
        return f"The share of blocks that go as a sawtooth does is undefined in the {cloud} cloud."
    text = f"{cloud.capitalize()} cloud at step {step:,}: {100 * share:.0f} % of {blocks} blocks go as in a sawtooth"
    text += f" ({100 * null:.0f} % by chance)" if np.isfinite(null) else ""
    p = at(pick(records, "breath.p_value", cloud=cloud, total=True), step)["mean"]
    return text + (f", p = {p.iloc[0]:.2g}." if len(p) and np.isfinite(p.iloc[0]) else ".")


def _motion(records: pd.DataFrame, keys: set[str]) -> Section:
    own = [key for key in MOTION if key in keys]
    rows = pd.concat([pick(records, key) for key in own])
    when = steps(rows)
    caption = (
        "; ".join(f"<code>{escaped(key)}</code>: {EXPLAINED[key]}" for key in own)
        + f". The last training step with 95 % intervals over n = {rows['n_valid'].max():.0f} prompts, where an error is known"
        + (
            f". A line a training step ({len(when)} of them, {when[0]:,} to {when[-1]:,}; pale: early, dark: late), or a line a "
            "place. Where the lines of late steps lie above early ones, training made the flow faster there."
            if len(when) > 1
            else f" (step {when[0]:,} alone was recorded)."
        )
    )
    return Section(
        "motion",
        "Speed and transport, by layer and training step",
        caption,
        {"keys": own},
        plots=tuple(f"p{k}" for k in range(len(own))),
        keys=own,
    )


def _explorer(told: list[dict[str, Any]], known: Mapping[str, Key]) -> Section:
    caption = (
        "Any key that was recorded, over all heads: by depth, a line a training step (pale: early, dark: late), or by training "
        "step, a line a place. Bars are 95 % intervals where an error is known; dashed is what chance alone would give, where "
        "that is "
        'known. <span class="meaning"></span>'
    )
    definitions = {key: definition(key, known) for key in dict.fromkeys(one["key"] for one in told)}
    return Section("explorer", "Everything recorded", caption, {"series": compact(told), "definitions": definitions})


def table(records: pd.DataFrame, known: Mapping[str, Key], anchors: Mapping[str, str]) -> Section:
    """A line a key: its plainest row of the last step, every number a link to what it means."""
    lines = []
    for key, own in records.groupby("key", sort=False):
        row = plainest(own)
        se = row["se"]
        n = f"{row['n_valid']:,}" + (f" of {row['n_valid'] + row['n_dropped']:,}" if row["n_dropped"] else "")
        null = "" if math.isnan(row["null"]) else short(row["null"])
        href = anchors[str(key)]
        numbers = [short(row["mean"]), "" if math.isnan(se) else short(se, 2), n, null]
        cells = "".join(f'<td class=number><a href="#{href}">{escaped(text)}</a></td>' for text in numbers)
        step = "" if pd.isna(row["step"]) else f"{row['step']:,}"
        where = f"<td>{escaped(place_of(row))}</td><td class=number>{step}</td>"
        lines.append(f"<tr><th scope=row>{isolated(key)}</th>{cells}{where}<td>{escaped(definition(str(key), known))}</td></tr>")
    numeric = {"last", "± se", "n", "null", "step"}
    names = ("key", "last", "± se", "n", "null", "at", "step", "what it is")
    head = "".join(f"<th scope=col{' class=number' if name in numeric else ''}>{name}</th>" for name in names)
    caption = (
        f"<p>{len(lines)} keys, {len(records):,} rows. Of each key the plainest row of its last step: over all heads where there "
        "is one, of the deepest layer; mean, standard error, number of prompts (of pooled clouds: points) it rests on, and what "
        "chance alone would give. Every number leads to its definition.</p>"
    )
    body = f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    return Section("numbers", "Every key, last value", before=caption + body, plots=())
