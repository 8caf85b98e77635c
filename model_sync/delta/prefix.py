"""`zstd-prefix`: the old file stands before the new one as raw content, so what moved is found by long matches.

The frame's checksum covers the result only, and a frame decodes on a wrong base too: both digests are checked outside.
"""

from __future__ import annotations

from model_sync.delta.full import WINDOW_LOG_MAX, window_log
from model_sync.delta.limits import inflate
from model_sync.delta.zstd import CompressionParameter as Parameter
from model_sync.delta.zstd import DecompressionParameter, ZstdCompressor, ZstdDecompressor, ZstdDict

_PREFIX_SIZE_BYTES_MIN = 8
LEVEL = 19
LEVEL_LARGE = 12
LARGE_SIZE_BYTES = 32 * 1024 * 1024
"""From here on the best level would take too long for what it saves."""


def encode(old: bytes, new: bytes) -> bytes:
    """Compress a file with another one in front of it."""
    options: dict[int, int] = {
        Parameter.compression_level: LEVEL if len(new) < LARGE_SIZE_BYTES else LEVEL_LARGE,
        Parameter.window_log: window_log(len(old) + len(new)),
        Parameter.enable_long_distance_matching: 1,
        Parameter.checksum_flag: 1,
        Parameter.content_size_flag: 1,
        Parameter.dict_id_flag: 0,
    }
    compressor = ZstdCompressor(options=options, zstd_dict=_before(old))
    return compressor.compress(new, ZstdCompressor.FLUSH_FRAME)


def decode(payload: bytes, old: bytes, size_bytes: int) -> bytes:
    """The new file, of at most `size_bytes`."""
    options: dict[int, int] = {DecompressionParameter.window_log_max: WINDOW_LOG_MAX}
    decompressor = ZstdDecompressor(zstd_dict=_before(old), options=options)
    return inflate(decompressor, payload, size_bytes).getvalue()


def _before(old: bytes) -> tuple[ZstdDict, int]:
    return ZstdDict(old.ljust(_PREFIX_SIZE_BYTES_MIN, b"\0"), is_raw=True).as_prefix
