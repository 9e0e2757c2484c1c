"""Training with Lightning: objectives, optimisers, loggers, and `fit`."""

from emformer.training.cadences import AtEnd, Every, LogSpaced
from emformer.training.fit import Result, fit
from emformer.training.learner import Learner
from emformer.training.loggers import TensorBoard, Wandb
from emformer.training.objectives import MaskedToken, NextToken
from emformer.training.optimizers import AdamW, Muon
from emformer.training.penalties import Frobenius, Nuclear
from emformer.training.recording import BreathingCallback, ClusteringCallback, FlowCallback, ObservableCallback, Recording, record

__all__ = [
    "AdamW",
    "AtEnd",
    "BreathingCallback",
    "ClusteringCallback",
    "Every",
    "FlowCallback",
    "Frobenius",
    "Learner",
    "LogSpaced",
    "MaskedToken",
    "Muon",
    "NextToken",
    "Nuclear",
    "ObservableCallback",
    "Recording",
    "Result",
    "TensorBoard",
    "Wandb",
    "fit",
    "record",
]
