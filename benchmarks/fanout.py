"""Many nodes at once: live replica machines and swarms on a fluid network, and 16 real agents behind shaped links."""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace

from benchmarks import fanout_live
from benchmarks.rows import Row
from model_sync.agent.config import AgentConfig
from model_sync.agent.peers.listener import UPLOADS_MAX
from model_sync.controller.config import SyncLimits
from model_sync.controller.hint import RETRY_AFTER_MS
from simulations.herd import HerdSpec, simulate_herd
from simulations.scenarios.sync_fanout import DELTA, FULL, release, rollback
from simulations.sync_fleet import MBIT, FleetSpec
from simulations.sync_node import Payload

NODES, ROLLBACK_NODES = 200, 1_000
HERD_AGENTS = 100_000
LIVE_NODES, LIVE_BYTES = 16, 5_000_000
LIVE_MBIT, LIVE_QUICK_MBIT = 2.0, 3.0
LIVE_RUNS = 3
"""Slow enough that the links count and not the processors that 16 agents share; the origin has ten times as much."""
GOODPUT = 0.94
"""Share of a link that TCP and TLS leave to content: 1448 of 1514 bytes, less acknowledgements and records."""


def run(quick: bool) -> list[Row]:
    """The simulated rows in full, the live ones; `quick` takes a tenth of the polling agents."""
    limits, agent = SyncLimits(), AgentConfig()
    spec = FleetSpec(
        nodes=NODES, uploads_max=UPLOADS_MAX, hint_waiters_max=limits.hint_waiters_max, poll_s=agent.poll_s
    )
    full, delta = release(spec, FULL, until_s=60.0), release(spec, DELTA, until_s=20.0)
    naive = release(replace(spec, knows_peers=False), FULL, until_s=400.0)
    reach_s = rollback(replace(spec, nodes=ROLLBACK_NODES), until_s=30.0)
    agents = HERD_AGENTS // 10 if quick else HERD_AGENTS
    herd = simulate_herd(
        HerdSpec(
            agents=agents,
            poll_s=agent.poll_s,
            hint_wait_s=agent.hint_wait_s,
            hint_cap_s=min(agent.poll_s, agent.limits.backoff_cap_s),
            waiters_max=limits.hint_waiters_max * agents // HERD_AGENTS,
            retry_s=RETRY_AFTER_MS / 1e3,
        )
    )
    egress = full.origin_bytes / FULL.size_bytes
    return [
        Row(
            "fanout.full_p99_s",
            full.fetched_p99_s,
            "s",
            f"p50 {full.fetched_p50_s:.1f} s, active {full.active_p99_s:.1f} s",
        ),
        Row(
            "fanout.delta_p99_s",
            delta.fetched_p99_s,
            "s",
            f"p50 {delta.fetched_p50_s:.1f} s, active {delta.active_p99_s:.1f} s",
        ),
        Row(
            "fanout.origin_egress_blobs",
            egress,
            "x",
            f"{egress * FULL.size_bytes / 1e6:.0f} MB; without peers {NODES} x",
        ),
        Row("fanout.naive_p99_s", naive.fetched_p99_s, "s", "one stream each from the origin"),
        Row("fanout.rollback_reach_s", reach_s, "s", f"{ROLLBACK_NODES} nodes, last pointer"),
        Row(
            "fanout.herd_peak_over_mean",
            herd.peak_per_s / herd.mean_per_s,
            "x",
            f"{agents} agents, peak {herd.peak_per_s:.0f}/s, mean {herd.mean_per_s:.0f}/s",
        ),
        *(_live_rows(LIVE_QUICK_MBIT, 1) if quick else _live_rows(LIVE_MBIT, LIVE_RUNS)),
    ]


def _live_rows(mbit: float, runs: int) -> list[Row]:
    """Real agents against the same setting simulated, the middle of `runs`; no row where namespaces cannot be had."""
    if reason := fanout_live.why_not():
        print(f"fanout.live_over_simulated is not measured: {reason}", file=sys.stderr)
        return []
    measured = [fanout_live.measure(LIVE_NODES, LIVE_BYTES, mbit, 10.0 * mbit) for _ in range(runs)]
    measured.sort(key=lambda result: statistics.median(result.fetched_s))
    live, link = measured[runs // 2], mbit * MBIT * GOODPUT
    spec = FleetSpec(
        nodes=LIVE_NODES,
        up=link,
        down=link,
        origin_up=10.0 * link,
        rtt_s=fanout_live.QUEUE_MS / 1e3,
        loss=0.0,
        uploads_max=UPLOADS_MAX,
    )
    simulated = release(spec, Payload(sha256="a" * 64, size_bytes=live.size_bytes), until_s=120.0)
    live_s = statistics.median(live.fetched_s)
    ratio = live_s / simulated.span_p50_s
    each = ", ".join(f"{statistics.median(result.fetched_s):.1f}" for result in measured)
    note = f"live {each} s (last agent {live.fetched_s[-1]:.1f} s), simulated {simulated.span_p50_s:.1f} s"
    egress = live.origin_bytes / live.size_bytes
    return [
        Row("fanout.live_over_simulated", ratio, "x", note),
        Row("fanout.live_over_simulated_off", abs(ratio - 1.0), "x", "distance from 1"),
        Row(
            "fanout.live_origin_egress_blobs", egress, "x", f"simulated {simulated.origin_bytes / live.size_bytes:.1f}"
        ),
    ]


if __name__ == "__main__":
    for row in run(quick=True):
        print(f"{row.name:<40} {row.value:8.2f} {row.unit:4} {row.note}")
