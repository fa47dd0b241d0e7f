from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_cases import make_data, opened


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files of the recipes."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()
