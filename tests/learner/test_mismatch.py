"""Engine and learner compared: sums by lag, the weights of a former version for a moment, an alarm where it is due."""

from __future__ import annotations

import dataclasses
import math
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from transformers import LlamaForCausalLM

from async_rl.config import Environment, Model, Optimizer, Run, Staleness, TinyModel
from async_rl.config import Learner as LearnerConfig
from async_rl.config import Rollout as RolloutConfig
from async_rl.controller.alarms import Alarms
from async_rl.engines.protocol import Request, Snapshot
from async_rl.environments.api import find, make_tasks
from async_rl.learner.batch import flatten, pack
from async_rl.learner.distributed import Ranks
from async_rl.learner.mismatch import mismatch_metrics, mismatch_sums
from async_rl.learner.optimisation import Abandoned
from async_rl.learner.trainer import Learner
from async_rl.models.loading import load_config, load_stop_tokens, load_tokenizer
from async_rl.models.tiny import tiny_config, tiny_tokenizer
from async_rl.rollout.tokenizer_text import TokenizerText
from async_rl.stages.episodes import episodes
from async_rl.stages.local_engine import make_engine
from async_rl.tasks.source import train_task
from async_rl.wire.messages import GroupLease, MicroBatches, Sampling, TrainRollout, VersionSpan, WeightsId
from async_rl.wire.messages import Sequence as WireSequence
from tests.many_ranks import in_ranks

VOLATILE = {"train_s": 0.0}


# --- sums -----------------------------------------------------------------------------------------------------------


def spans(*of: tuple[int, int, int]) -> TrainRollout:
    """(tokens, version, kv_version) of each span, after a prompt of two tokens; the engine's log-probs are all -1."""
    length = 2 + sum(count for count, _, _ in of)
    found, start = [], 2
    for count, version, kv_version in of:
        found.append(VersionSpan(start, start + count, version, kv_version))
        start += count
    logprobs = np.full(length, -1.0, "<f4")
    return TrainRollout(0, 0, 1.0, [WireSequence(np.full(length, 5, "<i4").tobytes(), logprobs.tobytes(), found)])


def test_sums_and_means_by_lag() -> None:
    """Version 7: two tokens at lag 0, one of them behind older keys; three at lag 2; one past the lags asked for."""
    step = flatten(message([spans((1, 3, 3), (3, 5, 5), (1, 7, 7), (1, 7, 5))], step=0, version=7))
    microbatch = pack(step, [0])
    logp_K = torch.tensor([-9.0, -0.9, -1.2, -1.0, -1.5, -9.0])
    values = {name: float(total) for name, total in mismatch_sums(logp_K, microbatch, 7, lags=4).items()}
    left = values | {"other": 1.0}
    metrics = mismatch_metrics(left, 4, {})
    assert left == {"other": 1.0}
    k3 = [math.expm1(x) - x for x in (0.1, -0.2, 0.0, -0.5)]
    assert metrics == pytest.approx(
        {
            "mismatch_lag_0_tokens": 1,
            "mismatch_lag_0_abs": 0.5,
            "mismatch_lag_0_k3": k3[3],
            "mismatch_lag_2_tokens": 3,
            "mismatch_lag_2_abs": 0.1,
            "mismatch_lag_2_k3": sum(k3[:3]) / 3,
            "equal_version_tokens": 1,
            "equal_version_gap": 0.5,
            "equal_version_gap_max": 0.5,
            "equal_version_k3": k3[3],
        },
        abs=1e-7,
    )
    assert k3[:2] == pytest.approx([0.005170918, 0.018730753])

    former = {name: float(total) for name, total in mismatch_sums(logp_K, microbatch, 5, lags=1).items()}
    both = mismatch_metrics(values, 4, former)
    assert both["mismatch_lag_0_tokens"] == 1 and both["equal_version_tokens"] == 4
    assert both["equal_version_gap"] == pytest.approx((0.5 + 0.3) / 4)


def test_no_token_no_number(ranks: Ranks, tmp_path: Path) -> None:
    """Not 0, which would be perfect agreement."""
    run = tiny_run(learner=LearnerConfig(mismatch_steps=0), staleness=Staleness(max_staleness=2))
    metrics = Learner(run, tmp_path, ranks).train(message([spans((3, 1, 1), (2, 3, 1))]))
    assert {key for key in metrics if "equal_version" in key} == {"equal_version_tokens"}
    assert metrics["equal_version_tokens"] == 0
    assert [key for key in metrics if key.startswith("mismatch_lag")] == [
        "mismatch_lag_2_tokens", "mismatch_lag_2_abs", "mismatch_lag_2_k3"
    ]  # fmt: skip


# --- the weights of a former version ----------------------------------------------------------------------------------


def batches(steps: int, plan: list[list[list[int]]] | None = None) -> list[MicroBatches]:
    """Step k holds tokens of versions k and k - 1, far fewer than are enough."""
    return [message(ragged_rollouts(seed=3 + k, version=k), plan, step=k, version=k) for k in range(steps)]


