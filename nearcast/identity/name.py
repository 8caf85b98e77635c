"""Who is who: `spiffe://nearcast/<role>/<name>`, carried in the URI SAN of a certificate."""

from __future__ import annotations

import re
from typing import Final

from nearcast.errors import Code, MeshError

URI_PREFIX: Final = "spiffe://nearcast/"
ROLES: Final = ("edge", "cloud", "router", "sync", "operator")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def make_uri(role: str, name: str) -> str:
    """The URI of an identity.

    Raises:
        MeshError: INVALID_REQUEST if the role is unknown or the name is no DNS label.
    """
    require_name(role, name)
    return f"{URI_PREFIX}{role}/{name}"


def parse_uri(uri: str) -> tuple[str, str]:
    """Split an identity URI into (role, name).

    Raises:
        MeshError: UNAUTHENTICATED if it is no identity of this mesh.
    """
    role, slash, name = uri.removeprefix(URI_PREFIX).partition("/")
    if not uri.startswith(URI_PREFIX) or not slash or role not in ROLES or _NAME.fullmatch(name) is None:
        raise MeshError(Code.UNAUTHENTICATED, "The certificate names no identity of this mesh.")
    return role, name


def require_name(role: str, name: str) -> None:
    """Refuse an unknown role or a name that is no DNS label (lower case, digits, `-`, at most 63 characters).

    Raises:
        MeshError: INVALID_REQUEST.
    """
    if role not in ROLES:
        raise MeshError(Code.INVALID_REQUEST, f"{role[:64]!r} is no role; choose one of {', '.join(ROLES)}.")
    if _NAME.fullmatch(name) is None:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{name[:64]!r} is no node name; use lower-case letters, digits and '-', at most 63 characters.",
        )
