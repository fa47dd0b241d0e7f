"""Pure: the figures of an arm, and whether the promises were kept, from what learner and generators wrote down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import inf

import msgspec
import numpy as np

from async_rl.simulate.arms import ArmName
from async_rl.simulate.fake_cluster import ArmRecord
from async_rl.simulate.records import GeneratorTrace
from async_rl.telemetry.activity import shares
from async_rl.wire.messages import Activity

BUDGET_TOLERANCE = 0.005
"""Masked share above the budget that is still chance: single long rollouts."""
LENGTH_RATIO = (0.99, 1.01)
LEAST_WEIGHTED_RATIO = 0.95
DECILES = 10


class ArmFigures(msgspec.Struct, frozen=True):
    """Of the measured steps, over all seeds. Tokens are real ones, times are virtual."""

    arm: ArmName
    tokens_per_s: float
    """Trained tokens a second, masked ones included."""
    step_s: float
    rollouts: int
    """Trained."""
    lag_tokens: dict[int, float]
    """lag -> share of the trained tokens; lag = v_train - version"""
    lag_head: dict[int, float]
    """lag of the oldest token -> share of the rollouts"""
    masked_share: float
    """Share of the trained tokens over eta: weight 0."""
    masked_by_decile: list[float]
    """The same for each tenth of the rollouts by length, shortest first."""
    fully_masked: int
    """Rollouts without a token of weight."""
    dropped: int
    """Rollouts of the whole run that were cancelled."""
    failed: int
    filtered: int
    """Rollouts of groups that teach nothing."""
    cohort_rollouts: int
    """Of groups that were leased within the measured time and followed to their end; filtered ones apart."""
    length_ratio: float | None
    """Of that cohort: mean length of what was trained / of what was submitted. None: the cohort is empty."""
    weighted_ratio: float | None
    """The same for tokens with weight."""
    early_share: float
    """Rollouts trained before their group was complete."""
    concurrency: float
    """Mean number of rollouts that decode."""
    time: dict[str, dict[str, float]]
    """role -> cause -> share of its time; the shares of a role sum to 1"""
    over_eta: int
    """Wire tokens with weight whose lag was above eta, from the ledger."""
    lost: int
    duplicates: int


class Bound(msgspec.Struct, frozen=True):
    """A promise, and what became of it."""

    arm: ArmName
    name: str
    value: float | None
    limit: str
    held: bool


def figures(records: Sequence[ArmRecord]) -> ArmFigures:
    """One record for each seed."""
    run = records[0].arm.run
    cluster = run.simulate
    eta = records[0].arm.eta
    by_lag, by_head = Counter[int](), Counter[int]()
    lengths: list[int] = []
    masked: list[int] = []
    early = 0
    for record in records:
        complete_at = record.log.complete_at
        for step in record.measured:
            for rollout in step.rollouts:
                head = over = total = 0
                for lag, count in rollout.lags:
                    by_lag[lag] += count
                    total += count
                    head = max(head, lag)
                    over += count if lag > eta else 0
                by_head[head] += 1
                lengths.append(total)
                masked.append(over)
                early += complete_at.get(rollout.group_id, inf) > step.received_at
    seconds = sum(end - begin for begin, end in (record.window for record in records))
    tokens, rollouts = sum(lengths), len(lengths)
    ended = Counter[str]()
    for record in records:
        for event in record.events:
            ended[event.event] += len(event.members)
    submitted, trained, weighted, followed = _cohorts(records, eta)
    return ArmFigures(
        arm=records[0].arm.name,
        tokens_per_s=tokens * cluster.block_tokens / seconds,
        step_s=seconds / (cluster.measured_steps * len(records)),
        rollouts=rollouts,
        lag_tokens={lag: count / tokens for lag, count in sorted(by_lag.items())},
        lag_head={lag: count / rollouts for lag, count in sorted(by_head.items())},
        masked_share=sum(masked) / tokens,
        masked_by_decile=_by_decile(lengths, masked),
        fully_masked=sum(over == length for over, length in zip(masked, lengths, strict=True)),
        dropped=ended["cancelled"],
        failed=ended["failed"],
        filtered=ended["filtered"],
        cohort_rollouts=followed,
        length_ratio=trained / submitted if submitted else None,
        weighted_ratio=weighted / submitted if submitted else None,
        early_share=early / rollouts,
        concurrency=sum(_area(trace, *record.window) for record in records for trace in record.traces) / seconds,
        time=_time(records),
        over_eta=sum(record.report["over_eta"] for record in records),
        lost=sum(record.report["lost"] for record in records),
        duplicates=sum(record.report["duplicates"] for record in records),
    )


def bounds(record: ArmRecord, found: ArmFigures) -> list[Bound]:
    """The promises of DESIGN.md 1 that a simulation can check; without a staleness bound (`off`) there are fewer."""
    arm = record.arm
    checked = [
        _bound(found, "rollouts lost", found.lost, most=0),
        _bound(found, "rollouts that ended twice", found.duplicates, most=0),
    ]
    if arm.eta < inf:
        checked.append(_bound(found, "tokens over eta with weight", found.over_eta, most=0))
        checked.append(_bound(found, "masked share", found.masked_share, most=arm.masked_share + BUDGET_TOLERANCE))
    if arm.run.staleness.on_stale != "drop":
        checked.append(_bound(found, "dropped rollouts", found.dropped, most=0))
    least, most = LENGTH_RATIO
    checked.append(_bound(found, "length ratio", found.length_ratio, least=least, most=most))
    checked.append(
        _bound(found, "length ratio of tokens with weight", found.weighted_ratio, least=LEAST_WEIGHTED_RATIO)
    )
    return checked


def _bound(
    found: ArmFigures, name: str, value: float | None, *, least: float | None = None, most: float | None = None
) -> Bound:
    limits = [f"at least {least:g}" if least is not None else "", f"at most {most:g}" if most is not None else ""]
    held = value is not None and (least is None or value >= least) and (most is None or value <= most)
    return Bound(found.arm, name, value, ", ".join(limit for limit in limits if limit), held)


def _cohorts(records: Sequence[ArmRecord], eta: float) -> tuple[float, float, float, int]:
    """Mean wire tokens of what was submitted, of what was trained, of what had weight in it; rollouts followed."""
    submitted: list[int] = []
    trained: list[int] = []
    weighted = 0
    for record in records:
        groups = set(cohort(record))
        for group_id in groups:
            submitted += record.workload.group(group_id).tokens
        for step in record.steps:
            for rollout in step.rollouts:
                if rollout.group_id in groups:
                    trained.append(rollout.tokens)
                    weighted += sum(count for lag, count in rollout.lags if lag <= eta)
    if not trained:
        return 0.0, 0.0, 0.0, 0
    return sum(submitted) / len(submitted), sum(trained) / len(trained), weighted / len(trained), len(submitted)


def cohort(record: ArmRecord) -> list[int]:
    """Groups first leased within the measured time, as far as every older one has come to its end too: a cut that
    looked at each group alone would keep the short ones. Filtered groups are left out."""
    began, end = record.window
    size = record.arm.run.rollout.group_size
    ended = Counter[int](rollout.group_id for step in record.steps for rollout in step.rollouts)
    filtered: set[int] = set()
    for event in record.events:
        ended[event.group_id] += len(event.members)
        if event.event == "filtered":
            filtered.add(event.group_id)
    followed: list[int] = []
    for group_id, leased_at in sorted(record.log.leased_at.items()):
        if ended[group_id] < size:
            break
        if began <= leased_at <= end and group_id not in filtered:
            followed.append(group_id)
    return followed


def _by_decile(lengths: list[int], masked: list[int]) -> list[float]:
    lengths_R, masked_R = np.array(lengths), np.array(masked)
    parts = np.array_split(np.argsort(lengths_R, kind="stable"), DECILES)
    return [float(masked_R[part].sum() / max(1, lengths_R[part].sum())) for part in parts]


def _area(trace: GeneratorTrace, begin: float, end: float) -> float:
    """Rollouts times seconds between two moments."""
    if not trace.times:
        return 0.0
    edges = np.clip(np.array([*trace.times, inf]), begin, end)
    return float((np.diff(edges) * np.array(trace.running)).sum())


def _time(records: Sequence[ArmRecord]) -> dict[str, dict[str, float]]:
    """Generators are averaged."""
    gathered: dict[str, Counter[str]] = {"generator": Counter(), "learner": Counter()}
    for record in records:
        warm, last = record.arm.run.simulate.warmup_steps, record.arm.steps - 1
        before = record.spent.get(warm - 1, {})
        for process, seconds in record.spent[last].items():
            role = process.split("-")[0]
            found = shares(Activity(0.0, before.get(process, {}), 0.0), Activity(0.0, seconds, 0.0))
            gathered[role].update(found)
    return {
        role: {cause: share / causes.total() for cause, share in causes.most_common() if share > 0}
        for role, causes in gathered.items()
    }
