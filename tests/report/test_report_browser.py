"""The page in a real browser: it is quiet, it moves, it is text where text is meant to be, on a desk, a phone and paper."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import model
from pages import HOSTILE, STATES, STEPS, Opened, recorded
from playwright.sync_api import Browser
from scipy import stats

from emformer.block import Parallel
from emformer.ffn import ReLU2
from emformer.figures.scene import Scene, stage
from emformer.kernels import L2, Linear
from emformer.masks import Full
from emformer.observables.frame import catalogue
from emformer.report import write
from emformer.report.text import visible

ALL = {"cloud", "paths", "breathing", "motion", "cosines", "merges", "attention", "sinks", "spectra", "lens", "explorer"}


@pytest.fixture(scope="module")
def file(analysis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(analysis, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def opened(browser: Browser, file: Path) -> Iterator[Opened]:
    """One page for the tests that only look and press; each leaves it usable."""
    found = Opened(browser, file)
    yield found
    found.page.close()


def test_every_figure_is_drawn_and_nothing_is_asked_for(opened: Opened):
    assert set(opened.all_drawn()) == ALL
    assert opened.page.locator(".js-plotly-plot").count() >= len(ALL)
    assert opened.asked == [opened.address]
    assert opened.said == []
    captions = opened.page.eval_on_selector_all("figure figcaption", "all => all.map(one => one.textContent)")
    assert len(captions) == len(ALL) and min(map(len, captions)) > 100


def test_the_slider_moves_the_cloud(opened: Opened, scene: Scene):
    """What plotly holds are the coordinates of the state, to the page's 16 bits."""
    opened.near("cloud")
    close = 1.01 * np.ptp(scene.coords) / (2 * (2**16 - 2))
    for state in (0, 3, len(scene.states) - 1):
        opened.slide("cloud", "state", state)
        goal = scene.coords[state].reshape(-1, 3)
        opened.until(f"Math.abs(document.getElementById('cloud-plot')._fullData[0].x[0] - {goal[0, 0]}) < {close + 1e-9}")
        for axis, name in enumerate("xy"):
            np.testing.assert_allclose(opened.drawn("cloud-plot", name), goal[:, axis], atol=close)
        opened.page.wait_for_timeout(700)  # the points on the screen have arrived too
        at = opened.page.evaluate(
            "[...document.querySelectorAll('#cloud-plot .points path')].map(p => p.getAttribute('transform'))"
        )
        shown = np.array([[float(x) for x in re.findall(r"-?[\d.]+", one)[:2]] for one in at])
        assert np.corrcoef(shown[:, 0], goal[:, 0])[0, 1] > 0.9999 and np.corrcoef(shown[:, 1], goal[:, 1])[0, 1] < -0.9999
        assert f"{state + 1} of {len(scene.states)}" in opened.page.locator("#cloud output").inner_text()
    assert opened.said == []


def test_play_goes_through_the_layers_in_three_dimensions(opened: Opened, scene: Scene):
    opened.near("cloud")
    opened.choose("cloud", "view", "3")
    opened.slide("cloud", "state", len(scene.states) - 2)
    assert opened.page.evaluate("document.getElementById('cloud-plot')._fullData[0].type") == "scatter3d"
    opened.page.locator("#cloud .controls button").click()
    goal, close = scene.coords[-1].reshape(-1, 3), 1.01 * np.ptp(scene.coords) / (2 * (2**16 - 2))
    opened.until(f"Math.abs(document.getElementById('cloud-plot')._fullData[0].z[0] - {goal[0, 2]}) < {close + 1e-9}")
    np.testing.assert_allclose(opened.drawn("cloud-plot", "z"), goal[:, 2], atol=close)
    opened.until("document.querySelector('#cloud .controls button').textContent.includes('play')")  # stopped at the end
    opened.page.locator("#cloud .controls button").click()  # begins anew
    opened.until("document.querySelector('#cloud output').textContent.startsWith('2 of')")
    opened.page.locator("#cloud .controls button").click()
    opened.choose("cloud", "view", "2")
    assert opened.said == []


def test_colours_tell_clusters_words_classes_and_positions(opened: Opened, scene: Scene):
    opened.near("cloud")
    opened.slide("cloud", "state", 2)
    counts = {}
    assert scene.classes is not None
    truths = {"cluster": scene.clusters[2].ravel(), "class": scene.classes.ravel(), "position": np.tile(np.arange(16), 3)}
    for name, truth in truths.items():
        opened.choose("cloud", "colour", name)
        colours = np.array(opened.drawn("cloud-plot", "marker.color"))
        pairs = set(zip(truth.tolist(), colours.tolist(), strict=True))
        counts[name] = len(pairs)
        assert len(pairs) == len(np.unique(truth)) == len(np.unique(colours)), "a colour each"
    assert counts["position"] == 16
    assert opened.page.locator("#cloud .legend span").count() == 0  # a scale instead
    opened.choose("cloud", "colour", "token")
    assert opened.page.locator("#cloud .legend span").count() == 8
    opened.choose("cloud", "colour", "cluster")


