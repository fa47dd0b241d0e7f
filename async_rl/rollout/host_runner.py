"""Where the episode host runs: beside the caller, or on a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

from async_rl.rollout.host import EpisodeHost

MAX_THREADS = 512
"""Of `asyncio.to_thread` in environments: an agent that waits there for its replies waits for most of its episode. They
start when they are needed."""


async def inline(host: EpisodeHost) -> None:
    """On the caller's loop: for virtual time and tests."""
    await host.run()


async def on_thread(host: EpisodeHost) -> None:
    """On a thread: user code that blocks stops other episodes at most. Raises what the host raises."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if ended.done():
            return  # nobody waits any more
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def main() -> None:
        error: BaseException | None = None
        try:
            asyncio.run(_with_threads(host))
        except BaseException as caught:  # raised again where the caller awaits
            error = caught
        with contextlib.suppress(RuntimeError):  # the caller gave up on a blocked host, and its loop is closed
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=main, name="environment", daemon=True).start()
    await ended


async def _with_threads(host: EpisodeHost) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MAX_THREADS, "environment"))
    await host.run()
