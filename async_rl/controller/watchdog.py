"""Speaks up when no rollout ends: which are pending, in which stage, and who has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watchdog:
    """Quiet while `progress` is called at least every `after_s` seconds.

    Args:
        pending: what has not ended, a phrase each; empty while nothing has to end.
        say: gets one line.
    """

    def __init__(self, after_s: float, pending: Callable[[], list[str]], say: Callable[[str], None]) -> None:
        self._after_s, self._pending, self._say = after_s, pending, say
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._last = self._loop.time()
        self._arm()

    def progress(self) -> None:
        """A rollout ended."""
        self._last = self._loop.time()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self._timer = self._loop.call_at(self._last + self._after_s, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if now >= self._last + self._after_s:  # as `_arm` adds it: a difference could be rounded to less, for ever
            pending = self._pending()
            if pending:
                self._say(f"no rollout ended for {now - self._last:.0f} s; pending: {'; '.join(pending)}")
            self._last = now
        self._arm()
