"""Figures of scenes: what is drawn equals what was staged; what is missing is left out; text of a corpus stays text."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from emformer import figures
from emformer.figures.legible import legible
from emformer.figures.staged import Scene
from emformer.figures.style import KINDS

HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{$",
    "\u202egnp",
    "한국어🐋",
    "\x00",
    "\n\n",
    "  ",
    "&amp;",
    " the",
    "a_b^c",
    "\ud800",
]


def scene(
    prompts: int = 3, length: int = 20, layers: int = 2, heads: int = 3, words: list[str] | None = None, n: int = 40
) -> Scene:
    """A scene of random numbers that any model might have given."""
    draw = np.random.default_rng(0)
    states = [(0, "embed"), *((layer, point) for layer in range(layers) for point in ("attn", "ffn"))]
    s, a, t = len(states), layers, min(length, 16)
    words = words or [f"w{k}" for k in range(9)]
    ids = draw.integers(0, len(words), (prompts, length))
    clusters = draw.integers(0, 8, (s, prompts, length))
    order = np.argsort(clusters[-1].ravel()[:n], kind="stable")
    # tokens gather around three directions
    centres = draw.normal(size=(3, 5))[draw.integers(0, 3, n)]
    x = centres + draw.normal(size=(s, n, 5)) * np.linspace(2, 0.2, s)[:, None, None]
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    cosines = np.clip(x @ x.swapaxes(1, 2), -1, 1)
    merges = np.stack([np.array([np.flatnonzero(row >= 0.9)[0] for row in one]) for one in cosines])
    merges = np.stack([one[one] for one in merges])
    scores = draw.normal(size=(a, heads, t, t)) * 2
    scores[..., ~np.tril(np.ones((t, t), bool))] = np.nan
    pattern = np.exp(np.nan_to_num(scores, nan=-np.inf))
    pattern /= pattern.sum(-1, keepdims=True)
    spectrum = draw.normal(size=(a, heads, 4)) + 1j * draw.normal(size=(a, heads, 4))
    probability = -np.sort(-draw.dirichlet(np.ones(5), (s, t)), -1)
    return Scene(
        title="runs/a, step 7",
        words=[[words[k] for k in row] for row in ids],
        ids=ids,
        classes=draw.integers(-1, 3, ids.shape),
        class_name="word class",
        states=states,
        coords=draw.normal(size=(s, prompts, length, 3)).astype(np.float32),
        basis="some basis",
        explained=np.array([0.4, 0.2, 0.1]),
        clusters=clusters,
        order=order,
        cosine_tokens=np.stack(np.divmod(order, length), -1),
        cosines=cosines.astype(np.float32),
        merges=merges,
        threshold=0.9,
        steps=[(layer, "attn") for layer in range(layers)],
        pattern=pattern.astype(np.float16),
        scores=scores.astype(np.float16),
        beta=np.ones(a),
        leaf_axis=draw.normal(size=(a, t)).astype(np.float32),
        tilt=draw.uniform(0, 2, (a, heads, 4)).astype(np.float32),
        tilt_offsets=np.array([-1, -2, -4, -8]),
        spectra_form=spectrum.astype(np.complex64),
        spectra_content=(2 * spectrum).astype(np.complex64),
        sinks=draw.uniform(size=(a, heads)),
        sink_null=0.2,
        lens_words=[[[words[k] for k in draw.integers(0, len(words), 5)] for _ in range(t)] for _ in range(s)],
        lens_prob=probability.astype(np.float32),
        lens_entropy=draw.uniform(size=(s, t)).astype(np.float32),
    )


ONE = scene()


@functools.cache
def all_of(kind: str) -> dict[str, Figure]:
    return figures.draw_scene(VARIANTS[kind]())


VARIANTS = {
    "usual": lambda: ONE,
    "hostile": lambda: replace(scene(words=HOSTILE), title="<b>$x$\u202e\n</b>", class_name="$c$"),
    "deep": lambda: scene(prompts=1, length=30, layers=24, heads=32, n=30),
    "tiny": lambda: scene(prompts=1, length=2, layers=1, heads=1, n=2),
}


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def dots(axes: Axes) -> np.ndarray:
    """(points, 2), sorted: of everything scattered."""
    found = np.concatenate([one.get_offsets() for one in axes.collections if isinstance(one, PathCollection)])
    return found[np.lexsort(found.T)]


def ordered(xy: np.ndarray) -> np.ndarray:
    xy = xy.reshape(-1, 2).astype(float)
    return xy[np.lexsort(xy.T)]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize("by", ["cluster", "class", "token", "position"])
def test_the_cloud_is_that_of_the_scene(by):
    figure = figures.cloud(ONE, by=by)
    assert len(panels(figure)) == 5
    limits = {axes.get_xlim() + axes.get_ylim() for axes in panels(figure)}
    assert len(limits) == 1, "one scale for all states"
    for axes, state in zip(panels(figure), ONE.coords, strict=True):
        np.testing.assert_allclose(dots(axes), ordered(state[..., :2]))
    if by == "cluster":
        for k, colour in enumerate(KINDS):
            (here,) = [one for one in panels(figure)[2].collections if matches(one, colour[0])]
            np.testing.assert_allclose(ordered(here.get_offsets()), ordered(ONE.coords[2][ONE.clusters[2] == k][:, :2]))
    if by == "class":
        sizes = np.bincount(ONE.classes[ONE.classes >= 0])
        largest = int(sizes.argmax())
        (here,) = [one for one in panels(figure)[0].collections if matches(one, KINDS[0][0])]
        np.testing.assert_allclose(ordered(here.get_offsets()), ordered(ONE.coords[0][ONE.classes == largest][:, :2]))
        assert f"word class {largest}" in words(figure) and "others" in words(figure)
    if by == "position":
        (here,) = panels(figure)[0].collections
        np.testing.assert_allclose(here.get_offsets(), ONE.coords[0, ..., :2].reshape(-1, 2))
        shades = here.get_facecolors()[:20, :3].sum(1)
        assert (np.diff(shades) < 0).all(), "later tokens are darker"
    assert "PC 1 (40 %)" in words(figure) and figure.get_suptitle().endswith("\nruns/a, step 7, n = 3 prompts of 20 tokens")


def matches(collection: PathCollection, colour: str) -> bool:
    from matplotlib.colors import to_rgb

    return len(collection.get_facecolors()) > 0 and np.allclose(collection.get_facecolors()[0][:3], to_rgb(colour))


def test_the_cloud_of_chosen_states():
    figure = figures.cloud(ONE, states=[4, 0])
    titles = [axes.get_title(loc="left") for axes in panels(figure)]
    assert titles == ["layer 1 after the FFN", "X⁰, embedded"]
    np.testing.assert_allclose(dots(panels(figure)[0]), ordered(ONE.coords[4, ..., :2]))
    for states in ([], [5], [-1]):
        with pytest.raises(ValueError, match="states are places 0 … 4"):
            figures.cloud(ONE, states=states)


def test_trajectories_are_the_paths_of_tokens():
    figure = figures.trajectories(ONE, [(0, 3), (2, 19)])
    (axes,) = panels(figure)
    whole = [line.get_xydata() for line in axes.lines if line.get_linestyle() == "-"]
    np.testing.assert_allclose(whole, [ONE.coords[:, 0, 3, :2], ONE.coords[:, 2, 19, :2]])
    np.testing.assert_allclose(dots(axes), ordered(ONE.coords[-1, ..., :2]))
    assert f"“{ONE.words[2][19]}”  2:19" in words(figure)
    names = [text for text in axes.texts if "”" in text.get_text()]
    assert {tuple(text.xy) for text in names} == {tuple(ONE.coords[-1, 0, 3, :2]), tuple(ONE.coords[-1, 2, 19, :2])}
    with pytest.raises(ValueError, match="below \\(3, 20\\)"):
        figures.trajectories(ONE, [(3, 0)])
    chosen = [text.get_text() for text in panels(figures.trajectories(ONE))[0].texts]
    ends = ONE.clusters[-1, 0]
    assert {int(name.rpartition(":")[2]) for name in chosen} == {int(np.flatnonzero(ends == k)[-1]) for k in set(ends)}
    lost = ONE.coords.copy()
    lost[1, 0, 3] = np.nan
    assert len([line for line in panels(figures.trajectories(replace(ONE, coords=lost), [(0, 3), (0, 4)]))[0].texts]) == 1
    assert figures.trajectories(replace(ONE, coords=lost), [(0, 3)]) is None


def test_cosine_matrices_are_those_of_the_scene():
    figure = figures.cosine_matrices(ONE)
    for axes, one in zip(panels(figure), ONE.cosines, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), one)
        assert axes.images[0].norm.vmin == -1 and axes.images[0].norm.vmax == 1
        last = ONE.clusters[-1].ravel()[ONE.order]
        bounds = sorted({line.get_ydata()[0] for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[1]})
        assert bounds == (np.flatnonzero(np.diff(last)) + 0.5).tolist()
    lost = ONE.cosines.copy()
    lost[0, 2] = np.nan
    image = panels(figures.cosine_matrices(replace(ONE, cosines=lost)))[0].images[0]
    assert np.ma.getmaskarray(image.get_array())[2].all(), "undefined is grey, not a number"


def test_merges_bundle_what_is_one_piece():
    figure = figures.merges(ONE)
    (axes,) = panels(figure)
    (lines,) = [one for one in axes.collections if isinstance(one, LineCollection)]
    paths = np.array(lines.get_segments())
    n, states = len(ONE.order), len(ONE.states)
    assert len(paths) == n and sorted(paths[:, 0, 1]) == list(range(n)), "each token starts on a line of its own"
    for state, pieces in enumerate(ONE.merges):
        here = paths[0, :, 0] == state
        heights = paths[:, here, 1][:, 0]
        for i in range(n):
            together = pieces == pieces[i]
            assert np.allclose(heights[together], paths[together, 0, 1].mean())
    # what ends together stands together
    ends = ONE.merges[-1][np.argsort(paths[:, 0, 1])]
    assert len(set(ends)) == 1 + (np.diff(ends) != 0).sum()
    sizes = [int(text.get_text()) for text in axes.texts]
    expected = [count for pieces in ONE.merges for count in np.unique(pieces, return_counts=True)[1] if count >= 5]
    assert sizes == expected and expected
    first, last = (len(set(ONE.merges[k])) for k in (0, -1))
    assert axes.get_title(loc="left") == f"pieces of the graph cos ≥ 0.9: {first} at X⁰, {last} at the last state"
    assert states == 5


def test_attention_and_its_leaves_are_those_of_the_scene():
    figure = figures.attention(ONE, layer=1, head=2, query=10)
    pattern, leaves, tilt = panels(figure)
    np.testing.assert_array_equal(pattern.images[0].get_array(), ONE.pattern[1, 2].astype(float))
    (frame,) = pattern.patches
    assert (frame.get_y(), frame.get_height(), frame.get_x(), frame.get_width()) == (9.5, 1, -0.5, 16)
    expected = np.stack([ONE.scores[1, 2, 10, :11], ONE.leaf_axis[1, :11]], 1)
    np.testing.assert_allclose(dots(leaves), ordered(expected))
    sizes = np.concatenate([one.get_sizes() for one in leaves.collections])
    weight = (sizes - 12) / 320
    np.testing.assert_allclose(sorted(weight), sorted(ONE.pattern[1, 2, 10, :11].astype(float)), atol=1e-6)
    (own,) = [one for one in leaves.collections if len(one.get_offsets()) == 1]
    np.testing.assert_allclose(own.get_offsets()[0], expected[10])
    lines = np.array([line.get_xdata()[0] for line in leaves.lines])
    np.testing.assert_allclose(np.diff(lines), 1.0, err_msg="a nat at beta = 1")
    (blue,) = [line for line in tilt.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(blue.get_xdata(), [0, 1, 2, 4, 8])
    np.testing.assert_allclose(blue.get_ydata(), np.degrees([0, *ONE.tilt[1, 2]]), rtol=1e-6)
    assert "layer 1, head 2" in figure.get_suptitle() and f"“{ONE.words[0][10]}” at position 10" in figure.get_suptitle()
    warm = replace(ONE, beta=np.full(2, 0.5))
    lines = [line.get_xdata()[0] for line in panels(figures.attention(warm, 1, 2, 10))[1].lines]
    np.testing.assert_allclose(np.diff(lines), 2.0, err_msg="a nat at beta = 1/2")


def test_attention_without_what_it_needs():
    flat = replace(ONE, tilt=np.full_like(ONE.tilt, np.nan))
    assert len(panels(figures.attention(flat))) == 2
    unscored = replace(ONE, scores=np.full_like(ONE.scores, np.nan))
    assert "no leaves" in " ".join(words(figures.attention(unscored)))
    for choice in ({"layer": 2}, {"head": 3}, {"query": 16}, {"head": -1}):
        with pytest.raises(ValueError, match=r"layers \[0, 1\]|tokens 0 … 15"):
            figures.attention(ONE, **choice)


def test_the_head_that_is_shown_is_sharp_and_no_sink():
    sharp = ONE.pattern.copy()
    sharp[0, 1] = np.eye(16)
    sharp[1, 0] = 0
    sharp[1, 0, :, 0] = 1
    sinks = np.full((2, 3), 0.1)
    sinks[1, 0] = 1.0
    assert "layer 0, head 1" in figures.attention(replace(ONE, pattern=sharp, sinks=sinks)).get_suptitle()
    assert "layer 1, head" in figures.attention(replace(ONE, pattern=sharp, sinks=sinks), layer=1).get_suptitle()
    assert "layer 1, head 0" not in figures.attention(replace(ONE, pattern=sharp, sinks=sinks), layer=1).get_suptitle()


def test_sinks_and_spectra_are_those_of_the_scene():
    (axes,) = panels(figures.sink_map(ONE))
    np.testing.assert_array_equal(axes.images[0].get_array(), ONE.sinks)
    assert axes.get_title(loc="left") == "weight on the first token (uniform attention: 0.2)"
    assert figures.sink_map(replace(ONE, sinks=np.full_like(ONE.sinks, np.nan))) is None
    values = ONE.spectra_form.copy()
    values[1, :, 3:] = np.nan
    both = panels(figures.spectra(replace(ONE, spectra_form=values)))
    for axes, own in zip(both, (values, ONE.spectra_content), strict=True):
        known = own[np.isfinite(own)]
        np.testing.assert_allclose(dots(axes), ordered(np.stack([known.real, known.imag], 1)), rtol=1e-6)
        share = known.real.clip(min=0).sum() / np.abs(known.real).sum()
        assert axes.get_title(loc="right") == f"Re λ > 0: {100 * share:.0f} % of Σ|Re λ|"
        assert axes.get_xlim() == axes.get_ylim()
    nothing = np.full_like(values, np.nan)
    assert len(panels(figures.spectra(replace(ONE, spectra_form=nothing)))) == 1
    assert figures.spectra(replace(ONE, spectra_form=nothing, spectra_content=nothing)) is None


def test_the_lens_is_that_of_the_scene():
    (axes,) = panels(figures.lens(ONE, first=2))
    np.testing.assert_array_equal(axes.images[0].get_array(), ONE.lens_prob[:, 2:13, 0].astype(float))
    cells = {(round(text.get_position()[1]), round(text.get_position()[0])): text for text in axes.texts}
    for state in range(5):
        for column in range(11):
            text, word = cells[state, column], ONE.lens_words[state][2 + column][0]
            assert text.get_text() == word
            assert (text.get_weight() == "bold") == (word == ONE.lens_words[-1][2 + column][0])
    assert axes.get_xticklabels()[0].get_text() == f"{ONE.words[0][2]}\n2"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["X⁰", "0a", "0f", "1a", "1f"]
    with pytest.raises(ValueError, match="tokens 0 … 15"):
        figures.lens(ONE, first=16)
    assert figures.lens(replace(ONE, lens_prob=np.full_like(ONE.lens_prob, np.nan))) is None


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_figure_of_every_scene_keeps_inside_its_canvas(kind):
    expected = set(figures.SCENES)
    assert set(all_of(kind)) == expected
    for name, figure in all_of(kind).items():
        figure.canvas.draw()
        canvas = figure.bbox.padded(2)
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text() and not text.get_clip_on():
                box = text.get_window_extent()
                assert canvas.contains(*box.min) and canvas.contains(*box.max), (name, text.get_text())


def test_what_is_missing_is_left_out():
    bare = replace(ONE, classes=None, class_name="")
    assert set(figures.SCENES) - set(figures.draw_scene(bare)) == {"cloud_classes"}
    lost = replace(ONE, coords=np.full_like(ONE.coords, np.nan))
    for name in ("cloud", "cloud_classes", "cloud_positions", "trajectories"):
        assert figures.SCENES[name](lost) is None


def test_text_of_a_corpus_stays_text(tmp_path):
    """Nothing is parsed as a formula or as markup, nothing lacks a glyph, and nothing turns the direction of writing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, figure in figures.draw_scene(VARIANTS["hostile"]()).items():
            for suffix in (".pdf", ".html"):
                figures.save(figure, tmp_path / f"{name}{suffix}")
            page = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
            assert "<script" not in page and "\u202e" not in page and "<b>" not in page
            assert not any(ord(character) < 32 and character != "\n" for character in page)
    assert "$\\frac{$" in words(all_of("hostile")["lens"])
    assert legible("\u202egnp\x00") == "\\u202egnp\\x00"
    assert legible("a\nb\tc") == "a↵b⇥c" and legible("   ") == "␣␣␣" and legible(" a ") == " a "
    assert legible("한🐋\xa0\u2028\ud800") == "□□\\xa0\\u2028\\ud800"
    assert legible("abcdef", 6) == "abcdef" and legible("abcdefg", 6) == "abcde…" and len(legible("\u202e" * 9, 6)) == 6
    assert legible("$x^2$ <b>") == "$x^2$ <b>"


