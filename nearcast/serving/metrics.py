"""Our counters as Prometheus families, made when they are scraped: the hot path pays for list additions only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from nearcast.metrics import Collector
from nearcast.serving.statistics import Statistics, bucket_start_us

if TYPE_CHECKING:
    from prometheus_client import Metric

Key: TypeAlias = tuple[str, int]
_EDGES = tuple(16 << (2 * step) for step in range(11))
"""Upper bounds of the exported buckets in µs: 16 µs to 16.8 s in factors of 4, all on bucket limits of ours."""


class HostCollector(Collector):
    """Reads a host's statistics by (model, release). `in_flight` gives the requests inside of each hot version."""

    def __init__(self, statistics: Mapping[Key, Statistics], in_flight: Callable[[], Mapping[Key, int]]) -> None:
        self._statistics = statistics
        self._in_flight = in_flight

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not collect to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        labels = ["model", "version"]
        requests = CounterMetricFamily("nearcast_requests", "Requests by outcome.", labels=[*labels, "code"])
        batches = CounterMetricFamily("nearcast_batches", "Batches by release reason.", labels=[*labels, "reason"])
        refusals = CounterMetricFamily(
            "nearcast_queue_refusals", "Requests that the queue turned away, by why.", labels=[*labels, "reason"]
        )
        rows = CounterMetricFamily("nearcast_batch_rows", "Rows that ran in batches.", labels=labels)
        shadows = CounterMetricFamily("nearcast_shadows", "Shadowed inputs.", labels=[*labels, "outcome"])
        total = HistogramMetricFamily("nearcast_request_duration_seconds", "From arrival to answer.", labels=labels)
        compute = HistogramMetricFamily("nearcast_compute_duration_seconds", "Model time of a request.", labels=labels)
        for (model, release), each in list(self._statistics.items()):
            values = [model, str(release)]
            requests.add_metric([*values, "OK"], each.answered)
            for code, count in each.codes.items():
                requests.add_metric([*values, str(code)], count)
            for reason, count in each.batches.items():
                batches.add_metric([*values, reason], count)
            for reason, count in each.refusals.items():
                refusals.add_metric([*values, reason], count)
            rows.add_metric(values, each.rows)
            for outcome, count in (
                ("agreed", each.compared - each.disagreed),
                ("disagreed", each.disagreed),
                ("dropped", each.shadows_dropped),
            ):
                shadows.add_metric([*values, outcome], count)
            total.add_metric(values, _buckets(each.total), each.total_us / 1e6)
            compute.add_metric(values, _buckets(each.compute), each.compute_us / 1e6)
        in_flight = GaugeMetricFamily("nearcast_in_flight", "Requests inside of a hot version.", labels=labels)
        for (model, release), count in self._in_flight().items():
            in_flight.add_metric([model, str(release)], count)
        return [requests, batches, refusals, rows, shadows, total, compute, in_flight]


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    buckets: list[tuple[str, float]] = []
    index, seen = 0, 0
    for edge in _EDGES:
        while index < len(counts) and bucket_start_us(index) < edge:
            seen += counts[index]
            index += 1
        buckets.append((f"{edge / 1e6:g}", seen))
    return [*buckets, ("+Inf", sum(counts))]
