"""The ledger: what happened to every rollout, one transition table above one store.

Methods change the state in memory at once and queue the records; `await committed()` returns when everything changed
so far is durable (group commit: one sync for all that waits). Conservation is checked at every commit:

    admitted = trained + filtered + failed + cancelled + running + scored + ready + composed

Credit is counted in slots, one per admitted rollout. A slot is free again when a step's batch used it or when its whole
group ended without training. A member that died leaves an empty slot, which the batch that its group's survivors go
into uses up: a batch has Q * G slots, and as many rollouts or fewer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from async_rl.errors import LedgerCorrupt
from async_rl.ledger import records, states
from async_rl.ledger.records import EventRecord, GroupRecord, ProblemRecord, RunRecord, StepRecord
from async_rl.ledger.states import State
from async_rl.ledger.store import Reader, Store
from async_rl.wire.messages import RolloutResult, Segment, Task, TerminalEvent

MIN_SURVIVORS = 2
"""A group of which fewer members were scored has no baseline: it is cancelled."""
UNUSED, RETURNED = -1, -2
"""Instead of a step: the slot waits for one; its credit was returned without one."""
Keep: TypeAlias = Literal["sample", "all", "none"]
"""Whose tokens stay when they are not needed any more: of one group a step, of all, of none."""
Filter: TypeAlias = Literal["none", "uniform"]
"""Which complete groups are not trained on: none, or those whose rewards are all equal."""
OnEnd: TypeAlias = "Callable[[Group, Sequence[int], TerminalEvent, str], None]"
"""(group, members, event, reason)"""


@dataclass(slots=True)
class Group:
    """A group of which something may still be needed; mutable, and changed only by the ledger."""

    id: int
    task: Task
    version: int
    """Learner version at admission."""
    states: list[State]
    steps: list[int]
    """[G] the step that used the member's slot, UNUSED or RETURNED."""
    baseline: dict[int, float] = field(default_factory=dict[int, float])
    """member -> reward of those that had ended when the group was opened: what advantages are relative to. It depends
    on that moment and on nothing later, so that a member's own length cannot bias it."""
    results: dict[int, RolloutResult] = field(default_factory=dict[int, RolloutResult])
    """Scored members; dropped from memory when a step that holds them was trained on."""
    segments: dict[int, list[Segment]] = field(default_factory=dict[int, list[Segment]])
    """What running members have sampled, as far as it is kept, in order."""
    sampled: dict[int, int] = field(default_factory=dict[int, int])
    """running member -> tokens it had at the last report"""
    outcomes: dict[int, float] = field(default_factory=dict[int, float])
    """scored member -> `exact` where the environment logs it, else the reward; only for problems of a curriculum, until
    nothing of the group runs any more."""
    keeps_payload: bool = False
    """Its tokens stay on disk for whoever wants to read them."""
    counted: tuple[int, int] = (0, 0)
    """(unused slots, available slots) as the ledger's totals hold them."""

    def members(self, state: State) -> list[int]:
        return [member for member, its in enumerate(self.states) if its is state]

    @property
    def opened(self) -> bool:
        """Its members may be trained on as they are there."""
        return bool(self.baseline)

    @property
    def available(self) -> list[int]:
        """Members whose slots the next step can use: the ready, and the dead of an open group."""
        if not self.baseline:
            return []
        pairs = enumerate(zip(self.states, self.steps, strict=True))
        return [m for m, (state, step) in pairs if step == UNUSED and (state is State.READY or state.terminal)]

    @property
    def over(self) -> bool:
        return all(state.terminal for state in self.states)


