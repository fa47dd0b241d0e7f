"""The fast lane: who is it, who moves there, and what becomes of both when something dies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from audit import Rollout
from schedules import Fault, Schedule, World, play, recipe

from async_rl import recipes
from async_rl.controller.generators import Generators, Peer
from async_rl.engines.fake import FakeEngine
from async_rl.ledger import inspection
from async_rl.simulate import command
from async_rl.simulate.cluster import simulate
from async_rl.simulate.compare import simulate as simulate_arm
from async_rl.simulate.virtual_loop import run_virtual
from async_rl.simulate.workload import GroupDraw
from async_rl.wire.messages import GroupLease, Lease, Sampling, Task

Virtual = Callable[[Any], Any]
ROOT = Path(__file__).resolve().parents[2]


def lease(group_id: int, members: int = 2) -> GroupLease:
    return GroupLease(group_id, "train", Task("t", {}), list(range(members)), Sampling(10))


class Desk:
    """Generators with credit for `credit` rollouts each, and what each of them was leased."""

    def __init__(self, count: int, credit: int = 4) -> None:
        self.sent: list[tuple[str, list[int]]] = []
        self.generators = Generators(
            self.send, lambda _: None, lambda lease: lease, timeout_s=60, silent_s=60, silence=lambda _: None
        )
        self.peers: list[Peer] = []
        for index in range(count):
            self.peers.append(self.generators.hello(f"peer-{index}", f"generator-{index}"))
            self.generators.accept(self.peers[-1], credit)

    def send(self, peer_id: str, message: object) -> None:
        assert isinstance(message, Lease)
        self.sent.append((peer_id, [lease.group_id for lease in message.groups]))

    def queue(self, *leases: GroupLease) -> dict[str, list[int]]:
        """Who gets which group."""
        self.sent.clear()
        self.generators.enqueue(leases)
        self.generators.dispatch()
        return dict(self.sent)


def desk(virtual: Virtual, check: Callable[[Desk], None], count: int = 3) -> None:
    async def main() -> None:
        made = Desk(count)
        check(made)
        made.generators.close()

    virtual(main())


def test_the_lane_takes_what_it_is_given_and_nothing_else(virtual: Virtual) -> None:
    def check(desk: Desk) -> None:
        desk.queue(lease(0), lease(1))
        assert desk.generators.room == 12
        desk.generators.keep_lane(1)
        lane = desk.generators.lane
        assert lane is not None and lane.held == 0, "the one that holds least"
        assert desk.generators.room == 8 + 1
        assert lane.id not in desk.queue(*[lease(group) for group in range(2, 9)])
        assert desk.generators.num_queued == 5, "the others are full"
        assert desk.generators.to_lane(lease(20, 3)) and lane.held == 3
        assert not desk.generators.to_lane(lease(21)), "it has credit for one more"
        desk.generators.keep_lane(0)
        assert desk.generators.lane is None and desk.generators.room == 12
        desk.generators.accept(lane, 5)
        assert desk.queue() == {lane.id: [4]}, "a generator like the others"

    desk(virtual, check)


def test_a_lane_that_dies_gives_back_what_it_had(virtual: Virtual) -> None:
    def check(desk: Desk) -> None:
        desk.generators.keep_lane(2)
        lane = desk.generators.lane
        assert lane is not None and desk.generators.to_lane(lease(0))
        desk.generators.remove(lane)
        assert desk.generators.lane is None and desk.generators.room == 8
        assert not desk.generators.to_lane(lease(1)), "there is none"
        assert [0] in desk.queue().values()

    desk(virtual, check)


def stragglers(**staleness: Any) -> Schedule:
    """Four generators, of which each gets a rollout that is much longer than a step."""
    run = recipe(
        steps=12,
        rollout={"groups_per_step": 4, "group_size": 2, "segment_tokens": 7},
        generator={"count": 4, "slots": 8, "queued_rollouts": 4},
        staleness={"max_staleness": 1, "on_stale": "wait", **staleness},
    )
    return Schedule(run, draw=lambda group: GroupDraw([10, 150 if group % 5 == 0 else 10], [0.0, 1.0]), step_s=0.3)


def moved(world: World) -> set[Rollout]:
    """Leased more than once."""
    seen: set[Rollout] = set()
    again: set[Rollout] = set()
    for _, group_id, members in world.leases:
        for member in members:
            (again if (group_id, member) in seen else seen).add((group_id, member))
    return again


def check_promises(world: World) -> None:
    report = world.report()
    assert inspection.holds(report)
    assert report["trained"] == 12 * 8 and not report["failed"]
    assert sum(record.stale_tokens for record in world.store.steps.values()) == 0


def test_those_that_are_waited_for_move_and_nothing_is_lost(virtual: Virtual) -> None:
    world = virtual(play(stragglers()))
    check_promises(world)
    long = {(group, 1) for group in range(0, 60, 5)}
    assert len(moved(world) & long) > len(moved(world) - long), "few others happened to be in time's way"
    assert not world.controller.ledger.repeats


@pytest.mark.parametrize(
    "staleness", [{"fast_lane": False}, {"on_stale": "mask", "mask_budget": 0.1}, {"max_staleness": 0}]
)
def test_nobody_moves_where_there_is_no_lane(virtual: Virtual, staleness: dict[str, Any]) -> None:
    assert not moved(virtual(play(stragglers(**staleness))))


@pytest.mark.parametrize("after_ms", range(0, 400, 25))
def test_whatever_dies_during_a_move(virtual: Virtual, after_ms: int) -> None:
    """Around the first moves: each of the generators, the controller."""
    schedule = stragglers()
    first = min(at for at, _, members in run_virtual(play(schedule)).leases if members == [1])
    for fault in (
        Fault(first - 0.1 + after_ms / 1000, "generator", 0.5, after_ms // 25 % 4),
        Fault(first - 0.1 + after_ms / 1000, "controller"),
    ):
        check_promises(virtual(play(replace(schedule, faults=(fault,)))))


@pytest.mark.parametrize("fast_lane", [True, False])
def test_real_workers_hand_back_and_go_on(virtual: Virtual, fast_lane: bool) -> None:
    """The rollout worker and its episode host on fake engines, with no segments but those of moves."""
    run = recipes.from_table(
        {
            "steps": 8,
            "model": {"tiny": {"characters": "01"}},
            "environment": {"name": "simulated"},
            "rollout": {"groups_per_step": 8, "group_size": 4, "max_new_tokens": 2000, "segment_tokens": 0},
            "generator": {"slots": 16, "count": 4},
            "staleness": {"max_staleness": 1, "on_stale": "wait", "fast_lane": fast_lane},
            "evaluation": {"tasks": 4},
        }
    )

    def engine(index: int) -> FakeEngine:
        return FakeEngine(slots=16, median_tokens=100, sigma=1.2, seconds_per_step=0.01)

    outcome = virtual(simulate(run, make_engine=engine, step_time=lambda _: 1.0, latency_s=0.001))
    report = inspection.report(outcome.store, max_staleness=1)
    assert outcome.complete and inspection.holds(report) and report["trained"] == 8 * 32
    fresh = [
        sequence.spans[0].kv_version < span.kv_version
        for batch in outcome.batches
        for rollout in batch.rollouts
        for sequence in rollout.sequences
        for span in sequence.spans[1:]
    ]
    assert any(fresh) is fast_lane, "a cache that was computed again is of newer weights"


def test_a_cluster_that_waits_is_faster_with_a_lane() -> None:
    """Although the cache of everything that moves is computed again, meanwhile the lane stands still."""
    longtail = "recipes/simulate/longtail.toml"
    small = [
        "rollout.groups_per_step=16",
        "rollout.group_size=8",
        "simulate.concurrent=256",
        "staleness.mask_budget=0.0",
    ]
    small += ["simulate.warmup_steps=4", "simulate.measured_steps=16", "simulate.pause_s=1.0"]
    found = [
        simulate_arm("asynchronous", command.load(ROOT / longtail, [*small, f"staleness.fast_lane={lane}"])).figures
        for lane in ("true", "false")
    ]
    assert [figures.masked_share for figures in found] == [0, 0]
    assert found[0].tokens_per_s > 1.02 * found[1].tokens_per_s
