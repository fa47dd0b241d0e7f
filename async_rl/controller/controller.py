"""The controller: one loop that admits, leases, collects, composes and keeps the clock. Tokens pass through as bytes.

    what happened                     | what may follow (`_advance`)
    ----------------------------------+---------------------------------------------------------
    a step is done: version + 1       | admission: groups while there is capacity (staleness.admission, .budget)
    a rollout ended                   | leases: the head of the queue to a generator with credit
    a generator has credit            | composition of a step (controller.composer)
    the learner asked for a batch     |

Everything is an event; nothing polls. Acks and batches leave after the ledger has committed what they rest on. It knows
time only through the event loop, so it runs unchanged in virtual time (simulate.virtual_loop).
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from async_rl.config import Run
from async_rl.controller.alarms import Alarms
from async_rl.controller.colocation import Colocation
from async_rl.controller.commits import Commits
from async_rl.controller.composer import RUN_COMPLETE, Batch, Composer
from async_rl.controller.evaluation import Evaluations
from async_rl.controller.fast_lane import FastLane
from async_rl.controller.generators import Generators, Peer
from async_rl.controller.watchdog import Watchdog, pending_rollouts
from async_rl.controller.weight_delivery import WeightDelivery
from async_rl.errors import ProtocolError, UserError
from async_rl.ledger.ledger import Group, Ledger
from async_rl.ledger.states import State
from async_rl.staleness.admission import min_version
from async_rl.tasks.curriculum import Curriculum, make_curriculum
from async_rl.tasks.source import TaskSource, heldout_tasks, train_task
from async_rl.telemetry.activity import Tracker
from async_rl.telemetry.journal import EvalSummary, Journal, Row, summarise
from async_rl.telemetry.reading import GeneratorReading, GroupReading, Reading, Recent, telling
from async_rl.telemetry.totals import Totals
from async_rl.telemetry.usage import Usage
from async_rl.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    BatchRequest,
    Cancel,
    CheckpointSaved,
    Credit,
    DeviceHeld,
    Evaluated,
    Failed,
    Finished,
    GeneratorMessage,
    GroupLease,
    Heartbeat,
    Hello,
    HelloAck,
    LearnerMessage,
    MicroBatches,
    Positions,
    Sampling,
    Segment,
    Shutdown,
    StepDone,
    TerminalEvent,
    ToGenerator,
    ToLearner,
    WeightsAnnounce,
    WeightsFailed,
    WeightsLive,
)
from async_rl.wire.transport import Server

START_TIMEOUT_S = 300.0
"""A learner and a generator must be there, with live weights, within this time."""
STOP_TIMEOUT_S = 3.5
"""A learner that is told to stop has so long for its last checkpoint; without it, the steps since are replayed."""
FINISH_TIMEOUT_S = 600.0
SILENT_S = 3.0
"""Three heartbeats: weights do not wait for a generator that is silent for longer."""
EVALUATION_TIMEOUT_S = 1800.0
PULSE_INTERVAL_S = 0.25
RECENT_ROLLOUTS = 12
TURN_S = 0.001
"""A stream with frames at hand is read for so long; then the others have their turn."""

S = TypeVar("S")
R = TypeVar("R")

log = logging.getLogger(__name__)


class Controller:
    """`await run()` to the end of the run, or until `stop()`; returns whether the run is complete."""

    def __init__(
        self,
        run: Run,
        *,
        ledger: Ledger,
        tasks: TaskSource,
        rollouts: Server[ToGenerator, GeneratorMessage],
        training: Server[ToLearner, LearnerMessage],
        journal: Journal,
    ) -> None:
        self.run_config, self.ledger, self.journal = run, ledger, journal
        self.paused = False
        """No group is admitted while set; what runs goes on."""
        self.version = 0
        """v: batches the learner has completed in its lineage."""
        self._tasks, self._rollouts, self._training = tasks, rollouts, training
        rollouts.epoch = training.epoch = ledger.run.epoch
        self._loop = asyncio.get_running_loop()
        timeout_s = run.controller.heartbeat_timeout_s
        self._generators = Generators(
            rollouts.send,
            self._generator_gone,
            self._lease_again,
            timeout_s=timeout_s,
            silent_s=SILENT_S,
            silence=lambda peer: self._weights.silence(peer),
        )
        heldout = heldout_tasks(tasks, run.evaluation.tasks)
        self._evaluations = Evaluations(heldout, max_new_tokens=run.rollout.max_new_tokens)
        self._learner: str | None = None
        """Connection of the learner."""
        self._requested: int | None = None
        """The step whose batch the learner waits for."""
        self._totals = Totals(run.staleness.max_staleness)
        self._weights = WeightDelivery(
            run.weights.transport,
            self._generators,
            to_generator=rollouts.send,
            to_learner=self._send_learner,
            say=journal.say,
            totals=self._totals,
            clock=self._loop.time,
        )
        self._composer = Composer(
            run,
            ledger,
            room=lambda: self._generators.room,
            counted=lambda: self._generators.counted,
            withdraw=self._withdraw,
        )
        self._lane = FastLane(self._generators, self._composer, rollouts.send)
        self._alarms = Alarms(run, journal.say)
        self.recent: deque[Recent] = deque(maxlen=RECENT_ROLLOUTS)
        """Rollouts of the last steps, to be looked at."""
        self._attempts: dict[tuple[int, int], int] = {}
        """How many generators died with a rollout."""
        ledger.on_end = self._rollouts_ended
        self._curriculum = self._make_curriculum()
        self._batches: dict[int, Batch] = {}
        """Those that were sent and are not done."""
        self._commits = Commits(ledger)
        self._live = asyncio.Event()
        """A generator holds weights."""
        self._trained = asyncio.Event()
        self._checkpointed = asyncio.Event()
        self._stopped = asyncio.Event()
        self._stop_timeout_s = STOP_TIMEOUT_S
        self._turns = self._colocation() if run.colocated else None
        """Of generator and learner on one device; None: each has its own."""
        self._open = False
        """Training has begun: admission and composition may proceed."""
        self._closing = False
        """Training is over, or was stopped: the last checkpoint is written."""
        self._next_pulse = 0.0
        self._usage = Usage()
        self._tracker = Tracker("control", clock=self._loop.time)
        self._wall_before = journal.rows[-1]["wall_s"] if journal.rows else 0.0
        self._watchdog = Watchdog(run.controller.watchdog_s, self._pending, journal.say)

    # --- the run, from start to end ---------------------------------------------------------------------------

    async def run(self) -> bool:
        try:
            return await self._run()
        finally:  # also when it is cancelled: no timer stays behind
            self._stop_clocks()

    async def _run(self) -> bool:
        self._pulse()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._serve(self._rollouts, self._from_generator), name="rollout stream"),
                tasks.create_task(self._serve(self._training, self._from_learner), name="training stream"),
                tasks.create_task(self._commits.run(), name="commits"),
            ]
            if self._turns is not None:
                background.append(tasks.create_task(self._turns.watch(), name="turns"))
            training = tasks.create_task(self._train_to_the_end(), name="training")
            stopping = tasks.create_task(self._stopped.wait(), name="stop")
            await asyncio.wait({training, stopping}, return_when=asyncio.FIRST_COMPLETED)
            complete = training.done() and not training.cancelled() and training.exception() is None
            training.cancel()
            await self._say_goodbye(complete)
            for task in (stopping, *background):
                task.cancel()
        return complete

    def stop(self, within_s: float = STOP_TIMEOUT_S) -> None:
        """Stop so that the next start continues: a last checkpoint if there is time, nothing half-written."""
        self._stop_timeout_s = within_s
        self._stopped.set()

    @property
    def stopping(self) -> bool:
        """It was asked to stop."""
        return self._stopped.is_set()

    async def evaluate(self) -> EvalSummary:
        """Evaluate the weights of now, while everything else goes on."""
        return await self._evaluate(self.version)

    def status(self) -> Row:
        """What the admin endpoint shows."""
        return {
            "step": self.version,
            "steps": self.run_config.steps,
            "paused": self.paused,
            "epoch": self.ledger.run.epoch,
            "rollouts": {state.name.lower(): count for state, count in self.ledger.live.items()},
            "generators": [
                {
                    "name": peer.name,
                    "groups": len(peer.leases),
                    "weights": peer.weights and peer.weights.version,
                    "engine": peer.activity.gauges if peer.activity is not None else {},
                }
                for peer in self._generators.peers.values()
            ],
            "fast_lane": self._lane.peer and self._lane.peer.name,
            "learner": self._learner is not None,
            "turn": None if self._turns is None else self._turns.turn.value,
            "may_run": None if self._composer.room == float("inf") else round(self._composer.room),
            "pending": self._pending(),
            "busy": self._usage.busy(),
            "idle": self._usage.idle(),
            "last": self.journal.rows[-1] if self.journal.rows else None,
        }

    def reading(self, name: str = "") -> Reading:
        """Everything there is to show of this moment. name: of the run."""
        learner = "absent" if self._learner is None else "trains" if self._requested is None else "waits"
        return Reading(
            run=self.run_config,
            name=name,
            at=self._loop.time(),
            stage=self._stage or "training",
            version=self.version,
            paused=self.paused,
            learner=learner,
            ledger=self.ledger.run,
            alive={state.name.lower(): count for state, count in self.ledger.live.items()},
            repeats=self.ledger.repeats,
            available=self.ledger.available,
            free=self._composer.free(self.version),
            room=self._composer.room,
            queued=self._generators.num_queued,
            lane="" if self._lane.peer is None else self._lane.peer.name,
            turn="" if self._turns is None else self._turns.turn.value,
            pending=self._pending(),
            generators=[_generator(peer) for peer in self._generators.peers.values()],
            usage=self._usage.reading(),
            totals=copy.deepcopy(self._totals),
            alarms=self._alarms.on,
            filtered=self._alarms.filtered_in_a_row,
            failed=self._alarms.failed_in_a_row,
            row=self.journal.rows[-1] if self.journal.rows else {},
            evaluation=self.journal.evaluations[-1] if self.journal.evaluations else None,
        )

    @property
    def num_waiting(self) -> int:
        """Groups with slots that no step has used."""
        return self.ledger.num_waiting

    def oldest_groups(self, most: int) -> list[GroupReading]:
        """Of those with slots that no step has used, in order of admission."""
        now, peers, found = self._loop.time(), list(self._generators.peers.values()), list[GroupReading]()
        for group in self.ledger.waiting()[:most]:
            holders = [peer for peer in peers if group.id in peer.leases]
            states = {s.name.lower(): len(group.members(s)) for s in (State.RUNNING, State.SCORED, State.READY)}
            tokens = sum(self._composer.tokens(group.id, member) for member in group.members(State.RUNNING))
            begun = min((peer.since[group.id] for peer in holders), default=None)
            names, seconds = [peer.name for peer in holders], None if begun is None else now - begun
            found.append(GroupReading(group.id, group.version, states, tokens, names, seconds))
        return found

    @property
    def _stage(self) -> str | None:
        """One of telemetry.reading.STAGES; None from one to the next."""
        if self._closing:
            return "saving"
        if self._evaluations.progress[1]:
            return "evaluation"
        if not self._live.is_set():
            return "starting"
        return "training" if self._open and self.version < self.run_config.steps else None

    def pause(self, paused: bool) -> None:
        self.paused = paused
        self._advance()

    async def _train_to_the_end(self) -> None:
        await self._wait(self._live, START_TIMEOUT_S, self._who_is_missing)
        if self.run_config.evaluation.tasks and not self.journal.evaluations:
            await self._evaluate(self.version)
        self._open = True
        self._lease_running()
        self._watchdog.start()
        self._advance()
        await self._trained.wait()  # the one wait without a deadline: training takes as long as it takes
        self._usage.finish(self._loop.time())
        self._ask_everyone()
        if self.run_config.evaluation.tasks and self.journal.evaluations[-1].version < self.version:
            await self._evaluate(self.version)
        for group in self.ledger.waiting():
            self.ledger.cancel(group, RUN_COMPLETE)
        await self.ledger.committed()

    def _lease_running(self) -> None:
        """What an earlier controller left running is leased again."""
        size = self.run_config.rollout.group_size
        used = self._composer.next_step * self.run_config.step_rollouts
        leases: list[GroupLease] = []
        for group in self.ledger.waiting():
            running = group.members(State.RUNNING)
            if running:
                self.ledger.regenerate(group, running)
                leases.append(self._lease(group, running, used // size))
            used += group.counted[0]
        self._generators.enqueue(leases)

    async def _evaluate(self, version: int) -> EvalSummary:
        leases, done = self._evaluations.begin(version)
        self._generators.enqueue(leases)
        self._generators.dispatch()
        try:
            async with asyncio.timeout(EVALUATION_TIMEOUT_S):
                summary, samples = await done
        except TimeoutError:
            raise TimeoutError(
                f"evaluation of version {version} took longer than {EVALUATION_TIMEOUT_S:.0f} s"
            ) from None
        self._evaluated(summary, samples)
        return summary

    def _evaluated(self, summary: EvalSummary, samples: Sequence[Row]) -> None:
        self._totals.evaluations += 1
        self.journal.evaluated(summary, samples)
        if self.run_config.checkpoint.keep_best:
            self._send_learner(Evaluated(summary.version, summary.reward))

    async def _say_goodbye(self, complete: bool) -> None:
        """Checkpoint, then everybody leaves."""
        self._open, self._closing = False, True
        self._next_pulse = 0.0
        self._pulse()
        self._checkpointed.clear()
        self._stop_clocks()
        self._generators.broadcast(Shutdown("the run is complete" if complete else "the run stops"))
        if self._learner is not None:
            self._training.send(self._learner, Shutdown("the run ends", checkpoint=True))
            try:
                await self._wait(
                    self._checkpointed,
                    FINISH_TIMEOUT_S if complete else self._stop_timeout_s,
                    lambda: "the last checkpoint",
                )
            except TimeoutError:
                if complete:
                    raise
                log.warning("stopped without a last checkpoint: the steps since the previous one will be replayed")
        if complete:
            self.journal.summary(self._summary())
        await self.ledger.committed()

    def _stop_clocks(self) -> None:
        """Nobody is declared gone and nothing pending is named from now on."""
        self._watchdog.stop()
        self._weights.close()
        self._generators.close()
        if self._turns is not None:
            self._turns.close()

    async def _wait(self, event: asyncio.Event, timeout_s: float, missing: Callable[[], str]) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {missing()}") from None

    def _who_is_missing(self) -> str:
        if self._learner is None:
            return "the learner to say hello"
        if not self._generators.peers:
            return "a generator to say hello"
        return "the first weights to be live at a generator"

    # --- what may follow --------------------------------------------------------------------------------------

    def _advance(self) -> None:
        if self._open:
            self._admit()
            self._compose()
            self._lane.advance()
            if self._turns is not None:
                self._turns.composed_all()
        self._generators.dispatch()

    def _admit(self) -> None:
        fresh: list[GroupLease] = []
        while not self.paused and self._composer.admissible(self.version):
            position, ledger = self._composer.position, self.ledger
            if self._curriculum is None:
                task = train_task(self._tasks, ledger.run.next_group)
            else:
                task = self._curriculum.task(ledger.run.next_group, self.version)
            group = ledger.admit(task, self.run_config.rollout.group_size, self.version)
            members = group.members(State.RUNNING)
            self._composer.begun(group, members)
            fresh.append(self._lease(group, members, position))
        if fresh:
            self._generators.enqueue(fresh)
            self._commits.want()

    def _make_curriculum(self) -> Curriculum | None:
        ledger = self.ledger
        running = [group.task.problem for group in ledger.waiting() if State.RUNNING in group.states]
        curriculum = make_curriculum(self.run_config, self._tasks, ledger.problems, running)
        if curriculum is not None:
            ledger.on_rest = lambda group: curriculum.ended(group.task.problem, group.outcomes)
        return curriculum

    def _lease(self, group: Group, members: list[int], position: int | None = None) -> GroupLease:
        """position: groups that are trained before this one; None where some of it was sampled already."""
        run = self.run_config
        version = 0
        if position is not None:
            steps_ahead, groups = run.staleness.steps_ahead, run.rollout.groups_per_step
            version = min_version(steps_ahead=steps_ahead, groups_per_step=groups, position=position)
        return GroupLease(
            group.id,
            "train",
            group.task,
            members,
            Sampling(run.rollout.max_new_tokens, run.rollout.temperature, run.seed),
            version,
            [segment for member in members for segment in group.segments.get(member, ())],
            run.rollout.segment_tokens,
            run.rollout.lease_tokens,
        )

    def _lease_again(self, lease: GroupLease) -> GroupLease | None:
        """The generator that held it is gone. Members that so many died with are failed: something in them kills."""
        left: list[int] = []
        for member in lease.members:
            key = (lease.group_id, member)
            self._lane.gone(key)
            self._attempts[key] = self._attempts.get(key, 0) + 1
            if self._attempts[key] < self.run_config.rollout.attempts:
                left.append(member)
                continue
            del self._attempts[key]
            reason = f"{self.run_config.rollout.attempts} generators died with it (rollout.attempts)"
            self._failed(Failed(lease.group_id, lease.purpose, member, reason))
        if not left:
            return None
        if lease.purpose == "eval":
            return msgspec.structs.replace(lease, members=left)
        group = self.ledger.groups[lease.group_id]
        self.ledger.regenerate(group, left)
        self._composer.begun(group, left)
        segments = [segment for member in left for segment in group.segments.get(member, ())]
        return msgspec.structs.replace(lease, members=left, segments=segments)

    def _withdraw(self, group_id: int, members: list[int], reason: str) -> None:
        """These rollouts ended while they run, or wait for a generator."""
        self._generators.forget(group_id, members)
        for member in members:
            peer = self._generators.holder(group_id, member)
            if peer is not None:
                self._rollouts.send(peer.id, Cancel(group_id, [member], reason))
                self._generators.ended(peer, group_id, [member])

    def _compose(self) -> None:
        """Answer the learner's request, if that is possible now."""
        step = self._requested
        if step is None or step >= self.run_config.steps or not self._may_compose():
            return
        batch = self._composer.compose(step)
        if batch is None:
            self._admit()  # what was dropped, or came to nothing, has returned its credit
            return
        self._requested = None
        self._alarms.composed()
        self._batches[step] = batch
        self._lane.changed(composed=True)
        if self._usage.started is None:
            self._usage.start(self._loop.time())
            self._ask_everyone()
        if self._turns is not None:
            self._turns.composed()
        self._commits.then(lambda: self._deliver(batch.message))
        self._admit()

    def _deliver(self, batch: MicroBatches) -> None:
        if self._turns is None:
            self._send_learner(batch)
        elif self._learner is not None:
            self._turns.committed(batch)

    # --- one device in turns ----------------------------------------------------------------------------------

    def _colocation(self) -> Colocation:
        generator = self.run_config.generator
        return Colocation(
            to_generator=self._generators.broadcast,
            to_learner=self._send_learner,
            version=lambda: self.version,
            generator_there=lambda: bool(self._generators.peers),
            server_s=generator.sglang.start_s if generator.engine == "sglang" else 0.0,
        )

    def _may_compose(self) -> bool:
        """On a shared device a batch ends the generator's turn: not before an evaluation, which is of one version, has
        ended in it."""
        return self._turns is None or (self._turns.may_compose and self._evaluations.progress[1] == 0)

    # --- rollout stream ---------------------------------------------------------------------------------------

    async def _serve(self, server: Server[S, R], handle: Callable[[str, R], None]) -> None:
        turn = self._loop.time()
        while True:
            peer, messages = await server.receive()
            for message in messages:
                handle(peer, message)
            self._advance()
            self._pulse()
            if self._loop.time() - turn > TURN_S:
                await asyncio.sleep(0)
                turn = self._loop.time()

    def _from_generator(self, peer_id: str, message: GeneratorMessage) -> None:
        if isinstance(message, Hello):
            self._generator_hello(peer_id, message)
            return
        peer = self._generators.peers.get(peer_id)
        if peer is None:  # its heartbeats had stopped and its leases went to others: it starts over
            self._rollouts.send(peer_id, Shutdown("your heartbeats had stopped", restart=True))
            return
        self._generators.heard(peer)
        match message:
            case Finished(purpose="eval"):
                self._evaluations.finished(message)
                self._ended(peer, message.group_id, [result.member for result in message.members])
            case Finished(group_id, _, members):
                self._composer.scored(group_id, members)
                self._alarms.scored()
                self._watchdog.progress()
                self._ended(peer, group_id, [result.member for result in members])
            case Failed(group_id, _, member):
                self._failed(message)
                self._ended(peer, group_id, [member])
            case Credit(limit):
                self._generators.accept(peer, limit)
            case Heartbeat(activity):
                if activity is not None:
                    peer.activity = activity
                    self._usage.read(peer.name, activity)
            case WeightsLive(weights, stall_s):
                self._weights.live(peer, weights, stall_s)
                self._live.set()
            case WeightsFailed(weights, reason):
                self._weights.failed(peer, weights, reason)
            case Positions(weights, sampled):
                if peer.counted is not None:
                    for group_id, member, total in sampled:
                        self._composer.sampled(group_id, member, total, peer.counted.version)
                        self.ledger.sampled(group_id, member, total)
                peer.counted = weights
                self._lane.changed()
            case Segment(group_id, member):
                self._segment(peer, message)
            case DeviceHeld():
                self._device_held("generator", message)

    def _failed(self, failed: Failed) -> None:
        self.journal.failed(failed.group_id, failed.member, failed.reason, failed.traceback)
        if failed.purpose == "eval":
            self._evaluations.failed(failed)
        elif self.ledger.fail(failed.group_id, failed.member, failed.reason):
            self._alarms.failed(failed.reason, self.journal.failures_path)

    def _segment(self, peer: Peer, segment: Segment) -> None:
        if self.ledger.segment(segment):
            self._commits.want()
        if segment.yielded:
            self._generators.ended(peer, segment.group_id, [segment.member])
            group = self.ledger.groups.get(segment.group_id)
            if group is not None and group.states[segment.member] is State.RUNNING:
                self._composer.begun(group, [segment.member])
                lease = self._lease(group, [segment.member])
                if not self._lane.takes(lease):
                    self._generators.enqueue([lease])

    def _rollouts_ended(self, group: Group, members: Sequence[int], event: TerminalEvent, reason: str) -> None:
        """Every terminal event passes here."""
        self._watchdog.progress()
        if event == "filtered":
            self._alarms.filtered()
        for member in members:
            self._attempts.pop((group.id, member), None)
            self._lane.gone((group.id, member))
        report = self._composer.ended(group, members, event, reason)
        if report is not None:
            self._alarms.cohort(report)

    def _ended(self, peer: Peer, group_id: int, members: list[int]) -> None:
        self._generators.ended(peer, group_id, members)
        self._commits.then(lambda: self._rollouts.send(peer.id, Ack(group_id, members)))

    def _generator_hello(self, peer_id: str, hello: Hello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            ours = PROTOCOL_VERSION
            self._rollouts.send(peer_id, Shutdown(f"you speak protocol {hello.protocol}, this controller {ours}"))
            return
        peer = self._generators.hello(peer_id, hello.name, hello.machine)
        peer.weights = peer.counted = hello.weights
        self._alarms.computes("generator", hello.name, hello.dtype)
        self._rollouts.send(peer_id, HelloAck(f"{hello.name}/{hello.pid}"))
        self._weights.joined(peer)
        if self._turns is not None:
            self._turns.generator_came()

    def _generator_gone(self, name: str) -> None:
        self.journal.say(f"{name} is silent: what it held is leased again")
        self._totals.generators_lost += 1
        self._weights.regroup()
        self._advance()

    # --- training stream --------------------------------------------------------------------------------------

    def _send_learner(self, message: ToLearner) -> None:
        if self._learner is not None:
            self._training.send(self._learner, message)

    def _from_learner(self, peer_id: str, message: LearnerMessage) -> None:
        if isinstance(message, Hello):
            self._learner_hello(peer_id, message)
            return
        if peer_id != self._learner:
            return  # an abandoned lineage
        match message:
            case BatchRequest(step):
                self._requested = step
            case StepDone():
                self._step_done(message)
            case CheckpointSaved(version, _, seconds):
                self._totals.checkpoint(seconds)
                self.ledger.checkpoint(version, keep=self.run_config.controller.keep_rollouts)
                if version >= self.version:
                    self._commits.then(self._checkpointed.set)
            case WeightsAnnounce():
                self._weights.announced(message)
                if self._turns is not None and message.transport == "shared_memory":
                    self._turns.weights_announced(message.weights.version)
            case WeightsFailed(weights, reason, missing):
                self._weights.group_failed(weights, reason, missing)
            case Heartbeat(activity):
                if activity is not None:
                    self._usage.read("learner", activity)
            case DeviceHeld():
                self._device_held("learner", message)

    def _learner_hello(self, peer_id: str, hello: Hello) -> None:
        version = hello.weights.version if hello.weights is not None else 0
        self._learner, self._requested = None, None
        self._weights.learner(hello.weights_store, hello.machine)
        self._alarms.computes("learner", hello.name, hello.dtype)
        self.version = version
        self._composer.attention_share = hello.attention_share
        self._recover(version)
        self.journal.rewind(version)
        lineage = self.ledger.new_lineage()
        if lineage > 0:
            self.journal.say(f"the learner continues from step {version} (lineage {lineage})")

        def welcome() -> None:  # whatever else it is sent comes after the ack, from which it learns the epoch
            self._learner = peer_id
            self._training.send(peer_id, HelloAck("learner", lineage))
            if self.run_config.checkpoint.keep_best:
                for summary in self.journal.evaluations:
                    if summary.version <= version:
                        self._send_learner(Evaluated(summary.version, summary.reward))
            self._weights.learner_ready()
            if self._turns is not None:
                self._turns.learner_came()

        self._commits.then(welcome)
        if version >= self.run_config.steps:
            self._trained.set()

    def _recover(self, version: int) -> None:
        """The learner starts from its checkpoint of this version, perhaps saved after we could no longer hear of it."""
        known = self.ledger.run
        if not known.checkpoint <= version <= self._composer.next_step:
            raise UserError(
                f"the learner's checkpoint is of step {version}, but the ledger has the rollouts of steps "
                f"{known.checkpoint} to {self._composer.next_step}: put back the checkpoint that belongs to it, or use "
                "a new run directory"
            )
        for step in range(known.best_known_version, version):
            self.ledger.trained(step)
        if version > known.checkpoint:
            self.ledger.checkpoint(version, keep=self.run_config.controller.keep_rollouts)

    def _device_held(self, role: str, held: DeviceHeld) -> None:
        if self._turns is None:
            raise ProtocolError(f"a {role} answered DeviceTurn {held.number}, but placement is 'separate'")
        self._turns.answered(role, held)

    def _step_done(self, done: StepDone) -> None:
        self.version = done.step + 1
        if self._turns is not None:
            self._turns.step_done()
        if self._open:  # generators wait for this: the rest of the step's books comes after
            self._admit()
            self._generators.dispatch()
            self._rollouts.flush()
        self.ledger.trained(done.step)
        self._commits.want()
        self._alarms.trained(done.step, done.metrics)
        self._usage.read("learner", done.activity)
        self._usage.read("controller", self._tracker.activity())
        row = self._row(done)
        self._totals.step(row)
        self.journal.step(row)
        run = self.run_config
        if self.version >= run.steps:
            self._trained.set()
        elif run.evaluation.every_steps and self.version % run.evaluation.every_steps == 0:
            leases, evaluated = self._evaluations.begin(self.version)
            evaluated.add_done_callback(lambda future: self._evaluated(*future.result()))
            self._generators.enqueue(leases)

    def _row(self, done: StepDone) -> Row:
        batch = self._batches.pop(done.step)
        self.recent.extend(Recent(done.step, one) for one in telling(batch.message.rollouts))
        assert self._usage.started is not None
        rows = self.journal.rows
        wall_s = self._wall_before + self._loop.time() - self._usage.started
        cpu_s = self._usage.cpu_s()
        tokens = batch.lags.tokens.total()
        in_window = sum(row["tokens"] for row in rows if row["epoch"] == self.ledger.run.epoch) + tokens
        return {
            **done.metrics,
            "equal_version_limit": self._alarms.mismatch_limit,
            "step": done.step,
            "version": self.version,
            "lineage": done.weights.lineage,
            "epoch": self.ledger.run.epoch,
            "wall_s": wall_s,
            **{f"train_{name}": mean for name, mean in batch.metrics.items()},
            "tokens": tokens,
            "tokens_per_cpu_s": in_window / max(1e-9, sum(cpu_s.values())),
            "tokens_per_s": self._usage.tokens_per_s(),
            "busy": self._usage.busy(),
            "idle": self._usage.idle(),
            "lag": batch.lags.summary(),
            "masked_fraction": batch.lags.masked_fraction,
            "early_fraction": batch.early_fraction,
            **({} if (changed := self._weights.changed) is None else {"weights_changed": changed}),
            **({"engine": gauges} if (gauges := self._generators.gauges()) else {}),
            **({} if (lengths := self._alarms.lengths) is None else {"length": lengths}),
            **({} if self._curriculum is None else {"curriculum": self._curriculum.row()}),
            "ready": self.ledger.live[State.READY],
            "running": self.ledger.live[State.RUNNING] + self.ledger.live[State.SCORED],
            **({} if self._turns is None else {"turns": self._turns.take_row()}),
        }

    # --- readings ---------------------------------------------------------------------------------------------

    def _pulse(self) -> None:
        """Tell whoever watches where the run is, but not more often than a person can see."""
        now = self._loop.time()
        if now < self._next_pulse:
            return
        live, stage = self.ledger.live, self._stage
        if stage is None:
            return
        done, total = self._evaluations.progress
        if stage == "training":
            done, total = live[State.READY], self.run_config.step_rollouts
        self._next_pulse = now + PULSE_INTERVAL_S
        running = live[State.RUNNING] + live[State.SCORED]
        self.journal.pulse(
            {"stage": stage, "done": done, "total": total}
            | {"ready": live[State.READY], "running": running, "version": self.version}
        )

    def _ask_everyone(self) -> None:
        self._generators.broadcast(Heartbeat())
        self._send_learner(Heartbeat())
        self._usage.read("controller", self._tracker.activity())

    def _summary(self) -> Row:
        return summarise(
            self.journal.rows,
            self.journal.evaluations,
            busy=self._usage.busy(),
            idle=self._usage.idle(),
            cpu=self._usage.cpu_s(),
            versions={
                "trained": self.version,
                "live_updates": self._weights.live_updates,
                "lineages": self.ledger.run.lineage,
            },
            regenerated=self.ledger.run.regenerated,
        )

    def _pending(self) -> list[str]:
        """What has to end, and what the learner does; empty while nothing has to."""
        if self.paused or not self.ledger.unused:
            return []
        learner = "trains" if self._requested is None else f"waits for step {self._requested}"
        if self._learner is None:
            learner = "is not there"
        ready = f"{self.ledger.available} of {self.run_config.step_rollouts} slots are ready"
        turn = [] if self._turns is None else [self._turns.said]
        return [
            *pending_rollouts(self.ledger, self._generators, self._composer),
            ready,
            f"the learner {learner}",
            *turn,
        ]


def _generator(peer: Peer) -> GeneratorReading:
    connection = "silent" if peer.silent else "live" if peer.weights is not None else "no_weights"
    version = None if peer.weights is None else peer.weights.version
    tokens, gauges = (0, dict[str, float]()) if peer.activity is None else (peer.activity.tokens, peer.activity.gauges)
    return GeneratorReading(peer.name, connection, version, peer.held, peer.free, tokens, gauges)
