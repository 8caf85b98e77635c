"""The models of `benchmarks serving`: real ones, with one request's tensors each.

Silero VAD comes through `nearcast models fetch` (MIT), Magika from its package (Apache-2.0). The image model is
SqueezeNet's architecture as the onnx package carries it for its tests, without trained weights: they are drawn at
random here, so that its output depends on its input. It costs what the real one costs and means nothing.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from model_sync.publisher.bundle import BundleSpec, create_bundle
from nearcast.store import Store
from nearcast.store.manifest import Tensor
from nearcast.store.pointer import Pointer

Arrays = dict[str, np.ndarray]
PIXELS = (1, 3, 224, 224)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One model and what is asked of it. `make` raises where the model cannot be had."""

    name: str
    engine_us: float
    make: Callable[[], bytes]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    stateful: str = "none"

    def arrays(self, seed: int = 1) -> Arrays:
        """One request's tensors."""
        rng = np.random.default_rng(seed)
        made: Arrays = {}
        for tensor in self.inputs:
            shape = [1 if size < 0 else size for size in tensor.shape]
            if tensor.datatype == "INT32":
                made[tensor.name] = rng.integers(0, 257, shape, dtype=np.int32)
            else:
                made[tensor.name] = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        return made

    @property
    def batches(self) -> bool:
        """Whether requests may be joined."""
        return all(tensor.batch_axis is not None for tensor in self.inputs)


def workloads() -> tuple[Workload, ...]:
    """Silero VAD, Magika, the image model."""
    return (
        Workload(
            name="silero",
            engine_us=200,
            make=_silero,
            stateful="explicit",
            inputs=(_tensor("input", (-1, 576), 0), _tensor("state", (2, -1, 128), 1)),
            outputs=(_tensor("output", (-1, 1), 0), _tensor("stateN", (2, -1, 128), 1)),
        ),
        Workload(
            name="magika",
            engine_us=9000,
            make=_magika,
            inputs=(Tensor(name="bytes", datatype="INT32", shape=(-1, 2048), batch_axis=0),),
            outputs=(_tensor("target_label", (-1, 214), 0),),
        ),
        Workload(
            name="image",
            engine_us=8000,
            make=_image,
            inputs=(_tensor("data_0", PIXELS, None),),
            outputs=(_tensor("softmaxout_1", (1, 1000, 1, 1), None),),
        ),
    )


def fill_store(root: Path, workload: Workload, model: bytes) -> Store:
    """A store with one committed version of the model."""
    source = root / "source"
    source.mkdir(parents=True)
    (source / "model.onnx").write_bytes(model)
    golden: dict[str, Any] = {f"in_{name}": array for name, array in workload.arrays().items()}
    np.savez(source / "golden.npz", **golden)
    fields: dict[str, Any] = {"stateful": workload.stateful} if workload.stateful != "none" else {}
    spec = BundleSpec(
        name=workload.name,
        release=1,
        semver="1.0.0",
        engine="onnxruntime",
        model_file="model.onnx",
        licence="MIT" if workload.name == "silero" else "Apache-2.0",
        golden=("golden.npz",),
        inputs=workload.inputs,
        outputs=workload.outputs,
        **fields,
    )
    create_bundle(spec, source, root / "bundle")
    store = Store(root / "store")
    store.commit(workload.name, 1, root / "bundle")
    store.write_pointer(workload.name, Pointer(stable=1, last_good=1))
    return store


def _tensor(name: str, shape: tuple[int, ...], batch_axis: int | None) -> Tensor:
    return Tensor(name=name, datatype="FP32", shape=shape, batch_axis=batch_axis)


def _silero() -> bytes:
    """The original, its sampling rate bound to 16 kHz: with a scalar input no two requests could be joined."""
    from model_sync.publisher.fetch import fetch_model

    with tempfile.TemporaryDirectory() as folder:
        found = fetch_model("silero-vad", Path(folder) / "silero")
        model = onnx.load_from_string((found / "silero_vad_16k_op15.onnx").read_bytes())
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(16000, np.int64), "sr"))
    for index, value in enumerate(graph.input):
        if value.name == "sr":
            del graph.input[index]
            break
    data: bytes = model.SerializeToString()
    return data


def _magika() -> bytes:
    spec = importlib.util.find_spec("magika")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package magika is not installed")
    return (Path(spec.origin).parent / "models" / "standard_v3_3" / "model.onnx").read_bytes()


def _image() -> bytes:
    """SqueezeNet with random weights in place of the zeros that its test file computes."""
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / "light_squeezenet.onnx"
    model = onnx.load(path)
    graph = model.graph
    rng = np.random.default_rng(7)
    known: Mapping[str, np.ndarray] = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "ConstantOfShape"]:
        shape = [int(size) for size in known[node.input[0]]]
        scale = np.sqrt(2.0 / max(1, int(np.prod(shape[1:]))))
        weights = (rng.standard_normal(shape) * scale).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(weights, node.output[0]))
        graph.node.remove(node)
    data: bytes = model.SerializeToString()
    return data
