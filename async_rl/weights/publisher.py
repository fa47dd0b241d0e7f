"""The learner's end of the weights: training hands over a snapshot and goes on; a thread sends it.

    publisher = make_publisher(run, run_directory, learner.layout, announce, failed)
    hello = Hello(..., weights_store=publisher.store)
    publisher.publish(learner.weights, learner.snapshot)     # after a step; returns when the copy is made
    publisher.regroup(message)                               # a WeightGroup message; returns at once
    publisher.close()

`announce(WeightsAnnounce)` and `failed(WeightsFailed)` are called in other threads than the event loop's: an asyncio
service passes `lambda message: loop.call_soon_threadsafe(outbox.put_nowait, message)`.

The copy is the only one on this side: it is made where the transports read it (files.py).

Which transports a snapshot takes is distribution.py's; each is announced on its own. A file is announced when it is
complete, a broadcast before it begins, for its members have to join it. After `failed`, which names the members that
are missing where it can, there is no group until the next WeightGroup: the controller answers with one, of the members
that are alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from async_rl.config import Run
from async_rl.models.parameters import Layout
from async_rl.weights.distribution import make_distribution
from async_rl.weights.errors import GroupIncomplete, GroupSuperseded, WeightsError
from async_rl.weights.files import Draft
from async_rl.weights.staging import Staging
from async_rl.wire.messages import WeightGroup, WeightsAnnounce, WeightsFailed, WeightsId

CLOSE_TIMEOUT_S = 2.0
"""How long `close` lets a transfer in progress come to its end."""
LAST_EPOCH = 1 << 62
"""Above every epoch of a weight group: nothing is formed any more."""


class Sender(Protocol):
    """Where snapshots go. `send` and `form` run in the publisher's thread and may block; others call the rest."""

    @property
    def store(self) -> str: ...

    def form(self, group: WeightGroup) -> bool:
        """Members have changed. Returns whether the newest weights have to be sent again. Raises WeightsError."""
        ...

    def draft(self) -> Draft:
        """Where the next snapshot goes. Raises WeightsError: there is no room."""
        ...

    def send(self, weights: WeightsId, draft: Draft, announce: Callable[[WeightsAnnounce], None]) -> None:
        """Raises WeightsError where it did not succeed."""
        ...

    def interrupt(self, epoch: int) -> None: ...

    def close(self) -> None: ...


class Publisher:
    """A thread, a transport and the newest snapshot."""

    def __init__(
        self, sender: Sender, announce: Callable[[WeightsAnnounce], None], failed: Callable[[WeightsFailed], None]
    ) -> None:
        self._sender, self._announce, self._failed = sender, announce, failed
        self._condition = threading.Condition()
        self._staging = Staging(sender.draft, self._condition)
        self._group: WeightGroup | None = None
        self._closing = False
        self._sent, self._failures, self._send_s = 0, 0, 0.0
        self._thread = threading.Thread(target=self._run, name="weights-publisher", daemon=True)
        self._thread.start()

    @property
    def store(self) -> str:
        """host:port of the rendezvous store, "" where the transport needs none: for Hello.weights_store."""
        return self._sender.store

    def publish(self, weights: WeightsId, write: Callable[[Tensor], None]) -> None:
        """Copy a snapshot with `write(buffer)` ([layout.nbytes] uint8), to travel instead of one that still waits.

        For one thread at a time. Returns as soon as the copy is made, whatever is on its way; where there is no room
        for it, `failed` hears of it and the next one is tried.
        """
        try:
            self._staging.fill(weights, write)
        except WeightsError as error:
            self._report(weights, error)

    def regroup(self, group: WeightGroup) -> None:
        """Form this group as soon as possible; one being formed, and a broadcast in progress, are given up."""
        with self._condition:
            self._group = group
            self._condition.notify_all()
        self._sender.interrupt(group.epoch)

    def statistics(self) -> dict[str, float]:
        """Snapshots sent, failed and overwritten before they left; seconds the last one took."""
        with self._condition:
            return {
                "sent": self._sent,
                "failed": self._failures,
                "coalesced": self._staging.coalesced,
                "send_s": self._send_s,
            }

    def close(self) -> None:
        """Stop. A transfer in progress gets a moment to end; what the transport left lying about is removed."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)
        self._sender.interrupt(LAST_EPOCH)
        self._sender.close()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(self._has_work)
                if self._closing:
                    return
                group, self._group = self._group, None
                staged = None if group is not None else self._staging.take()
            if group is not None:
                self._form(group)
            elif staged is not None:
                self._send(staged.weights, staged.draft)

    def _has_work(self) -> bool:
        return self._closing or self._group is not None or self._staging.pending

    def _form(self, group: WeightGroup) -> None:
        try:
            again = self._sender.form(group)
        except GroupSuperseded:
            return  # the group that supersedes it is already here
        except WeightsError as error:
            with self._condition:
                newest = self._staging.newest
            self._report(newest or WeightsId(0, 0), error)
            return
        if again:
            with self._condition:
                self._staging.again()

    def _send(self, weights: WeightsId, draft: Draft) -> None:
        started = time.monotonic()
        try:
            self._sender.send(weights, draft, self._announce)
        except GroupSuperseded:
            return  # it travels again as soon as the new group stands
        except WeightsError as error:
            self._report(weights, error)
            return
        with self._condition:
            self._sent += 1
            self._send_s = time.monotonic() - started

    def _report(self, weights: WeightsId, error: WeightsError) -> None:
        with self._condition:
            self._failures += 1
        missing = error.missing if isinstance(error, GroupIncomplete) else []
        self._failed(WeightsFailed(weights, str(error), missing))


def make_publisher(
    run: Run,
    run_directory: Path,
    layout: Layout,
    announce: Callable[[WeightsAnnounce], None],
    failed: Callable[[WeightsFailed], None],
    *,
    pinned: bool = False,
) -> Publisher:
    """The transport of the recipe. `pinned`: snapshots go into page-locked memory, for a learner on a GPU."""
    return Publisher(make_distribution(run, run_directory, layout, pinned=pinned), announce, failed)
