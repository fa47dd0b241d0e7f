"""A PPO step, policy and critic, equals the same arithmetic written token by token over padded models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_cases import message, ragged_rollouts, save_model, save_scalar, tiny_run
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from async_rl.config import Algorithm, Critic, Model, Optimizer, Reference, Run
from async_rl.learner.distributed import Ranks
from async_rl.learner.trainer import Learner, build_objective
from async_rl.models.loading import build_model
from async_rl.wire.messages import TrainRollout

VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "async_ppo": {"rho_bar": 1.1, "c_bar": 0.9},
    "tis": {"advantage": "vtrace", "rho_bar": 1.1, "c_bar": 0.9},
    "impala": {"rho_bar": 1.1, "c_bar": 0.9},
}
BETA, COEF, LAM, GAMMA, CLIP = 0.3, 0.25, 0.9, 0.97, 0.2
STALE = 1
"""Tokens more versions old than this are masked."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("models")
    plain = Optimizer(learning_rate=1e-2, clip_norm=0.0)
    base = tiny_run()
    return msgspec.structs.replace(
        base,
        algorithm=Algorithm(preset="ppo", options={"kl_coef": BETA}),
        staleness=msgspec.structs.replace(base.staleness, max_staleness=STALE),
        reference=Reference(path=save_model(folder / "reference", seed=5)),
        critic=Critic(path=save_scalar(folder / "critic", seed=7), optimizer=plain, gamma=GAMMA, lam=LAM, coef=COEF),
    )


