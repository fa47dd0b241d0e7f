"""What the composer decides, one rule at a time; and what the controller says of rollouts that do not end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from schedules import Fault, Schedule, num_tokens, play, recipe

from async_rl.controller.composer import Batch, Composer
from async_rl.errors import UserError
from async_rl.ledger.ledger import RETURNED, Group, Ledger
from async_rl.ledger.states import State
from async_rl.ledger.store import MemoryStore
from async_rl.simulate.workload import GroupDraw
from async_rl.wire.messages import RolloutResult, Segment, Sequence, Task, VersionSpan

Virtual = Callable[[Any], Any]


class Desk:
    """A composer and its ledger: steps of Q groups of G, with room for `room` rollouts."""

    @classmethod
    async def open(
        cls, *, store: MemoryStore | None = None, room: int = 1000, counted: int = 0, **changes: Any
    ) -> Desk:
        desk = cls()
        table: dict[str, Any] = {
            "steps": 100,
            "rollout": {"groups_per_step": 1, "group_size": 4},
            "staleness": {"max_staleness": 2},
        }
        for section, values in changes.items():
            table[section] = {**table.get(section, {}), **values}
        desk.store = MemoryStore() if store is None else store
        desk.ledger = await Ledger.open(desk.store)
        desk.withdrawn = []
        desk.composer = Composer(
            recipe(**table), desk.ledger, room=lambda: room, counted=lambda: counted, withdraw=desk.withdraw
        )
        desk.ledger.on_end = desk.composer.ended
        desk.size = table["rollout"]["group_size"]
        return desk

    def withdraw(self, group_id: int, members: list[int], reason: str) -> None:
        self.withdrawn.append((group_id, members, reason))

    def admit(self, version: int) -> Group:
        group = self.ledger.admit(Task("t", {}), self.size, version)
        self.composer.begun(group, range(self.size))
        return group

    def score(self, group: Group, rewards: dict[int, float], *, version: int = 0, tokens: int = 10) -> None:
        """Members end, each sampled by one version."""
        for member, reward in rewards.items():
            spans = [VersionSpan(0, tokens, version, version)]
            sequence = Sequence(bytes(4 * tokens), bytes(4 * tokens), spans)
            self.composer.scored(group.id, [RolloutResult(member, [sequence], reward)])

    def complete(self, version: int = 0) -> Group:
        group = self.admit(version)
        self.score(group, {member: float(member % 2) for member in range(self.size)}, version=version)
        return group

    def compose(self, step: int) -> Batch:
        batch = self.composer.compose(step)
        assert batch is not None
        return batch


def members(batch: Batch) -> list[tuple[int, int]]:
    return [(rollout.group_id, rollout.member) for rollout in batch.message.rollouts]


@pytest.mark.parametrize(("room", "opened_at"), [(7, 2), (9, 2), (10, 1)])
def test_finished_members_are_released_before_they_lose_tokens(virtual: Virtual, room: int, opened_at: int) -> None:
    """Admitted at version 0 with eta 2: at step 2, or one step earlier if there is room for two more groups of four
    beside the two that run."""

    async def main() -> None:
        desk = await Desk.open(room=room)
        group = desk.admit(0)
        desk.score(group, {0: 1.0, 3: 0.0})
        for step in range(3):
            assert group.opened is (step > opened_at)
            assert desk.composer.compose(step) is None, "two of four slots"
        assert group.opened and group.members(State.READY) == [0, 3]

    virtual(main())


def test_one_survivor_is_not_released(virtual: Virtual) -> None:
    async def main() -> None:
        desk = await Desk.open()
        group = desk.admit(0)
        desk.score(group, {0: 1.0})
        assert desk.composer.compose(50) is None and not group.opened, "there is nobody to compare it with"

    virtual(main())


@pytest.mark.parametrize(("group_size", "enough"), [(2, 2), (4, 2), (5, 3), (6, 3)])
def test_half_of_a_group_has_to_be_there(virtual: Virtual, group_size: int, enough: int) -> None:
    """A baseline of fewer is noise."""

    async def main() -> None:
        desk = await Desk.open(rollout={"groups_per_step": 9, "group_size": group_size})
        group = desk.admit(0)
        for member in range(enough):
            assert not group.opened
            desk.score(group, {member: float(member)})
            desk.composer.compose(50)
        assert group.opened

    virtual(main())


def test_the_baseline_is_that_of_the_moment_of_opening(virtual: Virtual) -> None:
    """Early members and late ones are compared with the same rewards, so that when a member ends cannot matter."""

    async def main() -> None:
        desk = await Desk.open()
        group = desk.admit(0)
        desk.score(group, {0: 1.0, 2: 0.0})
        assert desk.composer.compose(2) is None and group.opened
        desk.score(group, {1: 0.5})
        assert group.members(State.READY) == [0, 1, 2], "a late one needs no release of its own"
        desk.score(group, {3: 0.25})
        first = desk.compose(2)
        assert members(first) == [(0, 0), (0, 1), (0, 2), (0, 3)]
        assert {rollout.member: rollout.baseline for rollout in first.message.rollouts} == {
            member: {0: 1.0, 2: 0.0} for member in range(4)
        }

    virtual(main())


def test_a_batch_that_holds_the_whole_baseline_does_not_repeat_it(virtual: Virtual) -> None:
    async def main() -> None:
        desk = await Desk.open()
        desk.complete()
        batch = desk.compose(0)
        assert all(rollout.baseline == {} for rollout in batch.message.rollouts) and batch.early_fraction == 0.0

    virtual(main())


def test_a_group_may_be_split_and_keeps_its_baseline(virtual: Virtual) -> None:
    async def main() -> None:
        desk = await Desk.open()
        early, whole = desk.admit(0), desk.complete()
        desk.score(early, {0: 1.0, 1: 0.0})
        first = desk.compose(2)
        assert members(first) == [(0, 0), (0, 1), (1, 0), (1, 1)], "the oldest slots; the last group is cut"
        assert [rollout.baseline for rollout in first.message.rollouts] == [{}, {}, *[whole.baseline] * 2]
        assert first.early_fraction == 0.5
        desk.score(early, {2: 1.0, 3: 1.0})
        second = desk.compose(3)
        assert members(second) == [(0, 2), (0, 3), (1, 2), (1, 3)], "then what is left of them, oldest first"
        assert [rollout.baseline for rollout in second.message.rollouts] == [early.baseline] * 2 + [whole.baseline] * 2
        assert desk.ledger.unused == 0

    virtual(main())


def test_empty_slots_go_with_their_group(virtual: Virtual) -> None:
    """A failed member's slot is used up by the step of its siblings: fewer rollouts, and no slot is lost or doubled."""

    async def main() -> None:
        desk = await Desk.open(rollout={"groups_per_step": 2})
        first, second, third = desk.admit(0), desk.complete(), desk.complete()
        desk.ledger.fail(first.id, 1, "boom")
        desk.score(first, {0: 1.0, 2: 0.0, 3: 0.0})
        batch = desk.compose(0)
        assert members(batch) == [(0, 0), (0, 2), (0, 3), *[(1, member) for member in range(4)]]
        assert first.steps == second.steps == [0] * 4 and third.steps == [-1] * 4
        assert Counter(desk.ledger.live) == {State.RUNNING: 0, State.SCORED: 0, State.READY: 4, State.COMPOSED: 7}
        planned = sorted(index for rank in batch.message.plan for microbatch in rank for index in microbatch)
        assert planned == list(range(7))

    virtual(main())


