from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Residency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENCY_UNSPECIFIED: _ClassVar[Residency]
    RESIDENCY_HOT: _ClassVar[Residency]
    RESIDENCY_LOADING: _ClassVar[Residency]
    RESIDENCY_COLD: _ClassVar[Residency]

class Stateful(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATEFUL_UNSPECIFIED: _ClassVar[Stateful]
    STATEFUL_NONE: _ClassVar[Stateful]
    STATEFUL_EXPLICIT: _ClassVar[Stateful]
    STATEFUL_HIDDEN: _ClassVar[Stateful]
RESIDENCY_UNSPECIFIED: Residency
RESIDENCY_HOT: Residency
RESIDENCY_LOADING: Residency
RESIDENCY_COLD: Residency
STATEFUL_UNSPECIFIED: Stateful
STATEFUL_NONE: Stateful
STATEFUL_EXPLICIT: Stateful
STATEFUL_HIDDEN: Stateful

class VersionReport(_message.Message):
    __slots__ = ("model", "version", "residency", "eta_ms", "in_flight", "queue_us", "service_p50_us", "service_p95_us", "stateful", "quality", "batch_wait_us", "price", "smaller")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    ETA_MS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    SERVICE_P50_US_FIELD_NUMBER: _ClassVar[int]
    SERVICE_P95_US_FIELD_NUMBER: _ClassVar[int]
    STATEFUL_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    BATCH_WAIT_US_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    SMALLER_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    residency: Residency
    eta_ms: float
    in_flight: int
    queue_us: float
    service_p50_us: float
    service_p95_us: float
    stateful: Stateful
    quality: float
    batch_wait_us: float
    price: float
    smaller: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., residency: _Optional[_Union[Residency, str]] = ..., eta_ms: _Optional[float] = ..., in_flight: _Optional[int] = ..., queue_us: _Optional[float] = ..., service_p50_us: _Optional[float] = ..., service_p95_us: _Optional[float] = ..., stateful: _Optional[_Union[Stateful, str]] = ..., quality: _Optional[float] = ..., batch_wait_us: _Optional[float] = ..., price: _Optional[float] = ..., smaller: _Optional[str] = ...) -> None: ...

class NodeReport(_message.Message):
    __slots__ = ("node", "role", "slots", "in_flight", "draining", "versions", "client_address", "client_tls")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_TLS_FIELD_NUMBER: _ClassVar[int]
    node: str
    role: str
    slots: int
    in_flight: int
    draining: bool
    versions: _containers.RepeatedCompositeFieldContainer[VersionReport]
    client_address: str
    client_tls: bool
    def __init__(self, node: _Optional[str] = ..., role: _Optional[str] = ..., slots: _Optional[int] = ..., in_flight: _Optional[int] = ..., draining: bool = ..., versions: _Optional[_Iterable[_Union[VersionReport, _Mapping]]] = ..., client_address: _Optional[str] = ..., client_tls: bool = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchReportRequest(_message.Message):
    __slots__ = ("interval_ms", "gap_ms")
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    GAP_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    gap_ms: int
    def __init__(self, interval_ms: _Optional[int] = ..., gap_ms: _Optional[int] = ...) -> None: ...
