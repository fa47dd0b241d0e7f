from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stage_cases import make_data, opened

from async_rl.learner.distributed import Ranks


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks.start(torch.device("cpu"))
    yield started
    started.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files of the recipes."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()
