"""Charts on paper: what is drawn equals the frame, theory is dashed, what is left out is counted, equals give equal bytes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Path3DCollection

from emformer import figures
from emformer.figures import ways as drawing
from emformer.figures.charts import draw
from emformer.figures.layout import ENTRIES, PANELS, power
from emformer.figures.panels import arced, pace, ranks, ways
from emformer.figures.style import KINDS, PALE
from emformer.theory.outcome import Curves, Heat, Paths

HOSTILE = "<b>$\\frac{$\u202e\x00\n"
TIMES = np.array([1.0, 2.0, 4.0, 8.0, 16.0])


def curves(panels: int = 1, betas: tuple[int, ...] = (1, 4), seeds: int = 3, **fields: bool) -> Curves:
    """y = beta + time + seed / 10 measured, beta + time in theory, and a bound that speaks of no line."""
    rows = []
    for panel in range(panels):
        for beta in betas:
            rows += [(f"panel {panel}", f"beta {beta}, seed {k}", t, beta + t + k / 10) for k in range(seeds) for t in TIMES]
            rows += [(f"panel {panel}", f"theory, beta {beta}", t, beta + t) for t in TIMES]
        rows += [(f"panel {panel}", "theory: a bound", t, 30.0) for t in TIMES]
    return Curves(pd.DataFrame(rows, columns=["panel", "line", "x", "y"]), "What it shows.", "time", "value", **fields)


def heat(columns: int = 4, rows: int = 3, **fields) -> Heat:
    """The value of a cell is 10 x + log10 y; the cell of x = 1, y = 10 has none."""
    cells = [
        ("d = 2", float(x), 10.0**y, np.nan if (x, y) == (1, 1) else 10.0 * x + y) for x in range(columns) for y in range(rows)
    ]
    return Heat(pd.DataFrame(cells, columns=["panel", "x", "y", "value"]), "What it shows.", "beta", "time", "clusters", **fields)


def paths(surface: Any, count: int = 3, panels: int = 1, name: str = "token") -> Paths:
    """Quarter circles about the z axis, from longitude k to k + pi / 2, all at one height; flat where there is no space."""
    rows = []
    for panel in range(panels):
        for k in range(count):
            for t in range(11):
                turn = k + np.pi / 20 * t
                z = {"sphere": 0.6, "cone": 0.8}.get(str(surface), np.nan)
                rows.append((f"panel {panel}", f"{name} {k}", float(t), 0.8 * np.cos(turn), 0.8 * np.sin(turn), z))
    frame = pd.DataFrame(rows, columns=["panel", "path", "time", "x", "y", "z"])
    return Paths(frame, "Where they go.", ("x", "y", "z"), surface)


def said(figure: Figure) -> str:
    return figure.get_suptitle()


def named(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def dashed(line: Line2D) -> bool:
    return line.is_dashed()


def test_lines_are_those_of_the_frame_and_theory_is_dashed():
    figure = draw(curves())
    (axes,) = figure.axes
    measured = [line for line in axes.lines if not dashed(line)]
    theory = [line for line in axes.lines if dashed(line)]
    assert len(measured) == 2 * 3 and len(theory) == 2 + 1
    found = sorted((line.get_ydata().tolist() for line in measured), key=lambda y: y[0])
    assert found == [(beta + TIMES + k / 10).tolist() for beta in (1, 4) for k in range(3)]
    assert {to_hex(line.get_color()) for line in measured} == {to_hex(KINDS[k][0]) for k in (0, 1)}, "a colour a setting"
    assert max(line.get_linewidth() for line in measured) < min(line.get_linewidth() for line in theory), "seeds are thin"
    by_start = {line.get_ydata()[0]: np.array(matplotlib_rgb(line)) for line in theory}
    for beta, (colour, _) in zip((1, 4), KINDS, strict=False):
        assert by_start[beta + 1.0] == pytest.approx(0.6 * np.array(hex_rgb(colour)), abs=0.01), "theory in its line's colour"
    assert named(figure) == ["beta 1 (3 seeds)", "beta 4 (3 seeds)", "theory, in the colour of its line", "theory: a bound"]
    assert said(figure) == "What it shows." and axes.get_xlabel() == "time" and axes.get_ylabel() == "value"


def hex_rgb(colour: str) -> list[float]:
    return [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]


def matplotlib_rgb(line: Line2D) -> list[float]:
    return hex_rgb(to_hex(line.get_color()))


def test_the_mean_of_seeds_stands_out_before_them():
    rows = [("", f"beta 4{seed}", t, t + k) for k, seed in enumerate((", seed 0", ", seed 1", "")) for t in TIMES]
    figure = draw(Curves(pd.DataFrame(rows, columns=["panel", "line", "x", "y"]), "", "x", "y"))
    *seeds, mean = figure.axes[0].lines
    assert len(seeds) == 2 and mean.get_ydata().tolist() == (TIMES + 2).tolist()
    for one in seeds:
        assert one.get_linewidth() < mean.get_linewidth() and one.get_alpha() < mean.get_alpha() and one.get_marker() == ""
    assert mean.get_marker() != "" and named(figure) == ["beta 4 (2 seeds)"], "a mean is no seed"


def test_panels_share_colours_and_one_legend():
    figure = draw(curves(panels=3), "run 7")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["panel 0", "panel 1", "panel 2"]
    assert len(named(figure)) == 4 and said(figure) == "What it shows.\nrun 7"
    assert len({tuple(to_hex(line.get_color()) for line in axes.lines) for axes in figure.axes}) == 1


def test_logarithmic_axes_say_what_they_cannot_show():
    chart = curves(log_x=True, log_y=True)
    chart.frame.loc[[0, 6, 12], "y"] = [0.0, -1.0, np.inf]
    figure = draw(chart)
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert f"3 of {len(chart.frame)} points undefined or not above 0" in said(figure)
    assert sum(np.isnan(line.get_ydata()).sum() for line in axes.lines) == 3
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert "10" in labels and not any("$" in label for label in labels)
    assert [power(value) for value in (0.01, 1.0, 10.0, 100.0, 1e-17)] == ["10⁻²", "1", "10", "10²", "10⁻¹⁷"]


def test_a_band_is_drawn_where_it_is_known():
    chart = curves(seeds=1)
    first = chart.frame["line"] == "beta 1, seed 0"
    frame = chart.frame.assign(
        low=np.where(first, chart.frame["y"] - 2, np.nan), high=np.where(first, chart.frame["y"] + 0.5, np.nan)
    )
    figure = draw(replace(chart, frame=frame))
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].vertices
    for t in TIMES:
        here = corners[np.isclose(corners[:, 0], t), 1]
        assert here.min() == pytest.approx(t - 1) and here.max() == pytest.approx(t + 1.5)


def test_a_legend_has_room_and_counts_the_rest():
    figure = draw(curves(betas=tuple(range(1, 21)), seeds=1))
    assert len(named(figure)) == ENTRIES + 2, "two more for theory"
    assert "12 of 20 lines not named" in said(figure)
    assert {"beta 1", "beta 20"} <= set(named(figure))
    colours = [to_hex(line.get_color()) for line in figure.axes[0].lines if not dashed(line)]
    assert len(set(colours)) == 20
    many = draw(curves(panels=PANELS + 5, betas=(1,), seeds=1))
    assert len(many.axes) == PANELS and "5 of 17 panels not drawn" in said(many)


def test_cells_have_their_colours_places_and_numbers():
    figure = draw(heat(log_y=True))
    axes, bar = figure.axes
    (mesh,) = (one for one in axes.collections if isinstance(one, QuadMesh))
    values = np.ma.getdata(mesh.get_array()).astype(float)
    goal = np.array([[10.0 * x + y for x in range(4)] for y in range(3)])
    known = ~np.ma.getmaskarray(mesh.get_array())
    assert (~known).sum() == 1 and not known[1, 1] and (values[known] == goal[known]).all()
    corners = np.asarray(mesh.get_coordinates())
    assert corners[0, :, 0] == pytest.approx(np.arange(5) - 0.5)
    assert corners[:, 0, 1] == pytest.approx(10.0 ** np.array([-0.5, 0.5, 1.5, 2.5])), "halfway in the logarithm"
    assert axes.get_yscale() == "log" and axes.get_xscale() == "linear"
    assert to_hex(tuple(mesh.cmap.get_bad())) == PALE and "grey: 1 of 12 cells undefined" in said(figure)
    written = {tuple(map(float, text.get_position())): text.get_text() for text in axes.texts}
    assert written[3.0, 100.0] == "32" and written[1.0, 10.0] == "?" and len(written) == 12
    assert bar.get_ylabel() == "clusters"
    assert not draw(heat(20, 10)).axes[0].texts, "many cells are read by their colours"


def test_limits_hold_and_cells_beyond_them_are_counted():
    figure = draw(heat(limits=(0.0, 25.0)))
    (mesh,) = (one for one in figure.axes[0].collections if isinstance(one, QuadMesh))
    assert mesh.get_clim() == (0.0, 25.0) and "3 cells are beyond the scale" in said(figure)
    one = heat()
    draw(replace(one, frame=one.frame.assign(value=1.0)))  # a scale of one value
    lost = draw(replace(one, frame=one.frame.iloc[1:]))
    assert "2 of 12 cells undefined" in said(lost), "a cell without a row too"


@pytest.mark.parametrize("surface", ["sphere", "cone"])
def test_ways_in_space_stand_in_their_net(surface: str):
    figure = draw(paths(surface))
    axes = figure.axes[0]
    nets = [one for one in axes.collections if isinstance(one, Line3DCollection)]
    segments = {len(piece) for net in nets for piece in net._segments3d}
    everything = np.concatenate([np.reshape(piece, (-1, 3)) for net in nets for piece in net._segments3d])
    ways = [net for net in nets if len(net._segments3d) == 10 and np.shape(net._segments3d[0]) == (2, 3)]
    assert len(ways) == 3 and segments
    k = next(k for k, way in enumerate(ways) if np.allclose(way._segments3d[0][0], [0.8, 0, ways[k]._segments3d[0][0][2]]))
    assert np.allclose(ways[k]._segments3d[-1][1][:2], [0, 0.8])
    rest = np.concatenate([np.reshape(piece, (-1, 3)) for net in nets if net not in ways for piece in net._segments3d])
    on = np.linalg.norm(rest, axis=1) if surface == "sphere" else np.hypot(rest[:, 0], rest[:, 1]) - rest[:, 2]
    close = np.isclose(on, 1) if surface == "sphere" else np.isclose(on, 0)
    assert close.mean() > 0.95 and len(rest) > 100, "a net of the surface, and of the sphere three sticks"
    assert np.isfinite(everything).all()
    ends = [one for one in axes.collections if isinstance(one, Path3DCollection)]
    places = np.concatenate([np.stack(one._offsets3d, axis=1) for one in ends])
    for k in range(3):
        for turn in (k, k + np.pi / 2):
            assert np.isclose(places[:, :2], 0.8 * np.array([np.cos(turn), np.sin(turn)])).all(axis=1).any(), "start and end"
    assert named(figure)[-2:] == ["start", "end"] and "pale: early, dark: late" in said(figure)


def test_ways_behind_the_sphere_are_faint():
    figure = draw(paths("sphere", count=40))
    ways = [one for one in figure.axes[0].collections if isinstance(one, Line3DCollection) and len(one._segments3d) == 10]
    assert len(ways) == 40
    look = np.array(
        [
            np.cos(np.radians(-58)) * np.cos(np.radians(18)),
            np.sin(np.radians(-58)) * np.cos(np.radians(18)),
            np.sin(np.radians(18)),
        ]
    )
    for way in ways:
        middle = np.mean(way._segments3d, axis=1)
        alpha = np.asarray(way._edgecolor3d if hasattr(way, "_edgecolor3d") else way.get_colors())[:, 3]
        assert ((alpha < 1) == (middle @ look < 0)).all()
    assert "time" in [axes.get_ylabel() for axes in figure.axes], "many ways share one scale of time"


def test_ways_in_the_plane_keep_their_proportions():
    figure = draw(paths("circle"))
    axes = figure.axes[0]
    (circle,) = axes.lines
    assert np.hypot(*circle.get_data()) == pytest.approx(1) and axes.get_aspect() == 1
    ways = [one for one in axes.collections if hasattr(one, "get_segments")]
    drawn = np.concatenate([np.asarray(one.get_segments()).reshape(-1, 2) for one in ways])
    assert len(ways) == 3 and np.hypot(*drawn.T) == pytest.approx(0.8)
    shades = np.asarray(ways[0].get_colors())[:, :3].sum(axis=1)
    assert (np.diff(shades) < 0).all(), "later is darker"
    assert not draw(paths(None)).axes[0].lines


def test_long_steps_on_the_sphere_go_around_it():
    """A quarter of a circle in one step is an arc; short steps and those of the plane stay as they are."""
    rows = [
        ("", "far", 0.0, 1.0, 0.0, 0.0),
        ("", "far", 1.0, 0.0, 1.0, 0.0),
        ("", "near", 0.0, 1.0, 0.0, 0.0),
        ("", "near", 1.0, 0.9, 0.1, 0.0),
    ]
    chart = Paths(pd.DataFrame(rows, columns=["panel", "path", "time", "x", "y", "z"]), "", ("x", "y", "z"), "sphere")
    far, near = ways(chart)[""]
    arc = arced(far)
    assert len(arc.time) > 10 and (np.diff(arc.time) > 0).all() and (arc.time[0], arc.time[-1]) == (0.0, 1.0)
    assert np.linalg.norm(arc.points, axis=1) == pytest.approx(1) and arc.points[-1] == pytest.approx([0, 1, 0])
    assert arc.points[len(arc.time) // 2] == pytest.approx(np.array([1, 1, 0]) / 2**0.5, abs=0.1)
    assert arced(near) is near
    drawn = [
        one
        for one in draw(chart).axes[0].collections
        if isinstance(one, Line3DCollection) and len(one._segments3d) == len(arc.time) - 1
    ]
    assert len(drawn) == 1


def test_shades_of_time_are_even_in_what_moves():
    """Of a point that goes for one unit of time and then rests for nine, most shades tell of the first."""
    rows = [("", "one", t, min(t, 1.0), 0.0, np.nan) for t in np.arange(0, 10.25, 0.25)]
    chart = Paths(pd.DataFrame(rows, columns=["panel", "path", "time", "x", "y", "z"]), "", ("x", "y", "z"))
    time, gone = pace(ways(chart)[""])
    assert gone == pytest.approx(np.minimum(time, 1.0))
    figure = draw(chart)
    colours = next(one for one in figure.axes[0].collections if hasattr(one, "get_segments")).get_colors()
    dark = np.asarray(colours)[:, :3].sum(axis=1)
    assert dark[0] - dark[4] > 5 * (dark[4] - dark[-1]) > 0
    still = replace(chart, frame=chart.frame.assign(x=0.0))
    assert pace(ways(still)[""])[1] == pytest.approx(np.linspace(0, 1, len(time)))


def test_many_settings_are_shaded_by_their_number():
    assert ranks(["beta 10", "beta -0.5", "beta 2", "beta 1e-3"]) == [3, 0, 2, 1]
    assert ranks(["V 2", "beta 1", "V 0"]) == [0, 1, 2] and ranks([]) == [] and ranks(["a", "b 1"]) == [0, 1]
    figure = draw(curves(betas=(20, 3, 5, 7, 9, 11, 13, 15, 17, 1), seeds=1))
    shade = {line.get_ydata()[0] - 1: np.sum(matplotlib_rgb(line)) for line in figure.axes[0].lines if not dashed(line)}
    assert [beta for beta, _ in sorted(shade.items(), key=lambda item: -item[1])] == sorted(shade), "dark is large"


def test_too_many_ways_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drawing, "WAYS", 12)
    chart = paths(None, count=62)
    figure = draw(chart)
    assert len([one for one in figure.axes[0].collections if hasattr(one, "get_segments")]) == 12
    assert "50 ways not drawn" in said(figure)
    chart.frame.loc[chart.frame.index[:3], "x"] = np.nan
    assert f"3 of {len(chart.frame):,} points undefined" in said(draw(chart))


@pytest.mark.parametrize("chart", [curves(), heat(), paths("sphere"), paths("circle")], ids=["curves", "heat", "space", "plane"])
def test_what_is_undefined_throughout_says_so(chart):
    column = "value" if isinstance(chart, Heat) else "y"
    figure = draw(replace(chart, frame=chart.frame.assign(**{column: np.nan})))
    assert any("undefined throughout" in one.get_text() for one in figure.findobj(Text))
    assert "undefined" in said(figure)


@pytest.mark.parametrize("chart", [curves(), heat(), paths("sphere")], ids=["curves", "heat", "paths"])
def test_a_chart_that_is_none_is_refused(chart):
    kind = type(chart).__name__
    with pytest.raises(ValueError, match=f"frame of {kind} is empty"):
        draw(replace(chart, frame=chart.frame[:0]))
    with pytest.raises(ValueError, match=f"frame of {kind} has no column y"):
        draw(replace(chart, frame=chart.frame.drop(columns="y")))
    if isinstance(chart, Heat):
        with pytest.raises(ValueError, match="two values to one cell"):
            draw(replace(chart, frame=pd.concat([chart.frame, chart.frame[:1]])))
    if isinstance(chart, Paths):
        with pytest.raises(ValueError, match="path 'token 0' has no time"):
            draw(replace(chart, frame=chart.frame.assign(time=np.nan)))


@pytest.mark.parametrize(
    "chart", [curves(2), heat(), paths("sphere"), paths("circle", name=HOSTILE)], ids=["curves", "heat", "space", "plane"]
)
def test_equal_charts_give_equal_bytes_and_nothing_is_obeyed(chart, tmp_path: Path):
    hostile = replace(chart, caption=HOSTILE + chart.caption)
    for suffix in (".png", ".svg")[: 1 + isinstance(chart, Paths)]:
        first, second = (figures.save(draw(hostile, HOSTILE), tmp_path / f"{k}{suffix}").read_bytes() for k in range(2))
        assert first == second
    words = said(draw(hostile, HOSTILE))
    assert "<b>$\\frac{$\\u202e\\x00" in words and not re.search("[\u202e\x00]", words)


def test_no_words_lie_over_each_other():
    """The captions, titles and legends of a full figure keep clear of one another and of the edge."""
    long = replace(curves(panels=4, betas=(1, 2, 4)), caption="A caption of many words, " * 9)
    for chart in (long, paths("sphere", panels=2), paths("cone", panels=4), heat()):
        figure = draw(chart, "a title of the run")
        figure.canvas.draw()
        width, height = figure.canvas.get_width_height()
        boxes = [figure._suptitle.get_window_extent(), *(one.get_window_extent() for one in figure.legends)]
        boxes += [axes._left_title.get_window_extent() for axes in figure.axes if axes.get_title(loc="left")]
        for k, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert not any(box.overlaps(other) for other in boxes[:k])
