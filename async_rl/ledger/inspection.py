"""What a ledger says about its run, counted again from the single events and not from the counters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from async_rl.ledger import records
from async_rl.ledger.ledger import load_run
from async_rl.ledger.records import EventRecord, GroupRecord, StepRecord
from async_rl.ledger.states import State
from async_rl.ledger.store import Reader, snapshot
from async_rl.wire.messages import RolloutResult, Segment, Task

Report = dict[str, int]


def inspect(path: Path, *, max_staleness: int) -> Report:
    """Read the ledger of a run, also while it is at work.

    Raises:
        UserError: there is none. LedgerCorrupt: a record does not decode.
    """
    with snapshot(path) as store:
        return report(store, max_staleness=max_staleness)


def report(store: Reader, *, max_staleness: int) -> Report:
    """Counts in rollouts, over_eta in tokens. Every record is decoded, also those that are not counted.

    duplicates: terminal events beyond the first of a rollout. lost: admitted, and neither ended nor alive.
    over_eta: tokens with weight in a step whose lag was above `max_staleness`.
    """
    run = load_run(store)
    ended: Counter[str] = Counter()
    seen: Counter[tuple[int, int]] = Counter()
    for key, value in store.scan(b"event/"):
        event = records.decode(key, value, EventRecord)
        ended[event.event] += len(event.members)
        seen.update((event.group_id, member) for member in event.members)
    alive: Counter[str] = Counter()
    for key, value in store.scan(b"group/"):
        states = records.decode(key, value, GroupRecord).states
        alive.update(State(state).name.lower() for state in states if not State(state).terminal)
    for key, value in store.scan(b"segment/"):
        records.decode(key, value, Segment)
    for key, value in store.scan(b"task/"):
        records.decode(key, value, Task)
    for key, value in store.scan(b"payload/"):
        records.decode(key, value, list[RolloutResult])
    over_eta = 0
    for key, value in store.scan(b"step/"):
        step = records.decode(key, value, StepRecord)
        if step.max_weighted_lag > max_staleness:
            over_eta += step.weighted_tokens
    return {
        "admitted": run.admitted,
        "trained": ended["trained"],
        "filtered": ended["filtered"],
        "failed": ended["failed"],
        "cancelled": ended["cancelled"],
        "running": alive["running"],
        "scored": alive["scored"],
        "ready": alive["ready"],
        "composed": alive["composed"],
        "duplicates": sum(count - 1 for count in seen.values()),
        "lost": run.admitted - len(seen) - alive.total(),
        "over_eta": over_eta,
    }


def holds(report: Report) -> bool:
    """Nothing lost, nothing twice, nothing over the staleness bound."""
    return report["duplicates"] == 0 and report["lost"] == 0 and report["over_eta"] == 0
