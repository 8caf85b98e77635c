"""What a node says about itself: residency and load, per model version.

A report speaks only for the identity of the connection it came over; who reads one clamps its values.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import msgspec

from nearcast.handler import Stateful

Residency: TypeAlias = Literal["hot", "loading", "cold"]
Tier: TypeAlias = Literal["local", "peer", "cloud"]
"""How far a target is: in this process, a neighbouring edge node, a cloud core."""


class VersionReport(msgspec.Struct, frozen=True, kw_only=True):
    """One version on one node.

    `service_p50_us`/`service_p95_us` are batch-1 model times in microseconds, measured at warm-up and then live;
    `eta_ms` is the time until a loading version is hot; of a cold one, how long a request that brings it in waits
    (0 = it is not to be had); `quality` in [0, 1] comes from the signed manifest. `batch_wait_us` is the longest that a
    request waits for others to join its run. `price` is what 1000 answers cost here, in the operator's unit. `smaller`
    names a model that may answer in this one's place when nothing else is in time; "" = none.
    """

    model: str
    version: str
    residency: Residency = "hot"
    eta_ms: float = 0.0
    in_flight: int = 0
    queue_us: float = 0.0
    service_p50_us: float = 0.0
    service_p95_us: float = 0.0
    stateful: Stateful = "none"
    quality: float = 1.0
    batch_wait_us: float = 0.0
    price: float = 0.0
    smaller: str = ""


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a router wants to know about one node. `slots` = model runs that can go on at the same time.

    `client_address` is the node's gRPC listener for clients, for routing leases; "" = none that others could reach.
    """

    node: str
    role: str
    slots: int = 1
    in_flight: int = 0
    draining: bool = False
    versions: tuple[VersionReport, ...] = ()
    client_address: str = ""
    client_tls: bool = False


class AnswerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer says about its server beside its own times; 0 = nothing. `utilization` 1 = every slot is taken."""

    utilization: float = 0.0
    queue_us: float = 0.0
    service_p50_us: float = 0.0
    service_p95_us: float = 0.0
    batch_wait_us: float = 0.0


_METRICS = {
    "application_utilization": "utilization",
    "named_metrics.nc_queue_us": "queue_us",
    "named_metrics.nc_service_p50_us": "service_p50_us",
    "named_metrics.nc_service_p95_us": "service_p95_us",
    "named_metrics.nc_batch_wait_us": "batch_wait_us",
}
_TEXT_CHARS_MAX = 1024


def write_answer_load(load: AnswerLoad) -> str:
    """As metrics of Open Request Cost Aggregation's text form, each with a comma in front: they follow another one."""
    return "".join(f",{metric}={getattr(load, name):.6g}" for metric, name in _METRICS.items())


def read_answer_load(text: str) -> AnswerLoad:
    """The opposite, also of a whole header; what is unknown, malformed or negative is left out."""
    found: dict[str, float] = {}
    for part in text[:_TEXT_CHARS_MAX].removeprefix("TEXT ").split(","):
        metric, _, value = part.strip().partition("=")
        name = _METRICS.get(metric)
        if name is not None:
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number) and number >= 0.0:
                found[name] = number
    return AnswerLoad(**found)
