"""Studies: what is done with whole models and runs, from checkpoints to a folder of rows, figures and a report."""

from emformer.comparison import compare
from emformer.studies.analysis import analyze

__all__ = ["analyze", "compare"]
