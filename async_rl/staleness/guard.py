"""Pure: the hard staleness bound on tokens, from version spans, where a batch is formed.

The learner applies the same rule again to every token and asserts it in the loss (learner.step).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from async_rl.wire.messages import RolloutResult


@dataclass(frozen=True, slots=True)
class LagHistogram:
    """Sampled tokens by lag = training version - token version, both as in DESIGN.md 4: queue time counts."""

    max_staleness: int
    tokens: Counter[int] = field(default_factory=Counter[int])
    """lag -> tokens"""

    @property
    def stale_tokens(self) -> int:
        """Over the bound: weight 0."""
        return sum(count for lag, count in self.tokens.items() if lag > self.max_staleness)

    @property
    def weighted_tokens(self) -> int:
        return self.tokens.total() - self.stale_tokens

    @property
    def max_weighted_lag(self) -> int:
        return max((lag for lag in self.tokens if lag <= self.max_staleness), default=0)

    @property
    def masked_fraction(self) -> float:
        return self.stale_tokens / max(1, self.tokens.total())

    def summary(self) -> dict[str, Any]:
        """Mean, 95th percentile and maximum over the tokens with weight; `tokens`: all of them by lag."""
        kept = sorted((lag, count) for lag, count in self.tokens.items() if lag <= self.max_staleness)
        total, reached, p95 = sum(count for _, count in kept), 0, 0
        for lag, count in kept:
            reached += count
            p95 = lag
            if reached >= 0.95 * total:
                break
        mean = sum(lag * count for lag, count in kept) / max(1, total)
        by_lag = {str(lag): count for lag, count in sorted(self.tokens.items())}
        return {"mean": mean, "p95": p95, "max": self.max_weighted_lag, "tokens": by_lag}


def tokens_by_version(result: RolloutResult) -> Counter[int]:
    """version -> sampled tokens of a rollout"""
    tokens: Counter[int] = Counter()
    for sequence in result.sequences:
        for span in sequence.spans:
            tokens[span.version] += span.end - span.start
    return tokens


def measure(results: Iterable[RolloutResult], *, version: int, max_staleness: int) -> LagHistogram:
    """`version` is the one the step starts from. Tokens of an abandoned, later lineage count as lag 0."""
    tokens: Counter[int] = Counter()
    for result in results:
        for sampled, count in tokens_by_version(result).items():
            tokens[max(0, version - sampled)] += count
    return LagHistogram(max_staleness, tokens)
