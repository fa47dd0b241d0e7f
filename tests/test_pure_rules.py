"""Admission, the token guard, selection and packing: small functions, stated as properties."""

from __future__ import annotations

import doctest
import importlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.batching.plan import plan
from async_rl.batching.selection import oldest
from async_rl.environments.sorting import SortingTasks
from async_rl.errors import UserError
from async_rl.staleness.account import TokenAccount
from async_rl.staleness.admission import capacity, min_version
from async_rl.staleness.budget import MaskBudget
from async_rl.staleness.guard import measure
from async_rl.wire.messages import RolloutResult, Sequence, VersionSpan


@pytest.mark.parametrize(
    "module",
    [
        "async_rl.batching.selection",
        "async_rl.environments.sorting",
        "async_rl.staleness.admission",
        "async_rl.tasks.source",
        "async_rl.telemetry.activity",
    ],
)
def test_examples_in_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@given(st.integers(0, 8), st.integers(0, 100), st.integers(1, 64), st.integers(0, 5000))
def test_what_is_admitted_is_at_most_eta_old_when_its_turn_comes(eta: int, version: int, q: int, taken: int) -> None:
    """The proof of the formula: position < (eta + v + 1) Q, so its step is at most v + eta."""
    free = capacity(steps_ahead=eta, version=version, per_step=q, consumed=taken, running=0)
    for position in range(taken, taken + free):
        assert position // q - version <= eta
        assert min_version(steps_ahead=eta, groups_per_step=q, position=position) <= version


spans = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12)), max_size=4)


@given(st.lists(spans, max_size=5), st.integers(0, 12), st.integers(0, 6))
def test_every_sampled_token_is_counted_once(rollouts: list[list[tuple[int, int]]], version: int, eta: int) -> None:
    results: list[RolloutResult] = []
    for member, parts in enumerate(rollouts):
        start, found = 0, list[VersionSpan]()
        for length, of in parts:
            found.append(VersionSpan(start, start + length, of, of))
            start += length
        results.append(RolloutResult(member, [Sequence(b"", b"", found)], 0.0))
    histogram = measure(results, version=version, max_staleness=eta)
    lags = [max(0, version - of) for parts in rollouts for length, of in parts for _ in range(length)]
    assert histogram.stale_tokens == sum(lag > eta for lag in lags)
    assert histogram.weighted_tokens == sum(lag <= eta for lag in lags)
    assert histogram.max_weighted_lag == max((lag for lag in lags if lag <= eta), default=0)


@given(st.dictionaries(st.integers(0, 60), st.lists(st.integers(0, 9), unique=True), max_size=20), st.integers(1, 40))
def test_batches_are_the_oldest_slots(available: dict[int, list[int]], slots: int) -> None:
    in_order = [(group, member) for group in sorted(available) for member in available[group]]
    batch = oldest(((group, available[group]) for group in sorted(available)), slots)
    assert [(group, member) for group, members in batch for member in members] == in_order[:slots]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 6)), min_size=1, max_size=12), st.integers(1, 3))
def test_every_masked_token_is_doomed_once_and_no_other(rollouts: list[tuple[int, int]], eta: int) -> None:
    """Rollouts sample one token a version, from the version they begin at; each is trained some steps after its end."""
    account, last = TokenAccount(eta), 20
    begins = {(i, 0): i % 5 for i in range(len(rollouts))}
    ends = {(i, 0): min(last - 8, i % 5 + length) for i, (length, _) in enumerate(rollouts)}
    trained = {key: min(last, ends[key] + rollouts[key[0]][1]) for key in ends}
    doomed = 0
    for version in range(last + 1):
        for key in begins:
            if begins[key] == version:
                account.admitted(key)
            if begins[key] < version <= ends[key]:
                account.sampled(key, version - begins[key], version - 1)
            if ends[key] == version:
                account.ended(key, Counter(range(begins[key], version)))
        account.left(key for key in trained if trained[key] == version)
        doomed += account.composed(version)
    masked = sum(sum(trained[key] - of > eta for of in range(begins[key], ends[key])) for key in begins)
    assert doomed == masked
    assert account.pressure(last + 9) == 0


