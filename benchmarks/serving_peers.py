"""The servers of `benchmarks serving`: how each is started on one model, and in which configurations."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.processes import SERVER_CPU
from benchmarks.serving_models import Workload
from nearcast.store.manifest import Tensor

HERE = Path(__file__).parent
PIN = ("taskset", "-c", str(SERVER_CPU))
Places = AbstractContextManager[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A server in one configuration.

    Attributes:
        server: nearcast, grpc.aio, MLServer or Triton; `setting` says how it is set up.
        start: takes an empty folder; yields `grpc`, `rest` and `pid`.
        batch_first: tensors come with their batch axis first, as this server joins requests.
        binary_rest: REST takes and gives tensors as binary data; otherwise as JSON.
    """

    server: str
    setting: str
    start: Callable[[Path], Places]
    transports: tuple[str, ...] = ("grpc", "rest")
    batch_first: bool = False
    binary_rest: bool = True


def ours(workload: Workload, root: Path, kind: str, *, batch_rows_max: int | None = None) -> Candidate:
    """nearcast, or grpc.aio with nearcast's host behind it."""
    extra = [] if batch_rows_max is None else [str(batch_rows_max)]
    return Candidate(
        server="nearcast" if kind == "ngh2" else "grpc.aio",
        setting="default" if batch_rows_max is None else "batch 1",
        start=lambda _: _serve(root, workload.name, kind, *extra),
        transports=("grpc", "rest") if kind == "ngh2" and batch_rows_max is None else ("grpc",),
    )


def foreign(workload: Workload, model: Path, *, quick: bool) -> list[Candidate]:
    """The peers that are installed, in each configuration that their documentation offers for speed."""
    found: list[Candidate] = []
    ways = {workload.batches} if quick else {False, workload.batches}
    if (peers.MLSERVER / "bin/mlserver").exists():
        workers = (0,) if quick else (0, 1)
        found += [_mlserver(workload, model, workers=count, joins=joins) for count in workers for joins in ways]
    if (peers.TRITON / "bin/python").exists():
        found += [_triton(workload, model, joins=joins) for joins in ways]
    return found


@contextlib.contextmanager
def _serve(*arguments: object) -> Iterator[dict[str, Any]]:
    command = [*PIN, sys.executable, "-m", "benchmarks.serving_server", *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended with {child.wait()} before it was ready")
        yield {**json.loads(line), "pid": child.pid}
    finally:
        peers.stop_group(child)
        if child.stdout is not None:
            child.stdout.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The bare engine: microseconds of one run by the clock, and of processor time.

    What no server can beat: `row_us` of one row in a batch of 16 (0 = not batched), and `paused_cpu_us` of a run after
    a pause of 0.3 ms, as there is one between requests that come one at a time.
    """

    loop_us: float
    cpu_us: float
    row_us: float
    paused_cpu_us: float


def time_loop(root: Path, workload: Workload) -> Loop:
    """One run of the engine after another in a process of its own, on the servers' core."""
    with _serve(root, workload.name, "loop") as found:
        return Loop(**{each.name: float(found[each.name]) for each in fields(Loop)})


def _mlserver(workload: Workload, model: Path, *, workers: int, joins: bool) -> Candidate:
    @contextlib.contextmanager
    def start(folder: Path) -> Iterator[dict[str, Any]]:
        place = folder / workload.name
        place.mkdir()
        axes = _axes(workload) if joins else {}
        settings: dict[str, Any] = {
            "name": workload.name,
            "implementation": "peer_mlserver_model.OnnxModel",
            "parameters": {"version": "1", "extra": {"axes": axes}},
        }
        if joins:
            settings |= {"max_batch_size": 32, "max_batch_time": 0.001}
        (place / "model-settings.json").write_text(json.dumps(settings))
        os.link(model, folder / "model.onnx")
        runtime = HERE / "peer_mlserver_model.py"
        with peers.mlserver(folder, runtime=runtime, pin=PIN, parallel_workers=workers) as found:
            yield found

    setting = f"{workers} workers, {'adaptive batching' if joins else 'no batching'}"
    return Candidate(server="MLServer", setting=setting, start=start, batch_first=joins, binary_rest=False)


def _triton(workload: Workload, model: Path, *, joins: bool) -> Candidate:
    @contextlib.contextmanager
    def start(folder: Path) -> Iterator[dict[str, Any]]:
        models = folder / "models"
        config = f"max_batch_size: {32 if joins else 0}\n" + ("dynamic_batching { }\n" if joins else "")
        config += _triton_tensors("input", workload.inputs, joins=joins)
        config += _triton_tensors("output", workload.outputs, joins=joins)
        axes = ",".join(f"{name}={axis}" for name, axis in _axes(workload).items()) if joins else ""
        code, parameters = HERE / "peer_triton_model.py", {"model": str(model), "axes": axes}
        peers.put_triton_model(models, workload.name, config, code=code, parameters=parameters)
        with peers.triton(models, pin=PIN) as found:
            yield found

    setting = "dynamic batcher" if joins else "no batching"
    return Candidate(server="Triton", setting=setting, start=start, batch_first=joins)


def _axes(workload: Workload) -> dict[str, int]:
    return {tensor.name: tensor.batch_axis or 0 for tensor in (*workload.inputs, *workload.outputs)}


def _triton_tensors(side: str, tensors: tuple[Tensor, ...], *, joins: bool) -> str:
    lines = ""
    for tensor in tensors:
        shape = list(tensor.shape)
        if joins:
            assert tensor.batch_axis is not None
            del shape[tensor.batch_axis]
        dims = ", ".join(map(str, shape))
        lines += f'{side} [ {{ name: "{tensor.name}" data_type: TYPE_{tensor.datatype} dims: [ {dims} ] }} ]\n'
    return lines
