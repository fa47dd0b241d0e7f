"""The real controller, ledger and workers in virtual time, on fake engines and a fake learner."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from async_rl import config, recipes
from async_rl.engines.fake import FakeEngine
from async_rl.ledger import inspection
from async_rl.simulate.cluster import Outcome, simulate
from async_rl.wire.messages import MicroBatches

Virtual = Callable[[Any], Any]


def recipe(**changes: Any) -> config.Run:
    table: dict[str, Any] = {
        "steps": 10,
        "model": {"tiny": {"characters": "01"}},
        "environment": {"name": "simulated"},
        "rollout": {"groups_per_step": 8, "group_size": 4, "max_new_tokens": 400},
        "generator": {"slots": 32},
        "evaluation": {"tasks": 4},
    }
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values} if isinstance(values, dict) else values
    return recipes.from_table(table)


def go(virtual: Virtual, run: config.Run, *, step_time: float = 2.0, **engine: Any) -> Outcome:
    settings = {"slots": run.generator.slots, "median_tokens": 100, "sigma": 0.8, "seconds_per_step": 0.012} | engine
    return virtual(
        simulate(run, make_engine=lambda _: FakeEngine(**settings), step_time=lambda _: step_time, latency_s=0.001)
    )


def lags(batches: list[MicroBatches]) -> list[int]:
    return [
        batch.version - span.version
        for batch in batches
        for rollout in batch.rollouts
        for sequence in rollout.sequences
        for span in sequence.spans
    ]


def test_ten_steps_are_fast_complete_and_deterministic(virtual: Virtual) -> None:
    began = time.process_time()
    first, second = go(virtual, recipe()), go(virtual, recipe())
    assert time.process_time() - began < 4, "two runs"
    assert first.complete and len(first.batches) == 10
    assert msgspec.msgpack.encode(first.batches) == msgspec.msgpack.encode(second.batches)
    assert first.seconds == second.seconds
    report = inspection.report(first.store, max_staleness=4)
    assert inspection.holds(report) and report["trained"] == 10 * 8 * 4
    assert report["admitted"] == report["trained"] + report["cancelled"]
    assert [evaluation.version for evaluation in first.journal.evaluations] == [0, 10]
    assert first.journal.result["steps"] == 10


def test_asynchrony_overlaps_generation_and_training(virtual: Virtual) -> None:
    asynchronous = go(virtual, recipe())
    synchronous = go(virtual, recipe(staleness={"max_staleness": 0}))
    assert set(lags(synchronous.batches)) == {0}
    assert max(lags(asynchronous.batches)) > 0
    wall = [outcome.journal.rows[-1]["wall_s"] for outcome in (synchronous, asynchronous)]
    assert wall[0] > 1.3 * wall[1]


def test_synchronous_batches_are_consumed_in_order_of_admission(virtual: Virtual) -> None:
    outcome = go(virtual, recipe(staleness={"max_staleness": 0}))
    order = [rollout.group_id for batch in outcome.batches for rollout in batch.rollouts]
    assert order == sorted(order)
    assert all(row["masked_fraction"] == 0 for row in outcome.journal.rows)


@pytest.mark.parametrize("eta", [0, 1, 2])
def test_time_of_every_role_is_attributed_whole(virtual: Virtual, eta: int) -> None:
    outcome = go(virtual, recipe(staleness={"max_staleness": eta}))
    for role in ("generator", "learner"):
        shares = outcome.journal.result["idle"][role]
        assert abs(outcome.journal.result["busy"][role] + sum(shares.values()) - 1) < 1e-6


def test_several_generators_share_the_work(virtual: Virtual) -> None:
    outcome = go(virtual, recipe(generator={"slots": 16, "count": 3, "queued_rollouts": 0}))
    assert outcome.complete and inspection.holds(inspection.report(outcome.store, max_staleness=4))


def test_rollouts_that_span_versions_carry_all_of_them(virtual: Virtual) -> None:
    outcome = go(virtual, recipe(), step_time=0.3, sigma=1.5)
    spans = [s.spans for batch in outcome.batches for r in batch.rollouts for s in r.sequences]
    assert any(len(found) > 1 for found in spans)
    for found in spans:
        assert [span.start for span in found[1:]] == [span.end for span in found[:-1]]
        assert [span.version for span in found] == sorted(span.version for span in found)
        assert {span.kv_version for span in found} == {found[0].version}
