"""Identities of the mesh: the CA, a node's certificate and key, TLS contexts, join tokens and enrolment."""

from nearcast.identity.authority import CERTIFICATE_LIFETIME_S, CertificateAuthority, make_csr
from nearcast.identity.enrolment import join, renew
from nearcast.identity.name import ROLES, make_uri, parse_uri, require_name
from nearcast.identity.node import Identity, Validity, load_identity
from nearcast.identity.tls import client_tls, peer_uri, reload_certificate, require_role, server_tls, tls_error
from nearcast.identity.token import JoinToken, read_token

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
