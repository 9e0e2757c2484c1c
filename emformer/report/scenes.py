"""Sections of a scene: what one model does with a few prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from emformer.figures.scene import Scene
from emformer.report.packing import packed, spread
from emformer.report.section import Section
from emformer.report.text import escaped

# What the arrays of a section may come to, so that the page stays below 6 MB beside plotly's 4.8.
MATRICES = 90_000  # cells of all matrices of cosines: a byte each
PATTERNS = 60_000  # cells of all patterns: four bytes each
FEWEST = 24  # tokens of a pattern, before steps of attention are left out
CLOUDS = 80_000  # coordinates of all states: two bytes each
EIGENVALUES = 3_000
LONGEST = 48  # characters of a word
READINGS = 1_500  # cells of the lens, with five words each
KEYS = ("clu.mean_cos", "clu.components", "sink.mass", "lens.entropy", "lens.agreement", "fol.tilt", "attn.entropy_norm")
KEYS += ("sink.drain", "sink.value_cos", "op.asym", "op.attraction", "op.compat")  # that the captions name
POINTS = {"embed": "as embedded", "attn": "after attention", "ffn": "after the FFN", "block": "after the block"}


def sections(scene: Scene) -> Iterator[Section]:
    """Every section that the scene has the arrays for, in the order of the page. The first carries the words, which the others
    refer to by prompt and position."""
    yield _cloud(scene)
    yield _paths(scene)
    if len(scene.order) > 1:
        yield _cosines(scene)
        yield _merges(scene)
    if scene.steps:
        yield _attention(scene)
        if np.isfinite(scene.sinks).any():
            yield _sinks(scene)
        if np.isfinite(scene.spectra_form).any() or np.isfinite(scene.spectra_content).any():
            yield _spectra(scene)
    if scene.lens_prob.size:
        yield _lens(scene)


def state_names(scene: Scene) -> list[str]:
    """As "X⁰, as embedded" and "layer 3, after attention"."""
    return [f"layer {k}, {POINTS.get(point, point)}" if point != "embed" else "X⁰, as embedded" for k, point in scene.states]


def step_names(scene: Scene) -> list[str]:
    return [f"layer {k}" for k, _ in scene.steps]


def _seen(scene: Scene, cells: int, most: int) -> tuple[list[int], str]:
    """The states that fit, and a sentence on those that do not."""
    kept = spread(len(scene.states), max(2, most // max(1, cells)))
    left = len(scene.states) - len(kept)
    return kept, f" {left} of {len(scene.states)} states are left out, evenly, for the size of the page." if left else ""


def _cut(word: str) -> str:
    """No tokenizer of use has longer tokens; one of a foreign model may."""
    return word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…"


def _cloud(scene: Scene) -> Section:
    prompts, length = scene.ids.shape
    kept, left = _seen(scene, 3 * scene.ids.size, CLOUDS)
    lost = int((~np.isfinite(scene.coords).all(-1)).sum())
    data: dict[str, Any] = {
        "words": [[_cut(word) for word in prompt] for prompt in scene.words],
        "states": [state_names(scene)[k] for k in kept],
        "coords": packed(scene.coords[kept]),
        "clusters": scene.clusters[kept].reshape(len(kept), -1),
        "ids": scene.ids.ravel(),
        "explained": scene.explained,
    }
    if scene.classes is not None:
        data |= {"classes": scene.classes.ravel(), "class_name": scene.class_name}
    shares = ", ".join(f"{100 * share:.0f} %" for share in scene.explained)
    caption = (
        f"The {prompts * length:,} tokens of {prompts} prompts of {length} tokens as one cloud, state by state. Axes: "
        f"{escaped(scene.basis)}. They hold {shares} of the pooled variance. Since the basis is the same for all states, what "
        "moves on the screen has moved in the space; what does not may have moved in other directions. Clusters: k-means of the "
        "directions of each state (k ≤ 8), numbered by what they share with the next state, so a colour keeps its meaning. "
        f"Point at a token to see it in its context; press one to follow its word below.{left}"
        + (f" {lost:,} coordinates are undefined." if lost else "")
    )
    return Section("cloud", "The token cloud, layer by layer", caption, data)


def _paths(scene: Scene) -> Section:
    caption = (
        "One word at all its places, from the state where it has no context yet (open circle: equal vectors, but for learned "
        "positions) to the last (full circle), in the basis of the cloud above. Paths that part are told apart by their "
        "context; paths that end together are, in these two directions, no longer told apart. Colours: the last clusters."
    )
    return Section("paths", "Where a word goes", caption, {})


def _cosines(scene: Scene) -> Section:
    n = len(scene.order)
    kept, left = _seen(scene, n * n, MATRICES)
    caption = (
        f"cos(x<sub>i</sub>, x<sub>j</sub>) of the raw stream between {n} tokens, which are those of the first prompts, ordered "
        "by their last cluster and then by place. Blocks along the diagonal are clusters; watch at which layer they appear. "
        f"Blue −1, white 0, red 1, grey undefined; values to ± 0.004.{left}"
    )
    data = {
        "states": [state_names(scene)[k] for k in kept],
        "cosines": packed(scene.cosines[kept], 8),
        "tokens": scene.cosine_tokens,
        "clusters": scene.clusters[-1].reshape(-1)[scene.order],
    }
    return Section("cosines", "Who points where: cosines by cluster", caption, data, keys=("clu.mean_cos",))


def _merges(scene: Scene) -> Section:
    first, last = (len(np.unique(scene.merges[k])) for k in (0, -1))
    caption = (
        f"{len(scene.order)} tokens, a line each, from state to state. Tokens that a chain of cosines ≥ {scene.threshold:g} "
        "joins form one piece of the graph, and their lines run together at its middle; so a tree that closes to the right is a "
        f"cloud that gathers, and lines that part again are a cloud that spreads. There are {first} pieces at first and {last} "
        f"at the end (n = {len(scene.order)} tokens). Larger points and thicker strands: larger pieces."
    )
    data = {
        "states": state_names(scene),
        "merges": scene.merges,
        "tokens": scene.cosine_tokens,
        "clusters": scene.clusters[-1].reshape(-1)[scene.order],
    }
    return Section("merges", "Which tokens join, and how deep", caption, data, keys=("clu.components",))


def _attention(scene: Scene) -> Section:
    steps, heads, tokens, _ = scene.pattern.shape
    cut = min(tokens, max(FEWEST, math.isqrt(PATTERNS // max(1, steps * heads))))
    kept = spread(steps, max(1, PATTERNS // (heads * cut * cut)))
    hidden = [f"the first {cut} of {tokens} tokens"] if cut < tokens else []
    hidden += [f"{len(kept)} of {steps} steps of attention, evenly spaced"] if len(kept) < steps else []
    leaves = np.isfinite(scene.scores[kept]).any()
    turned = np.isfinite(scene.tilt[kept]).any()
    caption = (
        f"Prompt 0, {cut} tokens. Weights a<sub>ij</sub>, a row a query, a column a key; colour goes with the root of the "
        "weight. Press a cell, or choose, to take its row as the query. "
        + (
            "Beside it the space as this query slices it. Across lie the leaves, the level planes of s<sub>ij</sub> = "
            "⟨r<sub>i</sub>, y<sub>j</sub>⟩ with r<sub>i</sub> = Mᵀy<sub>i</sub> (+ u): tokens at one x are equally relevant, "
            "whatever else tells them apart; upwards is the first principal coordinate of what attention reads. The larger a "
            "point, the more weight it gets. "
            if leaves
            else "This kernel is no function of scores alone, so there are no leaves to draw. "
        )
        + (
            "Below: how far the leaves are tilted against those of the same query at distance 0, by the distance of the key "
            "(mean over queries): positions turn the keys (RoPE), so each distance has a foliation of its own."
            if turned
            else "Without positions that turn keys, a query has one foliation at all distances."
        )
        + (f" Shown for the size of the page: {' and '.join(hidden)}." if hidden else "")
    )
    data = {
        "steps": [step_names(scene)[k] for k in kept],
        "heads": heads,
        "pattern": packed(scene.pattern[kept][:, :, :cut, :cut]),
        "scores": packed(scene.scores[kept][:, :, :cut, :cut]) if leaves else None,
        "leaf_axis": scene.leaf_axis[kept][:, :cut],
        "tilt": np.degrees(scene.tilt[kept]) if turned else None,
        "offsets": scene.tilt_offsets,
    }
    plots = ("plot", *(["leaves"] if leaves else []), *(["tilt"] if turned else []))
    return Section(
        "attention",
        "Attention, and the leaves it slices the space into",
        caption,
        data,
        plots=plots,
        keys=("fol.tilt", "attn.entropy_norm"),
    )


def _sinks(scene: Scene) -> Section:
    null = f"; uniform attention would give {scene.sink_null:.2f}" if math.isfinite(scene.sink_null) else ""
    caption = (
        f"The mean weight on the first token, over all prompts and all queries that have a choice (n = {len(scene.ids)} "
        f"prompts), layer by head, in [0, 1]{null}. A head near 1 looks at the first token whatever the query is: a sink. What "
        "it carries from there is told by sink.drain and sink.value_cos."
    )
    data = {"steps": step_names(scene), "sinks": scene.sinks, "null": scene.sink_null}
    return Section("sinks", "Sinks", caption, data, keys=("sink.mass", "sink.drain", "sink.value_cos"))


def _spectra(scene: Scene) -> Section:
    steps, heads = scene.spectra_form.shape[:2]
    widths = [min(part.shape[-1], 128) for part in (scene.spectra_form, scene.spectra_content)]
    kept = spread(steps, max(1, EIGENVALUES // max(1, heads * sum(widths))))
    parts = [
        {"re": x.real, "im": x.imag}
        for part, width in zip((scene.spectra_form, scene.spectra_content), widths, strict=True)
        for x in [part[kept][:, :, :width]]
    ]
    caption = (
        "Eigenvalues of the effective M (score, left) and F (update, right) of one head, with the norm's gain folded in, in the "
        f"complex plane; by descending modulus, {widths[0]} and {widths[1]} a head, the others are 0. Of M: right of 0 a token "
        "looks at what resembles it along a direction, left of 0 at its opposite, and complex pairs are what is directed (a "
        "symmetric M has none). Of F: right of 0 adds along a direction, left of 0 takes away, and complex pairs turn. The "
        "circle has the radius of the largest modulus."
        + (f" {len(kept)} of {steps} layers, evenly spaced, for the size of the page." if len(kept) < steps else "")
    )
    data = {"steps": [step_names(scene)[k] for k in kept], "heads": heads, "form": parts[0], "content": parts[1]}
    return Section(
        "spectra", "Spectra of M and F", caption, data, plots=("form", "content"), keys=("op.asym", "op.attraction", "op.compat")
    )


def _lens(scene: Scene) -> Section:
    states, tokens, top = scene.lens_prob.shape
    kept = spread(states, 25)
    cut = min(tokens, max(8, READINGS // len(kept)))
    left = [f"{len(kept)} of {states} states"] if len(kept) < states else []
    left += [f"{cut} of {tokens} tokens"] if cut < tokens else []
    caption = (
        "What each state of prompt 0 would predict if it were the last one: the closing norm and the unembedding applied to it. "
        "In a cell the most probable next word, coloured by the entropy of the distribution in nats (dark: sure); point at it "
        f"for the {top} most probable. Across: tokens of the prompt; upwards: depth. The upper row is the model's answer, n = "
        f"{tokens} tokens of one prompt. A word that appears early and stays was decided early."
        + (f" Shown: {' and '.join(left)}." if left else "")
    )
    data = {
        "states": [state_names(scene)[k] for k in kept],
        "words": [[[_cut(word) for word in row] for row in scene.lens_words[k][:cut]] for k in kept],
        "prob": packed(scene.lens_prob[kept][:, :cut]),
        "entropy": packed(scene.lens_entropy[kept][:, :cut]),
    }
    return Section("lens", "What each layer would say", caption, data, keys=("lens.entropy", "lens.agreement"))
