"""Plain text and JSON, within bounds."""

from __future__ import annotations

import msgspec

from nearcast.errors import Code, MeshError

TEXT_SIZE_BYTES_MAX = 64 * 1024 * 1024
_CONTROLS = frozenset(range(32)) - frozenset(b"\t\n\r\f")


def is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8 without control characters."""
    if len(data) > TEXT_SIZE_BYTES_MAX or not _CONTROLS.isdisjoint(data):
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_json(data: bytes) -> None:
    """Refuse what is no JSON.

    Raises:
        MeshError: UNTRUSTED.
    """
    if len(data) > TEXT_SIZE_BYTES_MAX:
        raise MeshError(Code.UNTRUSTED, f"it is larger than {TEXT_SIZE_BYTES_MAX} bytes.")
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MeshError(Code.UNTRUSTED, "it is no JSON.") from error
