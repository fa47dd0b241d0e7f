"""Every rollout ends once, whatever happens; the same on LMDB and in memory."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_rl.batching.selection import oldest
from async_rl.errors import IllegalTransition, LedgerCorrupt
from async_rl.ledger import inspection, records, states
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.records import StepRecord
from async_rl.ledger.states import State
from async_rl.ledger.store import LmdbStore, MemoryStore, Store
from async_rl.wire.messages import RolloutResult, Segment, Sequence, Task, VersionSpan

TASK = Task("t", {"x": 1})
Part: TypeAlias = tuple[int, list[int]]


def result(member: int) -> RolloutResult:
    return RolloutResult(member, [Sequence(b"\0" * 8, b"\0" * 8, [VersionSpan(1, 2, 0, 0)])], 1.0)


def step(number: int, *groups: int) -> StepRecord:
    return StepRecord(number, [(group, [0, 1]) for group in groups], 4, 0, 0)


def make_store(kind: str, path: Path) -> Store:
    return LmdbStore(path / "ledger") if kind == "lmdb" else MemoryStore()


@pytest.mark.parametrize("kind", ["memory", "lmdb"])
def test_a_group_from_admission_to_checkpoint(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        store = make_store(kind, tmp_path)
        ledger = await Ledger.open(store)
        group = ledger.admit(TASK, 2, version=0)
        ledger.score(group.id, [result(1)])
        assert group.states == [State.RUNNING, State.SCORED] and not ledger.available_slots()
        ledger.score(group.id, [result(0), result(1)])
        assert ledger.repeats == 1 and ledger.available_slots() == [(group.id, [0, 1])]
        ledger.compose(step(0, group.id))
        await ledger.committed()
        assert ledger.trained(0) and not ledger.trained(0), "the second time is a replay"
        again = ledger.results(group.id, [0, 1])
        assert [r.member for r in again] == [0, 1], "kept until a checkpoint covers the step"
        ledger.checkpoint(1)
        await ledger.committed()
        report = inspection.report(store, max_staleness=0)
        assert (report["admitted"], report["trained"], report["lost"], report["duplicates"]) == (2, 2, 0, 0)
        assert not list(store.scan(b"payload/")) and not list(store.scan(b"task/")) and not list(store.scan(b"group/"))
        await ledger.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["memory", "lmdb"])
def test_what_was_sampled_and_dies_undurable_is_counted_once(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        store = make_store(kind, tmp_path)
        ledger = await Ledger.open(store)
        group = ledger.admit(TASK, 3, version=0)
        for member, total in ((0, 10), (1, 5), (0, 9), (2, 4)):
            ledger.sampled(group.id, member, total)
        ledger.segment(Segment(group.id, 0, 0, 0, 0, bytes(28), bytes(28), [VersionSpan(0, 7, 0, 0)]))
        ledger.regenerate(group, [0])
        ledger.regenerate(group, [0])
        assert (ledger.run.regenerated, ledger.run.regenerated_most) == (3, 3)
        ledger.score(group.id, [result(2)])
        ledger.sampled(group.id, 2, 100)
        await ledger.committed()
        if kind == "lmdb":
            await ledger.close()
            store = make_store(kind, tmp_path)
        ledger = await Ledger.open(store)
        group = ledger.groups[group.id]
        ledger.regenerate(group, [0, 1, 2])
        await ledger.committed()
        report = inspection.report(store, max_staleness=0)
        assert (report["regenerated"], report["regenerated_most"]) == (3 + 5, 5), "what ended died of nothing"
        await ledger.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["memory", "lmdb"])
def test_segments_of_calls_that_overlap_replace_only_their_own(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        store = make_store(kind, tmp_path)
        ledger = await Ledger.open(store)
        group = ledger.admit(TASK, 1, version=0)

        def keep(call: int, start: int, tokens: int) -> None:
            spans = [VersionSpan(0, tokens, 0, 0)]
            ledger.segment(Segment(group.id, 0, call, start, call, bytes(4 * tokens), bytes(4 * tokens), spans))

        for call, start in ((0, 0), (1, 0), (0, 4), (1, 4), (0, 8)):
            keep(call, start, 4)
        keep(0, 4, 2)  # sampled again after an interruption: what came after it is void, the other call is not
        await ledger.committed()
        if kind == "lmdb":
            await ledger.close()
            store = make_store(kind, tmp_path)
        ledger = await Ledger.open(store)
        kept = sorted((s.call, s.start, len(s.tokens) // 4) for s in ledger.groups[group.id].segments[0])
        assert kept == [(0, 0, 4), (0, 4, 2), (1, 0, 4), (1, 4, 4)]
        await ledger.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["memory", "lmdb"])
def test_reopening_gives_back_what_was_committed(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        store = make_store(kind, tmp_path)
        ledger = await Ledger.open(store)
        running, ready, composed = (ledger.admit(TASK, 2, version=3) for _ in range(3))
        ledger.score(running.id, [result(0)])
        for group in (ready, composed):
            ledger.score(group.id, [result(0), result(1)])
        ledger.compose(step(0, composed.id))
        await ledger.committed()
        again = await Ledger.open(store)
        assert again.run.epoch == ledger.run.epoch + 1
        assert [g.id for g in again.waiting()] == [running.id, ready.id]
        assert again.available_slots() == [(ready.id, [0, 1])] and again.groups[ready.id].baseline == {0: 1.0, 1: 1.0}
        assert (again.unused, again.available) == (ledger.unused, ledger.available) == (4, 2)
        assert again.steps == ledger.steps and again.live == ledger.live
        assert again.groups[running.id].results.keys() == {0}
        assert again.results(composed.id, [0, 1]) == [result(0), result(1)]
        assert again.admit(TASK, 2, version=3).id == 3, "the task cursor goes on"
        await ledger.close()

    asyncio.run(main())


def test_a_failed_member_leaves_its_survivors_and_one_survivor_is_too_few() -> None:
    async def main() -> None:
        ledger = await Ledger.open(MemoryStore())
        three, two = ledger.admit(TASK, 3, 0), ledger.admit(TASK, 2, 0)
        ledger.fail(three.id, 1, "boom")
        ledger.score(three.id, [result(0), result(2)])
        assert three.members(State.READY) == [0, 2]
        assert ledger.available_slots() == [(three.id, [0, 1, 2])], "the dead member's slot goes with the survivors"
        ledger.score(two.id, [result(0)])
        ledger.fail(two.id, 1, "boom")
        assert two.id not in ledger.groups and ledger.unused == 3, "no baseline from one: cancelled, credit returns"
        assert (ledger.run.failed, ledger.run.cancelled) == (2, 1)
        await ledger.committed()

    asyncio.run(main())


def test_single_rollouts_need_no_second_survivor() -> None:
    async def main() -> None:
        ledger = await Ledger.open(MemoryStore())
        group = ledger.admit(TASK, 1, 0)
        ledger.score(group.id, [result(0)])
        assert group.opened and ledger.available == 1

    asyncio.run(main())


def test_the_table_refuses_what_it_does_not_have() -> None:
    for old in State:
        for new in State:
            if new in states.TRANSITIONS[old]:
                states.check("r", old, new)
            else:
                with pytest.raises(IllegalTransition, match=f"r: {old.name.lower()} -> {new.name.lower()}"):
                    states.check("r", old, new)
    assert all(not states.TRANSITIONS[state] for state in State if state.terminal)


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    async def main() -> None:
        store = LmdbStore(tmp_path / "ledger")
        ledger = await Ledger.open(store)
        ledger.admit(TASK, 2, 0)
        await ledger.committed()
        value = bytearray(store.get(records.group_key(0)) or b"")
        value[-1] ^= 1
        await store.commit({records.group_key(0): bytes(value)})
        with pytest.raises(LedgerCorrupt, match="group/0000000000000000"):
            await Ledger.open(store)
        await ledger.close()

    asyncio.run(main())


def test_lost_rollouts_are_found() -> None:
    async def main() -> None:
        store = MemoryStore()
        ledger = await Ledger.open(store)
        ledger.admit(TASK, 2, 0)
        await ledger.committed()
        await store.commit({records.group_key(0): None, records.task_key(0): None})
        assert inspection.report(store, max_staleness=0)["lost"] == 2
        assert not inspection.holds(inspection.report(store, max_staleness=0))
        with pytest.raises(LedgerCorrupt, match="2 rollouts were admitted, but 0 ended and 0 are alive"):
            await Ledger.open(store)

    asyncio.run(main())


def test_a_look_at_a_run_at_work_counts_one_moment(tmp_path: Path) -> None:
    """Another process begins to look, then the run goes on: to the looker nothing is lost and nothing is new."""
    code = (
        "import json, sys; from pathlib import Path; from async_rl.ledger import inspection, store\n"
        "with store.snapshot(Path(sys.argv[1])) as snapshot:\n"
        "    print('begun', flush=True); sys.stdin.readline()\n"
        "    print(json.dumps(inspection.report(snapshot, max_staleness=0)))\n"
    )

    async def main() -> None:
        ledger = await Ledger.open(LmdbStore(tmp_path))
        ledger.admit(TASK, 2, 0)
        await ledger.committed()
        pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
        looker = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path), **pipes)
        assert looker.stdout is not None and await looker.stdout.readline() == b"begun\n"
        ledger.score(0, [result(0), result(1)])
        ledger.compose(step(0, 0))
        ledger.trained(0)
        ledger.checkpoint(1)
        ledger.admit(TASK, 2, 1)
        await ledger.committed()
        seen = json.loads((await looker.communicate(b"\n"))[0])
        assert (seen["admitted"], seen["running"], seen["trained"], seen["lost"]) == (2, 2, 0, 0)
        await ledger.close()

    asyncio.run(main())


def test_commits_that_wait_together_share_one(tmp_path: Path) -> None:
    class Counting(MemoryStore):
        commits = 0

        async def commit(self, writes: Any) -> None:
            self.commits += 1
            await asyncio.sleep(0)
            await super().commit(writes)

    async def main() -> int:
        store = Counting()
        ledger = await Ledger.open(store)
        before = store.commits

        async def admit() -> None:
            ledger.admit(TASK, 2, 0)
            await ledger.committed()

        await asyncio.gather(*(admit() for _ in range(100)))
        return store.commits - before

    assert asyncio.run(main()) == 1


def test_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.ledger.store.INITIAL_MAP_BYTES", 1 << 20)

    async def main() -> None:
        store = LmdbStore(tmp_path / "ledger")
        await store.commit({b"big": b"x" * (3 << 20)})
        assert len(store.get(b"big") or b"") == 3 << 20
        await store.close()

    asyncio.run(main())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 2)), max_size=60))
def test_any_schedule_conserves_rollouts(virtual: Callable[[Any], Any], schedule: list[tuple[int, int, int]]) -> None:
    """Random events, repeated, late and out of order: the equation holds and every rollout has at most one end."""

    async def main() -> None:
        store = MemoryStore()
        ledger = await Ledger.open(store)
        for what, group_id, member in schedule:
            group = ledger.groups.get(group_id)
            if what == 0:
                ledger.admit(TASK, 3, 0)
            elif what == 1:
                ledger.score(group_id, [result(member)])
            elif what == 2:
                ledger.fail(group_id, member, "boom")
            elif what == 3 and group is not None and group.id in {one.id for one in ledger.waiting()}:
                ledger.cancel(group, "test", None if member else [member])
            elif what == 4 and ledger.available:
                number = max(ledger.steps, default=ledger.run.best_known_version - 1) + 1
                parts, empty = list[Part](), list[Part]()
                for its, members in oldest(ledger.available_slots(), 2):
                    for m in members:
                        (parts if ledger.groups[its].states[m] is State.READY else empty).append((its, [m]))
                ledger.compose(StepRecord(number, parts, 4, 0, 0), empty)
            elif what == 6 and group is not None and not group.opened and State.SCORED in group.states:
                ledger.open_group(group)
            elif what == 7:
                ledger.segment(Segment(group_id, member, 0, 0, 0, b"\0" * 4, b"\0" * 4, [VersionSpan(0, 1, 0, 0)]))
            elif what == 5 and ledger.run.best_known_version in ledger.steps:
                ledger.trained(ledger.run.best_known_version)
                if member == 0:
                    ledger.checkpoint(ledger.run.best_known_version)
            await ledger.committed()
            report = inspection.report(store, max_staleness=0)
            assert inspection.holds(report), report
        again = await Ledger.open(store)
        assert again.live == ledger.live and again.groups.keys() == ledger.groups.keys()
        assert (again.unused, again.available) == (ledger.unused, ledger.available)
        held = {(g.id, m): g.segments[m] for g in ledger.groups.values() for m in g.segments if g.segments[m]}
        assert {(g.id, m): g.segments[m] for g in again.groups.values() for m in g.segments} == held

    virtual(main())
