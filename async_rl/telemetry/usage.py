"""Pure: who worked and who waited for what, between the first ready batch and the end of the last step."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from async_rl.telemetry.activity import shares
from async_rl.wire.messages import Activity

BUSY = {"generator": "engine_step", "learner": "train_step"}
"""The section in which a role does what it is for; every other cause is idle time."""
RATE_WINDOW_S = 10.0
"""Tokens per second are over the last readings that span so much."""


class UsageReading(NamedTuple):
    """Of one moment; nobody changes it any more."""

    shares: dict[str, dict[str, float]]
    """role -> cause -> share of its time within the window; those of a role sum to 1"""
    rates: dict[str, float]
    """role -> tokens per second of late"""
    rate_of: dict[str, float]
    """generator -> the same of it alone"""
    spent: dict[str, dict[str, float]]
    """role -> cause -> seconds since the controller started"""
    cpu_s: dict[str, float]
    tokens: dict[str, int]


class Usage:
    """Readings of every process at the start of the window and now. Roles with several processes are averaged."""

    def __init__(self) -> None:
        self._first: dict[str, Activity] = {}
        self._last: dict[str, Activity] = {}
        self.started: float | None = None
        """Loop time of the first ready batch."""
        self._ended: float | None = None
        self._recent: dict[str, deque[Activity]] = {}
        self.spent: dict[str, dict[str, float]] = {}
        """role -> cause -> seconds since the first reading of each of its processes, restarted ones included"""
        self.spent_cpu_s: dict[str, float] = {}
        self.num_tokens: dict[str, int] = {}
        """role -> tokens sampled or trained on since then"""

    def start(self, now: float) -> None:
        """The window opens: the next reading of each process is its baseline."""
        self._first, self._last, self.started = {}, {}, now

    def finish(self, now: float) -> None:
        """The window closes: the next reading of each process is its last."""
        self._ended = now

    def read(self, name: str, activity: Activity) -> None:
        """name: `generator-0`, `learner`, `controller`. A restarted process begins again from its own zero."""
        recent = self._recent.setdefault(name, deque())
        if recent:
            restarted = activity.cpu_s < recent[-1].cpu_s
            self._add(name.split("-")[0], Activity(0.0, {}, 0.0) if restarted else recent[-1], activity)
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

    def reading(self) -> UsageReading:
        spent = {role: dict(causes) for role, causes in self.spent.items()}
        rate_of = {name: rate for name in self._recent if (rate := self.rate(name)) is not None}
        tokens, cpu_s = dict(self.num_tokens), dict(self.spent_cpu_s)
        return UsageReading(self.roles(), self.tokens_per_s(), rate_of, spent, cpu_s, tokens)

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
        for name in self._recent:
            role, rate = name.split("-")[0], self.rate(name)
            if role in BUSY and rate is not None:
                rates[role] = rates.get(role, 0.0) + rate
        return rates

    def rate(self, name: str) -> float | None:
        """Tokens of one process per second of late; None: not known yet."""
        recent = self._recent.get(name)
        if not recent or recent[-1].at <= recent[0].at:
            return None
        return (recent[-1].tokens - recent[0].tokens) / (recent[-1].at - recent[0].at)

    def _add(self, role: str, old: Activity, new: Activity) -> None:
        causes = self.spent.setdefault(role, {})
        seconds = sum(s - old.seconds.get(cause, 0.0) for cause, s in new.seconds.items() if "/" not in cause)
        for cause, share in shares(old, new).items():
            causes[cause] = causes.get(cause, 0.0) + max(0.0, share * seconds)  # -1e-16: rounding
        self.spent_cpu_s[role] = self.spent_cpu_s.get(role, 0.0) + new.cpu_s - old.cpu_s
        self.num_tokens[role] = self.num_tokens.get(role, 0) + new.tokens - old.tokens

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
