"""Makes servers and channels of either kind from a node's identity."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal, TypeAlias

from nearcast.errors import Code, MeshError
from nearcast.identity import ROLES, Identity, client_tls, require_role, server_tls
from nearcast.runtime import require_tls
from nearcast.transport.seam import DEFAULT_LIMITS, Channel, Limits, Methods, Server

Kind: TypeAlias = Literal["ngh2", "grpcio"]
KINDS: tuple[Kind, ...] = ("ngh2", "grpcio")
_ALPN = ("h2",)


def make_server(
    kind: Kind,
    methods: Methods,
    *,
    address: str,
    limits: Limits = DEFAULT_LIMITS,
    identity: Identity | None = None,
    require_client: bool = False,
) -> Server:
    """A server that is not started yet. It follows `identity.reload()`.

    Args:
        kind: "ngh2" or "grpcio".
        methods: what it answers.
        address: `host:port` (port 0: the system chooses) or `unix:/path`.
        limits: bounds.
        identity: whose certificate to show; None serves without TLS, on loopback and Unix sockets alone.
        require_client: only peers with a certificate of the mesh are let in.

    Raises:
        MeshError: INVALID_REQUEST for an unknown kind, and for an address that other machines can reach without an
            identity; UNAUTHENTICATED if the identity's files cannot be used.
    """
    require_tls(address, identity is not None)
    if require_client and identity is None:
        raise MeshError(
            Code.INVALID_REQUEST, "Client certificates can only be required on a listener with an identity."
        )
    if kind == "ngh2":
        from nearcast.transport.ngh2_server import Ngh2Server

        tls = None if identity is None else server_tls(identity, require_client=require_client, alpn=_ALPN)
        return Ngh2Server(methods, address=address, limits=limits, tls=tls)
    if kind == "grpcio":
        from nearcast.transport.grpcio_server import GrpcioServer, server_credentials

        credentials = None if identity is None else server_credentials(identity, require_client=require_client)
        return GrpcioServer(methods, address=address, limits=limits, credentials=credentials)
    raise _unknown(kind)


def make_channel(
    kind: Kind,
    address: str,
    *,
    limits: Limits = DEFAULT_LIMITS,
    identity: Identity | None = None,
    ca: Path | None = None,
    roles: Collection[str] | None = ROLES,
    name: str = "",
) -> Channel:
    """A channel that connects at its first call. It follows `identity.reload()`.

    Args:
        kind: "ngh2" or "grpcio".
        address: `host:port` or `unix:/path`.
        limits: bounds.
        identity: the certificate to show, and by its `ca` whom to trust.
        ca: whom to trust, if there is no identity or another authority. Neither: no TLS.
        roles: which roles the server may have; grpcio cannot look and believes any certificate of the authority. None:
            the server is none of the mesh, its certificate names its host.
        name: which node of the mesh the server must be; "" = any.

    Raises:
        MeshError: INVALID_REQUEST for an unknown kind; UNAUTHENTICATED if the identity's files cannot be used.
    """
    trusted = ca if ca is not None or identity is None else identity.ca
    if kind == "ngh2":
        from nearcast.transport.ngh2_channel import Ngh2Channel

        if trusted is None:
            return Ngh2Channel(address, limits=limits)
        tls = client_tls(identity, ca=trusted, alpn=_ALPN, by_host=roles is None)
        if roles is None:
            return Ngh2Channel(address, limits=limits, tls=tls)
        return Ngh2Channel(
            address,
            limits=limits,
            tls=tls,
            verify_peer=lambda found: _require_name(require_role(found, roles)[1], name),
        )
    if kind == "grpcio":
        from nearcast.transport.grpcio_channel import GrpcioChannel, channel_credentials

        if trusted is None:
            return GrpcioChannel(address, limits=limits)
        credentials = channel_credentials(identity, trusted)
        channel = GrpcioChannel(address, limits=limits, credentials=credentials, by_host=roles is None, name=name)
        if identity is not None:
            identity.on_reload(channel, lambda used: used.reconnect(channel_credentials(identity, trusted)))
        return channel
    raise _unknown(kind)


def _require_name(found: str, name: str) -> None:
    if name and found != name:
        raise MeshError(Code.UNAUTHENTICATED, f"It is {found!r} and not {name!r}.")


def _unknown(kind: str) -> MeshError:
    return MeshError(Code.INVALID_REQUEST, f"{kind!r} is no transport; choose one of {', '.join(KINDS)}.")
