"""`async-rl simulate`: the control plane in virtual time, against closed forms, and what the command says about it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from async_rl import cli, config
from async_rl.controller.controller import Controller
from async_rl.ledger import inspection
from async_rl.ledger.ledger import Ledger
from async_rl.ledger.store import MemoryStore
from async_rl.simulate import command
from async_rl.simulate.arms import ARMS, arm
from async_rl.simulate.cluster import MemoryJournal, NumberedTasks
from async_rl.simulate.compare import compare
from async_rl.simulate.fake_cluster import simulate_arm
from async_rl.simulate.fake_generator import FakeGenerator
from async_rl.simulate.fake_learner import FakeLearner
from async_rl.simulate.figures import bounds, cohort, figures
from async_rl.simulate.records import RolloutLog
from async_rl.simulate.workload import Workload
from async_rl.wire.codec import rollout_stream, training_stream
from async_rl.wire.memory import MemoryServer

ROOT = Path(__file__).resolve().parents[2]
LONGTAIL = ROOT / "recipes" / "simulate" / "longtail.toml"
SMALL = [
    "rollout.groups_per_step=8",
    "rollout.group_size=4",
    "simulate.concurrent=64",
    "simulate.mean_tokens=800",
    "simulate.pause_s=0.5",
    "simulate.warmup_steps=4",
    "simulate.measured_steps=12",
]


def small(*overrides: str) -> config.Run:
    return command.load(LONGTAIL, [*SMALL, *overrides])


def test_the_same_seed_gives_the_same_record() -> None:
    first, second, other = (simulate_arm(arm("asynchronous", small()), seed=seed) for seed in (1, 1, 2))
    assert first.steps == second.steps and first.log == second.log and first.traces == second.traces
    assert first.report == second.report and first.spent == second.spent
    assert first.steps != other.steps


def test_what_a_recipe_says_of_its_placement_changes_nothing() -> None:
    """The synchronous arm shares its devices, the others do not, whatever the recipe does on its one."""
    overrides = ["simulate.measured_steps=4", "generator.count=1"]
    records = [
        simulate_arm(arm("synchronous", small(*overrides, f"placement={placement}")), seed=1)
        for placement in ("separate", "colocated")
    ]
    assert records[0].steps == records[1].steps


def test_a_synchronous_step_takes_what_its_longest_rollout_and_its_tokens_take() -> None:
    """On d devices: step_s * longest + sequence_s * tokens / d to generate, tokens / rate to train, the pause."""
    run = small("simulate.sigma=1.0", "simulate.measured_steps=30")
    chosen = arm("synchronous", run)
    record = simulate_arm(chosen, seed=3)
    expected = 0.0
    for step in record.measured:
        lengths = [rollout.tokens for rollout in step.rollouts]
        generate = chosen.engine.step_s * max(lengths) + chosen.engine.sequence_s * sum(lengths) / 8
        expected += generate + sum(lengths) / chosen.train_rate + run.simulate.pause_s
    begin, end = record.window
    assert (end - begin) / expected == pytest.approx(1.0, abs=0.02), "the devices are not quite equally loaded"
    assert {lag for step in record.steps for rollout in step.rollouts for lag, _ in rollout.lags} == {0}


def test_one_step_off_joins_generation_and_training_at_every_step() -> None:
    record = simulate_arm(arm("one_step_off", small()), seed=1)
    assert {lag for step in record.steps[1:] for rollout in step.rollouts for lag, _ in rollout.lags} == {1}
    assert all(
        later.began_at == earlier.done_at for earlier, later in zip(record.steps, record.steps[1:], strict=False)
    )


def test_what_is_trained_is_as_long_as_what_was_submitted() -> None:
    record = simulate_arm(arm("asynchronous", small("simulate.between=0.5")), seed=1)
    for step in record.steps:
        for rollout in step.rollouts:
            assert rollout.tokens == record.workload.group(rollout.group_id).tokens[rollout.member]
    assert len(cohort(record)) > 30
    found = figures([record])
    assert found.length_ratio == 1.0 and found.dropped == found.failed == found.lost == found.duplicates == 0
    assert all(bound.held for bound in bounds(record, found))


def test_figures_add_up() -> None:
    record = simulate_arm(arm("asynchronous", small("staleness.max_staleness=1", "simulate.sigma=1.0")), seed=1)
    found = figures([record])
    for shares in (found.lag_tokens, found.lag_head, *found.time.values()):
        assert sum(shares.values()) == pytest.approx(1.0)
    over = sum(share for lag, share in found.lag_tokens.items() if lag > 1)
    assert over == pytest.approx(found.masked_share) and over > 0
    assert found.masked_by_decile[0] < found.masked_by_decile[-1]
    begin, end = record.window
    sampled = sum(step.tokens for step in record.measured)
    token_s = record.arm.engine.step_s + record.arm.engine.sequence_s * found.concurrency / 4
    decoding_s = (1 - found.time["generator"]["weight_swap"]) * (end - begin)
    assert found.concurrency * decoding_s / token_s == pytest.approx(sampled, rel=0.15), "what is sampled is trained"


def test_seeds_are_pooled() -> None:
    pooled = compare(small("simulate.seeds=2"), ["asynchronous"], processes=1)["asynchronous"].figures
    records = [simulate_arm(arm("asynchronous", small()), seed=seed) for seed in (1, 2)]
    assert pooled == figures(records) and pooled.rollouts == 2 * 12 * 32


def test_a_generator_that_dies_costs_nothing_but_time(virtual: Callable[[Any], Any]) -> None:
    async def main() -> tuple[MemoryStore, FakeLearner, Workload]:
        chosen = arm("asynchronous", small("simulate.warmup_steps=0", "simulate.measured_steps=10"))
        run, store = msgspec.structs.replace(chosen.run, steps=10), MemoryStore()
        workload = Workload(run.simulate, group_size=4, seed=1)
        rollouts, training = MemoryServer(rollout_stream()), MemoryServer(training_stream())
        controller = Controller(
            run,
            ledger=await Ledger.open(store),
            tasks=NumberedTasks(),
            rollouts=rollouts,
            training=training,
            journal=MemoryJournal(),
        )
        learner = FakeLearner(training.connect(), steps=10, step_time=lambda _: 20.0, request_at=0.95)
        log = RolloutLog()

        def generator(name: str) -> FakeGenerator:
            transport = rollouts.connect()
            return FakeGenerator(
                name=name, transport=transport, model=chosen.engine, credit=16, draw=workload.group, log=log
            )

        first, second = generator("generator-0"), generator("generator-1")
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one.run()) for one in (controller, learner, second)]
            dying = tasks.create_task(first.run())
            await asyncio.sleep(50)
            assert first.num_running > 0
            first.die()
            assert await dying is None
            await asyncio.sleep(5)
            tasks.create_task(generator("generator-0").run())
            assert await running[0]
        return store, learner, workload

    store, learner, workload = virtual(main())
    report = inspection.report(store, max_staleness=4)
    assert inspection.holds(report) and report["trained"] == 10 * 32
    for step in learner.steps:
        for rollout in step.rollouts:
            assert rollout.tokens == workload.group(rollout.group_id).tokens[rollout.member]


# --- the command -------------------------------------------------------------------------------------------------


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", *arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def sets(*overrides: str) -> list[str]:
    return [word for override in (*SMALL, *overrides) for word in ("--set", override)]


def test_json_is_one_object_with_every_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run_command(capsys, str(LONGTAIL), "--json", "--out", str(tmp_path), *sets())
    found = json.loads(out)
    assert code == 0 and found["holds"] is True
    assert found.keys() == {"recipe", "holds", "arms", "speedup", "bounds", "timeline"}
    assert list(found["arms"]) == list(ARMS) and found["speedup"]["synchronous"] == 1.0
    assert found["speedup"]["asynchronous"] > 1.3
    for figure in (
        "tokens_per_s",
        "lag_tokens",
        "lag_head",
        "masked_share",
        "dropped",
        "length_ratio",
        "weighted_ratio",
    ):
        assert figure in found["arms"]["asynchronous"]
    assert {bound["name"] for bound in found["bounds"] if bound["arm"] == "asynchronous"} == {
        "rollouts lost",
        "rollouts that ended twice",
        "tokens over eta with weight",
        "masked share",
        "dropped rollouts",
        "length ratio",
        "length ratio of tokens with weight",
    }
    assert Path(found["timeline"]).read_bytes().startswith(b"\x89PNG")


def test_a_broken_bound_is_named_and_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stale = ("staleness.max_staleness=1", "staleness.mask_budget=0.4", "simulate.sigma=1.0")
    code, out, _ = run_command(capsys, str(LONGTAIL), "--out", str(tmp_path), *sets(*stale))
    assert code == 1
    assert "BROKEN: asynchronous: length ratio of tokens with weight is 0." in out
    assert "throughput over synchronous" in out and f"timeline: {tmp_path}" in out.replace("\n", "")


def test_a_cohort_that_nobody_followed_is_no_success(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run_command(capsys, str(LONGTAIL), "--out", str(tmp_path), *sets("simulate.measured_steps=1"))
    assert code == 1 and "raise simulate.measured_steps" in out


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "simulate.generatorz=3",
            "simulate.generatorz = 3: there is no such field; did you mean 'simulate.generators'",
        ),
        ("simulate.learners=0", "simulate.learners = 0: write a number above 0"),
        ("simulate.between=1.5", "simulate.between = 1.5: write a share of the variance, from 0 to 1"),
        ("simulate.cap=0.5", "simulate.cap = 0.5: write the longest rollout in means, 1 or more"),
        ("simulate.concurrent=3", "simulate.concurrent = 3: write at least one slot for each of the 4 generators"),
        ("simulate.learner_tokens_s=0", "simulate.learner_tokens_s = 0.0: write a number above 0"),
        ("simulate.sigma=-1.0", "simulate.sigma = -1.0: write 0 or more"),
    ],
)
def test_a_wrong_field_is_named(capsys: pytest.CaptureFixture[str], override: str, says: str) -> None:
    code, out, err = run_command(capsys, str(LONGTAIL), *sets(override))
    assert code == 2 and out == "" and says in err


def test_a_recipe_whose_model_is_not_here_is_simulated(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('steps = 5\n[model]\npath = "/nowhere"\n[environment]\nname = "sorting"\n')
    run = command.load(recipe, [])
    assert run.steps == 5 and run.simulate == config.Simulate()


def test_the_reference_recipe_is_what_the_defaults_say() -> None:
    run = command.load(LONGTAIL, [])
    assert run.simulate == config.Simulate() and run.step_rollouts == 512
    assert run.staleness == config.Staleness(max_staleness=4, on_stale="mask", mask_budget=0.03)
    assert msgspec.structs.asdict(run.simulate)["concurrent"] == 1024