def test_a_batch_of_nothing_but_empty_slots_is_not_composed(virtual: Virtual) -> None:
    """Its credit returns, and what is behind it is composed at once."""

    async def main() -> None:
        desk = await Desk.open()
        pair = [desk.admit(0), desk.admit(0)]
        for group in pair:
            desk.score(group, {0: 1.0, 1: 0.0})
        assert members(desk.compose(2)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        behind = desk.complete()
        for group in pair:
            desk.ledger.fail(group.id, 2, "boom")
            desk.ledger.fail(group.id, 3, "boom")
        assert desk.ledger.available == 8
        assert members(desk.compose(3)) == [(behind.id, member) for member in range(4)]
        assert [group.steps for group in pair] == [[2, 2, RETURNED, RETURNED]] * 2 and desk.ledger.unused == 0

    virtual(main())


def test_a_group_leaves_when_its_last_slot_was_an_empty_one(virtual: Virtual) -> None:
    """The step that used that slot names the group nowhere; its records must go all the same."""

    async def main() -> None:
        desk = await Desk.open()
        early, whole = desk.admit(0), desk.complete()
        desk.score(early, {0: 1.0, 1: 0.0})
        desk.compose(2)
        desk.ledger.fail(early.id, 2, "boom")
        desk.ledger.fail(early.id, 3, "boom")
        assert members(desk.compose(3)) == [(1, 2), (1, 3)]
        for step in (2, 3):
            desk.ledger.trained(step)
        desk.ledger.checkpoint(4)
        await desk.ledger.committed()
        assert not desk.ledger.groups and whole.over and not list(desk.store.scan(b"group/"))
        assert not list(desk.store.scan(b"payload/"))

    virtual(main())


def test_ending_a_group_by_hand_leaves_a_ledger_that_opens(virtual: Virtual) -> None:
    async def main() -> None:
        desk = await Desk.open()
        running, partly = desk.admit(0), desk.admit(0)
        desk.score(partly, {0: 1.0, 1: 0.0})
        desk.composer.compose(2)
        for group in (running, partly):
            desk.ledger.cancel(group, "run_complete")
        await desk.ledger.committed()
        again = await Ledger.open(desk.store)
        assert again.run.cancelled == 8 and not again.unused

    virtual(main())


def test_drop_takes_out_what_is_too_old_wherever_it_is(virtual: Virtual) -> None:
    """Rollouts, not groups; running ones are withdrawn, ready ones were aged by the queue."""

    async def main() -> None:
        desk = await Desk.open(staleness={"on_stale": "drop"})
        old, mixed, fresh = desk.complete(version=0), desk.admit(0), desk.complete(version=1)
        desk.score(mixed, {0: 0.0, 1: 1.0}, version=1)
        desk.composer.sampled(mixed.id, 2, 30, 0)  # members 2 and 3 still run
        desk.composer.sampled(mixed.id, 3, 30, 1)
        assert members(desk.compose(2))[0] == (old.id, 0), "lag 2 is not above eta"
        assert desk.withdrawn == []
        batch = desk.compose(3)
        assert desk.withdrawn == [(mixed.id, [2], "stale")] and mixed.states[2] is State.CANCELLED
        assert members(batch) == [(mixed.id, 0), (mixed.id, 1), (fresh.id, 0)], "one slot of four was its"
        assert desk.composer.compose(4) is None
        assert [fresh.states[m] for m in (1, 2, 3)] == [State.CANCELLED] * 3, "lag 3, in the queue all along"
        assert desk.withdrawn[1:] == [(mixed.id, [3], "stale")]

    virtual(main())


def test_drop_returns_the_credit_of_a_group_that_is_too_small(virtual: Virtual) -> None:
    async def main() -> None:
        desk = await Desk.open(staleness={"on_stale": "drop"})
        group = desk.admit(0)
        desk.score(group, {0: 1.0}, version=3)
        for member in (1, 2, 3):
            desk.composer.sampled(group.id, member, 5, 0)
        assert desk.composer.compose(3) is None
        assert Counter(group.states) == {State.CANCELLED: 4} and desk.ledger.unused == 0

    virtual(main())


def test_waiting_lasts_until_what_would_go_stale_has_ended(virtual: Virtual) -> None:
    async def main() -> None:
        desk = await Desk.open(staleness={"on_stale": "wait"})
        slow, quick = desk.admit(0), desk.complete(version=1)
        desk.composer.sampled(slow.id, 0, 1, 0)
        assert desk.composer.compose(2) is None, "one token of version 0 would be over eta at step 3"
        desk.score(slow, {member: 0.0 for member in range(3)}, version=0)
        desk.composer.sampled(slow.id, 3, 50, 1)
        batch = desk.compose(2)
        assert members(batch) == [(slow.id, 0), (slow.id, 1), (slow.id, 2), (quick.id, 0)]
        assert batch.lags.max_weighted_lag == 2 and batch.lags.stale_tokens == 0

    virtual(main())


def test_masking_waits_only_beyond_its_budget(virtual: Virtual) -> None:
    """Nine tokens of 40 are above a fifth; eight are not, and their rollout loses them later."""

    async def main() -> None:
        for doomed, allowed in ((9, False), (8, True)):
            desk = await Desk.open(staleness={"mask_budget": 0.2})
            slow = desk.admit(0)
            desk.complete(version=1)
            desk.composer.sampled(slow.id, 0, doomed, 0)
            assert (desk.composer.compose(2) is not None) is allowed
        tokens = {0: 8, 1: 12}
        spans = [VersionSpan(0, 8, 0, 0), VersionSpan(8, 20, 1, 0)]
        result = RolloutResult(0, [Sequence(bytes(80), bytes(80), spans)], 1.0)
        desk.composer.scored(slow.id, [result])
        desk.score(slow, {1: 0.0, 2: 0.0, 3: 0.0}, version=1)
        batch = desk.compose(3)
        assert batch.lags.stale_tokens == tokens[0] and num_tokens(batch.message) == sum(tokens.values()) + 30
        assert batch.message.rollouts[0].reward == 1.0, "its reward stays in the comparison"

    virtual(main())


def test_no_bound_no_release_no_wait(virtual: Virtual) -> None:
    async def main() -> None:
        desk = await Desk.open(staleness={"on_stale": "off"})
        group, whole = desk.admit(0), desk.complete(version=0)
        desk.score(group, {0: 1.0, 1: 0.0})
        desk.composer.sampled(group.id, 2, 100, 0)
        batch = desk.compose(9)
        assert members(batch) == [(whole.id, member) for member in range(4)] and not group.opened
        assert batch.lags.stale_tokens == 0 and batch.lags.max_weighted_lag == 9

    virtual(main())


def test_a_filter_judges_whole_groups(virtual: Virtual) -> None:
    """As long as all rewards are equal nobody knows; then the whole group is filtered, or released."""

    async def main() -> None:
        desk = await Desk.open(rollout={"filter": "uniform"})
        same, differs, kept = desk.admit(0), desk.admit(0), desk.admit(0)
        desk.score(same, {0: 1.0, 1: 1.0, 2: 1.0})
        desk.score(differs, {0: 1.0, 1: 1.0, 2: 1.0})
        desk.score(kept, {0: 1.0, 1: 0.0})
        assert desk.composer.compose(2) is None
        assert not same.opened and not differs.opened and kept.opened
        desk.score(same, {3: 1.0})
        desk.score(differs, {3: 0.0})
        assert Counter(same.states) == {State.FILTERED: 4} and same.steps == [RETURNED] * 4
        assert differs.opened and members(desk.compose(2)) == [(differs.id, member) for member in range(4)]

    virtual(main())


def test_the_account_survives_a_restart(virtual: Virtual) -> None:
    """What a step has to wait for is known again from the ledger: segments, and results."""

    async def main() -> None:
        desk = await Desk.open(staleness={"on_stale": "wait"})
        slow = desk.admit(0)
        desk.complete(version=1)
        tokens = [VersionSpan(0, 5, 0, 0)]
        desk.ledger.segment(Segment(slow.id, 2, 0, 0, 0, bytes(20), bytes(20), tokens))
        await desk.ledger.committed()
        again = await Desk.open(store=desk.store, counted=2, staleness={"on_stale": "wait"})
        assert again.composer.tokens(slow.id, 2) == 5 and again.composer.tokens(1, 0) == 10
        assert again.composer.compose(2) is None, "the five tokens of version 0 would be over eta at step 3"
        again.ledger.fail(slow.id, 2, "boom")
        assert members(again.compose(2)) == [(1, member) for member in range(4)]

    virtual(main())


def test_what_is_withdrawn_shows_in_the_lengths(virtual: Virtual) -> None:
    """Dropping long rollouts while they run would otherwise leave no trace of how long they were."""

    async def main() -> None:
        desk = await Desk.open(staleness={"on_stale": "drop"})
        group = desk.admit(0)
        desk.score(group, {0: 0.0, 1: 1.0, 2: 1.0}, version=1)
        desk.composer.sampled(group.id, 3, 90, 0)
        reports: list[Any] = []
        desk.ledger.on_end = lambda *event: reports.append(desk.composer.ended(*event))
        desk.compose(3)
        desk.ledger.trained(3)
        assert reports[0] is None and reports[1].submitted == 4
        assert reports[1].ratio == 10 / (120 / 4) and reports[1].biased

    virtual(main())


def test_a_recorded_step_is_composed_as_it_was(virtual: Virtual) -> None:
    async def main() -> None:
        desk = await Desk.open()
        desk.complete()
        first = desk.compose(0)
        desk.complete()
        await desk.ledger.committed()
        again = await Desk.open(store=desk.store)
        assert again.compose(0).message == first.message and not first.message.replay
        again.ledger.trained(0)
        assert again.compose(0).message.replay, "the second time there is no new event for it"

    virtual(main())


# --- rollouts that do not end ---------------------------------------------------------------------------------------


def test_the_watchdog_names_who_is_pending_and_where(virtual: Virtual) -> None:
    """Three stages at once: at a generator, scored and waiting for its group, waiting for a generator."""
    run = recipe(
        steps=1,
        rollout={"groups_per_step": 2, "group_size": 2, "max_new_tokens": 100_000},
        learner={"microbatch_tokens": 1 << 20},
        generator={"count": 2, "slots": 1, "queued_rollouts": 1},
        staleness={"max_staleness": 0},
        controller={"watchdog_s": 30.0},
    )

    def draw(group_id: int) -> GroupDraw:
        return GroupDraw([10, 2000 if group_id == 0 else 10], [0.0, 1.0])

    world = virtual(play(Schedule(run, draw=draw, faults=(Fault(0.05, "generator", 1000.0, 1),))))
    first = next(line for line in world.journal.said if line.startswith("no rollout ended for 30 s"))
    assert "0/0 is scored and waits for its group" in first
    assert "0/1 at generator-0 (0 tokens at the last report)" in first
    assert "1/0 waits for a generator with credit" in first or "1/0 at generator-0" in first
    assert "the learner waits for step 0" in first and "0 of 4 slots are ready" in first
    assert [batch.step for batch in world.batches] == [0]


def test_the_watchdog_is_quiet_while_rollouts_end(virtual: Virtual) -> None:
    world = virtual(play(Schedule(recipe(steps=20, controller={"watchdog_s": 2.0}), step_s=1.0)))
    assert world.seconds > 15 and not [line for line in world.journal.said if line.startswith("no rollout ended")]


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_what_kills_generators_is_failed_after_some_attempts(virtual: Virtual, attempts: int) -> None:
    """A long rollout is in the hands of every generator that dies here; the fourth one finishes what is left."""
    run = recipe(rollout={"attempts": attempts}, steps=2, staleness={"max_staleness": 1})

    def draw(group_id: int) -> GroupDraw:
        return GroupDraw([200, 5] if group_id == 0 else [5, 5], [0.0, 1.0])

    faults = tuple(Fault(at, "generator", 0.5) for at in (1.0, 2.5))
    world = virtual(play(Schedule(run, draw=draw, faults=faults)))
    failed = [line for line in world.journal.failures if line.startswith("0/0")]
    if attempts < 3:
        assert failed == [f"0/0: {attempts} generators died with it (rollout.attempts)"]
        assert world.store.ended[0, 1] == ("cancelled", "group_too_small")
    else:
        assert not failed and (0, 0) in world.trained
    held = [at for at, group, members in world.leases if group == 0 and 0 in members]
    assert len(held) == min(attempts, 3)


@pytest.mark.parametrize(("on_stale", "composed"), [("mask", True), ("wait", False)])
def test_waiting_leaves_no_more_than_the_next_steps_can_take(virtual: Virtual, on_stale: str, composed: bool) -> None:
    """Steps of four, eta 2. Two groups of version 0 decode, so that step 1 could take what is younger; but then eight
    rollouts would be due at step 2, which has four slots."""

    async def main() -> None:
        desk = await Desk.open(counted=1, staleness={"on_stale": on_stale})
        slow = [desk.admit(0), desk.admit(0)]
        for group in slow:
            for member in range(4):
                desk.composer.sampled(group.id, member, 5, 0)
        desk.complete(version=1)
        assert (desk.composer.compose(1) is not None) is composed
        desk.score(slow[0], dict.fromkeys(range(4), 1.0))
        if not composed:
            assert members(desk.compose(1)) == [(0, member) for member in range(4)]

    virtual(main())


def test_waiting_takes_what_is_due_first(virtual: Virtual) -> None:
    """Admitted first does not mean begun first: a rollout that waited for a slot has more time."""

    async def main() -> None:
        desk = await Desk.open(counted=2, staleness={"on_stale": "wait"})
        late, early = desk.admit(0), desk.admit(1)
        desk.score(late, dict.fromkeys(range(4), 1.0), version=2)
        desk.score(early, dict.fromkeys(range(4), 1.0), version=1)
        assert members(desk.compose(3)) == [(early.id, member) for member in range(4)]

    virtual(main())


def test_a_rollout_longer_than_the_cap_is_named(virtual: Virtual) -> None:
    async def main() -> None:
        desk = await Desk.open(learner={"microbatch_tokens": 30}, rollout={"max_new_tokens": 20})
        group = desk.admit(0)
        desk.score(group, {0: 1.0, 1: 0.0, 3: 1.0})
        desk.score(group, {2: 0.0}, tokens=31)
        with pytest.raises(UserError, match=r"rollout 2 of group 0 has 31 tokens .* write at least 31"):
            desk.composer.compose(0)

    virtual(main())
