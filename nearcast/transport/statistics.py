"""What passed through a process without engines of its own, such as a router, by model version. Counters only grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.counts import VersionCounts
from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.metrics import Collector

if TYPE_CHECKING:
    from prometheus_client import Metric

MODEL_VERSIONS_MAX = 1024
"""Model versions counted; later ones are not, so that invented names cannot fill the memory."""


class _Passed(msgspec.Struct):
    last_inference_s: float = 0.0
    success_count: int = 0
    success_s: float = 0.0
    fail_count: int = 0
    fail_s: float = 0.0
    queue_us: int = 0
    compute_us: int = 0


class Statistics:
    """Counts of one process; gRPC and REST listeners may share one.

    It sees requests and not the engines' runs, which happen elsewhere: those count as none, and a request as one row.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._versions: dict[tuple[str, str], _Passed] = {}

    def succeed(self, model: str, version: str, served: Served, elapsed_s: float) -> None:
        """Count an answered request."""
        entry = self._versions.get((model, version))
        if entry is None:
            if len(self._versions) >= MODEL_VERSIONS_MAX:
                return
            entry = self._versions[model, version] = _Passed()
        entry.last_inference_s = self._clock.wall()
        entry.success_count += 1
        entry.success_s += elapsed_s
        entry.queue_us += served.queue_us
        entry.compute_us += served.compute_us

    def fail(self, model: str, version: str, elapsed_s: float) -> None:
        """Count a failed request of a model that has answered before."""
        entry = self._versions.get((model, version))
        if entry is not None:
            entry.fail_count += 1
            entry.fail_s += elapsed_s

    def counts(self, model: str = "", version: str = "") -> list[VersionCounts]:
        """Entries of one model and version; "" = all."""
        return [
            VersionCounts(
                model=name,
                version=release,
                last_inference_ms=int(entry.last_inference_s * 1e3),
                rows=entry.success_count,
                success=(entry.success_count, int(entry.success_s * 1e9)),
                fail=(entry.fail_count, int(entry.fail_s * 1e9)),
                queue=(entry.success_count, int(entry.queue_us * 1000)),
                # What a node does with tensors is part of what its answers call waiting and computing.
                compute_input=(entry.success_count, 0),
                compute=(entry.success_count, int(entry.compute_us * 1000)),
                compute_output=(entry.success_count, 0),
            )
            for (name, release), entry in sorted(self._versions.items())
            if model in ("", name) and version in ("", release)
        ]


class FramesLetGo(Collector):
    """Frames of `nc-latest` streams that no model was asked about, by why: no host or router hears of those."""

    def __init__(self) -> None:
        self.codes: dict[Code, int] = {}

    def count(self, code: Code) -> None:
        """A frame was answered with this code and let go."""
        self.codes[code] = self.codes.get(code, 0) + 1

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily

        frames = CounterMetricFamily(
            "nearcast_frames_let_go", "Frames of streams that gave way or waited too long.", labels=["code"]
        )
        for code, count in self.codes.items():
            frames.add_metric([code.value], count)
        return [frames]
