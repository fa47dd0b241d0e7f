"""Pure: what a mean over tasks says about tasks that were not drawn.

The unit is the task: samples of one task are averaged first, because they are not independent (Miller 2024,
arXiv:2411.00640). Proportions get Wilson's score interval (1927), which stays within [0, 1] and is right for few tasks
and for shares near 0 and 1. Where a task's value is a fraction (k samples, pass@k) the interval is conservative: of all
variables in [0, 1] with one mean, the 0-or-1 ones vary most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from async_rl.algorithms.pass_at_k import pass_at_k

Z = 1.959964
"""97.5 % of a normal distribution lies below."""


class Estimate(msgspec.Struct, frozen=True):
    """A mean over tasks, with its 95 % interval."""

    mean: float
    standard_error: float | None
    """None: there is one task."""
    low: float | None
    high: float | None


def mean(values: Sequence[float]) -> Estimate:
    """Of any numbers, at least one: normal interval."""
    centre = sum(values) / len(values)
    error = _standard_error(values, centre)
    if error is None:
        return Estimate(centre, None, None, None)
    return Estimate(centre, error, centre - Z * error, centre + Z * error)


def proportion(values: Sequence[float]) -> Estimate:
    """Of numbers in [0, 1], at least one: Wilson interval.

    >>> wilson = proportion([1.0] * 8 + [0.0] * 2)
    >>> round(wilson.low, 4), round(wilson.high, 4)
    (0.4902, 0.9433)
    """
    n, share = len(values), sum(values) / len(values)
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Estimate(share, _standard_error(values, share), max(0.0, centre - half), min(1.0, centre + half))


def over_tasks(samples: Sequence[Sequence[float]]) -> Estimate:
    """Of the samples of each task, at least one: a proportion if all of them are 0 or 1. samples: [tasks][samples]."""
    means = [sum(task) / len(task) for task in samples]
    return proportion(means) if all(value in (0, 1) for task in samples for value in task) else mean(means)


def passes(right: Sequence[Sequence[bool]], samples: int) -> dict[int, Estimate]:
    """pass@k for k = 1, 2, 4 ... and `samples`: over the tasks with k samples or more. right: [tasks][samples]."""
    ks = sorted({*(1 << i for i in range(samples.bit_length())), samples})
    found = {k: [pass_at_k(len(task), sum(task), k) for task in right if len(task) >= k] for k in ks}
    return {k: proportion(values) for k, values in found.items() if values}


def _standard_error(values: Sequence[float], centre: float) -> float | None:
    n = len(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (n - 1) / n) if n > 1 else None
