"""Figures: what is drawn equals what is in the frame; what is missing or undefined is said; files are exact and atomic."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

COLUMNS = [
    "step",
    "layer",
    "point",
    "head",
    "key",
    "cloud",
    "param",
    "mean",
    "sd",
    "se",
    "n_valid",
    "n_dropped",
    "null",
    "null_sd",
]
STEPS = (0, 1, 5, 20, 80, 300)
KEYS = {
    "sawtooth": ["geo.id_twonn"],
    "flow": ["flow.speed_rel", "flow.angular", "flow.interference", "flow.head_cancel"],
    "cosines": ["clu.mean_cos", "clu.mean_cos_centred"],
    "separation": ["clu.wt_ratio"],
    "clusters": ["clu.components", "clu.silhouette"],
    "energy": ["attn.entropy_norm", "attn.sink_rate"],
}


def records(
    depth: int = 4, heads: int = 4, steps: Iterable[int] = STEPS, parallel: bool = False, run: str | None = "runs/default"
):
    """A frame like that of a run that learns: sublayers breathe, tokens gather, classes come apart, more so with training."""
    steps = list(steps)
    draw = np.random.default_rng(0)
    moves = [(layer, point) for layer in range(depth) for point in (("block",) if parallel else ("attn", "ffn"))]
    states = [(0, "embed"), *moves]
    rows = []

    def add(step, place, key, mean, se=0.01, null=None, null_sd=None, head=None, cloud="raw", param=None, n=64):
        row = (step, *place, head, key, cloud, param, mean, se * math.sqrt(n), se, n, 0, null, null_sd)
        rows.append(dict(zip(COLUMNS, row, strict=True)))

    for step in steps:
        grown = math.log1p(step) / math.log1p(max(*steps, 1))
        for cloud, scale in (("raw", 1.0), ("read", 0.9)):
            for order in ("text", "shuffled") if step == steps[-1] else ("text",):
                lift = grown * (0.2 if order == "shuffled" else 1.0)
                for k, place in enumerate(states):
                    tooth = 1.6 * lift * (place[1] == "attn") + 0.4 * lift * k / len(states)
                    d = scale * (14 - 5 * grown * k / len(states) + tooth) + draw.normal(0, 0.2)
                    add(step, place, "geo.id_twonn", d, d / 32, cloud=cloud, param=None if order == "text" else order, n=1000)
            for layer in range(depth if not parallel else 0):
                up = grown * 0.11 + draw.normal(0, 0.02)
                add(step, (layer, "attn"), "breath.b_attn", up, 0.03, 0.0, cloud=cloud, n=1000)
                add(step, (layer, "ffn"), "breath.b_mlp", -up, 0.03, 0.0, cloud=cloud, n=1000)
            if not parallel:
                add(step, (None, None), "breath.sawtooth", 0.25 + 0.5 * (step > 5), 0.2, 0.25, cloud=cloud, n=depth)
                add(step, (None, None), "breath.p_value", 0.051, 0, cloud=cloud, n=depth)
        for k, (layer, point) in enumerate(moves):
            kind = 1.0 if point == "attn" else 1.4
            place = (layer, point)
            speed = kind * (0.3 + 0.5 * grown) / (1 + layer) ** (0.3 + 0.2 * grown)
            add(step, place, "flow.speed_rel", speed, 0.01)
            add(step, place, "flow.angular", math.atan(speed) + draw.normal(0, 0.01), 0.01)
            add(
                step,
                place,
                "flow.interference",
                0.4 * grown * (k / len(moves) - 0.4) + draw.normal(0, 0.01),
                0.01,
                0.0,
                128**-0.5 / 8,
            )
            if point != "ffn":
                add(step, place, "flow.head_cancel", 0.5 - 0.25 * grown + draw.normal(0, 0.02), 0.01, 1 - heads**-0.5)
                for head in range(heads):
                    own = {"head": head, "n": 64}
                    spread = np.clip(0.98 - grown * draw.uniform(0, 0.7), 0, 1)
                    add(step, place, "attn.entropy_norm", float(spread), 0.01, 1.0, **own)
                    sink = grown * (head == layer % heads) * draw.uniform(0.3, 0.9) + draw.uniform(0, 0.02)
                    add(step, place, "attn.sink_rate", sink, 0.01, 0.0, param="eps=0.3", **own)
        for k, place in enumerate(states):
            share = k / (len(states) - 1)
            add(step, place, "clu.mean_cos", grown * (0.1 + 0.6 * share**1.5) + draw.normal(0, 0.01), 0.01, 0.0)
            add(step, place, "clu.mean_cos_centred", -1 / 511 + draw.normal(0, 0.003), 0.001, -1 / 511)
            for c, power in (("c=0.9", 1.0), ("c=0.99", 0.5), ("c=0.999", 0.15)):
                count = 512 * (1 - 0.97 * grown * share) ** power
                add(step, place, "clu.components", max(1.0, count), 0, 512.0, param=c, n=512)
            add(step, place, "clu.silhouette", 0.04 + 0.3 * grown * share, 0.01, 0.0, param="k=8", n=512)
            for label, gain in (("label=class", 0.6), ("label=token", 0.4)):
                base = 0.985 if label == "label=class" else 0.9
                add(step, place, "clu.wt_ratio", base - gain * grown * share, 0.008, base, 0.004, param=label, n=512)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame if run is None else frame.assign(run=run)
