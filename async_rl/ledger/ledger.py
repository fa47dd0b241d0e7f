"""The ledger: what happened to every rollout, one transition table above one store.

Methods change the state in memory at once and queue the records; `await committed()` returns when everything changed
so far is durable (group commit: one sync for all that waits). Conservation is checked at every commit:

    admitted = trained + filtered + failed + cancelled + running + scored + ready + composed
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from async_rl.errors import LedgerCorrupt
from async_rl.ledger import records, states
from async_rl.ledger.records import EventRecord, GroupRecord, RunRecord, StepRecord
from async_rl.ledger.states import State
from async_rl.ledger.store import Reader, Store
from async_rl.wire.messages import RolloutResult, Task, TerminalEvent

MIN_SURVIVORS = 2
"""A group of which fewer members were scored has no baseline: it is cancelled."""
Keep: TypeAlias = Literal["sample", "all", "none"]
"""Whose tokens stay when they are not needed any more: of one group a step, of all, of none."""


@dataclass(slots=True)
class Group:
    """A group that is not over; mutable, and changed only by the ledger."""

    id: int
    task: Task
    version: int
    """Learner version at admission."""
    states: list[State]
    results: dict[int, RolloutResult] = field(default_factory=dict[int, RolloutResult])
    """Scored members; dropped from memory when a step that holds them was trained on."""
    step: int = -1

    def members(self, state: State) -> list[int]:
        return [member for member, its in enumerate(self.states) if its is state]

    @property
    def ready(self) -> bool:
        return State.READY in self.states

    @property
    def over(self) -> bool:
        return all(state.terminal for state in self.states)


class Ledger:
    """Open one with `Ledger.open(store)`; it has a single owner, the controller."""

    def __init__(self, store: Store, run: RunRecord) -> None:
        self.run = run
        self.groups: dict[int, Group] = {}
        """Groups that are not over, in order of admission; trained ones leave when a checkpoint covers them."""
        self.steps: dict[int, StepRecord] = {}
        """Composed steps that no checkpoint covers yet."""
        self.live = {State.RUNNING: 0, State.SCORED: 0, State.READY: 0, State.COMPOSED: 0}
        """Rollouts by state."""
        self.repeats = 0
        """Results that arrived again and were removed."""
        self._store = store
        self._waiting: dict[int, Group] = {}
        """The groups that no step holds, in order of admission."""
        self._writes: dict[bytes, bytes | None] = {}
        self._appended = self._durable = 0
        """Changes made, and the first so many of them that are on disk."""
        self._flushing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, store: Store) -> Ledger:
        """Load what is there, check it, and begin a new run epoch.

        Raises:
            LedgerCorrupt: a record does not decode, or the counts do not add up.
        """
        ledger = cls(store, load_run(store))
        ledger._load()
        ledger._check_conservation()
        ledger.run = msgspec.structs.replace(ledger.run, epoch=ledger.run.epoch + 1)
        ledger._put(records.RUN, ledger.run)
        await ledger.committed()
        return ledger

    # --- transitions ------------------------------------------------------------------------------------------

    def admit(self, task: Task, size: int, version: int) -> Group:
        """A new group of `size` running rollouts, admitted while the learner is at `version`."""
        group = Group(self.run.next_group, task, version, [State.RUNNING] * size)
        self.groups[group.id] = self._waiting[group.id] = group
        self.live[State.RUNNING] += size
        self._count(next_group=1, admitted=size)
        self._put(records.task_key(group.id), task)
        self._put_group(group)
        return group

    def score(self, group_id: int, results: Sequence[RolloutResult]) -> None:
        """Results of members; those known already, or of a group that is over, are counted as repeats and ignored."""
        group = self.groups.get(group_id)
        new = [r for r in results if group is not None and group.states[r.member] is State.RUNNING]
        self.repeats += len(results) - len(new)
        if group is None or not new:
            return
        for result in new:
            group.results[result.member] = result
        self._move(group, [result.member for result in new], State.SCORED)
        self._put(records.payload_key(group_id, new[0].member), new)
        self._settle(group)

    def fail(self, group_id: int, member: int, reason: str) -> None:
        """A member's episode failed; the group goes on with its survivors."""
        group = self.groups.get(group_id)
        if group is None or group.states[member] is not State.RUNNING:
            self.repeats += 1
            return
        self._end(group, [member], "failed", reason)
        self._settle(group)

    def cancel(self, group: Group, reason: str) -> list[int]:
        """End every member that no step holds. Returns the members that were still running."""
        running = group.members(State.RUNNING)
        for state in (State.RUNNING, State.SCORED, State.READY):
            self._end(group, group.members(state), "cancelled", reason)
        self._forget_if_over(group)
        return running

    def compose(self, step: StepRecord) -> None:
        """These groups are the batch of the step. Commit before the learner gets it."""
        for group_id in step.groups:
            group = self._waiting.pop(group_id)
            group.step = step.step
            self._move(group, group.members(State.READY), State.COMPOSED)
        self.steps[step.step] = step
        self._put(records.step_key(step.step), step)

    def trained(self, step: int) -> bool:
        """The learner finished the step. False if it had already, in an earlier lineage: no new event then."""
        if step < self.run.best_known_version:
            return False
        for group_id in self.steps[step].groups:
            group = self.groups[group_id]
            self._end(group, group.members(State.COMPOSED), "trained", "", step)
            group.results.clear()
        self.run = msgspec.structs.replace(self.run, best_known_version=step + 1)
        return True

    def checkpoint(self, version: int, *, keep: Keep = "none") -> None:
        """A durable checkpoint holds every step below `version`: their tokens are not needed again. Those of `keep`
        (the first group of each step, or all) stay for whoever wants to read them."""
        for step in [step for step in self.steps if step < version]:
            for index, group_id in enumerate(self.steps.pop(step).groups):
                stays = keep == "all" or (keep == "sample" and index == 0)
                self._forget(self.groups.pop(group_id), keep_payloads=stays)
        self.run = msgspec.structs.replace(self.run, checkpoint=version)

    def new_lineage(self) -> int:
        """A learner that starts from a checkpoint opens a new lineage; the first one is 0."""
        lineage = self.run.lineage
        self.run = msgspec.structs.replace(self.run, lineage=lineage + 1)
        self._put(records.RUN, self.run)
        return lineage

    # --- what is there ----------------------------------------------------------------------------------------

    def running(self) -> list[Group]:
        """Groups with a running member, in order of admission."""
        return [group for group in self._waiting.values() if State.RUNNING in group.states]

    def ready(self) -> list[Group]:
        """Complete groups that no step holds, in order of admission."""
        return [group for group in self._waiting.values() if group.ready]

    def results(self, group: Group) -> list[RolloutResult]:
        """Results of the members a step holds (or would hold), read back from the store if memory let go of them."""
        if group.results:
            return [group.results[member] for member in sorted(group.results)]
        return sorted(self._payloads(group.id), key=lambda result: result.member)

    async def committed(self) -> None:
        """Returns when everything changed before the call is durable."""
        target = self._appended
        while self._durable < target:
            if self._flushing is None:
                self._flushing = asyncio.create_task(self._flush(), name="ledger flush")
            await asyncio.shield(self._flushing)

    async def close(self) -> None:
        await self.committed()
        await self._store.close()

    # --- inside -----------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        try:
            await asyncio.sleep(0)  # what this turn of the loop still has to say goes into the same commit
            self._check_conservation()
            self._put(records.RUN, self.run)
            writes, self._writes, covers = self._writes, {}, self._appended
            await self._store.commit(writes)
            self._durable = covers
        finally:
            self._flushing = None

    def _move(self, group: Group, members: Iterable[int], to: State) -> None:
        for member in members:
            old = group.states[member]
            states.check(f"{group.id}/{member}", old, to)
            group.states[member] = to
            self.live[old] -= 1
            if not to.terminal:
                self.live[to] += 1
        self._put_group(group)

    def _end(self, group: Group, members: list[int], event: TerminalEvent, reason: str, step: int = -1) -> None:
        if not members:
            return
        self._put(records.event_key(self.run.next_event), EventRecord(group.id, members, event, reason, step))
        self._count(next_event=1, **{event: len(members)})
        self._move(group, members, State[event.upper()])

    def _settle(self, group: Group) -> None:
        """When the last member ended: ready with its survivors, or too small to have a baseline."""
        if State.RUNNING in group.states:
            return
        scored = group.members(State.SCORED)
        if len(scored) >= min(MIN_SURVIVORS, len(group.states)):
            self._move(group, scored, State.READY)
        else:
            self._end(group, scored, "cancelled", "group_too_small")
            self._forget_if_over(group)

    def _forget_if_over(self, group: Group) -> None:
        if group.over:
            del self.groups[group.id], self._waiting[group.id]
            self._forget(group, keep_payloads=False)

    def _forget(self, group: Group, *, keep_payloads: bool) -> None:
        self._appended += 1
        self._writes[records.group_key(group.id)] = None
        if keep_payloads:
            return
        self._writes[records.task_key(group.id)] = None
        for member in range(len(group.states)):  # a group's results stand under the first member of each message
            self._writes[records.payload_key(group.id, member)] = None

    def _count(self, **increments: int) -> None:
        changed = {name: getattr(self.run, name) + by for name, by in increments.items()}
        self.run = msgspec.structs.replace(self.run, **changed)

    def _put(self, key: bytes, record: object) -> None:
        self._appended += 1
        self._writes[key] = records.encode(record)

    def _put_group(self, group: Group) -> None:
        self._put(records.group_key(group.id), GroupRecord(group.id, group.version, list(group.states), group.step))

    def _payloads(self, group_id: int) -> list[RolloutResult]:
        found: list[RolloutResult] = []
        for key, value in self._store.scan(records.payload_prefix(group_id)):
            found += records.decode(key, value, list[RolloutResult])
        return found

    def _load(self) -> None:
        for key, value in self._store.scan(b"group/"):
            record = records.decode(key, value, GroupRecord)
            task_key = records.task_key(record.group_id)
            task_value = self._store.get(task_key)
            if task_value is None:
                raise LedgerCorrupt(f"group {record.group_id} has no task record")
            task = records.decode(task_key, task_value, Task)
            group = Group(record.group_id, task, record.version, [State(s) for s in record.states], step=record.step)
            if not group.over:
                group.results = {result.member: result for result in self._payloads(group.id)}
            self.groups[group.id] = group
            if group.step < 0:
                self._waiting[group.id] = group
            for state in group.states:
                if not state.terminal:
                    self.live[state] += 1
        for key, value in self._store.scan(b"step/"):
            record = records.decode(key, value, StepRecord)
            if record.step >= self.run.checkpoint:
                self.steps[record.step] = record

    def _check_conservation(self) -> None:
        run, live = self.run, sum(self.live.values())
        ended = run.trained + run.filtered + run.failed + run.cancelled
        if run.admitted != ended + live:
            raise LedgerCorrupt(f"{run.admitted} rollouts were admitted, but {ended} ended and {live} are alive: {run}")


def load_run(store: Reader) -> RunRecord:
    value = store.get(records.RUN)
    return RunRecord() if value is None else records.decode(records.RUN, value, RunRecord)
