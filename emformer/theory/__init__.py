"""The idealised models of the theory, as simulations in the same objects and numbers as trained ones.

from emformer import theory
model = theory.idealised(dim=3, kernel=Softmax(beta=4.0))
trajectory = theory.simulate(model, theory.unit_vectors(1, 32, 3), times=[0, 1, 2, 5, 10])
emformer.observe(trajectory, ["clustering", "wgf"])
"""

from emformer.theory.ensembles import ensemble
from emformer.theory.gaussian import Law, closure, evolve
from emformer.theory.marching import march
from emformer.theory.particles import autonomous, idealised, simulate, sweep, times_of, unit_vectors

__all__ = [
    "Law",
    "autonomous",
    "closure",
    "ensemble",
    "evolve",
    "idealised",
    "march",
    "simulate",
    "sweep",
    "times_of",
    "unit_vectors",
]
