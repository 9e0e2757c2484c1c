"""Figures: what is drawn equals what is in the frame; what is missing or undefined is said; files are exact and atomic."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Iterable

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from emformer import figures
from emformer.observables import COLUMNS
from emformer.observables.frame import conform

STEPS = (0, 1, 5, 20, 80, 300)
# what each figure is made of, one panel a line; without all of them there is no figure
PANELS = {
    "sawtooth": [("geo.id_twonn", "raw"), ("geo.id_twonn", "read")],
    "flow": [("flow.speed_rel", "raw"), ("flow.angular", "read"), ("flow.interference", "raw"), ("flow.head_cancel", "raw")],
    "cosines": [("clu.mean_cos", "raw"), ("clu.mean_cos_centred", "centred")],
    "separation": [("clu.wt_ratio", "raw")],
    "clusters": [("clu.components", "raw"), ("clu.silhouette", "raw")],
    "energy": [("attn.entropy_norm", "raw"), ("attn.sink_rate", "raw")],
}
OVER_TRAINING = ("breathing", "motion")  # of several steps; see test_over_training
Z = 1.96


def records(
    depth: int = 4, heads: int = 4, steps: Iterable[int] = STEPS, parallel: bool = False, run: str | None = "runs/default"
):
    """A frame like that of a run that learns: sublayers breathe, tokens gather, classes come apart, more so with training."""
    steps = list(steps)
    draw = np.random.default_rng(0)
    moves = [(layer, point) for layer in range(depth) for point in (("block",) if parallel else ("attn", "ffn"))]
    states = [(0, "embed"), *moves]
    rows = []

    def add(step, place, key, mean, se=0.01, null=None, null_sd=None, head=None, cloud="raw", param=None, n=64):
        row = (step, *place, head, key, cloud, param, mean, se * math.sqrt(n), se, n, 0, null, null_sd)
        rows.append(dict(zip(COLUMNS, row, strict=True)))

    for step in steps:
        grown = math.log1p(step) / math.log1p(max(*steps, 1))
        for cloud, scale in (("raw", 1.0), ("read", 0.9)):
            for order in ("text", "shuffled") if step == steps[-1] else ("text",):
                lift = grown * (0.2 if order == "shuffled" else 1.0)
                for k, place in enumerate(states):
                    tooth = 1.6 * lift * (place[1] == "attn") + 0.4 * lift * k / len(states)
                    d = scale * (14 - 5 * grown * k / len(states) + tooth) + draw.normal(0, 0.2)
                    add(step, place, "geo.id_twonn", d, d / 32, cloud=cloud, param=None if order == "text" else order, n=1000)
            for layer in range(depth if not parallel else 0):
                up = grown * 0.11 + draw.normal(0, 0.02)
                counts = float(step > 5 and up > 0.11)
                add(step, (layer, "attn"), "breath.counts_attn", counts, math.nan, 0.05, cloud=cloud, n=1000)
                add(step, (layer, "ffn"), "breath.counts_mlp", 1.0, math.nan, 0.05, cloud=cloud, n=1000)
            for order in ("text", "shuffled") if step == steps[-1] else ("text",):
                words = ["parallel"] * parallel + ["shuffled"] * (order == "shuffled")
                whole = {"cloud": cloud, "param": " ".join(words) or None, "n": depth}
                share = 0.25 + 0.5 * (step > 5) - 0.25 * (order == "shuffled")
                add(step, (None, None), "breath.sawtooth", share, math.nan, 0.25, **whole)
                add(step, (None, None), "breath.p_value", 0.051, math.nan, **whole)
        for k, (layer, point) in enumerate(moves):
            kind = 1.0 if point == "attn" else 1.4
            place = (layer, point)
            speed = kind * (0.3 + 0.5 * grown) / (1 + layer) ** (0.3 + 0.2 * grown)
            add(step, place, "flow.speed_rel", speed, 0.01)
            add(step, place, "flow.angular", math.atan(speed) + draw.normal(0, 0.01), 0.01, cloud="read")
            add(
                step,
                place,
                "flow.interference",
                0.4 * grown * (k / len(moves) - 0.4) + draw.normal(0, 0.01),
                0.01,
                0.0,
                128**-0.5 / 8,
            )
            if point != "ffn":
                add(step, place, "flow.head_cancel", 0.5 - 0.25 * grown + draw.normal(0, 0.02), 0.01, 1 - heads**-0.5)
                for head in range(heads):
                    own = {"head": head, "n": 64}
                    spread = np.clip(0.98 - grown * draw.uniform(0, 0.7), 0, 1)
                    add(step, place, "attn.entropy_norm", float(spread), 0.01, 1.0, **own)
                    sink = grown * (head == layer % heads) * draw.uniform(0.3, 0.9) + draw.uniform(0, 0.02)
                    add(step, place, "attn.sink_rate", sink, 0.01, 0.0, param="k=1", **own)
        for k, place in enumerate(states):
            share = k / (len(states) - 1)
            add(step, place, "clu.mean_cos", grown * (0.1 + 0.6 * share**1.5) + draw.normal(0, 0.01), 0.01, 0.0)
            add(step, place, "clu.mean_cos_centred", -1 / 63 + draw.normal(0, 0.003), 0.001, -1 / 63, cloud="centred")
            for c, power in (("c=0.9", 1.0), ("c=0.99", 0.5), ("c=0.999", 0.15)):
                count = 64 * (1 - 0.97 * grown * share) ** power
                add(step, place, "clu.components", max(1.0, count), 0.5, 64.0, param=c)
            add(step, place, "clu.silhouette", 0.04 + 0.3 * grown * share, 0.01, 0.0, n=512)
            for label, gain in (("label=class", 0.6), ("label=token", 0.4)):
                base = 0.985 if label == "label=class" else 0.9
                add(step, place, "clu.wt_ratio", base - gain * grown * share, 0.008, base, 0.004, param=label, n=512)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame if run is None else frame.assign(run=run)


FULL = records()
KINDS = {
    "full": lambda: conform(FULL.sample(frac=1, random_state=0)).assign(run="runs/default"),  # nullable, and in no order
    "undefined": lambda: records(depth=1, heads=1, steps=[300], run=None).assign(mean=None, se=None, null=None),
    "parallel": lambda: records(parallel=True),
    "deep": lambda: conform(records(depth=24, heads=16, steps=[0]).assign(step=None)),  # of no training
}
STATES = ["X⁰", "0a", "0f", "1a", "1f", "2a", "2f", "3a", "3f"]


def column(key, step=None, cloud="raw", param=None, name="mean", frame=FULL, **where):
    """Numbers of a frame in its own order, which is that of the flow."""
    rows = frame[(frame["key"] == key) & (frame["cloud"] == cloud)]
    rows = rows[rows["param"].isna() if param is None else rows["param"] == param]
    for one, value in ({} if step is None else {"step": step} | where).items():
        rows = rows[rows[one] == value]
    return rows[name].to_numpy(float)


@functools.cache
def all_of(kind: str) -> dict[str, Figure]:
    return figures.draw_all(KINDS[kind]())


def panels(figure: Figure) -> list[Axes]:
    """The axes that are no colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def curves(axes: Axes) -> list[np.ndarray]:
    """(points, 2): every line that was plotted over data, but for intervals."""
    return [line.get_xydata() for line in axes.lines if line.get_transform() == axes.transData]


