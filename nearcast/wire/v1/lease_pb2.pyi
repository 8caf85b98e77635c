from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseRequest(_message.Message):
    __slots__ = ("model", "version", "size_bytes", "deadline_ms", "priority", "lease_id", "etag")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    size_bytes: int
    deadline_ms: int
    priority: int
    lease_id: str
    etag: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., size_bytes: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., priority: _Optional[int] = ..., lease_id: _Optional[str] = ..., etag: _Optional[str] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("lease_id", "etag", "unchanged", "ttl_ms", "refresh_after_ms", "targets", "version", "stateful", "size_bytes", "deadline_ms", "reserve_ms", "hedge_after_ms", "hedge_share", "hedge_burst", "retry_share", "retry_burst", "retry_per_s", "attempts_max")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    REFRESH_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATEFUL_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    RESERVE_MS_FIELD_NUMBER: _ClassVar[int]
    HEDGE_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    HEDGE_SHARE_FIELD_NUMBER: _ClassVar[int]
    HEDGE_BURST_FIELD_NUMBER: _ClassVar[int]
    RETRY_SHARE_FIELD_NUMBER: _ClassVar[int]
    RETRY_BURST_FIELD_NUMBER: _ClassVar[int]
    RETRY_PER_S_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_MAX_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    etag: str
    unchanged: bool
    ttl_ms: int
    refresh_after_ms: int
    targets: _containers.RepeatedCompositeFieldContainer[LeaseTarget]
    version: str
    stateful: bool
    size_bytes: int
    deadline_ms: int
    reserve_ms: float
    hedge_after_ms: float
    hedge_share: float
    hedge_burst: float
    retry_share: float
    retry_burst: float
    retry_per_s: float
    attempts_max: int
    def __init__(self, lease_id: _Optional[str] = ..., etag: _Optional[str] = ..., unchanged: bool = ..., ttl_ms: _Optional[int] = ..., refresh_after_ms: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[LeaseTarget, _Mapping]]] = ..., version: _Optional[str] = ..., stateful: bool = ..., size_bytes: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., reserve_ms: _Optional[float] = ..., hedge_after_ms: _Optional[float] = ..., hedge_share: _Optional[float] = ..., hedge_burst: _Optional[float] = ..., retry_share: _Optional[float] = ..., retry_burst: _Optional[float] = ..., retry_per_s: _Optional[float] = ..., attempts_max: _Optional[int] = ...) -> None: ...

class LeaseTarget(_message.Message):
    __slots__ = ("name", "tier", "domain", "address", "tls", "server_name", "t50_ms", "t95_ms", "rtt_ms", "bytes_per_ms", "load", "slots", "quality", "price")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    SERVER_NAME_FIELD_NUMBER: _ClassVar[int]
    T50_MS_FIELD_NUMBER: _ClassVar[int]
    T95_MS_FIELD_NUMBER: _ClassVar[int]
    RTT_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_MS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    name: str
    tier: str
    domain: str
    address: str
    tls: bool
    server_name: str
    t50_ms: float
    t95_ms: float
    rtt_ms: float
    bytes_per_ms: float
    load: float
    slots: int
    quality: float
    price: float
    def __init__(self, name: _Optional[str] = ..., tier: _Optional[str] = ..., domain: _Optional[str] = ..., address: _Optional[str] = ..., tls: bool = ..., server_name: _Optional[str] = ..., t50_ms: _Optional[float] = ..., t95_ms: _Optional[float] = ..., rtt_ms: _Optional[float] = ..., bytes_per_ms: _Optional[float] = ..., load: _Optional[float] = ..., slots: _Optional[int] = ..., quality: _Optional[float] = ..., price: _Optional[float] = ...) -> None: ...
