"""What a ledger says about its run, counted again from the single events and not from the counters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from async_rl.ledger import records
from async_rl.ledger.records import EventRecord, GroupRecord, RunRecord, StepRecord
from async_rl.ledger.states import State
from async_rl.ledger.store import Reader, snapshot

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
    regenerated, regenerated_most: see records.RunRecord.
    """
    run, over_eta = RunRecord(), 0
    ended: Counter[str] = Counter()
    alive: Counter[str] = Counter()
    seen: Counter[tuple[int, int]] = Counter()
    for key, value in store.scan(b""):
        match records.decode_any(key, value):
            case RunRecord() as run:
                pass
            case EventRecord(group_id, members, event):
                ended[event] += len(members)
                seen.update((group_id, member) for member in members)
            case GroupRecord(states=states):
                alive.update(State(state).name.lower() for state in states if not State(state).terminal)
            case StepRecord(weighted_tokens=tokens, max_weighted_lag=lag):
                over_eta += tokens if lag > max_staleness else 0
            case _:
                pass
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
        "regenerated": run.regenerated,
        "regenerated_most": run.regenerated_most,
    }


def holds(report: Report) -> bool:
    """Nothing lost, nothing twice, nothing over the staleness bound."""
    return report["duplicates"] == 0 and report["lost"] == 0 and report["over_eta"] == 0
