"""200 nodes behind 20 Mbit/s, one origin of 200 Mbit/s, 50 ms and 1 % loss: a new release, and a return in a hurry."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulations.report import quantile
from simulations.sync_fleet import Fleet, FleetSpec
from simulations.sync_node import Payload

FULL = Payload(sha256="f" * 64, size_bytes=25_000_000)
DELTA = Payload(sha256="d" * 64, size_bytes=575_000, is_delta=True)
"""2.3 % of the full blob: what an int8 fine-tune costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutResult:
    """Seconds from the operator's command to the whole payload and to the pointer; bytes that the origin sent."""

    fetched_p50_s: float
    fetched_p99_s: float
    active_p99_s: float
    span_p50_s: float
    origin_bytes: float
    trace_hash: str


def release(spec: FleetSpec, payload: Payload, *, until_s: float) -> FanoutResult:
    """Publish release 2 to a fleet that serves release 1. `span_p50_s` counts from the first node's download on.

    Raises:
        RuntimeError: if a node is not there in time.
    """
    fleet = Fleet(spec, installed=(1,), stable=1)
    fleet.publish("stable", 2, payload)
    fleet.world.run(until_s)
    nodes = fleet.nodes.values()
    fetched = sorted(node.fetched_at for node in nodes if node.fetched_at is not None)
    active = sorted(node.active_at for node in nodes if node.active_at is not None)
    began = min((node.began_at for node in nodes if node.began_at is not None), default=0.0)
    if len(active) < spec.nodes:
        raise RuntimeError(f"{spec.nodes - len(active)} of {spec.nodes} nodes did not follow within {until_s} s")
    return FanoutResult(
        fetched_p50_s=quantile(fetched, 0.5),
        fetched_p99_s=quantile(fetched, 0.99),
        active_p99_s=quantile(active, 0.99),
        span_p50_s=quantile(fetched, 0.5) - began,
        origin_bytes=fleet.network.sent_bytes[fleet.origin],
        trace_hash=fleet.world.trace_hash,
    )


def rollback(spec: FleetSpec, *, until_s: float) -> float:
    """Return a fleet from release 2 to 1, which is on every disk: seconds until the last pointer has moved.

    Raises:
        RuntimeError: if a node is not there in time.
    """
    fleet = Fleet(replace(spec, knows_peers=False), installed=(1, 2), stable=2)
    fleet.publish("rollback", 1, None)
    fleet.world.run(until_s)
    late = [node.name for node in fleet.nodes.values() if node.replica.pointer.stable != 1]
    if late:
        raise RuntimeError(f"{len(late)} of {spec.nodes} nodes did not go back within {until_s} s")
    return max(node.active_at or 0.0 for node in fleet.nodes.values())
