"""A controller that is talked to by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from schedules import recipe

from async_rl.controller.controller import Controller
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.store import MemoryStore
from async_rl.simulate.cluster import MemoryJournal, NumberedTasks
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.memory import MemoryServer
from async_rl.wire.messages import Hello, WeightsId


class Wires:
    """A controller whose learner and generators are played by hand."""

    @classmethod
    async def open(cls, *, dtypes: Sequence[str] = ("", "", ""), **sections: Any) -> Wires:
        """dtypes: what the learner and two generators say they compute in."""
        wires = cls()
        wires.journal = MemoryJournal()
        rollouts, training = MemoryServer(rollout_stream()), MemoryServer(training_stream())
        fixed = {"generator": {"count": 2}, "controller": {"heartbeat_timeout_s": 1e6}}
        wires.controller = Controller(
            recipe(**fixed | sections),
            ledger=await Ledger.open(MemoryStore()),
            tasks=NumberedTasks(),
            rollouts=rollouts,
            training=training,
            journal=wires.journal,
        )
        wires.running = asyncio.create_task(wires.controller.run())
        wires.learner = training.connect()
        wires.generators = [rollouts.connect(), rollouts.connect()]
        start = WeightsId(0, 0)
        wires.learner.send(Hello("learner", "learner", 0, weights=start, weights_store="127.0.0.1:1", dtype=dtypes[0]))
        wires.learner.epoch = 1
        for index, generator in enumerate(wires.generators):
            generator.send(Hello("generator", f"generator-{index}", 0, dtype=dtypes[1 + index]))
        await asyncio.sleep(0.01)
        for generator in wires.generators:
            generator.epoch = 1
        return wires

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
