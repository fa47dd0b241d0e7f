"""Pure: is what is trained as long as what was submitted? Over cohorts of admitted groups, each followed to its end.

A system that drops, masks or overtakes long rollouts trains on shorter ones than its policy samples, and what it trains
on becomes shorter still. Comparing batches with arrivals would hide that: what is still on its way is the long part.
Groups that a filter took out were chosen for their rewards and stand apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RATIO_BAND = (0.95, 1.05)
"""Outside of it, the lengths of what is trained (or of its tokens with weight) are reported as biased."""


@dataclass(frozen=True, slots=True)
class CohortReport:
    cohort: int
    submitted: int
    """Rollouts that were sampled, those of filtered groups apart. A withdrawn one is as long as it had become."""
    trained: int
    ratio: float
    """Mean length trained / submitted."""
    weighted_ratio: float
    """The same for tokens with weight."""
    ks: float
    """Largest distance between the two cumulative distributions of length (Kolmogorov-Smirnov), 0 to 1."""
    masked_by_decile: list[float]
    """Masked share of the tokens of trained rollouts, by their length, shortest tenth first."""
    fully_masked: int
    """Trained rollouts without a token of weight."""

    @property
    def biased(self) -> bool:
        low, high = RATIO_BAND
        return not (low <= self.ratio <= high and low <= self.weighted_ratio)

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Group:
    tokens: dict[int, int] = field(default_factory=dict[int, int])
    masked: dict[int, int] = field(default_factory=dict[int, int])
    trained: set[int] = field(default_factory=set[int])
    ended: int = 0
    filtered: bool = False


class LengthCohorts:
    """A cohort is `groups` groups, admitted one after the other; those admitted before `first_group` are left out."""

    def __init__(self, groups: int, group_size: int, first_group: int = 0) -> None:
        self._size, self._group_size = groups, group_size
        self._first = -(-first_group // groups)
        self._groups: dict[int, dict[int, _Group]] = {}
        """cohort -> group id -> what is known of it"""
        self._void: set[int] = set()

    def scored(self, group_id: int, member: int, tokens: int) -> None:
        """It ended after so many sampled tokens."""
        self._group(group_id).tokens[member] = tokens

    def withdrawn(self, group_id: int, member: int, tokens: int) -> None:
        """It was cancelled, perhaps while it was being sampled: it would have been at least so long."""
        if tokens:
            self._group(group_id).tokens.setdefault(member, tokens)

    def composed(self, group_id: int, member: int, masked: int) -> None:
        """It is in a batch, in which so many of its tokens have no weight."""
        self._group(group_id).masked[member] = masked

    def ended(self, group_id: int, members: Sequence[int], event: str, *, followed: bool = True) -> CohortReport | None:
        """Their terminal event. followed=False: the run is over before the rollout is. Returns the report of the cohort
        that is complete with it."""
        cohort = group_id // self._size
        if cohort < self._first:
            return None
        group = self._group(group_id)
        group.ended += len(members)
        group.filtered |= event == "filtered"
        if event == "trained":
            group.trained.update(members)
        if not followed:
            self._void.add(cohort)
        groups = self._groups[cohort]
        if len(groups) < self._size or any(one.ended < self._group_size for one in groups.values()):
            return None
        del self._groups[cohort]
        return None if cohort in self._void else _report(cohort, list(groups.values()))

    def _group(self, group_id: int) -> _Group:
        return self._groups.setdefault(group_id // self._size, {}).setdefault(group_id, _Group())


def _report(cohort: int, groups: list[_Group]) -> CohortReport | None:
    kept = [group for group in groups if not group.filtered]
    submitted = np.array([tokens for group in kept for tokens in group.tokens.values()], np.float64)
    pairs = [(group.tokens.get(m, 0), group.masked.get(m, 0)) for group in kept for m in group.trained]
    if not len(submitted) or not pairs:
        return None
    lengths, masked = np.array(pairs, np.float64).T
    order = np.argsort(lengths, kind="stable")
    deciles = [part for part in np.array_split(order, 10) if len(part)]
    points = np.unique(np.concatenate([submitted, lengths]))
    cdf = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (submitted, lengths)]
    return CohortReport(
        cohort=cohort,
        submitted=len(submitted),
        trained=len(lengths),
        ratio=float(lengths.mean() / submitted.mean()),
        weighted_ratio=float((lengths - masked).mean() / submitted.mean()),
        ks=float(np.abs(cdf[0] - cdf[1]).max()),
        masked_by_decile=[float(masked[part].sum() / max(1.0, lengths[part].sum())) for part in deciles],
        fully_masked=int(np.count_nonzero(masked >= lengths)),
    )
