"""The real control plane on fake hardware: controller, ledger and workers unchanged, engines and learner made up.

    outcome = run_virtual(simulate(run, make_engine=..., step_time=lambda batch: 0.5))

Everything happens in one process and in virtual time, so the same arguments give the same outcome, event for event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from async_rl.config import Run
from async_rl.controller.controller import Controller
from async_rl.engines.protocol import Engine, Snapshot
from async_rl.environments.api import Environment, Message, Policy, Tool
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.store import MemoryStore, Store
from async_rl.rollout.host_runner import inline
from async_rl.rollout.worker import RolloutWorker
from async_rl.simulate.fake_learner import FakeLearner
from async_rl.telemetry.journal import EvalSummary, Row
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.memory import MemoryServer
from async_rl.wire.messages import MicroBatches, Task, WeightGroup, WeightsAnnounce


class NumberedTasks:
    """Tasks without content."""

    def __init__(self, seed: int = 0) -> None:
        pass

    def train(self, index: int) -> Mapping[str, Any]:
        return {"number": index}

    def heldout(self) -> Sequence[Mapping[str, Any]]:
        return [{"number": -1 - index} for index in range(64)]


async def length_is_reward(task: Task, policy: Policy) -> float:
    """An episode of one turn, whose reward depends on what was sampled."""
    reply = await policy.complete([task["number"] % 7 + 1, 1, 2])
    return (len(reply.tokens) % 10) / 10


class NumberText:
    """A tokenizer that is never asked for text."""

    stop_tokens: frozenset[int] = frozenset()
    thinks = False

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        return "".join(message["content"] for message in messages)

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def spell(self, tokens: Sequence[int]) -> str:
        return self.decode(tokens)


class InstantWeights:
    """Weights that are there as soon as they are announced."""

    async def fetch(self, announce: WeightsAnnounce) -> Snapshot:
        return Snapshot(announce.weights, {})

    async def regroup(self, group: WeightGroup) -> None:
        pass


@dataclass
class MemoryJournal:
    """A journal nobody reads before the end."""

    rows: list[Row] = field(default_factory=list[Row])
    evaluations: list[EvalSummary] = field(default_factory=list[EvalSummary])
    failures: list[str] = field(default_factory=list[str])
    said: list[str] = field(default_factory=list[str])
    result: Row = field(default_factory=dict[str, Any])
    failures_path = "this journal"

    def step(self, row: Row) -> None:
        self.rows.append(row)

    def evaluated(self, summary: EvalSummary, samples: Sequence[Row]) -> None:
        self.evaluations.append(summary)

    def rewind(self, version: int) -> None:
        self.rows = [row for row in self.rows if row["step"] < version]

    def failed(self, group_id: int, member: int, reason: str, traceback: str) -> None:
        self.failures.append(f"{group_id}/{member}: {reason}")

    def summary(self, summary: Row) -> None:
        self.result = summary

    def pulse(self, pulse: Row) -> None:
        pass

    def say(self, line: str) -> None:
        self.said.append(line)


@dataclass(frozen=True)
class Outcome:
    complete: bool
    seconds: float
    """Virtual."""
    journal: MemoryJournal
    batches: list[MicroBatches]
    store: Store


async def simulate(
    run: Run,
    *,
    make_engine: Callable[[int], Engine],
    step_time: Callable[[MicroBatches], float],
    latency_s: float = 0.0,
) -> Outcome:
    """Run a recipe to its end on `run.generator.count` engines, `make_engine(index)` each, and a learner that takes
    `step_time(batch)` seconds a step."""
    store, journal = MemoryStore(), MemoryJournal()
    rollouts, training = MemoryServer(rollout_stream(), latency_s), MemoryServer(training_stream(), latency_s)
    controller = Controller(
        run,
        ledger=await Ledger.open(store),
        tasks=NumberedTasks(),
        rollouts=rollouts,
        training=training,
        journal=journal,
    )
    share = _unwatched if run.colocated else None
    learner = FakeLearner(training.connect(), steps=run.steps, step_time=step_time, share=share)
    environment = Environment("simulated", length_is_reward, NumberedTasks)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(controller.run(), name="controller")
        tasks.create_task(learner.run(), name="learner")
        for index in range(run.generator.count):
            worker = RolloutWorker(
                name=f"generator-{index}",
                transport=rollouts.connect(),
                engine=make_engine(index),
                environment=environment,
                text=NumberText(),
                receiver=InstantWeights(),
                credit=run.credit_rollouts,
                timeout_s=run.environment.timeout_s,
                run_host=inline,
                colocated=run.colocated,
            )
            tasks.create_task(worker.run(), name=f"generator-{index}")
    return Outcome(running.result(), asyncio.get_running_loop().time(), journal, learner.batches, store)


def _unwatched(takes: bool) -> None:
    """Nobody looks who is on the shared device."""