def drawn(axes: Axes, y: np.ndarray) -> bool:
    """Whether some line has just these heights."""
    return any(len(xy) == len(y) and np.allclose(xy[:, 1], y, rtol=1e-12, equal_nan=True) for xy in curves(axes))


def intervals(axes: Axes, container: int) -> np.ndarray:
    """(points, 2): lower and upper ends of error bars."""
    return np.array([part[:, 1] for part in axes.containers[container].lines[2][0].get_segments()])


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_sawtooth_is_that_of_the_frame():
    figure = all_of("full")["sawtooth"]
    assert len(panels(figure)) == 2
    for axes, cloud in zip(panels(figure), ("raw", "read"), strict=True):
        y, se = (column("geo.id_twonn", 300, cloud, name=name) for name in ("mean", "se"))
        assert drawn(axes, y)
        np.testing.assert_allclose(intervals(axes, 0), np.stack([y - Z * se, y + Z * se], 1))
        assert drawn(axes, column("geo.id_twonn", 0, cloud)), "the untrained model"
        assert drawn(axes, column("geo.id_twonn", 300, cloud, "shuffled")), "the shuffled prompts"
        # triangles: where they point, and whether they are full
        attn, mlp = (column(f"breath.counts_{name}", 300, cloud) for name in ("attn", "mlp"))
        sure = np.concatenate([[True], np.stack([attn, mlp], 1).ravel() > 0])
        assert 0 < sure.sum() < len(sure)
        rises = np.diff(y, prepend=y[0])
        for marker, moved in (("^", rises > 0), ("v", rises < 0)):
            for full in (True, False):
                shown = [
                    set(line.get_xdata())
                    for line in axes.lines
                    if line.get_marker() == marker and (line.get_markerfacecolor() != "white") == full
                ]
                assert set().union(*shown) == set(np.flatnonzero(moved & (sure == full)))
    assert panels(figure)[0].get_title(loc="left") == (
        "raw stream: sawtooth 0.75 (null 0.25, p = 0.051), untrained 0.25, shuffled 0.50"
    )
    assert [tick.get_text() for tick in panels(figure)[1].get_xticklabels()] == STATES
    assert figure.get_suptitle().endswith("\ndefault, step 300, n = 1000 prompts")
    for name in ("step 300", "untrained (step 0)", "shuffled prompts", "attention step", "FFN step"):
        assert name in words(figure)


