"""Length reward of Kimi k1.5 (arXiv:2501.12599, Sec. 2.3.3) over the answers to ONE problem.

    lambda = 0.5 - (len - min) / (max - min);   correct: lambda, wrong: min(0, lambda);   0 if max = min
    total = reward + weight * length reward,    weight = 0 before `start`, then constant

The notes compute it over the batch and leave the weight out; it is per problem, added with a weight, and switched on
late. It is no "full reward for correct": a long correct answer gets a negative one. The weight is unpublished; 0.2 is
ours.
"""

from __future__ import annotations

from collections.abc import Sequence


def kimi_length_reward(lengths_G: Sequence[float], correct_G: Sequence[float]) -> list[float]:
    """[G] in [-0.5, 0.5]."""
    if not lengths_G or max(lengths_G) == min(lengths_G):
        return [0.0] * len(lengths_G)
    low, high = min(lengths_G), max(lengths_G)
    scores = [0.5 - (length - low) / (high - low) for length in lengths_G]
    return [score if right else min(0.0, score) for score, right in zip(scores, correct_G, strict=True)]


def length_weight(step: int, *, start: int, weight: float = 0.2) -> float:
    return weight if step >= start else 0.0


def add_length_reward(
    rewards_G: Sequence[float], lengths_G: Sequence[float], correct_G: Sequence[float], *, weight: float = 0.2
) -> list[float]:
    """[G] total reward."""
    extra = kimi_length_reward(lengths_G, correct_G)
    return [reward + weight * bonus for reward, bonus in zip(rewards_G, extra, strict=True)]
