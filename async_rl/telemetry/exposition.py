"""Metrics in Prometheus' text format, in a registry of their own: nothing is global.

page = exposition(reading)      # some 5 us a line; may run in a thread
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from async_rl.telemetry.metric_table import SECTIONS
from async_rl.telemetry.metrics import Metric
from async_rl.telemetry.reading import Reading
from async_rl.telemetry.totals import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(reading: Reading) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reader(reading))
    return generate_latest(registry)


class _Reader(Collector):
    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def collect(self) -> Iterator[Family]:
        for section in SECTIONS:
            for metric in section.metrics:
                yield _family(metric, self._reading)


def _family(metric: Metric, reading: Reading) -> Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, value in metric.values(reading):
            assert isinstance(value, Histogram)
            histogram.add_metric(labels, value.buckets(), value.sum)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    found = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in metric.values(reading):
        assert not isinstance(value, Histogram)
        found.add_metric(labels, value)
    return found
