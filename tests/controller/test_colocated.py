"""Generator and learner in turns on one device, in virtual time: the real controller and ledger, whatever breaks when.

That never both are on the device is asserted by `schedules.Device`, at every turn of every run here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import Fault, Schedule, World, lags, play, recipe
from test_promises import (
    OnStale,
    check_masking_is_paid_for,
    check_no_token_over_eta_has_weight,
    check_nothing_is_lost_and_nothing_trained_twice,
    schedules,
)
from test_promises import watched as watched_budgets

from async_rl.controller import colocation
from async_rl.controller.colocation import Colocation
from async_rl.controller.turns import Event, Turn
from async_rl.engines.fake import FakeEngine
from async_rl.simulate.cluster import simulate
from async_rl.simulate.virtual_loop import run_virtual

runs = settings(max_examples=60, derandomize=True)


def colocated(schedule: Schedule) -> Schedule:
    generator = msgspec.structs.replace(schedule.run.generator, count=1)
    return replace(schedule, run=msgspec.structs.replace(schedule.run, placement="colocated", generator=generator))


def watched(schedule: Schedule) -> tuple[World, list[tuple[float, Turn]]]:
    """The run, and when each state of its controllers began."""
    began: list[tuple[float, Turn]] = []

    class Watched(Colocation):
        def _follow(self, event: Event) -> None:
            before = self.turn
            super()._follow(event)
            if self.turn is not before:
                began.append((asyncio.get_running_loop().time(), self.turn))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("async_rl.controller.controller.Colocation", Watched)
        return run_virtual(play(schedule)), began


STRAGGLING = colocated(
    Schedule(
        recipe(
            staleness={"max_staleness": 2},
            rollout={"groups_per_step": 2, "group_size": 2, "segment_tokens": 7},
            checkpoint={"every_steps": 2},
        ),
        stragglers=0.3,
        swap_s=(0.04,),
        turn_s=0.04,
    )
)


@cache
def undisturbed() -> tuple[World, list[tuple[float, Turn]]]:
    return watched(STRAGGLING)


def test_the_device_changes_hands_in_order() -> None:
    world, began = undisturbed()
    check_nothing_is_lost_and_nothing_trained_twice(world)
    order = [Turn.ROLLOUT, Turn.RELEASE, Turn.ONLOAD, Turn.TRAIN, Turn.OFFLOAD, Turn.UPDATE]
    assert [turn for _, turn in began] == (order * len(began))[: len(began)]
    turns = [(name, takes) for _, name, takes in world.device.turns]
    assert turns[0] == ("generator", True)
    assert all(first != second for first, second in pairwise(turns))


def test_unfinished_rollouts_go_on_in_the_next_turn() -> None:
    """Partial rollouts: tokens of several versions, and behind a turn the KV cache is that of the newer weights."""
    world, _ = undisturbed()
    spans = [s.spans for batch in world.batches for rollout in batch.rollouts for s in rollout.sequences]
    carried = [found for found in spans if len(found) > 1]
    assert carried
    assert all(span.kv_version == span.version for found in carried for span in found)


@pytest.mark.parametrize("eta", [0, 1, 3])
def test_a_turn_lasts_until_a_step_is_there(eta: int) -> None:
    """At eta = 0 it is the synchronous loop; else a turn of the learner may hold several steps."""
    schedule = colocated(Schedule(recipe(staleness={"max_staleness": eta}), stragglers=0.3, request_at=0.0))
    world, began = watched(schedule)
    check_nothing_is_lost_and_nothing_trained_twice(world)
    check_no_token_over_eta_has_weight(world)
    turns = Counter(turn for _, turn in began)[Turn.TRAIN]
    assert turns == 6 if eta == 0 else turns <= 6
    if eta == 0:
        assert {lag for batch in world.batches for rollout in batch.rollouts for lag in lags(batch, rollout)} == {0}


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("away_s", [0.01, 6.0])
@pytest.mark.parametrize("kind", ["generator", "line", "learner", "controller"])
@pytest.mark.parametrize("turn", Turn)
def test_a_crash_in_every_state_recovers(turn: Turn, kind: Any, away_s: float, share: float) -> None:
    """In the second turn of that kind, at its beginning or in its middle."""
    _, began = undisturbed()
    index = [number for number, (_, entered) in enumerate(began) if entered is turn][1]
    at = began[index][0] + share * (began[index + 1][0] - began[index][0]) + 1e-6
    world = run_virtual(play(replace(STRAGGLING, faults=(Fault(at, kind, away_s),))))
    assert world.broken == [(kind, turn.value)]
    check_nothing_is_lost_and_nothing_trained_twice(world)
    check_no_token_over_eta_has_weight(world)


@pytest.mark.parametrize("on_stale", ["mask", "drop", "wait"])
def test_promises_hold_on_any_schedule(on_stale: OnStale) -> None:
    @runs
    @given(schedules(on_stale), st.sampled_from([0.0, 0.05, 0.5]))
    def check(schedule: Schedule, turn_s: float) -> None:
        world, budgets = watched_budgets(replace(colocated(schedule), turn_s=turn_s))
        check_nothing_is_lost_and_nothing_trained_twice(world)
        check_no_token_over_eta_has_weight(world)
        if on_stale != "drop":
            masked = sum(record.stale_tokens for record in world.store.steps.values())
            check_masking_is_paid_for(world, masked, budgets)

    check()


def test_a_device_that_does_not_change_hands_is_named() -> None:
    """The generator never comes back: after the deadline the controller says whom it waits for, and ends."""
    _, began = undisturbed()
    at = next(time for time, turn in began if turn is Turn.RELEASE) + 1e-6
    fault = Fault(at, "generator", away_s=10 * colocation.TURN_TIMEOUT_S)
    with pytest.raises(BaseExceptionGroup) as caught:
        run_virtual(play(replace(STRAGGLING, faults=(fault,)), too_long_s=2 * colocation.TURN_TIMEOUT_S))
    assert "turn release: waited 300 s for the generator to free the device" in repr(caught.value)


@pytest.mark.parametrize("eta", [0, 2])
def test_the_real_worker_takes_turns_and_its_time_is_attributed_whole(virtual: Callable[[Any], Any], eta: int) -> None:
    run = recipe(
        placement="colocated",
        staleness={"max_staleness": eta},
        rollout={"groups_per_step": 4, "group_size": 2},
        evaluation={"tasks": 4, "every_steps": 2},
    )
    outcome = virtual(
        simulate(
            run,
            make_engine=lambda _: FakeEngine(slots=8, median_tokens=60, seconds_per_step=0.012, swap_seconds=0.2),
            step_time=lambda _: 2.0,
            latency_s=0.001,
        )
    )
    assert outcome.complete
    assert [one.version for one in outcome.journal.evaluations] == [0, 2, 4, 6]
    result = outcome.journal.result
    for role in ("generator", "learner"):
        shares = result["idle"][role]
        assert abs(result["busy"][role] + sum(shares.values()) - 1) < 1e-6
        assert shares["off_device"] > 0.1
    assert result["busy"]["generator"] + result["busy"]["learner"] < 1.0 + 1e-6, "never both at once"
    turns = [row["turns"]["seconds"] for row in outcome.journal.rows]
    assert all(row["train"] > 1.9 for row in turns)
