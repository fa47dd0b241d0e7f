"""Admission, the token guard, selection and packing: small functions, stated as properties."""

from __future__ import annotations

import doctest
import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.batching.plan import plan
from async_rl.batching.selection import select
from async_rl.environments.sorting import SortingTasks
from async_rl.errors import UserError
from async_rl.staleness.admission import capacity, min_version
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
    free = capacity(steps_ahead=eta, version=version, groups_per_step=q, consumed=taken, running=0)
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


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)), st.integers(1, 10), st.integers(0, 10))
def test_batches_are_the_oldest_and_overtaking_is_bounded(
    ready: set[int], running: set[int], groups: int, overtaking: int
) -> None:
    running -= ready
    batch = select(sorted(ready), sorted(running), groups=groups, overtaking=overtaking)
    if batch is None:
        oldest = sorted(ready)[:groups]
        assert len(oldest) < groups or sum(g > min(running) for g in oldest) > overtaking
    else:
        assert batch == sorted(ready)[:groups]
        assert not running or sum(group > min(running) for group in batch) <= overtaking


@given(st.lists(st.integers(1, 100), max_size=80), st.integers(1, 5), st.integers(100, 400))
def test_plans_are_complete_bounded_and_even(lengths: list[int], ranks: int, cap: int) -> None:
    planned = plan(lengths, ranks=ranks, cap=cap)
    assert len(planned) == ranks and len({len(rank) for rank in planned}) == 1
    assert sorted(i for rank in planned for microbatch in rank for i in microbatch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in microbatch) <= cap for rank in planned for microbatch in rank)
    assert planned == plan(lengths, ranks=ranks, cap=cap)


def test_groups_that_fit_stay_together() -> None:
    groups = [0, 1, 0, 1, 2, 2, 3, 3, 3]
    planned = plan([4, 4, 4, 4, 6, 6, 3, 3, 3], ranks=1, cap=20, groups=groups)
    assert planned == [[[0, 2, 4, 5], [1, 3, 6, 7, 8]]]
    planned = plan([4, 4, 4, 4, 6, 6, 9, 9, 9], ranks=1, cap=20, groups=groups)  # 27 tokens do not fit
    assert all(planned[0].count(m) == 1 for m in planned[0]) and {0, 2, 4, 5} in [set(m) for m in planned[0]]
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
