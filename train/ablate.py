"""What does a factor change? An ablation study from Python, read as tables and drawn: copy this file and change any part.

python train/ablate.py configs/ablations/position.yaml
python train/ablate.py configs/ablations/norm.yaml --scale large --seeds 8
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

import emformer as emf
from emformer import figures
from emformer.figures.charts import draw
from emformer.studies.ablation import default
from emformer.theory.outcome import Curves

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("study", help="the YAML file of a study; --FIELD VALUE overrides what it says, as --seeds 3")
options.add_argument("--scale", help="another size of the study, which the file names")
options.add_argument("--out", help="the folder; finished cells in it are not run again")


def main() -> None:
    given, words = options.parse_known_args()
    plan = emf.read_plan(given.study, *words, scale=given.scale)
    folder = emf.ablate(plan, out=given.out or default(Path(given.study), given.scale))

    table = pd.read_csv(folder / "table.csv", keep_default_na=False, na_values=[""])
    print(table.pivot_table("value", list(plan.factors), "outcome", aggfunc=["mean", "std"], sort=False).round(4).to_string())
    effects = pd.read_csv(folder / "effects.csv", keep_default_na=False, na_values=[""])
    told = ["outcome", "contrast", "difference", "low", "high", "g", "corrected", "word"]
    print(f"\ndifferences, paired by seed\n\n{effects[told].round(4).to_string(index=False)}")

    rows = []  # a loss curve of your own: any metric of the cells, which are ordinary runs
    for cell in table.drop_duplicates("cell").to_dict("records"):
        level = ", ".join(str(cell[name]) for name in plan.factors)
        curve = emf.Run(folder / "cells" / cell["cell"]).curve("val_bits_per_byte")
        rows += [("", f"{level}, seed {cell['seed']}", step, value) for step, value in curve.items()]
    if rows:
        chart = Curves(pd.DataFrame(rows, columns=["panel", "line", "x", "y"]), plan.title, "training step", "bits per byte")
        print("\nwrote", figures.save(draw(chart), folder / "curves.png"))


if __name__ == "__main__":
    try:
        main()
    except emf.UserError as error:
        sys.exit(str(error))
