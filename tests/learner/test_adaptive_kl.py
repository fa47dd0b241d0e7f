"""The coefficient of the KL in the reward, steered towards a target: learner state that reaches the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from learner_cases import message, ragged_rollouts, save_model, tiny_run

from async_rl.algorithms.presets import preset
from async_rl.config import Algorithm, Critic, Optimizer, Reference, Run
from async_rl.config import Rollout as RolloutConfig
from async_rl.errors import UserError
from async_rl.learner.distributed import Ranks
from async_rl.learner.kl_coefficient import KLCoefficient
from async_rl.learner.trainer import Learner, build_objective

IN_REWARD = ("ppo", "rloo", "reinforce_plus_plus")
STILL = Optimizer(learning_rate=0.0)


def run_of(folder: Path, name: str, **options: Any) -> Run:
    """Nothing but the coefficient changes from step to step; the reference is another model."""
    reference = folder / "reference"
    path = str(reference) if reference.exists() else save_model(reference, seed=5)
    return tiny_run(
        algorithm=Algorithm(preset=name, options=options),
        optimizer=STILL,
        critic=Critic(optimizer=STILL),
        reference=Reference(path=path),
    )


def train(learner: Learner, steps: int) -> list[dict[str, float]]:
    return [learner.train(message(ragged_rollouts(seed=3), step=learner.version)) for _ in range(steps)]


@pytest.mark.parametrize("name", IN_REWARD)
@pytest.mark.parametrize("low", [True, False])
def test_it_follows_the_target_and_reaches_the_loss(ranks: Ranks, tmp_path: Path, name: str, low: bool) -> None:
    fixed = train(Learner(run_of(tmp_path, name, kl_coef=0.2), tmp_path / "fixed", ranks), 2)
    kl = fixed[0]["kl_rollout"]
    assert kl > 0.1 and [row["kl_coef"] for row in fixed] == [0.2, 0.2]
    target = kl * (0.9 if low else 2.0)
    options = {"kl_coef": 0.2, "kl_target": target, "kl_horizon": 32}
    rows = train(Learner(run_of(tmp_path, name, **options), tmp_path / "adaptive", ranks), 3)
    factor = 1 + (kl / target - 1 if low else -0.2) * 16 / 32
    assert [row["kl_coef"] for row in rows] == pytest.approx([0.2, 0.2 * factor, 0.2 * factor**2], rel=1e-6)
    assert [row["kl_penalty"] for row in rows] == pytest.approx([row["kl_coef"] * kl for row in rows], rel=1e-6)
    assert rows[0]["loss"] == fixed[0]["loss"] and rows[0]["grad_norm"] == fixed[0]["grad_norm"]
    again = run_of(tmp_path, name, kl_coef=rows[1]["kl_coef"])
    (same,) = train(Learner(again, tmp_path / "again", ranks), 1)
    assert same["loss"] == rows[1]["loss"] and same["grad_norm"] == rows[1]["grad_norm"] != fixed[1]["grad_norm"]


def test_a_checkpoint_has_it_to_the_last_bit(ranks: Ranks, tmp_path: Path) -> None:
    run = run_of(tmp_path, "rloo", kl_target=0.1, kl_horizon=70.0)
    first = Learner(run, tmp_path / "run", ranks)
    train(first, 2)
    path = first.save_checkpoint()
    (next_row,) = train(first, 1)
    assert msgspec.json.decode((path / "trainer.json").read_bytes())["kl_coef"] == next_row["kl_coef"] > 0.05
    (resumed_row,) = train(Learner(run, tmp_path / "run", ranks), 1)
    del next_row["train_s"], resumed_row["train_s"]
    assert resumed_row == next_row


def test_what_is_no_number_leaves_it() -> None:
    coefficient = KLCoefficient(preset("ppo", kl_target=1.0))
    for nothing in ([], [float("nan"), 1.0], [float("inf"), -float("inf")]):
        coefficient.update(torch.tensor(nothing))
    assert coefficient.value == coefficient.saved == 0.02
    assert KLCoefficient(preset("ppo")).saved is None, "a fixed one is the recipe's"


def test_a_horizon_that_one_step_exceeds_is_refused() -> None:
    options = {"kl_target": 6.0}
    rollout = RolloutConfig(groups_per_step=512, group_size=128)
    run = tiny_run(algorithm=Algorithm(preset="ppo", options=options), rollout=rollout)
    says = "one step of 65536 rollouts could turn kl_coef negative; write more than 13107"
    with pytest.raises(UserError, match=f"^algorithm: kl_horizon = 10000.0: {says}"):
        build_objective(run)
    build_objective(
        msgspec.structs.replace(run, algorithm=Algorithm(preset="ppo", options=options | {"kl_horizon": 2e4}))
    )
