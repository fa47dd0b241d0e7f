"""What each model of the learner holds, and what nobody may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from learner_cases import message, ragged_rollouts, save_scalar, tiny_run

from async_rl.config import Algorithm, Critic, Reference, RewardModel, Run
from async_rl.config import Learner as LearnerConfig
from async_rl.doctor.footprint import footprint
from async_rl.learner.distributed import Ranks
from async_rl.learner.trainer import Learner


def measured(run: Run, ranks: Ranks, directory: Path) -> dict[str, Any]:
    learner = Learner(run, directory, ranks)
    learner.train(message(ragged_rollouts(seed=3)))
    return json.loads((directory / "memory.json").read_text())


@pytest.fixture
def everything(tmp_path: Path) -> Run:
    reward = RewardModel(path=save_scalar(tmp_path / "reward", seed=7))
    return tiny_run(algorithm=Algorithm(preset="ppo"), reward_model=reward, critic=Critic(init="reward_model"))


def test_ppo_holds_four_models(ranks: Ranks, tmp_path: Path, everything: Run) -> None:
    held = measured(everything, ranks, tmp_path / "run")
    assert list(held) == ["policy", "critic", "reference", "reward_model"]
    policy = Learner(everything, tmp_path / "other", ranks).model.num_parameters()
    for role in ("policy", "critic"):
        weights, gradients, optimizer = (held[role][kind]["cpu"] for kind in ("weights", "gradients", "optimizer"))
        assert gradients == pytest.approx(4 * policy, rel=0.05) and weights == pytest.approx(gradients, rel=0.01)
        assert optimizer == pytest.approx(2 * gradients, rel=0.01), "two moments of Adam"
    for role in ("reference", "reward_model"):
        assert held[role].keys() == {"weights", "gradients"}, "no optimiser"
        assert held[role]["gradients"] == {} and held[role]["weights"]["cpu"] == pytest.approx(4 * policy, rel=0.05)


@pytest.mark.parametrize(("preset", "roles"), [("async_default", ["policy"]), ("grpo", ["policy", "reference"])])
def test_a_method_without_a_critic_allocates_none(ranks: Ranks, tmp_path: Path, preset: str, roles: list[str]) -> None:
    run = tiny_run(algorithm=Algorithm(preset=preset))
    assert list(measured(run, ranks, tmp_path)) == roles == list(footprint(run).models)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_doctor_foresees_it(ranks: Ranks, tmp_path: Path, everything: Run, dtype: Any) -> None:
    run = msgspec.structs.replace(everything, learner=LearnerConfig(dtype=dtype))
    held, foreseen = measured(run, ranks, tmp_path / "run"), footprint(run).models
    assert held.keys() == foreseen.keys()
    for role, kinds in held.items():
        total = sum(count for by in kinds.values() for count in by.values())
        assert total == pytest.approx(foreseen[role], rel=0.1), role


def test_parked_models_are_counted_in_host_memory_too(everything: Run) -> None:
    run = msgspec.structs.replace(everything, reference=Reference(offload=True))
    plain, parked, gpu = footprint(everything), footprint(run), torch.device("cuda")
    assert parked.parked == parked.models["reference"] and plain.parked == 0
    taken = [one.by_device(run, gpu, gpu)["cpu"] for one in (plain, parked)]
    assert taken[1] - taken[0] == parked.parked
    changing = footprint(msgspec.structs.replace(everything, reference=Reference(refresh_steps=5)))
    assert changing.checkpoint - plain.checkpoint == plain.models["reference"], "a reference that changes is saved"
    assert plain.checkpoint == 2 * footprint(tiny_run()).checkpoint, "the critic is saved like the policy"
