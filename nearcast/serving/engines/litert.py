"""TFLite models on LiteRT. Quantised tensors pass as they are, int8 or uint8."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors, TensorSpec
from nearcast.serving.engines import Outputs, Runner, estimate_memory_bytes
from nearcast.store.contents import Contents
from nearcast.store.manifest import Manifest
from nearcast.wire.tensors import datatype_of

_LOG = logging.getLogger(__name__)


class LitertModel:
    """One interpreter, or one per sequence where the model keeps state inside.

    `reset_all_variables` and `allocate_tensors` do not restore the start state of READ_VARIABLE/ASSIGN_VARIABLE graphs,
    so a sequence always gets a fresh interpreter (about 0.5 ms for a small model).
    """

    concurrent = False

    def __init__(self, contents: Contents, *, threads: int) -> None:
        manifest = self._manifest = contents.manifest
        self._threads = threads
        self._content: bytes | None = contents.read(manifest.model_file)
        self.name = f"{manifest.name} release {manifest.release}"
        interpreter = _open(manifest, self._content, threads)
        self._inputs = _tensors(interpreter, "inputs", [tensor.name for tensor in manifest.inputs])
        self._outputs = _tensors(interpreter, "outputs", [tensor.name for tensor in manifest.outputs])
        self.inputs = tuple(_spec(name, detail) for name, detail in self._inputs.items())
        self.outputs = tuple(_spec(name, detail) for name, detail in self._outputs.items())
        self.memory_bytes = estimate_memory_bytes(manifest)
        self._first: _Interpreter | None = None
        if manifest.stateful != "hidden":
            self._first = _Interpreter(self.name, interpreter, self._inputs, self._outputs)

    def run(self, inputs: Tensors) -> Outputs:
        if self._first is None:
            raise MeshError(Code.INVALID_REQUEST, f"Model {self.name} keeps state; send a sequence_id.")
        return self._first.run(inputs)

    def new_sequence(self) -> Runner:
        if self._manifest.stateful != "hidden":
            raise MeshError(Code.UNSUPPORTED, f"Model {self.name} keeps no state between runs.")
        assert self._content is not None, "closed"
        interpreter = _open(self._manifest, self._content, self._threads)
        return _Interpreter(self.name, interpreter, self._inputs, self._outputs)

    def close(self) -> None:
        self._first = None
        self._content = None


class _Interpreter:
    """An interpreter and where its tensors are."""

    __slots__ = ("_inputs", "_interpreter", "_name", "_outputs", "_shapes")

    def __init__(self, name: str, interpreter: Any, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        self._name = name
        self._interpreter = interpreter
        self._inputs = [(tensor, detail["index"]) for tensor, detail in inputs.items()]
        self._outputs = [(tensor, detail["index"]) for tensor, detail in outputs.items()]
        self._shapes = [tuple(detail["shape"].tolist()) for detail in inputs.values()]

    def run(self, inputs: Tensors) -> Outputs:
        interpreter = self._interpreter
        try:
            for position, (name, index) in enumerate(self._inputs):
                shape = inputs[name].shape
                if shape != self._shapes[position]:
                    interpreter.resize_tensor_input(index, shape)
                    self._shapes[position] = shape
                    interpreter.allocate_tensors()
            for name, index in self._inputs:
                interpreter.set_tensor(index, inputs[name])
            interpreter.invoke()
            return {name: interpreter.get_tensor(index) for name, index in self._outputs}
        except ValueError as error:
            _LOG.info("%s refused inputs: %s", self._name, error)
            raise MeshError(
                Code.INVALID_REQUEST, f"Model {self._name} cannot take inputs of these shapes or values."
            ) from error
        except Exception as error:
            _LOG.exception("%s failed", self._name)
            raise MeshError(Code.INTERNAL, f"Model {self._name} failed; the node's log says why.") from error


def _open(manifest: Manifest, content: bytes, threads: int) -> Any:
    try:
        interpreter = Interpreter(model_content=content, num_threads=threads)
        interpreter.allocate_tensors()
    except Exception as error:
        raise MeshError(Code.UNTRUSTED, f"LiteRT cannot load {manifest.model_file}: {str(error)[:500]}") from error
    return interpreter


def _tensors(interpreter: Any, kind: str, declared: list[str]) -> dict[str, Any]:
    """Details by name: the graph's own names, or those of the only signature if the manifest uses them."""
    details = interpreter.get_input_details() if kind == "inputs" else interpreter.get_output_details()
    by_name = {detail["name"]: detail for detail in details}
    if not set(declared) <= set(by_name):
        signatures = interpreter.get_signature_list()
        if len(signatures) == 1:
            runner = interpreter.get_signature_runner(next(iter(signatures)))
            named = runner.get_input_details() if kind == "inputs" else runner.get_output_details()
            if set(declared) <= set(named):
                return dict(named)
    if kind == "outputs" and set(declared) <= set(by_name):
        return {name: by_name[name] for name in declared}
    return by_name


def _spec(name: str, detail: Any) -> TensorSpec:
    signature = detail["shape_signature"] if len(detail["shape_signature"]) else detail["shape"]
    if detail["dtype"] in (np.bytes_, np.str_):
        raise MeshError(Code.UNTRUSTED, f"The tensor {name} holds text, which LiteRT models may not use here.")
    return TensorSpec(name, datatype_of(np.dtype(detail["dtype"])), tuple(int(axis) for axis in signature))
