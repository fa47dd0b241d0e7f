"""The generator's side of the rollout stream against a scripted controller."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from rollout_cases import Episode, conversation, environment, fake, lease, one_turn, weights

from async_rl.engines.fake import FakeEngine
from async_rl.engines.protocol import Snapshot
from async_rl.environments.api import Policy
from async_rl.rollout.host import EpisodeHost
from async_rl.rollout.host_runner import inline, on_thread
from async_rl.rollout.worker import HostRunner, RolloutWorker, WeightsReceiver
from async_rl.simulate.cluster import InstantWeights, NumberText
from async_rl.wire.codec import rollout_stream
from async_rl.wire.memory import MemoryServer
from async_rl.wire.messages import (
    Ack,
    Cancel,
    Credit,
    Failed,
    Finished,
    GeneratorMessage,
    GroupLease,
    Heartbeat,
    Hello,
    HelloAck,
    Lease,
    Positions,
    Segment,
    Shutdown,
    Task,
    ToGenerator,
    WeightsAnnounce,
    WeightsId,
    WeightsLive,
)

Run = Callable[[Any], Any]
T = TypeVar("T")


class Scripted:
    """A controller that says what the test says, and keeps what it hears."""

    def __init__(self, worker: asyncio.Task[Shutdown], server: MemoryServer[ToGenerator, GeneratorMessage]) -> None:
        self.worker, self._server = worker, server
        self.heard: list[GeneratorMessage] = []
        self._news = asyncio.Event()

    def say(self, message: ToGenerator) -> None:
        self._server.send("peer-0", message)

    def lease(self, *groups: GroupLease) -> None:
        self.say(Lease(list(groups)))

    async def load(self, version: int) -> None:
        self.say(WeightsAnnounce(WeightsId(0, version), "shared_memory"))
        await self.until(lambda: any(m.weights.version == version for m in self.of(Positions)))

    def of(self, kind: type[T]) -> list[T]:
        return [message for message in self.heard if isinstance(message, kind)]

    @property
    def credit(self) -> int:
        return self.of(Credit)[-1].limit

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    async def listen(self) -> None:
        while True:
            _, messages = await self._server.receive()
            self.heard += messages
            self._news.set()


@asynccontextmanager
async def scripted(
    episode: Episode,
    engine: FakeEngine,
    *,
    timeout_s: float = 600,
    run_host: HostRunner = inline,
    heartbeat_s: float = 1.0,
    receiver: WeightsReceiver | None = None,
    colocated: bool = False,
) -> AsyncGenerator[Scripted]:
    server = MemoryServer(rollout_stream(), 0.001)
    async with asyncio.TaskGroup() as tasks:
        worker = RolloutWorker(
            name="generator-0",
            transport=server.connect(),
            engine=engine,
            environment=environment(episode),
            text=NumberText(),
            receiver=receiver or InstantWeights(),
            credit=10,
            timeout_s=timeout_s,
            run_host=run_host,
            colocated=colocated,
            dtype="bfloat16",
        )
        controller = Scripted(tasks.create_task(worker.run()), server)
        listening = tasks.create_task(controller.listen())
        await controller.until(lambda: bool(controller.of(Hello)))
        assert [hello.dtype for hello in controller.of(Hello)] == ["bfloat16"]
        controller.say(HelloAck("generator-0/1", heartbeat_s=heartbeat_s))
        yield controller
        controller.say(Shutdown("the test is over"))
        await controller.worker
        listening.cancel()


@pytest.mark.parametrize("episode", [one_turn, conversation])
def test_segments_then_the_result_then_credit(virtual: Run, episode: Episode) -> None:
    async def main() -> None:
        async with scripted(episode, fake()) as controller:
            await controller.load(0)
            controller.lease(lease(7, [0, 1, 2], segment_tokens=10), lease(8, [0], purpose="eval", segment_tokens=10))
            await controller.until(lambda: bool(controller.of(Finished)) and controller.credit == 14)
            ended: set[int] = set()
            for message in controller.heard:
                if isinstance(message, Segment):
                    assert message.group_id == 7 and message.member not in ended
                elif isinstance(message, Finished) and message.group_id == 7:
                    ended |= {result.member for result in message.members}
            assert ended == {0, 1, 2} and controller.of(Segment)

    virtual(main())


def test_a_rollout_that_yields_gives_its_credit_back_and_can_come_again(virtual: Run) -> None:
    async def main() -> None:
        async with scripted(one_turn, fake(median_tokens=60, sigma=0.0)) as controller:
            await controller.load(0)
            for credit in (11, 12):
                controller.lease(lease(segments=controller.of(Segment), segment_tokens=10, lease_tokens=25))
                await controller.until(lambda credit=credit: controller.credit == credit)
            assert [(s.start, s.yielded) for s in controller.of(Segment)] == [
                (start, start in (20, 45)) for start in (0, 10, 20, 25, 35, 45)
            ]
            controller.lease(lease(segments=controller.of(Segment), segment_tokens=10, lease_tokens=25))
            await controller.until(lambda: bool(controller.of(Finished)) and controller.credit == 13)
            assert len(controller.of(Segment)) == 6
            where = controller.heard.index(controller.of(Segment)[2])
            assert isinstance(controller.heard[where + 1], Credit)

    virtual(main())


def test_positions_follow_the_weights(virtual: Run) -> None:
    async def main() -> None:
        async with scripted(one_turn, fake(slots=2, median_tokens=60, sigma=0.0)) as controller:
            await controller.load(0)
            controller.lease(lease(7, [0, 1, 2]), lease(8, [0], purpose="eval"), lease(9, [0], min_version=1))
            await asyncio.sleep(0.301)
            await controller.load(1)
            kinds = [type(m) for m in controller.heard if isinstance(m, WeightsLive | Positions)]
            assert kinds == [WeightsLive, Positions] * 2
            first, second = controller.of(Positions)
            assert (first.weights, first.sampled) == (WeightsId(0, 0), [])
            assert second == Positions(WeightsId(0, 1), [(7, 0, 31), (7, 1, 31)])  # the others wait
            await controller.until(lambda: controller.credit == 15)
            assert {span.version for span in spans(controller, 9)} == {1}
            assert [span.end - span.start for span in spans(controller, 7)[:2]] == [31, 29]

    virtual(main())


def spans(controller: Scripted, group_id: int) -> list[Any]:
    found = [message for message in controller.of(Finished) if message.group_id == group_id]
    return [span for m in found for result in m.members for sequence in result.sequences for span in sequence.spans]


def test_cancelled_members_end_once_and_without_a_report(virtual: Run) -> None:
    async def main() -> None:
        async with scripted(one_turn, fake(median_tokens=60, sigma=0.0)) as controller:
            await controller.load(0)
            controller.lease(lease(7, [0, 1], segment_tokens=10), lease(8, [0, 1], min_version=1))
            await asyncio.sleep(0.15)
            controller.say(Cancel(7, [0], "stale"))
            controller.say(Cancel(7, [0], "stale"))
            controller.say(Cancel(8, [1], "stale"))
            await controller.until(lambda: controller.credit == 12)
            await controller.load(1)
            await controller.until(lambda: controller.credit == 14)
            ended = [(m.group_id, result.member) for m in controller.of(Finished) for result in m.members]
            assert ended == [(7, 1), (8, 0)]
            assert len([segment for segment in controller.of(Segment) if segment.member == 0]) == 1
            controller.say(Cancel(7, [1], "crossed with its result"))
            controller.say(Ack(8, [0]))
            await asyncio.sleep(60)
            assert controller.credit == 14 and len(controller.of(Finished)) == 2  # neither is sent again

    virtual(main())


def test_failures_and_results_are_sent_again_until_acknowledged(virtual: Run) -> None:
    async def fails(task: Task, policy: Policy) -> float:
        await policy.complete([1])
        raise ValueError("no answer")

    async def main() -> None:
        async with scripted(fails, fake()) as controller:
            await controller.load(0)
            controller.lease(lease())
            await asyncio.sleep(30)
            assert len(controller.of(Failed)) > 3
            assert {message.reason for message in controller.of(Failed)} == {"ValueError: no answer"}
            controller.say(Ack(7, [0]))
            await asyncio.sleep(1)
            sent = len(controller.of(Failed))
            await asyncio.sleep(30)
            assert len(controller.of(Failed)) == sent and controller.credit == 11

    virtual(main())


def test_heartbeats_of_an_inline_host_go_on_for_ever(virtual: Run) -> None:
    async def main() -> None:
        async with scripted(one_turn, fake(), timeout_s=0.1) as controller:
            await controller.load(0)
            await asyncio.sleep(1000)
            assert len(controller.of(Heartbeat)) >= 999

    virtual(main())


def test_code_that_blocks_ends_the_generator_for_a_restart(real: Run, caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    async def blocks(task: Task, policy: Policy) -> float:
        reply = await policy.complete([1])
        if len(reply.tokens) == 5:  # all do
            release.wait()
        return 1.0

    async def main() -> None:
        server = MemoryServer(rollout_stream())
        engine = ThreadsafeFake(slots=2, median_tokens=5, sigma=0.0, seconds_per_step=0.0001)
        worker = RolloutWorker(
            name="generator-0",
            transport=server.connect(),
            engine=engine,
            environment=environment(blocks),
            text=NumberText(),
            receiver=InstantWeights(),
            credit=10,
            timeout_s=0.2,
            run_host=on_thread,
        )
        server.send("peer-0", HelloAck("generator-0/1", heartbeat_s=0.05))
        server.send("peer-0", WeightsAnnounce(WeightsId(0, 0), "shared_memory"))
        server.send("peer-0", Lease([lease(7, [3])]))
        shutdown = await worker.run()
        assert shutdown.restart
        assert shutdown.reason.startswith(
            "the environment has blocked its event loop for environment.timeout_s = 0.2 s, so this generator starts "
            "again; inside were rollouts 7/3;"
        )
        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [shutdown.reason]

    try:
        real(main())
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name == "environment":
                thread.join()


def test_many_agents_that_block_may_wait_in_threads_at_once(real: Run) -> None:
    met = threading.Barrier(60)

    async def waits(task: Task, policy: Policy) -> float:
        await policy.complete([1])
        await asyncio.to_thread(met.wait, 20)
        return 1.0

    async def main() -> None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        finished: list[Finished | Failed] = []

        def report(messages: list[Finished | Failed]) -> None:
            finished.extend(messages)
            if sum(len(message.members) for message in finished if isinstance(message, Finished)) == 60:
                loop.call_soon_threadsafe(ended.set_result, None)

        engine = ThreadsafeFake(slots=60, median_tokens=3, sigma=0.0, seconds_per_step=0.0001)
        host = EpisodeHost(
            environment(waits),
            NumberText(),
            engine,
            timeout_s=30,
            started=lambda: loop.call_soon_threadsafe(started.set) and None,
            report=report,
            clock=loop.time,
        )
        engine.start(host.deliver_threadsafe)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(on_thread(host))
            await started.wait()
            await engine.load_weights(weights(0))
            host.loop.call_soon_threadsafe(host.start, [lease(7, list(range(60)))])
            await ended
            host.loop.call_soon_threadsafe(host.close)
        await engine.stop()

    real(main())


class ThreadsafeFake(FakeEngine):
    """A fake engine that another thread asks."""

    def start(self, deliver: Any) -> None:
        self._home = asyncio.get_running_loop()
        super().start(deliver)

    def _post(self, command: Any) -> None:
        self._home.call_soon_threadsafe(super()._post, command)


def test_weights_that_come_behind_newer_ones_are_not_loaded(virtual: Run) -> None:
    class Late(InstantWeights):
        async def fetch(self, announce: WeightsAnnounce) -> Snapshot:
            await asyncio.sleep(5.0 if announce.weights.version == 0 else 0.0)
            return await super().fetch(announce)

    async def main() -> None:
        engine = fake()
        async with scripted(one_turn, engine, receiver=Late()) as controller:
            for version in (0, 1):
                controller.say(WeightsAnnounce(WeightsId(0, version), "shared_memory"))
                await asyncio.sleep(1)
            await asyncio.sleep(10)
            assert [live.weights.version for live in controller.of(WeightsLive)] == [1]
            assert engine.weights == WeightsId(0, 1)

    virtual(main())
