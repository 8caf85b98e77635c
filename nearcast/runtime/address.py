"""Listening addresses: `host:port`, `[ipv6]:port` or `unix:/path`; port 0 lets the system choose."""

from __future__ import annotations

import errno
import ipaddress
from typing import NamedTuple

from nearcast.errors import Code, MeshError

UNIX_PREFIX = "unix:"
PORT_MAX = 65_535


class Address(NamedTuple):
    """A host and a port; for a Unix socket `host` is `unix:/path` and `port` is 0."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_address(self.host, self.port)


def parse_address(text: str) -> Address:
    """Split an address.

    Raises:
        MeshError: INVALID_REQUEST if it is none.
    """
    if text.startswith(UNIX_PREFIX):
        if len(text) == len(UNIX_PREFIX):
            raise MeshError(Code.INVALID_REQUEST, f"{text!r} names no socket; write it as unix:/path.")
        return Address(text, 0)
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""  # an IPv6 address without brackets leaves open which colon ends it
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > PORT_MAX:
        raise MeshError(Code.INVALID_REQUEST, f"{text!r} is no address; write it as host:port, such as 127.0.0.1:8001.")
    return Address(host, int(port))


def format_address(host: str, port: int) -> str:
    """The text of a host and a port, with brackets around an IPv6 address."""
    if host.startswith(UNIX_PREFIX):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`. A name other than `localhost` counts as reachable."""
    if host == "localhost" or host.startswith(UNIX_PREFIX):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def require_tls(address: str, tls_present: bool) -> None:  # noqa: FBT001 (reads as a sentence at every call)
    """Refuse a listener that other machines can reach without certificates.

    Raises:
        MeshError: INVALID_REQUEST naming the address and both ways out.
    """
    if not tls_present and not is_loopback(parse_address(address).host):
        raise MeshError(
            Code.INVALID_REQUEST,
            f"A listener on {address} can be reached from other machines and has no certificates;"
            " configure its certificates or listen on 127.0.0.1.",
        )


def listen_error(error: OSError, address: str) -> MeshError:
    """What a failed bind means, in one sentence."""
    if error.errno == errno.EADDRINUSE:
        return MeshError(
            Code.UNAVAILABLE,
            f"{address} is in use by another process; choose another port, or port 0 for any free one.",
        )
    if error.errno == errno.EACCES:
        return MeshError(Code.FORBIDDEN, f"Not allowed to listen on {address}; choose a port from 1024 up.")
    if error.errno == errno.EADDRNOTAVAIL:
        return MeshError(Code.INVALID_REQUEST, f"{address} is no address of this machine; choose one that is.")
    return MeshError(Code.UNAVAILABLE, f"Cannot listen on {address}: {error.strerror or error}.")
