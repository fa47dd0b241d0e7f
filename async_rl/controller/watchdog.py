"""Speaks up when no rollout ends: which are pending, in which stage, and who has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from async_rl.controller.composer import Composer
from async_rl.controller.generators import Generators
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.states import State

NAMED = 8
"""The watchdog names so many pending rollouts, the oldest."""


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


def pending_rollouts(ledger: Ledger, generators: Generators, composer: Composer) -> list[str]:
    """The oldest rollouts that did not end, each with its stage and who has it."""
    lines: list[str] = []
    for group in ledger.waiting():
        for member, state in enumerate(group.states):
            if len(lines) == NAMED:
                return lines
            if state is State.RUNNING:
                peer = generators.holder(group.id, member)
                where = f"at {peer.name}" if peer is not None else "waits for a generator with credit"
                tokens = composer.tokens(group.id, member)
                lines.append(f"{group.id}/{member} {where} ({tokens} tokens at the last report)")
            elif state is State.SCORED:
                lines.append(f"{group.id}/{member} is scored and waits for its group")
            elif state is State.READY:
                lines.append(f"{group.id}/{member} is ready and waits for a step")
    return lines
