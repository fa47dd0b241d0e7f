"""What belongs to an event loop and ends with it, whoever runs the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


def until_the_loop_ends(close: Callable[[], Awaitable[object]], name: str) -> asyncio.Task[None]:
    """A task of the running loop that calls `close` when the loop's runner cancels what is left, as `asyncio.run` does.
    Keep it: loops hold tasks weakly."""

    async def keep() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await close()

    return asyncio.create_task(keep(), name=name)
