"""Deltas of a push against a real sync process: what is uploaded leads a node from the old files to the new."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from model_sync.delta.index import DeltaIndex, decode_index
from model_sync.delta.sealed import apply_sealed_way
from model_sync.delta.search import ENCODERS, describe_way
from model_sync.delta.ways import apply_way, choose_way
from model_sync.publisher.bundle import BundleSpec, Seal, create_bundle, read_bundle
from model_sync.publisher.control_client import ControlClient, connect
from model_sync.publisher.keys import init_keys
from model_sync.publisher.push import push
from model_sync.repository.layout import blob_path, delta_path
from nearcast.cli.bundle_diff import diff as bundle_diff
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import File, Manifest, Tensor
from nearcast.store.sealing import TenantKeys, make_key, open_file, read_key

WIDTH = 128
TENSORS = {
    "inputs": (Tensor(name="x", datatype="FP32", shape=(-1, WIDTH), batch_axis=0),),
    "outputs": (Tensor(name="y", datatype="FP32", shape=(-1, WIDTH), batch_axis=0),),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("delta-mesh")
    init_keys(folder)
    command = [sys.executable, "-m", "nearcast", "sync", "--home", str(folder / "sync"), "--set=telemetry.level=error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 20.0)[0]
        assert json.loads(process.stdout.readline())["ready"] == "sync"
        yield folder
        process.terminate()
        assert process.wait(20.0) == 0


def make_bundle(
    folder: Path, release: int, weights: np.ndarray, *, name: str = "dense", seal: Seal | None = None
) -> Path:
    source = folder / f"source-{release}"
    source.mkdir()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])],
        [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, source / "model.onnx")
    spec = BundleSpec(
        name=name, release=release, semver=f"{release}.0.0", engine="onnxruntime", model_file="model.onnx",
        licence="Apache-2.0", **TENSORS,
    )  # fmt: skip
    create_bundle(spec, source, folder / f"bundle-{release}", seal=seal)
    return folder / f"bundle-{release}"


def model_entry(bundle: Path) -> tuple[Manifest, File]:
    manifest = read_bundle(bundle)[0]
    return manifest, manifest.file(manifest.model_file)


def get(client: ControlClient, path: str) -> bytes:
    status, data = client.get_bytes(f"/repository/{path}")
    assert status == 200
    return data


def test_a_second_release_comes_with_the_ways_to_it(home: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    first = rng.normal(0, 0.1, (WIDTH, WIDTH)).astype(np.float32)
    second = first.copy()
    second[rng.random(first.shape) < 0.05] += np.float32(1e-4)
    bundles = [make_bundle(tmp_path, 1, first), make_bundle(tmp_path, 2, second)]
    with connect(home) as client:
        pushed = [push(bundle, client, home / "operator", channel="main") for bundle in bundles]
        assert {way.base_release for way in pushed[0].deltas} == {None}
        (from_first,) = (way for way in pushed[1].deltas if way.base_release == 1)
        assert from_first.size_bytes < 0.2 * from_first.file_size_bytes

        _, old = model_entry(bundles[0])
        _, new = model_entry(bundles[1])
        index = decode_index(get(client, delta_path(new.sha256, "index.json")))
        way = choose_way(index, {old.sha256}, sha256=new.sha256, size_bytes=new.size_bytes)
        assert way is not None
        assert (way.base, way.size_bytes) == (old.sha256, from_first.size_bytes)
        payload = get(client, delta_path(new.sha256, way.name))
        base = get(client, blob_path(old.sha256))
        made = apply_way(way, payload, base, size_bytes=new.size_bytes, sha256=new.sha256)
        assert made == (bundles[1] / "model.onnx").read_bytes()

        fresh = choose_way(index, (), sha256=new.sha256, size_bytes=new.size_bytes)
        assert fresh is not None
        assert fresh.codec == "zstd"
        stranger = choose_way(index, {"0" * 64}, sha256=new.sha256, size_bytes=new.size_bytes)
        assert stranger is not None
        assert stranger.codec == "chunks"


def test_deltas_of_sealed_releases_are_sealed_and_lead_to_the_sealed_file(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    make_key(folder / "acme.key")
    keys, seal = TenantKeys.load(folder), Seal(tenant="acme", key=read_key(folder / "acme.key"))
    rng = np.random.default_rng(11)
    first = rng.normal(0, 0.1, (WIDTH, WIDTH)).astype(np.float32)
    second = first.copy()
    second[rng.random(first.shape) < 0.05] += np.float32(1e-4)
    bundles = [
        make_bundle(tmp_path, release, weights, name="sealed", seal=seal)
        for release, weights in ((1, first), (2, second))
    ]
    with connect(home) as client:
        pushed = [push(bundle, client, home / "operator", channel="main", tenant_keys=folder) for bundle in bundles]
        assert {way.codec for way in pushed[0].deltas} == {"zstd"}  # ranges of sealed bytes would help nobody
        earlier, old = model_entry(bundles[0])
        manifest, new = model_entry(bundles[1])
        assert earlier.encryption is not None
        assert manifest.encryption is not None
        index = decode_index(get(client, delta_path(new.sha256, "index.json")))
        way = choose_way(index, {old.sha256}, sha256=new.sha256, size_bytes=new.size_bytes)
        assert way is not None
        assert way.base == old.sha256
        assert way.size_bytes < 0.2 * new.size_bytes
        payload = get(client, delta_path(new.sha256, way.name))
        plain = open_file(earlier, old.path, get(client, blob_path(old.sha256)), keys)
        made = apply_sealed_way(
            way, payload, plain, manifest=manifest, path=new.path, data_key=keys.unwrap(manifest.encryption)
        )
        assert made == (bundles[1] / "model.onnx").read_bytes()


def test_bundle_diff_shows_every_codec_and_marks_one_best(tmp_path: Path) -> None:
    first = np.random.default_rng(12).normal(0, 0.1, (WIDTH, WIDTH)).astype(np.float32)
    second = first.copy()
    second[0] += np.float32(1e-4)
    old, new = make_bundle(tmp_path, 1, first), make_bundle(tmp_path, 2, second)
    run = CliRunner().invoke(bundle_diff, [str(old), str(new), "--json"], catch_exceptions=False)
    rows = [row for row in json.loads(run.output) if row["file"] == "model.onnx"]
    assert {row["codec"] for row in rows} == {"zstd", *ENCODERS}
    (best,) = (row for row in rows if row["best"])
    assert best["size_bytes"] == min(row["size_bytes"] for row in rows)
    assert best["percent"] < 3
    table = CliRunner().invoke(bundle_diff, [str(old), str(old)], catch_exceptions=False).output
    assert "unchanged" in table
    assert table.splitlines()[0].split()[:3] == ["file", "codec", "bytes"]


def test_the_controller_takes_only_deltas_that_make_sense(home: Path, tmp_path: Path) -> None:
    weights = np.random.default_rng(8).normal(0, 0.1, (WIDTH, WIDTH)).astype(np.float32)
    bundle = make_bundle(tmp_path, 1, weights, name="other")
    _, entry = model_entry(bundle)
    way = describe_way("zstd", None, b"payload")
    index = DeltaIndex(result=entry.sha256, size_bytes=entry.size_bytes, ways=(way,))
    with connect(home) as client:
        refused = [
            (f"{entry.sha256}/{way.name}", b"payload", Code.INVALID_REQUEST),  # its blob is not here yet
        ]
        _expect(client, refused)
        client.put_file(f"/v1/blobs/{entry.sha256}", bundle / "model.onnx", lambda _: None)
        _expect(
            client,
            [
                (f"{entry.sha256}/full.exe", b"payload", Code.INVALID_REQUEST),
                (f"{entry.sha256}/..%2Findex.json", b"payload", Code.INVALID_REQUEST),
                (f"{entry.sha256}/{way.name}", bytes(entry.size_bytes + 1), Code.TOO_LARGE),
                (f"{entry.sha256}/index.json", b"{}", Code.UNTRUSTED),
                (f"{entry.sha256}/index.json", index.encode(), Code.UNTRUSTED),  # names a payload that is not here
                (f"{'0' * 64}/index.json", index.encode(), Code.INVALID_REQUEST),
            ],
        )
        client.put_bytes(f"/v1/deltas/{entry.sha256}/{way.name}", b"payload", lambda _: None)
        client.put_bytes(f"/v1/deltas/{entry.sha256}/index.json", index.encode(), lambda _: None)
        assert get(client, delta_path(entry.sha256, "index.json")) == index.encode()
        _expect(client, [(f"{entry.sha256}/{way.name}", b"another", Code.CONFLICT)])


def test_a_search_without_time_leaves_the_deltas_out_and_publishes(home: Path, tmp_path: Path) -> None:
    weights = np.random.default_rng(9).normal(0, 0.1, (WIDTH, WIDTH)).astype(np.float32)
    bundle = make_bundle(tmp_path, 1, weights, name="hurried")
    with connect(home) as client:
        pushed = push(bundle, client, home / "operator", channel="main", delta_budget_s=1e-6)
    assert pushed.is_published
    assert pushed.deltas == ()


def _expect(client: ControlClient, uploads: list[tuple[str, bytes, Code]]) -> None:
    for path, data, code in uploads:
        with pytest.raises(MeshError) as caught:
            client.put_bytes(f"/v1/deltas/{path}", data, lambda _: None)
        assert caught.value.code is code, (path, caught.value)
        with contextlib.suppress(MeshError):
            client.get_bytes("/v1/ca")  # a refused body may cost the connection
