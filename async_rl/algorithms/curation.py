"""Choosing prompts and answers (Kimi k1.5, arXiv:2501.12599, Sec. 2.1 and 2.4).

The notes keep only problems that fail best-of-8. The report says something else: the model guesses WITHOUT reasoning,
and a prompt it guesses right within 8 attempts is removed as hackable. Keeping only fail@8 problems would make all-zero
groups.
"""

from __future__ import annotations

from collections.abc import Sequence


def pass_rate(correct: Sequence[float]) -> float:
    """Share of right answers among (10) samples of the SFT model."""
    return sum(correct) / len(correct)


def difficulty(correct: Sequence[float]) -> float:
    return 1.0 - pass_rate(correct)


def survives_guessing(guess_correct: Sequence[float], *, n: int = 8) -> bool:
    """Keep a prompt iff none of the first n guesses without reasoning is right."""
    return not any(guess_correct[:n])


def shortest_correct(lengths: Sequence[float], correct: Sequence[float], *, n: int | None = None) -> int | None:
    """Shortest rejection sampling: index of the shortest right answer among the first n; ties to the lowest index."""
    right = [i for i, flag in enumerate(correct[:n]) if flag]
    return min(right, key=lambda i: lengths[i]) if right else None


def long2short_pairs(
    lengths: Sequence[float], correct: Sequence[float], *, min_ratio: float = 1.5
) -> tuple[int | None, list[int]]:
    """DPO pairs: the shortest right answer, against longer wrong ones and right ones at least `min_ratio` as long."""
    chosen = shortest_correct(lengths, correct)
    if chosen is None:
        return None, []
    short = lengths[chosen]
    negative = [
        length >= min_ratio * short if right else length > short for length, right in zip(lengths, correct, strict=True)
    ]
    return chosen, [i for i, flag in enumerate(negative) if flag and i != chosen]
