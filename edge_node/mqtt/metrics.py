"""What the MQTT worker counts."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class MqttMetrics:
    """Counters of one worker, in `registry` or in one of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        into = self.registry
        self._answered = Counter("nc_mqtt_requests", "Answered requests by status.", ["status"], registry=into)
        self._refused = Counter(
            "nc_mqtt_refused", "Messages that were not accepted, by status.", ["status"], registry=into
        )
        self._replayed = Counter(
            "nc_mqtt_duplicates", "Requests that came again with the same correlation.", registry=into
        )
        self._dropped = Counter("nc_mqtt_replies_dropped", "Messages given up, by reason.", ["reason"], registry=into)
        self._pending = Gauge("nc_mqtt_pending", "Requests accepted and not yet answered.", registry=into)
        self._outbox = Gauge("nc_mqtt_outbox_bytes", "Events on disk that a link has not taken.", registry=into)
        self._behind = Gauge(
            "nc_mqtt_behind", "Topics, or streams, with messages that are only on disk, by lane.", ["lane"],
            registry=into,
        )  # fmt: skip
        self._upstream = Gauge("nc_mqtt_upstream_connected", "1 while the upstream broker is there.", registry=into)
        self._connected = Gauge("nc_mqtt_connected", "1 while the broker is connected.", registry=into)
        self._unreadable = Counter("nc_mqtt_unreadable", "Messages that made no sense as MQTT.", registry=into)
        self._early = Counter(
            "nc_mqtt_acknowledged_early", "Volatile requests acknowledged before their answer.", registry=into
        )
        self._latency = Histogram(
            "nc_mqtt_request_seconds", "Arrival to committed answer.", buckets=_SECONDS, registry=into
        )

    def answered(self, status: str, seconds: float) -> None:
        """An accepted request has its answer."""
        self._answered.labels(status).inc()
        self._latency.observe(seconds)

    def refused(self, status: int) -> None:
        """A message was not accepted."""
        self._refused.labels(str(status)).inc()

    def replayed(self) -> None:
        """A known request came again."""
        self._replayed.inc()

    def dropped(self, reason: str, count: int = 1) -> None:
        """Messages will not reach whom they were for."""
        self._dropped.labels(reason).inc(count)

    def watch_outbox(self, size_bytes: Callable[[], int]) -> None:
        """What waiting events take on disk, asked for when somebody looks."""
        self._outbox.set_function(size_bytes)

    def watch_behind(self, lane: str, count: Callable[[], int]) -> None:
        """How many topics or streams of a lane are in its backlog, asked for when somebody looks."""
        self._behind.labels(lane).set_function(count)

    def upstream(self, *, up: bool) -> None:
        """The upstream broker came or went."""
        self._upstream.set(int(up))

    def watch_pending(self, count: Callable[[], int]) -> None:
        """Requests accepted and not yet answered, asked for when somebody looks."""
        self._pending.set_function(count)

    def unreadable(self) -> None:
        """A message made no sense; it was acknowledged."""
        self._unreadable.inc()

    def acknowledged_early(self, count: int) -> None:
        """Volatile requests whose model took too long for the broker's window."""
        self._early.inc(count)

    def connected(self, *, up: bool) -> None:
        """The broker came or went."""
        self._connected.set(int(up))
