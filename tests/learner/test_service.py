"""The learner's loop over a real stream in memory: when it asks for what."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from learner_cases import message, ragged_rollouts, tiny_run
from torch import Tensor

from async_rl.config import Checkpoint
from async_rl.learner import checkpoint
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import ignored, never
from async_rl.learner.service import LearnerService
from async_rl.learner.trainer import CHECKPOINTS, Learner
from async_rl.wire.codec import training_stream
from async_rl.wire.memory import MemoryServer
from async_rl.wire.messages import (
    BatchRequest,
    CheckpointSaved,
    Hello,
    HelloAck,
    LearnerMessage,
    MicroBatches,
    Shutdown,
    StepDone,
    WeightGroup,
    WeightsId,
)

PLAN = [[list(range(4)), list(range(4, 12)), list(range(12, 16))]]
Real = Callable[[Coroutine[Any, Any, None]], None]


class NoWeights:
    """A publisher whom nobody listens to."""

    store = ""

    def __init__(self) -> None:
        self.published: list[int] = []

    def publish(self, weights: WeightsId, write: Callable[[Tensor], None]) -> None:
        self.published.append(weights.version)

    def regroup(self, group: WeightGroup) -> None: ...


class HeldLearner(Learner):
    """Stands still before every micro-batch until it may begin, and in the last one after it has said so."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.begins, self.may_go_on = threading.Semaphore(0), threading.Semaphore(0)

    def train(
        self, batch: MicroBatches, abandon: Callable[[], bool] = never, last_begins: Callable[[], None] = ignored
    ) -> dict[str, float]:
        def hold() -> None:
            self.begins.release()
            assert self.may_go_on.acquire(timeout=20)

        def held_abandon() -> bool:
            hold()
            return abandon()

        def held_last() -> None:
            last_begins()
            hold()

        return super().train(batch, held_abandon, held_last)

    async def stands(self) -> None:
        assert await asyncio.to_thread(self.begins.acquire, timeout=20)

    def go_on(self) -> None:
        self.may_go_on.release()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_next_batch_is_asked_for_when_the_last_micro_batch_begins(
    ranks: Ranks, tmp_path: Path, real: Real, micro_batches: int
) -> None:
    plan = PLAN if micro_batches == 3 else [[list(range(16))]]

    async def main() -> None:
        learner = HeldLearner(tiny_run(steps=2), tmp_path, ranks)
        server = MemoryServer(training_stream())
        server.epoch = 1
        service = asyncio.create_task(LearnerService(tiny_run(steps=2), learner, NoWeights(), server.connect()).run())
        peer, (hello,) = await server.receive()
        assert isinstance(hello, Hello) and hello.dtype == "float32"
        server.send(peer, HelloAck("learner", heartbeat_s=60.0))
        assert (await server.receive())[1] == [BatchRequest(0)]
        server.send(peer, message(ragged_rollouts(seed=6), plan))
        for _ in range(micro_batches):
            await learner.stands()
            with pytest.raises(TimeoutError):  # nothing may come: the loop is idle until the thread goes on
                await asyncio.wait_for(server.receive(), 0.01)
            learner.go_on()
        await learner.stands()
        assert (await server.receive())[1] == [BatchRequest(1)], "asked for while the last micro-batch is computed"
        learner.go_on()
        _, (done,) = await server.receive()
        assert isinstance(done, StepDone) and done.step == 0, "asked for once"

        server.send(peer, message(ragged_rollouts(seed=7), plan, step=1))
        for _ in range(micro_batches + 1):
            learner.go_on()
        _, (done,) = await server.receive()
        assert isinstance(done, StepDone) and done.step == 1, "there is no third step to ask for"
        server.send(peer, Shutdown("done", checkpoint=True))
        assert isinstance((await server.receive())[1][0], CheckpointSaved)
        await service

    real(main())


def saved(message: LearnerMessage) -> tuple[int, str] | None:
    return (message.version, message.path) if isinstance(message, CheckpointSaved) else None


def test_steps_and_weights_go_on_while_a_checkpoint_is_written(
    ranks: Ranks, tmp_path: Path, real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who generates sees no pause, and is told of a checkpoint when it is durable, not before."""
    disk, publish = threading.Event(), checkpoint.publish

    def slow(partial: Path, final: Path) -> None:
        assert disk.wait(60)
        publish(partial, final)

    monkeypatch.setattr(checkpoint, "publish", slow)
    run = tiny_run(steps=3, checkpoint=Checkpoint(every_steps=2))

    async def main() -> None:
        server, publisher = MemoryServer(training_stream()), NoWeights()
        server.epoch = 1
        learner = Learner(run, tmp_path, ranks)
        service = asyncio.create_task(LearnerService(run, learner, publisher, server.connect()).run())
        peer, _ = await server.receive()
        server.send(peer, HelloAck("learner", heartbeat_s=60.0))
        told: list[LearnerMessage] = []

        async def until(kind: type) -> None:
            while not any(isinstance(message, kind) for message in told):
                told.extend((await server.receive())[1])

        for step in range(3):
            server.send(peer, message(ragged_rollouts(seed=step), step=step))
            await until(StepDone)
            assert not any(isinstance(message, CheckpointSaved) for message in told)
            told.clear()
        assert publisher.published == [0, 1, 2, 3] and checkpoint.latest(tmp_path / CHECKPOINTS) is None
        disk.set()
        await until(CheckpointSaved)
        assert saved(told[-1]) == (2, str(tmp_path / CHECKPOINTS / "v00000002"))
        told.clear()
        server.send(peer, Shutdown("done", checkpoint=True))
        await until(CheckpointSaved)
        await service
        assert (3, str(tmp_path / CHECKPOINTS / "v00000003")) in map(saved, told)

    real(main())


def test_a_new_controller_has_it_start_again(ranks: Ranks, tmp_path: Path, real: Real) -> None:
    """What it says to the new one is of the old one's epoch: it leaves, and says that it wants to come back."""

    async def main() -> None:
        server = MemoryServer(training_stream())
        server.epoch = 1
        learner = Learner(tiny_run(steps=2), tmp_path, ranks)
        service = asyncio.create_task(LearnerService(tiny_run(steps=2), learner, NoWeights(), server.connect()).run())
        peer, _ = await server.receive()
        server.send(peer, HelloAck("learner", heartbeat_s=0.01))
        assert (await server.receive())[1] == [BatchRequest(0)]
        server.epoch = 2
        hearing = asyncio.create_task(server.receive())
        assert (await service).restart
        assert not hearing.done()
        hearing.cancel()

    real(main())
