"""Which tokens of a scene are alike: cosines between them, and the pieces that they join to along the depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib import rc_context
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from emformer.figures.kinds import chosen, facts, state_name
from emformer.figures.legible import legible
from emformer.figures.staged import Scene
from emformer.figures.style import GREY, INK, KINDS, LABELS, PALE, STYLE, blank, close, depth_name, ticks

PANELS = 6
SMALL = 4  # a cluster of fewer rows gets no label: it would stand on its neighbour's
BEND = np.linspace(0, 1, 12)


@rc_context(STYLE)
def cosine_matrices(scene: Scene, states: Sequence[int] | None = None) -> Figure | None:
    """cos(x_i, x_j) between some tokens at some states, ordered by the cluster at the last one; blue below 0, red above.

    Args:
        states: places in `Scene.states`; default at most six, evenly spaced.

    Returns None for fewer than two tokens. Raises ValueError for states that are not there.
    """
    places = chosen(scene, states, PANELS)
    if len(scene.order) < 2:
        return None
    columns = 2 if len(places) == 4 else min(3, len(places))
    rows = -(-len(places) // columns)
    figure, axes = blank(1.2 + min(5.0, 7.5 / columns) * rows, rows, columns, sharex=True, sharey=True)
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=PALE)
    last = scene.clusters[-1].ravel()[scene.order]
    bounds = [0, *(1 + np.flatnonzero(np.diff(last))).tolist(), len(last)]
    middles = [((a + b - 1) / 2, int(last[a])) for a, b in pairwise(bounds) if b - a >= SMALL]
    for one, place in zip(axes, places, strict=False):
        image = one.imshow(
            np.ma.masked_invalid(scene.cosines[place]), cmap=colours, vmin=-1, vmax=1, origin="upper", interpolation="nearest"
        )
        for bound in bounds[1:-1]:
            one.axhline(bound - 0.5, color=INK, linewidth=0.5)
            one.axvline(bound - 0.5, color=INK, linewidth=0.5)
        one.spines[:].set_visible(False)
        one.tick_params(length=0, labelsize=8)
        one.set_title(state_name(scene.states[place]))
    axes[0].set_xticks([x for x, _ in middles], [str(k) for _, k in middles])
    axes[0].set_yticks([x for x, _ in middles], [str(k) for _, k in middles])
    for one in axes[len(places) :]:
        one.remove()
    for row in range(rows):
        axes[row * columns].set_ylabel("last cluster")
    for one in axes[max(0, len(places) - columns) : len(places)]:
        one.set_xlabel("last cluster")
        one.tick_params(labelbottom=True)
    bar = figure.colorbar(image, ax=axes[: len(places)], label="cos(x, x')", aspect=35, pad=0.015, ticks=np.linspace(-1, 1, 5))
    bar.outline.set_edgecolor(PALE)
    figure.set_layout_engine("compressed")
    return close(figure, "Cosines between tokens, ordered by their last cluster", facts(scene, _whom(scene)))


@rc_context(STYLE)
def merges(scene: Scene) -> Figure | None:
    """Which tokens join with depth: a line a token, bundled with all that it is connected to by cosines of the raw stream that
    are at least the scene's threshold.

    Colours are the clusters of the last state. A dot is a piece of two or more tokens, as large as it has tokens; from five on
    their number stands in it.

    Returns None for fewer than two tokens.
    """
    n = len(scene.order)
    if n < 2:
        return None
    # tokens that end together stand together, and among them those that were together before
    rank = np.empty(n, int)
    rank[np.lexsort([np.arange(n), *scene.merges])] = np.arange(n)
    levels = np.stack([rank, *(_means(rank, pieces) for pieces in scene.merges)])
    figure, (axes,) = blank(float(np.clip(1.9 + 0.115 * n, 4.0, 12.5)))
    lines = LineCollection([], linewidths=0.9, alpha=0.75, zorder=2)
    x = np.arange(-1, len(scene.states))
    ease = BEND**2 * (3 - 2 * BEND)
    along = np.append((x[:-1, None] + BEND[:-1]).ravel(), x[-1])
    # (tokens, steps, bend)
    heights = levels[:-1].T[..., None] + np.diff(levels, axis=0).T[..., None] * ease[:-1]
    ends = scene.clusters[-1].ravel()[scene.order]
    lines.set_segments([np.stack([along, np.append(row.ravel(), end)], 1) for row, end in zip(heights, levels[-1], strict=True)])
    lines.set_color([KINDS[k][0] if k >= 0 else GREY for k in ends])
    axes.add_collection(lines)
    for state, pieces in enumerate(scene.merges):
        for name, size in zip(*np.unique(pieces, return_counts=True), strict=True):
            if size < 2:
                continue
            y = levels[state + 1][pieces == name][0]
            axes.plot(state, y, "o", color=INK, markersize=2 + 2.2 * size**0.5, zorder=3)
            if size >= 5:
                axes.text(state, y, str(size), color="white", fontsize=6.5, ha="center", va="center_baseline", zorder=4)
    axes.set_xticks(*ticks(scene.states, LABELS))
    axes.set_yticks(rank, [_token(scene, row) for row in range(n)], fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(-1, len(scene.states) - 0.7), ylim=(n - 0.3, -0.7))
    axes.set(xlabel=depth_name(scene.states), ylabel="token prompt:position")
    counts = [len(set(pieces.tolist())) for pieces in scene.merges]
    axes.set_title(f"pieces of the graph cos ≥ {scene.threshold:g}: {counts[0]} at X⁰, {counts[-1]} at the last state")
    return close(figure, "Which tokens join with depth", facts(scene, _whom(scene)))


def _means(rank: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """The mean place of each token's piece."""
    _, of = np.unique(pieces, return_inverse=True)
    return (np.bincount(of, rank) / np.bincount(of))[of]


def _token(scene: Scene, row: int) -> str:
    p, t = scene.cosine_tokens[row]
    return f"{legible(scene.words[p][t], 12)} {p}:{t}"


def _whom(scene: Scene) -> str:
    prompts = len(set(scene.cosine_tokens[:, 0].tolist()))
    return f"{len(scene.order)} tokens of {prompts} prompt{'s' * (prompts > 1)}"
