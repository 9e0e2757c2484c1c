"""What simulating costs: particles against the clock and against a loop over them, and memory against the number of tokens."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from emformer.kernels import Softmax
from emformer.theory import idealised, simulate, unit_vectors

Timing = Callable[[Callable[[], Any], Callable[[], Any], int, int], dict]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BETA, STEP = 4.0, 0.05
STEPS = 1000


def particles(alternating: Timing, rounds: int) -> dict:
    """1,024 particles, d = 64, beta = 4: float32 / float64; seconds of 1,000 RK4 steps, by 20  goal: seconds <= 60"""
    some = 20  # steps of a turn: all steps cost the same

    def flow(dtype: torch.dtype) -> Callable[[], Any]:
        model = idealised(64, kernel=Softmax(beta=BETA), dtype=dtype).to(DEVICE)
        x = unit_vectors(1, 1024, 64, dtype=dtype).to(DEVICE)
        return lambda: simulate(model, x, [0, some * STEP], step=STEP)

    found = alternating(flow(torch.float32), flow(torch.float64), max(3, rounds // 3), 1)
    times = {"seconds": found["first_ms"], "seconds_float64": found["second_ms"]}
    return found | {name: ms / 1e3 * STEPS / some for name, ms in times.items()} | {"goal": "seconds <= 60"}


def _looped(x: np.ndarray) -> np.ndarray:
    """dx/dt of directions x (N, d), one particle after the other; stages lie off the sphere, as those of `simulate` do."""
    velocity = np.empty_like(x)
    for i, one in enumerate(x):
        weights = np.exp(BETA * (x @ one - 1))
        pull = weights @ x / weights.sum()
        velocity[i] = pull - (pull @ one) / (one @ one) * one
    return velocity


def _rk4(x: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        a = _looped(x)
        b = _looped(x + STEP / 2 * a)
        c = _looped(x + STEP / 2 * b)
        d = _looped(x + STEP * c)
        x = x + STEP / 6 * (a + 2 * b + 2 * c + d)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def particle_loop(alternating: Timing, rounds: int) -> dict:
    """a NumPy loop over particles / simulate, n = 256, d = 64, RK4, float64         goal >= 3"""
    steps = 5
    model = idealised(64, kernel=Softmax(beta=BETA))
    x = unit_vectors(1, 256, 64)
    start = x[0].numpy()

    def ours() -> torch.Tensor:
        return simulate(model, x, [0, steps * STEP], step=STEP).clouds[-1]

    apart = np.abs(ours()[0].numpy() / math.sqrt(64) - _rk4(start, steps)).max()
    assert apart < 1e-12, apart
    found = alternating(lambda: _rk4(start, steps), ours, max(3, rounds // 3), 1)
    return found | {"goal": ">= 3", "difference": float(apart)}


GROWTH = """
import sys
from pathlib import Path

import torch
from emformer.kernels import Softmax
from emformer.theory import idealised, simulate, unit_vectors

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

model = idealised(64, kernel=Softmax(beta=4.0), dtype=torch.float32)
simulate(model, unit_vectors(1, 64, 64, dtype=torch.float32), [0, 0.1], step=0.05)
x = unit_vectors(1, int(sys.argv[1]), 64, dtype=torch.float32)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak()
simulate(model, x, [0, 0.1], step=0.05, method="euler")
print(peak() - before)
"""


def particle_memory(alternating: Timing, rounds: int) -> dict:
    """MB that a flow adds, 16,384 / 8,192 tokens, d = 64 (weights alone: 1,074 / 268)  goal <= 2.5"""
    sizes = {}
    for count in (16_384, 8_192, 4_096):
        done = subprocess.run([sys.executable, "-c", GROWTH, str(count)], capture_output=True, text=True, check=True)
        sizes[count] = int(done.stdout) / 1024
    ratio = sizes[16_384] / sizes[8_192]
    return {
        "ratio": ratio,
        "quartile_low": ratio,
        "quartile_high": ratio,
        "first_ms": sizes[16_384],
        "second_ms": sizes[8_192],
        "rounds": 1,
        "goal": "<= 2.5",
        "megabytes_4096": sizes[4_096],
    }


BENCHES = (particles, particle_loop, particle_memory)
