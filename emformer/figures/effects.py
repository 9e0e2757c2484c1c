"""What the factors of an ablation study change: a forest of differences for each outcome."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from emformer.figures.legible import legible
from emformer.figures.style import INK, KINDS, STYLE, blank, close, note

OUTCOMES = 6
CONTRASTS = 40
NAME = 44  # characters of a contrast


@rc_context(STYLE)
def draw_effects(frame: pd.DataFrame, title: str = "") -> Figure | None:
    """Differences to the baseline with 95 % intervals, a panel an outcome, each with its own scale, a row a contrast.

    Filled where the difference holds after correction.

    Args:
        frame: of effects.csv: columns outcome, contrast, difference, low, high, word ("differs" where it holds).
        title: of which study it is.

    Returns None without a difference.
    """
    rows = frame[frame["difference"].notna()]
    if rows.empty:
        return None
    outcomes, contrasts = list(dict.fromkeys(rows["outcome"])), list(dict.fromkeys(rows["contrast"]))
    shown, named = outcomes[:OUTCOMES], contrasts[:CONTRASTS]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = blank(1.5 + lines * (0.8 + 0.24 * len(named)), lines, columns, sharey=True)
    for one, outcome in zip(axes, shown, strict=False):
        _panel(one, rows[(rows["outcome"] == outcome) & rows["contrast"].isin(named)], named, str(outcome))
    for one in axes[len(shown) :]:
        one.remove()
    colour, marker = KINDS[0]
    figure.legend(
        handles=[
            Line2D([], [], color=colour, marker=marker, linestyle="", label="differs after correction"),
            Line2D(
                [], [], color=colour, marker=marker, linestyle="", markerfacecolor="white", label="does not, or too few seeds"
            ),
        ],
        loc="outside lower center",
        ncols=2,
    )
    left = [f"{len(outcomes) - len(shown)} more outcomes" * (len(outcomes) > len(shown))]
    left += [f"{len(contrasts) - len(named)} more contrasts" * (len(contrasts) > len(named))]
    facts = "; ".join(f"{one} not drawn" for one in left if one)
    return close(
        figure, "Differences to the baseline, paired by seed, with 95 % intervals", "; ".join(filter(None, (title, facts)))
    )


def _panel(axes: Axes, rows: pd.DataFrame, named: list[str], outcome: str) -> None:
    y = rows["contrast"].map({name: k for k, name in enumerate(named)}).to_numpy(float)
    x, low, high = (rows[name].to_numpy(float) for name in ("difference", "low", "high"))
    colour, marker = KINDS[0]
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    axes.hlines(y, low, high, color=colour, linewidth=1.3, zorder=2)
    sure = (rows["word"] == "differs").to_numpy(bool)
    for some, face in ((sure, colour), (~sure, "white")):
        axes.plot(x[some], y[some], marker, linestyle="", color=colour, markerfacecolor=face, markersize=5, zorder=3)
    axes.set_yticks(range(len(named)), [legible(str(name), NAME) for name in named], fontsize=8)
    axes.set_ylim(len(named) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x")
    axes.set_title(legible(outcome, 30), fontsize=9.5, loc="left")
    unknown = int(np.isnan(low).sum())
    note(axes, f"{unknown} without interval" if unknown else "")
