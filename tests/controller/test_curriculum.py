"""A curriculum in whole runs: what the ledger keeps of problems agrees with what ended, through any crash."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import Fault, Schedule, play, recipe

from async_rl.ledger import inspection, records
from async_rl.ledger.ledger import load_problems
from async_rl.ledger.states import State
from async_rl.simulate.virtual_loop import run_virtual
from async_rl.tasks.source import Rows

PROBLEMS = Rows([{"number": number} for number in range(9)], heldout=0, seed=3)
CRASHES = st.tuples(st.floats(0, 8), st.sampled_from(["controller", "generator", "learner"]))


@settings(max_examples=80)
@given(st.integers(0, 1000), st.lists(CRASHES, max_size=3), st.sampled_from(["mask", "drop", "wait"]))
def test_every_scored_rollout_counts_once(seed: int, crashes: list[tuple[float, str]], on_stale: str) -> None:
    run = recipe(
        curriculum={"sampling": "prioritized"},
        staleness={"on_stale": on_stale, "max_staleness": 2},
        rollout={"filter": "uniform"},
    )
    faults = tuple(Fault(at, kind) for at, kind in crashes)  # type: ignore[arg-type]
    world = run_virtual(play(Schedule(run, seed=seed, failing=0.1, faults=faults, tasks=PROBLEMS)))
    assert inspection.holds(world.report())
    kept = load_problems(world.store)
    ended = Counter(event if event != "cancelled" else reason for event, reason in world.store.ended.values())
    scored = ended["trained"] + ended["filtered"] + ended["group_too_small"]
    counted = sum(record.rollouts for record in kept.values())
    # what was cancelled for another reason may have been scored before, or not
    assert scored <= counted <= ended.total() - ended["failed"]
    assert all(0 <= record.rate <= 1 for record in kept.values())
    for group in world.store.groups.values():
        assert State.RUNNING not in group.states and not group.outcomes
    assert world.journal.rows[-1]["curriculum"]["problems"] == 9


def test_a_crash_changes_no_draw() -> None:
    """Synchronous: what is drawn depends on rates alone, and those are committed with what ended."""
    run = recipe(
        steps=8,
        curriculum={"sampling": "prioritized", "smoothing": 0.4},
        staleness={"max_staleness": 0},
        controller={"keep_rollouts": "all"},
    )

    def problems(schedule: Schedule) -> list[int]:
        world = run_virtual(play(schedule))
        groups = {rollout.group_id for batch in world.surviving for rollout in batch.rollouts}
        tasks = {
            int(key.rpartition(b"/")[2], 16): records.decode(key, value, records.Task)
            for key, value in world.store.scan(b"task/")
        }
        return [tasks[group].problem for group in sorted(groups)]

    first = problems(Schedule(run, tasks=PROBLEMS))
    assert len(Counter(first)) > 3
    faults = (Fault(2.3, "controller"), Fault(5.1, "learner"))
    assert problems(Schedule(run, tasks=PROBLEMS, faults=faults)) == first
