"""The real control plane on a made-up cluster: one arm of a comparison, from its start to its end, in virtual time."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass, field

from async_rl.controller.controller import Controller
from async_rl.ledger import inspection, records
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.records import EventRecord
from async_rl.ledger.store import MemoryStore
from async_rl.simulate.arms import BEAT_S, Arm
from async_rl.simulate.cluster import MemoryJournal, NumberedTasks
from async_rl.simulate.fake_generator import FakeGenerator
from async_rl.simulate.fake_learner import FakeLearner
from async_rl.simulate.records import GeneratorTrace, RolloutLog, StepDigest
from async_rl.simulate.virtual_loop import run_virtual
from async_rl.simulate.workload import Workload
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.memory import MemoryServer
from async_rl.wire.messages import MicroBatches, TrainRollout

TOKEN_BYTES = 4
SETTLE_S = 0.001
"""The run is stopped so long after its last step, when the controller has written it down."""


@dataclass
class ArmRecord:
    """What an arm left behind."""

    arm: Arm
    workload: Workload
    steps: list[StepDigest]
    """Every step, warm-up included."""
    log: RolloutLog
    traces: list[GeneratorTrace]
    report: inspection.Report
    """Of the ledger, as `inspect --check` gives it."""
    events: list[EventRecord]
    """Every terminal event but `trained`."""
    spent: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict[int, dict[str, dict[str, float]]])
    """step -> process -> cause -> virtual seconds since the start, when the step was done"""

    @property
    def window(self) -> tuple[float, float]:
        """Virtual seconds between which the measured steps ended."""
        warm = self.arm.run.simulate.warmup_steps
        return self.steps[warm - 1].done_at if warm else 0.0, self.steps[-1].done_at

    @property
    def measured(self) -> list[StepDigest]:
        return self.steps[self.arm.run.simulate.warmup_steps :]


def simulate_arm(arm: Arm, *, seed: int, latency_s: float = 0.0) -> ArmRecord:
    """The same arm and seed give the same record.

    Args:
        latency_s: virtual seconds that every frame takes.
    """
    collects = gc.isenabled()
    gc.disable()  # there are no cycles to speak of, and looking for them takes a tenth of the time
    try:
        return run_virtual(_simulate(arm, seed, latency_s))
    finally:
        if collects:
            gc.enable()


async def _simulate(arm: Arm, seed: int, latency_s: float) -> ArmRecord:
    run, store = arm.run, MemoryStore()
    workload = Workload(run.simulate, group_size=run.rollout.group_size, seed=seed)
    rollouts, training = MemoryServer(rollout_stream(), latency_s), MemoryServer(training_stream(), latency_s)
    controller = Controller(
        run,
        ledger=await Ledger.open(store),
        tasks=NumberedTasks(),
        rollouts=rollouts,
        training=training,
        journal=MemoryJournal(),
    )
    log = RolloutLog()
    generators = [
        FakeGenerator(
            name=f"generator-{index}",
            transport=rollouts.connect(),
            model=arm.engine,
            credit=run.credit_rollouts,
            draw=workload.group,
            beat_s=BEAT_S,
            log=log,
        )
        for index in range(run.generator.count)
    ]
    spent: dict[int, dict[str, dict[str, float]]] = {}
    last = arm.steps - 1

    def on_step(step: int) -> None:
        if step in (run.simulate.warmup_steps - 1, last):
            spent[step] = {one.name: one.tracker.seconds() for one in generators}
            spent[step]["learner"] = learner.tracker.seconds()
        if step == last:
            asyncio.get_running_loop().call_later(latency_s + SETTLE_S, controller.stop)

    learner = FakeLearner(
        training.connect(),
        steps=run.steps,
        step_time=lambda batch: _tokens(batch) / arm.train_rate,
        request_at=arm.request_at,
        joined=arm.joined,
        checkpoint_every=run.checkpoint.every_steps,
        keep=False,
        on_step=on_step,
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(controller.run(), name="controller")
        tasks.create_task(learner.run(), name="learner")
        for generator in generators:
            tasks.create_task(generator.run(), name=generator.name)
    events = [
        event
        for key, value in store.scan(b"event/")
        if (event := records.decode(key, value, EventRecord)).event != "trained"
    ]
    report = inspection.report(store, max_staleness=run.staleness.max_staleness)
    assert len(learner.steps) == arm.steps, "the learner began no step in the meantime"
    return ArmRecord(arm, workload, learner.steps, log, [one.trace for one in generators], report, events, spent)


def _tokens(batch: MicroBatches) -> int:
    """Wire tokens to train on."""
    return sum(_length(rollout) for rollout in batch.rollouts)


def _length(rollout: TrainRollout) -> int:
    return sum(len(sequence.tokens) // TOKEN_BYTES for sequence in rollout.sequences)
