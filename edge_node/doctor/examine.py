"""The whole examination, from the ground up: what rests on something broken is not tried."""

from __future__ import annotations

from edge_node.clock import open_clock
from edge_node.doctor.delivery import find_deliveries
from edge_node.doctor.findings import Check, DoctorLimits, Finding, Subject
from edge_node.doctor.handshake import find_listener, find_versions
from edge_node.doctor.machine import find_certificates, find_clock
from edge_node.doctor.nagle import measure_stalls
from edge_node.doctor.persistence import find_persistence
from edge_node.doctor.player import playing
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import MeshError
from nearcast.transport.mqtt import topics

_SPOKEN: tuple[Check, ...] = ("nagle-here", "nagle-broker", "acl", "persistence", "node")
"""What needs a broker that speaks with us."""


async def examine(
    subject: Subject, *, limits: DoctorLimits | None = None, clock: Clock = SYSTEM_CLOCK
) -> list[Finding]:
    """Look at everything once. Nothing is changed, but that a session of the doctor's stays for two minutes.

    Returns:
        One finding for each check, in the order in which they rest upon each other.
    """
    limits = limits or DoctorLimits()
    now = open_clock(subject.data_dir, clock).read().now
    listener = await find_listener(subject, limits)
    certificates = await find_certificates(subject, now, limits, has_broker=listener.status == "ok")
    ground = [find_clock(subject.data_dir, clock), certificates]
    if listener.status != "ok":
        return [*ground, listener, *_skip("mqtt5", *_SPOKEN, why="there is no broker")]
    versions = await find_versions(subject, limits)
    if versions.status != "ok":
        if certificates.status == "fail" and subject.device_tls is not None:
            (versions,) = _skip("mqtt5", why="the certificates come first")
        return [*ground, listener, versions, *_skip(*_SPOKEN, why="the broker does not speak MQTT 5 with us")]
    try:
        return [*ground, listener, versions, *await _listen(subject, limits)]
    except (MeshError, TimeoutError) as error:
        left = Finding(check="broker", status="fail", detail=f"it answered, and then left us: {error or 'silence'}")
        return [*ground, left, versions, *_skip(*_SPOKEN, why="the broker left us")]


async def _listen(subject: Subject, limits: DoctorLimits) -> list[Finding]:
    async with playing(subject, "device", subject.device_tls, limits) as device:
        topic = topics.device_state_topic(subject.tenant, subject.device)
        stalls = await measure_stalls(device, topic, limits)
    access, node = await find_deliveries(subject, limits)
    if access.status == "fail":
        return [*stalls, access, *_skip("persistence", why="what is not delivered cannot be kept"), node]
    return [*stalls, access, await find_persistence(subject, limits), node]


def _skip(*checks: Check, why: str) -> list[Finding]:
    return [Finding(check=check, status="skip", detail=why) for check in checks]
