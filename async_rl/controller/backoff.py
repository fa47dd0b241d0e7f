"""Retries that leave the other side time: the pause doubles with every failure, up to a minute, until it works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

FIRST_S = 0.1
LONGEST_S = 60.0


class Backoff:
    """One pause per name of what is tried. Time is the loop's."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._failures: dict[str, int] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def failed(self, name: str, again: Callable[[], None]) -> float | None:
        """It failed: `again` is called after the pause, whose seconds are returned; None: a retry is due already."""
        if name in self._timers:
            return None
        failures = self._failures[name] = self._failures.get(name, 0) + 1
        pause_s = min(LONGEST_S, FIRST_S * 2 ** (failures - 1))
        self._timers[name] = self._loop.call_later(pause_s, self._retry, name, again)
        return pause_s

    def worked(self, name: str) -> None:
        """The next failure is a first one. A retry that is due is made all the same."""
        self._failures.pop(name, None)

    def close(self) -> None:
        """Nothing is tried any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _retry(self, name: str, again: Callable[[], None]) -> None:
        del self._timers[name]
        again()
