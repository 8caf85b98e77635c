"""Metadata between grpcio and the seam: of values whose name ends in `-bin` grpcio has the bytes, the seam base64."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any

from nearcast.errors import Code, MeshError
from nearcast.transport.seam import Metadata

_BINARY = "-bin"


def read_metadata(pairs: Iterable[tuple[str, Any]] | None) -> Metadata:
    """What came with a call, in the seam's form. gRPC's own fields are left out."""
    return tuple(
        (name, value if isinstance(value, str) else base64.b64encode(value).decode().rstrip("="))
        for name, value in pairs or ()
        if not name.startswith("grpc-")
    )


def write_metadata(metadata: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    """Metadata in grpcio's form.

    Raises:
        MeshError: INVALID_REQUEST if a binary value is no base64.
    """
    return tuple((name, _decode(name, value) if name.endswith(_BINARY) else value) for name, value in metadata)


def _decode(name: str, value: str) -> bytes:
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except binascii.Error as error:
        raise MeshError(Code.INVALID_REQUEST, f"The metadata value of {name[:64]} must be base64.") from error
