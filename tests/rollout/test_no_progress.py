"""An episode is failed when nothing happens, and never for its age."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from rollout_cases import fake, hosted, lease, one_turn, weights

from async_rl.environments.api import Policy
from async_rl.wire.messages import Task

Run = Callable[[Any], Any]
NEVER = 1e9


def test_a_long_rollout_that_is_sampled_is_not_ended(virtual: Run) -> None:
    async def main() -> None:
        engine = fake(median_tokens=5000, sigma=0.0, seconds_per_step=0.5)
        async with hosted(one_turn, engine, timeout_s=10) as running:
            await engine.load_weights(weights(0))
            await running.run(lease(max_new_tokens=5000))
            assert running.results and asyncio.get_running_loop().time() == 2500

    virtual(main())


def test_waiting_for_a_slot_of_an_engine_that_samples_is_progress(virtual: Run) -> None:
    async def main() -> None:
        engine = fake(slots=1, median_tokens=100, sigma=0.0, seconds_per_step=0.5)
        async with hosted(one_turn, engine, timeout_s=10) as running:
            await engine.load_weights(weights(0))
            await running.run(lease(members=[0, 1, 2]))
            assert len(running.results) == 3

    virtual(main())


def test_an_engine_that_samples_nothing_for_so_long(virtual: Run) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        engine = fake(slots=1, median_tokens=100, sigma=0.0, seconds_per_step=0.5)
        async with hosted(one_turn, engine, timeout_s=10) as running:
            await engine.load_weights(weights(0))
            running.host.start([lease(members=[0, 1])])
            await asyncio.sleep(30.2)
            engine.pause()
            await running.until(lambda: running.ended == 2)
            assert loop.time() == 30.5 + 10  # the step in progress was the last
            reason = "no progress for environment.timeout_s = 10 s (stage: in the engine)"
            assert running.failures == [reason] * 2
            engine.resume()
            await asyncio.sleep(1)
            assert engine.activity()["idle"] > 0.9  # their requests are gone

    virtual(main())


def test_an_environment_that_does_nothing_for_so_long(virtual: Run) -> None:
    async def slow(task: Task, policy: Policy) -> float:
        for pause in (9, 9, 9, NEVER):
            await policy.complete([1])
            await asyncio.sleep(pause)
        return 1.0

    async def main() -> None:
        async with hosted(slow, fake(median_tokens=100, sigma=0.0), timeout_s=10) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease())
            assert running.failures == ["no progress for environment.timeout_s = 10 s (stage: in the environment)"]
            assert asyncio.get_running_loop().time() == 4 * 1.0 + 3 * 9 + 10

    virtual(main())


def test_a_time_out_of_the_environments_own_is_its_error(virtual: Run) -> None:
    async def impatient(task: Task, policy: Policy) -> float:
        async with asyncio.timeout(1):
            await asyncio.sleep(NEVER)
        return 1.0

    async def main() -> None:
        async with hosted(impatient, timeout_s=10) as running:
            await running.run(lease())
            assert running.failures == ["TimeoutError: "]

    virtual(main())


def test_what_ended_leaves_no_timer(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn, timeout_s=1000) as running:
            await running.run(lease(members=list(range(20))))
        assert asyncio.get_running_loop().time() < 10

    virtual(main())
