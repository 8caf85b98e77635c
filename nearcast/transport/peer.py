"""Who is at the other end of a connection: an address, or for a Unix socket `unix:` and the number of its user."""

from __future__ import annotations

import asyncio
import os
import socket
import struct

from nearcast.errors import Code, MeshError
from nearcast.identity.name import URI_PREFIX, parse_uri
from nearcast.runtime import format_address
from nearcast.transport.seam import UNIX_PREFIX, Call

_CREDENTIALS = struct.Struct("3i")
"""What SO_PEERCRED gives: process, user and group."""


def peer_name(transport: asyncio.BaseTransport) -> str:
    """`host:port` of a TCP peer, `unix:1000` of one on a Unix socket, `unix:` where the system does not say who."""
    name = transport.get_extra_info("peername")
    if isinstance(name, tuple):
        return format_address(str(name[0]), int(name[1]))
    opened = transport.get_extra_info("socket")
    if opened is None or not hasattr(socket, "SO_PEERCRED"):
        return UNIX_PREFIX
    # uvloop's stand-in for the socket has no getsockopt.
    with socket.socket(fileno=os.dup(opened.fileno())) as same:
        found = same.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return f"{UNIX_PREFIX}{_CREDENTIALS.unpack(found)[1]}"


def peer_uid(call: Call) -> int | None:
    """The user at the other end of a Unix socket; None for every other peer."""
    text = call.peer.removeprefix(UNIX_PREFIX)
    return int(text) if call.peer.startswith(UNIX_PREFIX) and text.isdecimal() else None


def is_operator(call: Call) -> bool:
    """Whether the peer may control this node: a certificate with the role `operator`, or this process's own user."""
    if call.identity.startswith(URI_PREFIX):
        return parse_uri(call.identity)[0] == "operator"
    return peer_uid(call) in (0, os.geteuid())


def require_operator(call: Call, what: str) -> None:
    """Let operators alone do something.

    Raises:
        MeshError: FORBIDDEN.
    """
    if not is_operator(call):
        raise MeshError(
            Code.FORBIDDEN,
            f"Only an operator may {what}: connect with an operator's certificate, or over a Unix socket as the user "
            "that the node runs as.",
        )
