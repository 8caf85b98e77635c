"""A sync process of its own, and releases to push to it."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tuf.ngclient import Updater, UpdaterConfig

from model_sync.publisher.bundle import BundleSpec, create_bundle
from model_sync.publisher.control_client import ControlClient, connect
from model_sync.publisher.keys import init_keys
from model_sync.publisher.push import ControlFetcher
from nearcast.errors import MeshError
from nearcast.identity import make_csr
from nearcast.store.manifest import Tensor

READY_S = 20.0
TENSORS = {
    "inputs": (Tensor(name="x", datatype="FP32", shape=(-1, 2), batch_axis=0),),
    "outputs": (Tensor(name="y", datatype="FP32", shape=(-1, 2), batch_axis=0),),
}


class Sync:
    """A mesh's home and its sync process."""

    def __init__(self, home: Path) -> None:
        self.home = home
        init_keys(home)
        self.start()

    def start(self, *settings: str) -> None:
        command = [
            sys.executable,
            "-m",
            "nearcast",
            "sync",
            "--home",
            str(self.home / "sync"),
            "--set=telemetry.level=error",
        ]
        self.process = subprocess.Popen(
            [*command, *(f"--set={setting}" for setting in settings)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], READY_S)[0], "the sync process did not get ready"
        ready = json.loads(self.process.stdout.readline())
        assert ready["ready"] == "sync"
        self.url = ready["control"]

    def stop(self, *, kill: bool = False) -> int:
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        code = self.process.wait(READY_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    @property
    def operator(self) -> Path:
        return self.home / "operator"

    def connect(self) -> ControlClient:
        return connect(self.home)

    def invite(self, name: str, role: str = "edge", ttl_s: float = 60.0) -> str:
        with self.connect() as client:
            return str(client.call("POST", "/v1/invites", {"name": name, "role": role, "ttl_s": ttl_s})["token"])


def make_bundle(folder: Path, release: int, *, name: str = "affine") -> Path:
    """A real model that adds its release number."""
    source = folder / f"source-{name}-{release}"
    source.mkdir()
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "b"], ["y"])],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.full(2, release, np.float32), "b")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source / "model.onnx"
    )
    np.savez(source / "one.npz", in_x=np.array([[1, 2]], np.float32))
    spec = BundleSpec(
        name=name, release=release, semver=f"{release}.0.0", engine="onnxruntime", model_file="model.onnx",
        licence="Apache-2.0", golden=("one.npz",), **TENSORS,
    )  # fmt: skip
    bundle = folder / f"bundle-{name}-{release}"
    create_bundle(spec, source, bundle)
    return bundle


def read(sync: Sync, cache: Path, *paths: str) -> list[bytes | None]:
    """What a node's TUF client finds over HTTPS, from the pinned root on."""
    for folder in (cache / "metadata", cache / "targets"):
        folder.mkdir(parents=True, exist_ok=True)
    with sync.connect() as client:
        updater = Updater(
            str(cache / "metadata"), f"{sync.url}/repository/metadata/", str(cache / "targets"),
            f"{sync.url}/repository/targets/", fetcher=ControlFetcher(client),
            config=UpdaterConfig(prefix_targets_with_hash=True), bootstrap=(sync.operator / "root.json").read_bytes(),
        )  # fmt: skip
        updater.refresh()
        found: list[bytes | None] = []
        for path in paths:
            target = updater.get_targetinfo(path)
            found.append(None if target is None else Path(updater.download_target(target)).read_bytes())
        return found


def refused(sync: Sync, method: str, path: str, body: object = None) -> MeshError:
    with sync.connect() as client, pytest.raises(MeshError) as caught:
        client.call(method, path, body)  # type: ignore[arg-type]
    return caught.value


def enrol(sync: Sync, secret: str, name: str = "any") -> MeshError | None:
    """Enrol without the checks that a joining node makes before it asks."""
    _, csr = make_csr(name, "edge")
    with sync.connect() as client:
        try:
            client.call("POST", "/v1/enrol", {"secret": secret, "csr": csr.decode()})
        except MeshError as error:
            return error
    return None
