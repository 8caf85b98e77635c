"""The bounds of a safetensors file: eight bytes of length, a JSON header, and tensors that tile the rest of it."""

from __future__ import annotations

import json
import math
from typing import Any

from nearcast.errors import Code, MeshError

HEADER_SIZE_BYTES_MAX = 16 * 1024 * 1024
TENSORS_MAX = 100_000
_PREFIX_SIZE_BYTES = 8
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
    "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def is_safetensors(data: bytes) -> bool:
    """Whether the bytes begin as a safetensors file does."""
    return data[_PREFIX_SIZE_BYTES : _PREFIX_SIZE_BYTES + 1] == b"{" and _header_size_bytes(data) <= len(data)


def check_safetensors(data: bytes) -> None:
    """Refuse a file whose header does not say where each byte of it belongs.

    Raises:
        MeshError: UNTRUSTED with the reason.
    """
    size_bytes = _header_size_bytes(data)
    if size_bytes > min(HEADER_SIZE_BYTES_MAX, len(data) - _PREFIX_SIZE_BYTES):
        raise MeshError(Code.UNTRUSTED, "its header is longer than allowed.")
    try:
        header = json.loads(
            data[_PREFIX_SIZE_BYTES : _PREFIX_SIZE_BYTES + size_bytes], object_pairs_hook=_without_doubles
        )
        ranges = sorted(_range(name, entry) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MeshError(Code.UNTRUSTED, "its header is malformed.") from error
    if len(ranges) > TENSORS_MAX:
        raise MeshError(Code.UNTRUSTED, f"it holds more than {TENSORS_MAX} tensors.")
    position = 0
    for start, end in ranges:
        if start != position:
            raise MeshError(Code.UNTRUSTED, "its tensors overlap or leave gaps.")
        position = end
    if position != len(data) - _PREFIX_SIZE_BYTES - size_bytes:
        raise MeshError(Code.UNTRUSTED, "its tensors do not end where the file ends.")


def _header_size_bytes(data: bytes) -> int:
    return int.from_bytes(data[:_PREFIX_SIZE_BYTES], "little")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name comes twice")
    return made


def _range(name: str, entry: Any) -> tuple[int, int]:
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError(name)
    if (end - start) * 8 != math.prod(shape) * _BITS[entry["dtype"]]:
        raise ValueError(name)
    return start, end