def test_selects_change_the_pattern_and_its_leaves(opened: Opened, scene: Scene):
    opened.near("attention")
    seen = []
    for layer, head, query in ((0, 0, 9), (1, 1, 9), (1, 0, 5)):
        opened.choose("attention", "layer", str(layer))
        opened.choose("attention", "head", str(head))
        opened.slide("attention", "query", query)
        weights = np.array(opened.drawn("attention-plot", "customdata"), dtype=float)
        truth = scene.pattern[layer, head].astype(float)
        visible_ = np.tril(np.ones_like(truth, bool))
        np.testing.assert_allclose(weights[visible_], truth[visible_], atol=1e-4)
        assert np.isnan(weights[~visible_]).all(), "what the mask hides is empty"
        leaves = opened.drawn("attention-leaves", "x")
        np.testing.assert_allclose(leaves, scene.scores[layer, head, query, : query + 1].astype(float), atol=1e-3)
        np.testing.assert_allclose(
            opened.drawn("attention-leaves", "y"), scene.leaf_axis[layer, : query + 1], rtol=1e-4, atol=1e-6
        )
        tilt = opened.drawn("attention-tilt", "y", trace=scene.pattern.shape[1] - 1)  # the chosen head is drawn last
        np.testing.assert_allclose(tilt, np.degrees(scene.tilt[layer, head]), rtol=1e-4)
        seen.append(leaves)
    assert seen[0] != seen[1]


