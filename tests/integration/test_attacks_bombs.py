"""Deltas that inflate: nobody signs them, so what they do before their result is hashed must be bounded."""

from __future__ import annotations

import bz2
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backports import zstd

from model_sync.delta.index import Codec, Way
from nearcast.store import Store
from nearcast.store.manifest import CHUNK_SIZE_BYTES
from tests.integration.agent_parts import MODEL, Origin, Publisher, make_config, running, serving, settled
from tests.integration.delta_parts import push_weights, weights, write_index, write_payload

INFLATED_BYTES = 256 * 1024 * 1024


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "home")


@pytest.fixture
def origin(publisher: Publisher) -> Iterator[Origin]:
    with serving(publisher) as running_origin:
        yield running_origin


def zstd_bomb() -> bytes:
    return zstd.compress(bytes(INFLATED_BYTES), 1)


def bz2_bomb() -> bytes:
    return bz2.compress(bytes(INFLATED_BYTES // 8))


@pytest.mark.parametrize(
    ("codec", "bomb"), [("zstd", zstd_bomb), ("zstd-prefix", zstd_bomb), ("residual-bz2", bz2_bomb)], ids=str
)
async def test_a_delta_that_inflates_costs_a_detour(
    tmp_path: Path, publisher: Publisher, origin: Origin, codec: Codec, bomb: Callable[[], bytes]
) -> None:
    config = make_config(tmp_path, publisher, origin)
    old = push_weights(publisher, 1, weights())
    publisher.roll(1)
    async with running(config) as agent:
        await settled(agent, stable=1)
        new = push_weights(publisher, 2, weights()[::-1])
        payload = bomb()
        chunks = [payload[at : at + CHUNK_SIZE_BYTES] for at in range(0, len(payload), CHUNK_SIZE_BYTES)]
        way = Way(
            codec=codec,
            base=None if codec == "zstd" else old.sha256,
            size_bytes=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
            chunks=tuple(hashlib.sha256(chunk).hexdigest() for chunk in chunks),
        )
        write_payload(publisher, new, way, payload)
        write_index(publisher, new, way)
        publisher.roll(2)
        before = reset_resident_peak()
        assert await agent.check()
        await settled(agent, stable=2)
        assert resident_peak_bytes() - before < INFLATED_BYTES // 4
    assert any(way.name in path for path, _, _ in origin.served), "the bomb was fetched and thrown away"
    assert any(new.sha256 in path and "/blobs/" in path for path, _, _ in origin.served), "the full file came instead"
    entry = Store(Path(config.store)).manifest(MODEL, 2).file("model.onnx")
    assert (Store(Path(config.store)).folder(MODEL, 2) / "model.onnx").stat().st_size == entry.size_bytes


def reset_resident_peak() -> int:
    """Forget what making the bomb took."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_peak_bytes()


def resident_peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
