"""The node's half: which way to take, and where it leads. Both are pure; fetching and storing is the agent's."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from model_sync.delta import full
from model_sync.delta.index import Codec, DeltaIndex, Way
from model_sync.delta.limits import ReadRange, refused
from model_sync.delta.zstd import ZstdError
from nearcast.errors import Code, MeshError


def choose_way(
    index: DeltaIndex, bases: Collection[str], *, sha256: str, size_bytes: int, failed: Collection[str] = ()
) -> Way | None:
    """The way that costs least, or None if the full file is best.

    Args:
        index: what the repository offers; nothing in it is believed.
        bases: digests of the files at hand, as their manifests name them.
        sha256: signed digest of the wanted file.
        size_bytes: its signed size.
        failed: names of the ways that were tried and failed.

    Only `find_lacking` says how much a way of codec `chunks` needs beside its payload; it is chosen where there is some
    base, but none that another way starts from.
    """
    if index.result != sha256 or index.size_bytes != size_bytes:
        return None
    usable = [way for way in index.ways if way.name not in failed and way.size_bytes < size_bytes]
    exact = [way for way in usable if way.base in bases]
    unknown = [way for way in usable if way.codec == "chunks"] if bases and not exact else []
    whole = [way for way in usable if way.codec == "zstd"]
    return min(unknown or exact + whole, key=lambda way: way.size_bytes, default=None)


def full_size_bytes(index: DeltaIndex) -> int:
    """What the file costs without any base: compressed if that is offered. What `chunks` must be cheaper than."""
    return min([index.size_bytes, *(way.size_bytes for way in index.ways if way.codec == "zstd")])


def apply_way(
    way: Way,
    payload: bytes,
    base: bytes,
    *,
    size_bytes: int,
    sha256: str,
    read_range: ReadRange | None = None,
) -> bytes:
    """The signed file, or an error: whatever the payload says, no other bytes come out.

    Args:
        way: as chosen.
        payload: what was fetched under its name.
        base: content of the file `way.base`; b"" for `zstd`; for `chunks` all files at hand, one after the other.
        size_bytes: signed size of the result.
        sha256: signed digest of the result.
        read_range: for `chunks`: fetches a part of the full file.

    Raises:
        MeshError: UNTRUSTED for a wrong base, a cut, padded or hostile payload, or a wrong result; UNSUPPORTED if this
            node lacks the package of the codec; whatever `read_range` raises of its own.
    """
    if way.base is not None and hashlib.sha256(base).hexdigest() != way.base:
        raise refused("the base is not the one that it was made from")
    new = apply_codec(
        way.codec,
        payload,
        base,
        size_bytes=size_bytes,
        read_range=read_range,
    )
    if hashlib.sha256(new).hexdigest() != sha256:
        raise refused("its result is not the signed file")
    return new


def find_lacking(way: Way, payload: bytes, old: bytes, *, size_bytes: int) -> list[tuple[int, int]] | None:
    """Start and size of the parts that a way of codec `chunks` would read; None if they are too many to be worth it.

    Raises:
        MeshError: UNTRUSTED for a hostile payload, UNSUPPORTED if this node lacks the package of the codec.
    """
    if way.codec != "chunks":
        return []
    try:
        from model_sync.delta import chunks

        return chunks.find_lacking(payload, old, size_bytes)
    except ImportError as error:
        raise MeshError(Code.UNSUPPORTED, f"The codec {way.codec} needs the package {error.name}.") from error
    except ValueError as error:
        raise refused(f"its payload is damaged ({error})") from error


def apply_codec(
    codec: Codec,
    payload: bytes,
    base: bytes,
    *,
    size_bytes: int,
    read_range: ReadRange | None = None,
) -> bytes:
    """Some file of exactly `size_bytes`; for sealed files, whose base and result are proved by their seals.

    Raises:
        MeshError: UNTRUSTED if the payload does not lead to a file of that size.
    """
    try:
        if codec == "zstd":
            new = full.decode(payload, size_bytes)
        else:
            new = _apply_with_numpy(codec, payload, base, size_bytes, read_range)
    except ImportError as error:
        raise MeshError(Code.UNSUPPORTED, f"The codec {codec} needs the package {error.name}.") from error
    except (OSError, EOFError, ValueError, ZstdError) as error:
        raise refused(f"its payload is damaged ({error})") from error
    if len(new) != size_bytes:
        raise refused("its result has another size than the signed file")
    return new


def _apply_with_numpy(
    codec: Codec, payload: bytes, base: bytes, size_bytes: int, read_range: ReadRange | None
) -> bytes:
    """The codecs that need numpy, which takes longer to load than most deltas to apply."""
    from model_sync.delta import bsdiff, chunks, planes, prefix, residual

    match codec:
        case "zstd-prefix":
            return prefix.decode(payload, base, size_bytes)
        case "bsdiff":
            return bsdiff.decode(payload, base, size_bytes)
        case "chunks":
            return chunks.decode(payload, base, size_bytes, read_range)
        case "residual-bz2":
            return residual.decode_bz2(payload, base, size_bytes)
        case "residual-gaps":
            return residual.decode_gaps(payload, base, size_bytes)
        case _:
            return planes.decode(payload, base, size_bytes)
