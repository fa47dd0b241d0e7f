"""Where the rollouts stood when weights went live: exactly, however late the host is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from rollout_cases import Episode, conversation, fake, hosted, lease, one_turn, weights

from async_rl.engines.protocol import Swap
from async_rl.wire.messages import Finished, RolloutResult

Run = Callable[[Any], Any]


def sampled_before(version: int, result: RolloutResult) -> int:
    spans = [span for sequence in result.sequences for span in sequence.spans]
    return sum(span.end - span.start for span in spans if span.version < version)


@pytest.mark.parametrize("episode", [one_turn, conversation])
@pytest.mark.parametrize("median_tokens", [4, 60])
@pytest.mark.parametrize("segment_tokens", [0, 5])
@pytest.mark.parametrize("late_s", [0.0, 0.08])
def test_positions_are_those_of_the_swap(
    virtual: Run, episode: Episode, median_tokens: int, segment_tokens: int, late_s: float
) -> None:
    """Between the swap and the question requests end, and with few tokens a call whole calls come and go."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        engine = fake(slots=8, median_tokens=median_tokens)
        async with hosted(episode, engine) as running:
            await engine.load_weights(weights(0))
            train = lease(7, list(range(24)), segment_tokens=segment_tokens)
            running.host.start([train, lease(8, [0, 1], purpose="eval")])
            told: dict[int, dict[int, int]] = {}
            still_running: dict[int, set[int]] = {}

            def ask(version: int, swap: Swap) -> None:
                positions = running.host.positions(swap)
                assert all(group_id == 7 for group_id, _, _ in positions)
                told[version] = {member: sampled for _, member, sampled in positions}
                still_running[version] = set(train.members) - {result.member for result in running.results}

            version = 0
            while running.ended < 26:
                await asyncio.sleep(0.0333)
                version += 1
                loop.call_later(late_s, ask, version, await engine.load_weights(weights(version)))
            await asyncio.sleep(1)
            ends = [m for m in running.reported if isinstance(m, Finished) and m.purpose == "train"]
            results = {result.member: result for message in ends for result in message.members}
            for version, positions in told.items():
                expected = {member: sampled_before(version, results[member]) for member in still_running[version]}
                assert positions == {member: sampled for member, sampled in expected.items() if sampled}
            assert any(told.values())

    virtual(main())


def test_earlier_leases_count(virtual: Run) -> None:
    async def main() -> None:
        async with hosted(one_turn, fake(slots=1, median_tokens=60, sigma=0.0)) as running:
            await running.engine.load_weights(weights(0))
            await running.run(lease(lease_tokens=25))
            resumed = lease(lease_tokens=25, segments=running.segments)
            running.host.start([lease(9), resumed])  # group 9 takes the slot
            await asyncio.sleep(0.095)
            assert running.host.positions(await running.engine.load_weights(weights(1))) == [(9, 0, 10), (7, 0, 25)]
            await running.until(lambda: running.ended == 2)

    virtual(main())
