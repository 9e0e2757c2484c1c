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
    (base,) = re.findall(r"fit -c (\S+) -c", (FOLDER / f"{name}.yaml").read_text())
    return emf.read_settings(FOLDER.parents[1] / base, FOLDER / f"{name}.yaml")


def stepper(config: emf.Settings, vocab: int):
    """(seconds that a training step on random tokens takes, its FLOPs counted)."""
    model, training = emf.Emformer(vocab, **vars(config.model)), config.training
    optimizer, tokens = training.optimizer.build(model), torch.randint(vocab, (training.batch, config.model.context))

    def seconds() -> float:
        begin = time.perf_counter()
        functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for penalty in training.penalties:
            penalty.shrink(model, 1e-9)
        return time.perf_counter() - begin

    return seconds, costs(vocab, config.model).step_flops(tokens.numel()) + getattr(optimizer, "flops", 0)


def main() -> None:
    given = options.parse_args()
    columns = "variant", "loss", "attention skipped", "seconds", "step time", "FLOPs", "parameters", "cache a token"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in given.names or sorted(path.stem for path in FOLDER.glob("*.yaml")):
        config = settings(name)
        steps = given.steps or config.training.max_steps
        config = replace(config, callbacks=[], training=replace(config.training, max_steps=steps, sample=0))
        begin = time.perf_counter()
        run = emf.load(emf.fit(config, given.runs / name, resume=True).path)
        took, skipped = time.perf_counter() - begin, run.having(surgery.skip(run.model, "attn"))
        (ours, flops), (base, of_base) = (stepper(one, run.model.vocab) for one in (config, settings("lowrank")))
        ratio = statistics.median(ours() / base() for _ in range(given.rounds + 2))
        counted = costs(run.model.vocab, config.model)
        figures = f"{evaluate(run).loss:.3f} | {evaluate(skipped).loss:.3f} | {took:.0f} | {ratio:.2f} | {flops / of_base:.2f}"
        print(f"| {name} | {figures} | {counted.parameters:,} | {counted.cache} |", flush=True)


if __name__ == "__main__":
    main()