def test_the_sawtooth_of_an_earlier_step():
    figure = figures.sawtooth(FULL, step=5)
    assert drawn(panels(figure)[0], column("geo.id_twonn", 5))
    assert not drawn(panels(figure)[0], column("geo.id_twonn", 300))
    assert "shuffled prompts" not in words(figure), "they were recorded later"
    assert figures.sawtooth(FULL, step=7) is None


def test_undefined_states_are_gaps_and_counted():
    frame = FULL.copy()
    lost = (frame["key"] == "geo.id_twonn") & (frame["step"] == 300) & (frame["layer"] == 1) & (frame["point"] == "ffn")
    frame.loc[lost & frame["param"].isna(), "mean"] = math.nan
    axes = panels(figures.sawtooth(frame))[0]
    y = column("geo.id_twonn", 300, frame=frame)
    assert np.flatnonzero(np.isnan(y)).tolist() == [4]
    assert drawn(axes, y)
    assert axes.get_title(loc="right") == "1 of 9 states undefined"
    crosses = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "x"]
    assert crosses == [[4]]
    pointing = {k for line in axes.lines if line.get_marker() in "^v" for k in line.get_xdata()}
    assert not pointing & {0, 4, 5}, "whether it rose or fell from an undefined state is not known"


def test_the_flow_is_that_of_the_frame():
    figure = all_of("full")["flow"]
    for axes, (key, cloud) in zip(panels(figure), PANELS["flow"], strict=True):
        factor = 180 / math.pi if key == "flow.angular" else 1.0
        points = ("attn",) if key == "flow.head_cancel" else ("attn", "ffn")
        for point, step in itertools.product(points, STEPS):
            assert drawn(axes, factor * column(key, step, cloud, point=point)), (key, point, step)
        for k, point in enumerate(points):
            y, se = (factor * column(key, 300, cloud, name=name, point=point) for name in ("mean", "se"))
            np.testing.assert_allclose(intervals(axes, k), np.stack([y - Z * se, y + Z * se], 1))
        dashed = [line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"]
        null = {"flow.interference": 0.0, "flow.head_cancel": 0.5}.get(key)
        assert len(dashed) == (0 if null is None else len(points))
        assert all((line == null).all() for line in dashed)
    band = panels(figure)[2].collections
    half = Z * 128**-0.5 / 8
    ends = [c.get_datalim(panels(figure)[2].transData).intervaly for c in band if "Poly" in type(c).__name__]
    assert any(np.allclose(end, (-half, half)) for end in ends), "± 1.96 of the null's standard deviation"
    colours = [line.get_color() for line in panels(figure)[0].lines if line.get_marker() == "o"]
    assert len(set(colours[: len(STEPS)])) == len(STEPS)
    assert "degrees" in words(figure) and figure.get_suptitle().endswith("\ndefault, steps 0 to 300, n = 64 prompts")


def test_cosines_are_those_of_the_frame():
    figure = all_of("full")["cosines"]
    for axes, (key, cloud), end in zip(panels(figure), PANELS["cosines"], (1.0, 0.1), strict=True):
        image = axes.images[0]
        np.testing.assert_array_equal(image.get_array(), np.stack([column(key, step, cloud) for step in STEPS], 1))
        assert (image.norm.vmin, image.norm.vmax) == (-end, end)
        assert axes.transData.transform((0, 0))[1] < axes.transData.transform((0, 1))[1], "X⁰ is at the bottom"
        assert [float(text.get_text().replace("−", "-")) for text in axes.texts] == image.get_array().round(2).ravel().tolist()
    assert "(by chance −0.016)" in words(figure)
    assert [tick.get_text() for tick in panels(figure)[0].get_yticklabels()] == STATES
    assert [tick.get_text() for tick in panels(figure)[0].get_xticklabels()] == [str(step) for step in STEPS]


def test_separation_is_that_of_the_frame():
    token = FULL[FULL["param"] != "label=class"]
    for frame, label, name, null in ((FULL, "label=class", "class", 0.985), (token, "label=token", "token id", 0.9)):
        (axes,) = panels(figure := figures.separation(frame))
        assert all(drawn(axes, column("clu.wt_ratio", step, param=label)) for step in STEPS)
        assert name in figure.get_suptitle()
        assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [null]
        assert "lower: better separated" in axes.get_ylabel()


def test_clusters_are_those_of_the_frame():
    counts, quality = panels(all_of("full")["clusters"])
    for c, step in itertools.product(("c=0.9", "c=0.99", "c=0.999"), (0, 300)):
        assert drawn(counts, column("clu.components", step, param=c))
    assert counts.get_yscale() == "log"
    assert all(drawn(quality, column("clu.silhouette", step)) for step in (0, 300))
    assert drawn(counts, np.full(9, 64.0)) and drawn(quality, np.zeros(9)), "nulls"
    # what is measured at the end only stands beside it, with its step where that is another
    more = FULL[(FULL["key"] == "clu.silhouette") & (FULL["step"] == 80)].assign(key="clu.density_silhouette")
    figure = figures.clusters(pd.concat([FULL, more]))
    assert "HDBSCAN (step 80)" in words(figure) and drawn(panels(figure)[1], more["mean"].to_numpy())


def test_energy_is_that_of_the_frame():
    figure = all_of("full")["energy"]
    for axes, key, param in zip(panels(figure), ("attn.entropy_norm", "attn.sink_rate"), (None, "k=1"), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), column(key, 300, param=param).reshape(4, 4))
    titles = [axes.get_title(loc="left") for axes in panels(figure)]
    assert titles == ["entropy of the pattern (uniform attention: 1)", "sink rate, k=1 (uniform attention: 0)"]


