"""Calls of one episode that overlap: sub-agents. They share the rollout's reward, its segments and its lease."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from rollout_cases import Hosted, fake, hosted, lease, weights

from async_rl.environments.api import Policy
from async_rl.wire.messages import GroupLease, RolloutResult, Task

Run = Callable[[Any], Any]


async def parallel(task: Task, policy: Policy) -> float:
    """Three conversations of two turns at once, one of them asked twice in the same words; then a summary."""

    async def agent(name: int) -> int:
        first = await policy.complete([1, name])
        second = await policy.complete([1, name, *first.tokens, 2])
        return len(second.tokens)

    lengths = await asyncio.gather(agent(1), agent(2), agent(2))
    await policy.complete([3, *lengths])
    return 1.0


def contents(result: RolloutResult) -> list[tuple[bytes, bytes]]:
    return sorted((sequence.tokens, sequence.logprobs) for sequence in result.sequences)


async def to_the_end(running: Hosted, one: GroupLease, after_s: float | None = None) -> tuple[RolloutResult, int]:
    """Lease after lease; the first two are wanted back after a while."""
    segments = list(one.segments)
    leases = 0
    while True:
        if after_s is not None and leases < 2:
            asyncio.get_running_loop().call_later(after_s, running.host.hand_back, one.group_id, [0])
        await running.run(msgspec.structs.replace(one, segments=segments))
        assert not running.failures
        leases += 1
        segments += running.segments
        if running.results:
            return running.results[0], leases
        assert running.segments[-1].yielded


def test_each_conversation_is_one_sequence_with_random_numbers_of_its_own(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(parallel) as running:
            await running.run(lease())
            (result,) = running.results
            sequences = [np.frombuffer(one.tokens, np.int32) for one in result.sequences]
            assert sorted(tuple(one[:2]) for one in sequences)[:3] == [(1, 1), (1, 2), (1, 2)]
            assert len(sequences) == 4
            sampled = {one[2:6].tobytes() for one in sequences if one[0] == 1}
            assert len(sampled) == 3, "who asks the same at the same time gets an answer of his own"

    virtual(main())


def test_interrupted_after_any_segment_it_ends_the_same(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(parallel) as running:
            asked = lease(segment_tokens=16)
            await running.run(asked)
            (whole,), segments = running.results, running.segments
            assert len({segment.call for segment in segments}) > 4
            for cut in range(len(segments) + 1):
                result, _ = await to_the_end(running, msgspec.structs.replace(asked, segments=segments[:cut]))
                assert contents(result) == contents(whole)

    virtual(main())


@pytest.mark.parametrize("segment_tokens", [0, 16])
def test_a_lease_that_ends_in_the_middle_of_several_calls_loses_nothing(virtual: Run, segment_tokens: int) -> None:
    async def main() -> None:
        async with hosted(parallel) as running:
            await running.run(lease())
            (whole,) = running.results
            result, leases = await to_the_end(running, lease(segment_tokens=segment_tokens, lease_tokens=20))
            assert contents(result) == contents(whole) and leases > 2
            interrupted = 0
            for after_s in [0.012 + 0.0373 * i for i in range(20)]:
                result, leases = await to_the_end(running, lease(segment_tokens=segment_tokens), after_s)
                assert contents(result) == contents(whole)
                interrupted += leases > 1
            assert interrupted > 10

    virtual(main())


def test_whoever_yields_waits_for_the_others_and_ends_the_lease_once(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(parallel, fake(median_tokens=60, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            asyncio.get_running_loop().call_later(0.105, running.host.hand_back, 7, [0])
            await running.run(lease())
            assert [segment.yielded for segment in running.segments] == [False, False, True]
            assert [len(segment.tokens) // 4 for segment in running.segments] == [11, 11, 11]

    virtual(main())


def test_positions_count_all_calls(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(parallel, fake(median_tokens=60, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            running.host.start([lease()])
            await asyncio.sleep(0.105)
            swap = await running.engine.load_weights(weights(1))
            assert running.host.positions(swap) == [(7, 0, 3 * 11)]
            await running.until(lambda: running.ended == 1)

    virtual(main())


def test_of_two_that_go_on_from_the_same_turn_one_continues_its_sequence(virtual: Run) -> None:
    async def fork(task: Task, policy: Policy) -> float:
        first = await policy.complete([1])
        both = [policy.complete([1, *first.tokens, branch]) for branch in (2, 3)]
        await asyncio.gather(*both)
        return 1.0

    async def main() -> None:
        async with hosted(fork) as running:
            await running.run(lease())
            (result,) = running.results
            assert sorted(len(one.spans) for one in result.sequences) == [1, 2]

    virtual(main())
