"""How long until a first answer: of a new process, and of a model that is on disk only.

The model is Magika's of 3.2 MB, as its package carries it; one run of it takes about 8 ms. The node has it under two
names. Its processes find bytecode but for the first one, which starts as after `pip install --no-compile`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import magika
import numpy as np

from benchmarks.foreign import call
from benchmarks.rows import Row
from benchmarks.swap_latency import PATH, start_node
from model_sync.publisher.bundle import BundleSpec, create_bundle
from nearcast.handler import RequestContext
from nearcast.serving import HostLimits, ModelHost
from nearcast.store import Pointer, Store
from nearcast.store.manifest import Tensor
from nearcast.wire.request import TensorRequest

NAME, LENGTH = "magika", 2048


def run(*, quick: bool) -> list[Row]:
    """Medians over a few starts."""
    rounds = 3 if quick else 11
    message = make_request().encode()
    starts, answers, pages = [], [], []
    with tempfile.TemporaryDirectory() as folder, keep_bytecode(Path(folder) / "bytecode"):
        data = Path(folder) / "node"
        store = fill_store(Path(folder), data / "models")
        for _ in range(1 + rounds):
            began = time.perf_counter()
            with start_node(data) as node:
                starts.append((time.perf_counter() - began) * 1e3)
                call(node.grpc, PATH, message)
                answers.append((time.perf_counter() - began) * 1e3)
                began = time.perf_counter()
                urllib.request.urlopen(f"http://{node.http}/v2/health/ready").close()
                pages.append((time.perf_counter() - began) * 1e3)
        asyncio.run(measure_model(store, NAME))  # the engine's library is imported once a process
        cold = [asyncio.run(measure_model(store, NAME)) for _ in range(rounds)]
        demanded = [asyncio.run(measure_on_demand(store)) for _ in range(rounds)]
    return [
        Row("coldstart.process_to_ready_ms", statistics.median(starts[1:]), "ms", "`nearcast edge` to its ready line"),
        Row("coldstart.process_to_answer_ms", statistics.median(answers[1:]), "ms", "and one foreign client's answer"),
        Row("coldstart.first_process_to_ready_ms", starts[0], "ms", "it compiles every module that it imports"),
        Row("coldstart.http_to_answer_ms", statistics.median(pages[1:]), "ms", "first HTTP request of a ready node"),
        Row("coldstart.model_to_answer_ms", statistics.median(cold), "ms", "3.2 MB model on disk to first answer"),
        Row("coldstart.request_to_answer_ms", statistics.median(demanded), "ms", "a request brings the model in"),
    ]


@contextlib.contextmanager
def keep_bytecode(folder: Path) -> Iterator[None]:
    """Have processes write bytecode there, whatever this one was told."""
    wanted = {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def measure_model(store: Store, model: str) -> float:
    """Milliseconds from a host's first look at the store to its first answer."""
    host = ModelHost(store, node="bench")
    began = time.perf_counter()
    await host.refresh(model)
    await host.infer(make_request(model), RequestContext())
    took_ms = (time.perf_counter() - began) * 1e3
    await host.close()
    return took_ms


async def measure_on_demand(store: Store) -> float:
    """Milliseconds of a request for a model that is not in memory, in a host with room for one of two."""
    host = ModelHost(store, node="bench", limits=HostLimits(memory_bytes_max=10_000_000, memory_protect_s=0.0))
    await host.start()
    await host.infer(make_request(NAME), RequestContext())
    began = time.perf_counter()
    await host.infer(make_request(f"{NAME}-2"), RequestContext())
    took_ms = (time.perf_counter() - began) * 1e3
    await host.close()
    return took_ms


def make_request(model: str = NAME) -> TensorRequest:
    """One file's beginning and end."""
    return TensorRequest(model=model, inputs={"bytes": np.zeros((1, LENGTH), np.int32)})


def fill_store(folder: Path, root: Path) -> Store:
    """A store with the model under two names, both stable."""
    store = Store(root)
    path = next(Path(magika.__file__).parent.rglob("*.onnx"))
    for name in (NAME, f"{NAME}-2"):
        source = folder / f"{name}-source"
        source.mkdir()
        (source / "model.onnx").write_bytes(path.read_bytes())
        np.savez(source / "golden.npz", in_bytes=np.zeros((1, LENGTH), np.int32))
        spec = BundleSpec(
            name=name,
            release=1,
            semver="1.0.0",
            engine="onnxruntime",
            model_file="model.onnx",
            licence="Apache-2.0",
            golden=("golden.npz",),
            inputs=(Tensor(name="bytes", datatype="INT32", shape=(-1, LENGTH), batch_axis=0),),
            outputs=(Tensor(name="target_label", datatype="FP32", shape=(-1, -1), batch_axis=0),),
        )
        create_bundle(spec, source, folder / f"{name}-bundle")
        store.commit(name, 1, folder / f"{name}-bundle")
        store.write_pointer(name, Pointer(stable=1))
    return store
