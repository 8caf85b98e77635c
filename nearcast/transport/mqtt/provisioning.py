"""What a device and its node say to each other about certificates: one question, one answer, both JSON.

The device makes its key and keeps it; it sends a certificate request (CSR) under its own prefix. A device that has no
certificate yet asks with that of a *claim*, which may do nothing else. Whoever asks is known from the topic, to which
the broker binds the certificate.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.message import Message

CONTENT_TYPE: Final = "application/json"
BODY_SIZE_BYTES_MAX: Final = 24 * 1024
EXCHANGE_EXPIRY_S: Final = 60
_TOPIC = re.compile(rf"nc/v1/({topics.ID_PATTERN})/([a-z0-9_.-]{{1,64}})/up/certificate")
_PEM = Annotated[str, msgspec.Meta(max_length=16 * 1024)]


class CertificateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The question.

    Attributes:
        id: comes back in the answer, for devices without Correlation Data.
        csr: PEM, EC P-256; only its public key is used.
        device: the name that a claim's holder wants; ignored where the claim or the certificate says it.
    """

    csr: _PEM
    id: Annotated[str, msgspec.Meta(max_length=128)] = ""
    device: Annotated[str, msgspec.Meta(max_length=64)] = ""


class CertificateAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer. `certificate` and `ca` are PEM; with a `status` other than 200 `error` says why there is none."""

    status: int
    id: str = ""
    name: str = ""
    certificate: str = ""
    ca: str = ""
    error: str = ""


def holder_level(name: str) -> str:
    """The topic level of a certificate's Common Name: `claim+x` and `reader+x`, no names of devices, use a dot."""
    return name.replace("+", ".")


def certificate_topic(tenant: str, name: str) -> str:
    """Where the holder of the certificate `name` asks."""
    return f"nc/v1/{topics.require_id(tenant, 'tenant')}/{holder_level(name)}/up/certificate"


def certificate_filter(tenant: str) -> str:
    """The subscription for all such questions of a tenant."""
    return f"nc/v1/{topics.require_id(tenant, 'tenant')}/+/up/certificate"


def answer_topic(tenant: str, name: str) -> str:
    """Where the answer goes."""
    return f"{topics.down_prefix(tenant, holder_level(name))}certificate"


def requester(topic: str) -> str:
    """The Common Name of whoever may publish on `topic`; "" if it is no topic of this kind."""
    found = _TOPIC.fullmatch(topic)
    return "" if found is None else found[2].replace(".", "+", 1)


def request_message(tenant: str, name: str, request: CertificateRequest) -> Message:
    """The question as a message."""
    return Message(
        topic=certificate_topic(tenant, name),
        payload=msgspec.json.encode(request),
        content_type=CONTENT_TYPE,
        correlation=request.id.encode(),
        expiry_s=EXCHANGE_EXPIRY_S,
    )


def read_request(payload: bytes) -> CertificateRequest:
    """Parse a question.

    Raises:
        MeshError: INVALID_REQUEST if it is none, TOO_LARGE.
    """
    if len(payload) > BODY_SIZE_BYTES_MAX:
        raise MeshError(Code.TOO_LARGE, f"A certificate request has at most {BODY_SIZE_BYTES_MAX} bytes.")
    try:
        return msgspec.json.decode(payload, type=CertificateRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"This is no certificate request: {error}.") from error


def answer_message(tenant: str, name: str, answer: CertificateAnswer, asked: Message) -> Message:
    """The answer to the holder of `name`, who asked with `asked`."""
    return Message(
        topic=answer_topic(tenant, name),
        payload=msgspec.json.encode(answer),
        content_type=CONTENT_TYPE,
        correlation=asked.correlation,
        expiry_s=EXCHANGE_EXPIRY_S,
        user={"status": str(answer.status)},
    )


def read_answer(payload: bytes) -> CertificateAnswer:
    """Parse an answer.

    Raises:
        MeshError: UNTRUSTED if it is none.
    """
    try:
        return msgspec.json.decode(payload, type=CertificateAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MeshError(Code.UNTRUSTED, "The node answered something that is no certificate.") from error
