"""Every variant trained on the grammar: loss with and without its attention, cost counted and measured. Prints a table.

python train/variants.py [NAME …] [--runs runs/variants]
"""

import argparse
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

import emformer as emf
from emformer import surgery
from emformer.evaluation import evaluate
from emformer.inspection import costs

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("names", nargs="*", help="variants (default: all in configs/variants)")
options.add_argument("--runs", type=Path, default=Path("runs/variants"), help="finished runs here are not run again")
options.add_argument("--steps", type=int, help="instead of each configuration's")
options.add_argument("--rounds", type=int, default=15, help="of timing, against the low-rank softmax step in turn")
FOLDER = Path(__file__).parents[1] / "configs" / "variants"


def settings(name: str) -> emf.Settings:
    """The variant on top of the configuration that its own comment names."""
    base = re.search(r"fit -c (\S+)", (FOLDER / f"{name}.yaml").read_text())[1]
    return emf.read_settings(FOLDER.parents[1] / base, FOLDER / f"{name}.yaml")


def stepper(config: emf.Settings, vocab: int):
    """(a training step on random tokens, its FLOPs counted)."""
    model, training = emf.Emformer(vocab, **vars(config.model)), config.training
    optimizer, tokens = training.optimizer.build(model), torch.randint(vocab, (training.batch, config.model.context))

    def step() -> None:
        functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for penalty in training.penalties:
            penalty.shrink(model, 1e-9)

    counted = costs(vocab, config.model)
    return step, counted.training_flops * tokens.numel() + 3 * counted.setup_flops + getattr(optimizer, "flops", 0)


def seconds(step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    given = options.parse_args()
    print(
        "| variant | loss | attention skipped | step time | FLOPs | parameters | cache a token |\n|---|---|---|---|---|---|---|"
    )
    for name in given.names or sorted(path.stem for path in FOLDER.glob("*.yaml")):
        config = settings(name)
        config = replace(config, training=replace(config.training, max_steps=given.steps or config.training.max_steps, sample=0))
        run = emf.load(emf.fit(config, given.runs / name, resume=True).path)
        skipped = evaluate(replace(run, model=surgery.skip(run.model, "attn")))
        (ours, flops), (base, base_flops) = stepper(config, run.model.vocab), stepper(settings("lowrank"), run.model.vocab)
        pairs = [(seconds(ours), seconds(base)) for _ in range(given.rounds + 2)][2:]
        counted = costs(run.model.vocab, config.model)
        print(
            f"| {name} | {evaluate(run).loss:.3f} | {skipped.loss:.3f} | {statistics.median(a / b for a, b in pairs):.2f} "
            f"| {flops / base_flops:.2f} | {counted.parameters:,} | {counted.cache} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
