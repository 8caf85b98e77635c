"""How a device gets its certificate, and a new one at two thirds of its life. The key is made here and stays here.

```python
identity = await join(Path("claim"), Path("identity"), device="camera-1")
async with MqttDevice(device_url(identity), tls=identity_tls(identity)) as device: ...
```

A certificate is a session at the broker: whoever asks with the device's own certificate takes the session over for the
moment of the exchange. So the exchange acknowledges nothing that waits there, and leaves the session as it was.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable
from pathlib import Path

from nearcast.backoff import full_jitter_s
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.identity.authority import make_plain_csr, sign_plain_csr
from nearcast.identity.device import KEY_FILE, DeviceIdentity, Place
from nearcast.identity.files import KEY_MODE, make_folder, write_file
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings, parse_url
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.provisioning import (
    CertificateAnswer,
    CertificateRequest,
    answer_topic,
    read_answer,
    request_message,
)
from nearcast.transport.mqtt.tls import TlsFiles

ANSWER_TIMEOUT_S = 5.0
ATTEMPTS_MAX = 3
ATTEMPT_BASE_S = 0.2
ATTEMPT_MAX_S = 2.0
SESSION_EXPIRY_S = 86_400
RETRY_BASE_S = 10.0
RETRY_MAX_S = 3600.0
LOOK_INTERVAL_S = 3600.0
"""How long a device sleeps at most before it looks at its clock again: that may be set meanwhile."""
_OK = 200
_log = get_logger("nearcast.device")


def identity_tls(identity: DeviceIdentity) -> TlsFiles:
    """The files of an identity for a connection; a renewed certificate holds from the next connection on."""
    return TlsFiles(ca=identity.ca, certificate=identity.certificate, key=identity.key)


def device_url(identity: DeviceIdentity) -> str:
    """`mqtts://host:port/tenant/device`.

    Raises:
        MeshError: INVALID_REQUEST for a claim or a reader, which have no topics of a device.
    """
    _require_joined(identity)
    if identity.place.name.startswith("reader+"):
        topic = f"nc/v1/{identity.place.tenant}/+/out/#"
        raise MeshError(
            Code.INVALID_REQUEST, f"{identity.folder} is a reader's: it asks nothing; subscribe {topic} with its files."
        )
    return f"{identity.place.url}/{identity.place.tenant}/{identity.place.name}"


async def join(claim: Path, folder: Path, *, device: str = "") -> DeviceIdentity:
    """Turn a claim into an identity of one's own, kept in `folder`. Repeating it is harmless.

    Args:
        claim: folder that `nearcast devices invite` wrote.
        folder: gets the key, the certificate, the CA's certificate and the place of the broker.
        device: what to be called, where the claim leaves it open.

    Raises:
        MeshError: UNAVAILABLE if the broker or its node does not answer; what the node refuses with its reason;
            UNTRUSTED if the answer is not from the tenant's authority.
    """
    invited = DeviceIdentity.load(claim)
    key_path = folder / KEY_FILE
    if key_path.exists():  # of an attempt whose answer was lost
        key = key_path.read_bytes()
        csr = sign_plain_csr(key)
    else:
        key, csr = make_plain_csr()
        make_folder(folder)
        write_file(key_path, key, mode=KEY_MODE)
    answer = await _ask(invited, csr, device)
    place = Place(url=invited.place.url, tenant=invited.place.tenant, name=answer.name)
    return DeviceIdentity.write(
        folder, place, ca=invited.ca.read_bytes(), certificate=answer.certificate.encode(), key=key
    )


async def renew(folder: Path) -> DeviceIdentity:
    """Replace the certificate in `folder` by a fresh one for the same key.

    Raises:
        MeshError: as `join` does; FORBIDDEN if the device was revoked, UNAVAILABLE also if the certificate has expired,
            INVALID_REQUEST for a claim.
    """
    identity = DeviceIdentity.load(folder)
    _require_joined(identity)
    key = identity.key.read_bytes()
    answer = await _ask(identity, sign_plain_csr(key), "")
    return DeviceIdentity.write(
        folder, identity.place, ca=identity.ca.read_bytes(), certificate=answer.certificate.encode(), key=key
    )


async def keep_renewed(
    folder: Path, *, clock: Clock = SYSTEM_CLOCK, on_renewed: Callable[[DeviceIdentity], None] = lambda _identity: None
) -> None:
    """Renew at two thirds of the certificate's life, for as long as the task runs. Failures are tried again.

    Raises:
        MeshError: UNAUTHENTICATED if the folder holds no identity.
    """
    generator, attempt = random.Random(), 0
    while True:
        validity = DeviceIdentity.load(folder).validity()
        due_s = validity.renew_at - clock.wall()
        if due_s > 0:
            await asyncio.sleep(min(due_s, LOOK_INTERVAL_S))
            continue
        try:
            on_renewed(await renew(folder))
            attempt = 0
        except (MeshError, TimeoutError) as error:
            attempt += 1
            _log.warning("certificate_not_renewed", error=str(error))
            await asyncio.sleep(full_jitter_s(attempt, generator, base_s=RETRY_BASE_S, max_s=RETRY_MAX_S))


def _require_joined(identity: DeviceIdentity) -> None:
    if identity.place.name.startswith("claim+"):
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{identity.folder} holds a claim; make an identity of it: nearcast devices join {identity.folder} FOLDER",
        )


async def _ask(identity: DeviceIdentity, csr: bytes, device: str) -> CertificateAnswer:
    """Ask, and again where the broker or the node went away meanwhile: the same question has the same answer."""
    generator = random.Random()
    for attempt in range(1, ATTEMPTS_MAX):
        try:
            return await _ask_once(identity, csr, device)
        except MeshError as error:
            if error.code is not Code.UNAVAILABLE:
                raise
        await asyncio.sleep(full_jitter_s(attempt, generator, base_s=ATTEMPT_BASE_S, max_s=ATTEMPT_MAX_S))
    return await _ask_once(identity, csr, device)


async def _ask_once(identity: DeviceIdentity, csr: bytes, device: str) -> CertificateAnswer:
    place = identity.place
    host, port, _ = parse_url(place.url)
    settings = ConnectionSettings(
        host=host, port=port, client_id=place.name, session_expiry_s=SESSION_EXPIRY_S, tls=identity_tls(identity)
    )
    request = CertificateRequest(csr=csr.decode(), id=secrets.token_hex(8), device=device)
    answered: asyncio.Future[CertificateAnswer] = asyncio.get_running_loop().create_future()
    topic = answer_topic(place.tenant, place.name)

    def receive(message: Message) -> None:
        if message.topic == topic:
            connection.acknowledge(message)
            _settle(answered, message, request.id)

    def lose(reason: str) -> None:
        if not answered.done():
            answered.set_exception(MeshError(Code.UNAVAILABLE, f"{place.url} closed the connection: {reason}"))

    def published(_mid: int, taken: bool) -> None:  # noqa: FBT001  # the connection's callback
        if not taken and not answered.done():
            answered.set_exception(MeshError(Code.FORBIDDEN, f"{place.url} lets {place.name!r} ask nothing."))

    connection = Connection(settings, on_message=receive, on_published=published, on_lost=lose)
    await connection.open()
    try:
        await connection.subscribe(topic)
        connection.publish(request_message(place.tenant, place.name, request))
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            answer = await answered
    except TimeoutError as error:
        reason = f"The node behind {place.url} did not answer within {ANSWER_TIMEOUT_S:g} s; try again later."
        raise MeshError(Code.UNAVAILABLE, reason) from error
    finally:
        await connection.close()
    if answer.status != _OK:
        code = next((code for code, entry in CATALOGUE.items() if entry.http == answer.status), Code.UNAVAILABLE)
        raise MeshError(code, answer.error)
    return answer


def _settle(answered: asyncio.Future[CertificateAnswer], message: Message, identifier: str) -> None:
    try:
        answer = read_answer(message.payload)
    except MeshError as error:
        if not answered.done():
            answered.set_exception(error)
        return
    if answer.id == identifier and not answered.done():
        answered.set_result(answer)
