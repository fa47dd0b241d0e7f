"""What users of other systems suffer from (the numbers are those of its list of twenty), one test each.

Whole runs: the real controller and ledger; where the complaint is about the generator, also the real rollout worker on
a fake engine. Their virtual seconds cost milliseconds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from schedules import TOKEN_S, Fault, Schedule, World, lags, play, recipe, sample, stale_tokens

from async_rl import config
from async_rl.controller.controller import Controller
from async_rl.engines.fake import FakeEngine
from async_rl.engines.protocol import Snapshot
from async_rl.environments.api import Environment, Policy
from async_rl.ledger import inspection
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.states import State
from async_rl.ledger.store import MemoryStore
from async_rl.rollout.host_runner import inline
from async_rl.rollout.worker import RolloutWorker
from async_rl.simulate.cluster import InstantWeights, MemoryJournal, NumberedTasks, NumberText, length_is_reward
from async_rl.simulate.fake_learner import FakeLearner
from async_rl.simulate.workload import GroupDraw
from async_rl.weights.errors import WeightsError
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.memory import MemoryServer
from async_rl.wire.messages import (
    Finished,
    GroupLease,
    HelloAck,
    Lease,
    MicroBatches,
    Sampling,
    Shutdown,
    Task,
    WeightsAnnounce,
    WeightsId,
)

Virtual = Callable[[Any], Any]
SHORT, LONG = 10, 150


def hard_and_easy(group_id: int) -> GroupDraw:
    """Every fourth task takes many steps' time."""
    return GroupDraw([LONG if group_id % 4 == 0 else SHORT] * 2, [0.0, 1.0])


def run_of(**changes: Any) -> config.Run:
    """Two groups of two, eta 2, unless told otherwise."""
    return recipe(**{"steps": 16, "staleness": {"max_staleness": 2}, **changes})


def untouched(world: World) -> bool:
    """Nothing lost, nothing twice, nothing over eta with weight."""
    return inspection.holds(world.report()) and len(world.trained) == len(set(world.trained))


# --- a real rollout worker ------------------------------------------------------------------------------------------


@dataclass
class Weights(InstantWeights):
    """Versions in `broken` do not arrive; those in `stuck` are fetched for ever."""

    broken: frozenset[int] = frozenset()
    stuck: frozenset[int] = frozenset()

    async def fetch(self, announce: WeightsAnnounce) -> Snapshot:
        if announce.weights.version in self.stuck:
            await asyncio.get_running_loop().create_future()
        if announce.weights.version in self.broken:
            raise WeightsError("the file is torn")
        return await super().fetch(announce)


@dataclass
class Record:
    """What a run with a real worker left behind."""

    batches: list[MicroBatches] = field(default_factory=list[MicroBatches])
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    store: MemoryStore = field(default_factory=MemoryStore)
    worker: RolloutWorker | None = None


def a_worker(server: MemoryServer[Any, Any], episode: Any, weights: InstantWeights, *, slots: int = 8) -> RolloutWorker:
    """Every completion has 100 tokens of 10 ms."""
    return RolloutWorker(
        name="generator-0",
        transport=server.connect(),
        engine=FakeEngine(slots=slots, max_length=600, median_tokens=100, sigma=0.0, seconds_per_step=0.01),
        environment=Environment("scripted", episode, NumberedTasks),
        text=NumberText(),
        receiver=weights,
        credit=slots,
        timeout_s=60.0,
        run_host=inline,
    )


async def with_worker(run: config.Run, *, episode: Any = length_is_reward, weights: InstantWeights) -> Record:
    record = Record()
    rollouts, training = MemoryServer(rollout_stream(), 0.001), MemoryServer(training_stream(), 0.001)
    controller = Controller(
        run,
        ledger=await Ledger.open(record.store),
        tasks=NumberedTasks(),
        rollouts=rollouts,
        training=training,
        journal=record.journal,
    )
    learner = FakeLearner(training.connect(), steps=run.steps, step_time=lambda _: 0.5, request_at=0.95)
    record.worker = a_worker(rollouts, episode, weights)
    async with asyncio.timeout(300), asyncio.TaskGroup() as tasks:
        tasks.create_task(learner.run())
        working = tasks.create_task(record.worker.run())
        assert await controller.run()
        await working
    record.batches = learner.batches
    return record


