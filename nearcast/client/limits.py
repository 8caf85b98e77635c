"""What bounds a client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Bounds of one client.

    Attributes:
        models_max: models whose targets are remembered; the one unused for longest is forgotten first.
        in_flight_max: requests at the same time; more are refused at once.
        probe_s: mean pause between two readiness probes of a node.
        probe_timeout_s: a probe that takes longer counts as unanswered.
        probes_slow_max: unanswered probes in a row after which a node counts as lost.
        slots: requests that one node is first believed to run at the same time, where no lease tells.
        lease_timeout_s: a question for a lease that takes longer has failed.
        lease_retry_s: first pause after a failed one; it doubles each time.
        lease_retry_s_max: and ends there; also the pause after a refusal.
        lease_idle_s: the lease of a model that is not used for this long is renewed no more.
        warm_max: targets of a lease to which a connection is made before a request needs it.
        targets_max: targets of all leases together.
        drain_s: how long a connection to a target that left the leases may finish what is in flight.
        stream_ahead: requests of one stream that are under way at the same time.
    """

    models_max: int = 256
    in_flight_max: int = 10_000
    probe_s: float = 0.5
    probe_timeout_s: float = 1.0
    probes_slow_max: int = 3
    slots: int = 16
    lease_timeout_s: float = 1.0
    lease_retry_s: float = 0.1
    lease_retry_s_max: float = 5.0
    lease_idle_s: float = 30.0
    warm_max: int = 3
    targets_max: int = 128
    drain_s: float = 5.0
    stream_ahead: int = 8
