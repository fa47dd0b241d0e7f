from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from async_rl.learner.distributed import Ranks


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A world of one, under torch.distributed like any other."""
    started = Ranks.start(torch.device("cpu"))
    yield started
    started.stop()
