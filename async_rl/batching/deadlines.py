"""Pure: what a step has to take so that no rollout is left over when its last step in time is composed.

A rollout is *due* at the step oldest version + eta: in any later one its oldest tokens are over eta. A step uses S
slots. So of what waits, at most (d - step) * S slots that are due at d or before may be left after `step` is composed.
As long as that holds, taking what is due first meets every deadline (Hall's condition, for unit jobs on S machines).

It holds at first, and admission keeps it: when something is admitted at version v, no more than (eta + v + 1) * S slots
have been admitted in all (staleness.admission). Only taking younger rollouts while older ones still decode can break
it, so with nothing to mask a step waits instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

Slots: TypeAlias = "list[tuple[int, list[int]]]"
"""(group, members), in order of admission"""


def earliest_due(available: Iterable[tuple[int, Sequence[int]]], slots: int, due: Callable[[int, int], int]) -> Slots:
    """`slots` of them by `due(group, member)`; those that are due at the same step in order of admission.

    >>> earliest_due([(0, [0, 1]), (2, [0, 1, 2])], 3, lambda group, member: 5 - member)
    [(0, [1]), (2, [1, 2])]
    """
    ordered = sorted((due(group, member), group, member) for group, members in available for member in members)
    chosen: dict[int, list[int]] = {}
    for group, member in sorted((group, member) for _, group, member in ordered[:slots]):
        chosen.setdefault(group, []).append(member)
    return list(chosen.items())


def overbooked(step: int, left: Mapping[int, int], unfinished: Mapping[int, int], slots: int) -> bool:
    """Whether waiting can keep deadlines that composing `step` now would break.

    Args:
        left: due step -> slots that wait and are not in the batch; what is overdue already counts nowhere.
        unfinished: due step -> those of them that no batch can take yet.

    >>> overbooked(7, {7: 1}, {7: 1}, 8), overbooked(7, {7: 1}, {}, 8), overbooked(7, {8: 8, 9: 8}, {9: 8}, 8)
    (True, False, False)
    """
    total = waits = 0
    for due in sorted(left):
        if due < step:
            continue
        total += left[due]
        waits += unfinished.get(due, 0)
        if waits and total > (due - step) * slots:
            return True
    return False
