"""Which rows a step trains on."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

from hypothesis import given
from hypothesis import strategies as st

from async_rl.stages.schedule import Schedule, set_apart

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
def test_rows_of_epochs(lengths: list[int], batch: int, epochs: int, seed: int) -> None:
    rows = list(range(len(lengths)))
    schedule = Schedule(rows=rows, tokens_N=lengths, seed=seed, epochs=epochs, batch_rows=batch)
    batches = list(schedule.batches())
    assert len(batches) == schedule.count() and all(len(one) == batch for one in batches[:-1])
    flat = [row for one in batches for row in one]
    for epoch in range(epochs):  # every row once an epoch
        assert sorted(flat[epoch * len(rows) : (epoch + 1) * len(rows)]) == rows
    assert len(flat) == epochs * len(rows)


@given(LENGTHS, st.integers(1, 60), st.integers(0, 9))
def test_batches_of_tokens(lengths: list[int], tokens: int, seed: int) -> None:
    schedule = Schedule(rows=range(len(lengths)), tokens_N=lengths, seed=seed, epochs=2, batch_tokens=tokens)
    batches = list(schedule.batches())
    assert all(len(one) == 1 or sum(lengths[row] for row in one) <= tokens for one in batches)
    assert Counter(row for one in batches for row in one) == dict.fromkeys(range(len(lengths)), 2)
    for one, following in pairwise(batches):  # no batch could have taken one more
        assert sum(lengths[row] for row in (*one, following[0])) > tokens


@given(LENGTHS, st.integers(1, 12), st.integers(1, 30), st.integers(0, 30))
def test_a_run_that_continues_goes_on_with_the_next_rows(lengths: list[int], batch: int, steps: int, at: int) -> None:
    schedule = Schedule(rows=range(len(lengths)), tokens_N=lengths, seed=1, steps=steps, batch_rows=batch)
    batches = list(schedule.batches())
    assert len(batches) == steps
    assert list(islice(schedule.batches(), at, None)) == batches[at:]
    longer = Schedule(rows=range(len(lengths)), tokens_N=lengths, seed=1, steps=steps + 3, batch_rows=batch)
    assert list(longer.batches())[:steps] == batches


def test_another_seed_another_order() -> None:
    orders = {
        tuple(next(Schedule(rows=range(20), tokens_N=[1] * 20, seed=s, steps=1, batch_rows=20).batches()))
        for s in range(5)
    }
    assert len(orders) == 5
    assert set_apart(10, 3, 1) == set_apart(10, 3, 1) != set_apart(10, 3, 2)
    train, heldout = set_apart(10, 3, 1)
    assert sorted(train + heldout) == list(range(10)) and len(heldout) == 3


def test_a_part_of_an_epoch() -> None:
    schedule = Schedule(rows=range(10), tokens_N=[1] * 10, seed=1, epochs=1.5, batch_rows=4)
    assert [len(one) for one in schedule.batches()] == [4, 4, 4, 3]
