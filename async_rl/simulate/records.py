"""Pure: what a simulation remembers: of every batch a digest, of every generator what it ran and when.

Figures are computed from these alone, as an auditor would, and not from what the controller believes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from async_rl.wire.messages import MicroBatches

Seconds: TypeAlias = float
"""Virtual, since the run began."""


class TrainedRollout(NamedTuple):
    group_id: int
    member: int
    lags: tuple[tuple[int, int], ...]
    """(lag, wire tokens), oldest first. lag = v_train - version; a token of an abandoned later lineage has lag 0."""

    @property
    def tokens(self) -> int:
        """Wire tokens."""
        return sum(count for _, count in self.lags)


@dataclass(slots=True)
class StepDigest:
    """One batch as the learner saw it."""

    step: int
    version: int
    """v_train."""
    rollouts: list[TrainedRollout]
    received_at: Seconds
    began_at: Seconds = 0.0
    done_at: Seconds = 0.0

    @property
    def tokens(self) -> int:
        """Wire tokens."""
        return sum(rollout.tokens for rollout in self.rollouts)


def digest(batch: MicroBatches, now: Seconds) -> StepDigest:
    version = batch.version
    rollouts = [
        TrainedRollout(
            rollout.group_id,
            rollout.member,
            tuple(
                (max(0, version - span.version), span.end - span.start)
                for sequence in rollout.sequences
                for span in sequence.spans
            ),
        )
        for rollout in batch.rollouts
    ]
    return StepDigest(batch.step, version, rollouts, now)


@dataclass(slots=True)
class GeneratorTrace:
    """What one generator did, for the timeline and for mean concurrency."""

    times: list[Seconds] = field(default_factory=list[float])
    """When the number of running rollouts changed."""
    running: list[int] = field(default_factory=list[int])
    """Rollouts that decode from then on."""
    pauses: list[tuple[Seconds, Seconds]] = field(default_factory=list[tuple[float, float]])
    """Weight updates: from, to."""


@dataclass(slots=True)
class RolloutLog:
    """When groups were leased and complete, as the generators saw it; shared by those of one simulation."""

    leased_at: dict[int, Seconds] = field(default_factory=dict[int, float])
    """group -> its first lease"""
    complete_at: dict[int, Seconds] = field(default_factory=dict[int, float])
    """group -> when its last member ended"""
    left: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    """group -> members that have not ended"""

    def leased(self, group_id: int, members: Iterable[int], now: Seconds) -> None:
        if group_id not in self.leased_at:
            self.leased_at[group_id] = now
            self.left[group_id] = set(members)

    def ended(self, group_id: int, member: int, now: Seconds) -> None:
        """Scored, or cancelled; a generator that died may have said it before."""
        left = self.left.get(group_id)
        if left is None:
            return
        left.discard(member)
        if not left:
            del self.left[group_id]
            self.complete_at[group_id] = now
