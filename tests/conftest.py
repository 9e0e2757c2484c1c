"""What all tests share: a seed. Nothing here changes a global setting of torch."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="all of the 2,000 damaged files, of the traced variants, kills and objectives of two processes, not a share of them",
    )


@pytest.fixture(params=range(5), ids="seed{}".format)
def seed(request: pytest.FixtureRequest) -> int:
    """The seeds 0 … 4, one test each; the global generator starts from it."""
    torch.manual_seed(request.param)
    return request.param
