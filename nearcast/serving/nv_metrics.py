"""The counters under the names that dashboards made for Triton expect, made when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nearcast.errors import Code
from nearcast.metrics import Collector
from nearcast.serving.metrics import Key
from nearcast.serving.statistics import Statistics

if TYPE_CHECKING:
    from prometheus_client import Metric

_LABELS = ("model", "version")
_SUMS: Mapping[str, tuple[str, Callable[[Statistics], int]]] = {
    "nv_inference_request_success": ("Answered requests.", lambda each: each.answered),
    "nv_inference_count": ("Rows that the engine answered.", lambda each: each.inferences),
    "nv_inference_exec_count": ("Runs of the engine.", lambda each: each.executions),
    "nv_inference_request_duration_us": ("Sum of request times.", lambda each: each.success_us),
    "nv_inference_queue_duration_us": ("Sum of queue times.", lambda each: each.wait_us),
    "nv_inference_compute_input_duration_us": ("Sum of times to read and join tensors.", lambda each: each.input_us),
    "nv_inference_compute_infer_duration_us": ("Sum of model times.", lambda each: each.infer_us),
    "nv_inference_compute_output_duration_us": ("Sum of times to take them apart.", lambda each: each.output_us),
    "nv_cache_num_hits_per_model": ("Answers from the response cache.", lambda each: each.cache_hits),
    "nv_cache_num_misses_per_model": ("Answers that it did not have.", lambda each: each.cache_misses),
    "nv_cache_hit_duration_per_model": ("Sum of look-up times, µs.", lambda each: each.cache_hit_us),
    "nv_cache_miss_duration_per_model": ("Sum of look-up times, µs.", lambda each: each.cache_miss_us),
}
_REASONS = {
    Code.OVERLOADED: "REJECTED",
    Code.DEADLINE: "REJECTED",
    Code.SUPERSEDED: "REJECTED",
    Code.CANCELLED: "CANCELED",
    Code.INTERNAL: "BACKEND",
}
_PROC = Path("/proc")


class NvCollector(Collector):
    """Reads a host's statistics by (model, release).

    Args:
        statistics: what is counted.
        waiting: requests that wait for the engine of each hot version.
    """

    def __init__(self, statistics: Mapping[Key, Statistics], waiting: Callable[[], Mapping[Key, int]]) -> None:
        self._statistics = statistics
        self._waiting = waiting
        self._busy_before = _cpu_ticks()

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not collect to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import GaugeMetricFamily, UnknownMetricFamily

        # Triton names its counters without `_total`; as counters ours would gain it.
        sums = {name: UnknownMetricFamily(name, text, labels=_LABELS) for name, (text, _) in _SUMS.items()}
        failures = UnknownMetricFamily("nv_inference_request_failure", "Failed requests.", labels=(*_LABELS, "reason"))
        for (model, release), each in list(self._statistics.items()):
            values = [model, str(release)]
            for name, (_, read) in _SUMS.items():
                sums[name].add_metric(values, read(each))
            reasons = dict.fromkeys(("REJECTED", "CANCELED", "BACKEND", "OTHER"), 0)
            for code, count in each.codes.items():
                reasons[_REASONS.get(code, "OTHER")] += count
            for reason, count in reasons.items():
                failures.add_metric([*values, reason], count)
        pending = GaugeMetricFamily(
            "nv_inference_pending_request_count", "Requests that wait for the engine.", labels=_LABELS
        )
        for (model, release), count in self._waiting().items():
            pending.add_metric([model, str(release)], count)
        return [*sums.values(), failures, pending, *self._machine()]

    def _machine(self) -> list[Metric]:
        """Of the whole machine, as there; the utilisation is that since the scrape before."""
        from prometheus_client.core import GaugeMetricFamily

        gauges = []
        before, self._busy_before = self._busy_before, _cpu_ticks()
        busy, total = (now - then for now, then in zip(self._busy_before, before, strict=True))
        if total > 0:
            gauges.append(GaugeMetricFamily("nv_cpu_utilization", "Share of the processors.", busy / total))
        memory = _memory_bytes()
        if memory is not None:
            gauges.append(GaugeMetricFamily("nv_cpu_memory_total_bytes", "Memory of the machine.", memory[0]))
            gauges.append(GaugeMetricFamily("nv_cpu_memory_used_bytes", "Memory that is not available.", memory[1]))
        return list(gauges)


def _cpu_ticks() -> tuple[int, int]:
    """Busy and all ticks of all processors since boot; (0, 0) where the system does not tell."""
    try:
        with (_PROC / "stat").open() as lines:
            ticks = [int(field) for field in lines.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    return sum(ticks) - sum(ticks[3:5]), sum(ticks)


def _memory_bytes() -> tuple[int, int] | None:
    """Memory of the machine, and how much of it is in use."""
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return found["MemTotal"], found["MemTotal"] - found["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
