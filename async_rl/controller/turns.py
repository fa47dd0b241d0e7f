"""Pure: the turns of learner and generator on one device, as a table (the hybrid deployment of Kimi k1.5, arXiv
2501.12599, section 2.6.3).

    state    | on the device               | ends when
    ---------+-----------------------------+-----------------------------------------------------------
    UPDATE   | generator, building up      | it samples with the newest weights, or its old ones if they did not come
    ROLLOUT  | generator                   | the batch of a step is composed
    RELEASE  | generator, on its way out   | its weights and KV cache are freed; what it sampled stays with it
    ONLOAD   | learner, on its way in      | its state is on the device
    TRAIN    | learner                     | it has trained on every batch that could be composed
    OFFLOAD  | learner, on its way out     | its state is in host memory

    UPDATE -> ROLLOUT -> RELEASE -> ONLOAD -> TRAIN -> OFFLOAD -> UPDATE

Kimi k1.5 starts a new engine every time (convert, register, start, terminate); here the process stays and frees what it
holds. A process that dies holds nothing: whoever says Hello is a new process, which starts off the device, so it proves
that the old one is gone. Then the device is free, and the generator is next; if it was leaving, the learner.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from async_rl.errors import IllegalTransition


class Turn(Enum):
    UPDATE = "update"
    ROLLOUT = "rollout"
    RELEASE = "release"
    ONLOAD = "onload"
    TRAIN = "train"
    OFFLOAD = "offload"

    @property
    def holder(self) -> Literal["generator", "learner"]:
        """The only one that may have anything on the device."""
        return "generator" if self in (Turn.UPDATE, Turn.ROLLOUT, Turn.RELEASE) else "learner"


class Event(Enum):
    GENERATOR_ON = "the generator samples"
    COMPOSED = "a batch is composed"
    GENERATOR_OFF = "the generator has left the device"
    LEARNER_ON = "the learner is on the device"
    NO_BATCH = "no further batch can be composed"
    LEARNER_OFF = "the learner has left the device"
    GENERATOR_NEW = "a new generator process said Hello"
    LEARNER_NEW = "a new learner process said Hello"


FIRST = Turn.UPDATE
"""Both have just started: the device is free."""

TRANSITIONS: dict[tuple[Turn, Event], Turn] = {
    (Turn.UPDATE, Event.GENERATOR_ON): Turn.ROLLOUT,
    (Turn.ROLLOUT, Event.COMPOSED): Turn.RELEASE,
    (Turn.RELEASE, Event.GENERATOR_OFF): Turn.ONLOAD,
    (Turn.ONLOAD, Event.LEARNER_ON): Turn.TRAIN,
    (Turn.TRAIN, Event.NO_BATCH): Turn.OFFLOAD,
    (Turn.OFFLOAD, Event.LEARNER_OFF): Turn.UPDATE,
    **{(turn, Event.GENERATOR_NEW): turn for turn in Turn},
    (Turn.ROLLOUT, Event.GENERATOR_NEW): Turn.UPDATE,
    (Turn.RELEASE, Event.GENERATOR_NEW): Turn.ONLOAD,
    **{(turn, Event.LEARNER_NEW): Turn.UPDATE if turn.holder == "learner" else turn for turn in Turn},
}


def follow(turn: Turn, event: Event) -> Turn:
    """The state after the event. Raises IllegalTransition where the table has no such edge."""
    after = TRANSITIONS.get((turn, event))
    if after is None:
        raise IllegalTransition(f"turn {turn.value}: not allowed when {event.value}")
    return after
