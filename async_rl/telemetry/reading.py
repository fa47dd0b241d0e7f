"""Pure: everything about a run at one moment, for whoever shows it: /metrics, the dashboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from async_rl.config import Run
from async_rl.ledger.records import RunRecord
from async_rl.telemetry.journal import EvalSummary, Row
from async_rl.telemetry.totals import Totals
from async_rl.telemetry.usage import UsageReading
from async_rl.wire.messages import TrainRollout

Connection: TypeAlias = Literal["live", "silent", "no_weights"]
"""Samples; its heartbeats are late; has no weights yet."""
CONNECTIONS: tuple[Connection, ...] = ("live", "silent", "no_weights")
STAGES = ("starting", "evaluation", "training", "saving")


class GeneratorReading(NamedTuple):
    name: str
    connection: Connection
    version: int | None
    """Of the weights it samples with."""
    held: int
    """Rollouts it works on."""
    free: int
    """Rollouts it accepts besides."""
    tokens: int
    """Sampled since its process started."""
    gauges: Mapping[str, float]
    """Of its engine."""


class GroupReading(NamedTuple):
    """A group of which something still runs or waits."""

    id: int
    version: int
    """Learner version at admission."""
    states: Mapping[str, int]
    """running, scored, ready -> members"""
    tokens: int
    """Sampled by its running members, as of the last report."""
    holders: Sequence[str]
    """Generators that work on it."""
    seconds: float | None
    """Since its oldest lease; None where it has none."""


class Recent(NamedTuple):
    """A rollout that was trained on."""

    step: int
    rollout: TrainRollout


@dataclass(frozen=True, slots=True)
class Reading:
    run: Run
    name: str
    """Of the run directory."""
    at: float
    """Loop time."""
    stage: str
    """One of STAGES."""
    version: int
    paused: bool
    learner: str
    """absent, trains, waits"""
    ledger: RunRecord
    alive: Mapping[str, int]
    """running, scored, ready, composed -> rollouts"""
    repeats: int
    available: int
    """Slots that the next step can use."""
    free: int
    """Rollouts that the staleness bound still lets in; below 0 where others came back."""
    room: float
    """Rollouts that may run at the same time; infinite where nothing but the bound limits them."""
    queued: int
    """Leases that wait for a generator with credit."""
    lane: str
    """The generator that steps' stragglers go to; empty: none."""
    turn: str
    """Whose turn the shared device is; empty: each role has its own."""
    pending: Sequence[str]
    generators: Sequence[GeneratorReading]
    usage: UsageReading
    totals: Totals
    alarms: Mapping[str, bool]
    """Name -> whether it is on."""
    filtered: int
    """Groups in a row that a filter took out."""
    failed: int
    """Episodes in a row that failed."""
    row: Row = field(default_factory=dict[str, object])
    """Of the last step; empty before the first."""
    evaluation: EvalSummary | None = None


def telling(rollouts: Sequence[TrainRollout]) -> list[TrainRollout]:
    """The best and the worst of the group of a batch whose rewards lie furthest apart."""
    by_group: dict[int, list[TrainRollout]] = {}
    for one in rollouts:
        by_group.setdefault(one.group_id, []).append(one)
    pairs = [(max(g, key=lambda r: r.reward), min(g, key=lambda r: r.reward)) for g in by_group.values()]
    best, worst = max(pairs, key=lambda pair: pair[0].reward - pair[1].reward)
    return [best] if best is worst else [worst, best]