# --- the complaints -------------------------------------------------------------------------------------------------


def test_01_hard_slow_problems_are_trained(virtual: Virtual) -> None:
    """Discard-and-requeue never trains slow, hard problems (tinker-cookbook PR 822)."""
    world = virtual(play(Schedule(run_of(), draw=hard_and_easy)))
    assert Counter(event for event, _ in world.store.ended.values()) == {"trained": 64}
    hard = [(b, r) for b in world.batches for r in b.rollouts if r.group_id % 4 == 0]
    assert len(hard) == 16, "their share of what is trained is their share of what was asked"
    assert all(sum(count for lag, count in lags(b, r).items() if lag <= 2) > 0 for b, r in hard), "none is fully masked"
    dropped = virtual(play(Schedule(run_of(staleness={"max_staleness": 2, "on_stale": "drop"}), draw=hard_and_easy)))
    found = {r.group_id % 4 for b in dropped.batches[:-1] for r in b.rollouts}
    assert 0 not in found, "the workload is one that discarding fails, until nothing else is left"
    sampled = {(group_id, member) for group_id, member, *_ in dropped.ended_at if group_id % 4 == 0}
    assert sampled <= set(dropped.trained), "and what is withdrawn is not sampled to its end"


def test_02_staleness_is_bounded_after_recovery(virtual: Virtual) -> None:
    """Staleness unbounded after recovery (AReaL 1388): counters that begin at zero again allow far too much."""
    run, crash = run_of(checkpoint={"every_steps": 100}), 6.3
    for kind in ("learner", "controller"):
        world = virtual(play(Schedule(run, stragglers=0.1, faults=(Fault(crash, kind, 0.1),))))
        before, after = world.lives
        known = 1 + max(batch.step for batch in before.batches)
        assert known >= 5 and [batch.step for batch in after.batches] == list(range(16)), "it began again"
        replayed_at = after.steps[known - 1].began_at
        seen = {group for at, group, _ in world.leases if at < crash}
        fresh = [group for at, group, _ in world.leases if group not in seen and crash < at < replayed_at]
        assert not fresh, "no credit before the learner is where it was; AuditedStore checks the rest at every commit"
        assert all(step.max_weighted_lag <= 2 for step in world.store.steps.values()) and untouched(world)


