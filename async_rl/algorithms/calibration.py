"""Is stated confidence right? Expected calibration error (Guo et al. 2017, arXiv:1706.04599, Eq. 3) and Brier score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Bin(NamedTuple):
    """Answers with confidence in [low, high); the last bin includes 1."""

    low: float
    high: float
    answers: int
    confidence: float
    accuracy: float


def reliability(confidence: Sequence[float], correct: Sequence[float], *, bins: int = 10) -> list[Bin]:
    """The non-empty bins of equal width."""
    members: list[list[int]] = [[] for _ in range(bins)]
    for i, value in enumerate(confidence):
        members[min(int(value * bins), bins - 1)].append(i)
    return [
        Bin(
            b / bins, (b + 1) / bins, len(inside),
            sum(confidence[i] for i in inside) / len(inside), sum(correct[i] for i in inside) / len(inside),
        )
        for b, inside in enumerate(members)
        if inside
    ]  # fmt: skip


def ece(confidence: Sequence[float], correct: Sequence[float], *, bins: int = 10) -> float:
    table = reliability(confidence, correct, bins=bins)
    return sum(b.answers * abs(b.confidence - b.accuracy) for b in table) / len(confidence)


def brier(confidence: Sequence[float], correct: Sequence[float]) -> float:
    return sum((p - y) ** 2 for p, y in zip(confidence, correct, strict=True)) / len(confidence)
