"""Do the steps of a pipeline fit together? Followed tensor by tensor when a version is loaded, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeAlias

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.store.manifest import Manifest, Pipeline, Tensor
from nearcast.store.steps import (
    ANCHORS_MAX,
    Constant,
    DecodeImage,
    DetectBoxes,
    Layout,
    Normalise,
    Resize,
    Softmax,
    TopK,
)

IMAGES = "images of any size"
"""What `decode_image` makes, and only `resize` takes."""
_FLOATS = ("FP16", "FP32", "FP64")
_PIXEL_AXES = 4


class Kind(msgspec.Struct, frozen=True):
    """What is known of a tensor; -1 is a free axis."""

    datatype: str
    shape: tuple[int, ...]


Kinds: TypeAlias = dict[str, Kind]


def require_flow(manifest: Manifest, pipeline: Pipeline) -> None:
    """Refuse a pipeline whose steps do not make the model's inputs of the public ones and the public outputs of its.

    Raises:
        MeshError: UNTRUSTED naming the step and what does not fit.
    """
    kinds = _kinds(manifest.inputs)
    for before in pipeline.before:
        match before:
            case DecodeImage():
                _decode(before, kinds)
            case Resize():
                _resize(before, kinds)
            case Normalise():
                _normalise(before, kinds)
            case Layout():
                _lay_out(before, kinds)
            case Constant():
                _add_constant(before, kinds)
    _require_made("input", pipeline.inputs, kinds, exactly=True)
    kinds = _kinds(pipeline.outputs)
    for after in pipeline.after:
        match after:
            case Softmax():
                _require_float("softmax", _find("softmax", after.tensor, kinds))
            case TopK():
                _rank(after, kinds, has_labels=bool(manifest.labels))
            case DetectBoxes():
                _detect(after, kinds, has_labels=bool(manifest.labels))
    _require_made("output", manifest.outputs, kinds, exactly=False)
    _require_batch_axes(manifest, pipeline)


def ready_names(manifest: Manifest) -> frozenset[str]:
    """The model's own inputs, where a client may send them in place of the public ones; else none.

    They must be told from the public ones by name, hold nothing that no client knows, and join just as those do.
    """
    if manifest.pipeline is msgspec.UNSET or constants(manifest.pipeline):
        return frozenset()
    public, own = manifest.inputs, manifest.pipeline.inputs
    names = frozenset(tensor.name for tensor in own)
    joins = [all(tensor.batch_axis is not None for tensor in side) for side in (public, own)]
    return names if names != {tensor.name for tensor in public} and joins[0] == joins[1] else frozenset()


def decodes(manifest: Manifest) -> bool:
    """Whether files are decoded before the model runs: how long that takes, no shape of a tensor tells."""
    pipeline = manifest.pipeline
    return pipeline is not msgspec.UNSET and any(isinstance(step, DecodeImage) for step in pipeline.before)


def constants(pipeline: Pipeline) -> list[Constant]:
    """The steps that add inputs which are always the same."""
    return [step for step in pipeline.before if isinstance(step, Constant)]


def _decode(step: DecodeImage, kinds: Kinds) -> None:
    kind = _find("decode_image", step.source, kinds)
    if kind.datatype != "BYTES" or len(kind.shape) != 1:
        raise _wrong("decode_image", f"takes BYTES with one axis, not {step.source} {_say(kind)}")
    del kinds[step.source]
    _add("decode_image", step.target, Kind(IMAGES, (kind.shape[0], 3 if step.mode == "RGB" else 1)), kinds)


def _resize(step: Resize, kinds: Kinds) -> None:
    kind = _find("resize", step.tensor, kinds)
    if kind.datatype != IMAGES:
        raise _wrong("resize", f"takes what decode_image made, not {step.tensor} {_say(kind)}")
    images, channels = kind.shape
    kinds[step.tensor] = Kind("UINT8", (images, step.height, step.width, channels))


def _normalise(step: Normalise, kinds: Kinds) -> None:
    kind = _find("normalise", step.tensor, kinds)
    if kind.datatype in (IMAGES, "BYTES", "BOOL") or not kind.shape:
        raise _wrong("normalise", f"takes numbers with a last axis of channels, not {step.tensor} {_say(kind)}")
    for numbers in (step.mean, step.scale):
        if len(numbers) not in (1, kind.shape[-1]):
            raise _wrong("normalise", f"has {len(numbers)} numbers for the {kind.shape[-1]} channels of {step.tensor}")
    kinds[step.tensor] = Kind(step.datatype, kind.shape)


def _lay_out(step: Layout, kinds: Kinds) -> None:
    kind = _find("layout", step.tensor, kinds)
    if len(kind.shape) != _PIXEL_AXES:
        raise _wrong("layout", f"takes images, height, width, channels, not {step.tensor} {_say(kind)}")
    images, height, width, channels = kind.shape
    kinds[step.tensor] = Kind(kind.datatype, (images, channels, height, width))


def _add_constant(step: Constant, kinds: Kinds) -> None:
    if len(step.values) != prod(step.shape):
        raise _wrong("constant", f"gives {len(step.values)} values for {step.tensor} of shape {list(step.shape)}")
    _add("constant", step.tensor, Kind(step.datatype, step.shape), kinds)


def _rank(step: TopK, kinds: Kinds, *, has_labels: bool) -> None:
    kind = _find("top_k", step.source, kinds)
    _require_float("top_k", kind)
    if kind.shape[-1] < step.k:
        raise _wrong("top_k", f"wants {step.k} of {step.source}, which has a last axis of {kind.shape[-1]}")
    shape = (*kind.shape[:-1], step.k)
    _add("top_k", step.values, Kind(kind.datatype, shape), kinds)
    _add("top_k", step.indices, Kind("INT32", shape), kinds)
    if has_labels:
        _add("top_k", step.labels, Kind("BYTES", shape), kinds)


def _detect(step: DetectBoxes, kinds: Kinds, *, has_labels: bool) -> None:
    anchors = sum(grid.rows * grid.columns * len(grid.sizes) for grid in step.grids)
    if anchors > ANCHORS_MAX:
        raise _wrong("detect_boxes", f"has {anchors} anchors, more than {ANCHORS_MAX}")
    boxes, scores = (_find("detect_boxes", name, kinds) for name in (step.box_source, step.score_source))
    for kind in (boxes, scores):
        _require_float("detect_boxes", kind)
    if boxes.shape[1:] != (anchors, 4 + 2 * step.points):
        raise _wrong("detect_boxes", f"takes [images, {anchors}, {4 + 2 * step.points}], not {_say(boxes)}")
    if len(scores.shape) != len(boxes.shape) or scores.shape[1] != anchors or scores.shape[2] <= step.first_class:
        raise _wrong("detect_boxes", f"takes [images, {anchors}, classes from {step.first_class}], not {_say(scores)}")
    rows = (boxes.shape[0], step.boxes_max)
    _add("detect_boxes", "boxes", Kind("FP32", (*rows, 4)), kinds)
    _add("detect_boxes", "scores", Kind("FP32", rows), kinds)
    _add("detect_boxes", "classes", Kind("INT32", rows), kinds)
    if step.points:
        _add("detect_boxes", "points", Kind("FP32", (*rows, step.points, 2)), kinds)
    if has_labels:
        _add("detect_boxes", "labels", Kind("BYTES", rows), kinds)


def _require_made(side: str, wanted: Sequence[Tensor], kinds: Mapping[str, Kind], *, exactly: bool) -> None:
    names = {tensor.name for tensor in wanted}
    if exactly and (extra := sorted(set(kinds) - names)):
        raise _wrong("pipeline", f"makes the {side} {extra[0]}, which nothing takes")
    for tensor in wanted:
        kind = kinds.get(tensor.name)
        if kind is None:
            raise _wrong("pipeline", f"makes no {side} {tensor.name}")
        fits = len(kind.shape) == len(tensor.shape) and all(
            -1 in (made, declared) or made == declared for made, declared in zip(kind.shape, tensor.shape, strict=True)
        )
        if kind.datatype != tensor.datatype or not fits:
            raise _wrong(
                "pipeline",
                f"makes the {side} {tensor.name} {_say(kind)}; declared is {tensor.datatype} {list(tensor.shape)}",
            )


def _require_batch_axes(manifest: Manifest, pipeline: Pipeline) -> None:
    """Requests are joined as they come and as the model takes them: both sides must have a batch axis, or none."""
    if any(tensor.batch_axis is None for tensor in (*manifest.inputs, *manifest.outputs)):
        return
    fixed = {step.tensor for step in constants(pipeline)}
    for tensor in (*pipeline.inputs, *pipeline.outputs):
        if tensor.batch_axis is None and tensor.name not in fixed:
            raise _wrong("pipeline", f"is declared to run in batches, but the model's {tensor.name} has no batch axis")


def _find(step: str, name: str, kinds: Mapping[str, Kind]) -> Kind:
    kind = kinds.get(name)
    if kind is None:
        raise _wrong(step, f"names the tensor {name}; there are {', '.join(sorted(kinds)) or 'none'}")
    return kind


def _add(step: str, name: str, kind: Kind, kinds: Kinds) -> None:
    if name in kinds:
        raise _wrong(step, f"makes the tensor {name}, which is there already")
    kinds[name] = kind


def _require_float(step: str, kind: Kind) -> None:
    if kind.datatype not in _FLOATS or not kind.shape:
        raise _wrong(step, f"takes floating-point numbers with an axis, not {_say(kind)}")


def _kinds(tensors: Sequence[Tensor]) -> Kinds:
    return {tensor.name: Kind(tensor.datatype, tensor.shape) for tensor in tensors}


def _say(kind: Kind) -> str:
    return f"{kind.datatype} {list(kind.shape)}"


def _wrong(step: str, problem: str) -> MeshError:
    return MeshError(Code.UNTRUSTED, f"The manifest's pipeline does not fit: {step} {problem}.")
