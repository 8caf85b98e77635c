"""What look-aside costs: the SDK with a lease from a real router process, beside the same SDK told the node's address,
and beside a bare channel to the node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lease_load import SIZES
from benchmarks.processes import LOAD_CPU, serve
from benchmarks.router import make_config, make_identities, wait_until_routed
from benchmarks.router_node import MODEL, NODE
from benchmarks.rows import Row
from nearcast.wire.request import TensorRequest

_PLACES = "node and router on one core, the client on another"
TIMEOUT_S = 300


def run(*, quick: bool) -> list[Row]:
    """Direct, by lease, bare and through the router in turn, round by round; ratios are medians over the rounds."""
    tensor = (np.arange(SIZES["600B"]) % 251).astype(np.uint8)
    message = TensorRequest(model=MODEL, inputs={"x": tensor}).encode()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_identities(folder)
        with serve("benchmarks.router_node", str(folder / NODE)) as node:
            config = folder / "router.toml"
            config.write_text(make_config(folder, node["mesh"]))
            with serve("router", "--config", str(config)) as router:
                wait_until_routed(router["grpc"], message, tensor)
                seen = _load(node["grpc"], router["grpc"], quick=quick)
    rows = []
    for size in SIZES:
        found = seen[size]
        rows += [
            _ratio(f"lease.{size}_rps_vs_direct", found["rps_ratios"], f"many at a time; {_PLACES}"),
            _ratio(
                f"lease.{size}_p50_vs_direct", found["p50_ratios"], "one at a time; direct over lease, more is better"
            ),
            *(Row(f"lease.{size}_{way}_rps", value, "1/s") for way, value in found["rps"].items()),
            *(Row(f"lease.{size}_{way}_p50_us", value, "us") for way, value in found["p50_us"].items()),
        ]
    small = seen["600B"]
    added_p50_us = small["p50_us"]["lease"] - small["p50_us"]["bare"]
    over = "of the SDK by lease, over a bare channel's; 600 B, one at a time"
    return [
        *rows,
        Row("lease.sdk_added_cpu_us", small["added_cpu_us"], "us", f"processor time per call, best round {over}"),
        Row("lease.sdk_added_p50_us", added_p50_us, "us", f"median latency {over}"),
        Row("lease.passed_on", seen["passed_on"], "", "requests that went through the router in spite of a lease"),
    ]


def _ratio(name: str, ratios: list[float], note: str) -> Row:
    ordered = sorted(ratios)
    spread = f"{ordered[0]:.2f} to {ordered[-1]:.2f} in {len(ordered)} rounds"
    return Row(name, float(np.median(ordered)), "x", f"{spread}; {note}")


def _load(node: str, router: str, *, quick: bool) -> dict[str, Any]:
    command = ["taskset", "-c", str(LOAD_CPU)] if hasattr(os, "sched_setaffinity") else []
    command += [sys.executable, "-m", "benchmarks.lease_load", node, router, "quick" if quick else "full"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"the load ended with {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))
