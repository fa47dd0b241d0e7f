"""Two host buffers on the learner's side: one may be travelling while the other is filled with the next weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from async_rl.wire.messages import WeightsId


@dataclass(frozen=True, slots=True)
class Staged:
    """A complete snapshot in one of the buffers."""

    weights: WeightsId
    payload: Tensor
    """[nbytes] uint8 on the CPU"""
    slot: int


class Staging:
    """Newest wins: a snapshot that has not started to travel is overwritten by the next one.

    One thread fills, one other takes and releases; both hold `condition` only for moments, never during a copy.
    """

    def __init__(self, nbytes: int, condition: threading.Condition, *, pinned: bool = False) -> None:
        self._condition = condition
        self._buffers = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._newest: Staged | None = None
        self._pending = False
        self._travelling: int | None = None
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
        """`write(buffer)` puts the snapshot into a free buffer; then it is the newest, and waiters are notified."""
        with self._condition:
            slot = self._free_slot()
            if self._newest is not None and self._newest.slot == slot:  # withdrawn while it is overwritten
                self._newest = None
            self.coalesced += self._pending
            self._pending = False
        write(self._buffers[slot])
        with self._condition:
            self._newest = Staged(weights, self._buffers[slot], slot)
            self._pending = True
            self._condition.notify_all()

    def take(self) -> Staged:
        """The newest snapshot, which nobody overwrites until `release`. Call under the condition, when `pending`."""
        assert self._pending and self._newest is not None
        self._pending, self._travelling = False, self._newest.slot
        return self._newest

    def release(self) -> None:
        """The snapshot taken last has arrived, or never will."""
        with self._condition:
            self._travelling = None

    def again(self) -> None:
        """The newest snapshot has to travel once more: members have come who lack it. Call under the condition."""
        self._pending = self._newest is not None

    def _free_slot(self) -> int:
        """Not the one that travels; else the one that only waits, so that newest wins; else the one never filled."""
        if self._travelling is not None:
            return 1 - self._travelling
        if self._newest is None:
            return 0
        return self._newest.slot if self._pending else 1 - self._newest.slot
