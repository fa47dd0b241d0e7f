"""Group commit: what rests on the ledger leaves after the commit that holds it, many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from async_rl.ledger.ledger import Ledger


class Commits:
    """`run()` in a task of its own."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: list[Callable[[], None]] = []
        self._wanted = asyncio.Event()

    def want(self) -> None:
        """What the ledger was told since the last commit is to be durable soon; nobody waits for it."""
        self._wanted.set()

    def then(self, callback: Callable[[], None]) -> None:
        """Called once everything the ledger knows by now is durable."""
        self._waiting.append(callback)
        self._wanted.set()

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            callbacks, self._waiting = self._waiting, []
            await self._ledger.committed()
            for callback in callbacks:
                callback()
