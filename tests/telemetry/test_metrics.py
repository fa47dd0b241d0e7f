"""/metrics against the ledger and the rows, read by Prometheus' own parser; the real controller in virtual time."""

from __future__ import annotations

import doctest
import importlib.util
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from async_rl import recipes
from async_rl.controller.controller import Controller
from async_rl.engines.fake import FakeEngine
from async_rl.ledger import inspection, records
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.store import MemoryStore
from async_rl.simulate import cluster
from async_rl.simulate.virtual_loop import run_virtual
from async_rl.telemetry import totals, usage
from async_rl.telemetry.exposition import exposition
from async_rl.telemetry.metric_table import SECTIONS
from async_rl.telemetry.reading import GeneratorReading, Reading
from async_rl.wire.messages import Activity, Task

ROOT = Path(__file__).resolve().parents[2]
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]
METRICS = [metric for section in SECTIONS for metric in section.metrics]


def parse(page: bytes) -> Samples:
    """name -> labels -> value. Fails where two lines have the same name and labels."""
    found: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found[sample.name], f"{sample.name}{labels} twice"
            found[sample.name][labels] = sample.value
    return found


def one(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"async_rl_{name}"][tuple(sorted(labels.items()))]


def recipe(**changes: Any) -> Any:
    table: dict[str, Any] = {
        "steps": 8,
        "model": {"tiny": {"characters": "01"}},
        "environment": {"name": "simulated"},
        "rollout": {"groups_per_step": 4, "group_size": 4, "max_new_tokens": 400, "filter": "uniform"},
        "generator": {"slots": 16, "count": 2},
        "evaluation": {"tasks": 4},
        "checkpoint": {"every_steps": 3},
    }
    return recipes.from_table(table | changes)


class Watched(Controller):
    """Reads itself after every step, as a scrape would."""

    readings: list[Reading]

    def _step_done(self, done: Any) -> None:
        super()._step_done(done)
        self.readings.append(self.reading("a run"))


@pytest.fixture(scope="module")
def readings() -> Iterator[tuple[list[Reading], cluster.Outcome]]:
    Watched.readings = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cluster, "Controller", Watched)
        engine: dict[str, Any] = {"slots": 16, "median_tokens": 60, "sigma": 0.8, "seconds_per_step": 0.012}
        run = recipe()
        outcome = run_virtual(
            cluster.simulate(run, make_engine=lambda _: FakeEngine(**engine), step_time=lambda _: 2.0, latency_s=0.001)
        )
    yield Watched.readings, outcome


def test_every_scrape_parses_and_its_sums_are_right(readings: Any) -> None:
    before: Samples | None = None
    for reading in readings[0]:
        samples = parse(exposition(reading))
        assert one(samples, "rollouts_unaccounted") == 0
        ended, alive = samples["async_rl_rollouts_ended_total"], samples["async_rl_rollouts"]
        assert one(samples, "rollouts_admitted_total") == sum(ended.values()) + sum(alive.values())
        shares: dict[str, float] = defaultdict(float)
        for labels, share in samples["async_rl_role_time_ratio"].items():
            shares[dict(labels)["role"]] += share
        assert shares.keys() >= {"generator", "learner"} or before is None
        assert all(abs(share - 1) < 1e-9 for share in shares.values())
        assert sum(samples["async_rl_stage"].values()) == sum(samples["async_rl_learner_state"].values()) == 1
        if before is not None:
            for name in [name for name in before if name.endswith(("_total", "_count", "_bucket", "_sum"))]:
                for labels, value in before[name].items():
                    assert samples[name][labels] >= value, f"{name}{labels} went down"
        before = samples
    assert before is not None and len(readings[0]) == 8


