"""Whole runs of the real controller, ledger and codec in virtual time, with what can happen to them from the outside.

A `Schedule` says what happens; `play` makes it happen and returns the `World` that it left. What it is judged by is
seen at the seams: `AuditedStore` sees what is committed, `Line` what generators say, `FakeLearner` what is trained on.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import exp
from typing import Any, Literal

from audit import AuditedStore, Rollout

from async_rl import config, recipes
from async_rl.controller.controller import Controller
from async_rl.ledger import inspection
from async_rl.ledger.ledger import Ledger
from async_rl.simulate.cluster import MemoryJournal, NumberedTasks
from async_rl.simulate.fake_generator import EngineModel, FakeGenerator
from async_rl.simulate.fake_learner import FakeLearner
from async_rl.simulate.workload import GroupDraw
from async_rl.tasks.source import TaskSource
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.memory import MemoryServer
from async_rl.wire.messages import (
    Ack,
    Failed,
    Finished,
    GeneratorMessage,
    Lease,
    MicroBatches,
    RolloutResult,
    Shutdown,
    ToGenerator,
    TrainRollout,
)
from async_rl.wire.transport import Client

TOKEN_S = 0.02
"""Of an engine: one token for everyone in it."""
LATENCY_S = 0.001
"""Of a frame."""
NUMBERED = NumberedTasks()
TOO_LONG_S = 400.0
"""A run that takes longer has starved."""


def recipe(**changes: Any) -> config.Run:
    """A small run; sections are merged into the defaults."""
    table: dict[str, Any] = {
        "steps": 6,
        "model": {"tiny": {"characters": "01"}},
        "environment": {"name": "simulated"},
        "rollout": {"groups_per_step": 2, "group_size": 2, "max_new_tokens": 400, "segment_tokens": 0},
        "generator": {"slots": 8, "queued_rollouts": 4},
        "evaluation": {"tasks": 0},
        "checkpoint": {"every_steps": 2},
        "controller": {"heartbeat_timeout_s": 3.0},
    }
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values} if isinstance(values, dict) else values
    return recipes.from_table(table)


@dataclass(frozen=True)
class Fault:
    """Something breaks `at` so many seconds.

    generator: dies, and comes back after `away_s`. line: what a generator says is late by `away_s` for so long.
    learner: dies, and comes back from its last checkpoint. controller: dies, and with it all that was not committed;
    the others come back to the next one.
    """

    at: float
    kind: Literal["generator", "line", "learner", "controller"]
    away_s: float = 1.0
    index: int = 0
    """Of the generator."""


@dataclass(frozen=True)
class Schedule:
    run: config.Run
    seed: int = 0
    draw: Callable[[int], GroupDraw] | None = None
    """Lengths and rewards of a group instead of seeded ones."""
    stragglers: float = 0.0
    """Share of the rollouts that are twelve times as long."""
    failing: float = 0.0
    """Share of the episodes that fail at their end."""
    fail: frozenset[Rollout] = frozenset()
    """These fail too."""
    lost: float = 0.0
    """Share of the results that do not arrive, so that they are sent again."""
    repeated: float = 0.0
    """Share of the results that arrive twice, the second time late."""
    swap_s: tuple[float, ...] = (0.0,)
    """Seconds that a weight update takes, by generator (repeated)."""
    step_s: float = 0.5
    """Seconds of a training step."""
    request_at: float = 0.95
    turn_s: float = 0.05
    """Seconds that leaving the device takes, and for the learner taking it; where it is shared."""
    faults: tuple[Fault, ...] = ()
    tasks: TaskSource = NUMBERED

    def group(self, group_id: int) -> GroupDraw:
        if self.draw is not None:
            return self.draw(group_id)
        chance = random.Random(f"{self.seed}/{group_id}")
        size = self.run.rollout.group_size
        tokens = [max(1, round(exp(chance.gauss(2.3, 0.6)))) for _ in range(size)]
        tokens = [12 * count if chance.random() < self.stragglers else count for count in tokens]
        return GroupDraw(tokens, [float(chance.random() < 0.5) for _ in range(size)])

    def fails(self, rollout: Rollout) -> bool:
        return rollout in self.fail or random.Random(f"fails/{self.seed}/{rollout}").random() < self.failing


class Line(Client[GeneratorMessage, ToGenerator]):
    """A generator's connection, on which results fail, get lost, or arrive twice and late."""

    def __init__(self, inner: Client[GeneratorMessage, ToGenerator], world: World) -> None:
        self._inner, self._world, self._schedule = inner, world, world.schedule
        self._chance = random.Random(f"line/{world.schedule.seed}")
        self._late: list[GeneratorMessage] | None = None
        self.dead = False

    def send(self, message: GeneratorMessage) -> None:
        schedule, loop = self._schedule, asyncio.get_running_loop()
        for part in self._outcomes(message):
            if isinstance(part, Finished):
                for result in part.members:
                    self._world.ended_at.setdefault(sample(part.group_id, result), loop.time())
                if self._chance.random() < schedule.lost:
                    continue
                if self._chance.random() < schedule.repeated:
                    loop.call_later(self._chance.random() * 3, self._say, part)
            self._say(part)

    def late(self, seconds: float) -> None:
        """Nothing leaves for so long, then all of it."""
        if self._late is None:
            self._late = []
            asyncio.get_running_loop().call_later(seconds, self._flush)

    async def receive(self) -> list[ToGenerator]:
        messages = await self._inner.receive()
        now = asyncio.get_running_loop().time()
        leases = [lease for message in messages if isinstance(message, Lease) for lease in message.groups]
        for message in messages:
            if isinstance(message, Ack):
                self._world.store.check_ended(message.group_id, message.members)
        self._world.leases += [(now, lease.group_id, list(lease.members)) for lease in leases]
        return messages

    def _outcomes(self, message: GeneratorMessage) -> list[GeneratorMessage]:
        """Scripted failures take the place of results."""
        if not isinstance(message, Finished) or message.purpose != "train":
            return [message]
        fails = [result for result in message.members if self._schedule.fails((message.group_id, result.member))]
        if not fails:
            return [message]
        parts: list[GeneratorMessage] = [
            Failed(message.group_id, message.purpose, result.member, "scripted") for result in fails
        ]
        kept = [result for result in message.members if result not in fails]
        return [*parts, Finished(message.group_id, message.purpose, kept, message.weights)] if kept else parts

    def _say(self, message: GeneratorMessage) -> None:
        if self._late is not None:
            self._late.append(message)
        elif not self.dead:
            self._inner.send(message)

    def _flush(self) -> None:
        late, self._late = self._late or [], None
        for message in late:
            self._say(message)

    def _deliver(self, data: bytes) -> None:
        raise NotImplementedError

    async def _next(self) -> bytes:
        raise NotImplementedError


