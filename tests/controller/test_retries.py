"""What fails again and again: the pause between two tries grows, and a run of failures only ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from schedules import Schedule, play, recipe
from wires import Wires

from async_rl.controller.backoff import FIRST_S, LONGEST_S, Backoff
from async_rl.errors import UserError
from async_rl.ledger import inspection
from async_rl.wire.messages import (
    Heartbeat,
    WeightGroup,
    WeightsAnnounce,
    WeightsFailed,
    WeightsId,
    WeightsLive,
)

Virtual = Callable[[Any], Any]


def test_pauses_double_until_it_works(virtual: Virtual) -> None:
    async def main() -> None:
        backoff, loop = Backoff(), asyncio.get_running_loop()
        tries: list[float] = []

        def again() -> None:
            tries.append(loop.time())
            backoff.failed("it", again)

        assert backoff.failed("it", again) == FIRST_S
        assert backoff.failed("it", again) is None, "one retry at a time"
        assert backoff.failed("something else", lambda: None) == FIRST_S
        await asyncio.sleep(1000)
        pauses = [later - earlier for earlier, later in zip([0.0, *tries], tries, strict=False)]
        assert pauses[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
        assert pauses[-2:] == pytest.approx([LONGEST_S, LONGEST_S])
        backoff.worked("it")
        count = len(tries)
        await asyncio.sleep(LONGEST_S)
        assert tries[count + 1] - tries[count] == pytest.approx(FIRST_S), "the retry that was due, then as at first"
        backoff.close()
        count = len(tries)
        await asyncio.sleep(1000)
        assert len(tries) == count

    virtual(main())


async def told(connection: Any, kind: type[Any], number: int) -> list[float]:
    """When the first `number` messages of this kind arrived."""
    found: list[float] = []
    while len(found) < number:
        messages, now = await connection.receive(), round(asyncio.get_running_loop().time(), 1)
        found += [now for message in messages if isinstance(message, kind)]
    return found


async def written_down(connection: Any, kind: type[Any], at: list[float]) -> None:
    """When messages of this kind arrive."""
    while True:
        at += [asyncio.get_running_loop().time() for one in await connection.receive() if isinstance(one, kind)]


async def beating(connection: Any) -> None:
    while True:
        connection.send(Heartbeat())
        await asyncio.sleep(0.5)


async def refusing(connection: Any, weights: WeightsId, number: int) -> list[float]:
    """Refuses them so often; when they were announced."""
    at: list[float] = []
    for _ in range(number):
        at += await told(connection, WeightsAnnounce, 1)
        connection.send(WeightsFailed(weights, "no memory"))
    return at


def test_weights_that_do_not_arrive_are_announced_again_ever_more_slowly(virtual: Virtual) -> None:
    """Three times; then it waits for newer ones."""

    async def main() -> None:
        wires, weights = await Wires.open(weights={"transport": "shared_memory"}), WeightsId(0, 0)
        newer = WeightsId(0, 1)
        wires.learner.send(WeightsAnnounce(weights, "shared_memory"))
        refused, well = wires.generators
        bothered = asyncio.create_task(told(well, WeightsAnnounce, 3))
        assert await refusing(refused, weights, 4) == [0.0, 0.1, 0.3, 0.7]
        await asyncio.sleep(100)
        wires.learner.send(WeightsAnnounce(newer, "shared_memory"))
        assert await refusing(refused, newer, 2) == [100.7, 101.5], "the pauses go on growing"
        assert await told(refused, WeightsAnnounce, 1) == [103.1]
        assert any("weights 1 do not reach generator-0: no memory (next try in 2 s)" in s for s in wires.journal.said)
        refused.send(WeightsLive(newer, 0.0))
        refused.send(WeightsFailed(WeightsId(0, 1), "an old word"))
        await asyncio.sleep(10)
        assert not bothered.done(), "the other was told of each once"
        bothered.cancel()
        await wires.close()

    virtual(main())


def test_a_weight_group_that_does_not_form_is_formed_again_ever_more_slowly(virtual: Virtual) -> None:
    """What one generator got in between does not help the other."""

    async def main() -> None:
        wires, weights = await Wires.open(weights={"transport": "process_group"}), WeightsId(0, 0)
        wires.learner.send(WeightsAnnounce(weights, "process_group"))
        lost, well = wires.generators
        groups: list[float] = []
        listening = asyncio.gather(
            written_down(wires.learner, WeightGroup, groups), *[beating(one) for one in wires.generators]
        )
        for round_ in range(5):
            await asyncio.sleep(5)
            before = len(groups)
            well.send(WeightsLive(weights, 0.0))
            lost.send(WeightsFailed(weights, "no route"))
            lost.send(WeightsFailed(weights, "no route"))
            sent = asyncio.get_running_loop().time()
            await asyncio.sleep(5)
            assert len(groups) == before + 1
            assert groups[-1] - sent == pytest.approx(0.1 * 2**round_, abs=0.01)
        listening.cancel()
        await wires.close()

    virtual(main())


def test_a_run_of_nothing_but_failures_ends(virtual: Virtual) -> None:
    """With what failed last, and with a ledger from which the run goes on once the mistake is mended."""
    schedule = Schedule(recipe(environment={"failures_in_a_row": 20}), failing=1.0)
    with pytest.raises(BaseExceptionGroup) as caught:
        virtual(play(schedule))
    errors = caught.value.subgroup(UserError)
    assert "20 episodes in a row failed, the last one with: scripted (tracebacks are in this journal" in repr(errors)


def test_failures_among_successes_do_not_end_it(virtual: Virtual) -> None:
    schedule = Schedule(recipe(steps=20, environment={"failures_in_a_row": 8}), failing=0.3, seed=3)
    world = virtual(play(schedule))
    assert len(world.journal.failures) > 8 and inspection.holds(world.report())


def test_the_limit_is_four_steps_but_never_small() -> None:
    assert recipe().failures_in_a_row == 64
    assert recipe(rollout={"groups_per_step": 64, "group_size": 8}).failures_in_a_row == 2048


def test_a_member_that_is_gone_before_it_is_silent_leaves_the_group(virtual: Virtual) -> None:
    async def main() -> None:
        wires = await Wires.open(weights={"transport": "process_group"}, controller={"heartbeat_timeout_s": 2.0})
        alive = asyncio.create_task(beating(wires.generators[0]))
        groups: list[list[str]] = []
        async with asyncio.timeout(30):
            while ["generator-0"] not in groups[1:]:
                groups += [one.members for one in await wires.learner.receive() if isinstance(one, WeightGroup)]
        assert groups[-2] == ["generator-0", "generator-1"]
        alive.cancel()
        await wires.close()

    virtual(main())