def test_the_values_are_those_of_ledger_and_rows(readings: Any) -> None:
    outcome, samples = readings[1], parse(exposition(readings[0][-1]))
    report, row = inspection.report(outcome.store, max_staleness=4), outcome.journal.rows[-1]
    assert one(samples, "rollouts_ended_total", event="trained", reason="") == report["trained"] == 8 * 16
    filtered = samples["async_rl_rollouts_ended_total"].get((("event", "filtered"), ("reason", "uniform_rewards")), 0)
    assert filtered == report["filtered"]
    assert one(samples, "steps_total") == one(samples, "version") == 8
    assert one(samples, "reward") == row["reward"] and one(samples, "masked_ratio") == row["masked_fraction"]
    steps = [records.decode(key, value, records.StepRecord) for key, value in outcome.store.scan(b"step/")]
    assert one(samples, "tokens_trained_total") == sum(step.weighted_tokens for step in steps)
    assert one(samples, "tokens_masked_total") == sum(step.stale_tokens for step in steps)
    lags = [(int(lag), n) for r in outcome.journal.rows for lag, n in r["lag"]["tokens"].items()]
    assert one(samples, "token_lag_versions_count") == sum(n for _, n in lags)
    assert one(samples, "token_lag_versions_sum") == sum(lag * n for lag, n in lags)
    assert one(samples, "token_lag_versions_bucket", le="1.0") == sum(n for lag, n in lags if lag <= 1)
    assert one(samples, "step_duration_seconds_count") == 7
    seconds = outcome.journal.rows[-1]["wall_s"] - outcome.journal.rows[0]["wall_s"]
    assert abs(one(samples, "step_duration_seconds_sum") - seconds) < 1e-6
    assert one(samples, "generators", state="live") == 2
    assert one(samples, "weight_update_seconds_count", transport="shared_memory") > 8
    assert one(samples, "evaluations_total") == 1, "that of the end comes after the last step"


def test_reasons_survive_the_controller_and_are_few(virtual: Callable[[Any], Any]) -> None:
    """Counted in the ledger, by kind: whatever user code says, there are at most so many."""

    async def main() -> Ledger:
        store = MemoryStore()
        ledger = await Ledger.open(store)
        for number in range(records.MAX_KINDS + 5):
            group = ledger.admit(Task(str(number), {}), 2, 0)
            ledger.fail(group.id, 0, f"Error{number}: in line {number}")
            ledger.cancel(group, "stale")
        await ledger.committed()
        return await Ledger.open(store)

    run = virtual(main()).run
    assert run.reasons["cancelled"] == {"stale": records.MAX_KINDS + 5}
    assert len(run.reasons["failed"]) == records.MAX_KINDS + 1 and run.reasons["failed"]["other"] == 5
    assert sum(run.reasons["failed"].values()) == run.failed


def test_a_restarted_generator_does_not_lower_what_its_role_has_spent() -> None:
    spent = usage.Usage()
    for activity in (
        Activity(0.0, {"wait": 1.0, "away": 0.0, "away/engine_step": 0.0}, 5.0, 100),
        Activity(4.0, {"wait": 2.0, "away": 3.0, "away/engine_step": 2.0}, 7.0, 140),
        Activity(9.0, {"wait": 1.5, "away": 0.5, "away/engine_step": 0.5}, 1.0, 30),  # a new process
    ):
        spent.read("generator-0", activity)
    reading = spent.reading()
    assert reading.spent == {"generator": {"wait": 2.5, "away": 1.0, "engine_step": 2.5}}
    assert reading.tokens == {"generator": 70} and reading.cpu_s == {"generator": 3.0}


def test_a_thousand_generators_are_one_series_each_and_cheap(readings: Any) -> None:
    reading = readings[0][-1]
    crowd = [
        GeneratorReading(f"generator-{i}", "live", 7, 3, 1, i, {"running": 3, "waiting": 0, "cache_used": 0.5})
        for i in range(1000)
    ]
    few, began = exposition(reading).count(b"\n"), time.process_time()
    page = exposition(replace(reading, generators=crowd))
    assert time.process_time() - began < 2, "50 ms, without other load"
    lines = page.count(b"\n")
    assert lines - few < 8 * 1000
    samples = parse(page)
    assert len(samples["async_rl_generator_version"]) == 1000
    assert one(samples, "generators", state="live") == 1000


def test_names_say_their_unit_and_kind() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".") and not {"rollout_id", "group"} & set(metric.labels), metric.name


def test_the_page_has_the_table_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("generate_monitoring", ROOT / "docs" / "generate_monitoring.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text()
    assert module.page(text) == text, "run python docs/generate_monitoring.py"


@pytest.mark.parametrize("module", [totals, records])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def test_the_alerts_ask_for_metrics_that_there_are() -> None:
    """`make test-pages` lets promtool look at them."""
    known = {metric.name: metric for metric in METRICS}
    text = (ROOT / "launch" / "alerts.yml").read_text()
    for name, labels in re.findall(r"(async_rl_[a-z0-9_]+)(?:{([^}]*)})?", text):
        assert name in known, f"launch/alerts.yml: there is no {name}"
        assert set(re.findall(r"(\w+)=", labels)) <= set(known[name].labels), f"{name}: {labels}"
