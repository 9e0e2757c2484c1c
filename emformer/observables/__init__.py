"""Observables: trajectory to rows, one family a file; formulas live in `emformer.geometry`."""

from emformer.observables.base import COLUMNS, Look, Moments, Observation, Pass, Place, Reservoir, Row, estimate

__all__ = ["COLUMNS", "Look", "Moments", "Observation", "Pass", "Place", "Reservoir", "Row", "estimate"]
