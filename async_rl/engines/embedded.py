"""The engine of a generator process: a `Batcher` driven by one thread that sleeps while there is nothing to sample.

Callers post commands to a queue; the thread carries them out between two decode steps. Weights are cast and fused on
another thread, so that a swap stalls decoding only while one reference is exchanged. Nothing is on the device before
the first weights, nor between `release` and the weights after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from transformers import PreTrainedConfig

from async_rl.engines.batcher import Batcher
from async_rl.engines.protocol import Capabilities, Chunk, Deliver, Request, Snapshot, Swap
from async_rl.engines.stopwatch import Stopwatch
from async_rl.models.memory import give_back, held
from async_rl.wire.messages import WeightsId

CAUSES = ("idle", "engine_step", "swap", "paused", "released")

Command = Callable[[], Sequence[Chunk]]
"""Runs on the engine's thread; what it returns is delivered."""


class EmbeddedEngine:
    """See engines.protocol.Engine. Requests that come before the first weights wait for them.

    Submit what belongs together in one call: it enters the same step, and equal prompts share one prefill. Whoever
    starts the engine must await `wait_stopped`, which raises what broke its thread.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        slots: int,
        max_length: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        prefill_tokens: int | None = None,
    ) -> None:
        """`max_length` 0: the model's own limit. `prefill_tokens`: prompt tokens computed in one step at most.

        Raises:
            UserError: the embedded engine does not run this architecture.
        """
        self._batcher = Batcher(
            config,
            slots=slots,
            max_length=max_length,
            dtype=dtype,
            device=torch.device(device),
            prefill_tokens=prefill_tokens,
        )
        self._device = torch.device(device)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed: BaseException | None = None
        """Why no command is accepted any more; guarded by the gate, so that none enters a queue that nobody reads."""
        self._ended: Future[None] = Future()
        self._loading = asyncio.Lock()
        self._swapped: Future[Swap] | None = None
        """The swap or release that was posted last."""
        self._stepped_at = float("-inf")
        self._delivered = 0
        """Chunks since the start."""
        self._paused = self._released = False
        self._lease: object | None = None
        """Of the pause that is on."""
        self._thread: threading.Thread | None = None
        self._stopwatch: Stopwatch | None = None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_concurrent=self._batcher.slots, max_length=self._batcher.max_length, leaves_device=True)

    @property
    def weights(self) -> WeightsId | None:
        return self._batcher.weights

    @property
    def stepped_at(self) -> float:
        return time.monotonic() if self._released else self._stepped_at

    def start(self, deliver: Deliver) -> None:
        """Chunks are delivered on the engine's thread, between two steps: hand them over and return."""
        assert self._thread is None, "an engine starts once"
        self._stopwatch = Stopwatch(CAUSES, time.monotonic)
        arguments = (deliver, self._stopwatch)
        self._thread = threading.Thread(target=self._run, args=arguments, name="embedded-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        together = list(requests)
        for request in together:
            self._batcher.check(request)

        def command() -> Sequence[Chunk]:
            self._batcher.submit(together)
            return ()

        self._post(command)

    def cancel(self, request_ids: Sequence[int]) -> None:
        ids = list(request_ids)
        self._post(lambda: self._batcher.cancel(ids))

    def pause(self, lease_s: float | None = None) -> None:
        lease = self._lease = object()
        self._post(lambda: self._set_paused(True))
        if lease_s is not None:
            timer = threading.Timer(lease_s, self._expire, (lease,))
            timer.daemon = True
            timer.start()

    def resume(self) -> None:
        self._lease = None
        self._post(lambda: self._set_paused(False))

    async def load_weights(self, snapshot: Snapshot) -> Swap:
        """Loads that overlap happen one after the other. A failed or cancelled load leaves the old weights live.

        Raises:
            ValueError: the snapshot is not of this model.
        """
        async with self._loading:
            prepared = await asyncio.to_thread(self._batcher.prepare, snapshot.tensors)
            return await self._between_steps(lambda: self._batcher.swap(snapshot.weights, prepared), released=False)

    async def release(self) -> Swap:
        """After a load in progress. See engines.protocol.Engine."""
        async with self._loading:
            return await self._between_steps(self._leave, released=True)

    async def _between_steps(self, work: Callable[[], None], *, released: bool) -> Swap:
        done: Future[Swap] = Future()
        self._swapped = done
        self._post(lambda: self._swap(work, released, done))
        return await asyncio.wrap_future(done)

    def activity(self) -> dict[str, float]:
        return self._stopwatch.read() if self._stopwatch else dict.fromkeys(CAUSES, 0.0)

    def gauges(self) -> dict[str, float]:
        """`cache_used`: share of the KV cache that belongs to sequences. A slot is as long as a sequence may become."""
        running, slots = self._batcher.num_running, self._batcher.slots
        waiting = self._batcher.num_waiting
        return {"running": running, "waiting": waiting, "slots": slots, "cache_used": running / slots}

    async def stop(self) -> None:
        """The thread ends after the step in progress; requests still in the engine get no more chunks."""
        if self._thread is None:
            self._close(None)
            return
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._post(_stop)
        await asyncio.to_thread(self._thread.join)

    async def wait_stopped(self) -> None:
        """Returns after `stop`; raises what broke the engine's thread as soon as it breaks."""
        await asyncio.shield(asyncio.wrap_future(self._ended))

    def _expire(self, lease: object) -> None:
        """On a timer's thread."""
        with contextlib.suppress(RuntimeError):  # the engine has ended meanwhile
            if self._lease is lease:
                self.resume()

    def _post(self, command: Command) -> None:
        with self._gate:
            if self._closed is not None:
                raise RuntimeError("the engine has stopped") from self._closed
            self._commands.put(command)

    # --- on the engine's thread -----------------------------------------------------------------------------

    def _run(self, deliver: Deliver, stopwatch: Stopwatch) -> None:
        def step() -> Sequence[Chunk]:
            stopwatch.switch("engine_step")
            chunks = self._batcher.step()
            self._stepped_at = time.monotonic()
            return chunks

        error: BaseException | None = None
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device.index or 0)  # this thread's: kernels are launched on it
            while True:
                runnable = self._batcher.has_work and not self._paused
                if not runnable:
                    stopwatch.switch("released" if self._released else "paused" if self._paused else "idle")
                try:
                    command = self._commands.get(block=not runnable)
                except queue.Empty:
                    command = step
                chunks = command()
                del command  # while it waits for the next one, weights that it carried can be freed
                if chunks:
                    self._delivered += len(chunks)
                    deliver(chunks)
        except _Stop:
            pass
        except BaseException as caught:
            error = caught
        stopwatch.switch(None)
        self._close(error)

    def _set_paused(self, paused: bool) -> Sequence[Chunk]:
        self._paused = paused
        return ()

    def _swap(self, work: Callable[[], None], released: bool, done: Future[Swap]) -> Sequence[Chunk]:
        assert self._stopwatch is not None
        if not done.set_running_or_notify_cancel():
            return ()
        self._stopwatch.switch("swap")
        started = time.monotonic()
        chunks = self._batcher.settle()
        sampled = self._batcher.sampled()
        work()
        self._released = released
        delivered = self._delivered + len(chunks)
        done.set_result(Swap(time.monotonic() - started, sampled, delivered, held(self._device)))
        return chunks

    def _leave(self) -> None:
        self._batcher.release()
        give_back(self._device)

    def _close(self, error: BaseException | None) -> None:
        with self._gate:
            self._closed = error or _Stop()
        if self._swapped is not None and not self._swapped.done():
            self._swapped.set_exception(RuntimeError("the engine stopped before the weights were live or gone"))
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


class _Stop(Exception):
    """Ends the engine's thread."""


def _stop() -> Sequence[Chunk]:
    raise _Stop
