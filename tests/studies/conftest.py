"""One small run for all studies."""

from __future__ import annotations

import pytest
import tiny  # beside this file

from emformer.records import Run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run; no test may change it."""
    return tiny.trained(tmp_path_factory.mktemp("studies"))
