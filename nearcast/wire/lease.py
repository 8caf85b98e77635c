"""Routing leases as protobuf. Who decodes one gets bounded values: a router may be wrong, never crash us."""

from __future__ import annotations

import math

import msgspec
from google.protobuf.message import DecodeError

from nearcast.errors import Code, MeshError
from nearcast.load import Tier
from nearcast.wire.v1 import lease_pb2 as pb


class LeaseLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of what a lease, and a question for one, may say."""

    size_bytes_max: int = 256 * 1024
    targets_max: int = 64
    name_chars_max: int = 256
    request_bytes_max: int = 1 << 32
    deadline_ms_max: int = 1 << 31
    time_ms_max: float = 3_600_000.0
    ttl_ms_min: int = 50
    ttl_ms_max: int = 60_000
    slots_max: int = 4096
    load_max: float = 1e6
    tokens_max: float = 1000.0
    attempts_max: int = 5
    price_max: float = 1e9


LIMITS = LeaseLimits()
_TIERS: dict[str, Tier] = {"local": "local", "peer": "peer", "cloud": "cloud"}


class LeaseQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants to send, and the lease that it holds. `deadline_ms` 0 = no deadline."""

    model: str
    version: str = ""
    size_bytes: int = 0
    deadline_ms: int = 0
    priority: int = 0
    lease_id: str = ""
    etag: str = ""


class LeaseTarget(msgspec.Struct, frozen=True, kw_only=True):
    """One place to send to; see `proto/nearcast/wire/v1/lease.proto` for every field."""

    name: str
    tier: Tier = "peer"
    domain: str = ""
    address: str = ""
    tls: bool = False
    server_name: str = ""
    t50_ms: float = 0.0
    t95_ms: float = 0.0
    rtt_ms: float = 0.0
    bytes_per_ms: float = 0.0
    load: float = 0.0
    slots: int = 1
    quality: float = 1.0
    price: float = 0.0


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """An answer. With `unchanged` only the first five fields count. `hedge_after_ms` 0 = no copies."""

    lease_id: str
    etag: str
    ttl_ms: int
    refresh_after_ms: int
    unchanged: bool = False
    targets: tuple[LeaseTarget, ...] = ()
    version: str = ""
    stateful: bool = False
    size_bytes: int = 0
    deadline_ms: int = 0
    reserve_ms: float = 0.0
    hedge_after_ms: float = 0.0
    hedge_share: float = 0.0
    hedge_burst: float = 0.0
    retry_share: float = 0.0
    retry_burst: float = 0.0
    retry_per_s: float = 0.0
    attempts_max: int = 1


def encode_question(question: LeaseQuestion) -> bytes:
    """A `LeaseRequest`."""
    return pb.LeaseRequest(**msgspec.structs.asdict(question)).SerializeToString()


def decode_question(body: bytes) -> LeaseQuestion:
    """A client's question, its values bounded.

    Raises:
        MeshError: INVALID_REQUEST if the bytes are no question, or name no model.
    """
    try:
        message = pb.LeaseRequest.FromString(body)
    except DecodeError as error:
        raise MeshError(Code.INVALID_REQUEST, "The message is no LeaseRequest.") from error
    if not message.model:
        raise MeshError(Code.INVALID_REQUEST, "The lease request names no model.")
    most = LIMITS.name_chars_max
    return LeaseQuestion(
        model=message.model[:most],
        version=message.version[:most],
        size_bytes=min(message.size_bytes, LIMITS.request_bytes_max),
        deadline_ms=min(message.deadline_ms, LIMITS.deadline_ms_max),
        priority=message.priority,
        lease_id=message.lease_id[:most],
        etag=message.etag[:most],
    )


def encode_lease(lease: Lease) -> bytes:
    """A `LeaseResponse`."""
    fields = {name: getattr(lease, name) for name in lease.__struct_fields__ if name != "targets"}
    targets = [pb.LeaseTarget(**msgspec.structs.asdict(target)) for target in lease.targets]
    return pb.LeaseResponse(**fields, targets=targets).SerializeToString()


def decode_lease(body: bytes) -> Lease:
    """A router's answer, its values bounded; targets whose name is said before are left out.

    Raises:
        MeshError: INTERNAL if the bytes are no lease or larger than `size_bytes_max`.
    """
    if len(body) > LIMITS.size_bytes_max:
        raise MeshError(Code.INTERNAL, f"The lease is larger than {LIMITS.size_bytes_max} bytes.")
    try:
        message = pb.LeaseResponse.FromString(body)
    except DecodeError as error:
        raise MeshError(Code.INTERNAL, "The lease is malformed.") from error
    targets: dict[str, LeaseTarget] = {}
    for entry in message.targets[: LIMITS.targets_max]:
        target = _target(entry)
        targets.setdefault(target.name, target)
    ttl_ms = min(max(message.ttl_ms, LIMITS.ttl_ms_min), LIMITS.ttl_ms_max)
    most = LIMITS.tokens_max
    return Lease(
        lease_id=message.lease_id[: LIMITS.name_chars_max],
        etag=message.etag[: LIMITS.name_chars_max],
        unchanged=message.unchanged,
        ttl_ms=ttl_ms,
        refresh_after_ms=min(max(message.refresh_after_ms, LIMITS.ttl_ms_min), ttl_ms),
        targets=tuple(targets.values()),
        version=message.version[: LIMITS.name_chars_max],
        stateful=message.stateful,
        size_bytes=min(message.size_bytes, LIMITS.request_bytes_max),
        deadline_ms=min(message.deadline_ms, LIMITS.deadline_ms_max),
        reserve_ms=_clamp(message.reserve_ms, LIMITS.time_ms_max),
        hedge_after_ms=_clamp(message.hedge_after_ms, LIMITS.time_ms_max),
        hedge_share=_share(message.hedge_share),
        hedge_burst=_clamp(message.hedge_burst, 0.0, most),
        retry_share=_share(message.retry_share),
        retry_burst=_clamp(message.retry_burst, 0.0, most),
        retry_per_s=_clamp(message.retry_per_s, 0.0, most),
        attempts_max=min(max(message.attempts_max, 1), LIMITS.attempts_max),
    )


def _target(entry: pb.LeaseTarget) -> LeaseTarget:
    most = LIMITS.name_chars_max
    t50_ms = _clamp(entry.t50_ms, LIMITS.time_ms_max)
    return LeaseTarget(
        name=entry.name[:most],
        tier=_TIERS.get(entry.tier, "peer"),
        domain=entry.domain[:most],
        address=entry.address[:most],
        tls=entry.tls,
        server_name=entry.server_name[:most],
        t50_ms=t50_ms,
        t95_ms=max(t50_ms, _clamp(entry.t95_ms, LIMITS.time_ms_max)),
        rtt_ms=_clamp(entry.rtt_ms, t50_ms),
        bytes_per_ms=_clamp(entry.bytes_per_ms, 0.0, math.inf),
        load=_clamp(entry.load, LIMITS.load_max),
        slots=min(max(entry.slots, 1), LIMITS.slots_max),
        quality=_share(entry.quality),
        price=_clamp(entry.price, LIMITS.price_max),
    )


def _share(value: float) -> float:
    return _clamp(value, 0.0, 1.0)


def _clamp(value: float, worst: float, most: float | None = None) -> float:
    """`value` within [0, most]; not-a-number is `worst`, which is the bound unless another one is named."""
    return worst if math.isnan(value) else min(worst if most is None else most, max(0.0, value))
