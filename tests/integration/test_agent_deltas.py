"""The agent on its shorter ways: deltas that work, deltas that lie, and what it does then."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from model_sync.agent.install.bases import Bases
from model_sync.agent.install.shorter_ways import find_way, read_index
from model_sync.agent.sources.folder_source import FolderSource
from model_sync.agent.sources.mirrors import Mirrors, SharedHealth
from model_sync.delta.index import INDEX_SIZE_BYTES_MAX, WAYS_MAX, DeltaIndex
from model_sync.publisher.bundle import create_bundle, read_bundle, read_spec
from model_sync.repository.layout import blob_path
from nearcast.cli.demo.bundles import write_sources
from nearcast.errors import MeshError
from nearcast.store import Store
from nearcast.store.manifest import CHUNK_SIZE_BYTES, File
from nearcast.store.sealing import KEY_SIZE_BYTES
from tests.integration.agent_parts import (
    MODEL,
    Origin,
    Publisher,
    make_config,
    running,
    serving,
    settled,
    status_of,
)
from tests.integration.delta_parts import (
    publish_delta,
    publish_sealed_delta,
    push_sealed,
    push_weights,
    put_model,
    weights,
    write_index,
    write_index_bytes,
    write_payload,
)
from tests.patience import until


class Pair:
    """Two releases of which the second differs in 2 % of its weights; the first is what the channel names."""

    def __init__(self, folder: Path) -> None:
        self.publisher = Publisher(folder)
        self.new = push_weights(self.publisher, 1, weights())
        self.publisher.roll(1)
        self.release = 1
        self.advance()

    def advance(self) -> None:
        """The second becomes the first, and there is another."""
        self.release += 1
        self.old, self.new = self.new, push_weights(self.publisher, self.release, weights(changed=0.02 * self.release))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "home")


@pytest.fixture
def origin(pair: Pair) -> Iterator[Origin]:
    with serving(pair.publisher) as running_origin:
        yield running_origin


async def test_digits_from_release_1_to_2(tmp_path: Path) -> None:
    """The demo's models, bundled as they are pushed: trained twice, so little is saved, but nothing is lost."""
    publisher, manifests = Publisher(tmp_path / "home"), []
    for name, specification in write_sources(tmp_path / "sources").items():
        if name in ("digits-1", "digits-2"):
            spec = msgspec.structs.replace(read_spec(specification), name=MODEL)
            create_bundle(spec, specification.parent, tmp_path / name)
            manifests.append(publisher.push_folder(tmp_path / name, read_bundle(tmp_path / name)[0]))
    old, new = (one.file(one.model_file) for one in manifests)
    way = publish_delta(publisher, old, new, codec="bsdiff")
    assert way.size_bytes < new.size_bytes
    publisher.roll(1)
    with serving(publisher) as origin:
        config = make_config(tmp_path, publisher, origin)
        async with running(config) as agent:
            await settled(agent, stable=1)
            publisher.roll(2)
            await agent.check()
            await settled(agent, stable=2)
        assert fetched(origin, way.name)
        assert fetched(origin, blob_path(new.sha256)) == []
    require_installed(config, new, 2)


def fetched(origin: Origin, what: str) -> list[tuple[str, int, int]]:
    return [one for one in origin.served if what in one[0]]


def require_installed(config: Any, entry: File, release: int) -> None:
    data = (Store(Path(config.store)).folder(MODEL, release) / entry.path).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry.sha256


