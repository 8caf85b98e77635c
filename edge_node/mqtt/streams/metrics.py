"""What is counted of streams."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class StreamMetrics:
    """Counters of all streams of one worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._inputs = Counter(
            "nc_mqtt_inputs", "Messages of streams by what became of them on arrival.", ["verdict"], registry=registry
        )
        self._lost = Counter(
            "nc_mqtt_inputs_lost",
            "Messages of streams that their devices numbered and that never came.",
            registry=registry,
        )
        self._executed = Counter(
            "nc_mqtt_inputs_executed", "Messages of streams that are done, by outcome.", ["outcome"], registry=registry
        )
        self._events = Counter("nc_mqtt_events", "Events that streams have brought about.", registry=registry)

    def taken(self, verdict: str, lost: int = 0) -> None:
        """A message arrived: `accept`, `duplicate`, `full`, or the reason why it cannot be used."""
        self._inputs.labels(verdict).inc()
        self._lost.inc(lost)

    def executed(self, done: int, buried: int, events: int) -> None:
        """Effects were committed."""
        self._executed.labels("done").inc(done)
        self._executed.labels("buried").inc(buried)
        self._events.inc(events)
