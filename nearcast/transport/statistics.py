"""What passed through a process without engines of its own, such as a router, by model version. Counters only grow."""

from __future__ import annotations

from dataclasses import dataclass

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.counts import VersionCounts
from nearcast.handler import Served

MODEL_VERSIONS_MAX = 1024
"""Model versions counted; later ones are not, so that invented names cannot fill the memory."""


@dataclass(slots=True)
class _Passed:
    last_inference_ms: int = 0
    success_count: int = 0
    success_ns: int = 0
    fail_count: int = 0
    fail_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0


class Statistics:
    """Counts of one process; gRPC and REST listeners may share one.

    It sees requests and not the engines' runs, which happen elsewhere: those count as none, and a request as one row.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._versions: dict[tuple[str, str], _Passed] = {}

    def succeed(self, model: str, version: str, served: Served, elapsed_s: float) -> None:
        """Count an answered request."""
        entry = self._entry(model, version)
        if entry is not None:
            entry.last_inference_ms = int(self._clock.wall() * 1e3)
            entry.success_count += 1
            entry.success_ns += int(elapsed_s * 1e9)
            entry.queue_ns += int(served.queue_us) * 1000
            entry.compute_ns += int(served.compute_us) * 1000

    def fail(self, model: str, version: str, elapsed_s: float) -> None:
        """Count a failed request of a model that has answered before."""
        entry = self._versions.get((model, version))
        if entry is not None:
            entry.fail_count += 1
            entry.fail_ns += int(elapsed_s * 1e9)

    def counts(self, model: str = "", version: str = "") -> list[VersionCounts]:
        """Entries of one model and version; "" = all."""
        return [
            VersionCounts(
                model=name,
                version=release,
                last_inference_ms=entry.last_inference_ms,
                rows=entry.success_count,
                success=(entry.success_count, entry.success_ns),
                fail=(entry.fail_count, entry.fail_ns),
                queue=(entry.success_count, entry.queue_ns),
                compute=(entry.success_count, entry.compute_ns),
            )
            for (name, release), entry in sorted(self._versions.items())
            if model in ("", name) and version in ("", release)
        ]

    def _entry(self, model: str, version: str) -> _Passed | None:
        entry = self._versions.get((model, version))
        if entry is None and len(self._versions) < MODEL_VERSIONS_MAX:
            entry = self._versions[model, version] = _Passed()
        return entry
