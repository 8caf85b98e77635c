"""Envoy's outlier detection: who fails again and again is left out for a while."""

from __future__ import annotations

from collections.abc import Sequence

from nearcast.errors import CATALOGUE, Code

CONSECUTIVE_FAILURES = 5
EJECTION_S = 30.0
EJECTION_S_MAX = 300.0
INTERVAL_S = 10.0
EJECTED_SHARE_MAX = 0.10


class Outliers:
    """Ejects a node after five failures in a row, for 30 s times the number of its ejections, at most 300 s.

    Source: Envoy's `outlier_detection` with its defaults (consecutive_5xx, base_ejection_time, max_ejection_time,
    max_ejection_percent, interval; gRFC A50 has the same numbers): a node is ejected only while less than a tenth of
    all are, so one always may be; every healthy interval takes one ejection off the count. A refusal (429) is no
    failure. Our one liberty is in its favour: an ejection ends when its time is over, not at the next interval.
    The baselines whose authors published no treatment of failures use it, so that no node that fails fast fools them.
    """

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}
        self._ejections: dict[str, int] = {}
        self._until: dict[str, float] = {}
        self._hosts = 1

    def observe(self, now: float, node: str, code: Code | None) -> None:
        """Take how a request on `node` ended."""
        if code is None or CATALOGUE[code].http < 500:
            self._failures[node] = 0
            return
        self._failures[node] = failures = self._failures.get(node, 0) + 1
        ejected = sum(until > now for until in self._until.values())
        if failures >= CONSECUTIVE_FAILURES and not self.is_ejected(now, node):
            if ejected < EJECTED_SHARE_MAX * self._hosts:
                self._eject(now, node)
            self._failures[node] = 0

    def _eject(self, now: float, node: str) -> None:
        healthy_intervals = int((now - self._until.get(node, now)) / INTERVAL_S)
        self._ejections[node] = ejections = max(0, self._ejections.get(node, 0) - healthy_intervals) + 1
        self._until[node] = now + min(EJECTION_S * ejections, EJECTION_S_MAX)

    def is_ejected(self, now: float, node: str) -> bool:
        """Whether `node` is left out now."""
        return self._until.get(node, 0.0) > now

    def admit(self, now: float, nodes: Sequence[str]) -> Sequence[str]:
        """Those of `nodes` that are not ejected; all of them if none is left or less than half (Envoy's panic)."""
        self._hosts = max(self._hosts, len(nodes))
        if not self._until:
            return nodes
        healthy = [node for node in nodes if self._until.get(node, 0.0) <= now]
        return healthy if 2 * len(healthy) >= len(nodes) else nodes