def test_what_is_missing_is_left_out():
    assert figures.draw_all(pd.DataFrame()) == {} == figures.draw_all(FULL[:0])
    assert list(figures.FIGURES) == [*PANELS, *OVER_TRAINING]
    small = records(depth=1, heads=2, steps=[0])
    for name, made_of in PANELS.items():
        here = [(small["key"] == key) & (small["cloud"] == cloud) for key, cloud in made_of]
        assert figures.FIGURES[name](small[~np.any(here, 0)]) is None
        for one in here if len(here) > 1 else ():
            assert len(panels(figures.FIGURES[name](small[~one]))) == len(made_of) - 1
    assert list(figures.draw_all(small[small["key"] == "clu.wt_ratio"])) == ["separation"]
    assert figures.energy(small[small["head"].isna()]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_of_every_frame_keeps_inside_its_canvas(kind):
    assert set(all_of(kind)) - {*OVER_TRAINING} == set(PANELS)
    for name, figure in all_of(kind).items():
        if kind == "undefined":
            figure.canvas.draw()
        canvas = figure.bbox.padded(1)
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text() and not text.get_clip_on():
                box = text.get_window_extent()
                assert canvas.contains(*box.min) and canvas.contains(*box.max), (name, text.get_text())
        assert figure.bbox.width == pytest.approx(902)


def test_what_frames_of_other_kinds_say():
    assert all("\nstep 300" in figure.get_suptitle() for figure in all_of("undefined").values())
    for figure in all_of("deep").values():
        assert "step 0" not in words(figure), "rows of no training"
    assert all("undefined" in words(figure) for figure in all_of("undefined").values())
    assert np.ma.getmaskarray(panels(all_of("undefined")["cosines"])[0].images[0].get_array()).all()
    parallel = words(all_of("parallel")["sawtooth"])
    assert "sawtooth of the halves 0.75 (null 0.25, p = 0.051), untrained 0.25, shuffled 0.50" in parallel
    assert "b after a block" in parallel and "attention step" not in parallel


def test_several_runs_are_refused():
    both = pd.concat([FULL, FULL.assign(run="runs/other")])
    for draw in (figures.draw_all, *figures.FIGURES.values()):
        with pytest.raises(ValueError, match="one run, and the frame holds several"):
            draw(both)
    with pytest.raises(ValueError, match="'seed'"):
        figures.flow(pd.concat([FULL.assign(seed=0), FULL.assign(seed=1)]))


def test_files_are_exact_and_whole(tmp_path, monkeypatch):
    before = dict(matplotlib.rcParams)
    once, again = figures.separation(FULL), figures.separation(FULL.sample(frac=1, random_state=0))
    for suffix, head in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = figures.save(once, tmp_path / f"a{suffix}")
        assert path.read_bytes().startswith(head)
        assert figures.save(again, tmp_path / f"b{suffix}").read_bytes() == path.read_bytes(), suffix
    assert dict(matplotlib.rcParams) == before, "no global setting is changed"
    assert figures.save(once, tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes(), "written again"
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg, \.pdf"):
        figures.save(again, tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError):
        figures.save(again, tmp_path / "none" / "a.png")
    kept = (tmp_path / "a.png").read_bytes()

    def full_disk(self, file, **options):
        with open(file, "wb") as half:
            half.write(b"\x89PNG")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space"):
        figures.save(again, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png", "a.svg", "b.pdf", "b.png", "b.svg"]


def test_nothing_needs_pyplot_or_torch(tmp_path):
    FULL[FULL["key"].isin(["geo.id_twonn", "clu.mean_cos"])].to_json(tmp_path / "rows.json")
    program = f"""
import sys
import pandas as pd
from emformer import figures
for name, figure in figures.draw_all(pd.read_json({str(tmp_path / "rows.json")!r})).items():
    figures.save(figure, {str(tmp_path)!r} + "/" + name + ".png")
print("matplotlib.pyplot" in sys.modules, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert {path.stem for path in tmp_path.glob("*.png")} == {"sawtooth", "cosines"}
