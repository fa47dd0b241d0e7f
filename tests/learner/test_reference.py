"""The reference policy: KL in the loss and in the reward, refreshed, frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_cases import message, ragged_rollouts, save_model, tiny_run

from async_rl.algorithms.presets import PRESETS, preset
from async_rl.config import Algorithm, Model, Reference, Run
from async_rl.learner.batch import flatten, pack
from async_rl.learner.distributed import Ranks
from async_rl.learner.estimates import group_advantages, rollout_kl
from async_rl.learner.frozen import Frozen
from async_rl.learner.optimisation import never
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.trainer import Learner
from async_rl.models.loading import build_model


def run_of(name: str, **options: Any) -> Run:
    return tiny_run(algorithm=Algorithm(preset=name, options=options))


def train(learner: Learner, steps: int) -> list[dict[str, float]]:
    return [learner.train(message(ragged_rollouts(seed=3), step=learner.version)) for _ in range(steps)]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_trains(ranks: Ranks, tmp_path: Path, name: str) -> None:
    learner, objective = Learner(run_of(name), tmp_path, ranks), preset(name)
    assert (learner.roles.reference is not None) == objective.needs_reference
    assert (learner.roles.critic is not None) == objective.needs_critic
    metrics = train(learner, 1)[0]
    assert metrics["skipped"] == 0.0 and np.isfinite(metrics["loss"])
    if objective.needs_reference:
        assert metrics["kl_k1"] == pytest.approx(0.0, abs=1e-6), "the policy is still the reference"
    assert "value_loss" in metrics or not objective.needs_critic


def test_kl_in_the_loss_pulls_towards_the_reference(ranks: Ranks, tmp_path: Path) -> None:
    """With nothing else to learn: rewards are all equal."""
    reference = Reference(path=save_model(tmp_path / "reference", seed=5))
    kl = []
    for name, options in (("k2", {"kl": "k2", "kl_coef": 1.0}), ("none", {"kl_coef": 1e-9})):
        run = msgspec.structs.replace(run_of("grpo", **options), reference=reference)
        learner = Learner(run, tmp_path / name, ranks)
        rollouts = [msgspec.structs.replace(one, reward=1.0) for one in ragged_rollouts(seed=3)]
        kl.append([learner.train(message(rollouts, step=step))["kl_k3"] for step in range(8)])
    assert kl[0][-1] < 0.3 * kl[0][0]
    assert kl[1][0] == pytest.approx(kl[0][0]) and kl[1][-1] > 0.8 * kl[1][0]


def test_kl_in_the_reward_of_a_group(ranks: Ranks, tmp_path: Path) -> None:
    """R - beta sum_t (behaviour - reference), with the log-probs of the sampling policy."""
    run = msgspec.structs.replace(run_of("rloo"), reference=Reference(path=save_model(tmp_path / "r", seed=5)))
    learner, step = Learner(run, tmp_path, ranks), flatten(message(ragged_rollouts(seed=3)))
    reference, objective = learner.roles.reference, preset("rloo")
    assert reference is not None
    policy = PackedPolicy(build_model(Model(path=run.reference.path), seed=0))
    penalties = []
    for rollout in range(step.num_rollouts):
        one = pack(step, [rollout], share_prompts=False)
        with torch.no_grad():
            penalties.append(0.05 * float((one.behaviour_K - policy(one.tokens).logp_K).sum()))
    found = 0.05 * rollout_kl(step, reference.logprobs(step, never))
    torch.testing.assert_close(found, torch.tensor(penalties), atol=1e-5, rtol=1e-5)
    shaped = torch.from_numpy(step.rewards_N) - torch.tensor(penalties)
    expected = objective.advantages(shaped, torch.from_numpy(step.group_N))
    torch.testing.assert_close(group_advantages(objective, step.baseline, found), expected, atol=1e-5, rtol=1e-5)


def test_members_of_other_steps_get_the_mean_penalty_of_their_group() -> None:
    rollouts = [
        msgspec.structs.replace(one, baseline={0: one.reward if one.member == 0 else 0.5, 1: 0.25, 2: 0.75})
        for one in ragged_rollouts(seed=3, groups=1, size=1)
    ]
    rows, objective = flatten(message(rollouts)).baseline, preset("rloo")
    plain = group_advantages(objective, rows)
    torch.testing.assert_close(group_advantages(objective, rows, torch.tensor([0.4])), plain)


def test_it_is_refreshed_and_frozen(ranks: Ranks, tmp_path: Path) -> None:
    run = msgspec.structs.replace(run_of("grpo"), reference=Reference(refresh_steps=3))
    learner = Learner(run, tmp_path, ranks)
    reference = learner.roles.reference
    assert reference is not None
    kl = [metrics["kl_k3"] for metrics in train(learner, 7)]
    assert [abs(value) < 1e-9 for value in kl] == [True, False, False, True, False, False, True]
    for name, parameter in learner.model.named_parameters():
        mine = reference.model.get_parameter(name)
        assert not mine.requires_grad and mine.grad is None and mine.data_ptr() != parameter.data_ptr()


def test_bfloat16_matrices_say_the_same_as_autocast(ranks: Ranks) -> None:
    """Half the memory and no other number: autocast would round them in every pass."""
    step = flatten(message(ragged_rollouts(seed=3)))
    tokens = pack(step, range(step.num_rollouts)).tokens
    whole, low = (PackedPolicy(build_model(tiny_run().model, seed=1), dtype="bfloat16") for _ in range(2))
    frozen = Frozen(low, ranks.device, dtype="bfloat16")
    kinds = {name: parameter.dtype for name, parameter in low.named_parameters()}
    assert kinds["model.model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert kinds["model.model.embed_tokens.weight"] == kinds["model.model.norm.weight"] == torch.float32
    with torch.no_grad():
        expected = whole(tokens).logp_K
    with frozen.at_work():
        found = low(tokens).logp_K
    assert torch.equal(found, expected) and not found.requires_grad
