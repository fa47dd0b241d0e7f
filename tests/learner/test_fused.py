"""Layers and head as torch.compile makes them: the same numbers, and one compilation for any batch.

On a CPU, and traced without a code generator: what is checked is what torch.compile was given, and how often.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from torch import Tensor

from async_rl.config import Learner as LearnerConfig
from async_rl.learner import logprobs, packed_attention
from async_rl.learner.distributed import Ranks
from async_rl.learner.trainer import Learner

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at what it is given


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a GPU."""
    torch.compiler.reset()
    logprobs._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(packed_attention, "uses_spans", lambda model, device: True)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_a_fused_step_equals_a_plain_one(ranks: Ranks, tmp_path: Path, again: bool) -> None:
    found: list[list[Tensor]] = []
    for fused in (False, True):
        run = tiny_run(learner=LearnerConfig(compile=fused, activation_checkpointing=again))
        learner = Learner(run, tmp_path / str(fused), ranks)
        loss = learner.train(message(ragged_rollouts(seed=3)))["loss"]
        found.append([torch.tensor(loss), *[p.grad for p in learner.model.parameters() if p.grad is not None]])
    assert len(found[0]) == len(found[1]) == 22
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, atol=1e-5, rtol=1e-4)


def test_no_batch_compiles_anew(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(tiny_run(learner=LearnerConfig(compile=True)), tmp_path, ranks)
    compiled: list[int] = []
    for step in range(6):
        learner.train(message(ragged_rollouts(seed=step, groups=2 + step % 3), step=step))
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] > 0 and compiled[2:] == compiled[2:3] * 4, compiled
    assert not torch._dynamo.utils.counters["graph_break"]
