"""Packets out of a stream of bytes. Pure: whose bytes they are and what becomes of the packets is the connection's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import mqtt5

_HEADER_BYTES_MAX = 5
_PUBLISH = 3


class FramingError(ValueError):
    """The bytes are no MQTT: where the next packet begins is unknown."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A PUBLISH of which only the frame makes sense. `mid` 0 = it waits for no acknowledgement."""

    mid: int
    reason: str


Event: TypeAlias = mqtt5.Packet | Unreadable


class PacketReader:
    """Splits what arrives into packets.

    Args:
        packet_bytes_max: a larger packet is refused by its header, before its content is kept.
    """

    def __init__(self, packet_bytes_max: int) -> None:
        self._packet_bytes_max = packet_bytes_max
        self._rest = bytearray()
        self._needed_bytes = 0

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """The packets that `data` completes, one by one.

        Raises:
            FramingError: behind the packets that could still be read.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed_bytes:
                return
            data, self._rest = self._rest, bytearray()
        view = memoryview(data)
        begin, end = 0, len(view)
        while begin < end:
            size_bytes = self._size(view[begin : begin + _HEADER_BYTES_MAX])
            if not size_bytes or begin + size_bytes > end:
                self._needed_bytes = size_bytes
                self._rest = bytearray(view[begin:])
                return
            yield _read(view[begin : begin + size_bytes])
            begin += size_bytes

    def _size(self, header: memoryview) -> int:
        """Bytes of the whole packet; 0 = its header is not complete.

        The remaining length is a number of up to four bytes with seven bits each, the low ones first (MQTT 5, 1.5.5).
        """
        length = shift = 0
        for index in range(1, len(header)):
            byte = header[index]
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                if index + 1 + length > self._packet_bytes_max:
                    raise FramingError(f"a packet of {length} bytes is longer than {self._packet_bytes_max}")
                return index + 1 + length
            shift += 7
        if len(header) == _HEADER_BYTES_MAX:
            raise FramingError("a packet's length has no end")
        return 0


def _read(packet: memoryview) -> Event:
    try:
        return mqtt5.read(packet)[0]
    except (ValueError, IndexError) as error:
        return _salvage(packet, str(error))
    except BaseException as error:
        # The codec's Rust half panics at text that is not UTF-8, and a panic is deliberately no Exception.
        if type(error).__name__ != "PanicException":
            raise
        return _salvage(packet, "text is not UTF-8")


def _salvage(packet: memoryview, reason: str) -> Unreadable:
    """The frame of a PUBLISH: without an acknowledgement the broker would send it again and again, for ever."""
    first = packet[0]
    qos = first >> 1 & 3
    if first >> 4 != _PUBLISH or qos > 1:
        raise FramingError(f"a packet of type {first >> 4} makes no sense: {reason}")
    if not qos:
        return Unreadable(0, reason)
    at = 1
    while packet[at] >= 0x80:
        at += 1
    topic_bytes = int.from_bytes(packet[at + 1 : at + 3], "big")
    mid = packet[at + 3 + topic_bytes : at + 5 + topic_bytes]
    if len(mid) < 2 or not any(mid):
        raise FramingError(f"a message without a packet identifier: {reason}")
    return Unreadable(int.from_bytes(mid, "big"), reason)
