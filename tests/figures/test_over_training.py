"""Figures over training, and of differences between runs: what is drawn equals what is in the frame."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from emformer import figures
from emformer.comparison import compare
from emformer.figures.style import KINDS
from emformer.observables import COLUMNS
from emformer.observables.frame import conform

STEPS = (0, 1, 5, 20, 80, 300)
Z = 1.96


def records(depth: int = 4, parallel: bool = False, run: str = "runs/default") -> pd.DataFrame:
    draw = np.random.default_rng(0)
    half = "parallel" if parallel else None
    rows = []

    def add(step, layer, point, key, mean, se, cloud="raw", param=None, null=None, n=64):
        row = (step, layer, point, None, key, cloud, param, mean, se * math.sqrt(n), se, n, 0, null, None)
        rows.append(dict(zip(COLUMNS, row, strict=True)))

    for step in STEPS:
        grown = math.log1p(step)
        for cloud in ("raw", "read"):
            add(step, None, None, "breath.amplitude", 0.02 * grown + draw.normal(0, 0.01), 0.01, cloud, half, 0.0, depth)
            if step == STEPS[-1]:
                word = f"{half} shuffled" if half else "shuffled"
                add(step, None, None, "breath.amplitude", 0.02, 0.01, cloud, word, 0.0, depth)
            for layer, (key, point) in itertools.product(range(depth), (("breath.b_attn", "attn"), ("breath.b_mlp", "ffn"))):
                sign = 1 if point == "attn" else -1
                add(step, layer, point, key, sign * 0.02 * grown * (1 + layer) + draw.normal(0, 0.01), 0.02, cloud, half, 0.0)
        for layer, point in itertools.product(range(depth), ("block",) if parallel else ("attn", "ffn")):
            add(step, layer, point, "flow.speed_rel", 0.3 + 0.1 * grown / (1 + layer), 0.01)
            add(step, layer, point, "flow.w2", 3 + grown * (1 + layer), 0.1)
    return pd.DataFrame(rows, columns=COLUMNS).assign(run=run)


FULL = records()


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def series(axes: Axes) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(x, y, half widths) of every line with intervals."""
    found = []
    for container in axes.containers:
        line, _, (bars,) = container.lines
        ends = np.array([part[:, 1] for part in bars.get_segments()])
        found.append((line.get_xdata(), line.get_ydata(), (ends[:, 1] - ends[:, 0]) / 2))
    return found


def column(key: str, name: str = "mean", frame: pd.DataFrame = FULL, param: str | None = None, **where) -> np.ndarray:
    rows = frame[(frame["key"] == key) & (frame["param"].isna() if param is None else frame["param"] == param)]
    for one, value in where.items():
        rows = rows[rows[one] == value]
    return rows.sort_values("step")[name].to_numpy(float)


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_breathing_over_training_is_that_of_the_frame():
    figure = figures.breathing(conform(FULL.sample(frac=1, random_state=0)).assign(run="runs/default"))
    top, attention, ffn = panels(figure)
    for (x, y, half), (cloud, param) in zip(
        series(top), (("raw", None), ("raw", "shuffled"), ("read", None), ("read", "shuffled")), strict=True
    ):
        np.testing.assert_allclose(y, column("breath.amplitude", cloud=cloud, param=param))
        np.testing.assert_allclose(half, Z * column("breath.amplitude", "se", cloud=cloud, param=param))
        steps = STEPS if param is None else STEPS[-1:]
        np.testing.assert_allclose(x, np.log1p(steps), atol=0.02 * math.log1p(300))
    for axes, key in ((attention, "breath.b_attn"), (ffn, "breath.b_mlp")):
        assert len(series(axes)) == 4
        for layer, (x, y, half) in enumerate(series(axes)):
            np.testing.assert_allclose(y, column(key, cloud="raw", layer=layer))
            np.testing.assert_allclose(half, Z * column(key, "se", cloud="raw", layer=layer))
            np.testing.assert_allclose(x, np.log1p(STEPS), atol=0.02 * math.log1p(300))
        shades = [container.lines[0].get_color()[:3] for container in axes.containers]
        assert (np.diff([sum(shade) for shade in shades]) < 0).all(), "deeper layers are darker"
    for axes in (top, attention, ffn):
        assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [0.0], "the null"
    assert [text.get_text() for text in top.get_xticklabels()][::-1] == [str(step) for step in STEPS]
    assert figure.get_suptitle().endswith("\ndefault, steps 0 to 300, n = 4 blocks")


def test_breathing_of_parallel_blocks_and_of_little():
    figure = figures.breathing(records(parallel=True))
    assert [len(series(axes)) for axes in panels(figure)] == [4, 4, 4], "the halves of each block"
    assert len(panels(figures.breathing(FULL[FULL["key"] == "breath.amplitude"]))) == 1
    assert figures.breathing(FULL[FULL["step"] == 5]) is None
    assert figures.breathing(FULL[FULL["key"] != "breath.amplitude"]) is None
    lost = FULL.copy()
    lost.loc[(lost["key"] == "breath.b_attn") & (lost["layer"] == 0) & (lost["cloud"] == "raw"), "mean"] = math.nan
    assert "b at attention (6 undefined)" in words(figures.breathing(lost))


