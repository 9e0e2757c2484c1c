"""Every observable looks at a simulation as it looks at a trained model: its rows are finite, or undefined and counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import told, variants

from emformer import parts, theory
from emformer.kernels import L2, Sinkhorn, Softmax
from emformer.masks import Causal
from emformer.observables import Look, Pass
from emformer.observables.base import lacks
from emformer.observables.controls import GradientControls
from emformer.observables.frame import defaults
from emformer.observables.gaussian import Gaussian
from emformer.observables.lens import Lens
from emformer.observables.wgf import GradientFlow
from emformer.trajectory import Trajectory

D = 4
MODELS: dict[str, dict[str, Any]] = {
    "sphere": {},
    "causal heads": {"mask": Causal(), "heads": 2},
    "preln": {"space": "preln"},
    "flat": {"space": "flat"},
    "flat L2": {"space": "flat", "kernel": L2()},
    "sphere Sinkhorn": {"kernel": Sinkhorn(beta=2.0)},
}


def simulated(name: str) -> Trajectory:
    """Three states of 24 starts, general operators: heads of their own, F not tied to M."""
    fields = dict(MODELS[name])
    source = torch.Generator().manual_seed(0)
    heads = fields.pop("heads", 1)
    form, content = (torch.randn(heads, D, D, generator=source, dtype=torch.float64) / 2 for _ in range(2))
    model = theory.idealised(D, form, content, **fields)
    return theory.simulate(model, theory.unit_vectors(24, 8, D), [0.0, 0.2, 0.5], step=0.1)


def wanted() -> list[parts.Observable]:
    """All with their defaults, the costliest with few probes."""
    few = {"GradientFlow": GradientFlow(prompts=2, probes=4), "GradientControls": GradientControls(prompts=1, probes=4)}
    ours = [one for one in defaults() if type(one).__module__.startswith("emformer.")]  # not those of other tests
    return [few.get(type(one).__name__, one) for one in ours]


@pytest.mark.parametrize("name", MODELS)
def test_every_observable_but_the_lens(name):
    seen = simulated(name)
    needs = {type(one).__name__: lacks(one, seen) for one in wanted()}
    assert {type(one).__name__ for one in wanted()} <= {cls.__name__ for cls in variants(parts.Observable)}
    silent = set()
    for one in wanted():
        if needs[type(one).__name__] is not None:
            continue
        rows = told(one, seen)  # which asserts that numbers are finite
        lost = [row for row in rows if row.mean is None and not row.n_dropped]
        assert not lost, lost
        if not rows:
            silent.add(type(one).__name__)
    assert {name for name, need in needs.items() if need} == {"Lens"} and needs["Lens"] == "vocabulary"
    allowed = set() if "L2" not in name else {"GradientFlow", "GradientControls", "Landscape", "Foliation"}
    if not isinstance(MODELS[name].get("kernel", Softmax()), Softmax):
        allowed |= {"Directions"}  # the law of softmax
    assert silent <= allowed


def test_the_lens_says_why_it_is_skipped():
    once = Pass([Look([Lens(), Gaussian()])])
    once.update(simulated("sphere"))
    assert once.skipped == ["lens: skipped, for the trajectory has no vocabulary"] and once.rows()
