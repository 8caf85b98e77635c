"""Protobuf's framing by hand, for the one message that is on the hot path.

A request is walked tag by tag: strings are read, tensors and raw contents are only located. Nothing is copied, so that
what passes through a router costs the same at 600 bytes and at 60 megabytes.
"""

from __future__ import annotations

from typing import NoReturn, TypeAlias

import msgspec

from nearcast.errors import Code, MeshError

Span: TypeAlias = tuple[int, int]
"""Start and end of a field's value inside the body."""


class WireLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one message may hold. Without these a few megabytes of tiny fields would occupy the loop for seconds.

    `layouts_max` and `layout_size_bytes_max` bound what is remembered of earlier messages (`nearcast.wire.layout`).
    """

    fields_max: int = 4096
    parameters_max: int = 256
    rank_max: int = 32
    bytes_elements_max: int = 1 << 18
    contents_elements_max: int = 1 << 20
    zero_copy_size_bytes_min: int = 64 * 1024
    layouts_max: int = 256
    layout_size_bytes_max: int = 1024


LIMITS = WireLimits()


_NUMBERS = bytes(tag >> 3 if tag & 7 == 2 and tag < 0x40 else 0 for tag in range(256))
"""Field number by first byte, for the length-delimited fields 1 to 7; 0 = look closer."""


_KNOWN_TAG_MAX = 7 << 3 | 2
_TAG_SIZE_BYTES_MAX = 5


class Scan(msgspec.Struct):
    """Top-level fields of a `ModelInferRequest` or `ModelInferResponse`; fields 1 to 5 mean the same in both."""

    model: str
    version: str
    id: Span
    parameters: list[Span]
    tensors: list[Span]
    sixth: list[Span]
    seventh: list[Span]


def scan(body: bytes) -> Scan:
    """Locate the top-level fields of an inference message.

    As protobuf does: the last of several strings wins; unknown fields and known ones of another wire type are skipped.

    Raises:
        MeshError: INVALID_REQUEST if the bytes are truncated, malformed or hold more than `fields_max` fields.
    """
    fields: tuple[list[Span], ...] = ([], [], [], [], [], [], [], [])
    position = 0
    end = len(body)
    left = LIMITS.fields_max
    try:
        while position < end and left:
            left -= 1
            number = _NUMBERS[body[position]]
            if not number:
                position = _skip_other(body, position)
                continue
            size = body[position + 1]
            position += 2
            if size >= 0x80:
                size, position = varint(body, position - 1)
            stop = position + size
            fields[number].append((position, stop))
            position = stop
        model, version = _last_text(body, fields[1]), _last_text(body, fields[2])
        _last_text(body, fields[3])
    except IndexError:
        _fail("is truncated")
    except UnicodeDecodeError:
        _fail("holds a string that is not UTF-8")
    if position < end:
        _fail(f"holds more than {LIMITS.fields_max} fields")
    if position > end:
        _fail("is truncated")
    id_ = fields[3][-1] if fields[3] else (0, 0)
    return Scan(model, version, id_, fields[4], fields[5], fields[6], fields[7])


def read_text(body: bytes, span: Span) -> str:
    """The string of a field.

    Raises:
        MeshError: INVALID_REQUEST if it is not UTF-8.
    """
    try:
        return body[span[0] : span[1]].decode()
    except UnicodeDecodeError:
        _fail("holds a string that is not UTF-8")


def _last_text(body: bytes, spans: list[Span]) -> str:
    text = ""
    for start, stop in spans:
        text = body[start:stop].decode()
    return text


def varint(body: bytes, position: int) -> tuple[int, int]:
    """Read a base-128 number; returns it (64 bits) and the position behind it.

    Raises:
        MeshError: INVALID_REQUEST if it is longer than 10 bytes.
        IndexError: if the body ends inside it.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
    raise MeshError(Code.INVALID_REQUEST, "The message holds a number longer than 10 bytes.")


def encode_varint(value: int) -> bytes:
    """A non-negative number in base 128."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_text(text: str) -> bytes:
    """UTF-8 of a name or an id.

    Raises:
        MeshError: INVALID_REQUEST for lone surrogates, which JSON lets through.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise MeshError(Code.INVALID_REQUEST, "The message holds text that is not valid Unicode.") from error


def encode_field(number: int, value: bytes) -> bytes:
    """A length-delimited field; empty where proto3 leaves it out."""
    return encode_prefix(number, len(value)) + value if value else b""


def encode_prefix(number: int, size_bytes: int) -> bytes:
    """Tag and length of a length-delimited field whose value follows as a piece of its own."""
    if size_bytes < 0x80:
        return bytes((number << 3 | 2, size_bytes))
    if size_bytes < 0x4000:
        return bytes((number << 3 | 2, size_bytes & 0x7F | 0x80, size_bytes >> 7))
    return bytes((number << 3 | 2,)) + encode_varint(size_bytes)


def _skip_other(body: bytes, position: int) -> int:
    """Skip a field that the walk does not know by its first byte; returns the position behind it."""
    start = position
    tag, position = varint(body, position)
    number, wire_type = tag >> 3, tag & 7
    if number == 0 or tag > 0xFFFF_FFFF:
        _fail("holds a field without a number")
    if (wire_type == 2 and tag <= _KNOWN_TAG_MAX) or position - start > _TAG_SIZE_BYTES_MAX:
        # Protobuf would take it for the field that it names, or refuse the message; two readers must not see two models
        # in one message.
        _fail("holds a tag in more bytes than it needs")
    match wire_type:
        case 0:
            position = varint(body, position)[1]
        case 1:
            position += 8
        case 2:
            size, position = varint(body, position)
            position += size
        case 5:
            position += 4
        case _:
            _fail(f"holds a field of wire type {wire_type}, which this protocol does not use")
    return position


def _fail(what: str) -> NoReturn:
    raise MeshError(Code.INVALID_REQUEST, f"The message {what}.")
