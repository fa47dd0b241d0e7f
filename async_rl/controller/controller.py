"""The controller: one loop that admits, leases, collects, composes and keeps the clock. Tokens pass through as bytes.

    what happened                     | what may follow (`_advance`)
    ----------------------------------+---------------------------------------------------------
    a step is done: version + 1       | admission: groups while there is capacity (staleness.admission)
    a group ended                     | leases: the head of the queue to a generator with credit
    a generator has credit            | composition: Q ready groups, oldest first (batching.selection)
    the learner asked for a batch     |

Everything is an event; nothing polls. Acks and batches leave after the ledger has committed what they rest on. It knows
time only through the event loop, so it runs unchanged in virtual time (simulate.virtual_loop).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

from async_rl.batching.plan import plan
from async_rl.batching.selection import select
from async_rl.config import Run
from async_rl.controller.evaluation import Evaluations
from async_rl.controller.generators import Generators, Peer
from async_rl.errors import ProtocolError
from async_rl.ledger.ledger import Group, Ledger
from async_rl.ledger.records import StepRecord
from async_rl.ledger.states import State
from async_rl.staleness.admission import capacity, min_version
from async_rl.staleness.guard import LagHistogram, measure
from async_rl.tasks.source import TaskSource, heldout_tasks, train_task
from async_rl.telemetry.activity import Tracker
from async_rl.telemetry.journal import EvalSummary, Journal, Row, summarise
from async_rl.telemetry.usage import Usage
from async_rl.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    BatchRequest,
    CheckpointSaved,
    Credit,
    Failed,
    Finished,
    GeneratorMessage,
    GroupLease,
    Heartbeat,
    Hello,
    HelloAck,
    LearnerMessage,
    MicroBatches,
    RolloutResult,
    Sampling,
    Segment,
    Shutdown,
    StepDone,
    ToGenerator,
    ToLearner,
    TrainRollout,
    WeightGroup,
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
EVALUATION_TIMEOUT_S = 1800.0
PULSE_INTERVAL_S = 0.25
STALL_WARNING_S = 120.0
"""No step for so long: say which groups are missing, and who holds them."""

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
        self._generators = Generators(rollouts.send, self._generator_gone, timeout_s=run.controller.heartbeat_timeout_s)
        heldout = heldout_tasks(tasks, run.evaluation.tasks)
        self._evaluations = Evaluations(heldout, max_new_tokens=run.rollout.max_new_tokens)
        self._learner: str | None = None
        """Connection of the learner."""
        self._requested: int | None = None
        """The step whose batch the learner waits for."""
        self._weights_store = ""
        self._announce: WeightsAnnounce | None = None
        self._group_epoch = 0
        self._live_updates = 0
        self._histograms: dict[int, LagHistogram] = {}
        """Lags of the steps that were composed and not done."""
        self._train_metrics: dict[int, dict[str, float]] = {}
        """Means of what the environment logged, by step."""
        self._after_commit: list[Callable[[], None]] = []
        self._commit_wanted = asyncio.Event()
        self._live = asyncio.Event()
        """A generator holds weights."""
        self._trained = asyncio.Event()
        self._checkpointed = asyncio.Event()
        self._stopped = asyncio.Event()
        self._open = False
        """Training has begun: admission and composition may proceed."""
        self._closing = False
        """Training is over, or was stopped: the last checkpoint is written."""
        self._next_pulse = 0.0
        self._usage = Usage()
        self._tracker = Tracker("control", clock=self._loop.time)
        self._wall_before = journal.rows[-1]["wall_s"] if journal.rows else 0.0
        self._stall: asyncio.TimerHandle | None = None

    # --- the run, from start to end ---------------------------------------------------------------------------

    async def run(self) -> bool:
        self._pulse()
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self._serve(self._rollouts, self._from_generator), name="rollout stream"),
                tasks.create_task(self._serve(self._training, self._from_learner), name="training stream"),
                tasks.create_task(self._commit_forever(), name="commits"),
            ]
            training = tasks.create_task(self._train_to_the_end(), name="training")
            stopping = tasks.create_task(self._stopped.wait(), name="stop")
            await asyncio.wait({training, stopping}, return_when=asyncio.FIRST_COMPLETED)
            complete = training.done() and not training.cancelled() and training.exception() is None
            training.cancel()
            await self._say_goodbye(complete)
            for task in (stopping, *background):
                task.cancel()
        return complete

    def stop(self) -> None:
        """Stop so that the next start continues: a last checkpoint if there is time, nothing half-written."""
        self._stopped.set()

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
                {"name": peer.name, "groups": len(peer.leases), "weights": peer.weights and peer.weights.version}
                for peer in self._generators.peers.values()
            ],
            "learner": self._learner is not None,
            "busy": self._usage.busy(),
            "idle": self._usage.idle(),
            "last": self.journal.rows[-1] if self.journal.rows else None,
        }

    def pause(self, paused: bool) -> None:
        self.paused = paused
        self._advance()

    async def _train_to_the_end(self) -> None:
        await self._wait(self._live, START_TIMEOUT_S, self._who_is_missing)
        if self.run_config.evaluation.tasks and not self.journal.evaluations:
            await self._evaluate(self.version)
        self._open = True
        consumed = self._next_composition * self.run_config.rollout.groups_per_step
        waiting = sorted([*self.ledger.running(), *self.ledger.ready()], key=lambda group: group.id)
        running = [(i, group) for i, group in enumerate(waiting) if State.RUNNING in group.states]
        self._generators.enqueue(self._lease(group, consumed + i) for i, group in running)  # of an earlier epoch
        self._advance()
        await self._trained.wait()  # the one wait without a deadline: training takes as long as it takes
        self._usage.finish(self._loop.time())
        self._ask_everyone()
        if self.run_config.evaluation.tasks and self.journal.evaluations[-1].version < self.version:
            await self._evaluate(self.version)
        for group in [*self.ledger.running(), *self.ledger.ready()]:
            self.ledger.cancel(group, "run_complete")
        await self.ledger.committed()

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
        self.journal.evaluated(summary, samples)
        return summary

    async def _say_goodbye(self, complete: bool) -> None:
        """Checkpoint, then everybody leaves."""
        self._open, self._closing = False, True
        self._next_pulse = 0.0
        self._pulse()
        self._checkpointed.clear()
        if self._stall is not None:
            self._stall.cancel()
        self._generators.close()
        self._generators.broadcast(Shutdown("the run is complete" if complete else "the run stops"))
        if self._learner is not None:
            self._training.send(self._learner, Shutdown("the run ends", checkpoint=True))
            try:
                await self._wait(
                    self._checkpointed, FINISH_TIMEOUT_S if complete else STOP_TIMEOUT_S, lambda: "the last checkpoint"
                )
            except TimeoutError:
                if complete:
                    raise
                log.warning("stopped without a last checkpoint: the steps since the previous one will be replayed")
        if complete:
            self.journal.summary(self._summary())
        await self.ledger.committed()

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
        self._generators.dispatch()

    def _admit(self) -> None:
        if self.paused:
            return
        run, ledger = self.run_config, self.ledger
        groups = run.rollout.groups_per_step
        consumed, waiting = self._next_composition * groups, len(ledger.running()) + len(ledger.ready())
        free = capacity(
            steps_ahead=run.staleness.steps_ahead,
            version=self.version,
            groups_per_step=groups,
            consumed=consumed,
            running=waiting,
        )
        fresh: list[GroupLease] = []
        for position in range(consumed + waiting, min(consumed + waiting + free, run.steps * groups)):
            task = train_task(self._tasks, ledger.run.next_group)
            group = ledger.admit(task, run.rollout.group_size, self.version)
            fresh.append(self._lease(group, position))
        if fresh:
            self._generators.enqueue(fresh)
            self._commit_wanted.set()

    def _lease(self, group: Group, position: int) -> GroupLease:
        run = self.run_config
        version = min_version(
            steps_ahead=run.staleness.steps_ahead,
            groups_per_step=run.rollout.groups_per_step,
            position=position,
        )
        sampling = Sampling(run.rollout.max_new_tokens, run.rollout.temperature, run.seed)
        return GroupLease(group.id, "train", group.task, group.members(State.RUNNING), sampling, version)

    def _compose(self) -> None:
        """Answer the learner's request: with the recorded composition if the step was composed before a crash."""
        step = self._requested
        if step is None or step >= self.run_config.steps:
            return
        replay = step in self.ledger.steps
        if replay:
            chosen = self.ledger.steps[step].groups
        else:
            ready = [group.id for group in self.ledger.ready()]
            running = [group.id for group in self.ledger.running()]
            found = select(
                ready,
                running,
                groups=self.run_config.rollout.groups_per_step,
                overtaking=self.run_config.overtaking_groups,
            )
            if found is None:
                return
            chosen = found
        self._requested = None
        if self._usage.started is None:
            self._usage.start(self._loop.time())
            self._ask_everyone()
        results = [(group_id, self.ledger.results(self.ledger.groups[group_id])) for group_id in chosen]
        flat = [result for _, members in results for result in members]
        histogram = measure(flat, version=step, max_staleness=self.run_config.staleness.max_staleness)
        if not replay:
            record = StepRecord(
                step, chosen, histogram.weighted_tokens, histogram.stale_tokens, histogram.max_weighted_lag
            )
            self.ledger.compose(record)
        self._histograms[step], self._train_metrics[step] = histogram, _means(flat)
        batch = self._batch(step, results, replay)
        self._when_committed(lambda: self._send_learner(batch))
        self._admit()

    def _batch(self, step: int, results: list[tuple[int, list[RolloutResult]]], replay: bool) -> MicroBatches:
        rollouts = [
            TrainRollout(group_id, result.member, result.reward, result.sequences)
            for group_id, members in results
            for result in members
        ]
        lengths = [sum(len(sequence.tokens) // 4 for sequence in rollout.sequences) for rollout in rollouts]
        groups = [rollout.group_id for rollout in rollouts]
        learner = self.run_config.learner
        planned = plan(lengths, ranks=learner.ranks, cap=learner.microbatch_tokens, groups=groups)
        return MicroBatches(step, step, rollouts, planned, replay)

    @property
    def _next_composition(self) -> int:
        """Steps composed so far, in any lineage."""
        return max(self.ledger.steps, default=self.ledger.run.best_known_version - 1) + 1

    # --- commits ----------------------------------------------------------------------------------------------

    def _when_committed(self, then: Callable[[], None]) -> None:
        self._after_commit.append(then)
        self._commit_wanted.set()

    async def _commit_forever(self) -> None:
        while True:
            await self._commit_wanted.wait()
            self._commit_wanted.clear()
            callbacks, self._after_commit = self._after_commit, []
            await self.ledger.committed()
            for callback in callbacks:
                callback()

    # --- rollout stream ---------------------------------------------------------------------------------------

    async def _serve(self, server: Server[S, R], handle: Callable[[str, R], None]) -> None:
        while True:
            peer, messages = await server.receive()
            for message in messages:
                handle(peer, message)
            self._advance()
            self._pulse()

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
            case Failed(group_id, "eval", member, reason, traceback):
                self.journal.failed(group_id, member, reason, traceback)
                self._evaluations.failed(message)
                self._ended(peer, group_id, [member])
            case Finished(group_id, _, members):
                self.ledger.score(group_id, members)
                self._ended(peer, group_id, [result.member for result in members])
            case Failed(group_id, _, member, reason, traceback):
                self.journal.failed(group_id, member, reason, traceback)
                self.ledger.fail(group_id, member, reason)
                self._ended(peer, group_id, [member])
            case Credit(limit):
                peer.credit = max(peer.credit, limit)
            case Heartbeat(activity, weights):
                peer.weights = weights
                if activity is not None:
                    peer.activity = activity
                    self._usage.read(peer.name, activity)
            case WeightsLive(weights):
                peer.weights = weights
                self._live_updates += 1
                self._live.set()
            case WeightsFailed(weights, reason):
                log.warning("weights %d did not reach %s: %s", weights.version, peer.name, reason)
                self._weights_failed(peer, weights.version)
            case Segment():
                raise ProtocolError("segments are not sent in protocol version 0")

    def _ended(self, peer: Peer, group_id: int, members: list[int]) -> None:
        self._generators.ended(peer, group_id, members)
        self._when_committed(lambda: self._rollouts.send(peer.id, Ack(group_id, members)))

    def _generator_hello(self, peer_id: str, hello: Hello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            ours = PROTOCOL_VERSION
            self._rollouts.send(peer_id, Shutdown(f"you speak protocol {hello.protocol}, this controller {ours}"))
            return
        peer = self._generators.hello(peer_id, hello.name)
        peer.weights = hello.weights
        self._rollouts.send(peer_id, HelloAck(f"{hello.name}/{hello.pid}"))
        self._regroup()
        if self._announce is not None and self._announce.transport == "shared_memory":
            self._rollouts.send(peer_id, self._announce)

    def _generator_gone(self, name: str) -> None:
        self.journal.say(f"{name} is silent: what it held is leased again")
        self._regroup()
        self._advance()

    # --- weights ----------------------------------------------------------------------------------------------

    def _regroup(self) -> None:
        """The members changed: a new weight group under a new epoch. The learner then publishes again."""
        if self.run_config.weights.transport != "process_group" or self._learner is None:
            return
        self._group_epoch += 1
        members = [peer.name for peer in self._generators.peers.values()]
        group = WeightGroup(self._group_epoch, members, self._weights_store)
        self._training.send(self._learner, group)
        self._generators.broadcast(group)

    def _weights_failed(self, peer: Peer, version: int) -> None:
        current = self._announce
        if current is None or current.weights.version != version:
            return  # newer ones are on their way
        if current.transport == "process_group":
            self._regroup()
        else:
            self._rollouts.send(peer.id, current)

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
            case CheckpointSaved(version):
                self.ledger.checkpoint(version, keep=self.run_config.controller.keep_rollouts)
                if version >= self.version:
                    self._when_committed(self._checkpointed.set)
            case WeightsAnnounce():
                self._announce = message
                self._generators.broadcast(message)
            case WeightsFailed(weights, reason):
                log.warning("weights %d were not published: %s", weights.version, reason)
                self._regroup()
            case Heartbeat(activity):
                if activity is not None:
                    self._usage.read("learner", activity)

    def _learner_hello(self, peer_id: str, hello: Hello) -> None:
        version = hello.weights.version if hello.weights is not None else 0
        self._learner, self._requested, self._weights_store = None, None, hello.weights_store
        self.version = version
        self._announce = None
        if version > self.ledger.run.checkpoint:  # it was saved, and we died before we heard of it
            self.ledger.checkpoint(version, keep=self.run_config.controller.keep_rollouts)
        self.journal.rewind(version)
        lineage = self.ledger.new_lineage()
        if lineage > 0:
            self.journal.say(f"the learner continues from step {version} (lineage {lineage})")

        def welcome() -> None:  # whatever else it is sent comes after the ack, from which it learns the epoch
            self._learner = peer_id
            self._training.send(peer_id, HelloAck("learner", lineage))
            self._regroup()

        self._when_committed(welcome)
        if version >= self.run_config.steps:
            self._trained.set()

    def _step_done(self, done: StepDone) -> None:
        self.ledger.trained(done.step)
        self._commit_wanted.set()
        self.version = done.step + 1
        self._usage.read("learner", done.activity)
        self._usage.read("controller", self._tracker.activity())
        self.journal.step(self._row(done))
        self._arm_stall_warning()
        run = self.run_config
        if self.version >= run.steps:
            self._trained.set()
        elif run.evaluation.every_steps and self.version % run.evaluation.every_steps == 0:
            leases, evaluated = self._evaluations.begin(self.version)
            evaluated.add_done_callback(lambda future: self.journal.evaluated(*future.result()))
            self._generators.enqueue(leases)

    def _row(self, done: StepDone) -> Row:
        histogram, logged = self._histograms.pop(done.step), self._train_metrics.pop(done.step)
        assert self._usage.started is not None
        rows = self.journal.rows
        wall_s = self._wall_before + self._loop.time() - self._usage.started
        cpu_s = self._usage.cpu_s()
        tokens = histogram.tokens.total()
        in_window = sum(row["tokens"] for row in rows if row["epoch"] == self.ledger.run.epoch) + tokens
        return {
            **done.metrics,
            "step": done.step,
            "version": self.version,
            "lineage": done.weights.lineage,
            "epoch": self.ledger.run.epoch,
            "wall_s": wall_s,
            **{f"train_{name}": mean for name, mean in logged.items()},
            "tokens": tokens,
            "tokens_per_cpu_s": in_window / max(1e-9, sum(cpu_s.values())),
            "tokens_per_s": self._usage.tokens_per_s(),
            "busy": self._usage.busy(),
            "idle": self._usage.idle(),
            "lag": histogram.summary(),
            "masked_fraction": histogram.masked_fraction,
            "ready": self.ledger.live[State.READY],
            "running": self.ledger.live[State.RUNNING] + self.ledger.live[State.SCORED],
        }

    # --- readings ---------------------------------------------------------------------------------------------

    def _pulse(self) -> None:
        """Tell whoever watches where the run is, but not more often than a person can see."""
        now = self._loop.time()
        if now < self._next_pulse:
            return
        live = self.ledger.live
        done, total = self._evaluations.progress
        if self._closing:
            stage = "saving"
        elif total:
            stage = "evaluation"
        elif not self._live.is_set():
            stage = "starting"
        elif self._open and self.version < self.run_config.steps:
            stage, done, total = "training", live[State.READY], self.run_config.step_rollouts
        else:
            return  # from one stage to the next
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
                "live_updates": self._live_updates,
                "lineages": self.ledger.run.lineage,
            },
        )

    def _arm_stall_warning(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        self._stall = self._loop.call_later(STALL_WARNING_S, self._warn_of_stall)

    def _warn_of_stall(self) -> None:
        held = [f"group {g.id} at {self._generators.holder(g.id)}" for g in self.ledger.running()[:5]]
        self.journal.say(
            f"no step for {STALL_WARNING_S:.0f} s: {self.ledger.live[State.READY]} rollouts are ready, "
            f"{len(self.ledger.running())} groups are not ({', '.join(held) or 'none'})"
        )


def _means(results: list[RolloutResult]) -> dict[str, float]:
    names = sorted({name for result in results for name in result.metrics})
    return {name: sum(r.metrics.get(name, 0.0) for r in results) / max(1, len(results)) for name in names}
