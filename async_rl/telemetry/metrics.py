"""Pure: what a metric of /metrics is, and the ways its values come out of a Reading (telemetry.metric_table)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from async_rl.telemetry.reading import CONNECTIONS, GeneratorReading, Reading
from async_rl.telemetry.totals import Histogram, mismatch_by_lag

PREFIX = "async_rl_"
MAX_NAMES = 64
"""Values of a label that an environment or an algorithm chooses."""

Labels: TypeAlias = tuple[str, ...]
Value: TypeAlias = tuple[Labels, float | Histogram]
Values: TypeAlias = Callable[[Reading], Iterable[Value]]
"""Nothing where it is not known yet."""
One: TypeAlias = Callable[[Reading], float | Histogram | None]
Kind: TypeAlias = Literal["counter", "gauge", "histogram"]


class Metric(NamedTuple):
    name: str
    """With its unit; counters end in _total."""
    kind: Kind
    help: str
    labels: Labels
    values: Values


class Section(NamedTuple):
    title: str
    metrics: Sequence[Metric]


def counter(name: str, help: str, one: One) -> Metric:
    return Metric(PREFIX + name, "counter", help, (), _only(one))


def counters(name: str, labels: str, help: str, values: Values) -> Metric:
    return Metric(PREFIX + name, "counter", help, tuple(labels.split()), values)


def gauge(name: str, help: str, one: One) -> Metric:
    return Metric(PREFIX + name, "gauge", help, (), _only(one))


def gauges(name: str, labels: str, help: str, values: Values) -> Metric:
    return Metric(PREFIX + name, "gauge", help, tuple(labels.split()), values)


def histogram(name: str, help: str, one: One) -> Metric:
    return Metric(PREFIX + name, "histogram", help, (), _only(one))


def histograms(name: str, labels: str, help: str, values: Values) -> Metric:
    return Metric(PREFIX + name, "histogram", help, tuple(labels.split()), values)


# --- where values come from -----------------------------------------------------------------------------------


def _only(one: One) -> Values:
    def values(reading: Reading) -> Iterator[Value]:
        found = one(reading)
        if found is not None:
            yield (), found

    return values


def of_row(name: str) -> One:
    """A number of the last step."""
    return lambda reading: reading.row.get(name)


def of_rows(**names: str) -> Values:
    """label -> a number of the last step"""
    return lambda reading: [((label,), reading.row[name]) for label, name in names.items() if name in reading.row]


def each(mapping: Callable[[Reading], Mapping[Any, Any]]) -> Values:
    return lambda reading: [((str(key),), value) for key, value in mapping(reading).items()]


def each_two(mapping: Callable[[Reading], Mapping[str, Mapping[str, float]]]) -> Values:
    return lambda reading: [((a, b), value) for a, by in mapping(reading).items() for b, value in by.items()]


def mismatch(what: str) -> Values:
    """lag -> abs, k3 or tokens"""
    return each(lambda reading: mismatch_by_lag(reading.row, what))


def one_of(names: Sequence[str], now: Callable[[Reading], str]) -> Values:
    """1 for the one it is in, 0 for the others."""
    return lambda reading: [((name,), float(name == now(reading))) for name in names]


def of_generators(value: Callable[[GeneratorReading], float | None]) -> Values:
    def values(reading: Reading) -> Iterator[Value]:
        for one in reading.generators:
            found = value(one)
            if found is not None:
                yield (one.name,), found

    return values


def of_engines(*names: str) -> Values:
    """The first of these gauges that the engine has."""
    return of_generators(lambda one: next((one.gauges[name] for name in names if name in one.gauges), None))


def run_info(reading: Reading) -> Iterable[Value]:
    run = reading.run
    yield (reading.name, run.environment.name, run.algorithm.preset, run.placement, run.staleness.on_stale), 1.0


def ended(reading: Reading) -> Iterable[Value]:
    """By reason; what has none, or ended before reasons were counted, stands under the empty one."""
    for event in ("trained", "filtered", "failed", "cancelled"):
        kinds = reading.ledger.reasons.get(event, {})
        total: int = getattr(reading.ledger, event)
        yield (event, ""), total - sum(count for kind, count in kinds.items() if kind)
        for kind, count in kinds.items():
            if kind:
                yield (event, kind), count


def unaccounted(reading: Reading) -> float:
    run = reading.ledger
    return run.admitted - run.trained - run.filtered - run.failed - run.cancelled - sum(reading.alive.values())


def mask_budget(reading: Reading) -> float | None:
    staleness = reading.run.staleness
    return staleness.mask_budget if staleness.on_stale == "mask" else None


def length_ratios(reading: Reading) -> Iterable[Value]:
    length = reading.row.get("length")
    if length is None:
        return []
    return [(("trained",), length["ratio"]), (("weighted",), length["weighted_ratio"])]


def connections(reading: Reading) -> Iterable[Value]:
    return [((state,), sum(one.connection == state for one in reading.generators)) for state in CONNECTIONS]


def environment_metrics(reading: Reading) -> Iterable[Value]:
    named = [(n.removeprefix("train_"), v) for n, v in reading.row.items() if n.startswith("train_") and n != "train_s"]
    return [((name,), value) for name, value in sorted(named)[:MAX_NAMES]]


def evaluation_metrics(reading: Reading) -> Iterable[Value]:
    one = reading.evaluation
    return [] if one is None else [((name,), value) for name, value in sorted(one.metrics.items())[:MAX_NAMES]]


_KEYS = (
    "reward reward_std ess_frac ess_frac_raw stale_fraction guarded_fraction clip_fraction_low clip_fraction_high "
    "clip_fraction_dual masked_fraction early_fraction equal_version_gap equal_version_gap_max equal_version_k3 "
    "equal_version_limit "
    "completion_length_mean sequence_length_mean sequence_length_max entropy kl_k3 grad_norm loss learning_rate "
    "weights_changed train_s lag_mean lag_p95 lag_max head_lag_mean head_lag_max version step wall_s timestamp epoch "
    "lineage ready running tokens samples tokens_per_cpu_s"
)
"""Keys of a row that have a metric of their own, or say what another one says."""
_SHOWN = frozenset(_KEYS.split())


def other_numbers(reading: Reading) -> Iterable[Value]:
    """Plain numbers of the row that have no metric of their own."""
    found = [(name, float(value)) for name, value in reading.row.items() if isinstance(value, int | float)]
    rest = [(n, v) for n, v in found if n not in _SHOWN and not n.startswith(("train_", "mismatch_lag_"))]
    return [((name,), value) for name, value in sorted(rest)[:MAX_NAMES]]
