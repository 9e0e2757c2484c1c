"""Training with Lightning: objectives, optimisers, loggers, and `fit`."""

from emformer.training.fit import Result, fit
from emformer.training.learner import Learner
from emformer.training.loggers import TensorBoard, Wandb
from emformer.training.objectives import MaskedToken, NextToken
from emformer.training.optimizers import AdamW, Muon
from emformer.training.penalties import Frobenius, Nuclear

__all__ = [
    "AdamW",
    "Frobenius",
    "Learner",
    "MaskedToken",
    "Muon",
    "NextToken",
    "Nuclear",
    "Result",
    "TensorBoard",
    "Wandb",
    "fit",
]
