"""The generator's end of the weights: fetches what was announced, in a thread of its own.

    receiver = make_receiver(run, name, layout)
    await receiver.regroup(message)              # a WeightGroup message
    snapshot = await receiver.fetch(announce)    # a WeightsAnnounce message; verified, ready for engine.load_weights
    receiver.close()

Broadcasts and groups are joined one after the other, in the order of the calls: call them in the order the messages
came, each in a task of its own, so that the stream goes on being read. What comes over HTTP has a thread of its own, so
that a slow download holds up no group. A WeightGroup interrupts what waits for members
of an older group. Both raise WeightsError where it did not work: the old weights stay live, the reason goes into
WeightsFailed. WeightsGone and GroupSuperseded are no failures: a newer announcement or group is on its way.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from async_rl.config import Run
from async_rl.engines.protocol import Snapshot
from async_rl.models.parameters import Layout
from async_rl.weights.errors import WeightsError, WeightsGone
from async_rl.weights.header import name
from async_rl.weights.process_group import ProcessGroupReceiver
from async_rl.weights.publisher import LAST_EPOCH
from async_rl.weights.relay_client import RelayClient
from async_rl.weights.shared_memory import SharedMemoryReceiver
from async_rl.wire.messages import WeightGroup, WeightsAnnounce

T = TypeVar("T")


class Receiver:
    """Takes announcements of every transport. Made inside a running event loop or not; used in one."""

    def __init__(
        self,
        layout: Layout,
        group: ProcessGroupReceiver | None = None,
        *,
        timeout_s: float = 30.0,
        relay_url: str = "",
    ) -> None:
        """`relay_url`: where the relay is, seen from here, if not where the announcements say."""
        self._relay_url = relay_url
        self._files, self._group = SharedMemoryReceiver(layout), group
        self._relay = RelayClient(layout, timeout_s=timeout_s)
        self._worker: _Worker[Any] = _Worker("weights-receiver")
        self._downloads: _Worker[Snapshot] = _Worker("weights-download")
        self._newest: WeightsAnnounce | None = None
        """Of those that come over HTTP."""

    async def fetch(self, announce: WeightsAnnounce) -> Snapshot:
        """The announced weights, verified, under the id their header carries; over HTTP perhaps newer ones.

        shared_memory: the tensors are private to us and stay valid as long as they are referenced.
        process_group, http: they stay valid until the second fetch of the same kind after this one.

        Raises:
            WeightsError: see errors.py; WeightsGone where newer ones are on their way.
        """
        match announce.transport:
            case "shared_memory":
                return await self._worker.run(lambda: self._files.fetch(announce))
            case "process_group":
                return await self._worker.run(lambda: self._join(announce))
            case "http":
                self._newest = announce
                return await self._downloads.run(lambda: self._download(announce))

    async def regroup(self, group: WeightGroup) -> None:
        """Form this group, or leave the old one where it does not name us. Nothing to do without one.

        Raises:
            WeightsError: we are in no group now.
        """
        if self._group is None:
            return
        member = self._group
        interrupt = threading.Thread(target=member.interrupt, args=(group.epoch,), daemon=True)
        interrupt.start()  # it may have to talk to a store that is gone: not in the loop's thread
        await self._worker.run(lambda: member.form(group))

    def statistics(self) -> dict[str, int]:
        """Bytes of files that came over HTTP, and how many sets of weights came as deltas."""
        return {"received": self._relay.received, "deltas": self._relay.deltas}

    def close(self) -> None:
        """Leave the group; a fetch in progress is left to itself and ends at its deadline."""
        self._worker.close()
        self._downloads.close()
        self._relay.interrupt()
        if self._group is not None:
            self._group.interrupt(LAST_EPOCH)
            self._group.close()

    def _join(self, announce: WeightsAnnounce) -> Snapshot:
        if self._group is None:
            raise WeightsError(
                "weights were announced for a process group, this generator's recipe has another weights.transport"
            )
        return self._group.receive(announce)

    def _download(self, announce: WeightsAnnounce) -> Snapshot:
        if announce is not self._newest:
            raise WeightsGone(f"weights {name(announce.weights)} are out of date: newer ones were announced")
        fetched = self._relay.fetched
        if fetched is not None and fetched.weights >= announce.weights:
            return fetched  # the engine could not load them, or they would not have been asked for
        url = self._relay_url or announce.location
        return self._relay.fetch(msgspec.structs.replace(announce, location=url))


def make_receiver(run: Run, member: str, layout: Layout) -> Receiver:
    """The transport of the recipe; `member` is the name in Hello."""
    timeout_s = run.weights.timeout_s
    group = None
    if run.weights.transport in ("process_group", "auto"):
        group = ProcessGroupReceiver(member, layout, timeout_s=timeout_s)
    return Receiver(layout, group, timeout_s=timeout_s, relay_url=run.weights.relay_url)


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
            del job  # while it waits for the next one, nothing of what it fetched is kept alive
