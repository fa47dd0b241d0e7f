"""The promises of DESIGN.md 1 on random schedules: arrivals, stragglers, failures, deaths, returns, weight updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from audit import WatchedBudget
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schedules import Fault, Schedule, World, lags, num_tokens, play, recipe, sample, stale_tokens

from async_rl.errors import UserError
from async_rl.ledger import inspection, records
from async_rl.ledger.records import RunRecord
from async_rl.simulate.virtual_loop import run_virtual
from async_rl.simulate.workload import GroupDraw

OnStale = Literal["mask", "drop", "wait"]
runs = settings(max_examples=100, derandomize=True)


def lagging_weights(on_stale: OnStale) -> Schedule:
    """Once it masked more than the budget, unseen, and then waited for ever to pay it back."""
    run = recipe(
        steps=4,
        rollout={"groups_per_step": 1, "group_size": 4, "segment_tokens": 7},
        generator={"count": 2, "slots": 16, "queued_rollouts": 0},
        staleness={"max_staleness": 2, "on_stale": on_stale},
        checkpoint={"every_steps": 3},
    )
    return Schedule(run, seed=5151, stragglers=0.1, swap_s=(0.5, 2.0), request_at=0.0)


def partial_rollouts() -> Schedule:
    """Once nobody counted what a lease had sampled when it was handed back, as long as no weights changed."""
    run = recipe(
        steps=4,
        rollout={"groups_per_step": 4, "group_size": 1, "lease_tokens": 25},
        generator={"slots": 2},
        staleness={"max_staleness": 1},
        checkpoint={"every_steps": 1},
    )
    return Schedule(run, request_at=0.0)


faults = st.builds(
    Fault,
    at=st.floats(0.01, 8.0),
    kind=st.sampled_from(["generator", "line", "learner", "controller"]),
    away_s=st.sampled_from([0.01, 0.5, 2.0, 6.0]),  # 3 s of silence are a death
    index=st.integers(0, 4),
)


@st.composite
def schedules(draw: Callable[[Any], Any], on_stale: OnStale, *, friendly: bool = False) -> Schedule:
    """friendly: nothing breaks, and weights are live everywhere as soon as they are announced."""
    group_size = draw(st.integers(1, 4))
    run = recipe(
        steps=draw(st.integers(2, 7)),
        rollout={
            "groups_per_step": draw(st.integers(1, 4)),
            "group_size": group_size,
            "filter": draw(st.sampled_from(["none", "uniform"])) if group_size > 1 else "none",
            "segment_tokens": draw(st.sampled_from([0, 7])),
            "lease_tokens": draw(st.sampled_from([0, 25])),
        },
        generator={
            "count": draw(st.integers(1, 5)),
            "slots": draw(st.sampled_from([2, 4, 16])),
            "queued_rollouts": draw(st.sampled_from([0, 4])),
        },
        staleness={
            "max_staleness": draw(st.integers(0, 4)),
            "depth": draw(st.sampled_from([None, 1, 2])),
            "on_stale": on_stale,
            "mask_budget": draw(st.sampled_from([0.0, 0.03, 0.1, 0.3])),
        },
        checkpoint={"every_steps": draw(st.integers(1, 3))},
    )
    schedule = Schedule(
        run,
        seed=draw(st.integers(0, 1000)),
        stragglers=draw(st.sampled_from([0.0, 0.1, 0.3])),
        step_s=draw(st.sampled_from([0.1, 0.5, 2.0])),
        request_at=draw(st.sampled_from([0.0, 0.5, 0.95])),
    )
    if friendly:
        return schedule
    return replace(
        schedule,
        failing=draw(st.sampled_from([0.0, 0.1])),
        lost=draw(st.sampled_from([0.0, 0.1])),
        repeated=draw(st.sampled_from([0.0, 0.3])),
        swap_s=tuple(draw(st.lists(st.sampled_from([0.0, 0.05, 0.5, 2.0]), min_size=1, max_size=3))),
        faults=tuple(draw(st.lists(faults, max_size=5))),
    )


def watched(schedule: Schedule) -> tuple[World, list[WatchedBudget]]:
    """The run, and the mask budget of each controller."""
    budgets: list[WatchedBudget] = []

    def make(*args: Any, **kwargs: Any) -> WatchedBudget:
        budgets.append(WatchedBudget(*args, **kwargs))
        return budgets[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("async_rl.controller.composer.MaskBudget", make)
        return run_virtual(play(schedule)), budgets


def check_nothing_is_lost_and_nothing_trained_twice(world: World) -> None:
    """P2. `AuditedStore` has checked every commit: conservation, one terminal event, Q * G slots a step, capacity."""
    run, report = world.schedule.run, world.report()
    assert inspection.holds(report)
    assert not any(report[state] for state in ("running", "scored", "ready", "composed")), "every rollout has ended"
    assert [batch.step for batch in world.surviving] == list(range(run.steps))
    assert len(world.trained) == len(set(world.trained)), "once per surviving lineage"
    assert {rollout for rollout, (event, _) in world.store.ended.items() if event == "trained"} == set(world.trained)
    segment = run.rollout.segment_tokens
    assert segment == 0 or report["regenerated_most"] <= segment, "at most one segment per rollout and death"
    known = {"stale", "group_too_small", "run_complete"}
    assert world.reasons("cancelled").keys() <= (known if run.staleness.on_stale == "drop" else known - {"stale"})
    first = {}
    for batch in world.batches:
        composed = first.setdefault(batch.step, batch)
        assert batch.rollouts == composed.rollouts, "a replay is what was composed, byte for byte"
        assert batch.replay or composed is batch


def check_no_token_over_eta_has_weight(world: World) -> None:
    """P1, as far as the controller goes: what it recorded of each step is what the learner, which masks by the same
    rule, has to find in the batch."""
    eta = world.schedule.run.staleness.max_staleness
    for batch in world.batches:
        record = world.store.steps[batch.step]
        found = [lags(batch, rollout) for rollout in batch.rollouts]
        assert batch.version == batch.step == record.step
        assert record.stale_tokens == stale_tokens(batch, eta)
        assert record.weighted_tokens == num_tokens(batch) - record.stale_tokens
        assert record.max_weighted_lag == max((lag for one in found for lag in one if lag <= eta), default=0) <= eta


def check_lag_counts_the_queue(world: World) -> None:
    """No weights are newer than the learner's when the rollout ended; each step since then adds one."""
    if len(world.lives) > 1:
        return  # versions come again
    done = [step.done_at for step in world.lives[0].steps]
    for batch in world.batches:
        for rollout in batch.rollouts:
            newest = sum(at <= world.ended_at[sample(rollout.group_id, rollout)] for at in done)
            assert min(lags(batch, rollout)) >= batch.version - newest


