"""One query of one head: its pattern, and the leaves of equal score that it slices the tokens into."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from emformer.figures.kinds import facts
from emformer.figures.legible import legible
from emformer.figures.staged import Scene
from emformer.figures.style import BLUE, GREY, INK, PALE, STYLE, VERMILION, blank, close, note, thin

NAMED = 6  # tokens of most weight
WORDS = 32  # along the axes of a pattern
LEAVES = 24  # level lines that can still be told apart
SINK = 0.5  # a head that gives the first token more than this shows little else


@rc_context(STYLE)
def attention(scene: Scene, layer: int | None = None, head: int | None = None, query: int | None = None) -> Figure | None:
    """The pattern of a head on prompt 0 beside the foliation of one of its queries, and how far positions tilt that.

    In the foliation a token stands at its score, and so on its leaf: vertical lines are leaves, planes across the relevance
    gradient M^T q. Where the kernel has a temperature they are 1/beta apart, one nat, a factor e of weight. Upwards: the first
    principal coordinate of what attention reads; as large as the token's weight; hollow is the query itself.

    Args:
        layer, head: default, of the heads that give the first token less than half of their weight, the one of least entropy.
        query: position in the prompt; default the last one.

    Returns None without a step of attention. Raises ValueError for a layer, head or query that is not there.
    """
    if not scene.steps:
        return None
    row, head = _chosen(scene, layer, head)
    tokens = scene.pattern.shape[-1]
    query = tokens - 1 if query is None else query
    if not 0 <= query < tokens:
        raise ValueError(f"query {query} is none of the tokens 0 … {tokens - 1}")
    tilts = np.isfinite(scene.tilt[row, head]).any()
    figure, axes = blank(6.9, 2, 2, height_ratios=(3.4, 1.0)) if tilts else blank(5.2, 1, 2)
    _pattern(figure, axes[0], scene, row, head, query)
    _leaves(axes[1], scene, row, head, query)
    if tilts:
        axes[3].remove()
        whole = axes[2].get_gridspec()
        assert whole is not None
        axes[2].set_subplotspec(whole[1, :])
        _tilt(axes[2], scene, row, head)
    word = legible(scene.words[0][query], 14).strip(" ")
    where = f"Attention of layer {scene.steps[row][0]}, head {head}; query “{word}” at position {query}"
    return close(figure, where, facts(scene, f"prompt 0, {tokens} tokens"))


def _chosen(scene: Scene, layer: int | None, head: int | None) -> tuple[int, int]:
    """(row among the steps, head)."""
    layers = [step[0] for step in scene.steps]
    heads = scene.pattern.shape[1]
    if (layer is not None and layer not in layers) or (head is not None and not 0 <= head < heads):
        raise ValueError(f"the scene has the layers {layers} and heads 0 … {heads - 1}, not layer {layer} and head {head}")
    weights = np.clip(scene.pattern.astype(float), 0, None)
    spread = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1).mean(-1)
    spread = np.where(scene.sinks > SINK, np.inf, spread)
    allowed = np.ones_like(spread, bool)
    if layer is not None:
        allowed &= (np.array(layers) == layer)[:, None]
    if head is not None:
        allowed &= np.arange(heads) == head
    # where all are sinks, the first
    places = np.argwhere(allowed)
    row, chosen = min(places.tolist(), key=lambda place: (spread[tuple(place)], place))
    return row, chosen


def _pattern(figure: Figure, axes: Axes, scene: Scene, row: int, head: int, query: int) -> None:
    values = scene.pattern[row, head].astype(float)
    # a zero is hidden or nearly so: white, as what the mask hides
    image = axes.imshow(values, cmap="Blues", vmin=min(0.0, values.min()), vmax=max(values.max(), 1e-9), interpolation="nearest")
    tokens = len(values)
    axes.add_patch(Rectangle((-0.5, query - 0.5), tokens, 1, fill=False, edgecolor=VERMILION, linewidth=1.2))
    shown = thin(range(tokens), WORDS)
    words = [legible(word, 9) for word in scene.words[0][:tokens]]
    axes.set_xticks(shown, [words[k] for k in shown], rotation=90, fontsize=6.5)
    axes.set_yticks(shown, [words[k] for k in shown], fontsize=6.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="key", ylabel="query", title="weights a (framed: the query)")
    bar = figure.colorbar(image, ax=axes, location="bottom", aspect=35, pad=0.02, shrink=0.8)
    bar.outline.set_edgecolor(PALE)


def _leaves(axes: Axes, scene: Scene, row: int, head: int, query: int) -> None:
    scores = scene.scores[row, head, query].astype(float)
    weights = scene.pattern[row, head, query].astype(float)
    heights = scene.leaf_axis[row]
    seen = np.flatnonzero(np.isfinite(scores) & np.isfinite(heights))
    if not len(seen):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "this kernel reads more than scores:\nno leaves", ha="center", va="center", color=GREY)
        return
    low, high = scores[seen].min(), scores[seen].max()
    margin = 0.06 * (high - low) or 1.0
    beta = scene.beta[row]
    step = 1 / beta if np.isfinite(beta) and beta > 0 else (high - low) / 8 or 1.0
    while (high - low + 2 * margin) / step > LEAVES:
        step *= 2
    for leaf in np.arange(np.floor((low - margin) / step), (high + margin) / step + 1) * step:
        axes.axvline(leaf, color=PALE, linewidth=0.9, zorder=0)
    size = 12 + 320 * np.abs(weights[seen])
    own = seen == query
    axes.scatter(scores[seen][~own], heights[seen][~own], size[~own], BLUE, alpha=0.55, linewidths=0, zorder=3)
    axes.scatter(scores[seen][own], heights[seen][own], size[own], "none", edgecolors=VERMILION, linewidths=1.3, zorder=4)
    axes.set_xlim(low - margin, high + margin)
    axes.margins(y=0.12)
    heaviest = seen[np.argsort(-np.abs(weights[seen]), kind="stable")][:NAMED].tolist()
    for place, above in _free(axes, scores, heights, [*heaviest, query] if query in seen else heaviest):
        axes.annotate(
            legible(scene.words[0][place], 12).strip(" "),
            (scores[place], heights[place]),
            (0, (1 if above else -1) * (4 + (3 + 80 * abs(weights[place])) ** 0.5)),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
            color=INK,
            zorder=5,
        )
    nats = float(beta * step)
    lines = f"a line every {nats:g} nat{'s' * (nats != 1)}" if np.isfinite(nats) else "lines: equal scores"
    axes.set(xlabel="score s = leaf of the token", ylabel="first PC of what attention reads", title="leaves of the query")
    note(axes, f"{lines}, size: weight")


def _free(axes: Axes, x: np.ndarray, y: np.ndarray, places: list[int]) -> Iterator[tuple[int, bool]]:
    """Which places get a name, and whether above their dot: where no name of a heavier token stands already, else below, else
    nowhere."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for place in dict.fromkeys(places):
        across, up = (x[place] - left) / (right - left), (y[place] - low) / (high - low)
        for above in (True, False):
            height = up + (0.04 if above else -0.04)
            if all(abs(across - a) > 0.14 or abs(height - b) > 0.045 for a, b in taken):
                taken.append((across, height))
                yield place, above
                break


def _tilt(axes: Axes, scene: Scene, row: int, head: int) -> None:
    distance = np.concatenate([[0], -scene.tilt_offsets])
    angle = np.degrees(np.concatenate([[0.0], scene.tilt[row, head]]))
    for other in range(scene.tilt.shape[1]):
        if other != head:
            axes.plot(distance, np.degrees(np.concatenate([[0.0], scene.tilt[row, other]])), color=PALE, linewidth=1, zorder=1)
    axes.plot(distance, angle, "o-", color=BLUE, markersize=3.5, zorder=3)
    axes.axhline(90, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(-0.05, distance.max() * 1.08)
    shown = [0, *(2**k for k in range(int(np.log2(distance.max())) + 1))]
    axes.set_xticks(shown, [str(k) for k in shown])
    axes.xaxis.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="distance between query and key (tokens)", ylabel="tilt (degrees)", title="tilt of the leaves")
    note(axes, "grey: other heads")
