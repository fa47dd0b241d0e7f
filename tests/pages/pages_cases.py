"""The real controller, ledger, journal and admin endpoint in this process, on fake generators and a fake learner."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl import recipes
from async_rl.config import Run
from async_rl.controller import admin
from async_rl.controller.admin_access import Access
from async_rl.controller.controller import Controller
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.store import MemoryStore
from async_rl.simulate.cluster import NumberedTasks
from async_rl.simulate.fake_generator import EngineModel, FakeGenerator
from async_rl.simulate.fake_learner import FakeLearner
from async_rl.simulate.records import RolloutLog
from async_rl.simulate.workload import Workload
from async_rl.telemetry.feed import Feed
from async_rl.telemetry.run_directory import DirectoryJournal, RunDirectory
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.memory import MemoryServer

HOST = "127.0.0.1"
HOSTILE = "<img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>&lt;\n\u202e"
"""What a completion, an error or a name may say."""


def recipe(generators: int, **changes: Any) -> Run:
    table: dict[str, Any] = {
        "steps": 100_000,
        "model": {"tiny": {"characters": "".join(sorted(set(HOSTILE)))}},
        "environment": {"name": "simulated"},
        "rollout": {"groups_per_step": max(4, generators), "group_size": 8, "max_new_tokens": 400},
        "generator": {"slots": 32, "count": generators},
        "evaluation": {"tasks": 0},
        "simulate": {"mean_tokens": 1000.0, "sigma": 0.9, "block_tokens": 16},
    }
    return recipes.from_table(table | changes)


@dataclass
class Served:
    url: str
    controller: Controller
    journal: DirectoryJournal


@contextlib.asynccontextmanager
async def served(
    run: Run,
    directory: Path,
    *,
    step_s: float = 0.3,
    names: str = "generator-{}",
    learner: bool = True,
    token: str = "",
) -> AsyncIterator[Served]:
    """Until the end of the block; then everything is stopped in order. names: of the generators, by index.
    token: who asks has to give it."""
    place = RunDirectory(directory)
    place.create(run)
    feed = Feed()
    journal = DirectoryJournal(place, feed.tell)
    rollouts, training = MemoryServer(rollout_stream(), 0.001), MemoryServer(training_stream(), 0.001)
    ledger = await Ledger.open(MemoryStore())
    controller = Controller(
        run, ledger=ledger, tasks=NumberedTasks(), rollouts=rollouts, training=training, journal=journal
    )
    workload = Workload(run.simulate, group_size=run.rollout.group_size, seed=1)
    engine = EngineModel(slots=run.generator.slots, step_s=0.004, sequence_s=0.0001, pause_s=0.02)
    generators = [
        FakeGenerator(
            name=names.format(index),
            transport=rollouts.connect(),
            model=engine,
            credit=run.credit_rollouts,
            draw=workload.group,
            beat_s=1.0,
            log=RolloutLog(),
        )
        for index in range(run.generator.count)
    ]
    runner, url = await admin.start(controller, HOST, 0, Access(HOST, token), feed=feed, name=directory.name)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(controller.run(), name="controller")
            if learner:
                trainer = FakeLearner(training.connect(), steps=run.steps, step_time=lambda _: step_s)
                tasks.create_task(trainer.run(), name="learner")
            for generator in generators:
                tasks.create_task(generator.run(), name=generator.name)
            yield Served(url, controller, journal)
            controller.stop()
    finally:
        await runner.cleanup()
        journal.close()
        await ledger.close()
