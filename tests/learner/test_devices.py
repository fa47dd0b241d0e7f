"""Which device a rank computes on."""

from __future__ import annotations

import pytest
import torch

from async_rl.errors import UserError
from async_rl.learner.distributed import choose_device


def test_a_rank_has_the_gpu_of_its_local_rank_or_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", local_rank)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 of this machine has no GPU, it has 2: start at most 2 ranks here"):
        choose_device("auto")
