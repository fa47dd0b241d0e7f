"""Which problems to sample: Kimi k1.5's prioritized sampling (arXiv:2501.12599, Sec. 2.3.2) and DAPO's dynamic
sampling.

The curriculum and its rewards are Kimi's; one set of notes attributes them to DeepSeek-R1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def prioritized_probabilities(success: Sequence[float], *, floor: float = 0.0) -> list[float]:
    """Probability of each problem, proportional to max(1 - success rate, floor); uniform when all are solved."""
    weights = [max(1.0 - rate, floor) for rate in success]
    total = sum(weights)
    return [weight / total for weight in weights] if total > 0 else [1.0 / len(weights) for _ in weights]


def success_rate(rate: float, outcome: float, *, alpha: float = 0.1) -> float:
    """The problem's moving success rate after one more outcome; start at 0.5."""
    return rate + alpha * (outcome - rate)


def keep_group(rewards_G: Sequence[float]) -> bool:
    """Dynamic sampling (arXiv:2503.14476, Eq. 11): only groups whose rewards differ carry a gradient. NaN is left
    out.
    """
    known = [reward for reward in rewards_G if not math.isnan(reward)]
    return bool(known) and max(known) > min(known)