@pytest.mark.parametrize(("generators", "group_size"), [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_03_capacity_is_scaled_once(virtual: Virtual, generators: int, group_size: int) -> None:
    """Capacity scaled twice, hang (AReaL PR 1396): it is (eta + v + 1) * Q groups, whoever generates."""
    run = run_of(
        steps=8,
        rollout={"groups_per_step": 3, "group_size": group_size},
        generator={"count": generators, "slots": 64, "queued_rollouts": 0},
        staleness={"max_staleness": 2, "mask_budget": 0.9},
    )
    world = virtual(play(Schedule(run, step_s=5.0)))
    for version, step in enumerate(world.lives[0].steps[:4]):
        leased = {group for at, group, _ in world.leases if at <= step.done_at}
        assert len(leased) == min(8, 2 + version + 1) * 3
    assert len(world.batches) == 8


def test_04_tokens_are_labelled_with_the_version_that_produced_them(virtual: Virtual) -> None:
    """Tokens labelled with weights that never produced them (AReaL PR 1569): versions change inside a rollout, one is
    skipped, and a label is neither that of the beginning nor that of the end."""

    async def main() -> Finished:
        server = MemoryServer(rollout_stream())
        server.epoch = 1
        worker = a_worker(server, length_is_reward, InstantWeights())

        async def direct() -> Finished:
            peer, _ = await server.receive()
            began = asyncio.get_running_loop().time()
            server.send(peer, HelloAck("generator-0/1"))
            server.send(peer, WeightsAnnounce(WeightsId(0, 4), "shared_memory"))
            server.send(peer, Lease([GroupLease(0, "train", Task("t", {"number": 0}), [0], Sampling(400))]))
            for at, version in ((0.305, 5), (0.605, 7)):
                await asyncio.sleep(began + at - asyncio.get_running_loop().time())
                server.send(peer, WeightsAnnounce(WeightsId(0, version), "shared_memory"))
            while True:
                _, messages = await server.receive()
                for message in messages:
                    if isinstance(message, Finished):
                        server.send(peer, Shutdown("enough"))
                        return message

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(worker.run())
            return await direct()

    finished = virtual(main())
    assert finished.weights == WeightsId(0, 7), "of the end"
    spans = finished.members[0].sequences[0].spans
    prompt = spans[0].start
    assert [(span.start - prompt, span.end - prompt, span.version, span.kv_version) for span in spans] == [
        (0, 31, 4, 4),  # a step of 10 ms is finished by the weights it began with
        (31, 61, 5, 4),
        (61, 100, 7, 4),
    ]


def test_05_generation_goes_on_when_an_update_fails_or_hangs(virtual: Virtual) -> None:
    """Generation paused for an update, never resumed (AReaL 1160)."""
    run = run_of(steps=6, staleness={"max_staleness": 6, "mask_budget": 0.9})
    every, some = frozenset(range(1, 7)), frozenset({1, 3})
    for weights in (Weights(broken=some), Weights(stuck=some), Weights(stuck=every)):
        record = virtual(with_worker(run, weights=weights))
        versions = {s.version for b in record.batches for r in b.rollouts for q in r.sequences for s in q.spans}
        assert len(record.batches) == 6 and not record.journal.failures
        lost = weights.broken | weights.stuck
        assert 0 in versions and not versions & lost, "what did not arrive labels nothing, and what was live sampled on"
        assert lost == every or 2 in versions, "the next update goes live"


def test_06_a_filter_that_rejects_returns_the_credit(virtual: Virtual) -> None:
    """A filter rejects, wait() for ever (AReaL 588): here it rejects more than is ever admitted at once."""
    run = run_of(rollout={"filter": "uniform"})

    def draw(group_id: int) -> GroupDraw:
        return GroupDraw([SHORT, SHORT], [0.0, float(group_id >= 40)])

    world = virtual(play(Schedule(run, draw=draw)))
    assert world.reasons("filtered") == {"uniform_rewards": 80}
    assert min(group_id for group_id, _ in world.trained) == 40 and len(world.batches) == 16
    assert untouched(world)


def test_07_a_batch_that_is_one_short_says_what_it_waits_for(virtual: Virtual) -> None:
    """Buffer stuck at 127 of 128 for 29 h, no error (SkyRL 1173)."""
    run = run_of(
        steps=2,
        rollout={"max_new_tokens": 100_000, "group_size": 4},
        learner={"microbatch_tokens": 1 << 20},
        staleness={"max_staleness": 0},
        controller={"watchdog_s": 20.0},
    )

    def draw(group_id: int) -> GroupDraw:
        return GroupDraw([SHORT, SHORT, SHORT, 4000 if group_id == 1 else SHORT], [0.0, 1.0, 0.0, 1.0])

    world = virtual(play(Schedule(run, draw=draw)))
    stuck = [line for line in world.journal.said if line.startswith("no rollout ended")]
    assert len(stuck) == 3, "every 20 of the 80 seconds, not once and not for ever"
    for part in ("no rollout ended for 20 s", "1/3 at generator-0", "4 of 8 slots are ready", "waits for step 0"):
        assert part in stuck[0]
    assert len(world.batches) == 2, "and when it ends the run goes on"
    lossy = virtual(play(Schedule(run_of(steps=6), lost=0.5, seed=3)))
    assert len(lossy.batches) == 6 and untouched(lossy), "a result that is lost on the way is sent again"


def test_09_one_straggler_does_not_wedge_a_step(virtual: Virtual) -> None:
    """One straggler in a group wedges a step (NeMo 3238)."""

    def draw(group_id: int) -> GroupDraw:
        return GroupDraw([30, 30, 30, 400 if group_id == 0 else 30], [0.0, 1.0, 0.0, 1.0])

    run = run_of(
        rollout={"groups_per_step": 4, "group_size": 4},
        generator={"slots": 64},
        staleness={"max_staleness": 2, "mask_budget": 0.1},
    )
    world = virtual(play(Schedule(run, draw=draw)))
    in_step = {(r.group_id, r.member): b.step for b in world.batches for r in b.rollouts}
    ended_at = {key[:2]: at for key, at in world.ended_at.items()}
    finished = [step.done_at for step in world.lives[0].steps]
    assert sum(at < ended_at[0, 3] for at in finished) > 6, "400 tokens take 16 steps' time; steps go on meanwhile"
    assert max(in_step[0, member] for member in range(3)) <= 2, "its siblings do not wait beyond the bound"
    straggler = next(r for b in world.batches for r in b.rollouts if (r.group_id, r.member) == (0, 3))
    batch = world.batches[in_step[0, 3]]
    assert sum(count for lag, count in lags(batch, straggler).items() if lag <= 2) > 0, "its fresh tokens are trained"
    assert straggler.baseline == {0: 0.0, 1: 1.0, 2: 0.0}, "compared with those that ended before the group was opened"


def test_10_a_dead_generator_is_noticed(virtual: Virtual) -> None:
    """Dead collector, 64 nodes idle for 3.7 h (NeMo 3488)."""
    run = run_of(generator={"count": 2, "slots": 4, "queued_rollouts": 0}, controller={"watchdog_s": 20.0})
    alive = virtual(play(Schedule(run, draw=hard_and_easy)))
    world = virtual(play(Schedule(run, draw=hard_and_easy, faults=(Fault(0.1, "generator", 1000.0, 1),))))
    assert "generator-1 is silent: what it held is leased again" in world.journal.said
    counts = Counter((group, member) for _, group, members in world.leases for member in members)
    again = {rollout for rollout, times in counts.items() if times == 2}
    assert again and again <= set(world.trained), "what it had"
    assert world.seconds < 2 * alive.seconds + run.controller.heartbeat_timeout_s and untouched(world)

    alone = run_of(generator={"count": 1}, controller={"watchdog_s": 20.0})
    world = virtual(play(Schedule(alone, faults=(Fault(1.0, "generator", 100.0),))))
    said = [line for line in world.journal.said if line.startswith("no rollout ended for 20 s")]
    assert said and "waits for a generator with credit" in said[0], "nobody is left: said, not suffered in silence"
    assert len(world.batches) == 16


def test_11_resuming_skips_no_task(virtual: Virtual) -> None:
    """Resume skipped 30 % of the prompts, exactly the long ones (NeMo PR 3599)."""
    world = virtual(play(Schedule(run_of(), draw=hard_and_easy, faults=(Fault(2.05, "controller"),))))
    (disk,) = world.crashed
    running = {
        (group.group_id, member)
        for group in disk.groups.values()
        for member, state in enumerate(group.states)
        if state == State.RUNNING
    }
    assert any(group_id % 4 == 0 for group_id, _ in running), "long ones were on their way"
    assert running <= set(world.trained)
    assert {group_id for group_id, _ in world.trained} == set(range(32)), "every task up to the cursor, none twice"
    assert untouched(world)


def test_12_a_dropped_group_does_not_pin_the_resume_position(virtual: Virtual) -> None:
    """One dropped group pins the resume position (trl 7274): from there on everything was generated again."""
    fail = frozenset({(0, 0), (0, 1), (5, 1)})
    world = virtual(play(Schedule(run_of(), fail=fail, faults=(Fault(4.03, "controller"),))))
    (disk,) = world.crashed
    assert world.reasons("failed") == {"scripted": 3} and world.reasons("cancelled") == {"group_too_small": 1}
    again = [(at, group, members) for at, group, members in world.leases if at > 4.03]
    leased = {(group, member) for _, group, members in again for member in members}
    assert not leased & disk.ended.keys(), "what has ended, dropped or trained, is not generated again"
    fresh = {group for group, _ in leased} - disk.groups.keys()
    assert min(fresh) == disk.run.next_group and disk.run.next_group > 10, "new tasks begin where the cursor was"
    assert untouched(world)


def test_13_one_failed_generation_does_not_kill_the_worker(virtual: Virtual) -> None:
    """One failed generation kills the worker (trl PR 7176): user code that raises, a prompt the engine refuses, a
    reward that is no number."""

    async def episode(task: Task, policy: Policy) -> float:
        match task["number"] % 5:
            case 1:
                raise RuntimeError("the tool is down")
            case 2:
                await policy.complete([1] * 500)
            case 3:
                await policy.complete([1])
                return float("nan")
        return len((await policy.complete([1, task["number"] + 1])).tokens) / 100

    record = virtual(with_worker(run_of(steps=4), episode=episode, weights=InstantWeights()))
    assert record.worker is not None and record.worker.shutdown == Shutdown("the run is complete")
    trained = {rollout.group_id for batch in record.batches for rollout in batch.rollouts}
    assert len(record.batches) == 4 and {group_id % 5 for group_id in trained} == {0, 4}
    reasons = " ".join(record.journal.failures)
    for reason in ("RuntimeError: the tool is down", "500", "nan"):
        assert reason in reasons
    report = inspection.report(record.store, max_staleness=2)
    assert inspection.holds(report) and report["failed"] == len(record.journal.failures) > 6


def test_14_lag_is_counted_in_the_queue(virtual: Virtual) -> None:
    """Lag not counted in the queue (prime-rl 2674): all of these were fresh when they ended, and waited since."""
    run = run_of(steps=8, staleness={"max_staleness": 3}, generator={"slots": 64})
    world = virtual(play(Schedule(run, step_s=10.0, draw=lambda _: GroupDraw([SHORT, SHORT], [0.0, 1.0]))))
    for batch, row in zip(world.batches, world.journal.rows, strict=True):
        queued = min(3, batch.step)
        found = sum((lags(batch, rollout) for rollout in batch.rollouts), Counter[int]())
        assert found == {queued: 4 * SHORT} and row["lag"]["mean"] == row["lag"]["max"] == queued
        ended = max(world.ended_at[sample(rollout.group_id, rollout)] for rollout in batch.rollouts)
        version_then = sum(step.done_at < ended for step in world.lives[0].steps)
        assert batch.version - version_then == queued, "versions that passed while it was in the queue"


def test_16_staleness_is_bounded_without_dropping_what_is_complete(virtual: Virtual) -> None:
    """No staleness control, completed groups dropped (slime 1800, 2238)."""
    schedule = Schedule(run_of(), stragglers=0.2, step_s=0.2, swap_s=(0.1,))
    off = replace(schedule, run=run_of(steps=12, staleness={"max_staleness": 1, "on_stale": "off"}))
    assert sum(stale_tokens(batch, 1) for batch in virtual(play(off)).batches) > 0, "a workload that needs control"
    for eta in (1, 2, 4):
        run = run_of(steps=12, staleness={"max_staleness": eta, "mask_budget": 0.1})
        world = virtual(play(replace(schedule, run=run)))
        assert Counter(event for event, _ in world.store.ended.values()) == {"trained": 48}, "all that was begun"
        assert len(world.ended_at) == 48, "and sampled once"
        assert 0 < max(step.max_weighted_lag for step in world.store.steps.values()) <= eta
        assert untouched(world)


def test_18_buffered_rollouts_are_trained_after_a_resume(virtual: Virtual) -> None:
    """Buffered rollouts skipped on resume (OpenRLHF 1322)."""
    crash = 12.0
    run = run_of(steps=8, checkpoint={"every_steps": 2}, generator={"slots": 64})
    world = virtual(play(Schedule(run, step_s=5.0, stragglers=0.1, faults=(Fault(crash, "controller"),))))
    (disk,) = world.crashed
    states = {(g.group_id, m): State(s) for g in disk.groups.values() for m, s in enumerate(g.states)}
    buffered = {rollout for rollout, state in states.items() if state is State.READY}
    composed = {rollout for rollout, state in states.items() if state is State.COMPOSED}
    assert len(buffered) >= 4 and composed, "something was in the buffer, and a step in progress"
    assert buffered | composed <= set(world.trained)
    for batch in world.surviving:
        for rollout in batch.rollouts:
            if (rollout.group_id, rollout.member) in buffered | composed:
                assert world.ended_at[sample(rollout.group_id, rollout)] < crash, "as it was, not sampled again"
    assert untouched(world) and TOKEN_S * SHORT < 5.0
