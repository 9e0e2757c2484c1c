"""make bench: speed as ratios, each measured in one run, the two sides alternating. Machines are shared and noisy: a ratio of
medians over interleaved rounds survives that, a time does not.

    python -m tests.bench [NAME …] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from emformer import Emformer
from emformer.block import PreNorm
from emformer.ffn import GELU, ReLU2
from emformer.inspection import costs
from emformer.kernels import Softmax
from emformer.masks import Causal
from emformer.memory import keep_freed_memory
from emformer.norms import LayerNorm, RMSNorm
from emformer.operators import Dense, LowRank
from emformer.positions import RoPE
from emformer.settings import Drift, Embedding, Functional, Learned, Model
from emformer.training import AdamW, Muon
from tests.bench import ablation as of_ablation
from tests.bench import capture as of_capture
from tests.bench import recording as of_recording
from tests.bench import report as of_report
from tests.bench import theory as of_theory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 66


def geometry(operator=None, **changes) -> Model:
    """4 layers, 4 heads, d = 128, context 64: configs/shakespeare-char.yaml."""
    operator = operator or LowRank(rank=32)
    fields = dict(
        dim=128,
        depth=4,
        heads=4,
        context=64,
        form=operator,
        content=operator,
        kernel=Softmax(),
        mask=Causal(),
        placement=PreNorm(),
        positions=[RoPE()],
        norm=RMSNorm(),
        ffn=ReLU2(),
    )
    return Model(**(fields | changes))


def gpt2_shape(context: int = 64) -> Model:
    """The same with everything that GPT-2 has: biases, LayerNorm with bias, GELU, learned positions, tied embedding."""
    return geometry(
        context=context,
        positions=[],
        norm=LayerNorm(bias=True),
        ffn=GELU(bias=True),
        functional=Functional(),
        drift=Drift(),
        embedding=Embedding(std=0.02, tied=True, positions=Learned()),
    )


def peer(context: int = 64) -> torch.nn.Module:
    """GPT-2 of `transformers` in the same shape, without dropout, with its fused attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=context,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).to(DEVICE)