def test_matrices_spectra_and_lens_are_those_of_the_scene(opened: Opened, scene: Scene):
    opened.all_drawn()
    for state in (0, 4):
        opened.slide("cosines", "state", state)
        np.testing.assert_allclose(np.array(opened.drawn("cosines-plot", "z")), scene.cosines[state], atol=0.005)
    opened.choose("spectra", "layer", "1")
    opened.choose("spectra", "head", "1")
    for name, values in (("form", scene.spectra_form), ("content", scene.spectra_content)):
        own = values[1, 1]
        np.testing.assert_allclose(opened.drawn(f"spectra-{name}", "x"), own.real, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(opened.drawn(f"spectra-{name}", "y"), own.imag, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.array(opened.drawn("sinks-plot", "z")), scene.sinks, rtol=1e-4)
    entropy = np.array(opened.drawn("lens-plot", "z"))
    np.testing.assert_allclose(entropy, scene.lens_entropy[:, : entropy.shape[1]], atol=1e-3)
    pieces = opened.page.evaluate("document.getElementById('merges-plot')._fullData.length")
    assert pieces == len(scene.order) + 1


def test_records_are_drawn_by_depth_and_by_training(opened: Opened):
    opened.all_drawn()
    opened.slide("breathing", "training step", 1)
    last = opened.page.evaluate("document.getElementById('breathing-plot')._fullData.length") - 1
    assert opened.drawn("breathing-plot", "y", last) == pytest.approx([2 + 0.1 * k + 0.01 * STEPS[1] for k in range(5)])
    bars = opened.drawn("breathing-plot", "error_y.array", last)
    assert bars == pytest.approx([0.196] * 5)
    opened.choose("explorer", "key", "flow.w2")
    goal = [[2 * (step + 10 * k) for k in range(1, len(STATES))] for step in STEPS]
    assert [opened.drawn("explorer-plot", "y", k) for k in range(len(STEPS))] == goal
    assert opened.drawn("explorer-plot", "y", len(STEPS)) == [1, 1, 1, 1], "the null"
    opened.choose("explorer", "across", "training")
    assert [opened.drawn("explorer-plot", "y", k) for k in range(4)] == np.transpose(goal).tolist()
    assert opened.drawn("explorer-plot", "x", 0) == pytest.approx(np.log10(1 + np.array(STEPS)).tolist(), abs=1e-12)
    opened.choose("motion", "across", "training")
    assert opened.drawn("motion-p0", "y", 0) == [10 + step for step in STEPS]
    meaning = catalogue()["flow.w2"].definition
    assert opened.page.locator("#explorer .meaning").inner_text().endswith(f"{meaning}; n = 64.")
    assert opened.said == []


def test_a_word_pressed_in_the_cloud_is_followed(opened: Opened, scene: Scene):
    opened.all_drawn()
    opened.page.evaluate("document.getElementById('cloud-plot').emit('plotly_click', {points: [{pointNumber: 5}]})")
    word = scene.words[0][5]
    where = [(p, t) for p in range(3) for t in range(16) if scene.words[p][t] == word]
    assert opened.page.evaluate("document.getElementById('paths-plot')._fullData.length") == len(where) == 3
    close = 1.01 * np.ptp(scene.coords) / (2 * (2**16 - 2))
    for trace, (p, t) in enumerate(where):
        np.testing.assert_allclose(opened.drawn("paths-plot", "x", trace), scene.coords[:, p, t, 0], atol=close)


def test_hostile_text_is_text(opened: Opened, scene: Scene):
    """No element came of it, nothing ran, and every word can be read in a hover label as it is."""
    opened.all_drawn()
    page = opened.page
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img, iframe, object, embed, form, a[href^=javascript], [onerror], [onload]").count() == 0
    kinds = page.eval_on_selector_all("script", "all => all.map(one => one.type || 'code')")
    assert kinds.count("code") == 2 and set(kinds) == {"code", "application/json"}
    assert page.evaluate("document.styleSheets[0].ownerNode.textContent.includes('display:none}')") is False
    assert "<script>hacked=1</script>" in page.locator("header").inner_text()
    assert page.locator("#numbers th bdi").evaluate_all("all => all.map(one => one.textContent)").count(HOSTILE[2]) == 1
    for point, word in enumerate(scene.words[0]):
        page.evaluate(f"Plotly.Fx.hover('cloud-plot', [{{curveNumber: 0, pointNumber: {point}}}])")
        label = json.dumps(f"\u2068{visible(word)}\u2069")
        opened.until(f"document.querySelector('#cloud-plot .hoverlayer').textContent.includes({label})")
    page.evaluate("Plotly.Fx.unhover('cloud-plot')")
    assert page.locator("#cloud-plot svg a, #cloud-plot svg script, #cloud-plot svg image").count() == 0
    options = page.locator("#paths select option").all_text_contents()
    assert any("<img src=x onerror=hacked=1>" in one for one in options)
    assert any("⟨U+202E⟩gnp.exe" in one for one in options) and any("␀nul" in one for one in options)
    assert opened.said == [] and opened.asked == [opened.address]


def test_every_number_of_the_table_leads_to_its_meaning(opened: Opened):
    page = opened.page
    captions = page.eval_on_selector_all(
        "figcaption .keys a", "all => all.map(one => [one.textContent, one.getAttribute('href')])"
    )
    assert {"geo.id_twonn", "flow.w2", "sink.mass", "clu.components", "op.asym", "fol.tilt"} <= {text for text, _ in captions}
    assert all(page.locator(f"dt{link}").inner_text().startswith(text) for text, link in captions)
    links = page.eval_on_selector_all("#numbers td a", "all => all.map(one => one.getAttribute('href'))")
    assert len(links) >= 4 * 6
    assert page.evaluate(
        "[...document.querySelectorAll('#numbers td a')].every(one => document.querySelector(one.getAttribute('href')))"
    )
    row = page.locator("#numbers tr", has_text="flow.speed_rel").first
    assert row.locator("td").first.inner_text() == "140" and "64" in row.inner_text()  # step 100, layer 1 ffn
    target = row.locator("a").first.get_attribute("href")
    assert page.locator(target).inner_text().startswith("flow.speed_rel")


def test_a_figure_can_be_saved_and_not_sent(opened: Opened, tmp_path: Path):
    opened.near("sinks")
    assert opened.page.locator(".modebar-btn").count() > 10
    assert opened.page.locator(".modebar-btn[data-title*=hare], .modebar-btn[data-title*=loud]").count() == 0
    with opened.page.expect_download() as download:
        opened.page.locator("#sinks .modebar-btn[data-title='Download plot as a PNG']").dispatch_event("click")
    download.value.save_as(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert opened.said == [] and [one for one in opened.asked if not one.startswith("blob:")] == [opened.address]


def test_the_policy_lets_nothing_in_or_out(browser: Browser, file: Path):
    """Even a script that got into the page could neither run nor reach anything."""
    opened = Opened(browser, file)
    page = opened.page
    assert page.evaluate("fetch('https://example.org').then(() => 'out', () => 'refused')") == "refused"
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}))")
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.org/x.png'}))")
    page.wait_for_timeout(100)
    assert page.evaluate("typeof hacked") == "undefined"
    refused = [one for one in opened.said if "Content Security Policy" in one or "violates" in one]
    assert len(refused) >= 3
    page.close()


