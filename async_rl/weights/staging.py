"""Where the learner's next snapshot goes, and which one travels next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from async_rl.weights.files import Draft
from async_rl.wire.messages import WeightsId


@dataclass(frozen=True, slots=True)
class Staged:
    """A complete snapshot."""

    weights: WeightsId
    draft: Draft


class Staging:
    """Newest wins: a snapshot that has not started to travel is overwritten by the next one.

    One thread fills, one other takes; both hold `condition` only for moments, never during a copy.

    draft: makes one more file to fill, while others travel, are kept or read. Raises WeightsError: there is no room.
    """

    def __init__(self, draft: Callable[[], Draft], condition: threading.Condition) -> None:
        self._draft, self._condition = draft, condition
        self._newest: Staged | None = None
        self._pending = False
        self.coalesced = 0
        """Snapshots that were overwritten before they travelled."""

    @property
    def pending(self) -> bool:
        """Whether the newest snapshot has still to travel. Read under the condition."""
        return self._pending

    @property
    def newest(self) -> WeightsId | None:
        """Which snapshot is the newest, if any. Read under the condition."""
        return None if self._newest is None else self._newest.weights

    def fill(self, weights: WeightsId, write: Callable[[Tensor], None]) -> None:
        """`write(payload)` fills a file; then it is the newest snapshot, and waiters are notified.

        Raises:
            WeightsError: there is no room for it.
        """
        draft = self._withdraw() or self._draft()
        write(draft.payload)
        with self._condition:
            self._newest = Staged(weights, draft)
            self._pending = True
            self._condition.notify_all()

    def take(self) -> Staged:
        """The newest snapshot, which nobody overwrites any more. Call under the condition, when `pending`."""
        assert self._pending and self._newest is not None
        self._pending = False
        return self._newest

    def again(self) -> None:
        """The newest snapshot has to travel once more: members have come who lack it. Call under the condition."""
        self._pending = self._newest is not None

    def _withdraw(self) -> Draft | None:
        """The file of a snapshot that nobody has seen: so many steps, and nobody had time for it."""
        with self._condition:
            unseen = self._newest if self._pending else None
            self.coalesced += self._pending
            self._pending = False
            if unseen is None or unseen.draft.written:
                return None
            self._newest = None
            return unseen.draft
