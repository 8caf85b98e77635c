"""Real agents behind shaped links: `python -m benchmarks.fanout_live` in namespaces of its own; prints one JSON line.

`unshare` makes the namespaces and ends every process in them with this one, so nothing outlives a run. Each node has a
network namespace, joined by a bridge; a token bucket (`tc tbf`) shapes each direction of each link.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORIGIN_ADDRESS, PREFIX = "10.77.0.1", "10.77.0"
NODE_FIRST = 10
BURST_BYTES, QUEUE_MS = 32_768, 200
WAIT_S = 60.0
MODEL = "ballast"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveResult:
    """Seconds from the first agent's FETCH to each agent's end of it; what the origin sent meanwhile; the size."""

    fetched_s: tuple[float, ...]
    origin_bytes: int
    size_bytes: int


def namespaces() -> list[str]:
    """The command that gives a child namespaces of its own; as root, or as root of a user namespace."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def why_not() -> str:
    """What is missing here; "" = nothing."""
    if missing := [tool for tool in ("unshare", "ip", "tc", "mount") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not installed"
    probe = "mount -t tmpfs none /run && ip link add br0 type bridge && ip link set lo up && tc qdisc add dev lo root tbf rate 1mbit burst 32kb latency 50ms"  # noqa: E501
    done = subprocess.run([*namespaces(), "sh", "-c", probe], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"network namespaces cannot be made or shaped here: {done.stderr.strip()}"


def measure(nodes: int, size_bytes: int, node_mbit: float, origin_mbit: float) -> LiveResult:
    """Run it in a child with namespaces of its own.

    Raises:
        RuntimeError: with the child's last words if it fails.
    """
    command = [*namespaces(), sys.executable, "-m", "benchmarks.fanout_live"]
    arguments = [f"--nodes={nodes}", f"--size={size_bytes}", f"--node-mbit={node_mbit}", f"--origin-mbit={origin_mbit}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the live agents failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return LiveResult(**{**found, "fetched_s": tuple(found["fetched_s"])})


# In the namespaces.


def main() -> int:
    """Build the network, run the mesh, push a release, and time the agents by their logs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--size", type=int, default=5_000_000)
    parser.add_argument("--node-mbit", type=float, default=4.0)
    parser.add_argument("--origin-mbit", type=float, default=40.0)
    options = parser.parse_args()
    _run("mount", "-t", "tmpfs", "none", "/run")
    Path("/run/netns").mkdir()
    _run("ip", "link", "add", "br0", "type", "bridge")
    _run("ip", "address", "add", f"{PREFIX}.254/24", "dev", "br0")
    _run("ip", "link", "set", "br0", "up")
    _add_place("origin", ORIGIN_ADDRESS, options.origin_mbit)
    for index in range(options.nodes):
        _add_place(f"n{index}", f"{PREFIX}.{NODE_FIRST + index}", options.node_mbit)
    with tempfile.TemporaryDirectory(prefix="fanout-") as folder, contextlib.ExitStack() as stack:
        print(json.dumps(_measure(Path(folder), options.nodes, options.size, stack)))
    return 0


def _measure(folder: Path, nodes: int, size_bytes: int, stack: contextlib.ExitStack) -> dict[str, Any]:
    from model_sync.publisher.control_client import connect
    from model_sync.publisher.keys import init_keys
    from model_sync.publisher.push import push

    home = folder / "home"
    init_keys(home)
    sync = [sys.executable, "-m", "nearcast", "sync", "--home", str(home / "sync"), "--set=telemetry.level=error"]
    url = json.loads(stack.enter_context(_running("origin", [*sync, f"--set=address={ORIGIN_ADDRESS}:9443"], folder)))[
        "control"
    ]
    push(_bundle(folder, 1, 1_000), connect(home), home / "operator", channel="stable", delta_budget_s=0)
    second = _bundle(folder, 2, size_bytes)
    names = [f"edge-{index}" for index in range(nodes)]
    for index, name in enumerate(names):
        _join(folder / name, home, name)
        _start_agent(folder / name, index, name, url, stack)
    _wait_for(folder, names, release=1)
    for index, name in enumerate(names):
        _announce(folder / name, url, f"{PREFIX}.{NODE_FIRST + index}")
    before = _sent_bytes("origin")
    push(second, connect(home), home / "operator", channel="stable", delta_budget_s=0)
    _wait_for(folder, names, release=2)
    spans = [_fetch_span(folder / name / "agent.log") for name in names]
    began = min(start for start, _ in spans)
    return {
        "fetched_s": sorted(round(end - began, 3) for _, end in spans),
        "origin_bytes": _sent_bytes("origin") - before,
        "size_bytes": sum(path.stat().st_size for path in second.iterdir()),
    }


def _bundle(folder: Path, release: int, size_bytes: int) -> Path:
    """A real model, most of it bytes that cannot be compressed."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from model_sync.publisher.bundle import BundleSpec, create_bundle
    from nearcast.store.manifest import Tensor

    source = folder / f"source-{release}"
    source.mkdir()
    weights = np.random.default_rng(release).integers(-128, 128, size_bytes, dtype=np.int8)
    nodes = [
        helper.make_node("Gather", ["w", "zero"], ["one"]),
        helper.make_node("Cast", ["one"], ["bias"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "bias"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    constants = [numpy_helper.from_array(weights, "w"), helper.make_tensor("zero", TensorProto.INT64, [], [0])]
    graph = helper.make_graph(nodes, MODEL, value[:1], value[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (source / "model.onnx").write_bytes(model.SerializeToString())
    np.savez(source / "one.npz", in_x=np.array([[1, 2]], np.float32))
    tensors = [(Tensor(name=name, datatype="FP32", shape=(-1, 2), batch_axis=0),) for name in ("x", "y")]
    spec = BundleSpec(
        name=MODEL,
        release=release,
        semver=f"{release}.0.0",
        engine="onnxruntime",
        model_file="model.onnx",
        licence="Apache-2.0",
        golden=("one.npz",),
        inputs=tensors[0],
        outputs=tensors[1],
    )
    create_bundle(spec, source, folder / f"bundle-{release}")
    return folder / f"bundle-{release}"


def _join(folder: Path, home: Path, name: str) -> None:
    from model_sync.publisher.control_client import connect
    from nearcast.identity import join, read_token

    folder.mkdir()
    with connect(home) as client:
        token = client.call("POST", "/v1/invites", {"name": name, "role": "edge", "ttl_s": 600.0})["token"]
    join(read_token(str(token)), folder / "identity")


def _start_agent(folder: Path, index: int, name: str, url: str, stack: contextlib.ExitStack) -> None:
    settings = {
        "node": name,
        "control": url,
        "identity": str(folder / "identity"),
        "store": str(folder / "store"),
        "peer_listen": f"{PREFIX}.{NODE_FIRST + index}:0",
        "poll_s": 600.0,
        "probation_s": 0.5,
    }
    (folder / "agent.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    command = [sys.executable, "-m", "model_sync.agent", "--config", str(folder / "agent.toml")]
    stack.enter_context(_running(f"n{index}", command, folder))


def _announce(folder: Path, url: str, address: str) -> None:
    """In the node's name: what its node process would say."""
    from model_sync.agent.status import read_status
    from model_sync.publisher.control_client import ControlClient

    status = read_status(folder / "store")
    assert status is not None
    assert status.peer.startswith(address)
    with ControlClient(url, folder / "identity") as client:
        client.call("POST", "/v1/nodes/self", {"addresses": {"peer": status.peer}})


def _wait_for(folder: Path, names: list[str], release: int) -> None:
    from model_sync.agent.status import read_status

    deadline = time.monotonic() + WAIT_S
    waiting = set(names)
    while waiting:
        for name in list(waiting):
            status = read_status(folder / name / "store")
            model = status.models.get(MODEL) if status is not None else None
            if model is not None and model.stable == release and model.state == "IDLE":
                waiting.discard(name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{', '.join(sorted(waiting))} did not reach release {release} in {WAIT_S:g} s")
        time.sleep(0.1)


def _fetch_span(log: Path) -> tuple[float, float]:
    """When the last FETCH of an agent began and ended, by its own log."""
    began = ended = 0.0
    for line in log.read_text().splitlines():
        if not line.startswith("{"):
            continue
        entry = json.loads(line)
        if entry.get("event") != "replica_state":
            continue
        at = dt.datetime.fromisoformat(entry["timestamp"]).timestamp()
        if entry["state"] == "FETCH":
            began = at
        elif entry["was"] == "FETCH":
            ended = at
    return began, ended


@contextlib.contextmanager
def _running(place: str, command: list[str], folder: Path) -> Iterator[str]:
    """A process in the namespace of `place` until the block ends; yields its first line of output."""
    log = folder / ("agent.log" if "model_sync.agent" in command else "sync.log")
    with log.open("w") as errors:
        child = subprocess.Popen(
            ["ip", "netns", "exec", place, *command], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} did not start: {log.read_text()[-800:]}")
        yield line
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _add_place(name: str, address: str, mbit: float) -> None:
    """A network namespace on the bridge, its link shaped in both directions."""
    outer = f"v-{name}"
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "set", outer, "master", "br0", "up")
    inside = ("ip", "netns", "exec", name)
    _run(*inside, "ip", "link", "set", "lo", "up")
    _run(*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    _run(*inside, "ip", "link", "set", "eth0", "up")
    shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms")
    _run(*inside, "tc", "qdisc", "add", "dev", "eth0", *shape)
    _run("tc", "qdisc", "add", "dev", outer, *shape)


def _sent_bytes(place: str) -> int:
    """What left a place so far, by the counter of the bridge's end of its link."""
    done = subprocess.run(["ip", "-s", "-j", "link", "show", f"v-{place}"], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)[0]["stats64"]["rx"]["bytes"])


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main())
