"""Pure: who worked and who waited for what, between the first ready batch and the end of the last step."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from async_rl.telemetry.activity import shares
from async_rl.wire.messages import Activity

BUSY = {"generator": "engine_step", "learner": "train_step"}
"""The section in which a role does what it is for; every other cause is idle time."""
RATE_WINDOW_S = 10.0
"""Tokens per second are over the last readings that span so much."""


class Usage:
    """Readings of every process at the start of the window and now. Roles with several processes are averaged."""

    def __init__(self) -> None:
        self._first: dict[str, Activity] = {}
        self._last: dict[str, Activity] = {}
        self.started: float | None = None
        """Loop time of the first ready batch."""
        self._ended: float | None = None
        self._recent: dict[str, deque[Activity]] = {}

    def start(self, now: float) -> None:
        """The window opens: the next reading of each process is its baseline."""
        self._first, self._last, self.started = {}, {}, now

    def finish(self, now: float) -> None:
        """The window closes: the next reading of each process is its last."""
        self._ended = now

    def read(self, name: str, activity: Activity) -> None:
        """name: `generator-0`, `learner`, `controller`. A restarted process begins again from its own zero."""
        recent = self._recent.setdefault(name, deque())
        if recent and activity.tokens < recent[-1].tokens:
            recent.clear()
        recent.append(activity)
        while len(recent) > 2 and activity.at - recent[1].at >= RATE_WINDOW_S:
            recent.popleft()
        if self.started is None or activity.at < self.started:
            return
        last = self._last.get(name)
        if self._ended is not None and last is not None and last.at >= self._ended:
            return
        first = self._first.get(name)
        if first is None or activity.cpu_s < first.cpu_s:
            self._first[name] = activity
        self._last[name] = activity

    def roles(self) -> dict[str, dict[str, float]]:
        """role -> cause -> share of its time; the shares of a role sum to 1."""
        gathered: dict[str, list[dict[str, float]]] = {}
        for name, first in self._first.items():
            found = shares(first, self._last[name])
            if found:
                gathered.setdefault(name.split("-")[0], []).append(found)
        return {
            role: {
                cause: sum(one.get(cause, 0.0) for one in each) / len(each)
                for cause in sorted({cause for one in each for cause in one})
            }
            for role, each in gathered.items()
        }

    def tokens_per_s(self) -> dict[str, float]:
        """role -> tokens sampled or trained on per second of late, all its processes together"""
        rates: dict[str, float] = {}
        for name, recent in self._recent.items():
            role = name.split("-")[0]
            if role in BUSY and recent[-1].at > recent[0].at:
                rate = (recent[-1].tokens - recent[0].tokens) / (recent[-1].at - recent[0].at)
                rates[role] = rates.get(role, 0.0) + rate
        return rates

    def busy(self) -> dict[str, float]:
        return {role: causes.get(BUSY[role], 0.0) for role, causes in self.roles().items() if role in BUSY}

    def idle(self) -> dict[str, dict[str, float]]:
        return {
            role: {cause: share for cause, share in causes.items() if cause != BUSY[role] and share > 0}
            for role, causes in self.roles().items()
            if role in BUSY
        }

    def cpu_s(self) -> Mapping[str, float]:
        """process -> CPU seconds within the window"""
        return {name: self._last[name].cpu_s - first.cpu_s for name, first in self._first.items()}
