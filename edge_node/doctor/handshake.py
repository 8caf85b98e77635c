"""Whether somebody listens, over TLS if asked to, and which versions of MQTT he speaks."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import mqtt5

from edge_node.doctor.findings import DoctorLimits, Finding, Subject
from nearcast.transport.mqtt.limits import KEEPALIVE_S
from nearcast.transport.mqtt.tls import TlsFiles, describe_failure

_CONNACK_BYTES_MAX = 4096
_V311_ACCEPTED = b"\x20\x02\x00\x00"


async def find_listener(subject: Subject, limits: DoctorLimits) -> Finding:
    """Whether the address accepts connections."""
    where = f"{subject.host}:{subject.port}"
    try:
        async with _stream(subject, None, limits):
            return Finding(check="broker", status="ok", detail=f"{where} accepts connections")
    except (OSError, TimeoutError) as error:
        detail = f"nobody listens on {where}: {str(error) or 'no answer in time'}"
        return Finding(check="broker", status="fail", detail=detail, advice="Start the broker, or name another one.")


async def find_versions(subject: Subject, limits: DoctorLimits) -> Finding:
    """Whether the broker speaks MQTT 5, without which there are no deadlines and no statuses."""
    hello = mqtt5.ConnectPacket(_client_id(subject), clean_start=True, keep_alive=KEEPALIVE_S)  # rumqttd refuses 0
    try:
        five = await _answer(subject, hello.write(), limits)
    except ssl.SSLError as error:
        advice = "" if subject.device_tls and subject.device_tls.certificate else "Come as a device with --identity."
        return Finding(check="mqtt5", status="fail", detail=f"no TLS: {describe_failure(error)}", advice=advice)
    reason = _reason(five)
    if reason == "":
        return Finding(check="mqtt5", status="ok", detail="the broker speaks MQTT 5")
    if reason is not None:
        advice = "Let the broker accept who we are: its password file, its CA, its list of clients."
        return Finding(check="mqtt5", status="fail", detail=f"the broker refuses us: {reason}", advice=advice)
    three = await _answer(subject, _connect_311(_client_id(subject)), limits)
    if three.startswith(_V311_ACCEPTED):
        detail, advice = "the broker speaks MQTT 3.1.1 only", "Use a broker with MQTT 5, such as Mosquitto from 1.6 on."
    elif subject.device_tls is not None:
        # Which of the two it is, is lost where the connection is reset before the alert has been read.
        detail = "what listens there refuses our certificate, or does not speak MQTT"
        advice = "Come with an identity that is not revoked, or name the broker's own port."
    else:
        detail = "what listens there does not speak MQTT, or only with TLS"
        advice = "Name the broker's own port, and mqtts:// if it asks for certificates."
    return Finding(check="mqtt5", status="fail", detail=detail, advice=advice)


@asynccontextmanager
async def _stream(
    subject: Subject, tls: TlsFiles | None, limits: DoctorLimits
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    context = None if tls is None else tls.context()
    async with asyncio.timeout(limits.answer_timeout_s):
        reader, writer = await asyncio.open_connection(subject.host, subject.port, ssl=context)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()


async def _answer(subject: Subject, packet: bytes, limits: DoctorLimits) -> bytes:
    """The first bytes that come back; b"" if the connection ends or nothing comes.

    Raises:
        ssl.SSLError: if one end does not accept the other's certificate.
    """
    try:
        async with _stream(subject, subject.device_tls, limits) as (reader, writer):
            writer.write(packet)
            return await reader.read(_CONNACK_BYTES_MAX)
    except ssl.SSLError:
        raise
    except (OSError, TimeoutError):
        return b""


def _reason(answer: bytes) -> str | None:
    """Why an MQTT 5 broker says no; "" = it says yes, None = this is no answer of MQTT 5."""
    try:
        packet, _ = mqtt5.read(memoryview(answer))
    except (ValueError, IndexError):
        return None  # a broker of 3.1.1 answers with two bytes less, or hangs up
    if not isinstance(packet, mqtt5.ConnAckPacket):
        return None
    code = packet.reason_code
    if code is mqtt5.ConnAckReasonCode.UNSUPPORTED_PROTOCOL_VERSION:
        return None
    return "" if code is mqtt5.ConnAckReasonCode.SUCCESS else code.name.replace("_", " ").lower()


def _client_id(subject: Subject) -> str:
    return f"nearcast-doctor-{subject.device}"


def _connect_311(client_id: str) -> bytes:
    """CONNECT of MQTT 3.1.1 with a clean session and a keep-alive of 30 s (OASIS MQTT 3.1.1, 3.1)."""
    name = client_id.encode()
    body = b"\x00\x04MQTT\x04\x02\x00\x1e" + len(name).to_bytes(2, "big") + name
    return b"\x10" + bytes([len(body)]) + body
