"""Pure: an asyncio event loop whose clock jumps to the next timer instead of waiting for it.

    result = run_virtual(main())          # hours of virtual time in milliseconds, the same every time

The control plane knows time only through `loop.time()`, `call_later` and `asyncio.timeout`, so it runs here unchanged.
Sockets and threads do not belong here: a loop that would wait for them for ever raises Deadlock instead.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Every task waits and no timer is set, or time stands still: in real time this would hang for ever."""


LOOKS_APART = 64
"""Turns of the loop between two looks at the one socket there is, by which the loop wakes itself: a look is a system
call, and what woke the loop is on its list already."""
MOST_TURNS = 1 << 20
"""At one moment. A timer that is set again for the moment at which it fired never ends."""


class _JumpingSelector(selectors.SelectSelector):
    """Instead of sleeping until the next timer, moves the clock there."""

    now = 0.0
    _turns = 0
    _since = 0
    """The turn in which the clock last moved."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turns += 1
        if timeout is None or self._turns % LOOKS_APART == 0:
            ready = super().select(0)
            if ready:
                return ready
            if timeout is None:
                raise Deadlock("every task waits and no timer is set")
        if timeout > 0:
            self.now += timeout
            self._since = self._turns
        elif self._turns - self._since > MOST_TURNS:
            raise Deadlock(f"time stands still at {self.now} s: {MOST_TURNS} turns of the loop brought it no further")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at time 0."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time. Raises Deadlock where nothing can ever happen again."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
