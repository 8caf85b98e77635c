"""An engine with its pipeline around it: to the rest of the host a model that takes what clients send."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors
from nearcast.serving.engines import LoadedModel, Outputs, Runner
from nearcast.serving.pipeline.boxes import WHOLE, detect_boxes, make_anchors
from nearcast.serving.pipeline.flow import constants, decodes, ready_names, require_flow
from nearcast.serving.pipeline.numbers import name_classes, normalise, softmax, top_k
from nearcast.store.manifest import Manifest, Pipeline
from nearcast.store.steps import Constant, DecodeImage, DetectBoxes, Layout, Normalise, Resize, Softmax, TopK
from nearcast.wire.tensors import dtype_of

Array: TypeAlias = npt.NDArray[Any]
FRAMES = "nc:frames"
"""Beside prepared inputs: where each image lies in the model's input, FP32 [images, 4]. No tensor of a model has it."""
IMAGES_MAX = 64
"""Images of one request."""
REQUEST_PIXELS_MAX = 2**26
"""Decoded pixels of one request together."""


def _in_time() -> None:
    """The check of a caller who has no deadline."""


def wrap_engine(model: LoadedModel, manifest: Manifest) -> LoadedModel:
    """The model with the pipeline of its manifest around it, if there is one.

    Raises:
        MeshError: UNTRUSTED if the steps do not fit, UNAVAILABLE if this node lacks what decodes images.
    """
    if manifest.pipeline is msgspec.UNSET:
        return model
    require_flow(manifest, manifest.pipeline)
    if decodes(manifest) and find_spec("PIL") is None:
        raise MeshError(
            Code.UNAVAILABLE, "Pillow, which decodes images, is not installed on this node; install nearcast[images]."
        )
    return PipelinedModel(model, manifest, manifest.pipeline)


class PipelinedModel:
    """A loaded model that takes and gives the tensors of its manifest; see `LoadedModel`.

    A request may also bring the model's own inputs, ready: then only what comes after the model runs.

    Attributes:
        decodes: whether files are decoded first, each request's for itself.
        core: runs what `prepare` made, and the steps after.
        prepared_axes: batch axis of every prepared tensor; empty if they cannot be joined.
    """

    def __init__(self, model: LoadedModel, manifest: Manifest, pipeline: Pipeline) -> None:
        self._model = model
        self.inputs, self.outputs = model.inputs, model.outputs
        self.memory_bytes = model.memory_bytes
        self.concurrent = model.concurrent
        self.decodes = decodes(manifest)
        self._steps = [step for step in pipeline.before if not isinstance(step, Constant | Resize)]
        self._sizes = {step.tensor: step for step in pipeline.before if isinstance(step, Resize)}
        self._ready = ready_names(manifest)
        self._constants = {step.tensor: _make_constant(step) for step in constants(pipeline)}
        axes = {tensor.name: tensor.batch_axis for tensor in pipeline.inputs if tensor.name not in self._constants}
        self.prepared_axes = {name: axis for name, axis in axes.items() if axis is not None}
        if len(self.prepared_axes) < len(axes):
            self.prepared_axes = {}
        self._framed = next((tensor for tensor, step in self._sizes.items() if step.fit == "letterbox"), "")
        if self._framed and self.prepared_axes:
            self.prepared_axes[FRAMES] = 0
        self._after = _After(manifest, pipeline)
        self.core: Runner = _Core(model, self._constants, self._after)

    def run(self, inputs: Tensors) -> Outputs:
        return self.core.run(self.prepare(inputs))

    def prepare(self, inputs: Tensors, require_time: Callable[[], None] = _in_time) -> dict[str, Array]:
        """The model's inputs of one request, or of several that were joined.

        Args:
            inputs: public tensors, or ready ones.
            require_time: called before every image; what it raises ends the work.

        Raises:
            MeshError: INVALID_REQUEST if an image is damaged, of another format or too large.
        """
        values: dict[str, Any] = dict(inputs)
        if self._ready and values.keys() == self._ready:
            if self._framed:
                values[FRAMES] = _whole(len(values[self._framed]))
            return values
        for step in self._steps:
            match step:
                case DecodeImage():
                    self._decode(step, values, require_time)
                case Normalise():
                    values[step.tensor] = normalise(step, values[step.tensor])
                case Layout():
                    values[step.tensor] = np.ascontiguousarray(values[step.tensor].transpose(0, 3, 1, 2))
        return values

    def new_sequence(self) -> Runner:
        return _Sequence(self, _Core(self._model.new_sequence(), self._constants, self._after))

    def close(self) -> None:
        self._model.close()

    def _decode(self, step: DecodeImage, values: dict[str, Any], require_time: Callable[[], None]) -> None:
        """Every file to its final size at once, so that one full image is in memory at a time."""
        from nearcast.serving.pipeline.images import decode_image, resize_image

        files = values.pop(step.source).tolist()
        if not 1 <= len(files) <= IMAGES_MAX:
            raise MeshError(
                Code.INVALID_REQUEST, f"Input {step.source} holds {len(files)} images; send 1 to {IMAGES_MAX}."
            )
        size = self._sizes[step.target]
        images, frames, pixels = [], [], 0
        for file in files:
            require_time()
            image = decode_image(step, file)
            pixels += image.width * image.height
            if pixels > REQUEST_PIXELS_MAX:
                raise MeshError(
                    Code.INVALID_REQUEST,
                    f"The images in input {step.source} have more than {REQUEST_PIXELS_MAX} pixels together.",
                )
            resized, frame = resize_image(size, image)
            images.append(resized)
            frames.append(frame)
        values[step.target] = np.stack(images)
        if step.target == self._framed:
            values[FRAMES] = np.array(frames, np.float32)


