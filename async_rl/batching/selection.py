"""Pure: which ready groups form the next step. Oldest-admitted first with a bounded overtaking window, never
"first finished", because that would train on short completions and starve hard problems."""

from __future__ import annotations

from collections.abc import Sequence


def select(ready: Sequence[int], running: Sequence[int], *, groups: int, overtaking: int) -> list[int] | None:
    """The `groups` oldest ready groups, or None while the batch has to wait.

    ready, running: group ids in order of admission; a running group is one that is not complete.
    overtaking: at most so many ready groups may be taken past the oldest running one. With 0, batches are consumed
    in order of admission.

    >>> select([0, 2, 3], [1], groups=2, overtaking=0) is None    # 1 holds the line
    True
    >>> select([0, 2, 3], [1], groups=2, overtaking=1)            # 2 may overtake it
    [0, 2]
    """
    if len(ready) < groups:
        return None
    batch = list(ready[:groups])
    if running and sum(1 for group in batch if group > running[0]) > overtaking:
        return None
    return batch
