"""Pure: the state machine of a rollout, as a table.

    (admitted) -> running -> scored -> ready -> composed -> trained
                     |          |        |
                     +----------+--------+--> filtered | failed | cancelled

running: leased, or waiting for a lease. scored: its result is on disk, its group is not open to training yet. ready:
its group is open (complete, or opened before for those that are there) and it waits for a step. composed: part of a
committed step. The other four are terminal: exactly one of them ends every admitted rollout. (A lease that expires does
not change the state: the rollout is leased again.)
"""

from __future__ import annotations

from enum import IntEnum

from async_rl.errors import IllegalTransition


class State(IntEnum):
    RUNNING = 0
    SCORED = 1
    READY = 2
    COMPOSED = 3
    TRAINED = 4
    FILTERED = 5
    FAILED = 6
    CANCELLED = 7

    @property
    def terminal(self) -> bool:
        return self >= State.TRAINED


TRANSITIONS: dict[State, frozenset[State]] = {
    State.RUNNING: frozenset({State.SCORED, State.FAILED, State.CANCELLED}),
    State.SCORED: frozenset({State.READY, State.FILTERED, State.CANCELLED}),
    State.READY: frozenset({State.COMPOSED, State.CANCELLED}),
    State.COMPOSED: frozenset({State.TRAINED}),
    State.TRAINED: frozenset(),
    State.FILTERED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


def check(rollout: str, old: State, new: State) -> None:
    """Raises IllegalTransition unless the table has the edge old -> new."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"rollout {rollout}: {old.name.lower()} -> {new.name.lower()} is not allowed")
