"""A reward model as the reward: its scores, where they go, and what it may not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_cases import message, ragged_rollouts, save_model, save_scalar, tiny_run
from transformers import AutoModelForSequenceClassification

from async_rl import config, recipes
from async_rl.config import Algorithm, Critic, Model, RewardModel, Run, TinyModel
from async_rl.errors import UserError
from async_rl.learner.batch import flatten, pack
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import never
from async_rl.learner.scalar import PackedScalar
from async_rl.learner.trainer import Learner
from async_rl.models.loading import load_tokenizer
from async_rl.wire.messages import TrainRollout

BIAS, WEIGHT = 0.2, 2.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_scalar(tmp_path_factory.mktemp("models") / "reward", seed=7, bias=BIAS)


def run_of(path: str, **options: Any) -> Run:
    return tiny_run(reward_model=RewardModel(path=path, weight=WEIGHT, **options))


def padded_scores(path: str, rollouts: list[TrainRollout]) -> list[float]:
    """Of the last sequence of each rollout, one at a time through transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    scores = []
    for rollout in rollouts:
        ids = torch.from_numpy(np.frombuffer(rollout.sequences[-1].tokens, "<i4").astype(np.int64))[None]
        with torch.no_grad():
            scores.append(model(ids).logits.item() - BIAS)
    return scores


