"""The learner leaves its device between two steps and comes back: what is freed, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from torch import Tensor

from async_rl.config import Algorithm, Environment, Model, TinyModel
from async_rl.errors import UserError
from async_rl.learner.distributed import Ranks, choose_device
from async_rl.learner.trainer import Learner
from async_rl.models.memory import held


def colocated(**sections: Any) -> Any:
    return tiny_run(placement="colocated", **sections)


def state(learner: Learner) -> dict[str, Tensor]:
    tensors = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
    for part in learner.parts:
        assert part.optimizer is not None
        for index, states in enumerate(part.optimizer.state.values()):
            tensors |= {f"{index}/{name}": value.clone() for name, value in states.items()}
    return tensors


@pytest.mark.parametrize("algorithm", [Algorithm(), Algorithm(preset="ppo"), Algorithm(preset="grpo")])
def test_turns_change_no_bit(algorithm: Algorithm, tmp_path: Path, ranks: Ranks) -> None:
    """Critic and reference model included."""
    stays = Learner(tiny_run(algorithm=algorithm), tmp_path / "a", ranks)
    turns = Learner(colocated(algorithm=algorithm), tmp_path / "b", ranks)
    for step in range(3):
        batch = message(ragged_rollouts(seed=step), step=step)
        metrics = stays.train(batch)
        turns.offload.enter()
        assert turns.train(batch)["loss"] == metrics["loss"]
        turns.offload.leave()
        turns.offload.leave()  # it may be told twice
    expected, found = state(stays), state(turns)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_gradients_are_given_back(tmp_path: Path, ranks: Ranks) -> None:
    """On a CPU, as the resident set of the process; the optimiser's state stays, and is as large again twice."""
    model = Model(tiny=TinyModel(characters="0123456789=", hidden_size=512, heads=4, kv_heads=2, layers=6))
    learner = Learner(colocated(model=model, environment=Environment(name="sorting")), tmp_path, ranks)
    gradients = 4 * sum(parameter.numel() for parameter in learner.model.parameters())
    learner.train(message(ragged_rollouts(seed=1)))
    before = held(torch.device("cpu"))
    left = learner.offload.leave()
    assert before - left > 0.9 * gradients > 20e6
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    learner.offload.enter()
    learner.train(message(ragged_rollouts(seed=2), step=1))
    assert held(torch.device("cpu")) - left > 0.9 * gradients


def test_ranks_that_torchrun_started_are_refused(tmp_path: Path) -> None:
    """The recipe could not know of them."""
    with pytest.raises(UserError, match=r"placement = 'colocated': torchrun started 2 learner ranks"):
        Learner(colocated(), tmp_path, Ranks(0, 2, torch.device("cpu"), 1.0))


if torch.cuda.is_available():  # there is nothing to run it on elsewhere

    def test_a_gpu_is_left_empty(tmp_path: Path) -> None:
        ranks = Ranks.start(choose_device("cuda"))
        try:
            learner = Learner(colocated(), tmp_path, ranks)
            device = ranks.device
            assert torch.cuda.memory_allocated(device) == 0, "it starts off the device"
            learner.offload.enter()
            learner.train(message(ragged_rollouts(seed=1)))
            expected = state(learner)
            learner.offload.leave()
            workspaces = torch.cuda.memory_allocated(device)
            assert workspaces < 80 << 20 and all(p.device.type == "cpu" for p in learner.model.parameters())
            learner.offload.enter()
            assert all(torch.equal(value, expected[name]) for name, value in state(learner).items())
            learner.train(message(ragged_rollouts(seed=2), step=1))
        finally:
            ranks.stop()
