"""The table of turns: what is allowed, and that nobody is ever on the device beside another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.controller.turns import FIRST, TRANSITIONS, Event, Turn, follow
from async_rl.errors import IllegalTransition

CYCLE = [
    (Event.GENERATOR_ON, Turn.ROLLOUT),
    (Event.COMPOSED, Turn.RELEASE),
    (Event.GENERATOR_OFF, Turn.ONLOAD),
    (Event.LEARNER_ON, Turn.TRAIN),
    (Event.NO_BATCH, Turn.OFFLOAD),
    (Event.LEARNER_OFF, Turn.UPDATE),
]
LEAVES = {
    "generator": (Event.GENERATOR_OFF, Event.GENERATOR_NEW),
    "learner": (Event.LEARNER_OFF, Event.LEARNER_NEW),
}


def test_the_cycle_of_the_device() -> None:
    turn = FIRST
    for event, after in CYCLE * 2:
        turn = follow(turn, event)
        assert turn is after


@pytest.mark.parametrize("turn", Turn)
@pytest.mark.parametrize("event", Event)
def test_what_the_table_does_not_have_is_refused(turn: Turn, event: Event) -> None:
    if (turn, event) in TRANSITIONS:
        assert follow(turn, event) is TRANSITIONS[turn, event]
        return
    with pytest.raises(IllegalTransition, match=f"turn {turn.value}: not allowed when {event.value}"):
        follow(turn, event)


@pytest.mark.parametrize("turn", Turn)
def test_a_process_may_begin_anew_in_every_state(turn: Turn) -> None:
    for event in (Event.GENERATOR_NEW, Event.LEARNER_NEW):
        follow(turn, event)


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_the_device_passes_only_from_one_that_has_left_it(events: list[Event]) -> None:
    turn = FIRST
    for event in events:
        if (turn, event) not in TRANSITIONS:
            continue
        after = follow(turn, event)
        if after.holder != turn.holder:
            assert event in LEAVES[turn.holder], "it is free: its holder said so, or is a new process"
        turn = after


@pytest.mark.parametrize("turn", Turn)
def test_every_state_leads_to_every_other(turn: Turn) -> None:
    reached = {turn}
    for _ in Turn:
        reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
    assert reached == set(Turn)
