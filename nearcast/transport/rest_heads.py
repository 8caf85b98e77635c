"""Heads of HTTP requests, remembered: request line and headers to the byte, and what the parser found in them.

A client sends the same head again and again, and equal bytes mean the same: they need not be parsed twice. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from nearcast.errors import MeshError
from nearcast.transport.rest_inference import Ask, read_ask
from nearcast.wire import status

HEADS_MAX = 256
HEAD_SIZE_BYTES_MAX = 1024
"""Of one that is remembered."""
COMPRESSIONS = frozenset({"gzip", "deflate"})
"""Answers are compressed for a client that names one of these alone. Libraries name several without being asked."""
_INFER = re.compile(r"/v2/models/([\w.~-]+)(?:/versions/([\w.~-]+))?/infer", re.ASCII)
_END = b"\r\n\r\n"
# What asks for more than an answer to a body of a known size, and what is never the same again.
_SPECIAL = ("Content-Encoding", "Transfer-Encoding", "Expect", "Upgrade", status.TRACE, status.IDEMPOTENCY_KEY)


class Message(Protocol):
    """What aiohttp's parser makes of a head."""

    method: str
    path: str
    headers: Mapping[str, str]
    should_close: bool
    upgrade: bool
    chunked: bool
    version: Any


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The head of an inference over HTTP/1.1 whose body has a known size, and nothing special about it."""

    path: str
    ask: Ask
    body_size_bytes: int


class Heads:
    """Those of one listener.

    Args:
        body_size_bytes_max: larger ones are refused elsewhere.
    """

    def __init__(self, body_size_bytes_max: int) -> None:
        self._body_size_bytes_max = body_size_bytes_max
        self._known: dict[bytes, Head] = {}
        self.find = self._known.get

    def learn(self, head: bytes, message: Message, body_size_bytes: int) -> None:
        """Remember what the parser made of a head, if it is an ordinary one."""
        found = self._read(message, body_size_bytes)
        if found is None or len(head) > HEAD_SIZE_BYTES_MAX:
            return
        if len(self._known) >= HEADS_MAX:
            # The oldest: what is still in use is back with its next request.
            del self._known[next(iter(self._known))]
        self._known[head] = found

    def _read(self, message: Message, body_size_bytes: int) -> Head | None:
        headers = message.headers
        names = _INFER.fullmatch(message.path)
        if names is None or message.method != "POST" or message.version != (1, 1) or message.should_close:
            return None
        if any(name in headers for name in _SPECIAL) or headers.get("Accept-Encoding", "") in COMPRESSIONS:
            return None
        if "Connection" in headers and not _only_keeps_alive(headers):
            return None
        if not 0 < body_size_bytes <= self._body_size_bytes_max:
            return None
        try:
            ask = read_ask(names[1], names[2] or "", headers)
        except MeshError:
            return None
        return Head(path=message.path, ask=ask, body_size_bytes=body_size_bytes)


def _only_keeps_alive(headers: Mapping[str, str]) -> bool:
    """Whether its connection is told what HTTP/1.1 does anyway, once and nothing else."""
    return [value for name, value in headers.items() if name.lower() == "connection"] == ["keep-alive"]


def end_of_head(data: bytes) -> int:
    """Where the head at the start of `data` ends; 0 if that is not certain."""
    end = data.find(_END) + len(_END)
    head = data[:end]
    # Parsers may be lenient about lone CR and LF, and about empty lines before a request.
    count = head.count(b"\r\n")
    if end < len(_END) or not head[:1].isalpha() or head.count(b"\n") != count or head.count(b"\r") != count:
        return 0
    return end


def body_size(message: Message) -> int | None:
    """Bytes of the body that follows a head; None = that is not certain."""
    # An error of the parser stands in the same place, and has none of this.
    if getattr(message, "chunked", True) or message.upgrade or message.method == "CONNECT":
        return None
    text = message.headers.get("Content-Length", "0")
    return int(text) if text.isascii() and text.isdigit() else None
