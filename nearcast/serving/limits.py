"""Every bound of a model host, in one place."""

from __future__ import annotations

import os

import msgspec

CORES = len(os.sched_getaffinity(0))
SLOTS = max(1, min(16, CORES))


class HostLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one model host.

    Attributes:
        memory_bytes_max: estimated memory of all loaded versions; what does not fit is loaded when a request asks.
        memory_protect_s: how long a version that came in may stay, and one that went must find free room; see `memory`.
        pinned: models that are never sent away.
        reloads_max: versions that may come back within a minute before there is an alarm.
        load_wait_s_max: how long a request without a deadline waits for a cold model.
        load_waiters_max: requests that wait for cold models.
        slots: model runs in threads at the same time, over all models.
        threads: threads of one engine run, where no profile advises others; see `tuning`.
        tune: measure versions without a profile, in a child of low priority, once they serve.
        inline_us_max: a version whose warmed p99 is at most this runs on the loop: a thread costs 50-100 µs a call, and
            inline the loop lags by the model's time.
        queue_rows_max: rows that may wait for one version; queue_bytes_max: bytes of their requests.
        batch_rows_max: rows of one engine run.
        turn_us_max: after this the loop breathes between requests that cannot be joined and run in a row on it.
        batch_window_us_max: longest that a request waits for company where runs in threads are joined; how long it does
            is learnt from the load, and is 0 for a lone client. 0 = never.
        priority_levels: of requests, 1 is the highest. A request of level 0, or beyond the lowest, has
            `priority_default`.
        priority_age_ms: a request of level p is overtaken only by what arrives within (p - 1) times this after it.
        real_time: the event loop's thread goes before all ordinary ones of the machine while it uses little of its
            core, where the system grants that; see `loop_rank`.
        late_quantile: a request that would have to wait is refused at once if its deadline would be missed at this
            quantile of the measured run times, one that need not at their median; 0 = it is run all the same.
        cache_bytes_max: answers that are remembered for models whose manifest allows it, of all models together.
        cache_request_bytes_max: a larger request is not looked up.
        loads_concurrent_max: versions that load at the same time.
        loads_at_start_max: the same before the host answers anybody, and at most one for each processor.
        drain_timeout_s: how long a version that was replaced waits for its requests and sequences.
        sequences_max: open sequences of one version with hidden state.
        sequence_idle_s: a sequence without requests for this long is dropped.
        versions_max: versions whose statistics are remembered.
        load_interval_s: how often an answer of a version also says how the host is.
        shadow_interval_s: least time between two inputs that are sampled for a version on trial.
        shadow_queue_max: sampled inputs that wait; shadow_bytes_max: of one; shadow_wait_s: before it is dropped.
        shadow_quiet_s: time without a request after which the node counts as idle.
        shadow_compared_max: comparisons of one version, after which it is known well enough.
    """

    memory_bytes_max: int = 1024 * 1024 * 1024
    memory_protect_s: float = 10.0
    pinned: frozenset[str] = frozenset()
    reloads_max: int = 10
    load_wait_s_max: float = 10.0
    load_waiters_max: int = 256
    slots: int = SLOTS
    threads: int = 1
    tune: bool = False
    inline_us_max: float = 1000.0
    queue_rows_max: int = 256
    queue_bytes_max: int = 64 * 1024 * 1024
    batch_rows_max: int = 32
    turn_us_max: float = 2000.0
    batch_window_us_max: float = 1000.0
    priority_levels: int = 3
    priority_default: int = 2
    priority_age_ms: float = 1000.0
    real_time: bool = True
    late_quantile: float = 0.95
    cache_bytes_max: int = 64 * 1024 * 1024
    cache_request_bytes_max: int = 1024 * 1024
    loads_concurrent_max: int = 1
    loads_at_start_max: int = 2
    drain_timeout_s: float = 30.0
    sequences_max: int = 256
    sequence_idle_s: float = 60.0
    versions_max: int = 1024
    load_interval_s: float = 0.05
    shadow_interval_s: float = 0.01
    shadow_queue_max: int = 16
    shadow_bytes_max: int = 256 * 1024
    shadow_wait_s: float = 1.0
    shadow_quiet_s: float = 0.002
    shadow_compared_max: int = 10_000