def test_motion_over_training_is_that_of_the_frame():
    figure = figures.motion(FULL)
    for axes, (key, point) in zip(panels(figure), itertools.product(("flow.speed_rel", "flow.w2"), ("attn", "ffn")), strict=True):
        assert len(series(axes)) == 4
        for layer, (_, y, half) in enumerate(series(axes)):
            np.testing.assert_allclose(y, column(key, layer=layer, point=point))
            np.testing.assert_allclose(half, Z * column(key, "se", layer=layer, point=point))
    titles = [axes.get_title(loc="left") for axes in panels(figure)]
    assert titles == [f"{what}, {kind} step" for what in ("relative speed", "W₂ distance") for kind in ("attention", "FFN")]
    assert len(panels(figures.motion(records(parallel=True)))) == 2
    assert len(panels(figures.motion(FULL[FULL["key"] == "flow.w2"]))) == 2
    assert figures.motion(FULL[FULL["step"] == 0]) is None
    with pytest.raises(ValueError, match="several"):
        figures.motion(pd.concat([FULL, records(run="runs/other")]))


def test_many_layers_are_told_by_their_shade():
    figure = figures.motion(records(depth=24))
    assert all(len(series(axes)) == 24 for axes in panels(figure))
    x = [line[0] for line in series(panels(figure)[0])]
    assert np.allclose(x, np.log1p(STEPS)), "too many to stand side by side"
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert bar.get_ylabel() == "layer" and len(bar.get_yticks()) <= 12


def both() -> pd.DataFrame:
    other, third = records(run="runs/other"), records(run="runs/third")
    other.loc[other["key"] == "flow.w2", "mean"] += 1.0
    third["mean"] += np.random.default_rng(1).normal(0, 0.01, len(third))
    return compare(pd.concat([FULL, other, third], ignore_index=True))


def test_differences_are_those_of_the_comparison():
    frame = both()
    figure = figures.difference(frame)
    titles = [axes.get_title(loc="left") for axes in panels(figure)]
    assert titles[0] == "flow.w2", "the key that differs most comes first"
    assert set(titles) == {"flow.w2", "flow.speed_rel", "breath.b_attn", "breath.b_mlp", "breath.amplitude"}
    for axes, key in zip(panels(figure), titles, strict=True):
        rows = frame[(frame["key"] == key) & (frame["cloud"] == "raw") & frame["param"].isna()]
        for run, bars, (colour, _) in zip(("runs/other", "runs/third"), axes.collections, KINDS, strict=False):
            own = rows[rows["run"] == run]
            ends = np.array([part[:, 0] for part in bars.get_segments()])
            order = np.lexsort(ends.T)
            expected = own[["low", "high"]].to_numpy(float)
            np.testing.assert_allclose(ends[order], expected[np.lexsort(expected.T)])
            middle = np.concatenate([line.get_xdata() for line in axes.lines if line.get_color() == colour])
            np.testing.assert_allclose(sorted(middle), sorted(own["difference"]))
            full = [
                set(np.round(line.get_xdata(), 9))
                for line in axes.lines
                if line.get_color() == colour and line.get_markerfacecolor() == colour
            ]
            sure = own[(own["low"] > 0) | (own["high"] < 0)]["difference"]
            assert set().union(*full) == set(np.round(sure.to_numpy(float), 9))
    assert [text.get_text() for text in panels(figure)[0].get_yticklabels()] == ["0a", "0f", "1a", "1f", "2a", "2f", "3a", "3f"]
    assert {"other", "third", "interval holds 0"} <= set(words(figure))
    plain = frame["difference"].notna() & frame["head"].isna()
    assert f"{(frame[plain]['q'] <= 0.05).sum()} of {plain.sum()} rows" in figure.get_suptitle()
    assert figure.get_suptitle().startswith("Differences to default,")


def test_differences_that_are_few_or_many():
    frame = both()
    assert figures.difference(frame[frame["run"] == "runs/default"]) is None
    assert "3 more keys not drawn" in figures.difference(frame, most=2).get_suptitle()
    bare = frame.assign(low=math.nan, high=math.nan).drop(columns=["q"])
    figure = figures.difference(bare)
    assert "16 without interval" in words(figure) and "0 of" in figure.get_suptitle()
    deep = compare(pd.concat([records(depth=30), records(depth=30, run="runs/other")]))
    assert len(panels(figures.difference(deep))[0].get_yticks()) <= 26


@pytest.mark.parametrize("depth", [1, 4, 24])
def test_they_keep_inside_their_canvas(depth):
    frame = records(depth=depth)
    lost = frame.copy()
    lost.loc[lost["layer"] == 0, "mean"] = math.nan
    other = records(depth=depth, run="runs/" + "long" * 20)
    for figure in (figures.breathing(lost), figures.motion(lost), figures.difference(compare(pd.concat([frame, other])))):
        figure.canvas.draw()
        canvas = figure.bbox.padded(2)
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text() and not text.get_clip_on():
                box = text.get_window_extent()
                assert canvas.contains(*box.min) and canvas.contains(*box.max), text.get_text()