async def test_an_update_costs_the_delta_alone(tmp_path: Path, pair: Pair, origin: Origin) -> None:
    way = publish_delta(pair.publisher, pair.old, pair.new)
    config = make_config(tmp_path, pair.publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        origin.served.clear()
        before = status_of(agent).received_bytes
        pair.publisher.roll(2)
        await agent.check()
        await settled(agent, stable=2)
        assert status_of(agent).received_bytes - before == way.size_bytes
    require_installed(config, pair.new, 2)
    assert way.size_bytes < 0.06 * pair.new.size_bytes
    assert fetched(origin, "/blobs/") == [], "model and golden vectors are the same, the rest is patched"
    assert [one[2] for one in fetched(origin, way.name)] == [way.size_bytes]


async def test_a_fresh_node_takes_the_compressed_file(tmp_path: Path, pair: Pair, origin: Origin) -> None:
    way = publish_delta(pair.publisher, None, pair.old, codec="zstd")
    config = make_config(tmp_path, pair.publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
    require_installed(config, pair.old, 1)
    assert fetched(origin, way.name)
    assert fetched(origin, blob_path(pair.old.sha256)) == []


async def test_chunks_serve_a_base_that_the_publisher_does_not_know(tmp_path: Path, pair: Pair, origin: Origin) -> None:
    middle = weights()[:300_000] + b"new" * 10_000 + weights()[300_000:]
    new = push_weights(pair.publisher, 3, middle)
    publish_delta(pair.publisher, None, new, codec="chunks")
    config = make_config(tmp_path, pair.publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        before = status_of(agent).received_bytes
        pair.publisher.roll(3)
        await agent.check()
        await settled(agent, stable=3)
        assert status_of(agent).received_bytes - before < 0.25 * new.size_bytes
    require_installed(config, new, 3)


def damaged_payload(pair: Pair) -> None:
    """Its chunks are what the index says, and it leads nowhere."""
    way = publish_delta(pair.publisher, pair.old, pair.new)
    garbage = b"\0" * 1000
    digest = hashlib.sha256(garbage).hexdigest()
    lying = msgspec.structs.replace(way, size_bytes=1000, sha256=digest, chunks=(digest,))
    write_payload(pair.publisher, pair.new, lying, garbage)
    write_index(pair.publisher, pair.new, lying)


def payload_of_another_file(pair: Pair) -> None:
    """A genuine payload, to another result."""
    other = put_model(pair.publisher, weights(changed=0.03))
    way = publish_delta(pair.publisher, pair.old, other)
    payload = (pair.publisher.repository.folder / f"deltas/{other.sha256}/{way.name}").read_bytes()
    write_payload(pair.publisher, pair.new, way, payload)
    write_index(pair.publisher, pair.new, way)


def wrong_base(pair: Pair) -> None:
    """Made from a file that is not the one it names."""
    other = put_model(pair.publisher, weights(seed=99))
    way = publish_delta(pair.publisher, other, pair.new, codec="zstd-prefix")
    payload = (pair.publisher.repository.folder / f"deltas/{pair.new.sha256}/{way.name}").read_bytes()
    lying = msgspec.structs.replace(way, base=pair.old.sha256)
    write_payload(pair.publisher, pair.new, lying, payload)
    write_index(pair.publisher, pair.new, lying)


def absent_payload(pair: Pair) -> None:
    way = publish_delta(pair.publisher, pair.old, pair.new)
    (pair.publisher.repository.folder / f"deltas/{pair.new.sha256}/{way.name}").unlink()


def changed_chunk(pair: Pair) -> None:
    """Bytes that are not those of the index."""
    way = publish_delta(pair.publisher, pair.old, pair.new)
    write_payload(pair.publisher, pair.new, way, b"\0" * way.size_bytes)


async def test_a_delta_that_fails_is_followed_by_the_full_file(tmp_path: Path, pair: Pair, origin: Origin) -> None:
    config = make_config(tmp_path, pair.publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        for damage in (damaged_payload, payload_of_another_file, wrong_base, absent_payload, changed_chunk):
            damage(pair)
            origin.served.clear()
            pair.publisher.roll(pair.release)
            await agent.check()
            await settled(agent, stable=pair.release)
            assert status_of(agent).quarantined == (), damage
            require_installed(config, pair.new, pair.release)
            assert fetched(origin, blob_path(pair.new.sha256)), damage
            assert len(fetched(origin, "index.json")) == 1, "and the delta is not tried again"
            pair.advance()


@pytest.mark.parametrize("policy", [{"metered": True}, {"on_delta_failure": "fail"}])
async def test_no_full_download_behind_the_operators_back(
    tmp_path: Path, pair: Pair, origin: Origin, policy: dict[str, Any]
) -> None:
    damaged_payload(pair)
    config = make_config(tmp_path, pair.publisher, origin, **policy)
    async with running(config) as agent:
        await settled(agent, stable=1)
        origin.served.clear()
        pair.publisher.roll(2)
        await agent.check()
        await until(lambda: "forbids the full file" in status_of(agent).error, "it waits for the operator")
        await agent.check()
        assert status_of(agent).stable == 1
    assert fetched(origin, blob_path(pair.new.sha256)) == []
    config = make_config(tmp_path, pair.publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=2)
    require_installed(config, pair.new, 2)


async def test_a_damaged_base_is_no_base(tmp_path: Path, pair: Pair, origin: Origin) -> None:
    publish_delta(pair.publisher, pair.old, pair.new)
    config = make_config(tmp_path, pair.publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        base = Store(Path(config.store)).folder(MODEL, 1) / pair.old.path
        base.write_bytes(b"x" + base.read_bytes()[1:])
        pair.publisher.roll(2)
        await agent.check()
        await settled(agent, stable=2)
    require_installed(config, pair.new, 2)


def hostile_indexes(new: File, way: Any) -> dict[str, bytes]:
    make = lambda **fields: DeltaIndex(  # noqa: E731 (one word for a table)
        **{"result": new.sha256, "size_bytes": new.size_bytes, "ways": (way,)} | fields
    ).encode()
    plain = make()
    return {
        "too long": plain + b" " * INDEX_SIZE_BYTES_MAX,
        "no JSON": b"<html>404</html>",
        "another result": make(result="0" * 64),
        "another size": make(size_bytes=new.size_bytes + 1),
        "unknown codec": plain.replace(way.codec.encode(), b"rm -rf"),
        "too many ways": make(ways=(way,) * (WAYS_MAX + 1)),
        "a path as digest": plain.replace(way.base.encode(), b"../" * 21 + b"a"),
        "a size that is none": make(ways=(msgspec.structs.replace(way, size_bytes=1, chunks=way.chunks),)).replace(
            b'"chunks":[', b'"chunks":["' + b"0" * 64 + b'",'
        ),
        "larger than the file": make(ways=(msgspec.structs.replace(way, size_bytes=2**40, chunks=("0" * 64,) * 3),)),
        "nothing": b"",
    }


def test_a_hostile_index_names_no_way(pair: Pair) -> None:
    way = publish_delta(pair.publisher, pair.old, pair.new)
    store = Store(pair.publisher.folder / "store")
    staged = store.stage_folder(MODEL, 1)
    for path in (pair.publisher.folder / "bundle-1").iterdir():
        (staged / path.name).write_bytes(path.read_bytes())
    store.commit(MODEL, 1, staged)
    source = FolderSource(pair.publisher.repository.folder)
    new = store.manifest(MODEL, 1)

    def find() -> Any:
        mirrors, bases = Mirrors([source], SharedHealth(1)), Bases(store, MODEL)
        return find_way(
            new,
            pair.new,
            bases,
            missing_bytes=pair.new.size_bytes,
            ask=lambda sha256: read_index(mirrors, sha256, timeout_s=1.0),
            measure=lambda _: None,
        )

    assert find().way == way
    for name, data in hostile_indexes(pair.new, way).items():
        write_index_bytes(pair.publisher, pair.new, data)
        try:
            found = find()
        except MeshError:
            found = None
        assert found is None, name


@pytest.mark.parametrize("index", [b" " * (INDEX_SIZE_BYTES_MAX + 1)])
async def test_a_hostile_index_costs_nothing_but_the_full_file(
    tmp_path: Path, pair: Pair, origin: Origin, index: bytes
) -> None:
    write_index_bytes(pair.publisher, pair.new, index)
    config = make_config(tmp_path, pair.publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        pair.publisher.roll(2)
        await agent.check()
        await settled(agent, stable=2)
    require_installed(config, pair.new, 2)


async def test_a_cut_payload_is_resumed(tmp_path: Path, pair: Pair, origin: Origin) -> None:
    new = push_weights(pair.publisher, 3, weights(seed=50) + weights(seed=60, changed=0.3))
    way = publish_delta(pair.publisher, None, new, codec="zstd")
    assert way.size_bytes > 2 * CHUNK_SIZE_BYTES
    cut_at = CHUNK_SIZE_BYTES + 1000

    def cut(handler: Any, path: str, data: bytes) -> bool:
        if way.name not in path or handler.headers.get("Range"):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:cut_at])
        handler.close_connection = True
        return True

    config = make_config(tmp_path, pair.publisher, origin)
    async with running(config) as agent:
        await settled(agent, stable=1)
        origin.fault = cut
        origin.served.clear()
        pair.publisher.roll(3)
        await agent.check()
        await settled(agent, stable=3)
    require_installed(config, new, 3)
    assert [one[1] for one in fetched(origin, way.name)] == [CHUNK_SIZE_BYTES], "the rest, from the first chunk on"


async def test_a_sealed_version_is_patched_in_memory(tmp_path: Path) -> None:
    """What the node stores is the sealed file that was signed; of the plain one the disk never sees a byte."""
    publisher, folder = Publisher(tmp_path / "home"), tmp_path / "keys"
    folder.mkdir()
    key = os.urandom(KEY_SIZE_BYTES)
    (folder / "acme.key").write_bytes(key)
    (folder / "acme.key").chmod(0o600)
    old, new = (push_sealed(publisher, 1, weights(), key), push_sealed(publisher, 2, weights(changed=0.02), key))
    way = publish_sealed_delta(publisher, old, new, key)
    publisher.roll(1)
    with serving(publisher) as origin:
        config = make_config(tmp_path, publisher, origin, tenant_keys=str(folder))
        async with running(config) as agent:
            await settled(agent, stable=1)
            origin.served.clear()
            publisher.roll(2)
            await agent.check()
            await settled(agent, stable=2)
        assert [one[2] for one in fetched(origin, way.name)] == [way.size_bytes]
        assert fetched(origin, new.file("model.onnx").sha256) == fetched(origin, "/deltas/")
    require_installed(config, new.file("model.onnx"), 2)
    plain = weights(changed=0.02)[:64]
    for path in Path(config.store).rglob("*"):
        assert not path.is_file() or plain not in path.read_bytes(), path


async def test_without_the_tenants_key_nothing_is_lost(tmp_path: Path) -> None:
    publisher, key = Publisher(tmp_path / "home"), os.urandom(KEY_SIZE_BYTES)
    push_weights(publisher, 1, weights())
    push_sealed(publisher, 2, weights(changed=0.02), key)
    publisher.roll(1)
    with serving(publisher) as origin:
        config = make_config(tmp_path, publisher, origin)
        async with running(config) as agent:
            await settled(agent, stable=1)
            publisher.roll(2)
            await agent.check()
            await until(lambda: "tenant key" in status_of(agent).error, "the missing key is named")
            assert (status_of(agent).stable, status_of(agent).quarantined) == (1, ())