def test_concurrency_is_steered_into_the_budget_and_back() -> None:
    budget = MaskBudget(0.1, max_staleness=2, step_rollouts=100)
    for step in range(2, 60):  # pressure in proportion to what runs: 1 % per 10 rollouts
        running = min(400, budget.limit)
        budget.allows(step, int(running), 1000)
        budget.composed(step, int(running), 1000, 400)
    assert 75 <= budget.limit <= 105
    for step in range(60, 120):
        budget.allows(step, 0, 1000)
        budget.composed(step, 0, 1000, 400)
    assert budget.limit == 400, "no pressure: what the generators can run"


def test_a_step_waits_rather_than_exceed_the_budget() -> None:
    budget = MaskBudget(0.0, max_staleness=2, step_rollouts=100)
    assert budget.allows(3, 0, 1000) and not budget.allows(3, 1, 1000)
    budget = MaskBudget(0.1, max_staleness=2, step_rollouts=100)
    assert budget.allows(3, 100, 1000) and not budget.allows(3, 101, 1000)
    budget.composed(3, 40, 1000, 400)
    assert budget.allows(4, 160, 1000) and not budget.allows(4, 161, 1000), "what was not used is saved"


@given(st.lists(st.integers(1, 100), max_size=80), st.integers(1, 5), st.integers(100, 400))
def test_plans_are_complete_bounded_and_even(lengths: list[int], ranks: int, cap: int) -> None:
    planned = plan(lengths, ranks=ranks, cap=cap)
    assert len(planned) == ranks and len({len(rank) for rank in planned}) == 1
    assert sorted(i for rank in planned for microbatch in rank for i in microbatch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in microbatch) <= cap for rank in planned for microbatch in rank)
    assert planned == plan(lengths, ranks=ranks, cap=cap)


@given(
    st.lists(st.integers(1, 100), min_size=40, max_size=200), st.integers(1, 5), st.integers(300, 900), st.booleans()
)
def test_no_plan_needs_many_more_micro_batches_than_the_tokens_do(
    lengths: list[int], ranks: int, cap: int, quadratic: bool
) -> None:
    planned = plan(lengths, ranks=ranks, cap=cap, quadratic=0.01 * quadratic)
    assert len(planned[0]) <= -(-sum(lengths) // (cap * ranks)) + 1


def test_cost_is_balanced_between_ranks_at_every_index() -> None:
    lengths = [8000] * 4 + [1000] * 64 + [500] * 128
    quadratic = 1e-4
    planned = plan(lengths, ranks=4, cap=16000, quadratic=quadratic)
    for parts in zip(*planned, strict=True):
        costs = [sum(lengths[i] * (1 + quadratic * lengths[i]) for i in part) for part in parts]
        assert max(costs) <= 1.02 * min(costs)


def test_groups_that_fit_stay_together() -> None:
    groups = [0, 1, 0, 1, 2, 2, 3, 3, 3]
    planned = plan([4, 4, 4, 4, 6, 6, 3, 3, 3], ranks=1, cap=20, groups=groups)
    assert sorted(planned[0]) == [[0, 2, 6, 7, 8], [1, 3, 4, 5]]
    planned = plan([4, 4, 4, 4, 6, 6, 9, 9, 9], ranks=1, cap=20, groups=groups)  # 27 tokens do not fit
    parts = [{groups[i] for i in part} for part in planned[0]]
    assert all(sum(group in part for part in parts) == 1 for group in (0, 1, 2)), "the others stay whole"
    # one group alone is divided rather than leaving a rank without work
    assert sorted(plan([4, 5, 6], ranks=2, cap=20, groups=[7, 7, 7])) == [[[0, 1]], [[2]]]


def test_a_rollout_over_the_cap_names_the_field() -> None:
    with pytest.raises(UserError, match=r"learner.microbatch_tokens = 10: .* write at least 11"):
        plan([3, 11], ranks=1, cap=10)


def test_sorting_never_trains_on_held_out_prompts() -> None:
    tasks = SortingTasks(seed=3)
    heldout = {row["digits"] for row in tasks.heldout()}
    assert len(heldout) > 200
    assert not heldout & {tasks.train(i)["digits"] for i in range(3000)}
    assert tasks.train(17) == SortingTasks(seed=3).train(17)
