"""A model of Silero VAD's size over gRPC, as a share of the bare in-process loop on the same core."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.foreign import call
from benchmarks.processes import has_h2load, load_h2, serve
from benchmarks.rows import Row
from benchmarks.silero_size import NAME, fill_store, make_inputs
from nearcast.handler import Served
from nearcast.serving.engines import load_engine
from nearcast.store.contents import Contents
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import WireResponse

PATH = "/inference.GRPCInferenceService/ModelInfer"


def run(*, quick: bool) -> list[Row]:
    """Loop, then server, in turn; the ratio of each pair."""
    if not has_h2load():
        return [Row("serving.skipped_no_h2load", 1, "", "install nghttp2-client to measure")]
    rounds, requests = (3, 5_000) if quick else (5, 30_000)
    message = TensorRequest(model=NAME, inputs=make_inputs()).encode()
    shares, rates, loops, singles = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store, manifest = fill_store(Path(folder))
        expected = load_engine(Contents(manifest, store.folder(NAME, 1)), threads=1).run(make_inputs())
        root = str(Path(folder) / "store")
        for _ in range(rounds):
            with serve("benchmarks.serving_server", root, "loop") as ready:
                loop_us = ready["loop_us"]
            with serve("benchmarks.serving_server", root, "serve") as ready:
                check(ready["address"], message, expected)
                load = load_h2(ready["address"], PATH, message, requests=requests, connections=4, streams=16)
                single = load_h2(ready["address"], PATH, message, requests=requests // 10, connections=1, streams=1)
            if load.failed or single.failed:
                raise RuntimeError(f"{load.failed + single.failed} requests failed")
            loops.append(loop_us)
            rates.append(load.requests_per_s)
            shares.append(load.requests_per_s * loop_us / 1e6)
            singles.append(single.mean_us)
    return [
        Row(
            "serving.silero_size_share_of_loop", statistics.median(shares), "x", "gRPC c4 m16 over the in-process loop"
        ),
        Row("serving.silero_size_rps", statistics.median(rates), "1/s"),
        Row("serving.silero_size_loop_us", statistics.median(loops), "us", "engine run in process, batch 1"),
        Row("serving.silero_size_c1_mean_us", statistics.median(singles), "us", "one request at a time"),
    ]


def check(address: str, message: bytes, expected: dict[str, np.ndarray]) -> None:
    """The served output must equal the engine's."""
    outputs = WireResponse(call(address, PATH, message), Served()).decode()
    for name, tensor in expected.items():
        if not np.array_equal(outputs[name], tensor):
            raise RuntimeError(f"{address} answers {name} differently from the engine")
