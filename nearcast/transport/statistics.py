"""Counts per model version as Triton's statistics extension reports them. Counters only grow."""

from __future__ import annotations

from dataclasses import dataclass

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.handler import Served

MODEL_VERSIONS_MAX = 1024
"""Model versions counted; later ones are not, so that invented names cannot fill the memory."""


@dataclass(slots=True, kw_only=True)
class VersionStatistics:
    """One model version since the start of the process; times in nanoseconds."""

    model: str
    version: str
    last_inference_ms: int = 0
    success_count: int = 0
    success_ns: int = 0
    fail_count: int = 0
    fail_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0


class Statistics:
    """Counts of one process; gRPC and REST listeners may share one."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._versions: dict[tuple[str, str], VersionStatistics] = {}

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

    def of(self, model: str = "", version: str = "") -> list[VersionStatistics]:
        """Entries of one model and version; "" = all."""
        return [
            entry for key, entry in sorted(self._versions.items()) if model in ("", key[0]) and version in ("", key[1])
        ]

    def _entry(self, model: str, version: str) -> VersionStatistics | None:
        entry = self._versions.get((model, version))
        if entry is None and len(self._versions) < MODEL_VERSIONS_MAX:
            entry = self._versions[model, version] = VersionStatistics(model=model, version=version)
        return entry