@pytest.mark.parametrize("on_stale", ["mask", "drop", "wait"])
def test_promises_hold_on_any_schedule(on_stale: OnStale) -> None:
    """The run ends (`play` has a deadline, and a virtual loop raises Deadlock); then everything is counted."""

    @runs
    @example(lagging_weights(on_stale))
    @given(schedules(on_stale))
    def check(schedule: Schedule) -> None:
        world, budgets = watched(schedule)
        check_nothing_is_lost_and_nothing_trained_twice(world)
        check_no_token_over_eta_has_weight(world)
        check_lag_counts_the_queue(world)
        masked = sum(record.stale_tokens for record in world.store.steps.values())
        if on_stale == "drop":
            assert masked == 0, "whatever breaks: what is too old leaves before the batch is formed"
        else:
            check_masking_is_paid_for(world, masked, budgets)

    check()


@pytest.mark.parametrize("kind", ["generator", "controller"])
def test_a_death_costs_a_rollout_at_most_a_segment(kind: Literal["generator", "controller"]) -> None:
    """Counted against what was reported at the last change of weights; without segments, all of that is gone."""
    lost: dict[int, list[int]] = {0: [], 7: []}

    def mixed(group: int) -> GroupDraw:
        return GroupDraw([10 if group % 3 else 150, 10], [0.0, 1.0])

    for segment_tokens, found in lost.items():
        options = {"segment_tokens": segment_tokens}
        run = recipe(steps=14, rollout=options, generator={"count": 2}, staleness={"on_stale": "off"})
        plan = Schedule(run, draw=mixed, step_s=0.3)
        for after in range(12):
            world = run_virtual(play(replace(plan, faults=(Fault(1.3 + 0.04 * after, kind, 0.5, after % 2),))))
            found.append(world.report()["regenerated_most"])
    assert max(lost[7]) <= 7 < max(lost[0]) and sum(lost[7]) > 0


