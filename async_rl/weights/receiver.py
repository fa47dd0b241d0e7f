"""The generator's end of the weights: fetches what was announced, in a thread of its own.

    receiver = make_receiver(run, name, layout)
    await receiver.regroup(message)              # a WeightGroup message
    snapshot = await receiver.fetch(announce)    # a WeightsAnnounce message; verified, ready for engine.load_weights
    receiver.close()

Fetching and forming groups happen one after the other, in the order of the calls: call them in the order the messages
came, each in a task of its own, so that the stream goes on being read. A WeightGroup interrupts what waits for members
of an older group. Both raise WeightsError where it did not work: the old weights stay live, the reason goes into
WeightsFailed. WeightsGone and GroupSuperseded are no failures: a newer announcement or group is on its way.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from async_rl.config import Run
from async_rl.engines.protocol import Snapshot
from async_rl.models.parameters import Layout
from async_rl.weights import shared_memory
from async_rl.weights.errors import WeightsError
from async_rl.weights.process_group import ProcessGroupReceiver
from async_rl.weights.publisher import LAST_EPOCH
from async_rl.wire.messages import WeightGroup, WeightsAnnounce

T = TypeVar("T")


class Receiver:
    """Takes announcements of either transport. Made inside a running event loop or not; used in one."""

    def __init__(self, layout: Layout, group: ProcessGroupReceiver | None = None) -> None:
        self._layout, self._group = layout, group
        self._worker = _Worker("weights-receiver")

    async def fetch(self, announce: WeightsAnnounce) -> Snapshot:
        """The announced weights, verified, under the id their header carries.

        shared_memory: the tensors are private to us and stay valid as long as they are referenced.
        process_group: they stay valid until the second fetch after this one.

        Raises:
            WeightsError: see errors.py; WeightsGone where newer ones are on their way.
        """
        return await self._worker.run(lambda: self._fetch(announce))

    async def regroup(self, group: WeightGroup) -> None:
        """Form this group, or leave the old one where it does not name us. Nothing to do for shared memory.

        Raises:
            WeightsError: we are in no group now.
        """
        if self._group is None:
            return
        member = self._group
        interrupt = threading.Thread(target=member.interrupt, args=(group.epoch,), daemon=True)
        interrupt.start()  # it may have to talk to a store that is gone: not in the loop's thread
        await self._worker.run(lambda: member.form(group))

    def close(self) -> None:
        """Leave the group; a fetch in progress is left to itself and ends at its deadline."""
        self._worker.close()
        if self._group is not None:
            self._group.interrupt(LAST_EPOCH)
            self._group.close()

    def _fetch(self, announce: WeightsAnnounce) -> Snapshot:
        if announce.transport == "shared_memory":
            return shared_memory.fetch(announce, self._layout)
        if self._group is None:
            raise WeightsError("weights were announced for a process group, this receiver was made for shared memory")
        return self._group.receive(announce)


def make_receiver(run: Run, member: str, layout: Layout) -> Receiver:
    """The transport of the recipe; `member` is the name in Hello."""
    if run.weights.transport == "shared_memory":
        return Receiver(layout)
    return Receiver(layout, ProcessGroupReceiver(member, layout, timeout_s=run.weights.timeout_s))


class _Worker(Generic[T]):
    """Jobs in order, in a daemon thread: unlike an executor's, it never holds up the exit of the process."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def run(self, job: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if future.done():  # cancelled meanwhile
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def work() -> None:
            if future.cancelled():
                return
            result, error = None, None
            try:
                result = job()
            except Exception as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

        self._jobs.put(work)
        return await future

    def close(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
