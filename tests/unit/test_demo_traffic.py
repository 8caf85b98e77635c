from __future__ import annotations

import asyncio

from nearcast.cli.bench import Outcome, make_inputs
from nearcast.cli.demo.traffic import Answer, Traffic
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, TensorSpec


async def test_traffic_is_an_open_loop_and_counts_what_fails():
    release = asyncio.Event()
    asked = 0

    async def ask() -> Answer:
        nonlocal asked
        asked += 1
        if asked == 1:
            await release.wait()  # one slow answer must not hold back the others
        if asked == 3:
            raise MeshError(Code.OVERLOADED, "Too much.")
        if asked == 4:
            raise RuntimeError("a foreign client's error")
        return Answer(model="m", version="1", served_by="edge-1", says="7")

    async with Traffic("c", ask, rate_per_s=500.0) as traffic:
        while asked < 8:
            await asyncio.sleep(0.001)
        release.set()
    assert len(traffic.failures) == 2
    assert {sample.error for sample in traffic.failures} == {
        "OVERLOADED: Too much.",
        "RuntimeError: a foreign client's error",
    }
    assert traffic.versions()["1"] == len(traffic.samples) - 2
    assert traffic.served_by()["edge-1"] == traffic.versions()["1"]
    assert all(sample.latency_ms >= 0 for sample in traffic.samples)


def test_bench_makes_inputs_of_the_declared_types():
    metadata = ModelMetadata(
        name="m",
        versions=("1",),
        platform="p",
        inputs=(TensorSpec("a", "FP32", (-1, 4)), TensorSpec("b", "BYTES", (2,)), TensorSpec("c", "INT8", (1, 3))),
        outputs=(),
    )
    inputs = make_inputs(metadata)
    assert {name: (tensor.shape, tensor.dtype.name) for name, tensor in inputs.items()} == {
        "a": ((1, 4), "float32"),
        "b": ((2,), "object"),
        "c": ((1, 3), "int8"),
    }


def test_bench_quantiles_are_nearest_rank():
    outcome = Outcome(latencies_ms=[1.0, 2.0, 3.0, 4.0])
    assert outcome.quantile_ms(0.5) == 3.0
    assert outcome.quantile_ms(0.99) == 4.0
    assert Outcome().quantile_ms(0.5) == 0.0
