"""What a run is judged by: every commit is checked against the promises, from the records alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from async_rl import config
from async_rl.ledger import records
from async_rl.ledger.records import EventRecord, GroupRecord, RunRecord, StepRecord
from async_rl.ledger.states import State
from async_rl.ledger.store import MemoryStore
from async_rl.staleness.budget import MaskBudget
from async_rl.wire.messages import MicroBatches

COMMIT_S = 0.002
"""Virtual seconds of a commit to disk."""
Rollout: TypeAlias = tuple[int, int]
"""(group, member)"""


class AuditedStore(MemoryStore):
    """Checks every commit against the promises, from the records alone."""

    def __init__(self, run: config.Run, records_: Mapping[bytes, bytes] | None = None) -> None:
        super().__init__()
        self._config = run
        self.run = RunRecord()
        self.groups: dict[int, GroupRecord] = {}
        self.ended: dict[Rollout, tuple[str, str]] = {}
        """The terminal event and its reason."""
        self.steps: dict[int, StepRecord] = {}
        self.composed_at: dict[int, float] = {}
        if records_ is not None:
            self._records = dict(records_)
            self._look(self._records)

    def after_crash(self) -> AuditedStore:
        """What is on disk; whatever the dead controller still writes does not reach it."""
        again = AuditedStore(self._config, self._records)
        again.composed_at = self.composed_at
        return again

    async def commit(self, writes: Mapping[bytes, bytes | None]) -> None:
        await asyncio.sleep(COMMIT_S)
        await super().commit(writes)
        self._look(writes)

    def check_ended(self, group_id: int, members: Iterable[int]) -> None:
        """They are acknowledged: on disk they have ended."""
        if group_id in self.groups:  # else it is over and forgotten
            states = self.groups[group_id].states
            assert not any(states[member] == State.RUNNING for member in members), "an ack before the commit"

    def check_composed(self, batch: MicroBatches) -> None:
        """The learner has got it: its composition is on disk."""
        record = self.steps.get(batch.step)
        assert record is not None, "a batch before its commit"
        parts = [(group_id, member) for group_id, members in record.parts for member in members]
        assert parts == [(rollout.group_id, rollout.member) for rollout in batch.rollouts]

    def _look(self, writes: Mapping[bytes, bytes | None]) -> None:
        composed: list[StepRecord] = []
        for key, value in writes.items():
            kind, _, name = key.partition(b"/")
            if kind == b"group" and value is None:
                gone = self.groups.pop(int(name, 16))
                assert records.decode(records.RUN, self._records[records.RUN], RunRecord).checkpoint > max(gone.steps)
            elif value is None:
                continue
            elif kind == b"run":
                self.run = records.decode(key, value, RunRecord)
            elif kind == b"group":
                self.groups[int(name, 16)] = records.decode(key, value, GroupRecord)
            elif kind == b"event":
                event = records.decode(key, value, EventRecord)
                for member in event.members:
                    assert (event.group_id, member) not in self.ended, "a second terminal event"
                    self.ended[event.group_id, member] = event.event, event.reason
            elif kind == b"step":
                step = records.decode(key, value, StepRecord)
                assert self.steps.setdefault(step.step, step) == step, "a step is composed once"
                composed.append(step)
        self._check(composed)

    def _check(self, composed: list[StepRecord]) -> None:
        run = self._config
        alive = {
            (group.group_id, member)
            for group in self.groups.values()
            for member, state in enumerate(group.states)
            if not State(state).terminal
        }
        assert not alive & self.ended.keys(), "a rollout that had ended is alive"
        assert self.run.admitted == len(self.ended) + len(alive), "conservation"
        slots = Counter(step for group in self.groups.values() for step in group.steps)
        for step in composed:
            self.composed_at.setdefault(step.step, asyncio.get_running_loop().time())
            if step.step >= self.run.checkpoint:
                assert slots[step.step] == run.step_rollouts, "Q * G slots a step"
        used = max(self.steps, default=-1) + 1
        ahead = run.staleness.steps_ahead + self.run.best_known_version + 1
        assert used * run.step_rollouts + slots[-1] <= ahead * run.step_rollouts, "more admitted than capacity"


class WatchedBudget(MaskBudget):
    """Keeps what it was asked and told."""

    def __init__(self, budget: float, *, max_staleness: int, step_rollouts: int) -> None:
        super().__init__(budget, max_staleness=max_staleness, step_rollouts=step_rollouts)
        self.share = budget
        self.steps: list[tuple[int, int, int]] = []
        """(pressure, doomed tokens, tokens) of each composition"""
        self._asked = 0

    def allows(self, step: int, pressure: int, batch_tokens: int) -> bool:
        self._asked = pressure
        return super().allows(step, pressure, batch_tokens)

    def composed(self, step: int, doomed: int, batch_tokens: int, most: float) -> None:
        self.steps.append((self._asked, doomed, batch_tokens))
        super().composed(step, doomed, batch_tokens, most)
