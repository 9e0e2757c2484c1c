"""Operators: M and F, one variant a file."""

from emformer.operators.base import Operator
from emformer.operators.dense import Dense
from emformer.operators.identity import Identity
from emformer.operators.lowrank import LowRank
from emformer.operators.orthogonal import ScaledOrthogonal
from emformer.operators.preconditioned import Preconditioned
from emformer.operators.psd import PSD
from emformer.operators.skew import Skew
from emformer.operators.split import Split
from emformer.operators.symmetric import Symmetric
from emformer.operators.tied import Tied

__all__ = [
    "PSD",
    "Dense",
    "Identity",
    "LowRank",
    "Operator",
    "Preconditioned",
    "ScaledOrthogonal",
    "Skew",
    "Split",
    "Symmetric",
    "Tied",
]