@pytest.mark.parametrize("after_ms", range(9))
def test_a_crash_around_the_end_of_a_step_and_its_checkpoint(after_ms: float) -> None:
    """The learner has saved what the controller did not live to hear of: the step is trained all the same."""
    schedule = Schedule(recipe(checkpoint={"every_steps": 1}), request_at=0.0)
    done_at = run_virtual(play(schedule)).lives[0].steps[2].done_at
    crash = Fault(done_at + (after_ms - 2) / 2000, "controller")
    world = run_virtual(play(replace(schedule, faults=(crash,))))
    assert world.controllers == 2
    check_nothing_is_lost_and_nothing_trained_twice(world)


@pytest.mark.parametrize(("checkpoint", "steps_known"), [(0, 2), (3, 2)])
def test_a_checkpoint_that_does_not_belong_to_the_ledger_is_refused(checkpoint: int, steps_known: int) -> None:
    """Its rollouts are deleted, or were never sampled: rather no run than one that trains on something else."""
    run_record = RunRecord(epoch=1, lineage=1, checkpoint=2, best_known_version=steps_known)
    disk = {records.RUN: records.encode(records.RUN, run_record)}
    with pytest.raises(BaseExceptionGroup) as caught:
        run_virtual(play(Schedule(recipe()), disk=disk, checkpoint=checkpoint))
    errors = caught.value.subgroup(UserError)
    assert errors is not None and f"checkpoint is of step {checkpoint}, but the ledger has" in repr(errors)


def check_masking_is_paid_for(world: World, masked: int, budgets: list[WatchedBudget]) -> None:
    """Every masked token was doomed by a composition before. Of those, waiting could only have saved the ones of
    rollouts that decoded then and had been reported: the pressure, which never exceeds what the budget has left. So

        masked <= budget * tokens + (doomed - pressure)

    summed over compositions, where the last term is tokens that had ended in time but were passed over, and tokens that
    were over eta before anybody knew of them: the learner went back (what is sampled meanwhile is old when the steps
    since are composed already), or a generator's weights lagged by eta versions. With on_stale = wait the budget is 0.
    A controller that dies takes with it what it was still to be told, so the sum is for runs with one.
    """
    if not budgets:  # eta = 0: nothing is old, as long as the learner does not go back
        assert masked == 0 or len(world.lives) > 1
        return
    for budget in budgets:
        assert all(pressure <= doomed for pressure, doomed, _ in budget.steps)
        assert budget.share > 0 or all(pressure == 0 for pressure, _, _ in budget.steps), "it waits"
    if len(budgets) == 1:
        only = budgets[0]
        assert masked <= sum(doomed for _, doomed, _ in only.steps)
        allowed = sum(only.share * tokens for _, _, tokens in only.steps)
        assert masked <= allowed + sum(doomed - pressure for pressure, doomed, _ in only.steps)


@runs
@given(schedules("wait", friendly=True))
def test_waiting_masks_nothing(schedule: Schedule) -> None:
    """Where nothing breaks and weights are live at once: neither what decodes nor what has ended gets too old."""
    world, _ = watched(schedule)
    check_nothing_is_lost_and_nothing_trained_twice(world)
    assert not any(record.stale_tokens for record in world.store.steps.values())


@runs
@example(partial_rollouts())
@given(schedules("mask", friendly=True))
def test_masking_needs_no_excuse_where_nothing_breaks(schedule: Schedule) -> None:
    """As above with a budget: what decodes and is doomed is within it, from the first step on."""
    world, budgets = watched(schedule)
    check_nothing_is_lost_and_nothing_trained_twice(world)
    eta = schedule.run.staleness.max_staleness
    decoding = sum(
        count
        for batch in world.batches
        for rollout in batch.rollouts
        for lag, count in lags(batch, rollout).items()
        if lag > eta
        and world.ended_at[sample(rollout.group_id, rollout)] > world.store.composed_at[batch.step - lag + eta]
    )
    allowed = sum(budget.share * tokens for budget in budgets for _, _, tokens in budget.steps)
    assert decoding <= allowed
