"""Loss curves of low-rank against dense operators: the same settings, seeds and batches, M and F apart.

python train/compare.py --steps 300 --every 50 --dropout 0.1 --figure train/lowrank-dense.svg
python train/compare.py -c configs/shakespeare-char.yaml --path FILE --steps 300
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

import emformer as emf
from emformer.operators import Dense

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("-c", "--config", default="configs/default.yaml", help="settings with low-rank operators")
options.add_argument("--path", help="a text file instead of the configuration's corpus")
options.add_argument("--steps", type=int, help="instead of the configuration's")
options.add_argument("--every", type=int, help="steps between validations, instead of the configuration's")
options.add_argument("--dropout", type=float, help="instead of the configuration's")
options.add_argument("--seeds", type=int, default=3)
options.add_argument("--only", choices=["low-rank", "dense"], help="one of the two")
options.add_argument("--runs", type=Path, default=Path("runs/compare"), help="finished runs here are not run again")
options.add_argument("--figure", type=Path, help="where to draw the curves (svg, png, pdf)")


def main() -> None:
    given = options.parse_args()
    base = emf.read_settings(given.config)
    steps = given.steps or base.training.max_steps
    base = replace(base, data=replace(base.data, path=given.path or base.data.path), callbacks=[])
    model = base.model if given.dropout is None else replace(base.model, dropout=given.dropout)
    dense = replace(model, form=Dense(), content=Dense(update_std=model.content.update_std))
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, one in {"low-rank": model, "dense": dense}.items():
        if given.only not in (None, name):
            continue
        curves = []
        for seed in range(given.seeds):
            every = given.every or base.training.validate_every
            training = replace(base.training, max_steps=steps, seed=seed, validate_every=every, sample=0)
            run = given.runs / f"{Path(given.config).stem}-{name}-{steps}-{seed}"
            done = emf.fit(replace(base, model=one, training=training), run, resume=True)
            curves.append(emf.Run(done.path).curve("val_loss"))
        final = [curve[max(curve)] for curve in curves]
        spread = statistics.stdev(final) if len(final) > 1 else float("nan")
        print(
            f"{name:<9} {steps} steps: {statistics.mean(final):.4f} nats, sd {spread:.4f} over {len(final)} seeds",
            *final,
        )
        at = sorted(curves[0])
        mean = [statistics.mean(curve[step] for curve in curves) for step in at]
        axes.plot(at, mean, marker="o", markersize=3, label=f"{name} M and F")
        axes.fill_between(at, [min(c[s] for c in curves) for s in at], [max(c[s] for c in curves) for s in at], alpha=0.25)
    axes.set(xlabel="step", ylabel="validation loss, nats per token", title=f"mean and range of {given.seeds} seeds")
    axes.legend()
    if given.figure:
        figure.savefig(given.figure)


if __name__ == "__main__":
    main()
