"""Episodes to run, and a host that keeps what it reports in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from async_rl.engines.fake import FakeEngine
from async_rl.engines.protocol import Engine, Snapshot
from async_rl.environments.api import Environment, Policy
from async_rl.rollout.conversations import Text
from async_rl.rollout.host import EpisodeHost
from async_rl.simulate.cluster import NumberedTasks, NumberText
from async_rl.wire.messages import Failed, Finished, GroupLease, RolloutResult, Sampling, Segment, Task, WeightsId

Episode: TypeAlias = Callable[[Task, Policy], Awaitable[float]]


async def one_turn(task: Task, policy: Policy) -> float:
    reply = await policy.complete([1, 2, 3])
    return len(reply.tokens) % 7


async def conversation(task: Task, policy: Policy) -> float:
    """Three turns that extend each other, with tool output in between, then one that begins anew."""
    tokens = [1, 2, 3]
    for turn in range(3):
        reply = await policy.complete(tokens)
        await asyncio.sleep(0.01)
        tokens = [*tokens, *reply.tokens, 4, turn]
    return len((await policy.complete([5, *reply.tokens[:2]])).tokens)


def environment(episode: Episode) -> Environment:
    return Environment("test", episode, NumberedTasks)


def lease(group_id: int = 7, members: Sequence[int] = (0,), **options: Any) -> GroupLease:
    sampling = Sampling(options.pop("max_new_tokens", 100), seed=3)
    return GroupLease(group_id, options.pop("purpose", "train"), Task("t", {}), list(members), sampling, **options)


def fake(**options: Any) -> FakeEngine:
    return FakeEngine(**{"slots": 8, "median_tokens": 40, "sigma": 0.7, "seconds_per_step": 0.01, **options})


def weights(version: int) -> Snapshot:
    return Snapshot(WeightsId(0, version), {})


class Hosted:
    """A host, and what it reported."""

    def __init__(self, episode: Episode, engine: Engine, text: Text, *, timeout_s: float) -> None:
        self.reported: list[Segment | Finished | Failed] = []
        self.started = asyncio.Event()
        self.engine = engine
        self._news = asyncio.Event()
        self.host = EpisodeHost(
            environment(episode),
            text,
            engine,
            timeout_s=timeout_s,
            started=self.started.set,
            report=self._report,
            clock=asyncio.get_running_loop().time,
            persist=self._report,
        )

    @property
    def segments(self) -> list[Segment]:
        return [message for message in self.reported if isinstance(message, Segment)]

    @property
    def results(self) -> list[RolloutResult]:
        return [member for message in self.reported if isinstance(message, Finished) for member in message.members]

    @property
    def failures(self) -> list[str]:
        return [message.reason for message in self.reported if isinstance(message, Failed)]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    async def run(self, *leases: GroupLease) -> None:
        """Until each member has ended or yielded."""
        self.reported.clear()
        self.host.start(leases)
        members = sum(len(lease.members) for lease in leases)
        await self.until(lambda: self.ended == members)

    @property
    def ended(self) -> int:
        return len(self.results) + len(self.failures) + sum(segment.yielded for segment in self.segments)

    def _report(self, messages: Sequence[Segment | Finished | Failed]) -> None:
        self.reported += messages
        self._news.set()


@asynccontextmanager
async def hosted(
    episode: Episode, engine: Engine | None = None, text: Text | None = None, *, timeout_s: float = 600
) -> AsyncGenerator[Hosted]:
    """On a fake engine with weights 0, if none is given."""
    running = Hosted(episode, engine or fake(), text or NumberText(), timeout_s=timeout_s)
    running.engine.start(running.host.deliver_threadsafe)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(running.host.run())
        await running.started.wait()
        if engine is None:
            await running.engine.load_weights(weights(0))
        yield running
        running.host.close()
    await running.engine.stop()
