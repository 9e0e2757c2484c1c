"""How far from a gradient flow is a transformer, and which departure matters? omega and R2 by cell, beside what theory expects.

python train/obstructions.py --scale small        # 120 cells, about 25 minutes on 2 cores
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import emformer as emf
from emformer.studies.obstructions import anova, matched

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--scale", help="another size of the study: small")
options.add_argument("--out", help="its folder; finished cells in it are not run again")
options.add_argument("--shown", help="a folder of this study to look at as it is; nothing is run")
options.add_argument("--figure", default="obstructions.png")

STUDY = Path(__file__).parents[1] / "configs" / "ablations" / "obstructions.yaml"
# omega of one flip from G0, untrained, in theory's order (math K); of all other flips 0
EXPECTED = {"G0, C=free": (0.4, 0.5), "G0, S=general": (0.15, 0.4), "G0, K=causal": (0.1, 0.35), "G0, Z=softmax": (0.0, 0.1)}


def named(levels: dict[str, str], corners: dict[str, dict[str, str]]) -> str:
    """The nearer corner, and what is flipped from it."""
    flips = ([name, *(f"{key}={levels[key]}" for key in levels if levels[key] != one[key])] for name, one in corners.items())
    return ", ".join(min(flips, key=len))


def main() -> None:
    given = options.parse_args()
    plan = emf.read_plan(STUDY, scale=given.scale)
    folder = Path(given.shown or emf.ablate(STUDY, scale=given.scale, out=given.out))
    corners = {"G0": plan.whole({}), "T0": {name: list(known)[-1] for name, known in plan.factors.items()}}
    table = pd.read_csv(folder / "table.csv", keep_default_na=False, na_values=[""])
    table["where"] = [named({name: row[name] for name in plan.factors}, corners) for row in table.to_dict("records")]
    order = {name: k for k, name in enumerate(EXPECTED)}
    cells = sorted(table["where"].unique(), key=lambda name: (name[:2], order.get(name, len(order)), name))
    expected = {name: EXPECTED.get(name, (0.0, 0.0)) for name in cells if name.startswith("G0")}
    means = table.pivot_table("value", "where", "outcome").loc[cells, ["untrained omega", "omega", "r2", "loss"]]
    means.insert(0, "expected untrained", ["{:g} to {:g}".format(*expected[name]) if name in expected else "" for name in cells])
    print(means.round(4).to_string())

    for name, corner in corners.items():
        print(f"\nlogit of omega by factor near {name}, seeds as blocks\n")
        print(anova(table, list(corner), around=corner).round(4).to_string(index=False))
    ended = table[table["status"] == "finished"].drop_duplicates("cell").pivot(index="seed", columns="where", values="cell")
    pairs = ended.reindex(columns=list(corners)).dropna().itertuples() if (folder / "cells").exists() else ()
    runs = {seed: (emf.Run(folder / "cells" / ideal), emf.Run(folder / "cells" / real)) for seed, ideal, real in pairs}
    print(f"\nT0 stopped at the loss that G0 ends with\n\n{matched(runs).round(4).to_string(index=False)}")

    figure, axes = plt.subplots(1, 2, figsize=(10, 0.3 * len(cells) + 1), sharey=True, layout="constrained")
    for name, span in expected.items():
        axes[0].plot(span, [cells.index(name)] * 2, color="0.85", linewidth=9, solid_capstyle="butt", zorder=1)
    for one, outcome, look in ((axes[0], "untrained omega", "C1o"), (axes[0], "omega", "C0o"), (axes[1], "r2", "C0o")):
        rows = table[table["outcome"] == outcome]
        one.plot(rows["value"], rows["where"].map(cells.index), look, markersize=4, label=f"{outcome}, a point a seed")
        one.legend(fontsize="small")
    axes[0].set(title="grey: theory, untrained", yticks=range(len(cells)), yticklabels=cells, ylim=(len(cells), -1))
    figure.savefig(given.figure)
    print("\nwrote", given.figure)


if __name__ == "__main__":
    try:
        main()
    except emf.UserError as error:
        sys.exit(str(error))
