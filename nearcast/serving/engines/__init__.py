"""Engines: what runs a model file. Each lives in a file of its own and imports its library only when used."""

from __future__ import annotations

import os
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors, TensorSpec
from nearcast.store.contents import Contents
from nearcast.store.manifest import Manifest, Tensor

Outputs: TypeAlias = dict[str, npt.NDArray[Any]]
Timed: TypeAlias = tuple[Outputs, float, float]
"""Outputs, and when the engine started and ended (monotonic seconds)."""


class Runner(Protocol):
    """Something that can be called with checked inputs."""

    def run(self, inputs: Tensors) -> Outputs:
        """Compute all declared outputs. Blocks.

        Raises:
            MeshError: INVALID_REQUEST if the engine rejects the inputs, INTERNAL if the model fails.
        """
        ...


class LoadedModel(Runner, Protocol):
    """One version in memory.

    Attributes:
        inputs: what the model file itself declares, in its order; -1 is a free axis.
        outputs: the same for the outputs.
        memory_bytes: estimate of what it holds.
        concurrent: whether `run` may be called from several threads at once.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    memory_bytes: int
    concurrent: bool

    def new_sequence(self) -> Runner:
        """A runner with state of its own, at its start state, for a model with hidden state.

        Raises:
            MeshError: UNSUPPORTED if the engine keeps no state between runs.
        """
        ...

    def close(self) -> None:
        """Give the memory back. Nothing may run any more."""
        ...


PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "litert": "litert_tflite"}
"""What `ModelMetadata` names as the platform, in the way of Triton's backends."""
EXTRAS = {"onnxruntime": "edge", "litert": "litert"}
"""What installs each engine."""
# Else ONNX Runtime's own builds keep a list of models and sessions below ~/.cache and send it to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
_WEIGHT_COPIES = 2
"""Weights exist about twice: as they came and as the engine packed them. Measured: 1.0 to 2.9 times."""
_ENGINE_SIZE_BYTES = 128 * 1024
"""What an engine takes for the smallest model."""


def load_engine(contents: Contents, *, threads: int = 1) -> LoadedModel:
    """Load a version, pipeline and all, and check that the file is what its manifest declares. Blocks, for seconds.

    Engines get bytes and no paths: what runs is what was hashed, and a sealed version is open in memory only.

    Args:
        contents: the version.
        threads: threads of one run.

    Raises:
        MeshError: UNTRUSTED if the file cannot be loaded or differs from its manifest, UNAUTHENTICATED if it is sealed
            and the key is not here, UNAVAILABLE if the engine's library, or what decodes images, is not installed.
    """
    from nearcast.serving.pipeline.model import wrap_engine

    manifest = contents.manifest
    try:
        model = _load(contents.of_model(), threads)
    except ImportError as error:
        raise MeshError(
            Code.UNAVAILABLE,
            f"The engine {manifest.engine} is not installed on this node; install nearcast[{EXTRAS[manifest.engine]}].",
        ) from error
    try:
        require_signature(manifest.of_model(), model)
        return wrap_engine(model, manifest)
    except MeshError:
        model.close()
        raise


def require_signature(manifest: Manifest, model: LoadedModel) -> None:
    """Refuse a model whose tensors are not those of the manifest.

    Raises:
        MeshError: UNTRUSTED naming the tensor.
    """
    actual = {spec.name: spec for spec in model.inputs}
    declared = {tensor.name for tensor in manifest.inputs}
    if missing := sorted(set(actual) - declared):
        raise MeshError(Code.UNTRUSTED, f"The model needs the input {missing[0]}, which its manifest does not declare.")
    for tensor in manifest.inputs:
        _require_tensor("input", tensor, actual)
    actual = {spec.name: spec for spec in model.outputs}
    for tensor in manifest.outputs:
        _require_tensor("output", tensor, actual)


def _load(contents: Contents, threads: int) -> LoadedModel:
    if contents.manifest.engine == "onnxruntime":
        from nearcast.serving.engines.onnxruntime import OnnxModel

        return OnnxModel(contents, threads=threads)
    from nearcast.serving.engines.litert import LitertModel

    return LitertModel(contents, threads=threads)


def estimate_memory_bytes(manifest: Manifest) -> int:
    """Memory that a version will take, before it is loaded; its files without the golden vectors' own count twice."""
    golden = {t.file for v in manifest.golden for t in (*v.inputs, *v.outputs)} - {manifest.model_file}
    return _ENGINE_SIZE_BYTES + _WEIGHT_COPIES * sum(
        entry.size_bytes for entry in manifest.files if entry.path not in golden
    )


def _require_tensor(kind: str, tensor: Tensor, actual: dict[str, TensorSpec]) -> None:
    spec = actual.get(tensor.name)
    if spec is None:
        known = ", ".join(sorted(actual)) or "none"
        raise MeshError(Code.UNTRUSTED, f"The model has no {kind} {tensor.name}; it has: {known}.")
    if spec.datatype != tensor.datatype:
        raise MeshError(
            Code.UNTRUSTED, f"The {kind} {tensor.name} is {spec.datatype}, but its manifest says {tensor.datatype}."
        )
    # An input may be declared narrower than the model takes it, an output only if the model leaves the axis open.
    fits = len(spec.shape) == len(tensor.shape) and all(
        got == declared or got == -1 or (kind == "output" and declared == -1)
        for got, declared in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise MeshError(
            Code.UNTRUSTED,
            f"The {kind} {tensor.name} has shape {list(spec.shape)}, but its manifest says {list(tensor.shape)}.",
        )
