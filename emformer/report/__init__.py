"""The report: everything known of a run, an analysis or a comparison, in one HTML file that needs no network.

    write("runs/default")                     # runs/default/report.html
    write(["runs/a", "runs/b"], "ab.html")    # the differences to runs/a

What is drawn and why stands in `scenes`, `series` and `differences`, which turn a scene, records and a comparison into sections:
words and numbers, no code; `charts` does the same with what an experiment of the theory or a study of claims found, `ablation`
and `levels` with an ablation study. `page` sets them into one file with plotly's script, `page.js` draws them, and `sources`
finds what a folder holds.
"""

from emformer.report.writing import write

__all__ = ["write"]
