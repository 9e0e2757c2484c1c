"""The logit lens of a scene: what the model would answer at each state, token by token."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib import rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from emformer.figures.kinds import facts
from emformer.figures.legible import legible
from emformer.figures.staged import Scene
from emformer.figures.style import INK, LUMINANCE, PALE, STYLE, blank, close, depth_name, thin, ticks

COLUMNS = 11
ROWS = 33


@rc_context(STYLE)
def lens(scene: Scene, first: int | None = None) -> Figure | None:
    """The most probable next token at each state (rows, X^0 at the bottom) for some tokens of prompt 0 (columns), read through
    the closing norm. Darker is more probable; bold where it is the answer of the last state already.

    Args:
        first: position of the first of eleven tokens; default, those at the end of what the scene has.

    Returns None without a finite probability. Raises ValueError for a token that is not there.
    """
    states, tokens, _ = scene.lens_prob.shape
    first = max(0, tokens - COLUMNS) if first is None else first
    if not 0 <= first < tokens:
        raise ValueError(f"token {first} is none of the tokens 0 … {tokens - 1}")
    columns = range(first, min(first + COLUMNS, tokens))
    # of many states every few, the last among them
    rows = thin(range(states), ROWS)
    values = scene.lens_prob[np.ix_(rows, list(columns), [0])][..., 0].astype(float)
    if not np.isfinite(values).any():
        return None
    figure, (axes,) = blank(float(np.clip(2.0 + 0.26 * len(rows), 4.4, 10.5)))
    colours = matplotlib.colormaps["Blues"].with_extremes(bad=PALE)
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, norm=Normalize(0, 1), origin="lower", aspect="auto")
    shades = np.asarray(colours(image.norm(np.ma.masked_invalid(values))))[..., :3] @ LUMINANCE
    for (row, column), value in np.ndenumerate(values):
        word = scene.lens_words[rows[row]][columns[column]][0]
        answer = word == scene.lens_words[-1][columns[column]][0]
        axes.text(
            column,
            row,
            legible(word.strip(" ") or word, 9) if np.isfinite(value) else "?",
            color=INK if shades[row, column] > 0.5 else "white",
            fontsize=8,
            fontweight="bold" if answer else "normal",
            ha="center",
            va="center",
            clip_on=True,
        )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    names = [legible(scene.words[0][t].strip(" ") or scene.words[0][t], 10) for t in columns]
    axes.set_xticks(range(len(columns)), [f"{name}\n{t}" for name, t in zip(names, columns, strict=True)], fontsize=8.5)
    axes.set_yticks(*ticks([scene.states[k] for k in rows], ROWS))
    axes.set(xlabel="token that is read, and its position", ylabel=depth_name(scene.states))
    bar = figure.colorbar(image, ax=axes, label="probability", aspect=30, pad=0.015)
    bar.outline.set_edgecolor(PALE)
    axes.set_title("most probable next token (bold: the model's answer)")
    return close(figure, "Logit lens", facts(scene, f"prompt 0, {len(columns)} of its tokens"))
