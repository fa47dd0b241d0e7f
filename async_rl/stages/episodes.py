"""Episodes run to their end in this process, over any engine: a generator without a controller.

async with episodes(engine, environment, text, at_once=64, timeout_s=600) as running:
    await engine.load_weights(snapshot)
    groups = await running.run(leases)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from async_rl.engines.protocol import Engine
from async_rl.environments.api import Environment
from async_rl.errors import AsyncRLError
from async_rl.rollout.host import EpisodeHost, Text
from async_rl.wire.messages import Failed, Finished, GroupLease, RolloutResult

Watch = Callable[[int, int], None]
"""(episodes that ended, episodes in all)"""


@dataclass(slots=True)
class Group:
    """What came of one lease."""

    lease: GroupLease
    results: list[RolloutResult] = field(default_factory=list[RolloutResult])
    failures: list[Failed] = field(default_factory=list[Failed])

    @property
    def ended(self) -> int:
        return len(self.results) + len(self.failures)


def nobody(done: int, total: int) -> None:
    """Nobody watches."""


class Episodes:
    """Made by `episodes`."""

    def __init__(self, engine: Engine, environment: Environment, text: Text, *, at_once: int, timeout_s: float) -> None:
        self.started = asyncio.Event()
        self._at_once = at_once
        self._groups: dict[int, Group] = {}
        self._waiting: deque[GroupLease] = deque()
        self._running = 0
        self._news = asyncio.Event()
        self.host = EpisodeHost(
            environment,
            text,
            engine,
            timeout_s=timeout_s,
            started=self.started.set,
            report=self._report,
            clock=asyncio.get_running_loop().time,
        )

    async def run(self, leases: Sequence[GroupLease], watch: Watch = nobody) -> list[Group]:
        """In the order of the leases, results by member. Their group ids differ."""
        self._groups = {lease.group_id: Group(lease) for lease in leases}
        self._waiting.extend(leases)
        total = sum(len(lease.members) for lease in leases)
        self._start()
        while (done := sum(group.ended for group in self._groups.values())) < total:
            watch(done, total)
            self._news.clear()
            await self._news.wait()
        watch(total, total)
        for group in self._groups.values():
            group.results.sort(key=lambda result: result.member)
        return list(self._groups.values())

    def _start(self) -> None:
        """As many as may run: an episode's time-out counts from its start, so it does not start to wait for a slot."""
        starting: list[GroupLease] = []
        while self._waiting and (not self._running or self._running + len(self._waiting[0].members) <= self._at_once):
            starting.append(self._waiting.popleft())
            self._running += len(starting[-1].members)
        self.host.start(starting)

    def _report(self, messages: list[Finished | Failed]) -> None:
        for message in messages:
            group = self._groups[message.group_id]
            before = group.ended
            if isinstance(message, Finished):
                group.results += message.members
            else:
                group.failures.append(message)
            self._running -= group.ended - before
        self._start()
        self._news.set()


@asynccontextmanager
async def episodes(
    engine: Engine, environment: Environment, text: Text, *, at_once: int, timeout_s: float
) -> AsyncGenerator[Episodes]:
    """Starts the engine, and stops it at the end. Raises what breaks the engine, the host or the body."""
    running = Episodes(engine, environment, text, at_once=at_once, timeout_s=timeout_s)
    engine.start(running.host.deliver_threadsafe)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(running.host.run(), name="episode host")
            watching = tasks.create_task(engine.wait_stopped(), name="engine")
            await running.started.wait()
            yield running
            running.host.close()
            watching.cancel()
    except* AsyncRLError as group:
        raise group.exceptions[0] from None
    finally:
        await engine.stop()
