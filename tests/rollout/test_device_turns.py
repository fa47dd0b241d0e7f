"""A generator that shares its device: when it loads weights, what it says and in which order, what survives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from rollout_cases import conversation, fake, lease, one_turn
from test_worker import Scripted, scripted

from async_rl.engines.protocol import Snapshot
from async_rl.simulate.cluster import InstantWeights
from async_rl.weights.errors import WeightsCorrupt, WeightsGone
from async_rl.wire.messages import (
    DeviceHeld,
    DeviceTurn,
    Finished,
    Positions,
    WeightsAnnounce,
    WeightsFailed,
    WeightsId,
    WeightsLive,
)

Run = Callable[[Any], Any]


class Broken(InstantWeights):
    """Versions that do not arrive, each so many times."""

    def __init__(self, error: Exception, times: dict[int, int]) -> None:
        self._error, self._times = error, times
        self.fetched: list[int] = []

    async def fetch(self, announce: WeightsAnnounce) -> Snapshot:
        version = announce.weights.version
        self.fetched.append(version)
        if self._times.get(version, 0) > 0:
            self._times[version] -= 1
            raise self._error
        return await super().fetch(announce)


def announce(controller: Scripted, version: int) -> None:
    controller.say(WeightsAnnounce(WeightsId(0, version), "shared_memory"))


async def turn(controller: Scripted, number: int, hold: bool) -> DeviceHeld:
    controller.say(DeviceTurn(number, hold))
    await controller.until(lambda: any(held.number == number for held in controller.of(DeviceHeld)))
    return controller.of(DeviceHeld)[-1]


def order(controller: Scripted) -> list[str]:
    kinds = (WeightsLive, WeightsFailed, Positions, DeviceHeld, Finished)
    return [type(message).__name__ for message in controller.heard if isinstance(message, kinds)]


def test_off_the_device_weights_are_remembered_and_requests_wait(virtual: Run) -> None:
    async def main() -> None:
        engine = fake(sigma=0.0)
        async with scripted(one_turn, engine, colocated=True) as controller:
            announce(controller, 0)
            announce(controller, 1)
            controller.lease(lease(members=[0, 1]))
            await asyncio.sleep(5)
            assert engine.weights is None and order(controller) == []
            assert (await turn(controller, 1, True)).held
            assert order(controller) == ["WeightsLive", "Positions", "DeviceHeld"]
            assert [live.weights.version for live in controller.of(WeightsLive)] == [1], "the newest only"
            await controller.until(lambda: bool(controller.of(Finished)))

    virtual(main())


def test_what_runs_is_carried_over_the_learners_turn(virtual: Run) -> None:
    async def main() -> None:
        engine = fake(sigma=0.0, median_tokens=40)
        async with scripted(conversation, engine, colocated=True) as controller:
            announce(controller, 0)
            await turn(controller, 1, True)
            controller.lease(lease(members=[0, 1], max_new_tokens=40))
            await asyncio.sleep(0.2)
            left = await turn(controller, 2, False)
            assert not left.held
            assert order(controller)[-2:] == ["Positions", "DeviceHeld"], "first what there is, then that it has left"
            positions = controller.of(Positions)[-1]
            assert positions.weights == WeightsId(0, 0)
            sampled = [count for _, _, count in positions.sampled]
            assert len(sampled) == 2 and all(15 <= count <= 21 for count in sampled)
            announce(controller, 1)
            await asyncio.sleep(1000)
            assert not controller.of(Finished), "nothing is sampled, and nothing ends for lack of progress"
            await turn(controller, 3, True)
            assert [count for _, _, count in controller.of(Positions)[-1].sampled] == sampled
            await controller.until(lambda: bool(controller.of(Finished)))
            spans = controller.of(Finished)[0].members[0].sequences[0].spans
            assert [(span.version, span.kv_version) for span in spans][:2] == [(0, 0), (1, 1)]
            assert spans[0].end - spans[0].start == sampled[0]

    virtual(main())


def test_weights_that_do_not_come_leave_the_old_ones_live(virtual: Run) -> None:
    async def main() -> None:
        engine, receiver = fake(), Broken(WeightsCorrupt("a byte differs"), {1: 2})
        async with scripted(one_turn, engine, colocated=True, receiver=receiver) as controller:
            announce(controller, 0)
            await turn(controller, 1, True)
            await turn(controller, 2, False)
            announce(controller, 1)
            assert (await turn(controller, 3, True)).held
            assert receiver.fetched == [0, 1, 0] and engine.weights == WeightsId(0, 0)
            assert [failed.weights.version for failed in controller.of(WeightsFailed)] == [1]
            controller.lease(lease(members=[0]))
            await controller.until(lambda: bool(controller.of(Finished)))
            announce(controller, 1)
            await controller.until(lambda: len(controller.of(WeightsFailed)) == 2)
            announce(controller, 1)  # in the turn of the generator, between two steps
            await controller.until(lambda: engine.weights == WeightsId(0, 1))

    virtual(main())


def test_the_first_weights_are_tried_again_when_they_do_not_come(virtual: Run) -> None:
    async def main() -> None:
        for error in (WeightsCorrupt("a byte differs"), WeightsGone("newer ones")):
            engine, receiver = fake(), Broken(error, {0: 1})
            async with scripted(one_turn, engine, colocated=True, receiver=receiver) as controller:
                announce(controller, 0)
                controller.say(DeviceTurn(1, True))
                await controller.until(lambda receiver=receiver: receiver.fetched == [0])
                assert not controller.of(DeviceHeld)
                announce(controller, 0)
                await controller.until(lambda controller=controller: bool(controller.of(DeviceHeld)))
                assert engine.weights == WeightsId(0, 0)

    virtual(main())


def test_weights_that_arrive_after_the_device_was_left_are_not_loaded(virtual: Run) -> None:
    """They were on their way when the order came."""

    class Slow(InstantWeights):
        async def fetch(self, announce: WeightsAnnounce) -> Snapshot:
            await asyncio.sleep(announce.weights.version)
            return await super().fetch(announce)

    async def main() -> None:
        engine = fake()
        async with scripted(one_turn, engine, colocated=True, receiver=Slow()) as controller:
            announce(controller, 0)
            await turn(controller, 1, True)
            announce(controller, 3)
            await turn(controller, 2, False)
            await asyncio.sleep(10)
            assert engine.weights == WeightsId(0, 0) and engine.activity()["swap"] == 0
            assert (await turn(controller, 3, True)).held and engine.weights == WeightsId(0, 3)

    virtual(main())
