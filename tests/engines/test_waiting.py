from __future__ import annotations

from engine_cases import request

from async_rl.engines.runs import cut
from async_rl.engines.waiting import Waiting

A, B, C = (1, 1), (2, 2, 2), (3,)


def ids(
    waiting: Waiting, slots: int, budget: int, ready: tuple[int, ...] | None = None
) -> list[tuple[list[int], bool]]:
    return [([r.id for r in admission.requests], admission.more) for admission in waiting.take(slots, budget, ready)]


def filled() -> Waiting:
    waiting = Waiting()
    waiting.add([request(0, A), request(1, B), request(2, A), request(3, C), request(4, B)])
    return waiting


def test_equal_prompts_enter_together_in_order_of_arrival() -> None:
    waiting = filled()
    assert ids(waiting, 10, 100) == [([0, 2], False), ([1, 4], False), ([3], False)]
    assert len(waiting) == 0
    assert ids(waiting, 10, 100) == []


def test_slots_run_out_within_a_prompt() -> None:
    waiting = filled()
    assert ids(waiting, 3, 100) == [([0, 2], False), ([1], True)]
    assert ids(waiting, 1, 100) == [([4], False)]
    assert ids(waiting, 0, 100) == []
    assert len(waiting) == 1


def test_the_budget_counts_a_prompt_once_and_the_first_is_free_to_exceed_it() -> None:
    assert ids(filled(), 10, 1) == [([0, 2], False)]
    assert ids(filled(), 10, 5) == [([0, 2], False), ([1, 4], False)]
    assert ids(filled(), 10, 4, ready=A) == [([0, 2], False), ([1, 4], False), ([3], False)]


def test_removal() -> None:
    waiting = filled()
    removed = waiting.remove(2)
    assert removed is not None and removed.id == 2
    assert waiting.remove(2) is None
    waiting.remove(0)
    assert ids(waiting, 10, 100) == [([1, 4], False), ([3], False)]


def test_runs_cut_where_padding_costs_more_than_a_call() -> None:
    runs = cut([5, 5, 6, 90, 90, 7], 10)
    assert [(run.first, run.last, run.length, run.ragged) for run in runs] == [
        (0, 3, 6, True),
        (3, 5, 90, False),
        (5, 6, 7, False),
    ]
    assert [(run.first, run.last) for run in cut([4, 4, 3, 3, 4], 0)] == [(0, 2), (2, 4), (4, 5)]
    assert len(cut([1, 500, 1, 500], 10**6)) == 1
    assert cut([], 0) == []