def run_of(eta: int = 1, **learner: Any) -> Run:
    # Adam divides a gradient of about nothing by about nothing: eps keeps rounding from deciding
    optimizer = Optimizer(learning_rate=1e-2, clip_norm=0.0, eps=1e-4)
    return tiny_run(learner=LearnerConfig(**learner), staleness=Staleness(max_staleness=eta), optimizer=optimizer)


def gaps(learner: Learner, batch: MicroBatches, version: int) -> np.ndarray[Any, Any]:
    """|log-prob of the learner now - that of the engine| of the tokens that this version sampled, all by hand."""
    microbatch = pack(flatten(batch), list(range(len(batch.rollouts))), share_prompts=False)
    with torch.no_grad():
        logp_K = learner._policy(microbatch.tokens).logp_K
    counted_K = microbatch.unmixed_K & (microbatch.version_K == version)
    return (logp_K - microbatch.behaviour_K)[counted_K].abs().numpy()


def test_tokens_are_scored_under_the_weights_that_sampled_them(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(run_of(mismatch_steps=2), tmp_path, ranks)
    first, second, third = batches(3)
    former = gaps(learner, second, version=0)
    learner.train(first)
    equal = gaps(learner, second, version=1)
    moved = gaps(learner, second, version=0)
    metrics = learner.train(second)
    assert metrics["equal_version_tokens"] == len(former) + len(equal) > metrics["mismatch_lag_0_tokens"] == len(equal)
    assert metrics["equal_version_gap"] == pytest.approx(np.concatenate([former, equal]).mean(), rel=1e-5)
    assert metrics["equal_version_gap_max"] == pytest.approx(max(former.max(), equal.max()), rel=1e-5)
    assert metrics["mismatch_lag_1_tokens"] == len(moved)
    assert metrics["mismatch_lag_1_abs"] == pytest.approx(moved.mean(), rel=1e-5) != pytest.approx(former.mean())
    metrics = learner.train(third)
    assert metrics["equal_version_tokens"] == metrics["mismatch_lag_0_tokens"], "version 1 was not kept, 2 is"
    assert learner._step._former._version == 2 and learner._step._former._kept


def test_small_batches_are_compared_too(ranks: Ranks, tmp_path: Path) -> None:
    """Whenever there are tokens of the version, until they were enough or can no longer come."""
    learner = Learner(run_of(eta=3, mismatch_steps=1), tmp_path, ranks)
    late = message(ragged_rollouts(seed=9, version=1), step=2, version=2)
    none = message(ragged_rollouts(seed=9, version=4), step=3, version=4)
    former = gaps(learner, late, version=0)
    first, second, *_ = batches(2)
    for batch in (first, second):
        metrics = learner.train(batch)
    assert metrics["equal_version_tokens"] > metrics["mismatch_lag_0_tokens"] > 0
    metrics = learner.train(late)
    assert metrics["equal_version_tokens"] == len(former) > 0 and "mismatch_lag_0_tokens" not in metrics
    assert metrics["equal_version_gap"] == pytest.approx(former.mean(), rel=1e-5)
    learner.train(none)
    assert learner._step._former._version == 4, "eta versions later others are kept"


def test_nothing_else_changes_by_a_bit(ranks: Ranks, tmp_path: Path) -> None:
    with_it = Learner(run_of(mismatch_steps=1), tmp_path / "with", ranks)
    without = Learner(run_of(mismatch_steps=0), tmp_path / "without", ranks)
    for batch in batches(4):
        one, other = (learner.train(batch) | VOLATILE for learner in (with_it, without))
        assert {key for key in one if one[key] != other.get(key)} <= {key for key in one if "equal_version" in key}
    for mine, theirs in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_abandoned_while_other_weights_are_in_place(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(run_of(mismatch_steps=1), tmp_path, ranks)
    first, second = batches(2)
    learner.train(first)
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    with pytest.raises(Abandoned):
        learner.train(second, lambda: True)
    assert all(torch.equal(*pair) for pair in zip(learner.model.parameters(), before, strict=True))


def train_all(rank: int, directory: str, run: Run, plan: list[list[list[int]]]) -> Any:
    ranks = Ranks.start(torch.device("cpu"))
    learner = Learner(run, Path(directory), ranks)
    found = None
    if rank == 0:
        found = [learner.train(batch) for batch in batches(3, plan)]
    else:
        learner.follow()
    learner.close()
    ranks.stop()
    return found


@pytest.mark.processes
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_ranks_sum_to_one(ranks: Ranks, tmp_path: Path, sharding: Any) -> None:
    plan = [[list(range(6)), []], [list(range(6, 10)), list(range(10, 16))]]
    run = run_of(mismatch_steps=1, sharding=sharding, ranks=2)
    many = in_ranks(2, train_all, str(tmp_path / "two"), run, plan)[0]
    one = Learner(run_of(mismatch_steps=1), tmp_path / "one", ranks)
    for batch, metrics in zip(batches(3), many, strict=True):
        alone = one.train(batch)
        of_it = [key for key in alone if "equal_version" in key or "mismatch_lag" in key]
        assert len(of_it) >= 7 and of_it == [key for key in metrics if key in of_it]
        for key in (*of_it, "loss"):
            assert metrics[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key
    assert metrics["equal_version_tokens"] > metrics["mismatch_lag_0_tokens"] > 0


# --- a real engine, right and wrong -----------------------------------------------------------------------------------


class Faulty:
    """An engine that is wrong while `wrong` is set."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.wrong = engine, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class AnotherTemperature(Faulty):
    def submit(self, requests: Sequence[Request]) -> None:
        heat = 0.8 if self.wrong else 1.0
        self._engine.submit([dataclasses.replace(one, temperature=heat) for one in requests])


class OtherWeights(Faulty):
    async def load_weights(self, snapshot: Snapshot) -> Any:
        name = "model.layers.1.mlp.down_proj.weight"
        other = ChainMap({name: snapshot.tensors[name] * (1.2 if self.wrong else 1.0)}, dict(snapshot.tensors))
        return await self._engine.load_weights(Snapshot(snapshot.weights, other))


class LoadsLate(Faulty):
    """Says that it has the newest weights, and has those before."""

    async def load_weights(self, snapshot: Snapshot) -> Any:
        copied = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        former, self.former = getattr(self, "former", copied), copied
        return await self._engine.load_weights(Snapshot(snapshot.weights, former if self.wrong else copied))


@pytest.fixture(scope="module")
def sorting(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model whose weights are large enough for its distributions to be uneven."""
    folder = tmp_path_factory.mktemp("model")
    tiny = TinyModel(characters="0123456789=", hidden_size=32, intermediate_size=64, kv_heads=2)
    architecture = tiny_config(tiny)
    architecture.initializer_range = 0.2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForCausalLM(architecture).save_pretrained(folder)
    tiny_tokenizer(tiny).save_pretrained(folder)
    return tiny_run(
        steps=20,
        model=Model(path=str(folder)),
        environment=Environment(name="sorting", options={"digits": 8, "reward": "distance"}),
        rollout=RolloutConfig(groups_per_step=8, group_size=8, max_new_tokens=8),
        staleness=Staleness(max_staleness=2),
        learner=LearnerConfig(mismatch_steps=2),
    )


async def one_step_behind(run: Run, learner: Learner, wrap: Any, heals_at: int) -> tuple[list[Any], list[str]]:
    """Step v trains on what weights v - 1 sampled, as every step of a run at depth 1; rows, and what the alarm says."""
    engine = wrap(make_engine(run, load_config(run.model), slots=64))
    text = TokenizerText(load_tokenizer(run.model), load_stop_tokens(run.model))
    environment = find(run.environment)
    source = make_tasks(environment, run.environment.options, run.seed)
    sampling = Sampling(run.rollout.max_new_tokens, run.rollout.temperature, run.seed)
    members = list(range(run.rollout.group_size))
    rows, said, waiting = [], list[str](), list[list[TrainRollout]]()
    alarms = Alarms(run, said.append)
    async with episodes(engine, environment, text, at_once=64, timeout_s=30) as running:
        for version in range(run.steps):
            if version == heals_at:
                engine.wrong = False
            await engine.load_weights(Snapshot(WeightsId(0, version), dict(learner.model.named_parameters())))
            first = version * run.rollout.groups_per_step
            groups = await running.run(
                [
                    GroupLease(index, "train", train_task(source, index), members, sampling)
                    for index in range(first, first + run.rollout.groups_per_step)
                ]
            )
            waiting.append(
                [
                    TrainRollout(group.lease.group_id, result.member, result.reward, result.sequences)
                    for group in groups
                    for result in group.results
                ]
            )
            batch = waiting[max(0, version - 1)]
            rows.append(learner.train(message(batch, step=version, version=version)))
            alarms.trained(version, rows[-1])
    return rows, said


def test_a_right_engine_is_measured_and_raises_no_alarm(real: Any, ranks: Ranks, tmp_path: Path, sorting: Run) -> None:
    rows, said = real(one_step_behind(sorting, Learner(sorting, tmp_path, ranks), lambda engine: engine, -1))
    assert said == []
    measured = [row for row in rows[1:] if row["equal_version_tokens"]]
    assert len(measured) >= 9, "every second step, although no token of it is of its version"
    assert all("mismatch_lag_0_tokens" not in row and row["equal_version_tokens"] >= 256 for row in measured)
    assert max(row["equal_version_gap_max"] for row in measured) < 1e-4
    assert min(row["mismatch_lag_1_abs"] for row in measured) > 1e-3, "the policy moves much further than that"


@pytest.mark.parametrize("fault", [AnotherTemperature, OtherWeights, LoadsLate])
def test_a_wrong_engine_raises_the_alarm_until_it_is_right(
    real: Any, ranks: Ranks, tmp_path: Path, sorting: Run, fault: Any
) -> None:
    _, said = real(one_step_behind(sorting, Learner(sorting, tmp_path, ranks), fault, 12))
    begun, over = said
    assert "do not agree on log-probs under the same weights, 3 times in a row" in begun
    assert "async-rl doctor" in begun and "temperature" in begun and "limit 0.001" in begun
    assert over.startswith("engine and learner agree on log-probs again")
