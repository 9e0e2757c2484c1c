"""Operators: M and F, one variant a file."""

from emformer.operators.base import Operator
from emformer.operators.dense import Dense
from emformer.operators.lowrank import LowRank

__all__ = ["Dense", "LowRank", "Operator"]
