"""ONNX models on ONNX Runtime (CPU)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors, TensorSpec
from nearcast.serving.engines import Outputs, Runner, estimate_memory_bytes
from nearcast.store.contents import Contents
from nearcast.store.manifest import Manifest

_LOG = logging.getLogger(__name__)
_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}
_ERROR_LOG_LEVEL = 3
COPIED_SIZE_BYTES_MAX = 256 * 1024
"""A larger model is read by the runtime itself, which leaves others the interpreter meanwhile."""


class OnnxModel:
    """One session. Threads do not spin while they wait: spinning costs an idle node whole cores."""

    concurrent = True

    def __init__(self, contents: Contents, *, threads: int) -> None:
        manifest = contents.manifest
        if manifest.stateful == "hidden":
            raise MeshError(
                Code.UNTRUSTED, "ONNX models keep no state between runs; declare the state's tensors as explicit."
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = _ERROR_LOG_LEVEL
        for name, value in (
            ("session.intra_op.allow_spinning", "0"),
            ("session.inter_op.allow_spinning", "0"),
            ("session.load_model_format", "ONNX"),
        ):
            options.add_session_config_entry(name, value)
        model = contents.read(manifest.model_file)
        beside = [(path, contents.read(path)) for path in _beside(manifest)]
        try:
            # External data comes from memory too; the runtime copies what it needs and opens no file of the store.
            if beside:
                names, buffers = zip(*beside, strict=True)
                options.add_external_initializers_from_files_in_memory(names, buffers, [len(data) for data in buffers])
            self._session: Any = _make_session(model, options)
        except Exception as error:
            raise MeshError(
                Code.UNTRUSTED, f"ONNX Runtime cannot load {manifest.model_file}: {str(error)[:500]}"
            ) from error
        # The wrapper would keep the file's bytes for a change of providers, which never comes.
        self._session._model_bytes = None  # noqa: SLF001
        self.name = f"{manifest.name} release {manifest.release}"
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())
        self.memory_bytes = estimate_memory_bytes(manifest)
        # Beneath the wrapper, which looks each time for what was compared when the version was loaded: 1.5 us of a run.
        self._run = getattr(self._session, "_sess", self._session).run
        self._names = [tensor.name for tensor in manifest.outputs]
        self._texts_in = tuple(spec.name for spec in self.inputs if spec.datatype == "BYTES")
        self._texts_out = tuple(t.name for t in manifest.outputs if t.datatype == "BYTES")

    def run(self, inputs: Tensors) -> Outputs:
        feeds: dict[str, Any] = inputs if type(inputs) is dict else dict(inputs)
        if self._texts_in:
            feeds = dict(feeds) | {name: _decode_texts(name, feeds[name]) for name in self._texts_in}
        try:
            results = self._run(self._names, feeds, None)
        except ort_errors.InvalidArgument as error:
            _LOG.info("%s refused inputs: %s", self.name, error)
            raise MeshError(
                Code.INVALID_REQUEST, f"Model {self.name} cannot take inputs of these shapes or values."
            ) from error
        except Exception as error:
            _LOG.exception("%s failed", self.name)
            raise MeshError(Code.INTERNAL, f"Model {self.name} failed; the node's log says why.") from error
        outputs = dict(zip(self._names, results, strict=True))
        for name in self._texts_out:
            outputs[name] = _encode_texts(outputs[name])
        return outputs

    def new_sequence(self) -> Runner:
        raise MeshError(Code.UNSUPPORTED, f"Model {self.name} keeps no state between runs.")

    def close(self) -> None:
        self._session = self._run = None


def _make_session(model: bytes, options: Any) -> Any:
    """A session. To pass bytes copies them with the interpreter's lock held, 1 ms for 1.5 MB and 34 ms for 68."""
    if len(model) > COPIED_SIZE_BYTES_MAX:
        try:
            with _file_in_memory(model) as path:
                return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except (OSError, ort_errors.NoSuchFile):
            _LOG.debug("no file in memory here; the model is copied instead", exc_info=True)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def _file_in_memory(data: bytes) -> Iterator[str]:
    """The path of a file that has these bytes, and that only this process can name.

    Raises:
        OSError: if the system has no such thing, or the process may not write so much.
    """
    with os.fdopen(os.memfd_create("model", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        yield f"/proc/self/fd/{file.fileno()}"


def _beside(manifest: Manifest) -> list[str]:
    """Files that may hold external data: all but those with another task."""
    tasks = {manifest.model_file, manifest.sbom_file}
    tasks |= {tensor.file for vector in manifest.golden for tensor in (*vector.inputs, *vector.outputs)}
    return [entry.path for entry in manifest.files if entry.path not in tasks]


def _spec(node: Any) -> TensorSpec:
    kind = str(node.type)
    datatype = _DATATYPES.get(kind.removeprefix("tensor(").removesuffix(")"))
    if datatype is None or not kind.startswith("tensor("):
        raise MeshError(Code.UNTRUSTED, f"The tensor {node.name} is a {kind}, which no request can carry.")
    return TensorSpec(node.name, datatype, tuple(axis if isinstance(axis, int) else -1 for axis in node.shape))


def _decode_texts(name: str, tensor: Any) -> Any:
    """ONNX strings are UTF-8; left alone, ONNX Runtime would take the *representation* of a bytes object."""
    texts = np.empty(tensor.size, dtype=object)
    try:
        texts[:] = [item.decode() if isinstance(item, bytes) else item for item in tensor.reshape(-1).tolist()]
    except UnicodeDecodeError as error:
        raise MeshError(Code.INVALID_REQUEST, f"Input {name} holds bytes that are no UTF-8 text.") from error
    return texts.reshape(tensor.shape)


def _encode_texts(tensor: Any) -> Any:
    data = np.empty(tensor.size, dtype=object)
    data[:] = [item.encode() for item in tensor.reshape(-1).tolist()]
    return data.reshape(tensor.shape)
