"""Deltas in a test's repository: payloads by the real codecs, indexes that tell the truth or lie."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx

from model_sync.delta import chunks, full
from model_sync.delta.index import INDEX_FILE, Codec, DeltaIndex, Way
from model_sync.delta.sealed import seal_delta
from model_sync.delta.search import ENCODERS, describe_way
from model_sync.publisher.bundle import describe_file
from model_sync.repository.layout import blob_path, delta_path
from nearcast.store import Manifest
from nearcast.store.manifest import File
from nearcast.store.sealing import TenantKeys, derive_data_key, key_id, open_file, seal_file
from tests.integration.agent_parts import MODEL, Publisher
from tests.tiny_models import affine_model, write_version

WEIGHTS_BYTES = 600_000
_X = np.arange(8, dtype=np.float32).reshape(2, 4)
GOLDEN = (({"x": _X}, {"y": _X * np.float32(2.0)}),)


def weights(seed: int = 7, *, changed: float = 0.0) -> bytes:
    """Bytes like those of an int8 tensor; `changed` of them one step away."""
    values = np.random.default_rng(seed).normal(0.0, 16.0, WEIGHTS_BYTES).clip(-100, 100).astype(np.int8)
    places = np.random.default_rng(seed + 1).random(WEIGHTS_BYTES) < changed
    return (values + places.astype(np.int8)).astype(np.int8).tobytes()


def blob(publisher: Publisher, entry: File) -> bytes:
    return (publisher.repository.folder / blob_path(entry.sha256)).read_bytes()


def publish_delta(publisher: Publisher, old: File | None, new: File, *, codec: Codec = "residual-bz2") -> Way:
    """A real payload from `old`, or from nothing, to `new`, and an index that names it alone."""
    after = blob(publisher, new)
    if old is None:
        payload = full.encode(after) if codec == "zstd" else chunks.encode(after)
    else:
        payload = ENCODERS[codec](blob(publisher, old), after)
    way = describe_way(codec, old.sha256 if old is not None else None, payload)
    write_payload(publisher, new, way, payload)
    write_index(publisher, new, way)
    return way


def write_payload(publisher: Publisher, new: File, way: Way, payload: bytes) -> None:
    place = publisher.repository.folder / delta_path(new.sha256, way.name)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(payload)


def write_index(publisher: Publisher, new: File, *ways: Way) -> None:
    write_index_bytes(publisher, new, DeltaIndex(result=new.sha256, size_bytes=new.size_bytes, ways=ways).encode())


def write_index_bytes(publisher: Publisher, new: File, data: bytes) -> None:
    place = publisher.repository.folder / delta_path(new.sha256, INDEX_FILE)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)


def push_weights(publisher: Publisher, release: int, data: bytes) -> File:
    """A real model with `data` among its tensors; returns the entry of the model's file."""
    return publisher.push_model(release, model_with(data), golden=GOLDEN).file("model.onnx")


def put_model(publisher: Publisher, data: bytes) -> File:
    """The file of such a model among the blobs, without a release that names it."""
    draft = publisher.folder / "model.onnx"
    draft.write_bytes(model_with(data))
    entry = describe_file(draft)
    place = publisher.repository.folder / blob_path(entry.sha256)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft.rename(place)
    return entry


def model_with(data: bytes) -> bytes:
    """y = 2 x, and int8 tensors that nothing uses."""
    model = onnx.load_from_string(affine_model(2.0))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.frombuffer(data, np.int8), "w"))
    return model.SerializeToString()


def push_sealed(publisher: Publisher, release: int, data: bytes, key: bytes) -> Manifest:
    """The same, every file sealed for tenant `acme`."""
    folder = publisher.folder / f"sealed-{release}"
    plain = write_version(folder, model_with(data), name=MODEL, release=release, golden=GOLDEN)
    digests = [(entry.path, entry.sha256) for entry in plain.files]
    data_key = derive_data_key(key, "acme", plain, digests)
    identifier = key_id(key)
    encryption = TenantKeys({identifier: key}).wrap(data_key, "acme", identifier)
    manifest = msgspec.structs.replace(plain, encryption=encryption)
    files = []
    for index, entry in enumerate(plain.files):
        path = folder / entry.path
        path.write_bytes(seal_file(manifest, index, entry.path, path.read_bytes(), data_key))
        files.append(describe_file(path))
    return publisher.push_folder(folder, msgspec.structs.replace(manifest, files=tuple(files)))


def publish_sealed_delta(publisher: Publisher, old: Manifest, new: Manifest, key: bytes) -> Way:
    """A delta between the plain models of two sealed versions, itself sealed as the publisher does it."""
    keys = TenantKeys({key_id(key): key})
    before, after = old.file("model.onnx"), new.file("model.onnx")
    plain = [open_file(one, "model.onnx", blob(publisher, one.file("model.onnx")), keys) for one in (old, new)]
    payload = ENCODERS["residual-bz2"](*plain)
    assert new.encryption is not None
    name = f"{before.sha256}.residual-bz2"
    sealed = seal_delta(payload, after.sha256, name, keys.unwrap(new.encryption))
    way = describe_way("residual-bz2", before.sha256, sealed)
    write_payload(publisher, after, way, sealed)
    write_index(publisher, after, way)
    return way
