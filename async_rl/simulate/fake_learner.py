"""A learner that trains on nothing, in a time you choose: the other end of the training stream for virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from async_rl.simulate.records import StepDigest, digest
from async_rl.telemetry.activity import Tracker
from async_rl.wire.messages import (
    Activity,
    BatchRequest,
    CheckpointSaved,
    DeviceHeld,
    DeviceTurn,
    Heartbeat,
    Hello,
    HelloAck,
    LearnerMessage,
    MicroBatches,
    Shutdown,
    StepDone,
    ToLearner,
    WeightsAnnounce,
    WeightsId,
)
from async_rl.wire.transport import Client

Order: TypeAlias = tuple[MicroBatches, StepDigest] | DeviceTurn
Orders: TypeAlias = asyncio.Queue[Order]


class FakeLearner:
    """Speaks the protocol of learner.service; a step takes `step_time(batch)` seconds of the loop's clock.

    Args:
        request_at: share of a step's time after which it asks for the next batch; the real learner asks when its last
            micro-batch begins.
        joined: a step counts as done, and its weights are published, only when the next batch is there: generation and
            training are joined at every step, as one-step-off trainers do.
        checkpoint_every: steps between two checkpoints; 0 = only at the end.
        keep: hold the batches themselves in `batches`, for tests.
        on_step: called with the step when it is done.
        share: of a learner that shares its device: called with True when it begins to take it, False when it has left.
        turn_s: seconds that taking or leaving the device takes.

    `steps` has a digest of every batch.
    """

    def __init__(
        self,
        transport: Client[LearnerMessage, ToLearner],
        *,
        steps: int,
        step_time: Callable[[MicroBatches], float],
        version: int = 0,
        request_at: float = 0.0,
        joined: bool = False,
        checkpoint_every: int = 0,
        keep: bool = True,
        on_step: Callable[[int], None] | None = None,
        share: Callable[[bool], None] | None = None,
        turn_s: float = 0.0,
    ) -> None:
        self.batches: list[MicroBatches] = []
        self.steps: list[StepDigest] = []
        self.version = version
        self._loop = asyncio.get_running_loop()
        self._share, self._turn_s = share, turn_s
        self._rests_in = "wait_batch" if share is None else "off_device"
        self.tracker = Tracker(self._rests_in, clock=self._loop.time)
        self._transport, self._num_steps, self._step_time = transport, steps, step_time
        self._request_at, self._joined, self._checkpoint_every, self._keep = request_at, joined, checkpoint_every, keep
        self._on_step = on_step
        self._lineage = 0
        self._tokens = 0

    async def run(self) -> None:
        """Until Shutdown."""
        self._transport.send(Hello("learner", "learner", 0, weights=WeightsId(0, self.version)))
        queue: Orders = asyncio.Queue()
        async with asyncio.TaskGroup() as tasks:
            training = tasks.create_task(self._train(queue))
            ended = False
            while not ended:
                for message in await self._transport.receive():
                    match message:
                        case HelloAck(_, lineage):
                            self._lineage = lineage
                            self._announce()
                            self._request(self.version)
                        case MicroBatches():
                            queue.put_nowait((message, digest(message, self._loop.time())))
                        case DeviceTurn():
                            queue.put_nowait(message)
                        case Heartbeat():
                            self._transport.send(Heartbeat(self._activity()))
                        case Shutdown(checkpoint=checkpoint):
                            if checkpoint:
                                self._transport.send(CheckpointSaved(self.version, ""))
                            ended = True
                        case _:
                            pass
            training.cancel()

    async def _train(self, queue: Orders) -> None:
        upcoming: Order | None = None
        while True:
            order = upcoming or await queue.get()
            upcoming = None
            if isinstance(order, DeviceTurn):
                await self._take_turn(order)
                continue
            batch, seen = order
            assert self._rests_in == "wait_batch", "a batch off the device"
            self.tracker.switch("train_step")
            seen.began_at = self._loop.time()
            seconds = self._step_time(batch)
            if self._request_at > 0:
                await asyncio.sleep(seconds * self._request_at)
            self._request(batch.step + 1)
            await asyncio.sleep(seconds * (1 - self._request_at))
            self.tracker.switch(self._rests_in)
            if self._joined and batch.step + 1 < self._num_steps:
                upcoming = await queue.get()
            self._done(batch, seen)

    async def _take_turn(self, turn: DeviceTurn) -> None:
        assert self._share is not None
        self.tracker.switch("device_turn")
        if turn.hold:
            self._share(True)
        await asyncio.sleep(self._turn_s)
        if not turn.hold:
            self._share(False)
        self._rests_in = "wait_batch" if turn.hold else "off_device"
        self.tracker.switch(self._rests_in)
        self._transport.send(DeviceHeld(turn.number, turn.hold, self._turn_s))

    def _done(self, batch: MicroBatches, seen: StepDigest) -> None:
        self.version += 1
        self._tokens += seen.tokens
        if self._keep:
            self.batches.append(batch)
        self.steps.append(seen)
        seen.done_at = self._loop.time()
        self._announce()
        metrics = {
            "reward": sum(rollout.reward for rollout in batch.rollouts) / len(batch.rollouts),
            "samples": float(len(batch.rollouts)),
        }
        weights = WeightsId(self._lineage, self.version)
        self._transport.send(StepDone(batch.step, weights, metrics, self._activity()))
        if self._checkpoint_every and self.version % self._checkpoint_every == 0:
            self._transport.send(CheckpointSaved(self.version, ""))
        if self._on_step is not None:
            self._on_step(batch.step)

    def _announce(self) -> None:
        self._transport.send(WeightsAnnounce(WeightsId(self._lineage, self.version), "shared_memory"))

    def _request(self, step: int) -> None:
        if step < self._num_steps:
            self._transport.send(BatchRequest(step))

    def _activity(self) -> Activity:
        return Activity(self._loop.time(), self.tracker.seconds(), 0.0, self._tokens)
