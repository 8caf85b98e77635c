"""TLS contexts of the mesh: TLS 1.3 only, one CA, and peers known by the URI in their certificate, not by DNS."""

from __future__ import annotations

import ssl
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nearcast.errors import Code, MeshError
from nearcast.identity.name import URI_PREFIX, parse_uri
from nearcast.identity.node import Identity

# OpenSSL's X509_V_ERR_* numbers; the ssl module names none of them.
_NOT_YET_VALID = 9
_HAS_EXPIRED = 10


class TlsObject(Protocol):
    """What `ssl.SSLSocket`, `ssl.SSLObject` and uvloop's `ssl_object` have in common here."""

    def getpeercert(self) -> Any:
        """The peer's verified certificate as a mapping; None or empty without one."""
        ...


def server_tls(identity: Identity, *, require_client: bool, alpn: Sequence[str]) -> ssl.SSLContext:
    """The context of a listener. It follows `identity.reload()`.

    Args:
        identity: whose certificate is shown.
        require_client: without a client certificate of the mesh the handshake fails. Otherwise one may be shown, and is
            verified if it is; the caller decides per call what an anonymous peer may do.
        alpn: protocols in order of preference, such as ("h2",).

    Raises:
        MeshError: UNAUTHENTICATED if the identity's files cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context, alpn)
    _show(context, identity)
    _trust(context, identity.ca)
    context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_OPTIONAL
    return context


def client_tls(
    identity: Identity | None, *, ca: Path | bytes, alpn: Sequence[str], by_host: bool = False
) -> ssl.SSLContext:
    """The context of a channel. Check the peer with `require_role` once connected: no DNS name is checked.

    `ca` is a PEM file or its content. The context follows `identity.reload()`. With `by_host` the server is none of the
    mesh: its certificate must name the host that is connected to, and TLS 1.2 is enough.

    Raises:
        MeshError: UNAUTHENTICATED if the files cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = by_host
    _harden(context, alpn)
    if by_host:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    _trust(context, ca)
    if identity is not None:
        _show(context, identity)
    return context


def reload_certificate(context: ssl.SSLContext, identity: Identity) -> None:
    """Show the certificate that is on disk now; holds for new handshakes, open connections stay as they are.

    Raises:
        MeshError: UNAUTHENTICATED if the files cannot be used.
    """
    try:
        context.load_cert_chain(identity.certificate, identity.key)
    except (OSError, ssl.SSLError) as error:
        raise MeshError(Code.UNAUTHENTICATED, f"{identity.certificate} and its key cannot be used: {error}.") from error


def peer_uri(tls: TlsObject | None) -> str:
    """The mesh identity of a peer whose certificate TLS has verified; "" without one (or without TLS at all)."""
    return "" if tls is None else _uri(tls.getpeercert())


def require_role(certificate: Mapping[str, Any] | None, roles: Collection[str]) -> tuple[str, str]:
    """Check the role in a peer's certificate (`getpeercert()`) and return (role, name).

    Raises:
        MeshError: UNAUTHENTICATED without a mesh identity, FORBIDDEN if its role is none of `roles`.
    """
    uri = _uri(certificate)
    if not uri:
        raise MeshError(Code.UNAUTHENTICATED, "The peer showed no identity of this mesh; join the mesh first.")
    role, name = parse_uri(uri)
    if role not in roles:
        allowed = " or ".join(sorted(roles))
        raise MeshError(Code.FORBIDDEN, f"The peer is the {role} {name!r}, but this needs the role {allowed}.")
    return role, name


def tls_error(error: Exception, address: str) -> MeshError:
    """What a failed handshake with `address` means, in one sentence. Names the clock where it may be the reason."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == _NOT_YET_VALID:
            message = f"The certificate of {address} is not yet valid: this machine's clock is behind; set the clock."
        elif error.verify_code == _HAS_EXPIRED:
            message = (
                f"The certificate of {address} has expired, or this machine's clock is ahead; check the clock first."
            )
        else:
            message = f"The certificate of {address} is not from this mesh ({error.verify_message})."
        return MeshError(Code.UNAUTHENTICATED, message)
    if isinstance(error, ssl.SSLError):
        return MeshError(Code.UNAUTHENTICATED, f"{address} refused TLS ({error.reason or 'no reason given'}).")
    return MeshError(Code.UNAVAILABLE, f"{address} cannot be reached: {error}.")


def _show(context: ssl.SSLContext, identity: Identity) -> None:
    reload_certificate(context, identity)
    identity.on_reload(context, lambda used: reload_certificate(used, identity))


def _harden(context: ssl.SSLContext, alpn: Sequence[str]) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if alpn:
        context.set_alpn_protocols(list(alpn))


def _trust(context: ssl.SSLContext, ca: Path | bytes) -> None:
    try:
        if isinstance(ca, bytes):
            context.load_verify_locations(cadata=ca.decode("ascii"))
        else:
            context.load_verify_locations(cafile=ca)
    except (OSError, ValueError) as error:
        place = "The given text" if isinstance(ca, bytes) else str(ca)
        raise MeshError(Code.UNAUTHENTICATED, f"{place} is no usable CA certificate: {error}.") from error


def _uri(certificate: Mapping[str, Any] | None) -> str:
    names = (certificate or {}).get("subjectAltName", ())
    uris = [value for kind, value in names if kind == "URI" and value.startswith(URI_PREFIX)]
    return uris[0] if len(uris) == 1 else ""
