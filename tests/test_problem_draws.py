"""Which problem comes next: Kimi k1.5's sampling, by what it draws."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl import config
from async_rl.algorithms.sampling import prioritized_probabilities
from async_rl.environments.sorting import SortingTasks
from async_rl.errors import UserError
from async_rl.ledger.records import ProblemRecord
from async_rl.tasks.curriculum import Curriculum
from async_rl.tasks.source import Rows
from async_rl.tasks.sum_tree import SumTree


def rows(count: int, **fields: list[Any]) -> Rows:
    table = [{"n": n} | {name: values[n] for name, values in fields.items()} for n in range(count)]
    source = Rows(table, heldout=0, seed=0)
    order = sorted(range(count), key=lambda number: source.problem(number, 0)["n"])
    assert order != list(range(count)) or count < 4, "numbers of problems are not those of rows"
    return source


def curriculum(source: Rows, rates: dict[int, float] | None = None, **settings: Any) -> Curriculum:
    known = {number: ProblemRecord(rate, 8) for number, rate in (rates or {}).items()}
    return Curriculum(source, config.Curriculum(sampling="prioritized", **settings), seed=1, known=known)


def drawn(chosen: Curriculum, count: int, version: int = 0, first: int = 0) -> list[int]:
    """Problems of groups that end at once without a score, so that no rate changes."""
    found: list[int] = []
    for index in range(first, first + count):
        found.append(chosen.task(index, version).problem)
        assert chosen.ended(found[-1], {}) is None
    return found


@given(st.lists(st.sampled_from([0.0, 0.0, 1e-12, 0.3, 1.0, 7.5]), min_size=1, max_size=40), st.data())
def test_a_sum_tree_draws_what_a_running_sum_draws(weights: list[float], data: st.DataObject) -> None:
    tree = SumTree(random.Random(1).random() for _ in weights)
    for index in data.draw(st.permutations(range(len(weights)))):
        tree.set(index, weights[index])
    assert tree.total == pytest.approx(sum(weights))
    if not sum(weights):
        return
    share = data.draw(st.floats(0, 1, exclude_max=True))
    index = tree.at(share)
    assert weights[index] > 0
    below, slack = sum(weights[:index]), 1e-9 * sum(weights)
    assert below - slack <= share * sum(weights) <= below + weights[index] + slack


def test_draws_follow_the_formula() -> None:
    rates = {0: 0.0, 1: 0.5, 2: 0.9, 3: 1.0}
    counts = Counter(drawn(curriculum(rows(5), rates, floor=0.05), 4000))
    expected = prioritized_probabilities([*rates.values(), 0.5], floor=0.05)
    assert [counts[number] / 4000 for number in range(5)] == pytest.approx(expected, abs=0.03)
    even = Counter(drawn(curriculum(rows(5), rates, floor=1.0), 4000))
    assert [even[number] / 4000 for number in range(5)] == pytest.approx([0.2] * 5, abs=0.03)
    solved = Counter(drawn(curriculum(rows(3), dict.fromkeys(range(3), 1.0), floor=0.0), 300))
    assert len(solved) == 3, "all solved: all alike"


def test_rates_are_moving_averages_in_the_order_of_members() -> None:
    chosen = curriculum(rows(1), smoothing=0.5)
    number = chosen.task(0, 0).problem
    assert chosen.ended(number, {2: 7.0, 0: 1.0, 1: -3.0}) == ProblemRecord(0.6875, 3)  # .5 -> .75 -> .375 -> .6875
    assert chosen.row() == {
        "problems": 1,
        "tried": 1,
        "solved": 0,
        "success_rate": 0.6875,
        "difficulty_cap": 1.0,
    }
    chosen.task(1, 0)
    assert chosen.ended(number, {member: 1.0 for member in range(3)}) == ProblemRecord(0.9609375, 6)
    assert chosen.row()["solved"] == 1


def test_what_is_under_way_is_not_drawn_again_while_there_is_another() -> None:
    chosen = curriculum(rows(6))
    first = [chosen.task(index, 0).problem for index in range(6)]
    assert sorted(first) == list(range(6))
    twice = chosen.task(6, 0).problem  # there is no other one left
    free = next(number for number in first if number != twice)
    for number in (twice, free):
        chosen.ended(number, {0: 0.0})
    assert chosen.task(7, 0).problem == free, "a group of the other one is still under way"


def test_easy_problems_come_first() -> None:
    hard = [0.9, 0.1, 0.5, 0.3, 1.0, 0.2]
    source = rows(6, hard=hard)
    at = [hard[source.problem(number, 0)["n"]] for number in range(6)]
    chosen = curriculum(source, difficulty="hard", start=0.2, steps=10, floor=1.0)

    def seen(version: int) -> set[float]:
        return {at[number] for number in drawn(chosen, 100, version, first=100 * version)}

    assert seen(0) == {0.1, 0.2} and chosen.row()["difficulty_cap"] == 0.2
    assert seen(4) == {0.1, 0.2, 0.3, 0.5}
    assert seen(9) == {0.1, 0.2, 0.3, 0.5, 0.9}
    assert seen(10) == seen(25) == set(hard)
    none_so_easy = curriculum(source, difficulty="hard", start=0.0, steps=1000)
    assert {at[number] for number in drawn(none_so_easy, 20)} == {0.1}


@given(st.integers(0, 40), st.integers(0, 2**32))
def test_a_resumed_curriculum_goes_on_as_if_it_had_never_stopped(stop: int, seed: int) -> None:
    settings = config.Curriculum(sampling="prioritized", difficulty="hard", start=0.1, steps=20)
    chance = random.Random(seed)
    source = rows(12, hard=[chance.random() for _ in range(12)])
    kept: dict[int, ProblemRecord] = {}
    running: list[int] = []
    chosen = Curriculum(source, settings, seed=seed, known={})
    for index in range(60):
        if index == stop:
            chosen_again = Curriculum(source, settings, seed=seed, known=kept, running=running)
            assert [chosen.task(i, 9).problem for i in range(900, 903)] == [
                chosen_again.task(i, 9).problem for i in range(900, 903)
            ]
            return
        running.append(chosen.task(index, index // 8).problem)
        while len(running) > 3:
            ended = running.pop(chance.randrange(len(running)))
            record = chosen.ended(ended, {member: float(chance.random() < 0.5) for member in range(4)})
            assert record is not None
            kept[ended] = record


def test_hard_problems_get_the_attempts() -> None:
    """Problems that are never, sometimes, always solved: of 3000 groups the last get the floor's share."""
    chosen, counts = curriculum(rows(3)), Counter[int]()
    chance = random.Random(2)
    for index in range(3000):
        number = chosen.task(index, 0).problem
        counts[number] += 1
        chosen.ended(number, {member: float(chance.random() < (0.0, 0.5, 1.0)[number]) for member in range(8)})
    assert counts[0] > 1.5 * counts[1] > 5 * counts[2] > 0


def test_errors_name_the_field() -> None:
    with pytest.raises(UserError, match=r"curriculum.sampling = 'prioritized': .* has no list of problems"):
        Curriculum(SortingTasks(seed=1), config.Curriculum(sampling="prioritized"), seed=1, known={})
    with pytest.raises(
        UserError, match=r"curriculum.difficulty = 'hard': problem \d has 1.5 there; .* from 0 \(easy\)"
    ):
        curriculum(rows(2, hard=[0.5, 1.5]), difficulty="hard", steps=2)
