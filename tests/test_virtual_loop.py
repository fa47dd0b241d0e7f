"""The clock jumps; order is kept; a hang is an error."""

from __future__ import annotations

import asyncio

import pytest

from async_rl.simulate import virtual_loop
from async_rl.simulate.virtual_loop import Deadlock, run_virtual


def test_hours_take_no_time_and_keep_their_order() -> None:
    seen: list[tuple[float, str]] = []

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((asyncio.get_running_loop().time(), name))

    async def main() -> None:
        await asyncio.gather(wait("late", 7200), wait("early", 3600), wait("later", 7200))

    run_virtual(main())
    assert seen == [(3600, "early"), (7200, "late"), (7200, "later")]


def test_waiting_for_nothing_is_an_error() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run_virtual(main())


def test_time_that_stands_still_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_loop, "MOST_TURNS", 1000)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            loop.call_at(loop.time(), again)

        again()
        await asyncio.sleep(1)

    with pytest.raises(Deadlock, match="stands still"):
        run_virtual(main())


def test_timeouts_work() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(500):
                await asyncio.sleep(1000)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 500
