"""The step-time model and the lengths of the fake engine, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from engine_cases import request

from async_rl.engines.fake import FakeEngine
from async_rl.engines.protocol import Chunk, Snapshot
from async_rl.engines.sampling import rollout_key
from async_rl.wire.messages import VersionSpan, WeightsId

Virtual = Callable[[Any], Any]


def started(**options: Any) -> tuple[FakeEngine, list[tuple[float, Chunk]]]:
    loop = asyncio.get_running_loop()
    chunks: list[tuple[float, Chunk]] = []
    engine = FakeEngine(**{"slots": 4, "sigma": 0.0, "seconds_per_step": 0.5, **options})
    engine.start(lambda delivered: chunks.extend((loop.time(), chunk) for chunk in delivered))
    return engine, chunks


def weights(version: int) -> Snapshot:
    return Snapshot(WeightsId(0, version), {})


def test_time_is_steps_times_their_length(virtual: Virtual) -> None:
    async def main() -> None:
        engine, chunks = started(slots=2, median_tokens=10, seconds_per_sequence=0.25)
        await engine.load_weights(weights(0))
        engine.submit([request(0, (1,), 4), request(1, (1,), 10), request(2, (1,), 3)])
        await asyncio.sleep(100)
        ends = {chunk.request_id: when for when, chunk in chunks}
        assert ends == {0: 4 * 1.0, 2: 7 * 1.0, 1: 7 * 1.0 + 3 * 0.75}
        assert {chunk.request_id: chunk.finish_reason for _, chunk in chunks} == {0: "length", 1: "eos", 2: "length"}
        activity = engine.activity()
        assert activity["engine_step"] == pytest.approx(9.25)
        assert sum(activity.values()) == pytest.approx(100)
        await engine.stop()

    virtual(main())


def test_what_is_asked_in_mid_step_happens_at_its_end(virtual: Virtual) -> None:
    async def main() -> None:
        engine, chunks = started(median_tokens=6, swap_seconds=1.0)
        await engine.load_weights(weights(0))
        started_at = asyncio.get_running_loop().time()
        engine.submit([request(0, (1,), 100)])
        await asyncio.sleep(0.7)  # in the second step
        swap = await engine.load_weights(weights(1))
        assert (swap.stall_s, swap.sampled, swap.delivered) == (1.0, {0: 2}, 0)
        assert asyncio.get_running_loop().time() == pytest.approx(started_at + 2.0)
        engine.submit([request(1, (1,), 100)])
        await asyncio.sleep(100)
        assert chunks[0][1].spans == [VersionSpan(0, 2, 0, 0), VersionSpan(2, 6, 1, 0)]
        assert chunks[0][0] == pytest.approx(started_at + 4.0)
        assert chunks[1][1].spans == [VersionSpan(0, 6, 1, 1)]
        assert engine.activity()["swap"] == pytest.approx(2.0)
        await engine.stop()

    virtual(main())


def test_a_pause_holds_time_back(virtual: Virtual) -> None:
    async def main() -> None:
        engine, chunks = started(median_tokens=6)
        await engine.load_weights(weights(0))
        engine.submit([request(0, (1,), 100)])
        await asyncio.sleep(1.2)
        engine.pause()
        await asyncio.sleep(10)
        assert not chunks
        engine.resume()
        await asyncio.sleep(10)
        assert chunks[0][0] == pytest.approx(11.2 + 1.5)
        assert engine.activity()["paused"] == pytest.approx(9.7)
        await engine.stop()

    virtual(main())


def test_the_last_step_ends_while_no_timer_fires(virtual: Virtual) -> None:
    async def main() -> None:
        engine, _ = started(median_tokens=100)
        await engine.load_weights(weights(0))
        engine.submit([request(0, (1,), 100)])
        for at, stepped_at in [(0.3, float("-inf")), (0.7, 0.5), (10.2, 10.0), (49.9, 49.5), (100.0, 50.0)]:
            await asyncio.sleep(at - asyncio.get_running_loop().time())
            assert engine.stepped_at == stepped_at
        await engine.stop()

    virtual(main())


def test_lengths_are_lognormal_clipped_and_seeded(virtual: Virtual) -> None:
    async def main() -> None:
        lengths: list[list[int]] = []
        for _ in range(2):
            engine, chunks = started(slots=64, median_tokens=100, sigma=0.7)
            await engine.load_weights(weights(0))
            engine.submit([request(i, (1,), 400) for i in range(2000)])
            await asyncio.sleep(1e6)
            by_id = sorted((chunk.request_id, len(chunk.tokens)) for _, chunk in chunks)
            lengths.append([length for _, length in by_id])
            await engine.stop()
        assert lengths[0] == lengths[1]
        assert median(lengths[0]) == pytest.approx(100, rel=0.08)
        assert max(lengths[0]) == 400
        assert sum(length > 200 for length in lengths[0]) / 2000 == pytest.approx(0.161, abs=0.03)

    virtual(main())


def test_a_resumed_rollout_ends_where_it_would_have(virtual: Virtual) -> None:
    async def main() -> None:
        engine, chunks = started(median_tokens=50, sigma=0.5)
        await engine.load_weights(weights(0))
        key = rollout_key(2, 2)
        engine.submit([request(0, (1,), 500, key=key, stop=frozenset({9}))])
        await asyncio.sleep(1000)
        whole = chunks[0][1].tokens.tolist()
        engine.submit([request(1, (1, *whole[:20]), 500, key=key, position=20, stop=frozenset({9}))])
        await asyncio.sleep(1000)
        assert whole[:20] + chunks[1][1].tokens.tolist() == whole
        assert whole[-1] == 9
        await engine.stop()

    virtual(main())
