"""What shorter ways there are to one blob: an unsigned hint, `deltas/<new>/index.json`.

It needs no signature: whatever a way yields must hash to the signed digest, within capped size, memory and time, or the
full blob is fetched. Who controls the index can waste bytes, nothing more.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.store.manifest import CHUNK_SIZE_BYTES, Sha256

INDEX_FILE = "index.json"
INDEX_SIZE_BYTES_MAX = 1024 * 1024
WAYS_MAX = 64
FILE_SIZE_BYTES_MIN = 16 * 1024
"""Smaller files have no index: asking for it would cost what it saves."""

Codec: TypeAlias = Literal[
    "zstd", "zstd-prefix", "residual-bz2", "residual-gaps", "residual-planes", "bsdiff", "chunks"
]
"""`zstd` needs no base, `chunks` any base; the others exactly the base that they name."""


class Way(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One payload that leads to the blob.

    Attributes:
        codec: how it was made.
        base: digest of the file that it starts from; None for codecs that need none.
        size_bytes, sha256, chunks: of the payload, as in a manifest; what a resumed download is checked against.
    """

    codec: Codec
    base: Sha256 | None = None
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Sha256
    chunks: tuple[Sha256, ...]

    @property
    def name(self) -> str:
        """File name of the payload beside the index."""
        return f"{self.base or 'full'}.{self.codec}"


class DeltaIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All ways to the blob `result` of `size_bytes`, smallest payload first."""

    schema: Literal[1] = 1
    result: Sha256
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    ways: Annotated[tuple[Way, ...], msgspec.Meta(max_length=WAYS_MAX)] = ()

    def encode(self) -> bytes:
        """Canonical bytes."""
        return msgspec.json.encode(self)


def decode_index(data: bytes) -> DeltaIndex:
    """Parse and check an index.

    Raises:
        MeshError: UNTRUSTED if it is too large, malformed or contradicts itself.
    """
    if len(data) > INDEX_SIZE_BYTES_MAX:
        raise MeshError(Code.UNTRUSTED, f"The delta index is larger than {INDEX_SIZE_BYTES_MAX} bytes.")
    try:
        index = msgspec.json.decode(data, type=DeltaIndex)
    except msgspec.DecodeError as error:
        raise MeshError(Code.UNTRUSTED, f"The delta index is malformed: {error}.") from error
    for way in index.ways:
        if len(way.chunks) != -(-way.size_bytes // CHUNK_SIZE_BYTES):
            raise MeshError(Code.UNTRUSTED, f"The chunk list of {way.name} does not fit its size.")
        if (way.base is None) != (way.codec in ("zstd", "chunks")):
            raise MeshError(Code.UNTRUSTED, f"The way {way.name} names a base that its codec does not have.")
    return index