def rollouts_with_stale_tokens() -> list[TrainRollout]:
    """Versions 1 to 3 at version 3, so that some tokens are past the bound; one rollout without a reward."""
    rollouts = [*ragged_rollouts(seed=3, groups=2), *ragged_rollouts(seed=4, groups=2, version=2)]
    rollouts = [msgspec.structs.replace(one, group_id=i // 4) for i, one in enumerate(rollouts)]
    rollouts[5] = msgspec.structs.replace(rollouts[5], reward=float("nan"))
    return rollouts


def gae_of(rewards: list[float], values: list[float]) -> list[float]:
    running, following = 0.0, 0.0
    found: list[float] = []
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        running = reward + GAMMA * following - value + GAMMA * LAM * running
        found.append(running)
        following = value
    return found[::-1]


def vtrace_of(
    rewards: list[float], values: list[float], ratios: list[float], rho_bar: float, c_bar: float
) -> tuple[list[float], list[float]]:
    """Advantages without rho, and targets: Eq. 1 of 1802.01561 as it is printed, c with its Remark 2."""
    value, end = [*values, 0.0], len(values)
    delta = [min(rho_bar, ratios[t]) * (rewards[t] + GAMMA * value[t + 1] - value[t]) for t in range(end)]
    c = [LAM * min(c_bar, ratio) for ratio in ratios]
    target = [
        value[s] + sum(GAMMA ** (t - s) * math.prod(c[s:t]) * delta[t] for t in range(s, end)) for s in range(end)
    ]
    after = [LAM * t + (1 - LAM) * v for t, v in zip([*target[1:], 0.0], value[1:], strict=True)]
    return [rewards[s] + GAMMA * after[s] - value[s] for s in range(end)], target


class Naive:
    """Lists of one token each, in the order of a rollout."""

    def __init__(self, run: Run, rollouts: list[TrainRollout]) -> None:
        policy = build_model(run.model, seed=run.seed)
        reference = build_model(Model(path=run.reference.path), seed=0)
        critic: Any = AutoModelForSequenceClassification.from_pretrained(run.critic.path)
        self.policy, self.critic = policy, critic
        objective = build_objective(run)
        policy_terms: list[tuple[Tensor, float, float, bool]] = []
        value_terms: list[tuple[Tensor, float, bool]] = []
        for rollout in rollouts:
            logp, kl, values, stale, behaviour = [], [], [], [], []
            for sequence in rollout.sequences:
                ids = torch.from_numpy(np.frombuffer(sequence.tokens, "<i4").astype(np.int64))[None]
                recorded = np.frombuffer(sequence.logprobs, "<f4")
                log_p = policy(ids).logits[0].float().log_softmax(-1)
                with torch.no_grad():
                    log_ref = reference(ids).logits[0].float().log_softmax(-1)
                said = critic.score(critic.model(ids).last_hidden_state[0]).squeeze(-1)
                for span in sequence.spans:
                    for t in range(span.start, span.end):
                        token = int(ids[0, t])
                        logp.append(log_p[t - 1, token])
                        behaviour.append(float(recorded[t]))
                        kl.append(float(recorded[t]) - float(log_ref[t - 1, token]))
                        values.append(said[t - 1])
                        stale.append(3 - span.version > STALE)
            missing = np.isnan(rollout.reward)
            rewards = [-BETA * one for one in kl]
            rewards[-1] += 0.0 if missing else rollout.reward
            said_before = [value.item() for value in values]
            if objective.advantage == "vtrace":
                ratios = [math.exp(p.item() - b) for p, b in zip(logp, behaviour, strict=True)]
                found, targets = vtrace_of(rewards, said_before, ratios, objective.rho_bar, objective.c_bar)
            else:
                found = gae_of(rewards, said_before)
                targets = [advantage + value for advantage, value in zip(found, said_before, strict=True)]
            for advantage, target, p, b, v, old in zip(found, targets, logp, behaviour, values, stale, strict=True):
                weight = not old and not missing
                policy_terms.append((p, b, advantage, weight))
                value_terms.append((v, target, weight))
        self.tokens = len(policy_terms)
        kept = torch.tensor([advantage for _, _, advantage, weight in policy_terms if weight], dtype=torch.float64)
        mean, deviation = kept.mean(), (kept.var() + 1e-8).sqrt()
        policy_loss = torch.zeros(())
        for p, b, advantage, weight in policy_terms:
            if weight:
                ratio, whitened = (p - b).exp(), ((advantage - mean) / deviation).float()
                match run.algorithm.preset:
                    case "ppo" | "async_ppo":
                        term = torch.minimum(ratio * whitened, ratio.clamp(0.8, 1.2) * whitened)
                    case "tis":  # u = 1, w = min(ratio, 2)
                        term = ratio.detach().clamp(max=2.0) * (p - p.detach()).exp() * whitened
                    case _:
                        term = ratio.detach().clamp(max=objective.rho_bar) * whitened * p
                policy_loss = policy_loss - term
        value_loss = torch.zeros(())
        for value, target, weight in value_terms:
            if weight:
                value_loss = value_loss + 0.5 * (value - target).square()  # one step: V is V_old, nothing is clipped
        self.policy_loss, self.value_loss = policy_loss / self.tokens, value_loss / self.tokens
        returns = torch.tensor([target for _, target, weight in value_terms if weight])
        old_values = torch.tensor([value.item() for value, _, weight in value_terms if weight])
        self.explained = 1 - (returns - old_values).var() / returns.var()


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients(ranks: Ranks, tmp_path: Path, run: Run, variant: str) -> None:
    options = {"kl": "k1", "kl_in": "reward", "kl_coef": BETA} | VARIANTS[variant]
    run = msgspec.structs.replace(run, algorithm=Algorithm(preset=variant, options=options))
    rollouts = rollouts_with_stale_tokens()
    naive = Naive(run, rollouts)
    naive.policy_loss.backward()
    (COEF * naive.value_loss).backward()
    learner = Learner(run, tmp_path, ranks)
    metrics = learner.train(message(rollouts, [[[0, 9, 3, 5], [1, 2], [4, 6, 7, 8, 10, 11, 12, 13, 14, 15]]]))
    critic = learner.roles.critic
    assert critic is not None and metrics["masked_fraction"] > 0.1
    assert metrics["loss"] == pytest.approx(naive.policy_loss.item(), abs=1e-5)
    assert ("vtrace_rho" in metrics) == (variant != "ppo")
    assert metrics["value_loss"] == pytest.approx(naive.value_loss.item(), rel=1e-5)
    assert metrics["explained_variance"] == pytest.approx(naive.explained.item(), abs=1e-4)
    expected = gradients(naive.policy)
    for name, gradient in gradients(learner.model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    expected = gradients(naive.critic)
    for name, gradient in gradients(critic.module.model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


def test_layers_that_are_computed_again_change_nothing(ranks: Ranks, tmp_path: Path, run: Run) -> None:
    outcomes = []
    for again in (False, True):
        learner_config = msgspec.structs.replace(run.learner, activation_checkpointing=again)
        learner = Learner(msgspec.structs.replace(run, learner=learner_config), tmp_path / str(again), ranks)
        learner.train(message(ragged_rollouts(seed=3)))
        critic = learner.roles.critic
        assert critic is not None
        outcomes.append(gradients(critic.module))
    assert outcomes[0] and all(torch.equal(outcomes[1][name], gradient) for name, gradient in outcomes[0].items())


@pytest.mark.parametrize("advantage", ["critic", "vtrace"])
def test_any_split_of_the_step(ranks: Ranks, tmp_path: Path, run: Run, advantage: str) -> None:
    options = run.algorithm.options | {"advantage": advantage}
    run = msgspec.structs.replace(run, algorithm=Algorithm(preset="ppo", options=options))
    rollouts = rollouts_with_stale_tokens()
    outcomes = []
    for name, plan in (("a", None), ("b", [[[15, 3, 8], [], [0, 1, 2, 4, 5, 6, 7], [9, 10, 11, 12, 13, 14]]])):
        learner = Learner(run, tmp_path / name, ranks)
        metrics = learner.train(message(rollouts, plan))
        critic = learner.roles.critic
        assert critic is not None
        outcomes.append((metrics, gradients(learner.model) | gradients(critic.module)))
    for name in ("loss", "value_loss", "explained_variance", "kl_k1", "kl_penalty", "grad_norm", "critic_grad_norm"):
        assert outcomes[0][0][name] == pytest.approx(outcomes[1][0][name], rel=1e-5, abs=1e-6), name
    for name, gradient in outcomes[0][1].items():
        torch.testing.assert_close(gradient, outcomes[1][1][name], atol=1e-5, rtol=1e-4, msg=name)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("frozen", ["policy", "critic"])
def test_a_step_of_one_leaves_the_other_bit_for_bit(ranks: Ranks, tmp_path: Path, run: Run, frozen: str) -> None:
    still = Optimizer(learning_rate=0.0)
    if frozen == "policy":
        run = msgspec.structs.replace(run, optimizer=still)
    else:
        run = msgspec.structs.replace(run, critic=msgspec.structs.replace(run.critic, optimizer=still, path=""))
    learner = Learner(run, tmp_path, ranks)
    critic = learner.roles.critic
    assert critic is not None
    mine = {parameter.data_ptr() for parameter in learner.model.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in critic.module.parameters()}
    policy_before, critic_before = weights(learner.model), weights(critic.module)
    for step in range(2):
        learner.train(message(rollouts_with_stale_tokens(), step=step))
    moved = {"policy": changed(policy_before, learner.model), "critic": changed(critic_before, critic.module)}
    assert not moved[frozen]
    assert moved["critic" if frozen == "policy" else "policy"]


def test_the_critic_learns_the_returns(ranks: Ranks, tmp_path: Path, run: Run) -> None:
    critic = Critic(optimizer=Optimizer(learning_rate=3e-3), lam=1.0, coef=1.0, clip=10.0)
    run = msgspec.structs.replace(run, critic=critic, optimizer=Optimizer(learning_rate=0.0), steps=200)
    learner = Learner(run, tmp_path, ranks)
    rollouts = ragged_rollouts(seed=3)
    rows = [learner.train(message(rollouts, step=step)) for step in range(90)]
    assert rows[0]["value_mean"] == 0.0 and rows[0]["explained_variance"] == 0.0, "a new critic's head says 0"
    assert rows[-1]["explained_variance"] > 0.9
    assert rows[-1]["value_mean"] == pytest.approx(rows[-1]["return_mean"], abs=0.1)


def test_several_epochs_of_the_critic_move_it_within_the_clip(ranks: Ranks, tmp_path: Path, run: Run) -> None:
    """The second pass sees values that have moved: beyond `clip` its loss is flat."""
    clipped, moved = [], []
    for clip in (1e-3, 100.0):
        critic = Critic(optimizer=Optimizer(learning_rate=1e-2, clip_norm=0.0), epochs=8, clip=clip)
        learner = Learner(msgspec.structs.replace(run, critic=critic), tmp_path / str(clip), ranks)
        first, second = (learner.train(message(ragged_rollouts(seed=3), step=step)) for step in range(2))
        clipped.append(first["value_clip_fraction"])
        moved.append(second["value_mean"] - first["value_mean"])
    assert clipped[0] > 0.5 and clipped[1] == 0.0
    assert abs(moved[0]) < abs(moved[1])
