"""A search over continuous settings with optuna: every trial is a cell like any other."""

from __future__ import annotations

from collections.abc import Sequence

from emformer.parts import UserError
from emformer.studies.cells import Study


def run(study: Study, modules: Sequence[str] = ()) -> None:
    raise UserError(f"{study.path}: a search is not there yet.")
