"""What the tests of weights share; importable by the processes they spawn."""

from __future__ import annotations

import asyncio
import os
import queue
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from async_rl.engines.protocol import Snapshot
from async_rl.models.parameters import Entry, Layout
from async_rl.weights.errors import WeightsError
from async_rl.weights.files import Draft
from async_rl.weights.process_group import ProcessGroupReceiver
from async_rl.weights.receiver import Receiver
from async_rl.wire.messages import WeightGroup, WeightsAnnounce, WeightsFailed, WeightsId

DEADLINE_S = 60.0
SMALL = Layout((Entry("a.weight", (3, 5), torch.float32, 0), Entry("b.weight", (7,), torch.float32, 64)))
LARGE = Layout((Entry("a.weight", (5 << 20,), torch.float32, 0), Entry("b.weight", (3,), torch.float32, 20 << 20)))
"""20 MB: two buckets."""


def values(layout: Layout, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {entry.name: torch.randn(entry.shape, generator=generator) for entry in layout.entries}


def writer(layout: Layout, seed: int) -> Any:
    """What Publisher.publish calls: as Learner.snapshot."""
    return lambda out: layout.pack(values(layout, seed).items(), out)


def packed(layout: Layout, seed: int) -> Tensor:
    out = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.pack(values(layout, seed).items(), out)
    return out


def drafted(maker: Any, payload: Tensor) -> Draft:
    """What a WeightFiles or a Distribution is given to send."""
    draft = maker.draft()
    draft.payload.copy_(payload)
    return draft


def holds(snapshot: Snapshot, layout: Layout, seed: int) -> bool:
    expected = values(layout, seed)
    return snapshot.tensors.keys() == expected.keys() and all(
        torch.equal(tensor, expected[name]) for name, tensor in snapshot.tensors.items()
    )


class Outbox:
    """Collects what a publisher says."""

    def __init__(self) -> None:
        self.announced: queue.Queue[WeightsAnnounce] = queue.Queue()
        self.failed: queue.Queue[WeightsFailed] = queue.Queue()

    def announcement(self) -> WeightsAnnounce:
        return self.announced.get(timeout=DEADLINE_S)

    def failure(self) -> WeightsFailed:
        return self.failed.get(timeout=DEADLINE_S)


def serve_generator(name: str, timeout_s: float, pipe: Connection) -> None:
    """A generator's receiver in a process of its own: messages come and reports leave through the pipe.

    Reports: ("formed", epoch), ("weights", id, sum of tensor a), ("error", type name, text).
    """
    torch.set_num_threads(1)
    receiver = Receiver(LARGE, ProcessGroupReceiver(name, LARGE, timeout_s=timeout_s))

    async def handle(message: WeightGroup | WeightsAnnounce) -> None:
        try:
            if isinstance(message, WeightGroup):
                await receiver.regroup(message)
                pipe.send(("formed", message.epoch))
            else:
                snapshot = await receiver.fetch(message)
                pipe.send(("weights", snapshot.weights, float(snapshot.tensors["a.weight"].double().sum())))
        except WeightsError as error:
            pipe.send(("error", type(error).__name__, str(error)))

    async def main() -> None:
        tasks: set[asyncio.Task[None]] = set()
        pipe.send(("up", name))
        while (message := await asyncio.to_thread(pipe.recv)) is not None:
            tasks.add(asyncio.create_task(handle(message)))
        receiver.close()

    asyncio.run(main())
    os._exit(0)  # as the services do: gloo aborts a process that ends while a dropped group still hangs in TCP


class Generator:
    """The parent's side of `serve_generator`."""

    def __init__(self, context: Any, name: str, timeout_s: float) -> None:
        self.name = name
        self._pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve_generator, args=(name, timeout_s, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, message: WeightGroup | WeightsAnnounce | None) -> None:
        self._pipe.send(message)

    def expect(self, *report: Any) -> tuple[Any, ...]:
        """The next report, which must begin like this."""
        assert self._pipe.poll(DEADLINE_S), f"{self.name} said nothing within {DEADLINE_S} s; expected {report}"
        said = self._pipe.recv()
        assert said[: len(report)] == report, said
        return said

    def end(self) -> float:
        """Let it finish; seconds until it was gone."""
        started = time.monotonic()
        self._pipe.send(None)
        self.process.join(DEADLINE_S)
        assert self.process.exitcode == 0
        return time.monotonic() - started


def expected_report(weights: WeightsId, seed: int) -> tuple[Any, ...]:
    return ("weights", weights, float(values(LARGE, seed)["a.weight"].double().sum()))
