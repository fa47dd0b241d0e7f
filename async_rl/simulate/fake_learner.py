"""A learner that trains on nothing, in a time you choose: the other end of the training stream for virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from async_rl.wire.messages import (
    Activity,
    BatchRequest,
    CheckpointSaved,
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


class FakeLearner:
    """Speaks the protocol of learner.service; a step takes `step_time(batch)` seconds of the loop's clock.

    `batches` keeps what it trained on, for tests and figures.
    """

    def __init__(
        self,
        transport: Client[LearnerMessage, ToLearner],
        *,
        steps: int,
        step_time: Callable[[MicroBatches], float],
        version: int = 0,
    ) -> None:
        self.batches: list[MicroBatches] = []
        self.version = version
        self._transport, self._steps, self._step_time = transport, steps, step_time
        self._lineage = 0
        self._trained_s = 0.0

    async def run(self) -> None:
        """Until Shutdown."""
        self._transport.send(Hello("learner", "learner", 0, weights=WeightsId(0, self.version)))
        queue: asyncio.Queue[MicroBatches] = asyncio.Queue()
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

    async def _train(self, queue: asyncio.Queue[MicroBatches]) -> None:
        while True:
            batch = await queue.get()
            self._request(batch.step + 1)
            seconds = self._step_time(batch)
            await asyncio.sleep(seconds)
            self._trained_s += seconds
            self.version += 1
            self.batches.append(batch)
            self._announce()
            metrics = {
                "reward": sum(rollout.reward for rollout in batch.rollouts) / len(batch.rollouts),
                "samples": float(len(batch.rollouts)),
            }
            weights = WeightsId(self._lineage, self.version)
            self._transport.send(StepDone(batch.step, weights, metrics, self._activity()))

    def _announce(self) -> None:
        self._transport.send(WeightsAnnounce(WeightsId(self._lineage, self.version), "shared_memory"))

    def _request(self, step: int) -> None:
        if step < self._steps:
            self._transport.send(BatchRequest(step))

    def _activity(self) -> Activity:
        now = asyncio.get_running_loop().time()
        return Activity(now, {"train_step": self._trained_s, "wait_batch": now - self._trained_s}, 0.0)