def stepper(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: int = 12, context: int = 64) -> Callable[[], None]:
    """One training step on random tokens."""
    tokens = torch.randint(VOCAB, (batch, context + 1), device=DEVICE)

    def step() -> None:
        out = model(tokens[:, :-1])
        logits = out if isinstance(out, torch.Tensor) else out.logits
        functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(call: Callable[[], None], repeats: int) -> float:
    """Seconds a call, over `repeats` of them."""
    _wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return (time.perf_counter() - begin) / repeats


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def alternating(a: Callable[[], None], b: Callable[[], None], rounds: int, repeats: int) -> dict[str, float]:
    """Median over rounds of time(a)/time(b), its quartiles, and the median times in milliseconds."""
    for call in (a, b):
        timed(call, max(1, repeats // 2))
    pairs = []
    for k in range(rounds):
        first, second = (a, b) if k % 2 == 0 else (b, a)
        times = {id(first): timed(first, repeats), id(second): timed(second, repeats)}
        pairs.append((times[id(a)], times[id(b)]))
    ratios = [x / y for x, y in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": statistics.median(ratios),
        "quartile_low": low,
        "quartile_high": high,
        "first_ms": 1e3 * statistics.median(x for x, _ in pairs),
        "second_ms": 1e3 * statistics.median(y for _, y in pairs),
        "rounds": rounds,
    }


def training(rounds: int) -> dict:
    """training step / transformers GPT-2 of the same shape, AdamW, eager            goal <= 1.0"""
    ours, theirs = Emformer(VOCAB, **vars(gpt2_shape())).to(DEVICE), peer()
    adam = {"lr": 1e-3, "fused": True}
    return alternating(
        stepper(ours, AdamW().build(ours)), stepper(theirs, torch.optim.AdamW(theirs.parameters(), **adam)), rounds, 10
    ) | {"goal": "<= 1.0"}


def dense(rounds: int) -> dict:
    """dense step / low-rank step, d = 128, H = 4, Muon                              goal <= 1.5"""
    models = [Emformer(VOCAB, **vars(geometry(operator))).to(DEVICE) for operator in (Dense(), LowRank(rank=32))]
    found = alternating(*(stepper(model, Muon().build(model)) for model in models), rounds, 10)
    flops = [costs(VOCAB, model.settings).training_flops for model in models]
    return found | {"flops_ratio_without_optimizer": flops[0] / flops[1], "goal": "<= 1.5"}


def dense_adamw(rounds: int) -> dict:
    """dense step / low-rank step, d = 128, H = 4, AdamW                             goal <= 1.5"""
    models = [Emformer(VOCAB, **vars(geometry(operator))).to(DEVICE) for operator in (Dense(), LowRank(rank=32))]
    return alternating(*(stepper(model, AdamW().build(model)) for model in models), rounds, 10) | {"goal": "<= 1.5"}


def muon(rounds: int) -> dict:
    """Muon's optimiser step / whole step, low-rank, batch 12 x 64                   goal <= 0.35"""
    model = Emformer(VOCAB, **vars(geometry())).to(DEVICE)
    optimizer = Muon().build(model)
    whole = stepper(model, optimizer)
    tokens = torch.randint(VOCAB, (12, 64), device=DEVICE)
    functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    gradients = {p: p.grad.clone() for p in model.parameters()}

    def alone() -> None:
        for p, gradient in gradients.items():
            p.grad = gradient
        optimizer.step()

    return alternating(alone, whole, rounds, 10) | {"goal": "<= 0.35", "optimizer_flops": optimizer.flops}


def decoding(rounds: int) -> dict:
    """cached decoding, tokens/s, / transformers generate with its cache             goal >= 2"""
    ours, theirs = Emformer(VOCAB, **vars(gpt2_shape(256))).to(DEVICE).eval(), peer(256).eval()
    prompt = torch.randint(VOCAB, (1, 16), device=DEVICE)

    def mine() -> None:
        ours.generate(prompt, 200, top_k=20, seed=0)

    def hugging() -> None:
        with torch.inference_mode():
            theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, do_sample=True, top_k=20)

    found = alternating(hugging, mine, max(3, rounds // 2), 1)
    return found | {"tokens_per_second": 200e3 / found["second_ms"], "goal": ">= 2"}


BENCHES: dict[str, Callable[[int], dict]] = {bench.__name__: bench for bench in (training, dense, dense_adamw, muon, decoding)}


def _of_recording(bench: Callable[..., dict]) -> Callable[[int], dict]:
    def measured(rounds: int) -> dict:
        return bench(alternating, rounds)

    measured.__doc__ = bench.__doc__
    return measured


_OTHERS = (*of_recording.BENCHES, *of_report.BENCHES, *of_capture.BENCHES, *of_theory.BENCHES, *of_ablation.BENCHES)
BENCHES |= {bench.__name__: _of_recording(bench) for bench in _OTHERS}


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default: 15)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    unknown = set(options.names) - BENCHES.keys()
    if unknown:
        sys.exit(f"no bench named {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    torch.manual_seed(0)
    keep_freed_memory()  # for both sides
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, float32; medians of {options.rounds} interleaved rounds [quartiles]\n")
    results = {}
    for key in options.names or BENCHES:
        found = results[key] = BENCHES[key](options.rounds)
        print(
            f"{key:<18}{found['ratio']:6.2f} [{found['quartile_low']:.2f}, {found['quartile_high']:.2f}]   "
            f"({found['first_ms']:.2f} ms / {found['second_ms']:.2f} ms)   {(BENCHES[key].__doc__ or '').strip()}",
            flush=True,
        )
        for extra in found.keys() - {
            "ratio",
            "quartile_low",
            "quartile_high",
            "first_ms",
            "second_ms",
            "rounds",
            "goal",
        }:
            print(f"{'':<18}{extra} {found[extra]:,.4g}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
