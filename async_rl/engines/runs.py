"""Pure: which neighbouring sequences attend together, so that attention works on used lengths only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """Sequences [first, last), none longer than `length`."""

    first: int
    last: int
    length: int
    ragged: bool
    """Not all are equally long: a mask is needed."""


def cut(lengths: Sequence[int], allowance: int) -> list[Run]:
    """Runs in order that cover all sequences. One joins its neighbours if that pads at most `allowance` positions.

    `allowance` is what one more attention call costs, in positions of one sequence. 0 gives runs of equal length.

    >>> [(run.first, run.last, run.length) for run in cut([5, 5, 6, 90, 90], 10)]
    [(0, 3, 6), (3, 5, 90)]
    """
    runs: list[Run] = []
    for i, length in enumerate(lengths):
        if runs:
            run = runs[-1]
            longest = max(run.length, length)
            padding = (longest - run.length) * (i - run.first) + longest - length
            if padding <= allowance:
                runs[-1] = Run(run.first, i + 1, longest, run.ragged or length != run.length)
                continue
        runs.append(Run(i, i + 1, length, ragged=False))
    return runs
