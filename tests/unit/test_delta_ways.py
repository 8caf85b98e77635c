"""Which way a node takes, where it leads, and what it may cost."""

from __future__ import annotations

import bz2
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from model_sync.delta import bsdiff, chunks, full, limits, planes, prefix, residual, symbols
from model_sync.delta.index import Codec, DeltaIndex, Way
from model_sync.delta.sealed import apply_sealed_way, seal_delta
from model_sync.delta.search import ENCODERS, describe_way
from model_sync.delta.ways import apply_codec, apply_way, choose_way, find_lacking, full_size_bytes
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import CHUNK_SIZE_BYTES, File
from nearcast.store.sealing import seal_file
from tests.tiny_models import write_version

RESULT, FIRST, SECOND, STRANGER = ("d" * 64, "1" * 64, "2" * 64, "e" * 64)
SIZE_BYTES = 1_000_000


def way(codec: Codec, size_bytes: int, base: str | None = None) -> Way:
    chunks_ = tuple("0" * 64 for _ in range(-(-size_bytes // CHUNK_SIZE_BYTES)))
    return Way(codec=codec, base=base, size_bytes=size_bytes, sha256="0" * 64, chunks=chunks_)


FULL, CHUNKS = way("zstd", 700_000), way("chunks", 2_000)
FROM_FIRST, FROM_SECOND = way("bsdiff", 400_000, FIRST), way("residual-gaps", 20_000, SECOND)
INDEX = DeltaIndex(result=RESULT, size_bytes=SIZE_BYTES, ways=(CHUNKS, FROM_SECOND, FROM_FIRST, FULL))


@pytest.mark.parametrize(
    ("bases", "failed", "expected"),
    [
        ((), (), FULL),
        ((FIRST,), (), FROM_FIRST),
        ((FIRST, SECOND), (), FROM_SECOND),
        ((FIRST, SECOND), (FROM_SECOND.name,), FROM_FIRST),
        ((FIRST,), (FROM_FIRST.name,), CHUNKS),
        ((STRANGER,), (), CHUNKS),
        ((STRANGER,), (CHUNKS.name,), FULL),
        ((STRANGER,), (CHUNKS.name, FULL.name), None),
        ((), (FULL.name,), None),
    ],
)
def test_the_smallest_way_from_what_is_at_hand(
    bases: tuple[str, ...], failed: tuple[str, ...], expected: Way | None
) -> None:
    assert choose_way(INDEX, bases, sha256=RESULT, size_bytes=SIZE_BYTES, failed=failed) is expected


def test_an_index_is_not_believed() -> None:
    assert choose_way(INDEX, (FIRST,), sha256=STRANGER, size_bytes=SIZE_BYTES) is None
    assert choose_way(INDEX, (FIRST,), sha256=RESULT, size_bytes=SIZE_BYTES - 1) is None
    larger_than_the_file = replace(INDEX, ways=(way("zstd", SIZE_BYTES),))
    assert choose_way(larger_than_the_file, (), sha256=RESULT, size_bytes=SIZE_BYTES) is None
    assert full_size_bytes(INDEX) == 700_000
    assert full_size_bytes(replace(INDEX, ways=())) == SIZE_BYTES


# -- what an apply refuses ---------------------------------------------------------------------------------------------

RNG = np.random.default_rng(7)
OLD = np.round(RNG.laplace(0, 12, 2_600_000)).astype(np.int8).tobytes()
NEW = (np.frombuffer(OLD, np.int8) + (RNG.random(len(OLD)) < 0.02)).astype(np.int8).tobytes()
"""Larger than what is worked on at once, and no multiple of it."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def refuses(codec: Codec, payload: bytes, base: bytes = b"", *, size_bytes: int = 1000, **more: object) -> str:
    with pytest.raises(MeshError) as caught:
        apply_codec(codec, payload, base, size_bytes=size_bytes, **more)  # type: ignore[arg-type]
    assert caught.value.code is Code.UNTRUSTED
    return caught.value.message


@pytest.mark.parametrize("codec", ["residual-gaps", "residual-bz2", "residual-planes"])
def test_files_of_several_pieces_come_back(codec: Codec) -> None:
    payload = ENCODERS[codec](OLD, NEW)
    made = apply_way(describe_way(codec, sha256(OLD), payload), payload, OLD, size_bytes=len(NEW), sha256=sha256(NEW))
    assert made == NEW


@pytest.mark.parametrize("tail_bytes", range(1, 8))
def test_a_stream_may_be_cut_into_pieces_anywhere(monkeypatch: pytest.MonkeyPatch, tail_bytes: int) -> None:
    data = np.random.default_rng(tail_bytes).integers(0, 200, 300_000, np.uint8).tobytes()
    payload = full.encode(data, level=1)
    monkeypatch.setattr(limits, "PIECE_SIZE_BYTES", len(payload) - tail_bytes)
    assert full.decode(payload, len(data)) == data


def test_a_residual_aligns_files_of_different_length() -> None:
    at = len(OLD) // 3
    longer = NEW[:at] + b"a new name" + NEW[at:]
    for encode in (residual.encode_gaps, residual.encode_bz2, planes.encode):
        assert len(encode(OLD[: 2 * at], longer[: 2 * at + 10])) < 0.05 * 2 * at


def test_a_prefix_finds_what_lies_in_another_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "SEGMENT_SIZE_BYTES", 100_000)
    monkeypatch.setattr(prefix, "REGION_SIZE_BYTES", 250_000)
    old = RNG.bytes(400_000)
    new = old[50_000:] + old[:50_000]
    payload = prefix.encode(old, new)
    assert len(payload) < 0.3 * len(new)
    assert prefix.decode(payload, old, len(new)) == new


def test_the_wrong_base_and_the_wrong_result_are_refused() -> None:
    payload = residual.encode_bz2(b"old" * 100, b"new" * 100)
    described = describe_way("residual-bz2", sha256(b"old" * 100), payload)
    wrong = [(b"odd" * 100, sha256(b"new" * 100)), (b"old" * 100, sha256(b"nil" * 100))]
    for base, digest in wrong:
        with pytest.raises(MeshError) as caught:
            apply_way(described, payload, base, size_bytes=300, sha256=digest)
        assert caught.value.code is Code.UNTRUSTED


def test_bombs_are_refused_at_the_signed_size() -> None:
    zeros = bytes(64_000_000)
    frame, squeezed = full.encode(zeros, level=1), bz2.compress(zeros)
    assert len(frame) < 20_000
    assert "more or less" in refuses("zstd", frame)
    assert "more or less" in refuses("residual-bz2", bytes(8) + squeezed)
    framed = len(frame).to_bytes(4, "little") + frame
    assert "more or less" in refuses("zstd-prefix", framed, b"x" * 1000)
    assert "more or less" in refuses("residual-gaps", bytes(8) + b"\0" + framed)
    header = b"BSDIFF40" + b"".join(n.to_bytes(8, "little") for n in (len(squeezed), 0, 1000))
    assert "more or less" in refuses("bsdiff", header + squeezed)


def test_trailing_frames_and_bytes_are_refused() -> None:
    frame = full.encode(b"x" * 1000)
    for tail in (b"y", frame, full.encode(b"")):
        assert "more or less" in refuses("zstd", frame + tail)
    gaps = residual.encode_gaps(b"x" * 1000, b"y" * 1000)
    assert "follows" in refuses("residual-gaps", gaps + b"\0", b"x" * 1000)


def test_planes_come_in_few_segments() -> None:
    """Each costs the node some work, however short it is."""
    segment = symbols.number(4) + 4 * symbols.encode(np.zeros(1, np.uint8))
    header = bytes([4]) + (400).to_bytes(8, "little")
    assert "too many" in refuses("residual-planes", header + 100 * segment, bytes(400), size_bytes=400)


def test_bsdiff_steps_stay_inside_the_base() -> None:
    def patch(*steps: tuple[int, int, int]) -> bytes:
        control = b"".join((abs(n) | (2**63 if n < 0 else 0)).to_bytes(8, "little") for step in steps for n in step)
        packed, diff = bz2.compress(control), bz2.compress(bytes(1000))
        sizes = b"".join(n.to_bytes(8, "little") for n in (len(packed), len(diff), 1000))
        return b"BSDIFF40" + sizes + packed + diff + bz2.compress(b"")

    assert apply_codec("bsdiff", patch((1000, 0, 0)), b"x" * 1000, size_bytes=1000) == b"x" * 1000
    assert "leaves the base" in refuses("bsdiff", patch((500, 0, -501), (500, 0, 0)), b"x" * 1000)
    assert "leaves the base" in refuses("bsdiff", patch((1000, 0, 0)), b"x" * 999)
    assert "signed size" in refuses("bsdiff", patch((2000, -1000, 0)), b"x" * 3000)
    assert "signed size" in refuses("bsdiff", patch((2**62, 0, 0), (2**62, 0, 0)), b"x" * 1000)


def test_chunks_fetch_only_what_was_measured_to_be_lacking() -> None:
    old = RNG.bytes(600_000)
    new = old[:200_000] + RNG.bytes(50_000) + old[200_000:]
    asked: list[tuple[int, int]] = []

    def read_range(start: int, size: int) -> bytes:
        asked.append((start, size))
        return new[start : start + size]

    payload = chunks.encode(new)
    described = describe_way("chunks", None, payload)
    made = apply_codec("chunks", payload, old, size_bytes=len(new), read_range=read_range)
    assert made == new
    assert 50_000 <= sum(size for _, size in asked) < 150_000
    assert find_lacking(described, payload, old, size_bytes=len(new)) == asked
    assert find_lacking(described, payload, new, size_bytes=len(new)) == []
    assert "another range" in refuses("chunks", payload, b"", size_bytes=len(new), read_range=lambda *_: b"")
    for hostile in (payload[:-1], payload[:-20]):
        with pytest.raises(MeshError, match="Refused a delta"):
            find_lacking(described, hostile, old, size_bytes=len(new))


def test_chunks_in_too_many_pieces_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "RANGES_MAX", 2)
    old = RNG.bytes(600_000)
    new = b"".join(RNG.bytes(20) + old[at : at + 150_000] for at in range(0, 600_000, 150_000))
    payload = chunks.encode(new)
    assert find_lacking(describe_way("chunks", None, payload), payload, old, size_bytes=len(new)) is None
    assert "lack" in refuses("chunks", payload, old, size_bytes=len(new), read_range=lambda *_: b"")


def test_a_sealed_version_is_made_from_plain_bytes_and_proves_itself(tmp_path: Path) -> None:
    data_key, old, new = b"k" * 32, b"old weights " * 900, b"new weights " * 900
    manifest = write_version(tmp_path / "version", new)
    path = manifest.model_file
    sealed = seal_file(manifest, 0, path, new, data_key)
    entry = File(path=path, size_bytes=len(sealed), sha256=sha256(sealed), chunks=(sha256(sealed),))
    manifest = replace(manifest, files=(entry,))
    name = f"{FIRST}.residual-gaps"
    payload = seal_delta(residual.encode_gaps(old, new), entry.sha256, name, data_key)
    described = describe_way("residual-gaps", FIRST, payload)
    assert described.name == name
    assert apply_sealed_way(described, payload, old, manifest=manifest, path=path, data_key=data_key) == sealed
    renamed = describe_way("residual-bz2", FIRST, payload)
    wrong = [
        (described, payload[:-1], old, data_key),
        (renamed, payload, old, data_key),
        (described, payload, b"odd" + old[3:], data_key),
        (described, payload, old, b"o" * 32),
    ]
    for each, data, base, key in wrong:
        with pytest.raises(MeshError) as caught:
            apply_sealed_way(each, data, base, manifest=manifest, path=path, data_key=key)
        assert caught.value.code is Code.UNTRUSTED


MEASURE = """
import sys
from pathlib import Path
from model_sync.delta.ways import apply_codec
codec, folder = sys.argv[1], Path(sys.argv[2])
import numpy, bz2
base, payload, size = (folder / "old").read_bytes(), (folder / codec).read_bytes(), (folder / "new").stat().st_size
new = (folder / "new").open("rb")
def read_range(start, size):
    new.seek(start)
    return new.read(size)
def figure(key):
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(key)]
    return int(line.split()[1]) * 1024
before = figure("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
apply_codec(codec, payload, base, size_bytes=size, read_range=read_range)
print(figure("VmHWM") - before - size)
"""


@pytest.mark.parametrize("codec", ["residual-gaps", "bsdiff", "chunks", "zstd"])
def test_an_apply_takes_little_memory_beside_the_files(codec: Codec, tmp_path: Path) -> None:
    """Promised is base + new + 64 MiB; a copy of this file would break the bound of this test."""
    old = np.zeros(48 << 20, np.uint8)
    old[:: 1 << 12] = RNG.integers(1, 255, len(old) >> 12)
    new = old.copy()
    new[5 :: 1 << 12] += 1
    (tmp_path / "old").write_bytes(old.tobytes())
    (tmp_path / "new").write_bytes(new.tobytes())
    if codec == "bsdiff":  # sorting that many zeros takes minutes, so its one step is written by hand
        control = bz2.compress(len(new).to_bytes(8, "little") + bytes(16))
        diff = bz2.compress((new - old).tobytes())
        sizes = b"".join(n.to_bytes(8, "little") for n in (len(control), len(diff), len(new)))
        payload = b"BSDIFF40" + sizes + control + diff + bz2.compress(b"")
        assert len(new) <= bsdiff.SIZE_BYTES_MAX
    elif codec == "zstd":
        payload = full.encode(new.tobytes(), level=1)
    else:
        payload = chunks.encode(new.tobytes()) if codec == "chunks" else ENCODERS[codec](old.tobytes(), new.tobytes())
    (tmp_path / codec).write_bytes(payload)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, codec, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path.cwd(),
    )
    assert int(done.stdout) < 40 << 20
