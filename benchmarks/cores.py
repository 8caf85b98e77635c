"""Two cores for one model: threads inside one process that share its weights, and what a router in front would cost.

`python -m benchmarks.cores ROOT SLOTS` is the server: one process, one copy of the model, SLOTS runs at a time.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.foreign import call
from benchmarks.processes import cpu_s, has_h2load, load_h2, serve
from benchmarks.router import make_config, make_identities, wait_until_routed
from benchmarks.router_node import MODEL, NODE
from benchmarks.rows import Row
from model_sync.publisher.bundle import BundleSpec, create_bundle
from nearcast.handler import Served
from nearcast.runtime import announce
from nearcast.serving import HostLimits, ModelHost
from nearcast.store import Store
from nearcast.store.manifest import Tensor
from nearcast.store.pointer import Pointer
from nearcast.transport.grpc import make_server
from nearcast.transport.oip import MODEL_INFER, oip_methods
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import WireResponse

MAGIKA = "magika"


def run(*, quick: bool) -> list[Row]:
    """Magika at 8 in flight with one run at a time and with two; an echo with and without a router in front."""
    if not has_h2load():
        return [Row("cores.skipped_no_h2load", 1, "", "install nghttp2-client to measure")]
    rounds, requests = (2, 300) if quick else (5, 2_000)
    with tempfile.TemporaryDirectory() as folder:
        return measure_slots(Path(folder), rounds, requests) + measure_router(Path(folder), requests * 10)


def measure_slots(folder: Path, rounds: int, requests: int) -> list[Row]:
    """The load tool takes a hundredth of a core here, so that the server has two."""
    store = fill_store(folder)
    message = TensorRequest(model=MAGIKA, inputs=make_inputs()).encode()
    rates: dict[int, list[float]] = {1: [], 2: []}
    memory_mb = {1: 0.0, 2: 0.0}
    answers = set()
    for _ in range(rounds):
        for slots, seen in rates.items():
            with serve("benchmarks.cores", str(store), str(slots), cpu=None) as ready:
                labels = WireResponse(call(ready["address"], MODEL_INFER, message), Served()).decode()["target_label"]
                answers.add(labels.tobytes())
                load = load_h2(ready["address"], MODEL_INFER, message, requests=requests, connections=2, streams=4)
                memory_mb[slots] = rss_mb(ready["pid"])
            if load.failed:
                raise RuntimeError(f"{load.failed} requests failed")
            seen.append(load.requests_per_s)
    if len(answers) != 1:
        raise RuntimeError("the number of slots changes the answer")
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
    rows = [Row("cores.magika_slots2_over_slots1", ratio, "x", "one process, one session, 8 in flight")]
    for slots, seen in rates.items():
        rows.append(Row(f"cores.magika_slots{slots}_rps", statistics.median(seen), "1/s"))
        rows.append(Row(f"cores.magika_slots{slots}_rss_mb", memory_mb[slots], "MB"))
    return rows


def measure_router(folder: Path, requests: int) -> list[Row]:
    """Processor time per request of a node asked directly, of one behind a router, and of the router."""
    make_identities(folder)
    tensor = (np.arange(600) % 251).astype(np.uint8)
    message = TensorRequest(model=MODEL, inputs={"x": tensor}).encode()
    with serve("benchmarks.router_node", str(folder / NODE)) as node:
        config = folder / "router.toml"
        config.write_text(make_config(folder, node["mesh"]))
        with serve("router", "--config", str(config)) as router:
            wait_until_routed(router["grpc"], message, tensor)
            load_h2(node["grpc"], MODEL_INFER, message, requests=1000, connections=4, streams=16)
            costs = []
            for address in (node["grpc"], router["grpc"]):
                before = [cpu_s(node["pid"]), cpu_s(router["pid"])]
                load_h2(address, MODEL_INFER, message, requests=requests, connections=4, streams=16)
                after = [cpu_s(node["pid"]), cpu_s(router["pid"])]
                costs.append([(now - then) / requests * 1e6 for then, now in zip(before, after, strict=True)])
    return [
        Row("cores.direct_node_cpu_us", costs[0][0], "us", "CPU per request of a node asked directly, 600 B"),
        Row("cores.routed_node_cpu_us", costs[1][0], "us", "the same behind a stand-alone router"),
        Row("cores.router_cpu_us", costs[1][1], "us", "and of that router: what the second core would do"),
    ]


def make_inputs() -> dict[str, np.ndarray]:
    """One request's tensors."""
    return {"bytes": np.random.default_rng(1).integers(0, 257, (1, 2048), dtype=np.int32)}


def fill_store(folder: Path) -> Path:
    """A store with Magika, from its package."""
    found = importlib.util.find_spec("magika")
    if found is None or found.origin is None:
        raise FileNotFoundError("the package magika is not installed")
    source = folder / "source"
    source.mkdir()
    model = Path(found.origin).parent / "models" / "standard_v3_3" / "model.onnx"
    (source / "model.onnx").write_bytes(model.read_bytes())
    np.savez(source / "golden.npz", **{f"in_{name}": tensor for name, tensor in make_inputs().items()})  # type: ignore[arg-type]
    spec = BundleSpec(
        name=MAGIKA,
        release=1,
        semver="1.0.0",
        engine="onnxruntime",
        model_file="model.onnx",
        licence="Apache-2.0",
        golden=("golden.npz",),
        inputs=(Tensor(name="bytes", datatype="INT32", shape=(-1, 2048), batch_axis=0),),
        outputs=(Tensor(name="target_label", datatype="FP32", shape=(-1, 214), batch_axis=0),),
    )
    create_bundle(spec, source, folder / "bundle")
    store = Store(folder / "store")
    store.commit(MAGIKA, 1, folder / "bundle")
    store.write_pointer(MAGIKA, Pointer(stable=1, last_good=1))
    return folder / "store"


def rss_mb(pid: int) -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def main(root: Path, slots: int) -> None:
    # No batches: what is compared is two runs side by side, and batching Magika gains nothing.
    host = ModelHost(Store(root), node="bench", limits=HostLimits(slots=slots, batch_rows_max=1))
    await host.start()
    server = make_server(
        "ngh2", oip_methods(InferenceService(host, host, server_name="bench"), trusted=False), address="127.0.0.1:0"
    )
    await server.start()
    announce("cores", address=server.address)
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(Path(sys.argv[1]), int(sys.argv[2])))
