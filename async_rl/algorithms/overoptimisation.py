"""Over-optimisation of a proxy reward: the alarm, and the curve it follows (Gao et al. 2022, arXiv:2210.10760).

R_gold(d) = d (alpha - beta ln d), d = sqrt(KL to the reference) (RL form, Eq. 2); its peak is at exp(alpha / beta -
1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Overoptimisation(NamedTuple):
    peak_index: int
    """The evaluation with the best gold score."""
    overoptimised: bool
    gap_at_end: float
    """Proxy minus gold at the last evaluation."""


def detect_overoptimisation(proxy: Sequence[float], gold: Sequence[float], *, patience: int = 2) -> Overoptimisation:
    """Alarm when the gold score has not reached its peak again for `patience` evaluations while the proxy rose."""
    peak = max(range(len(gold)), key=lambda i: gold[i])
    alarm = len(gold) - 1 - peak >= patience and proxy[-1] > proxy[peak] and gold[-1] < gold[peak]
    return Overoptimisation(peak, alarm, proxy[-1] - gold[-1])


def gold_curve(distance: float, *, alpha: float, beta: float) -> float:
    return distance * (alpha - beta * math.log(distance)) if distance > 0 else 0.0


def gold_peak(*, alpha: float, beta: float) -> float:
    """The distance at which the gold score is highest."""
    return math.exp(alpha / beta - 1.0)
