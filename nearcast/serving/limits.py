"""Every bound of a model host, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """Bounds of one model host.

    Attributes:
        memory_bytes_max: estimated memory of all loaded versions; beyond it no mere fallback stays warm.
        slots: model runs in threads at the same time, over all models.
        threads: threads of one engine run.
        inline_us_max: a version whose warmed p99 is at most this runs on the loop: a thread costs 50-100 µs a call, and
            inline the loop lags by the model's time.
        queue_rows_max: rows that may wait for one version.
        batch_rows_max: rows of one engine run.
        loads_concurrent_max: versions that load at the same time.
        drain_timeout_s: how long a version that was replaced waits for its requests and sequences.
        sequences_max: open sequences of one version with hidden state.
        sequence_idle_s: a sequence without requests for this long is dropped.
        versions_max: versions whose statistics are remembered.
        shadow_interval_s: least time between two inputs that are sampled for a version on trial.
        shadow_queue_max: sampled inputs that wait; shadow_bytes_max: of one; shadow_wait_s: before it is dropped.
        shadow_quiet_s: time without a request after which the node counts as idle.
        shadow_compared_max: comparisons of one version, after which it is known well enough.
    """

    memory_bytes_max: int = 1024 * 1024 * 1024
    slots: int = max(1, min(16, os.cpu_count() or 1))
    threads: int = 1
    inline_us_max: float = 1000.0
    queue_rows_max: int = 256
    batch_rows_max: int = 32
    loads_concurrent_max: int = 1
    drain_timeout_s: float = 30.0
    sequences_max: int = 256
    sequence_idle_s: float = 60.0
    versions_max: int = 1024
    shadow_interval_s: float = 0.01
    shadow_queue_max: int = 16
    shadow_bytes_max: int = 256 * 1024
    shadow_wait_s: float = 1.0
    shadow_quiet_s: float = 0.002
    shadow_compared_max: int = 10_000
