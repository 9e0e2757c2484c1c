"""What all tests share: a seed. Nothing here changes a global setting of torch."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="all of the 2,000 damaged files, of the traced variants, kills and objectives of two processes, not a share of them",
    )


# files of one process that take longest: begun last, they would keep it busy while the others have nothing left
FIRST = ("test_readme.py", "test_ddp.py", "test_model_contract.py", "test_resume.py", "test_damaged_files.py", "test_kills.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(params=range(5), ids="seed{}".format)
def seed(request: pytest.FixtureRequest) -> int:
    """The seeds 0 … 4, one test each; the global generator starts from it."""
    torch.manual_seed(request.param)
    return request.param
