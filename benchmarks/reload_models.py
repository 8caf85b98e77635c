"""The models of the reload benchmark: two ONNX models, of fixed and of free shape, and a LiteRT one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pymicro_wakeword

from benchmarks.silero_size import HIDDEN, build_model
from benchmarks.silero_size import make_inputs as make_frame
from model_sync.publisher.bundle import BundleSpec, create_bundle
from nearcast.store import Store
from nearcast.store.manifest import Tensor


def fill_store(root: Path, place: Path | None = None) -> Store:
    """A store in `place` with each kind as release 1, inactive."""
    store = Store(place or root / "store")
    for kind, rows in (("onnx_static", 1), ("onnx_dynamic", -1)):
        model = build_model()
        if rows == 1:
            for value in (*model.graph.input, *model.graph.output):
                for axis in value.type.tensor_type.shape.dim:
                    if axis.dim_param == "N":
                        axis.dim_value = 1
        source = root / kind
        source.mkdir()
        onnx.save(model, source / "model.onnx")
        np.savez(source / "golden.npz", **{f"in_{name}": tensor for name, tensor in make_frame().items()})  # type: ignore[arg-type]
        spec = BundleSpec(
            name=kind,
            release=1,
            semver="1.0.0",
            engine="onnxruntime",
            model_file="model.onnx",
            licence="Apache-2.0",
            stateful="explicit",
            golden=("golden.npz",),
            inputs=(_tensor("input", (rows, 576), 0), _tensor("state", (2, rows, HIDDEN), 1)),
            outputs=(_tensor("output", (rows, 1), 0), _tensor("stateN", (2, rows, HIDDEN), 1)),
        )
        create_bundle(spec, source, root / f"{kind}-bundle")
        store.commit(kind, 1, root / f"{kind}-bundle")
    source = root / "litert"
    source.mkdir()
    wake_word = Path(pymicro_wakeword.__file__).parent / "models" / "okay_nabu.tflite"
    (source / "model.tflite").write_bytes(wake_word.read_bytes())
    spec = BundleSpec(
        name="litert",
        release=1,
        semver="1.0.0",
        engine="litert",
        model_file="model.tflite",
        licence="Apache-2.0",
        inputs=(Tensor(name="input_audio", datatype="INT8", shape=(1, 3, 40)),),
        outputs=(Tensor(name="dense_1", datatype="UINT8", shape=(1, 1)),),
    )
    create_bundle(spec, source, root / "litert-bundle")
    store.commit("litert", 1, root / "litert-bundle")
    return store


def _tensor(name: str, shape: tuple[int, ...], batch_axis: int) -> Tensor:
    return Tensor(name=name, datatype="FP32", shape=shape, batch_axis=batch_axis if shape[batch_axis] == -1 else None)
