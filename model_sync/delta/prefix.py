"""`zstd-prefix`: old content stands before the new as a raw prefix, so what moved is found by long matches.

A decoder copies its prefix and holds a window: so the new file is told in segments, each after that region of the old
file that lies around its own place. The frame's checksum covers the result only, and a frame decodes on a wrong base
too: both digests are checked outside.
"""

from __future__ import annotations

import io

from model_sync.delta.full import WINDOW_LOG_MAX, window_log
from model_sync.delta.limits import inflate
from model_sync.delta.symbols import Reader, number
from model_sync.delta.zstd import CompressionParameter as Parameter
from model_sync.delta.zstd import DecompressionParameter, ZstdCompressor, ZstdDecompressor, ZstdDict

LEVEL = 19
LEVEL_LARGE = 10
LARGE_SIZE_BYTES = 2 * 1024 * 1024
"""From here on the best level takes up to 3 s/MB, and every segment reads its whole region again."""
SEGMENT_SIZE_BYTES = 12 * 1024 * 1024
REGION_SIZE_BYTES = 20 * 1024 * 1024
_PREFIX_SIZE_BYTES_MIN = 8


def encode(old: bytes, new: bytes) -> bytes:
    """Compress a file, each segment with a region of the old one in front of it."""
    found = []
    for start in range(0, len(new), SEGMENT_SIZE_BYTES):
        segment = new[start : start + SEGMENT_SIZE_BYTES]
        region = _region(old, start, len(new))
        options: dict[int, int] = {
            Parameter.compression_level: LEVEL if len(new) <= LARGE_SIZE_BYTES else LEVEL_LARGE,
            # A frame whose content fits its window needs no more than that to be decoded, however far matches reach.
            Parameter.window_log: window_log(len(region) + len(segment), WINDOW_LOG_MAX + 1),
            Parameter.enable_long_distance_matching: 1,
            Parameter.checksum_flag: 1,
            Parameter.content_size_flag: 1,
            Parameter.dict_id_flag: 0,
        }
        compressor = ZstdCompressor(options=options, zstd_dict=ZstdDict(region, is_raw=True).as_prefix)
        frame = compressor.compress(segment, ZstdCompressor.FLUSH_FRAME)
        found.append(number(len(frame)) + frame)
    return b"".join(found)


def decode(payload: bytes, old: bytes, size_bytes: int) -> bytes:
    """The new file, of at most `size_bytes`."""
    reader, result = Reader(payload), io.BytesIO()
    for start in range(0, size_bytes, SEGMENT_SIZE_BYTES):
        frame = reader.take(reader.number())
        size = min(SEGMENT_SIZE_BYTES, size_bytes - start)
        result.write(_inflate(frame, ZstdDict(_region(old, start, size_bytes), is_raw=True), size).getbuffer())
    reader.finish()
    return result.getvalue()


def _inflate(frame: bytes, prefix: ZstdDict, size_bytes: int) -> io.BytesIO:
    options: dict[int, int] = {DecompressionParameter.window_log_max: WINDOW_LOG_MAX}
    decompressor = ZstdDecompressor(zstd_dict=prefix.as_prefix, options=options)
    return inflate(decompressor, frame, size_bytes)


def _region(old: bytes, start: int, size_bytes: int) -> bytes:
    """The old bytes around the place of the segment that begins at `start`; all of a small file."""
    middle = (start + SEGMENT_SIZE_BYTES // 2) * len(old) // size_bytes
    first = max(0, min(middle - REGION_SIZE_BYTES // 2, len(old) - REGION_SIZE_BYTES))
    return old[first : first + REGION_SIZE_BYTES].ljust(_PREFIX_SIZE_BYTES_MIN, b"\0")
