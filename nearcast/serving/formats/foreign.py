"""What no version may hold, known by its bytes: pickles, archives, programs. The allow-list decides; this is on top."""

from __future__ import annotations

import pickletools

_MAGICS = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"PK\x07\x08", "a zip archive"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x1f\x8b\x08", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"BZh", "a bzip2 file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x7fELF", "a program"),
    (b"#!", "a script"),
)
_TAR_MAGIC, _TAR_AT = b"ustar", 257
_ZIP64_LOCATOR, _ZIP64_LOCATOR_SIZE_BYTES = b"PK\x06\x07", 20
_ZIP_END, _ZIP_END_SIZE_BYTES, _ZIP_COMMENT_SIZE_BYTES_MAX = b"PK\x05\x06", 22, 0xFFFF
PICKLE_SIZE_BYTES_MAX = 1024 * 1024
PICKLE_OPCODES_MAX = 100_000
_SPELT = {"GLOBAL", "INST"}
"""Opcodes that spell a name; in bytes that are no pickle, what stands there is none."""
_NAMES = {"STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
_CALLS = {"REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX", "BUILD"}


def find_foreign(data: bytes) -> str:
    """What the bytes are, in words, if they are something that no version may hold; else ""."""
    for magic, name in _MAGICS:
        if data.startswith(magic):
            return name
    if data[_TAR_AT : _TAR_AT + len(_TAR_MAGIC)] == _TAR_MAGIC:
        return "a tar archive"
    if _ends_as_zip(data):
        return "a zip archive"
    return "a pickle" if _is_pickle(data) else ""


def _ends_as_zip(data: bytes) -> bool:
    """Archives are read from their end, so one can hide behind anything; one that lists nothing holds nothing.

    TFLite models whose extra files were taken out still end in such an empty list.
    """
    at = data.rfind(_ZIP_END, max(0, len(data) - _ZIP_END_SIZE_BYTES - _ZIP_COMMENT_SIZE_BYTES_MAX))
    end = at + _ZIP_END_SIZE_BYTES
    if end == len(data) and data[at + 4 : at + 16] == bytes(12):
        # With a locator before it the list is elsewhere, whatever stands here.
        return data[max(0, at - _ZIP64_LOCATOR_SIZE_BYTES) : at].startswith(_ZIP64_LOCATOR)
    return at >= 0 and end <= len(data) and end + int.from_bytes(data[end - 2 : end], "little") == len(data)


def _is_pickle(data: bytes) -> bool:
    """Whether unpickling would call something, even if it broke off afterwards, or would come to a regular end."""
    head = data[:PICKLE_SIZE_BYTES_MAX]
    names = False
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(head)):
            if opcode.name in _SPELT:
                names |= all(part.isidentifier() for part in str(argument).replace(".", " ").split())
            elif opcode.name in _NAMES:
                names = True
            if opcode.name in _CALLS and names:
                return True
            if opcode.name == "STOP":
                return count > 0
            if count >= PICKLE_OPCODES_MAX:
                return head[:1] == b"\x80"
    except Exception:  # noqa: BLE001 (any broken opcode: what was seen until then counts)
        return False
    return False