class Device:
    """That generator and learner share: never both are on it."""

    def __init__(self) -> None:
        self.holder: str | None = None
        self.turns: list[tuple[float, str, bool]] = []
        """(when, who, whether it took or left it)"""

    def share(self, name: str, takes: bool) -> None:
        assert self.holder in (None, name), f"{name} while {self.holder} is on the device"
        self.holder = name if takes else None
        self.turns.append((asyncio.get_running_loop().time(), name, takes))

    def died(self, name: str) -> None:
        if self.holder == name:
            self.holder = None


@dataclass
class World:
    """What a schedule left behind."""

    schedule: Schedule
    store: AuditedStore
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    lives: list[FakeLearner] = field(default_factory=list[FakeLearner])
    """The learner's, one after the other."""
    checkpoint: int = 0
    """Newest version that the learner would come back with."""
    controllers: int = 0
    seconds: float = 0.0
    """Virtual."""
    controller: Controller | None = None
    """The last one."""
    crashed: list[AuditedStore] = field(default_factory=list[AuditedStore])
    """What was on disk when a controller died."""
    leases: list[tuple[float, int, list[int]]] = field(default_factory=list[tuple[float, int, list[int]]])
    """(when, group, members) as generators got them."""
    device: Device = field(default_factory=Device)
    """In a colocated run."""
    broken: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """(what broke, whose turn on the device it was)"""
    ended_at: dict[Any, float] = field(default_factory=dict[Any, float])
    """Sample -> when a generator first said that it had ended."""

    @property
    def batches(self) -> list[MicroBatches]:
        """Of every lineage, in order."""
        return [batch for life in self.lives for batch in life.batches]

    @property
    def surviving(self) -> list[MicroBatches]:
        """The batch of each step that the weights at the end were trained on."""
        last = {batch.step: batch for batch in self.batches}
        return [last[step] for step in sorted(last)]

    @property
    def trained(self) -> list[Rollout]:
        return [(rollout.group_id, rollout.member) for batch in self.surviving for rollout in batch.rollouts]

    def report(self) -> inspection.Report:
        return inspection.report(self.store, max_staleness=self.schedule.run.staleness.max_staleness)

    def reasons(self, event: str) -> Counter[str]:
        return Counter(reason for kind, reason in self.store.ended.values() if kind == event)


def sample(group_id: int, one: RolloutResult | TrainRollout) -> tuple[Any, ...]:
    """Names what was sampled for a rollout: after a death it may have been sampled twice."""
    return group_id, one.member, *(span for sequence in one.sequences for span in sequence.spans)


def lags(batch: MicroBatches, rollout: TrainRollout) -> Counter[int]:
    """lag -> tokens"""
    found: Counter[int] = Counter()
    for sequence in rollout.sequences:
        for span in sequence.spans:
            found[max(0, batch.version - span.version)] += span.end - span.start
    return found


def stale_tokens(batch: MicroBatches, eta: int) -> int:
    return sum(count for rollout in batch.rollouts for lag, count in lags(batch, rollout).items() if lag > eta)


def num_tokens(batch: MicroBatches) -> int:
    return sum(lags(batch, rollout).total() for rollout in batch.rollouts)