class Ledger:
    """Open one with `Ledger.open(store)`; it has a single owner, the controller."""

    def __init__(self, store: Store, run: RunRecord) -> None:
        self.run = run
        self.groups: dict[int, Group] = {}
        """In order of admission; a group leaves when it is over and a checkpoint covers its steps."""
        self.steps: dict[int, StepRecord] = {}
        """Composed steps that no checkpoint covers yet."""
        self.live = {State.RUNNING: 0, State.SCORED: 0, State.READY: 0, State.COMPOSED: 0}
        """Rollouts by state."""
        self.repeats = 0
        """Results that arrived again and were removed."""
        self.unused = 0
        """Slots that no step has used yet."""
        self.available = 0
        """Those of them that the next step can use."""
        self.on_end: OnEnd = _nobody_listens
        """Called with every terminal event, after it."""
        self.on_rest: Callable[[Group], ProblemRecord | None] = _learns_nothing
        """Called when nothing of a group of a curriculum runs any more, with its outcomes; returns what to keep of the
        problem, in the same commit."""
        self.problems: dict[int, ProblemRecord] = {}
        """Those of a curriculum that were tried, as they stood when the ledger was opened."""
        self.filter: Filter = "none"
        self._store = store
        self._waiting: dict[int, Group] = {}
        """Groups with unused slots, in order of admission."""
        self._open: dict[int, Group] = {}
        """Groups with available slots."""
        self._closed: dict[int, dict[int, Group]] = {}
        """Waiting groups that are not open, by their version at admission."""
        self._dirty: dict[int, Group] = {}
        """Groups whose record is out of date."""
        self._writes: dict[bytes, object | None] = {}
        """key -> record, None where it is deleted"""
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
        ledger._appended += 1
        await ledger.committed()
        return ledger

    # --- transitions ------------------------------------------------------------------------------------------

    def admit(self, task: Task, size: int, version: int) -> Group:
        """A new group of `size` running rollouts, admitted while the learner is at `version`."""
        group = Group(self.run.next_group, task, version, [State.RUNNING] * size, [UNUSED] * size)
        self.groups[group.id] = self._waiting[group.id] = group
        self._closed.setdefault(version, {})[group.id] = group
        self.live[State.RUNNING] += size
        self._count(next_group=1, admitted=size)
        self._put(records.task_key(group.id), task)
        self._changed(group)
        return group

    def segment(self, segment: Segment) -> bool:
        """Keep what a running member sampled, instead of what an earlier lease had of this call from there on; calls
        may overlap. False: it is over."""
        group = self.groups.get(segment.group_id)
        if group is None or group.states[segment.member] is not State.RUNNING:
            return False
        known = group.segments.setdefault(segment.member, [])
        for replaced in [one for one in known if one.call == segment.call and one.start >= segment.start]:
            known.remove(replaced)
            self._delete(_segment_key(replaced))
        if segment.tokens or segment.finish_reason is not None:
            known.append(segment)
            self._put(_segment_key(segment), segment)
        return True

    def sampled(self, group_id: int, member: int, total: int) -> None:
        """A running member has so many tokens, durable or not."""
        group = self.groups.get(group_id)
        if group is not None and group.states[member] is State.RUNNING and total > group.sampled.get(member, 0):
            group.sampled[member] = total
            self._dirty[group.id] = group
            self._appended += 1

    def regenerate(self, group: Group, members: Iterable[int]) -> None:
        """These members go on from what is durable of them: count what else they were known to have."""
        for member in members:
            durable = sum(len(segment.tokens) // 4 for segment in group.segments.get(member, ()))
            lost = group.sampled.pop(member, 0) - durable
            if lost > 0:
                most = max(lost, self.run.regenerated_most)
                self.run = msgspec.structs.replace(
                    self.run, regenerated=self.run.regenerated + lost, regenerated_most=most
                )
            self._dirty[group.id] = group
            self._appended += 1

    def score(self, group_id: int, results: Sequence[RolloutResult]) -> list[int]:
        """Results of members; those known already, or of a group that is over, are counted as repeats and ignored.
        Returns the members that are new."""
        group = self.groups.get(group_id)
        new = [r for r in results if group is not None and group.states[r.member] is State.RUNNING]
        self.repeats += len(results) - len(new)
        if group is None or not new:
            return []
        members = [result.member for result in new]
        for result in new:
            group.results[result.member] = result
            if group.task.problem >= 0:
                group.outcomes[result.member] = result.metrics.get("exact", result.reward)
            self._drop_segments(group, result.member)
        self._move(group, members, State.SCORED)
        self._put(records.payload_key(group_id, members[0]), new)
        if group.opened:
            self._move(group, members, State.READY)
        self._settle(group)
        return members

    def fail(self, group_id: int, member: int, reason: str) -> bool:
        """A member's episode failed; the group goes on with its survivors. False: it had ended before."""
        group = self.groups.get(group_id)
        if group is None or group.states[member] is not State.RUNNING:
            self.repeats += 1
            return False
        self._end(group, [member], "failed", reason)
        self._settle(group)
        return True

    def cancel(self, group: Group, reason: str, members: Iterable[int] | None = None) -> list[int]:
        """End these members (default: all) as far as no step holds them. Returns those that were still running."""
        chosen = range(len(group.states)) if members is None else list(members)
        ended = [m for m in chosen if group.states[m] in (State.RUNNING, State.SCORED, State.READY)]
        running = [m for m in ended if group.states[m] is State.RUNNING]
        self._end(group, ended, "cancelled", reason)
        self._settle(group)
        if members is None and group.id in self.groups:  # else the last end has done it
            self._return_unused(group)
        return running

    def open_group(self, group: Group) -> None:
        """Its scored members may be trained on from now on, and the others as they end (see Group.baseline)."""
        scored = group.members(State.SCORED)
        group.baseline = {member: group.results[member].reward for member in scored}
        self._move(group, scored, State.READY)

    def compose(self, step: StepRecord, empty: Iterable[tuple[int, Sequence[int]]] = ()) -> None:
        """The batch of a step; `empty`: (group, members) of the empty slots it uses up. Commit before the learner gets
        it."""
        for group_id, members in step.parts:
            group = self._waiting[group_id]
            self._move(group, members, State.COMPOSED)
            self._use(group, members, step.step)
        for group_id, members in empty:
            self._use(self._waiting[group_id], members, step.step)
        self.steps[step.step] = step
        self._put(records.step_key(step.step), step)

    def return_slots(self, empty: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Empty slots that fill a whole batch are given back: a step needs rollouts."""
        for group_id, members in empty:
            group = self._waiting[group_id]
            self._use(group, members, RETURNED)
            self._forget_if_done(group)

    def trained(self, step: int) -> list[Group]:
        """The learner finished the step. Returns its groups; none if it had finished it in an earlier lineage: there
        is no new event then."""
        if step < self.run.best_known_version:
            return []
        groups: list[Group] = []
        for group_id, members in self.steps[step].parts:
            group = self.groups[group_id]
            groups.append(group)
            self._end(group, members, "trained", "", step)
            for member in members:
                group.results.pop(member, None)
        record = self.steps[step]
        self.run = msgspec.structs.replace(
            self.run,
            best_known_version=step + 1,
            weighted_tokens=self.run.weighted_tokens + record.weighted_tokens,
            stale_tokens=self.run.stale_tokens + record.stale_tokens,
        )
        return groups

    def checkpoint(self, version: int, *, keep: Keep = "none") -> None:
        """A durable checkpoint holds every step below `version`: their tokens are not needed again. Those of `keep`
        (the first group of each step, or all) stay for whoever wants to read them."""
        covered = [self.steps.pop(step) for step in [step for step in self.steps if step < version]]
        self.run = msgspec.structs.replace(self.run, checkpoint=version)
        self._appended += 1
        for step in covered:
            for index, (group_id, _) in enumerate(step.parts):
                group = self.groups.get(group_id)
                if group is not None:
                    group.keeps_payload |= keep == "all" or (keep == "sample" and index == 0)
        for group in list(self.groups.values()):  # also those of which a step used nothing but empty slots
            self._forget_if_done(group)

    def new_lineage(self) -> int:
        """A learner that starts from a checkpoint opens a new lineage; the first one is 0."""
        lineage = self.run.lineage
        self.run = msgspec.structs.replace(self.run, lineage=lineage + 1)
        self._appended += 1
        return lineage

    # --- what is there ----------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def waiting(self) -> list[Group]:
        """Groups with slots that no step has used, in order of admission."""
        return list(self._waiting.values())

    def closed(self, version: int) -> list[Group]:
        """Groups admitted at `version` or before that are not open to training."""
        return [group for at in sorted(self._closed) if at <= version for group in self._closed[at].values()]

    def available_slots(self) -> list[tuple[int, list[int]]]:
        """(group, members) whose slots the next step can use, in order of admission."""
        return [(group_id, self._open[group_id].available) for group_id in sorted(self._open)]

    def results(self, group_id: int, members: Sequence[int]) -> list[RolloutResult]:
        """Results of these members, read back from the store if memory let go of them."""
        group = self.groups[group_id]
        if not all(member in group.results for member in members):
            group.results |= {result.member: result for result in self._payloads(group_id)}
        return [group.results[member] for member in members]

    async def committed(self) -> None:
        """Returns when everything changed before the call is durable."""
        target = self._appended
        while self._durable < target:
            if self._flushing is None:
                self._flushing = asyncio.create_task(self._flush(), name="ledger flush")
            await asyncio.shield(self._flushing)

    async def close(self) -> None:
        try:
            await self.committed()
        finally:
            await self._store.close()

    # --- inside -----------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        try:
            await asyncio.sleep(0)  # what this turn of the loop still has to say goes into the same commit
            self._check_conservation()
            for group in self._dirty.values():
                states_, steps = list[int](group.states), list(group.steps)
                baseline, sampled = dict(group.baseline), dict(group.sampled)
                outcomes = dict(group.outcomes)
                record = GroupRecord(group.id, group.version, states_, steps, baseline, sampled, outcomes)
                self._writes[records.group_key(group.id)] = record
            self._dirty.clear()
            self._writes[records.RUN] = self.run
            writes, self._writes, covers = self._writes, {}, self._appended
            await self._store.commit(records.Encoded(writes))
            self._durable = covers
        finally:
            self._flushing = None

    def _move(self, group: Group, members: Iterable[int], to: State) -> None:
        ran = State.RUNNING in group.states
        for member in members:
            old = group.states[member]
            states.check(f"{group.id}/{member}", old, to)
            group.states[member] = to
            self.live[old] -= 1
            if not to.terminal:
                self.live[to] += 1
        if ran and group.task.problem >= 0 and State.RUNNING not in group.states:
            self._rest(group)
        self._changed(group)

    def _end(self, group: Group, members: Sequence[int], event: TerminalEvent, reason: str, step: int = -1) -> None:
        if not members:
            return
        for member in members:
            self._drop_segments(group, member)
        self._put(records.event_key(self.run.next_event), EventRecord(group.id, list(members), event, reason, step))
        self._count(next_event=1, **{event: len(members)})
        if reason:
            reasons = records.count_reason(self.run.reasons, event, reason, len(members))
            self.run = msgspec.structs.replace(self.run, reasons=reasons)
        self._move(group, members, State[event.upper()])
        self.on_end(group, members, event, reason)

    def _use(self, group: Group, members: Iterable[int], step: int) -> None:
        for member in members:
            group.steps[member] = step
        self._changed(group)

    def _settle(self, group: Group) -> None:
        """When the last member ended: open to training, or over without it."""
        if State.RUNNING in group.states or group.opened:
            return
        scored = group.members(State.SCORED)
        if len(scored) < min(MIN_SURVIVORS, len(group.states)):
            self._end(group, scored, "cancelled", "group_too_small")
        elif self.filter == "uniform" and len({group.results[member].reward for member in scored}) == 1:
            self._end(group, scored, "filtered", "uniform_rewards")
        else:
            self.open_group(group)
            return
        self._return_unused(group)

    def _rest(self, group: Group) -> None:
        record = self.on_rest(group)
        if record is not None:
            self._put(records.problem_key(group.task.problem), record)
        group.outcomes = {}

    def _return_unused(self, group: Group) -> None:
        self._use(group, [m for m, step in enumerate(group.steps) if step == UNUSED], RETURNED)
        self._forget_if_done(group)

    def _forget_if_done(self, group: Group) -> None:
        if group.id not in self.groups or not group.over or UNUSED in group.steps:
            return
        if max(group.steps) >= self.run.checkpoint:
            return
        del self.groups[group.id]
        self._dirty.pop(group.id, None)
        self._delete(records.group_key(group.id))
        if group.keeps_payload:
            return
        self._delete(records.task_key(group.id))
        for member in range(len(group.states)):  # a group's results stand under the first member of each message
            self._delete(records.payload_key(group.id, member))

    def _drop_segments(self, group: Group, member: int) -> None:
        group.sampled.pop(member, None)
        for segment in group.segments.pop(member, ()):
            self._delete(_segment_key(segment))

    def _changed(self, group: Group) -> None:
        """Keep the totals and indices right; its record is written with the next commit."""
        self._appended += 1
        self._dirty[group.id] = group
        unused, available = group.steps.count(UNUSED), len(group.available)
        self.unused += unused - group.counted[0]
        self.available += available - group.counted[1]
        group.counted = (unused, available)
        if available:
            self._open[group.id] = group
        else:
            self._open.pop(group.id, None)
        if not unused:
            self._waiting.pop(group.id, None)
        if group.opened or not unused:
            self._closed.get(group.version, {}).pop(group.id, None)
            if not self._closed.get(group.version, True):
                del self._closed[group.version]

    def _count(self, **increments: int) -> None:
        changed = {name: getattr(self.run, name) + by for name, by in increments.items()}
        self.run = msgspec.structs.replace(self.run, **changed)

    def _put(self, key: bytes, record: object) -> None:
        self._appended += 1
        self._writes[key] = record

    def _delete(self, key: bytes) -> None:
        self._appended += 1
        self._writes[key] = None

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
            states_ = [State(state) for state in record.states]
            group = Group(record.group_id, task, record.version, states_, record.steps, record.baseline)
            group.sampled, group.outcomes = record.sampled, record.outcomes
            if not group.over:
                group.results = {result.member: result for result in self._payloads(group.id)}
            for segment_key, segment_value in self._store.scan(records.segment_prefix(group.id)):
                segment = records.decode(segment_key, segment_value, Segment)
                group.segments.setdefault(segment.member, []).append(segment)
            self.groups[group.id] = self._waiting[group.id] = group
            self._closed.setdefault(group.version, {})[group.id] = group
            self._changed(group)
            for state in group.states:
                if not state.terminal:
                    self.live[state] += 1
        self.problems = load_problems(self._store)
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


def load_problems(store: Reader) -> dict[int, ProblemRecord]:
    """Problem -> its record, of those of a curriculum that were tried."""
    found = store.scan(b"problem/")
    return {int(key.rpartition(b"/")[2], 16): records.decode(key, value, ProblemRecord) for key, value in found}


def _nobody_listens(group: Group, members: Sequence[int], event: TerminalEvent, reason: str) -> None:
    """The default of `on_end`."""


def _learns_nothing(group: Group) -> None:
    """The default of `on_rest`."""


def _segment_key(segment: Segment) -> bytes:
    return records.segment_key(segment.group_id, segment.member, segment.call, segment.start)