class _Core:
    """A runner of the model's own tensors, with the constants before it and the steps after it."""

    def __init__(self, runner: Runner, constant: dict[str, Array], after: _After) -> None:
        self._runner = runner
        self._constants = constant
        self._after = after

    def run(self, inputs: Tensors) -> Outputs:
        frames = inputs.get(FRAMES)
        own = {name: array for name, array in inputs.items() if name != FRAMES} | self._constants
        return self._after.run(self._runner.run(own), frames)


class _Sequence:
    """One sequence of a model with hidden state."""

    def __init__(self, model: PipelinedModel, core: Runner) -> None:
        self._model = model
        self._core = core

    def run(self, inputs: Tensors) -> Outputs:
        return self._core.run(self._model.prepare(inputs))


class _After:
    """The steps after a model, with what they need computed once."""

    def __init__(self, manifest: Manifest, pipeline: Pipeline) -> None:
        self._steps = [
            (step, make_anchors(step.grids) if isinstance(step, DetectBoxes) else None) for step in pipeline.after
        ]
        self._labels = manifest.labels
        self._names = [tensor.name for tensor in manifest.outputs]

    def run(self, outputs: Outputs, frames: Array | None) -> Outputs:
        values = dict(outputs)
        for step, anchors in self._steps:
            match step:
                case Softmax():
                    if not values[step.tensor].shape[-1]:
                        raise MeshError(
                            Code.INVALID_REQUEST, f"The model gives an empty {step.tensor} for these inputs; send more."
                        )
                    values[step.tensor] = softmax(values[step.tensor])
                case TopK():
                    scores, classes = top_k(values[step.source], step.k)
                    values |= {step.values: scores, step.indices: classes}
                    if self._labels:
                        values[step.labels] = name_classes(classes, self._labels)
                case DetectBoxes():
                    assert anchors is not None
                    values |= self._detect(step, anchors, values, frames)
        return {name: values[name] for name in self._names}

    def _detect(self, step: DetectBoxes, anchors: Array, values: Outputs, frames: Array | None) -> Outputs:
        boxes, scores = values[step.box_source], values[step.score_source]
        if frames is None:
            frames = _whole(len(boxes))
        found = detect_boxes(step, anchors, boxes, scores, frames)
        detected: Outputs = {"boxes": found.boxes, "scores": found.scores, "classes": found.classes}
        if step.points:
            detected["points"] = found.points
        if self._labels:
            detected["labels"] = name_classes(found.classes, self._labels, found.scores > 0)
        return detected


def _whole(images: int) -> Array:
    """The frames of images that fill the model's input."""
    return np.tile(np.array(WHOLE, np.float32), (images, 1))


def _make_constant(step: Constant) -> Array:
    return np.array(step.values, dtype_of(step.datatype)).reshape(step.shape)
