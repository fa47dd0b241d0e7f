"""Several turns, tools, overlapping calls and edited history, through the real engine and learner: the learner's
log-probs of what was recorded are the engine's, token by token, while the weights move."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from learner_cases import message, tiny_run

from async_rl.config import Environment, Model, Run, TinyModel
from async_rl.config import Learner as LearnerConfig
from async_rl.config import Rollout as RolloutConfig
from async_rl.engines.protocol import Snapshot
from async_rl.environments.api import Policy, environment, find, make_tasks
from async_rl.learner.distributed import Ranks
from async_rl.learner.trainer import Learner
from async_rl.models.loading import load_config, load_stop_tokens, load_tokenizer
from async_rl.rollout.tokenizer_text import TokenizerText
from async_rl.simulate.cluster import NumberedTasks
from async_rl.stages.episodes import episodes
from async_rl.stages.local_engine import make_engine
from async_rl.tasks.source import train_task
from async_rl.wire.messages import GroupLease, Sampling, Task, TrainRollout, WeightsId

CALCULATOR = Path(__file__).resolve().parents[2] / "examples" / "calculator.py"
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"


@environment("of_every_kind", tasks=NumberedTasks)
async def of_every_kind(task: Task, policy: Policy) -> float:
    """Two turns, then one after an edit; beside them two calls at once."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "1+1"}]
    beside = asyncio.gather(policy.complete("a"), policy.complete("b", stop=["e", "t"]))
    messages += [(await policy.chat(messages)).message, {"role": "user", "content": "2+2"}]
    reply = await policy.chat(messages)
    messages[1] = {"role": "assistant", "content": "edited"}
    await policy.chat(messages, max_new_tokens=3)
    return (len(reply.tokens) + sum(len(one.tokens) for one in await beside)) % 7


async def train(run: Run, learner: Learner) -> tuple[list[Any], list[TrainRollout]]:
    """Synchronously: what version v samples is what step v trains on."""
    engine, text = (
        make_engine(run, load_config(run.model), slots=32),
        TokenizerText(load_tokenizer(run.model), load_stop_tokens(run.model)),
    )
    found = find(run.environment)
    source = make_tasks(found, {}, run.seed)
    sampling = Sampling(run.rollout.max_new_tokens, run.rollout.temperature, run.seed)
    rows, rollouts = list[Any](), list[TrainRollout]()
    async with episodes(engine, found, text, at_once=32, timeout_s=30) as running:
        for version in range(run.steps):
            await engine.load_weights(Snapshot(WeightsId(0, version), dict(learner.model.named_parameters())))
            leases = [
                GroupLease(group, "train", train_task(source, group), list(range(run.rollout.group_size)), sampling)
                for group in range(2 * version, 2 * version + 2)
            ]
            groups = await running.run(leases)
            assert not any(group.failures for group in groups)
            rollouts = [
                TrainRollout(group.lease.group_id, result.member, result.reward + result.member, result.sequences)
                for group in groups
                for result in group.results
            ]
            rows.append(learner.train(message(rollouts, step=version, version=version)))
    return rows, rollouts


@pytest.mark.parametrize("name", ["of_every_kind", "calculator"])
def test_what_is_trained_is_what_was_sampled(real: Any, ranks: Ranks, tmp_path: Path, name: str) -> None:
    run = tiny_run(
        steps=3,
        model=Model(tiny=TinyModel(characters=PRINTABLE, hidden_size=32, heads=4, kv_heads=2, max_length=2048)),
        environment=Environment(name=name, module=str(CALCULATOR) if name == "calculator" else ""),
        rollout=RolloutConfig(groups_per_step=2, group_size=4, max_new_tokens=12),
        learner=LearnerConfig(mismatch_steps=1),
    )
    rows, rollouts = real(train(run, Learner(run, tmp_path, ranks)))
    for row in rows:
        assert row["equal_version_tokens"] > 50 and row["equal_version_gap_max"] < 1e-4
        assert row["masked_fraction"] == 0
    if name == "of_every_kind":
        for rollout in rollouts:
            assert sorted(len(sequence.spans) for sequence in rollout.sequences) == [1, 1, 1, 2]
