"""The learner's loop: a batch in, a version out. Training has a thread; heartbeats and the wire never wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from async_rl.config import Run
from async_rl.errors import ProtocolError
from async_rl.learner.optimisation import Abandoned
from async_rl.learner.trainer import Learner
from async_rl.telemetry.activity import Tracker
from async_rl.weights.machine import machine
from async_rl.wire.messages import (
    BatchRequest,
    CheckpointSaved,
    DeviceHeld,
    DeviceTurn,
    Evaluated,
    Heartbeat,
    Hello,
    HelloAck,
    LearnerMessage,
    MicroBatches,
    Shutdown,
    StepDone,
    ToLearner,
    WeightGroup,
    WeightsId,
)
from async_rl.wire.transport import NO_WELCOME, WELCOME_TIMEOUT_S, Client

KEEP_ALIVE_S = 60.0
"""Other ranks hear from rank 0 at least so often while it waits for a batch."""

T = TypeVar("T")


class WeightsPublisher(Protocol):
    @property
    def store(self) -> str: ...

    def publish(self, weights: WeightsId, write: Callable[[Tensor], None]) -> None: ...

    def regroup(self, group: WeightGroup) -> None: ...


class LearnerService:
    """`await run()` until the controller says Shutdown.

    The batch of step k + 1 is asked for when the last micro-batch of step k begins: late, so that it is composed of the
    newest rollouts, and early enough to have arrived when step k ends.

    Colocated with a generator it starts off the device, and takes and leaves it when it is told to, between two steps.
    """

    def __init__(
        self,
        run: Run,
        learner: Learner,
        publisher: WeightsPublisher,
        transport: Client[LearnerMessage, ToLearner],
    ) -> None:
        self._config, self._learner, self._publisher, self._transport = run, learner, publisher, transport
        self._loop = asyncio.get_running_loop()
        self._tracker = Tracker("start")
        self._orders: asyncio.Queue[MicroBatches | DeviceTurn] = asyncio.Queue()
        self._rests_in = "off_device" if run.colocated else "wait_batch"
        """The cause of its time while it has nothing to do."""
        self._requested = -1
        """The last step whose batch was asked for."""
        self._welcome: asyncio.Future[HelloAck] = self._loop.create_future()
        self._stopping = threading.Event()
        self._shutdown: asyncio.Future[Shutdown] = self._loop.create_future()
        self._thread = ThreadPoolExecutor(1, "train")
        self._saving: tuple[int, asyncio.Future[Path]] | None = None
        """The newest checkpoint, by its version; done when it is durable."""
        self._tokens = 0

    async def run(self) -> Shutdown:
        """Returns why it ended; `restart` is set where only a new process can go on."""
        learner = self._learner
        hello = Hello(
            "learner",
            "learner",
            os.getpid(),
            weights=learner.weights,
            weights_store=self._publisher.store,
            attention_share=learner.attention_share,
            machine=machine(),
            dtype=self._config.learner.dtype,
        )
        self._transport.send(hello)
        async with asyncio.TaskGroup() as self._tasks:
            tasks = self._tasks
            serving = tasks.create_task(self._serve(), name="training stream")
            try:
                async with asyncio.timeout(WELCOME_TIMEOUT_S):
                    welcome = await self._welcome
            except TimeoutError:
                raise ProtocolError(NO_WELCOME) from None
            learner.begin(welcome.lineage)
            beating = tasks.create_task(self._beat(welcome.heartbeat_s), name="heartbeat")
            await self._publish()
            await self._train_until_shutdown()
            serving.cancel()
            beating.cancel()
        self._thread.shutdown()
        return self._shutdown.result()

    async def _train_until_shutdown(self) -> None:
        self._request(self._learner.version)
        while (batch := await self._next_order()) is not None:
            if isinstance(batch, DeviceTurn):
                await self._take_turn(batch)
                continue
            try:
                metrics = await self._in_thread("train_step", lambda batch=batch: self._train(batch))
            except Abandoned:
                break  # it is composed: the next start trains on it
            self._request(batch.step + 1)  # a step without micro-batches has no last one
            await self._publish()
            self._tokens += int(metrics["tokens"])
            self._tracker.switch("wait_batch")
            activity = self._tracker.activity(self._tokens)
            self._transport.send(StepDone(batch.step, self._learner.weights, metrics, activity))
            if self._learner.version % self._config.checkpoint.every_steps == 0:
                await self._begin_checkpoint()
        if (await self._shutdown).checkpoint:
            await self._finish_checkpoint()

    def _train(self, batch: MicroBatches) -> dict[str, float]:
        """On the training thread."""

        def ask_for_next() -> None:
            self._loop.call_soon_threadsafe(self._request, batch.step + 1)

        return self._learner.train(batch, self._stopping.is_set, ask_for_next)

    async def _take_turn(self, turn: DeviceTurn) -> None:
        started = self._loop.time()
        offload = self._learner.offload
        nbytes = await self._in_thread("device_turn", offload.enter if turn.hold else offload.leave)
        self._rests_in = "wait_batch" if turn.hold else "off_device"
        self._tracker.switch(self._rests_in)
        self._transport.send(DeviceHeld(turn.number, turn.hold, self._loop.time() - started, nbytes))

    async def _next_order(self) -> MicroBatches | DeviceTurn | None:
        """None: the controller said Shutdown."""
        self._tracker.switch(self._rests_in)
        getting = asyncio.ensure_future(self._orders.get())
        try:
            while True:
                done, _ = await asyncio.wait(
                    {getting, self._shutdown}, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED
                )
                if self._shutdown in done:
                    return None
                if getting in done:
                    return getting.result()
                if self._learner.ranks.size > 1:
                    await self._in_thread("wait_batch", self._learner.keep_alive)
        finally:
            getting.cancel()

    async def _publish(self) -> None:
        learner = self._learner
        await self._in_thread("publish", lambda: self._publisher.publish(learner.weights, learner.snapshot))

    async def _begin_checkpoint(self) -> asyncio.Future[Path]:
        """Copied when this returns; written, and the controller told so, while training goes on."""
        version, began = self._learner.version, self._loop.time()
        writing: Future[Path] = await self._in_thread("checkpoint", self._learner.begin_checkpoint)
        saved = asyncio.wrap_future(writing)
        self._saving = version, saved
        self._tasks.create_task(self._tell_when_saved(version, saved, began), name=f"checkpoint {version}")
        return saved

    async def _finish_checkpoint(self) -> None:
        """The last one, of the weights of now. It is told again if it was told before: now it is waited for."""
        version, path = self._learner.version, ""
        if self._saving is not None and self._saving[0] == version:
            path = await self._saving[1]
        elif self._learner.resumed_from is None or self._learner.resumed_from.version != version:
            path = await (await self._begin_checkpoint())
        self._transport.send(CheckpointSaved(version, str(path)))

    async def _tell_when_saved(self, version: int, saved: asyncio.Future[Path], began: float) -> None:
        path = await saved
        self._transport.send(CheckpointSaved(version, str(path), self._loop.time() - began))

    def _request(self, step: int) -> None:
        if self._requested < step < self._config.steps:
            self._requested = step
            self._transport.send(BatchRequest(step))

    async def _in_thread(self, cause: str, work: Callable[[], T]) -> T:
        """Run on the training thread; its time, without the hand-over, is booked under `cause`."""

        def booked() -> T:
            self._tracker.switch(cause)
            try:
                return work()
            finally:
                self._tracker.switch("hand_over")

        return await self._loop.run_in_executor(self._thread, booked)

    async def _serve(self) -> None:
        while not self._shutdown.done():
            for message in await self._transport.receive():
                match message:
                    case HelloAck():
                        self._welcome.set_result(message)
                    case MicroBatches() | DeviceTurn():
                        self._orders.put_nowait(message)
                    case Evaluated(version, reward):
                        self._learner.evaluated(version, reward)
                    case WeightGroup():
                        self._publisher.regroup(message)
                    case Heartbeat():
                        self._transport.send(Heartbeat(self._tracker.activity(self._tokens), self._learner.weights))
                    case Shutdown():
                        self._stopping.set()
                        with contextlib.suppress(asyncio.InvalidStateError):
                            self._shutdown.set_result(message)
                    case _:
                        raise ProtocolError(f"the learner does not expect {type(message).__name__}")

    async def _beat(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            self._transport.send(Heartbeat(self._tracker.activity(self._tokens), self._learner.weights))
