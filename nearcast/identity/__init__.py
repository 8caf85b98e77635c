"""Identities of the mesh: the CA, a node's certificate and key, TLS contexts, join tokens and enrolment."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nearcast.identity.name import ROLES, make_uri, parse_uri, require_name
from nearcast.identity.node import Identity, Validity, load_identity
from nearcast.identity.tls import client_tls, peer_uri, reload_certificate, require_role, server_tls, tls_error
from nearcast.identity.token import JoinToken, read_token

if TYPE_CHECKING:
    from nearcast.identity.authority import CERTIFICATE_LIFETIME_S, CertificateAuthority, make_csr
    from nearcast.identity.enrolment import join, renew

__all__ = [
    "CERTIFICATE_LIFETIME_S",
    "ROLES",
    "CertificateAuthority",
    "Identity",
    "JoinToken",
    "Validity",
    "client_tls",
    "join",
    "load_identity",
    "make_csr",
    "make_uri",
    "parse_uri",
    "peer_uri",
    "read_token",
    "reload_certificate",
    "renew",
    "require_name",
    "require_role",
    "server_tls",
    "tls_error",
]

_MODULES = {
    "CERTIFICATE_LIFETIME_S": "authority",
    "CertificateAuthority": "authority",
    "join": "enrolment",
    "make_csr": "authority",
    "renew": "enrolment",
}


def __getattr__(name: str) -> Any:
    """Import what signs and asks for certificates only when asked for: cryptography is 10 MB."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
