"""I15 on a real mesh: a sealed model is pushed, installed, updated and served, and its weights are on no disk."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model_sync.agent.status import ModelStatus, read_status
from nearcast.cli.processes import Mesh, MeshConfig
from nearcast.store.sealing import key_id
from tests.e2e.fleet import ask_http, nearcast

WAIT_S = 60.0
WIDTH = 64
WINDOW_BYTES = 64
SPEC = """
name = "secret"
release = {release}
semver = "{release}.0.0"
engine = "onnxruntime"
model_file = "model.onnx"
licence = "Apache-2.0"
golden = ["golden.npz"]

[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 64]

[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 64]
"""


def weights(release: int) -> np.ndarray[Any, Any]:
    """Of release 1, and from then on the same with a few changes: a delta pays."""
    made = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    made[: 4 * (release - 1)] += 1
    return made


def write_source(folder: Path, release: int) -> None:
    folder.mkdir(parents=True)
    specs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", specs[:1], specs[1:], [numpy_helper.from_array(weights(release), "w")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    np.savez(folder / "golden.npz", in_x=np.random.default_rng(2).standard_normal((4, WIDTH)).astype(np.float32))
    (folder / "spec.toml").write_text(SPEC.format(release=release))


def leaks(root: Path, plain: bytes) -> Iterator[Path]:
    """Files that hold 64 bytes of `plain` in a row, wherever they begin: those hold a whole aligned half of that."""
    half = WINDOW_BYTES // 2
    blocks = {plain[at : at + half] for at in range(0, len(plain) - half + 1, half)}
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if not blocks.isdisjoint(data[at : at + half] for at in range(len(data) - half + 1)):
                yield path


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    plain = weights(1).tobytes()
    (tmp_path / "hidden").write_bytes(b"x" * 1001 + plain[4567 : 4567 + WINDOW_BYTES] + b"y" * 77)
    assert list(leaks(tmp_path, plain)) == [tmp_path / "hidden"]


@pytest.mark.timeout(300)
async def test_i15_no_plain_weights_on_any_disk(tmp_path: Path) -> None:
    keys, publisher, folder = tmp_path / "node keys", tmp_path / "publisher", tmp_path / "mesh"
    keys.mkdir()
    publisher.mkdir()
    config = MeshConfig(
        edges=1, cloud=0, router=0, broker=False, first_ports=False,
        edge_settings=("agent.probation_s=0.2", f"tenant_keys={keys}", "agent.poll_s=1.0"),
    )  # fmt: skip
    mesh = await Mesh.start(folder, config=config)
    try:
        await asyncio.to_thread(run_story, mesh, keys, publisher)
    finally:
        await mesh.stop()


def run_story(mesh: Mesh, keys: Path, publisher: Path) -> None:
    home = mesh.operator_home
    base = f"http://{mesh.addresses['edge-1']['http']}/v2/models/secret"
    x = np.random.default_rng(3).standard_normal((1, WIDTH)).astype(np.float32)
    body = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": x.ravel().tolist()}]}
    ).encode()

    def served() -> str:
        said = ask_http(f"{base}/infer", body)
        if said.status != 200:
            return ""
        release = said.headers["nc-model-version"]
        np.testing.assert_allclose(said.body["outputs"][0]["data"], (x @ weights(int(release)))[0], atol=1e-3)
        return release

    nothing = ModelStatus(state="none")

    def status() -> ModelStatus:
        found = read_status(mesh.data_dir / "edge-1" / "models")
        return found.models.get("secret", nothing) if found else nothing

    def until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not in time; {status()}; logs: {mesh.logs}"
            time.sleep(0.05)

    def command(*arguments: str, code: int = 0) -> Any:
        done = nearcast(*arguments, home=home, timeout_s=60.0)
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        return done

    for release in (1, 2, 3, 4):
        write_source(publisher / f"source-{release}", release)
    tenant = publisher / "keys" / "acme.key"
    tenant.parent.mkdir()
    command("bundle", "key", str(tenant))
    for release in (1, 2, 3, 4):
        spec = ("--spec", str(publisher / f"source-{release}" / "spec.toml"), "--out", str(publisher / str(release)))
        command("bundle", "create", *spec, *(("--seal-with", str(tenant), "--tenant", "acme") if release > 1 else ()))

    def push(release: int, *more: str, code: int = 0) -> Any:
        done = command(
            "push", str(publisher / str(release)), "--tenant-keys", str(tenant.parent), "--json", *more, code=code
        )
        return json.loads(done.stdout)

    push(1)
    until(lambda: served() == "1", "the plain release")
    refused = command("push", str(publisher / "2"), code=77)
    assert "is not on this node; put its file into the folder of tenant keys" in refused.stderr
    missing = f"The tenant key {key_id(tenant.read_bytes())} is not on this node"
    late = push(2, "--wait", "1", code=75)
    assert (late["release"], late["outcome"]["result"]) == (2, "waiting")
    until(lambda: status().goal == 2 and missing in status().error, "the node says what is missing")
    assert served() == "1"
    (keys / "wrong.key").touch(0o600)
    (keys / "wrong.key").write_bytes(b"w" * 32)
    push(3)
    until(lambda: status().goal == 3 and missing in status().error, "a wrong key is no key")
    assert served() == "1"

    shutil.copy(tenant, keys / "acme.key")
    until(lambda: served() == "3", "the sealed release, once its key is there")
    assert any(way["base_release"] == 3 for way in push(4)["deltas"]), "a sealed file has deltas too"
    until(lambda: served() == "4", "the next sealed release")

    plain = weights(4)[:12].tobytes()  # what release 1, which is plain, has not
    assert list(leaks(mesh.data_dir, plain)) == []
    began = tenant.stat().st_mtime
    fresh = [path for path in Path("/tmp").glob("*") if path.is_file() and path.stat().st_mtime >= began]
    assert not [path for path in fresh if plain[:WINDOW_BYTES] in path.read_bytes()]
    assert list(leaks(publisher / "source-4", plain)), "the search would have found them"
