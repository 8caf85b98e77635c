"""Whatever a payload says: the right bytes come out, or UNTRUSTED."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from model_sync.delta import chunks, full
from model_sync.delta.index import Codec
from model_sync.delta.search import ENCODERS, describe_way, search
from model_sync.delta.ways import apply_codec, apply_way
from nearcast.errors import Code, MeshError

CODECS: list[Codec] = ["zstd", "chunks", *ENCODERS]
FAST = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """An old and a new file: unrelated, or changed by noise, cuts and insertions as model files are."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0, 1, 3, 7, 64, 1000, 5000, 70_001]))
    spread = draw(st.sampled_from([1, 12, 200]))
    old = np.round(rng.laplace(0, spread, size)).astype(np.int64).astype(np.uint8)
    new = old.copy()
    share = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    new += np.where(rng.random(size) < share, rng.integers(-3, 4, size), 0).astype(np.uint8)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, size))
        if draw(st.booleans()):
            new = np.concatenate([new[:at], rng.integers(0, 256, draw(st.integers(1, 9)), np.uint8), new[at:]])
        else:
            new = np.delete(new, slice(at, at + draw(st.integers(1, 9))))
    return old.tobytes(), new.tobytes()


def encode(codec: Codec, old: bytes, new: bytes) -> bytes:
    if codec == "zstd":
        return full.encode(new)
    return chunks.encode(new) if codec == "chunks" else ENCODERS[codec](old, new)


def apply(codec: Codec, payload: bytes, old: bytes, new: bytes) -> bytes:
    """As a node does: it knows the signed size and digest of the new file, and believes nothing else."""
    return apply_way(
        describe_way(codec, None if codec in ("zstd", "chunks") else hashlib.sha256(old).hexdigest(), payload),
        payload,
        old,
        size_bytes=len(new),
        sha256=hashlib.sha256(new).hexdigest(),
        read_range=lambda start, size: new[start : start + size],
    )


@FAST
@given(pair=pairs())
@example(pair=(b"", b""))
@example(pair=(b"", b"x"))
@example(pair=(b"x", b""))
def test_every_codec_leads_to_the_new_file(pair: tuple[bytes, bytes]) -> None:
    old, new = pair
    for base in (None, old):
        for tried in search(base, new, clock=time.perf_counter, budget_s=60.0):
            assert tried.payload is not None, (tried.codec, tried.reason)
            assert apply(tried.codec, tried.payload, old, new) == new


@pytest.mark.parametrize("codec", CODECS)
@FAST
@given(data=st.data(), pair=pairs())
def test_a_mutated_payload_gives_the_right_bytes_or_is_refused(
    codec: Codec, data: st.DataObject, pair: tuple[bytes, bytes]
) -> None:
    old, new = pair
    payload = bytearray(encode(codec, old, new))
    kind = data.draw(st.sampled_from(["flip", "cut", "pad", "overwrite", "random"]))
    at = data.draw(st.integers(0, max(0, len(payload) - 1)))
    if kind == "flip" and payload:
        payload[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del payload[at:]
    elif kind == "pad":
        payload += data.draw(st.binary(min_size=1, max_size=40))
    elif kind == "overwrite":
        noise = data.draw(st.binary(min_size=1, max_size=16))
        payload[at : at + len(noise)] = noise
    else:
        payload[:] = data.draw(st.binary(max_size=200))
    try:
        assert apply(codec, bytes(payload), old, new) == new
    except MeshError as error:
        assert error.code is Code.UNTRUSTED


@pytest.mark.parametrize("codec", ENCODERS)
@FAST
@given(pair=pairs(), at=st.integers(0, 2**20), flip=st.integers(1, 255))
def test_a_wrong_base_is_refused_or_harmless(codec: Codec, pair: tuple[bytes, bytes], at: int, flip: int) -> None:
    old, new = pair
    assume(old)
    payload = encode(codec, old, new)
    wrong = bytearray(old)
    wrong[at % len(old)] ^= flip
    way = describe_way(codec, hashlib.sha256(old).hexdigest(), payload)
    sha256 = hashlib.sha256(new).hexdigest()
    with pytest.raises(MeshError) as caught:
        apply_way(way, payload, bytes(wrong), size_bytes=len(new), sha256=sha256)
    assert caught.value.code is Code.UNTRUSTED
    # Even where the base is proved by a seal alone, what comes out has the signed size.
    try:
        assert len(apply_codec(codec, payload, bytes(wrong), size_bytes=len(new))) == len(new)
    except MeshError as error:
        assert error.code is Code.UNTRUSTED


@pytest.mark.parametrize("codec", CODECS)
@FAST
@given(pair=pairs(), wrong_by=st.integers(-3, 3))
def test_a_payload_for_another_size_never_gives_another_size(
    codec: Codec, pair: tuple[bytes, bytes], wrong_by: int
) -> None:
    old, new = pair
    wanted = len(new) + wrong_by
    assume(wrong_by and wanted >= 0)
    payload = encode(codec, old, new)
    try:
        made = apply_codec(codec, payload, old, size_bytes=wanted, read_range=lambda start, size: new[start:][:size])
        assert len(made) == wanted
    except MeshError as error:
        assert error.code is Code.UNTRUSTED
