"""Critic and reference across checkpoints and ranks: resuming equals never stopping, two ranks equal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from learner_cases import message, ragged_rollouts, save_scalar, tiny_run
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from async_rl.config import Algorithm, Critic, Optimizer, Reference, RewardModel, Run
from async_rl.config import Learner as LearnerConfig
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import Abandoned
from async_rl.learner.sharding import gathered, local
from async_rl.learner.trainer import Learner
from tests.many_ranks import in_ranks

STEADY = Optimizer(learning_rate=1e-3, weight_decay=0.1, clip_norm=0.0, eps=1e-4)
"""Adam divides a gradient of about nothing by about nothing: eps keeps rounding from deciding."""
PLAN = [[[0, 3, 7], [1, 2, 4, 5, 6], []], [[], [8, 15], [*range(9, 15)]]]

BEFORE_THE_LOSSES = 9
"""Micro-batches of a rank that the reward model, the reference and the critic are asked about."""


def everything(folder: Path, preset: str = "ppo") -> Run:
    """PPO with all four models, the reference refreshed every two steps, a KL coefficient that adapts."""
    return tiny_run(
        algorithm=Algorithm(preset=preset, options={"kl_coef": 0.2, "kl_target": 0.5, "kl_horizon": 50}),
        optimizer=STEADY,
        reference=Reference(refresh_steps=2),
        critic=Critic(init="reward_model", optimizer=STEADY, epochs=3, clip=0.05),
        reward_model=RewardModel(path=save_scalar(folder / "reward", seed=7, bias=0.1)),
    )


def train(learner: Learner, steps: int, plan: list[list[list[int]]] | None = None) -> list[dict[str, float]]:
    rows = []
    for _ in range(steps):
        step = learner.version
        batch = message(ragged_rollouts(seed=step, version=step), plan, step=step, version=step)
        rows.append({name: value for name, value in learner.train(batch).items() if name != "train_s"})
    return rows


def parameters(learner: Learner) -> list[tuple[str, Tensor]]:
    """Of every model of the learner that may change."""
    critic, reference = learner.roles.critic, learner.roles.reference
    assert critic is not None and reference is not None
    modules = {"policy": learner.model, "critic": critic.module, "reference": reference.model}
    return [(f"{role}/{name}", p.detach()) for role, m in modules.items() for name, p in m.named_parameters()]


def state(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in parameters(learner)}


@pytest.mark.parametrize("preset", ["ppo", "async_ppo"])
def test_resume_equals_never_stopping(ranks: Ranks, tmp_path: Path, preset: str) -> None:
    run = everything(tmp_path, preset)
    straight, first = Learner(run, tmp_path / "straight", ranks), Learner(run, tmp_path / "stopped", ranks)
    expected = train(straight, 6)
    before = train(first, 3)
    path = first.save_checkpoint()
    second = Learner(run, tmp_path / "stopped", ranks)
    assert second.version == 3
    assert before + train(second, 3) == expected
    assert len({row["kl_coef"] for row in expected}) == 6, "it has adapted after every step"
    found = state(second)
    for name, tensor in state(straight).items():
        assert torch.equal(found[name], tensor), name
    critic = first.roles.critic
    assert critic is not None
    saved = AutoModelForSequenceClassification.from_pretrained(path / "critic")
    assert torch.equal(saved.score.weight, critic.module.model.score.weight)
    assert not (path / "reward_model").exists(), "nothing changes it"


def test_a_reference_that_stays_is_not_part_of_a_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    run = msgspec.structs.replace(everything(tmp_path), reference=Reference())
    first = Learner(run, tmp_path / "run", ranks)
    train(first, 2)
    assert not (first.save_checkpoint() / "reference").exists()
    again = Learner(run, tmp_path / "run", ranks)
    fresh = Learner(run, tmp_path / "fresh", ranks)
    found, expected = state(again), state(fresh)
    assert all(torch.equal(found[name], expected[name]) for name in found if name.startswith("reference/"))
    assert train(again, 1) == train(first, 1)


def train_with_others(rank: int, directory: str, run: Run) -> Any:
    """One of two ranks. Rank 0 returns its metrics and the weights; all return how many rows of them they hold, and the
    coefficient of the KL."""
    ranks = Ranks.start(torch.device("cpu"))
    learner = Learner(run, Path(directory), ranks)
    rows: list[dict[str, float]] = []
    if rank == 0:
        rows = train(learner, 3, PLAN)
        calls = iter(range(BEFORE_THE_LOSSES))
        with pytest.raises(Abandoned):
            learner.train(message(ragged_rollouts(seed=3, version=3), PLAN, step=3), lambda: next(calls, None) is None)
        learner.save_checkpoint()
        learner.close()
    else:
        learner.follow()
        learner.close()
    mine = {name: len(local(parameter)) for name, parameter in parameters(learner)}
    found = {name: tensor.numpy().copy() for name, tensor in gathered(parameters(learner), ranks)}
    ranks.stop()
    return rows, found, mine, learner.roles.kl_coefficient.value


@pytest.mark.processes
@pytest.mark.parametrize(("sharding", "preset"), [("none", "ppo"), ("full", "ppo"), ("full", "async_ppo")])
def test_two_ranks_equal_one(ranks: Ranks, tmp_path: Path, sharding: Any, preset: str) -> None:
    """Also where a rank has a micro-batch without anything to train on."""
    run = everything(tmp_path / "models", preset)
    shared = msgspec.structs.replace(run, learner=LearnerConfig(sharding=sharding, ranks=2, mismatch_steps=0))
    (rows, found, mine, kl_coef), other = in_ranks(2, train_with_others, str(tmp_path / "two"), shared)
    assert other[-1] == kl_coef, "every rank has the same, to the last bit"
    for name in ("policy/", "critic/model.", "reference/"):
        assert mine[f"{name}model.layers.0.mlp.up_proj.weight"] == (256 if sharding == "none" else 128)
    alone = Learner(run, tmp_path / "one", ranks)
    for expected, row in zip(train(alone, 3), rows, strict=True):
        for name in expected:
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert kl_coef == pytest.approx(alone.roles.kl_coefficient.value, rel=1e-5), "an abandoned step leaves it"
    for name, tensor in state(alone).items():
        torch.testing.assert_close(torch.from_numpy(found[name]), tensor, atol=1e-5, rtol=1e-4, msg=name)
    resumed = Learner(run, tmp_path / "two", ranks)
    assert resumed.version == 3 and resumed.roles.kl_coefficient.value == kl_coef
    for name, tensor in state(resumed).items():
        assert torch.equal(tensor, torch.from_numpy(found[name])), name
    for expected, row in zip(train(alone, 2), train(resumed, 2), strict=True):
        assert row["value_loss"] == pytest.approx(expected["value_loss"], rel=1e-4)
