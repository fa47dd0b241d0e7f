"""The fake generator against a scripted controller: one clock for all rows, versions by token, leases that resume."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from async_rl.simulate.fake_generator import EngineModel, FakeGenerator
from async_rl.simulate.workload import GroupDraw
from async_rl.wire.codec import rollout_stream
from async_rl.wire.memory import MemoryServer
from async_rl.wire.messages import (
    Ack,
    Cancel,
    Credit,
    Finished,
    GroupLease,
    Heartbeat,
    Hello,
    HelloAck,
    Lease,
    Positions,
    Purpose,
    Sampling,
    Segment,
    Shutdown,
    Task,
    VersionSpan,
    WeightsAnnounce,
    WeightsId,
    WeightsLive,
    Yield,
)

Virtual = Callable[[Coroutine[Any, Any, Any]], Any]


class Script:
    """The controller's side: says what a test tells it to, and writes down what it hears, with the time."""

    def __init__(self, lengths: list[int], **model: float) -> None:
        self.server = MemoryServer(rollout_stream())
        self.server.epoch = 1
        self.heard: list[tuple[float, Any]] = []
        self.peer, self.acknowledges = "", True
        self.lengths = lengths
        self.model = EngineModel(**({"slots": 8, "step_s": 1.0, "sequence_s": 0.0} | model))  # type: ignore[arg-type]
        self.loop = asyncio.get_running_loop()
        self.tasks: list[asyncio.Task[Any]] = [asyncio.create_task(self.listen())]

    def generator(self, name: str = "generator-0") -> FakeGenerator:
        one = FakeGenerator(
            name=name,
            transport=self.server.connect(),
            model=self.model,
            credit=8,
            draw=lambda _: GroupDraw(self.lengths, [0.5] * len(self.lengths)),
        )
        self.tasks.append(asyncio.create_task(one.run()))
        return one

    async def listen(self) -> None:
        while True:
            peer, messages = await self.server.receive()
            for message in messages:
                self.heard.append((self.loop.time(), message))
                if isinstance(message, Finished) and self.acknowledges:
                    self.say(Ack(message.group_id, [result.member for result in message.members]))
                if isinstance(message, Hello):
                    self.peer = peer
                    self.say(HelloAck("welcome"))

    def say(self, *messages: Any) -> None:
        for message in messages:
            self.server.send(self.peer, message)

    def announce(self, version: int) -> None:
        self.say(WeightsAnnounce(WeightsId(0, version), "shared_memory"))

    def lease(self, members: list[int], group_id: int = 0, purpose: Purpose = "train", **fields: Any) -> None:
        self.say(Lease([GroupLease(group_id, purpose, Task("t", {}), members, Sampling(1000), **fields)]))

    def all(self, kind: type[Any]) -> list[tuple[float, Any]]:
        return [(at, message) for at, message in self.heard if isinstance(message, kind)]

    def ends(self) -> dict[int, float]:
        return {result.member: at for at, message in self.all(Finished) for result in message.members}

    async def over(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def scripted(
    virtual: Virtual, play: Callable[[Script], Coroutine[Any, Any, None]], lengths: list[int], **model: float
) -> Script:
    async def main() -> Script:
        script = Script(lengths, **model)
        script.generator()
        await asyncio.sleep(0.0)
        await asyncio.sleep(1e-6)
        await play(script)
        await script.over()
        return script

    return virtual(main())


def test_all_rows_advance_together_and_faster_when_fewer(virtual: Virtual) -> None:
    async def play(script: Script) -> None:
        script.announce(0)
        script.lease([0, 1])
        await asyncio.sleep(20)

    script = scripted(virtual, play, [2, 4], sequence_s=0.5)
    ends = script.ends()
    assert abs(ends[0] - 2 * 2.0) < 1e-3, "two rows: 1 + 2 * 0.5 seconds a token"
    assert abs(ends[1] - (2 * 2.0 + 2 * 1.5)) < 1e-3, "then one row"
    limits = [message.limit for _, message in script.all(Credit)]
    assert limits == [8, 9, 10], "every rollout that ended gives its credit back"


def test_a_weight_update_stands_still_and_splits_the_versions(virtual: Virtual) -> None:
    async def play(script: Script) -> None:
        script.announce(0)
        script.lease([0])
        await asyncio.sleep(6)  # two of them are the pause of the first weights
        script.announce(1)
        await asyncio.sleep(20)

    script = scripted(virtual, play, [10], pause_s=2.0)
    live = [(round(at), message.weights.version) for at, message in script.all(WeightsLive)]
    assert live == [(2, 0), (8, 1)]
    assert [(round(at), message.sampled) for at, message in script.all(Positions)] == [(2, []), (8, [(0, 0, 4)])]
    (at, finished), *_ = script.all(Finished)
    assert round(at) == 14
    assert finished.members[0].sequences[0].spans == [VersionSpan(0, 4, 0, 0), VersionSpan(4, 10, 1, 0)]
    assert len(finished.members[0].sequences[0].tokens) == 40


def test_evaluation_has_no_positions(virtual: Virtual) -> None:
    async def play(script: Script) -> None:
        script.announce(0)
        script.lease([0], purpose="eval")
        await asyncio.sleep(3)
        script.announce(1)
        await asyncio.sleep(20)

    script = scripted(virtual, play, [10])
    assert [message.sampled for _, message in script.all(Positions)] == [[], []]
    assert script.all(Finished)[0][1].purpose == "eval"


def test_leases_beyond_the_slots_wait_and_a_cancelled_row_makes_room(virtual: Virtual) -> None:
    async def play(script: Script) -> None:
        script.announce(0)
        script.lease([0, 1, 2])
        await asyncio.sleep(1)
        script.say(Cancel(0, [0], "test"))
        await asyncio.sleep(20)

    script = scripted(virtual, play, [50, 3, 4], slots=1)
    assert {member: round(at) for member, at in script.ends().items()} == {1: 4, 2: 8}
    assert script.all(Credit)[-1][1].limit == 8 + 3


def test_a_lease_waits_for_its_version(virtual: Virtual) -> None:
    async def play(script: Script) -> None:
        script.announce(0)
        script.lease([0], min_version=1)
        await asyncio.sleep(5)
        script.announce(1)
        await asyncio.sleep(20)

    script = scripted(virtual, play, [3])
    assert {member: round(at) for member, at in script.ends().items()} == {0: 8}
    assert script.all(Finished)[0][1].members[0].sequences[0].spans == [VersionSpan(0, 3, 1, 1)]


def test_segments_only_where_asked_and_a_lease_that_is_used_up_is_continued(virtual: Virtual) -> None:
    async def play(script: Script) -> None:
        script.announce(0)
        script.lease([0], segment_tokens=3, lease_tokens=7)
        await asyncio.sleep(10)
        segments = [message for _, message in script.all(Segment)]
        script.announce(1)
        script.lease([0], segments=segments)
        await asyncio.sleep(20)

    script = scripted(virtual, play, [10])
    segments = [(round(at), m.start, len(m.tokens) // 4, m.yielded) for at, m in script.all(Segment)]
    assert segments == [(3, 0, 3, False), (6, 3, 3, False), (7, 6, 1, True)]
    (at, finished), *_ = script.all(Finished)
    assert round(at) == 13, "three tokens were left"
    spans = finished.members[0].sequences[0].spans
    assert [(span.start, span.end, span.version) for span in spans] == [(0, 3, 0), (3, 6, 0), (6, 7, 0), (7, 10, 1)]
    assert len(finished.members[0].sequences[0].tokens) == 40


def test_what_is_wanted_back_goes_on_elsewhere_after_its_cache_is_there(virtual: Virtual) -> None:
    """Six tokens of ten at a half second each to compute again; another row of the engine stands still as well."""

    async def play(script: Script) -> None:
        script.announce(0)
        script.lease([0])
        await asyncio.sleep(6)
        script.say(Yield(0, [0, 1]))
        await asyncio.sleep(4)
        script.lease([1], group_id=1)
        script.lease([0], segments=[message for _, message in script.all(Segment)])
        await asyncio.sleep(30)

    script = scripted(virtual, play, [10, 4], prefill_s=0.5)
    ((at, segment),) = script.all(Segment)
    assert (round(at), len(segment.tokens) // 4, segment.yielded) == (6, 6, True), "nobody has member 1"
    assert [message.limit for _, message in script.all(Credit)] == [8, 9, 11]
    ends = script.ends()
    assert {member: round(at) for member, at in ends.items()} == {0: 17, 1: 17}
    (result,) = [one for _, m in script.all(Finished) for one in m.members if one.member == 0]
    assert [(span.start, span.end) for span in result.sequences[0].spans] == [(0, 6), (6, 10)]


def test_what_has_ended_is_not_handed_back(virtual: Virtual) -> None:
    async def play(script: Script) -> None:
        script.announce(0)
        script.lease([0])
        await asyncio.sleep(5 - 1e-4)
        script.say(Yield(0, [0]))
        await asyncio.sleep(10)

    script = scripted(virtual, play, [5])
    assert not script.all(Segment) and list(script.ends()) == [0]


def test_results_are_said_again_until_they_are_acknowledged(virtual: Virtual) -> None:
    async def play(script: Script) -> None:
        script.acknowledges = False
        script.announce(0)
        script.lease([0])
        await asyncio.sleep(9)
        script.say(Ack(0, [0]))
        await asyncio.sleep(30)

    assert 2 <= len(scripted(virtual, play, [1]).all(Finished)) <= 3


def test_silence_is_broken_by_heartbeats_until_it_dies(virtual: Virtual) -> None:
    async def play(script: Script) -> None:
        one = script.generator("generator-1")
        await asyncio.sleep(10)
        one.die()
        at = script.loop.time()
        await asyncio.sleep(10)
        assert not script.tasks[-1].cancelled() and script.tasks[-1].result() is None
        again = script.generator("generator-1")
        await asyncio.sleep(1)
        assert [m.name for t, m in script.all(Hello) if t > at] == ["generator-1"]
        script.say(Shutdown("over"))
        await asyncio.sleep(1)
        assert again.shutdown is not None

    script = scripted(virtual, play, [1])
    beats = script.all(Heartbeat)
    assert len(beats) >= 18, "one a second from each of two, while nothing else is said"
    assert len(beats) < 38, "and none from the dead"
    causes = beats[-1][1].activity.seconds
    assert abs(sum(causes.values()) - beats[-1][1].activity.at) < 1e-6
