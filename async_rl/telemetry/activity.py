"""Where a process spends its time: exclusive wall seconds by cause, which sum to its age."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable

from async_rl.wire.messages import Activity


def process_cpu_s() -> float:
    """CPU seconds of this process so far, user and system, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Tracker:
    """One current cause at any time; switching to another closes the books of the last one. Thread-safe.

    >>> now = [0.0]
    >>> tracker = Tracker("wait", clock=lambda: now[0])
    >>> now[0] = 2.0; tracker.switch("work"); now[0] = 5.0
    >>> tracker.seconds()
    {'wait': 2.0, 'work': 3.0}
    """

    def __init__(self, cause: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._cause, self._since = clock, cause, clock()
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def switch(self, cause: str) -> None:
        if cause == self._cause:
            return
        with self._lock:
            self._settle()
            self._cause = cause

    def seconds(self) -> dict[str, float]:
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def activity(self, tokens: int = 0) -> Activity:
        """The books now, with this process's CPU time."""
        return Activity(self._clock(), self.seconds(), process_cpu_s(), tokens)

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._cause] = self._seconds.get(self._cause, 0.0) + now - self._since
        self._since = now


def shares(old: Activity, new: Activity) -> dict[str, float]:
    """Share of the time between two readings of one process that each cause took; sums to 1.

    `outer/inner` is a part of `outer` that another thread measured: it is taken out of `outer`, and is no longer than
    it (the two clocks are not read at the same instant).

    >>> before = Activity(0.0, {"wait": 1.0, "away": 1.0, "away/step": 1.0}, 0.0)
    >>> shares(before, Activity(4.0, {"wait": 2.0, "away": 4.0, "away/step": 3.0}, 0.0))
    {'wait': 0.25, 'away': 0.25, 'step': 0.5}

    A generator that has had nothing to do yet has never been away:

    >>> shares(Activity(0.0, {"wait": 0.0, "away/step": 0.0}, 0.0), Activity(1.0, {"wait": 1.0, "away/step": 0.0}, 0.0))
    {'wait': 1.0, 'step': 0.0, 'away': 0.0}
    """
    spent = {cause: seconds - old.seconds.get(cause, 0.0) for cause, seconds in new.seconds.items()}
    total = sum(seconds for cause, seconds in spent.items() if "/" not in cause)
    if total <= 0:
        return {}
    for cause in [cause for cause in spent if "/" in cause]:
        outer, _, inner = cause.partition("/")
        spent[inner] = min(spent.pop(cause), spent.get(outer, 0.0))
        spent[outer] = spent.get(outer, 0.0) - spent[inner]
    return {cause: seconds / total for cause, seconds in spent.items()}
