"""Follow a training run with observables of your choice, on your own text: copy this file and change any part.

python train/analyze.py runs/default --text FILE
"""

import argparse

import emformer as emf
from emformer.observables import Look
from emformer.observables.breathing import Breathing
from emformer.observables.clustering import Clustering
from emformer.observables.energy import Energy
from emformer.observables.flow import Flow, Transport

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("source", help="a run, a checkpoint, a Hugging Face folder or name")
options.add_argument("--text", help="a text file; by default the run's own validation text")
options.add_argument("--out", help="the folder of the analysis")
options.add_argument("--tokens", type=int, help="read so many at most")

OBSERVABLES = [
    Look([Flow(), Clustering(points=512, k=8)]),  # the whole text
    Look([Breathing(points=2048)]),  # 2,048 last tokens drawn from all of it
    Look([Breathing(points=2048)], 2048, "shuffled"),  # the same words without their syntax
    Look([Energy(), Transport(skip=1)], 512),  # a fair sample: the text is read in random order
]
SHOWN = {"flow.speed_rel": "moved", "clu.mean_cos": "cosine", "geo.id_twonn": "dimension"}


def main() -> None:
    given = options.parse_args()
    whole_run = emf.Run(given.source).checkpoints.is_dir()
    folder = emf.analyze(
        given.source,
        text=given.text,
        out=given.out,
        tokens=given.tokens,
        observables=OBSERVABLES,
        checkpoints="all" if whole_run else "last",
    )
    records = emf.read_records(folder)
    last = records["layer"].max()
    told = records[records["key"].isin(SHOWN) & (records["layer"] == last) & records["head"].isna() & records["param"].isna()]
    told = told[(told["point"] != "attn") & (told["cloud"] == "raw")]
    table = told.assign(key=told["key"].map(SHOWN)).pivot_table("mean", "step", "key")
    print(f"after layer {last}, by training step\n\n{table.round(3).to_string()}\n\nmore in {folder}/report.html")


if __name__ == "__main__":
    main()