def test_pages_are_whole_and_need_nothing(tmp_path):
    figure = figures.sink_map(replace(ONE, title="a <i>"))
    page = figures.save(figure, tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("<svg") == page.count("</svg>") == 1
    assert "default-src 'none'" in page and "<title>Attention sinks by layer and head</title>" in page
    addresses = {part.split('"')[0] for part in page.split("http")[1:]}
    assert addresses == {"-equiv=", "://www.w3.org/2000/svg", "://www.w3.org/1999/xlink"}, "names, nothing to load"
    assert figures.save(figures.sink_map(replace(ONE, title="a <i>")), tmp_path / "b.html").read_text(encoding="utf-8") == page
    one, two = (figures.svg(figure, name) for name in ("one", "two"))
    ids = [set(part.split('"')[0] for part in text.split(' id="')[1:]) for text in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    used = {part.split('"')[0] for part in one.split('href="#')[1:]} | {part.split(")")[0] for part in one.split("url(#")[1:]}
    assert used and used <= ids[0], "what refers to an id still finds it"


def test_a_notebook_shows_figures():
    for figure in (figures.sink_map(ONE), figures.cloud(ONE)):
        picture = figure._repr_png_()
        assert picture.startswith(b"\x89PNG")
        size = [int.from_bytes(picture[k : k + 4], "big") for k in (16, 20)]
        assert size == [round(side * figure.dpi) for side in figure.get_size_inches()]


def test_equal_scenes_give_equal_bytes(tmp_path):
    for name, once in all_of("usual").items():
        both = once, figures.SCENES[name](scene())
        contents = [figures.save(figure, tmp_path / f"{name}{k}.png").read_bytes() for k, figure in enumerate(both)]
        assert contents[0] == contents[1], name
