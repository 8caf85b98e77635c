"""The publisher's half: try every codec that fits, keep what is worth its bytes.

No codec wins everywhere: residuals win where tensors stayed in place, a prefix where the graph moved around equal
weights, bsdiff where both happened, chunks where the base is unknown, and a full retrain is best sent whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from model_sync.delta import bsdiff, chunks, full, planes, prefix, residual
from model_sync.delta.index import Codec, Way
from model_sync.delta.ways import apply_codec
from nearcast.errors import MeshError
from nearcast.store.manifest import CHUNK_SIZE_BYTES

WORTH_SHARE_MAX = 0.6
"""A delta that is larger than this share of the compressed file is not published."""
SIZE_BYTES_MAX = 512 * 1024 * 1024
"""A search holds the old and the new file and some copies in memory; larger files go whole."""
Clock = Callable[[], float]

ENCODERS: dict[Codec, Callable[[bytes, bytes], bytes]] = {
    "residual-gaps": residual.encode_gaps,
    "residual-bz2": residual.encode_bz2,
    "residual-planes": planes.encode,
    "zstd-prefix": prefix.encode,
    "bsdiff": bsdiff.encode,
}
"""Codecs with a base, the fast ones first: what the budget cuts off is what would have taken longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One codec on one pair of files.

    Attributes:
        payload: None if it was not made; `reason` says why.
        encode_s, decode_s: what it took here.
    """

    codec: Codec
    payload: bytes | None = None
    encode_s: float = 0.0
    decode_s: float = 0.0
    reason: str = ""


def search(old: bytes | None, new: bytes, *, clock: Clock, budget_s: float) -> Iterator[Tried]:
    """Every codec on one pair, as each is done.

    Args:
        old: the base; None = only what needs none (`zstd`, `chunks`).
        new: the file to send.
        clock: seconds.
        budget_s: no further codec is begun after this time. One codec takes at most some 2 s/MB.

    Every payload was applied and gave `new`, or its `reason` says that it did not.
    """
    end = clock() + budget_s
    for codec in ("zstd", "chunks") if old is None else ENCODERS:
        yield _try(codec, old, new, clock) if clock() < end else Tried(codec=codec, reason="no time left")


def best(tried: Iterable[Tried], full_size_bytes: int) -> Tried | None:
    """The smallest delta, or None if none is worth it.

    Args:
        tried: what `search` answered for one base.
        full_size_bytes: size of the file on its own, compressed.
    """
    made = [(len(each.payload), each) for each in tried if each.payload is not None]
    size_bytes, found = min(made, key=lambda pair: pair[0], default=(0, None))
    return found if size_bytes <= WORTH_SHARE_MAX * full_size_bytes else None


def describe_way(codec: Codec, base: str | None, payload: bytes) -> Way:
    """The index's entry for a payload, as it is stored."""
    pieces = (payload[at : at + CHUNK_SIZE_BYTES] for at in range(0, len(payload), CHUNK_SIZE_BYTES))
    return Way(
        codec=codec,
        base=base,
        size_bytes=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
        chunks=tuple(hashlib.sha256(piece).hexdigest() for piece in pieces),
    )


def _try(codec: Codec, old: bytes | None, new: bytes, clock: Clock) -> Tried:
    if reason := _unfit(codec, old, new):
        return Tried(codec=codec, reason=reason)
    began = clock()
    try:
        payload = _encode(codec, old, new)
    except ImportError as error:
        return Tried(codec=codec, reason=f"the package {error.name} is not installed")
    encoded = clock()
    try:
        made = apply_codec(
            codec, payload, old or b"", size_bytes=len(new), read_range=lambda start, size: new[start : start + size]
        )
    except MeshError as error:
        return Tried(codec=codec, encode_s=encoded - began, reason=error.message)
    if made != new:
        return Tried(codec=codec, encode_s=encoded - began, reason="it does not lead back to the file")
    return Tried(codec=codec, payload=payload, encode_s=encoded - began, decode_s=clock() - encoded)


def _encode(codec: Codec, old: bytes | None, new: bytes) -> bytes:
    if codec == "zstd":
        return full.encode(new)
    if codec == "chunks":
        return chunks.encode(new)
    return ENCODERS[codec](old or b"", new)


def _unfit(codec: Codec, old: bytes | None, new: bytes) -> str:
    largest = max(len(old or b""), len(new))
    if largest > SIZE_BYTES_MAX:
        return f"larger than {SIZE_BYTES_MAX >> 20} MiB"
    if codec == "bsdiff" and largest > bsdiff.SIZE_BYTES_MAX:
        return f"larger than {bsdiff.SIZE_BYTES_MAX >> 20} MiB"
    return ""
