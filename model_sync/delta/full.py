"""`zstd`: the whole file, compressed on its own. What every other way is measured against."""

from __future__ import annotations

import io

from model_sync.delta.limits import inflate
from model_sync.delta.zstd import CompressionParameter as Parameter
from model_sync.delta.zstd import DecompressionParameter, ZstdCompressor, ZstdDecompressor

LEVEL = 19
WINDOW_LOG_MIN = 20
WINDOW_LOG_MAX = 25
"""A decoder holds a window of at most 32 MiB beside the file itself."""


def encode(new: bytes, *, level: int = LEVEL) -> bytes:
    """Compress a file."""
    options: dict[int, int] = {
        Parameter.compression_level: level,
        Parameter.window_log: window_log(len(new)),
        Parameter.checksum_flag: 1,
        Parameter.content_size_flag: 1,
    }
    return ZstdCompressor(options=options).compress(new, ZstdCompressor.FLUSH_FRAME)


def decode(payload: bytes, size_bytes: int) -> bytes:
    """The file, of at most `size_bytes`."""
    return inflate_frame(payload, size_bytes).getvalue()


def inflate_frame(frame: bytes, size_bytes_max: int) -> io.BytesIO:
    """One frame of at most `size_bytes_max`, as `limits.inflate` gives it."""
    decompressor = ZstdDecompressor(options={DecompressionParameter.window_log_max: WINDOW_LOG_MAX})
    return inflate(decompressor, frame, size_bytes_max)


def window_log(size_bytes: int, most: int = WINDOW_LOG_MAX) -> int:
    """The smallest window that spans so many bytes, within bounds."""
    return max(WINDOW_LOG_MIN, min(most, (max(1, size_bytes) - 1).bit_length()))