@pytest.mark.parametrize("replaces", [False, True])
def test_rewards_of_a_step(ranks: Ranks, tmp_path: Path, path: str, replaces: bool) -> None:
    rollouts = ragged_rollouts(seed=3)
    rollouts[4] = msgspec.structs.replace(rollouts[4], reward=float("nan"))
    learner = Learner(run_of(path, replaces=replaces), tmp_path, ranks)
    step, model = (
        flatten(message(rollouts, [[[0, 7, 3], [], [*range(4, 7), *range(8, 16), 1, 2]]])),
        learner.roles.reward_model,
    )
    assert model is not None
    scored, metrics = model.reward(step, never)
    scores = np.array(padded_scores(path, rollouts))
    expected = WEIGHT * scores + (0.0 if replaces else step.rewards_N)
    np.testing.assert_allclose(scored.rewards_N, expected, atol=1e-5)
    assert np.isnan(scored.rewards_N).sum() == (0 if replaces else 1)
    np.testing.assert_array_equal(scored.baseline.rewards_B[step.baseline.row_N], scored.rewards_N)
    assert metrics["reward_model"] == pytest.approx(scores.mean(), abs=1e-5)
    assert metrics["reward_environment"] == pytest.approx(float(np.nanmean(step.rewards_N)))
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_a_step_trains_on_them_and_leaves_the_model_alone(ranks: Ranks, tmp_path: Path, path: str) -> None:
    learner = Learner(run_of(path, replaces=True), tmp_path / "a", ranks)
    model = learner.roles.reward_model
    assert model is not None
    before = {name: parameter.clone() for name, parameter in model.module.named_parameters()}
    rollouts = ragged_rollouts(seed=3)
    metrics = learner.train(message(rollouts))
    assert metrics["reward"] == pytest.approx(WEIGHT * np.mean(padded_scores(path, rollouts)), abs=1e-5)
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    same = [
        msgspec.structs.replace(one, reward=WEIGHT * score)
        for one, score in zip(rollouts, padded_scores(path, rollouts), strict=True)
    ]
    other = Learner(tiny_run(), tmp_path / "b", ranks)
    assert other.train(message(same))["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    for name, parameter in learner.model.named_parameters():
        torch.testing.assert_close(parameter.grad, other.model.get_parameter(name).grad, atol=1e-5, rtol=1e-4)


def test_a_member_of_another_step_has_no_score(ranks: Ranks, tmp_path: Path, path: str) -> None:
    rollouts = ragged_rollouts(seed=3, groups=1, size=2)
    baseline = {one.member: one.reward for one in rollouts} | {5: 0.5}
    rollouts = [msgspec.structs.replace(one, baseline=baseline) for one in rollouts]
    model = Learner(run_of(path), tmp_path, ranks).roles.reward_model
    assert model is not None
    scored, _ = model.reward(flatten(message(rollouts)), never)
    assert np.isnan(scored.baseline.rewards_B).tolist() == [False, False, True]


def test_a_critic_may_start_from_it(ranks: Ranks, tmp_path: Path, path: str) -> None:
    run = msgspec.structs.replace(run_of(path), algorithm=Algorithm(preset="ppo"), critic=Critic(init="reward_model"))
    roles = Learner(run, tmp_path, ranks).roles
    assert roles.critic is not None and roles.reward_model is not None
    for name, parameter in roles.critic.module.named_parameters():
        its = roles.reward_model.module.get_parameter(name)
        assert torch.equal(parameter, its) and parameter.data_ptr() != its.data_ptr()


def test_what_cannot_be_is_refused(ranks: Ranks, tmp_path: Path, path: str) -> None:
    other = Model(tiny=TinyModel(characters="abcdefgh", hidden_size=32))
    PackedScalar.load(other, seed=1).save(tmp_path / "other", load_tokenizer(other))
    with pytest.raises(UserError, match=r"reward_model\.path = .*other': its tokenizer is not the policy's"):
        Learner(run_of(str(tmp_path / "other")), tmp_path, ranks)

    def table(**sections: Any) -> dict[str, Any]:
        tiny = {"characters": "0123456789="}
        return {"steps": 1, "model": {"tiny": tiny}, "environment": {"name": "sorting"}, **sections}

    with pytest.raises(UserError, match=r"critic\.init = 'reward_model': set reward_model\.path"):
        recipes.from_table(table(critic={"init": "reward_model"}))
    with pytest.raises(UserError, match=r"rollout\.filter = 'uniform': groups are filtered before a reward model"):
        recipes.from_table(table(rollout={"filter": "uniform"}, reward_model={"path": path}))
    with pytest.raises(UserError, match=r"critic\.optimizer\.learning_rate = -1\.0: write 0 or more"):
        recipes.from_table(table(critic={"optimizer": {"learning_rate": -1.0}}))
    with pytest.raises(UserError, match=r"critic\.lam = 1\.5: write a number from 0 to 1"):
        recipes.from_table(table(critic={"lam": 1.5}))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'steps = 1\nmodel.tiny.characters = "01="\nenvironment.name = "sorting"\nreference.path = "nowhere"\n'
    )
    with pytest.raises(UserError, match=r"reference\.path = .*nowhere': write the path of a model directory"):
        recipes.load(recipe)


def test_a_causal_model_is_no_reward_model(ranks: Ranks, tmp_path: Path) -> None:
    """Its head would be drawn at random: rewards of nothing."""
    with pytest.raises(UserError, match=r"reward_model\.path = .*: LlamaForCausalLM has no scalar head"):
        Learner(run_of(save_model(tmp_path / "causal", seed=5)), tmp_path, ranks)


def test_under_bfloat16_it_says_the_same_in_half_the_memory(ranks: Ranks, tmp_path: Path, path: str) -> None:
    run = msgspec.structs.replace(run_of(path), learner=config.Learner(dtype="bfloat16"))
    model, step = Learner(run, tmp_path, ranks).roles.reward_model, flatten(message(ragged_rollouts(seed=3)))
    assert model is not None
    kinds = {parameter.dtype for name, parameter in model.module.named_parameters() if "proj" in name}
    assert kinds == {torch.bfloat16} and model.module.head.weight.dtype == torch.float32
    whole = PackedScalar.load(Model(path=path), seed=0, dtype="bfloat16")
    tokens = pack(step, range(step.num_rollouts)).tokens
    with torch.no_grad():
        assert torch.equal(model.module(tokens), whole(tokens))
