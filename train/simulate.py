"""An idealised model, and attention layers of a trained one acting for ever, seen alike: copy this file and change any part.

python train/simulate.py [runs/default]
"""

import argparse

import pandas as pd
import torch

import emformer as emf
from emformer import figures, theory
from emformer.figures.charts import draw
from emformer.kernels import Softmax
from emformer.observables.clustering import Clustering
from emformer.theory.outcome import Curves

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("run", nargs="?", help="a run or whatever else emformer.load takes; without, theory alone")
options.add_argument("--beta", type=float, default=4.0, help="inverse temperature of the idealised models")
options.add_argument("--time", type=float, default=30.0, help="how long; a layer of a transformer takes 1")
options.add_argument("--out", default="simulated.png", help="the figure")

TEXT = "The with statement is used to wrap the execution of a block with methods defined by a context manager."


def cosines(name: str, found: emf.Trajectory) -> pd.DataFrame:
    """How alike tokens are, by time: any observable would do, on any trajectory."""
    rows = emf.observe(found, [Clustering()])
    rows = rows[(rows["key"] == "clu.mean_cos") & (rows["cloud"] == "raw")]
    return pd.DataFrame({"panel": "", "line": name, "x": theory.times_of(found), "y": rows["mean"].to_numpy()})


def main() -> None:
    given = options.parse_args()
    times = [given.time * (k / 30) ** 2 for k in range(31)]
    found = {}
    for space in ("sphere", "preln"):  # Post-LN and Pre-LN without end
        ideal = theory.idealised(64, kernel=Softmax(beta=given.beta), space=space)
        found[f"theory, {space}"] = theory.simulate(ideal, theory.unit_vectors(4, 32, 64), times, step=0.1)
    if given.run:
        run = emf.load(given.run)
        tokens = torch.tensor([run.tokenizer.encode(TEXT).ids])
        for step in run.model.flow(tokens):
            if step.mixture is not None:  # attention, from where the model itself stands before this layer
                alone = theory.autonomous(run.model, step.layer, ffn=False)
                found[f"layer {step.layer}"] = theory.simulate(alone, step.before.detach(), times, step=0.25)
    frame = pd.concat(cosines(name, trajectory) for name, trajectory in found.items())
    chart = Curves(frame, "How alike tokens become where one layer acts for ever.", "time", "mean cosine")
    print(frame.pivot_table("y", "x", "line").iloc[::6].round(3).to_string())
    print("wrote", figures.save(draw(chart), given.out))


if __name__ == "__main__":
    main()
