"""When a generator's heartbeats are late, and when it is gone."""

from __future__ import annotations

import asyncio

import pytest

from async_rl.controller.generators import Generators, Peer
from async_rl.simulate.virtual_loop import run_virtual


@pytest.mark.parametrize("silent_s", [1.3, 5.0])
def test_silence_and_then_the_end_once_each(silent_s: float) -> None:
    """In floating point 7.64 + 1.3 - 7.64 is less than 1.3: the timer that fires then must not set itself again."""
    seen: list[tuple[str, float]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def note(what: str) -> None:
            seen.append((what, round(loop.time(), 6)))

        def silence(peer: Peer) -> None:
            note("late" if peer.silent else "back")

        def gone(name: str) -> None:
            note(f"{name} is gone")

        await asyncio.sleep(7.64)
        generators = Generators(
            lambda *_: None, gone, lambda lease: lease, timeout_s=5.0, silent_s=silent_s, silence=silence
        )
        peer = generators.hello("p", "generator-0")
        await asyncio.sleep(2.0)
        generators.heard(peer)
        await asyncio.sleep(60.0)

    run_virtual(main())
    first = [("late", 8.94), ("back", 9.64), ("late", 10.94)] if silent_s < 5.0 else []
    assert seen == [*first, ("generator-0 is gone", 14.64)]
