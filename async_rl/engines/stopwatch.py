"""Exclusive wall seconds by cause: at every moment exactly one cause is on the clock, so they sum to the age."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Stopwatch:
    """Switched by one thread, read by any."""

    def __init__(self, causes: tuple[str, ...], now: Callable[[], float]) -> None:
        """Starts with the first cause on the clock."""
        self._seconds = dict.fromkeys(causes, 0.0)
        self._now = now
        self._lock = threading.Lock()
        self._cause: str | None = causes[0]
        self._since = now()

    def switch(self, cause: str | None) -> None:
        """Charge the time since the last switch, then run for `cause`; None stops the clock."""
        with self._lock:
            self._charge()
            self._cause = cause

    def read(self) -> dict[str, float]:
        """Seconds by cause up to this moment."""
        with self._lock:
            self._charge()
            return dict(self._seconds)

    def _charge(self) -> None:
        now = self._now()
        if self._cause is not None:
            self._seconds[self._cause] += now - self._since
        self._since = now
