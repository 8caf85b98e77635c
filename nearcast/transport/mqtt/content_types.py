"""The names of the payload formats: as a Content Type, and as the last level of a topic for MQTT 3.1.1."""

from __future__ import annotations

OCTETS = "application/octet-stream"
JSON = "application/json"
CBOR = "application/cbor"
PROTOBUF = "application/x-protobuf"
WAV = "audio/wav"
IMAGES = ("image/jpeg", "image/png", "image/webp")
REQUEST_TYPES = (OCTETS, JSON, CBOR, PROTOBUF, *IMAGES, WAV)
REPLY_TYPES = (OCTETS, JSON, CBOR, PROTOBUF)
ENVELOPE_JSON = "application/vnd.nearcast+json"
ENVELOPE_CBOR = "application/vnd.nearcast+cbor"
"""Answers to devices without properties: what a property would say stands in the body."""
SUFFIXES = {"json": JSON, "cbor": CBOR, "bin": OCTETS}
"""The last level of a request's topic, and the format that it announces."""
_NAMES = {
    **{kind: kind for kind in REQUEST_TYPES},
    "": "",
    "application/protobuf": PROTOBUF,
    "application/vnd.google.protobuf": PROTOBUF,
    "audio/vnd.wave": WAV,
    "audio/wave": WAV,
    "audio/x-wav": WAV,
    "image/jpg": "image/jpeg",
    "text/json": JSON,
}


def media_type(content_type: str) -> str:
    """The format that a Content Type names, without its parameters: `application/x-protobuf; messageType=…`."""
    if content_type in _NAMES:
        return _NAMES[content_type]
    name = content_type.partition(";")[0].strip().lower()
    return _NAMES.get(name, name)


def reply_type(request_type: str) -> str:
    """The format of the answer where the request does not say: its own, and JSON to an image or a sound."""
    return request_type if request_type in REPLY_TYPES else JSON