@pytest.mark.parametrize(
    ("fields", "shape", "lacks"),
    [
        ({"kernel": L2(), "arrangement": Parallel(), "ffn": ReLU2()}, (1, 2), {"leaves", "tilt"}),  # no scores, no turned keys
        ({"kernel": Linear(), "mask": Full()}, (2, 5), {"tilt", "sinks"}),  # weights of both signs
    ],
    ids=["l2", "linear"],
)
def test_models_without_leaves_or_sinks_show_the_rest(browser: Browser, tmp_path: Path, fields: dict, shape: tuple, lacks: set):
    torch.manual_seed(0)
    staged = stage(model(**fields), None, np.arange(np.prod(shape)).reshape(shape))
    staged.save(tmp_path / "scene.safetensors")
    (tmp_path / "analysis.json").write_text("{}")
    opened = Opened(browser, write(tmp_path))
    drawn = set(opened.all_drawn())
    assert drawn == {"cloud", "paths", "cosines", "merges", "attention", "spectra", "lens"} | ({"sinks"} - lacks)
    assert "Nothing recorded is shown" in opened.page.locator("header").inner_text()
    assert {name for name in ("leaves", "tilt") if not opened.page.locator(f"#attention-{name}").count()} == lacks - {"sinks"}
    opened.slide("attention", "query", 0)
    opened.slide("cloud", "state", len(staged.states) - 1)
    opened.page.wait_for_timeout(700)
    assert opened.said == [] and opened.page.locator("text=cannot be drawn").count() == 0
    opened.page.close()


def test_differences_are_drawn_for_all_keys_and_for_one(browser: Browser, tmp_path: Path):
    folders = [recorded(tmp_path / name, shift) for name, shift in (("a", 0.0), ("b", 0.25), ("c", -1.0))]
    opened = Opened(browser, write(folders, tmp_path / "all.html"), width=390)
    assert opened.all_drawn() == ["forest"]
    opened.choose("forest", "key", "flow.w2")
    for trace, shift in enumerate((0.5, -2.0)):  # twice the shift of the runs
        x, bars = opened.drawn("forest-plot", "x", trace), opened.drawn("forest-plot", "error_x.array", trace)
        assert x == pytest.approx([shift] * 4)
        assert bars == pytest.approx([stats.t.ppf(0.975, 126) * 0.125 * 2**0.5] * 4, rel=1e-3)
    opened.choose("forest", "key", "")
    x, bars = opened.drawn("forest-plot", "x"), opened.drawn("forest-plot", "error_x.array")
    assert bars == [1] * len(bars) and max(x) == pytest.approx(0.5 / (stats.t.ppf(0.975, 126) * 0.125 * 2**0.5), rel=1e-3)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.said == [] and opened.asked == [opened.address]
    opened.page.close()


def test_a_phone_shows_all_without_scrolling_sideways(browser: Browser, file: Path):
    opened = Opened(browser, file, width=390, has_touch=True, is_mobile=True, device_scale_factor=2)
    assert set(opened.all_drawn()) == ALL
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = opened.page.evaluate(
        "[...document.querySelectorAll('.plot')].filter(p => p.getBoundingClientRect().right > 391).length"
    )
    assert wide == 0
    opened.slide("cloud", "state", 2)
    assert opened.page.evaluate("document.getElementById('cloud-plot')._fullLayout.dragmode") is False, "a finger scrolls"
    assert opened.said == [] and opened.asked == [opened.address]
    opened.page.close()


def test_paper_has_every_figure_whole(browser: Browser, file: Path):
    opened = Opened(browser, file)
    sheet = opened.page.pdf(format="A4")
    assert sheet.startswith(b"%PDF")
    left = opened.page.locator("figure[data-figure]:not([data-drawn])").count()
    assert left == 0, "printing draws what the reader had not come near"
    opened.page.emulate_media(media="print")
    assert opened.page.locator(".controls button >> visible=true").count() == 0, "a button does nothing on paper"
    assert opened.page.locator(".controls input >> visible=true").count() == 0 and not opened.page.locator("nav").is_visible()
    assert "1 of 5: X⁰" in opened.page.locator("#cloud .controls").inner_text(), "what is shown is said"
    opened.page.set_viewport_size({"width": 688, "height": 900})  # A4 between its margins
    # a browser goes on printing at once, so all has its size when the event has been handled
    all_ = "[...document.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect())"
    wide = f"{all_}.filter(box => box.right > 688 || box.width < 300)"
    cut = "[...document.querySelectorAll('.plot')].filter(p => p.querySelector('.main-svg').clientHeight > p.clientHeight + 1)"
    assert opened.page.evaluate(f"dispatchEvent(new Event('beforeprint')) && [{wide}.length, {cut}.length]") == [0, 0]
    opened.page.emulate_media(media="screen")
    opened.page.set_viewport_size({"width": 1180, "height": 900})
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    opened.until("document.querySelector('#explorer-plot .main-svg').getBoundingClientRect().width > 900")
    assert opened.said == []
    opened.page.close()
