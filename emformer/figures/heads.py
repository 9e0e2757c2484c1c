"""Heads of a scene: who attends to a sink, and the spectra of their operators."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from emformer.figures.kinds import facts, sample
from emformer.figures.staged import Scene
from emformer.figures.style import PALE, STYLE, blank, close, grey, heat, note, shading, thin


@rc_context(STYLE)
def sink_map(scene: Scene) -> Figure | None:
    """The mean weight on the first token, layer by head, in [0, 1]; white is none. The title says what uniform attention gives.

    Returns None without a head of defined weight.
    """
    values = scene.sinks
    if not np.isfinite(values).any():
        return None
    rows, heads = values.shape
    figure, (axes,) = blank(float(np.clip(1.9 + 0.38 * rows, 3.0, 8.0)))
    heat(figure, axes, values, matplotlib.colormaps["Oranges"], (0.0, 1.0), "mean weight")
    axes.set_xticks(range(0, heads, -(-heads // 24)))
    shown = thin(range(rows), 24)
    axes.set_yticks(shown, [str(scene.steps[k][0]) for k in shown])
    null = f" (uniform attention: {scene.sink_null:.2g})" if np.isfinite(scene.sink_null) else ""
    axes.set(title=f"weight on the first token{null}", xlabel=grey(values, "head"), ylabel="layer")
    return close(figure, "Attention sinks by layer and head", facts(scene, sample(scene)))


@rc_context(STYLE)
def spectra(scene: Scene) -> Figure | None:
    """The eigenvalues of M and F of all heads in the complex plane, coloured by layer; the norm before attention is folded in.

    To the right attracts, to the left repels, away from the real axis turns. Eigenvalues that the factors leave no room for, all
    0, are not drawn.

    Returns None where no operator has a finite spectrum.
    """
    both = {"form M (scores)": scene.spectra_form, "content F (updates)": scene.spectra_content}
    both = {name: values for name, values in both.items() if np.isfinite(values).any()}
    if not both:
        return None
    layers = [step[0] for step in scene.steps]
    shades = shading(min(layers), max(layers))
    figure, axes = blank(5.2, 1, len(both))
    for one, (name, values) in zip(axes, both.items(), strict=True):
        known = np.isfinite(values)
        depth = np.broadcast_to(np.array(layers)[:, None, None], values.shape)[known]
        points = values[known].astype(np.complex128)
        one.scatter(points.real, points.imag, 10, shades.to_rgba(depth), linewidths=0, alpha=0.7, zorder=3)
        end = 1.08 * float(np.abs(points).max()) or 1.0
        one.axhline(0, color=PALE, linewidth=0.8, zorder=0)
        one.axvline(0, color=PALE, linewidth=0.8, zorder=0)
        one.set(xlim=(-end, end), ylim=(-end, end), box_aspect=1, title=name, xlabel="Re λ", ylabel="Im λ")
        one.locator_params(nbins=5)
        size = np.abs(points.real).sum()
        share = points.real.clip(min=0).sum() / size if size > 0 else np.nan
        note(one, f"Re λ > 0: {100 * share:.0f} % of Σ|Re λ|")
    if len(set(layers)) > 1:
        bar = figure.colorbar(shades, ax=axes, label="layer", location="bottom", aspect=60, shrink=0.6, pad=0.02)
        bar.set_ticks(thin(sorted(set(layers)), 12))
        bar.outline.set_visible(False)
    count, heads = scene.spectra_form.shape[:2]
    figure.set_layout_engine("compressed")
    return close(figure, "Spectra of M and F", facts(scene, f"{count} layers of {heads} heads"))
