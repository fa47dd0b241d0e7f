"""Pure: which slots form the next step: oldest-admitted first, never "first finished", because that would train on
short completions and starve hard problems.

A finished rollout is passed over at most eta steps; what overtaking may cost the others is bounded by the budget of
masked tokens (staleness.budget), not by a window: a window that binds makes every step wait for its slowest rollout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def oldest(available: Iterable[tuple[int, Sequence[int]]], slots: int) -> list[tuple[int, list[int]]]:
    """The first `slots` of (group, members), given in order of admission; the last group may be cut.

    >>> oldest([(0, [0, 1]), (2, [0, 1, 2]), (3, [1])], 4)
    [(0, [0, 1]), (2, [0, 1])]
    """
    chosen: list[tuple[int, list[int]]] = []
    for group, members in available:
        if slots <= 0:
            break
        chosen.append((group, list(members[:slots])))
        slots -= len(members)
    return chosen
