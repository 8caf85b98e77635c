"""Reports of nodes as protobuf. Who decodes one gets clamped values: a peer may lie about itself, never crash us."""

from __future__ import annotations

import math

import msgspec
from google.protobuf.message import DecodeError

from nearcast.errors import Code, MeshError
from nearcast.handler import Stateful
from nearcast.load import NodeReport, Residency, VersionReport
from nearcast.wire.v1 import mesh_pb2 as pb


class ReportLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of what a report may claim."""

    size_bytes_max: int = 1024 * 1024
    versions_max: int = 1024
    name_chars_max: int = 128
    slots_max: int = 4096
    in_flight_max: int = 1_000_000
    eta_ms_max: float = 3_600_000.0
    time_us_max: float = 3_600_000_000.0
    price_max: float = 1e9


LIMITS = ReportLimits()
_RESIDENCY: dict[Residency, pb.Residency] = {
    "hot": pb.RESIDENCY_HOT,
    "loading": pb.RESIDENCY_LOADING,
    "cold": pb.RESIDENCY_COLD,
}
_STATEFUL: dict[Stateful, pb.Stateful] = {
    "none": pb.STATEFUL_NONE,
    "explicit": pb.STATEFUL_EXPLICIT,
    "hidden": pb.STATEFUL_HIDDEN,
}
_RESIDENCY_NAMES: dict[int, Residency] = {number: name for name, number in _RESIDENCY.items()}
_STATEFUL_NAMES: dict[int, Stateful] = {number: name for name, number in _STATEFUL.items()}


class Watch(msgspec.Struct, frozen=True):
    """How reports are wished: not further apart than `interval_s`, changes of load not closer than `gap_s`."""

    interval_s: float = 1.0
    gap_s: float = 0.1


def encode_watch(watch: Watch) -> bytes:
    """The wish as protobuf."""
    return pb.WatchReportRequest(
        interval_ms=round(watch.interval_s * 1e3), gap_ms=round(watch.gap_s * 1e3)
    ).SerializeToString()


def decode_watch(body: bytes) -> Watch:
    """A peer's wish; what it leaves open is our choice.

    Raises:
        MeshError: INVALID_REQUEST if the bytes are no such message.
    """
    try:
        message = pb.WatchReportRequest.FromString(body)
    except DecodeError as error:
        raise MeshError(Code.INVALID_REQUEST, "The message is no WatchReportRequest.") from error
    default = Watch()
    return Watch(message.interval_ms / 1e3 or default.interval_s, message.gap_ms / 1e3 or default.gap_s)


def encode_report(report: NodeReport) -> bytes:
    """A report as protobuf; counters are clamped into their bounds."""
    return pb.NodeReport(
        node=report.node,
        role=report.role,
        slots=_count(report.slots, LIMITS.slots_max),
        in_flight=_count(report.in_flight, LIMITS.in_flight_max),
        draining=report.draining,
        client_address=report.client_address,
        client_tls=report.client_tls,
        versions=[
            pb.VersionReport(
                model=version.model,
                version=version.version,
                residency=_RESIDENCY[version.residency],
                eta_ms=version.eta_ms,
                in_flight=_count(version.in_flight, LIMITS.in_flight_max),
                queue_us=version.queue_us,
                service_p50_us=version.service_p50_us,
                service_p95_us=version.service_p95_us,
                stateful=_STATEFUL[version.stateful],
                quality=version.quality,
                batch_wait_us=version.batch_wait_us,
                price=version.price,
                smaller=version.smaller,
            )
            for version in report.versions
        ],
    ).SerializeToString()


def decode_report(body: bytes) -> NodeReport:
    """A report from a peer, every value clamped.

    Not-a-number counts as the worst value, an unknown residency as cold and an unknown statefulness as hidden; p95 is
    never below p50; a node has at least one slot; of two entries for one version the first counts.

    Raises:
        MeshError: INTERNAL if the bytes are no report or larger than `size_bytes_max`.
    """
    if len(body) > LIMITS.size_bytes_max:
        raise MeshError(Code.INTERNAL, f"The peer's report is larger than {LIMITS.size_bytes_max} bytes.")
    try:
        message = pb.NodeReport.FromString(body)
    except DecodeError as error:
        raise MeshError(Code.INTERNAL, "The peer's report is malformed.") from error
    versions: dict[tuple[str, str], VersionReport] = {}
    for entry in message.versions[: LIMITS.versions_max]:
        version = _version(entry)
        versions.setdefault((version.model, version.version), version)
    return NodeReport(
        node=message.node[: LIMITS.name_chars_max],
        role=message.role[: LIMITS.name_chars_max],
        slots=max(1, _count(message.slots, LIMITS.slots_max)),
        in_flight=_count(message.in_flight, LIMITS.in_flight_max),
        draining=message.draining,
        versions=tuple(versions.values()),
        client_address=message.client_address[: LIMITS.name_chars_max],
        client_tls=message.client_tls,
    )


def _version(entry: pb.VersionReport) -> VersionReport:
    p50_us = _clamp(entry.service_p50_us, LIMITS.time_us_max)
    return VersionReport(
        model=entry.model[: LIMITS.name_chars_max],
        version=entry.version[: LIMITS.name_chars_max],
        residency=_RESIDENCY_NAMES.get(entry.residency, "cold"),
        eta_ms=_clamp(entry.eta_ms, LIMITS.eta_ms_max),
        in_flight=_count(entry.in_flight, LIMITS.in_flight_max),
        queue_us=_clamp(entry.queue_us, LIMITS.time_us_max),
        service_p50_us=p50_us,
        service_p95_us=max(p50_us, _clamp(entry.service_p95_us, LIMITS.time_us_max)),
        stateful=_STATEFUL_NAMES.get(entry.stateful, "hidden"),
        quality=0.0 if math.isnan(entry.quality) else min(1.0, max(0.0, entry.quality)),
        batch_wait_us=_clamp(entry.batch_wait_us, LIMITS.time_us_max),
        price=_clamp(entry.price, LIMITS.price_max),
        smaller=entry.smaller[: LIMITS.name_chars_max],
    )


def _count(value: int, most: int) -> int:
    return min(most, max(0, value))


def _clamp(value: float, most: float) -> float:
    return most if math.isnan(value) else min(most, max(0.0, value))