async def play(
    schedule: Schedule,
    *,
    disk: Mapping[bytes, bytes] | None = None,
    checkpoint: int = 0,
    too_long_s: float = TOO_LONG_S,
) -> World:
    """Run it to its end. disk, checkpoint: what an earlier run left behind."""
    world = World(schedule, AuditedStore(schedule.run, disk), checkpoint=checkpoint)
    async with asyncio.timeout(too_long_s):
        while not await _Life.lived(world):
            world.crashed.append(world.store)
            world.store = world.store.after_crash()
    world.seconds = asyncio.get_running_loop().time()
    return world


class _Life:
    """Of one controller and of those who talk to it."""

    def __init__(self, world: World, tasks: asyncio.TaskGroup) -> None:
        self._world, self._tasks = world, tasks
        self._roles: dict[str, asyncio.Task[None]] = {}
        self._lines: dict[str, Line] = {}
        self.died = asyncio.Event()

    @classmethod
    async def lived(cls, world: World) -> bool:
        """Until the run is complete (True) or the controller dies."""
        async with asyncio.TaskGroup() as tasks:
            life = cls(world, tasks)
            await life._begin()
            ends = {life._running, tasks.create_task(life.died.wait())}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            complete = life._running.done() and life._running.result()
            await asyncio.sleep(LATENCY_S)  # goodbyes arrive
            for task in (life._running, *ends, *life._roles.values(), *life._faults):
                task.cancel()
        return complete

    async def _begin(self) -> None:
        world, run, spawn = self._world, self._world.schedule.run, self._tasks.create_task
        self._rollouts = MemoryServer(rollout_stream(), LATENCY_S)
        self._training = MemoryServer(training_stream(), LATENCY_S)
        world.controllers += 1
        world.controller = Controller(
            run,
            ledger=await Ledger.open(world.store),
            tasks=world.schedule.tasks,
            rollouts=self._rollouts,
            training=self._training,
            journal=world.journal,
        )
        self._running = spawn(world.controller.run(), name="controller")
        for index in range(run.generator.count):
            self._roles[f"generator-{index}"] = spawn(self._generate(f"generator-{index}"))
        self._roles["learner"] = spawn(self._learn())
        now = asyncio.get_running_loop().time()
        self._faults = [spawn(self._break(fault)) for fault in world.schedule.faults if fault.at > now]

    async def _break(self, fault: Fault) -> None:
        loop, world = asyncio.get_running_loop(), self._world
        await asyncio.sleep(fault.at - loop.time())
        if world.lives[-1].version >= world.schedule.run.steps:
            return  # all is trained, the last checkpoint is on its way
        name = f"generator-{fault.index % world.schedule.run.generator.count}"
        assert world.controller is not None
        world.broken.append((fault.kind, str(world.controller.status()["turn"])))
        if fault.kind == "controller":
            self.died.set()
        elif fault.kind == "line":
            self._lines[name].late(fault.away_s)
        else:
            role = "learner" if fault.kind == "learner" else name
            self._roles[role].cancel()
            self._roles[role] = self._tasks.create_task(self._come_back(role, fault.away_s))

    async def _come_back(self, role: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await (self._learn() if role == "learner" else self._generate(role))

    async def _generate(self, name: str) -> None:
        run, schedule = self._world.schedule.run, self._world.schedule
        index = int(name.removeprefix("generator-"))
        shutdown = Shutdown("", restart=True)
        while shutdown is not None and shutdown.restart:
            line = self._lines[name] = Line(self._rollouts.connect(), self._world)
            generator = FakeGenerator(
                name=name,
                share=self._share("generator"),
                turn_s=schedule.turn_s,
                transport=line,
                model=EngineModel(run.generator.slots, TOKEN_S, 0.0, schedule.swap_s[index % len(schedule.swap_s)]),
                credit=run.credit_rollouts,
                draw=schedule.group,
            )
            try:
                shutdown = await generator.run()
            finally:
                line.dead = True
                self._world.device.died("generator")

    async def _learn(self) -> None:
        world, schedule, run = self._world, self._world.schedule, self._world.schedule.run

        def done(step: int) -> None:
            if (step + 1) % run.checkpoint.every_steps == 0:
                world.checkpoint = step + 1

        def step_time(batch: MicroBatches) -> float:
            world.store.check_composed(batch)
            return schedule.step_s

        learner = FakeLearner(
            self._training.connect(),
            steps=run.steps,
            step_time=step_time,
            version=world.checkpoint,
            request_at=schedule.request_at,
            checkpoint_every=run.checkpoint.every_steps,
            on_step=done,
            share=self._share("learner"),
            turn_s=schedule.turn_s,
        )
        world.lives.append(learner)
        try:
            await learner.run()
        finally:
            world.device.died("learner")

    def _share(self, name: str) -> Callable[[bool], None] | None:
        """None: it has a device of its own."""
        return partial(self._world.device.share, name) if self._world.schedule.run.colocated else None
