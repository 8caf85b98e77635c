"""The model memory as Prometheus families, made when they are scraped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nearcast.metrics import Collector
from nearcast.serving.residency import Residency

if TYPE_CHECKING:
    from prometheus_client import Metric


class MemoryCollector(Collector):
    """Bytes held, and who came and went. `nearcast_model_reload_alarms` grows while the budget is too small."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not collect to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        memory = self._residency.memory
        yield GaugeMetricFamily("nearcast_model_memory_bytes", "Estimate.", self._residency.held_bytes())
        yield GaugeMetricFamily("nearcast_model_memory_bytes_max", "Budget.", memory.bytes_max)
        for name, text in (
            ("loads", "Versions brought in."),
            ("evictions", "Versions sent away for others."),
            ("reloads", "Versions that came back within a minute after they were sent away."),
            ("alarms", "Minutes with too many reloads."),
        ):
            family = "reload_alarms" if name == "alarms" else name
            yield CounterMetricFamily(f"nearcast_model_{family}", text, memory.counts[name])
        refused = CounterMetricFamily("nearcast_model_loads_refused", "Loads put off or refused.", labels=["obstacle"])
        for obstacle, count in memory.refused.items():
            refused.add_metric([obstacle], count)
        yield refused
