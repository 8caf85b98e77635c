"""What a version may declare to happen before and after its model runs: steps as data, signed with the manifest.

A step names the tensors that it works on; nothing in it is code, a path or a pattern. The bounds here are those of
every host: a manifest may ask for less.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

STEPS_MAX = 16
"""Steps before a model, and after it."""
PIXELS_MAX = 2**25
"""Pixels of one image (about 100 MB decoded); what a manifest states is at most that."""
SIDE_PIXELS_MAX = 4096
"""Width and height of what a model may ask an image to be resized to."""
ANCHORS_MAX = 2**17
BOXES_MAX = 1024

TensorName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Side = Annotated[int, msgspec.Meta(ge=1, le=SIDE_PIXELS_MAX)]
Channels = Annotated[tuple[float, ...], msgspec.Meta(min_length=1, max_length=4)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class DecodeImage(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step", tag="decode_image"
):
    """JPEG, PNG or WebP files become pixels, as their EXIF data says upright. `resize` must follow.

    Attributes:
        source: the BYTES tensor that clients send, one file in each element.
        target: the tensor of pixels, UINT8 [images, height, width, channels].
        mode: three channels or one; transparency is dropped.
        formats: what may come; the bytes decide, not a name.
        pixels_max: of one image; a larger one is refused by its header, before any pixel is decoded.
    """

    source: TensorName
    target: TensorName
    mode: Literal["RGB", "L"] = "RGB"
    formats: Annotated[tuple[Literal["jpeg", "png", "webp"], ...], msgspec.Meta(min_length=1, max_length=3)] = (
        "jpeg",
        "png",
        "webp",
    )
    pixels_max: Annotated[int, msgspec.Meta(ge=1, le=PIXELS_MAX)] = 2**24


class Resize(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step", tag="resize"):
    """Every image gets one size.

    Attributes:
        fit: `stretch` it, or scale it into the frame and fill the rest with `pad` (`letterbox`).
        filter: `bilinear` (a triangle as wide as the scale, so that nothing is skipped), or the mean of the `area`.
    """

    tensor: TensorName
    width: Side
    height: Side
    fit: Literal["stretch", "letterbox"] = "stretch"
    filter: Literal["bilinear", "area"] = "bilinear"
    pad: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0


class Normalise(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step", tag="normalise"
):
    """(x - mean) * scale, for each channel or with one number for all, in 32-bit floats.

    The channels are the last axis: this comes before `layout`.
    """

    tensor: TensorName
    mean: Channels = (0.0,)
    scale: Channels = (1.0,)
    datatype: Literal["FP32", "FP16"] = "FP32"


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step", tag="layout"):
    """From rows of pixels (NHWC) to planes of channels (NCHW)."""

    tensor: TensorName
    order: Literal["NCHW"] = "NCHW"


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step", tag="constant"):
    """An input of the model that is always the same, so that no client has to send it."""

    tensor: TensorName
    datatype: Literal["BOOL", "INT32", "INT64", "FP32", "FP64", "UINT8"]
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, le=4096)], ...], msgspec.Meta(max_length=8)] = ()
    values: Annotated[tuple[int | float, ...], msgspec.Meta(min_length=1, max_length=4096)]


class Softmax(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step", tag="softmax"):
    """Logits become shares that sum to 1 along the last axis."""

    tensor: TensorName


class TopK(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step", tag="top_k"):
    """The `k` highest along the last axis, the highest first; of equals the first.

    Attributes:
        source: numbers, [..., classes].
        values: its highest, [..., k].
        indices: where they stand, INT32 [..., k].
        labels: what the manifest's `labels` call them, BYTES [..., k]; missing if there are none.
    """

    source: TensorName
    k: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    values: TensorName = "scores"
    indices: TensorName = "classes"
    labels: TensorName = "labels"


class AnchorGrid(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Anchors of one feature map: in every cell, row by row, boxes of these [height, width] about its middle.

    All lengths are shares of the model's input.
    """

    rows: Annotated[int, msgspec.Meta(ge=1, le=256)]
    columns: Annotated[int, msgspec.Meta(ge=1, le=256)]
    sizes: Annotated[tuple[tuple[Positive, Positive], ...], msgspec.Meta(min_length=1, max_length=32)]


class DetectBoxes(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="step", tag="detect_boxes"
):
    """Boxes of a single-shot detector: decoded against its anchors, the best of those that overlap kept.

    The outputs have `boxes_max` rows for each image, the best score first; what is not used is 0 (labels "").
    `boxes` are FP32 [images, boxes_max, 4] as top, left, bottom, right, in shares of the image that the client sent:
    what a letterbox added is taken out again. With them come `scores` (FP32), `classes` (INT32), `labels` (BYTES, if
    the manifest has labels) and `points` (FP32, [.., points, 2] as y, x), each [images, boxes_max, ..].

    Attributes:
        box_source: raw boxes, [images, anchors, 4 + 2 * points], points after the box as x, y.
        score_source: raw scores, [images, anchors, classes].
        grids: the anchors, in the model's order.
        order: of the four raw numbers.
        scales: by which raw y, x, height and width are divided.
        size_is_log: height and width are logarithms of shares of the anchor's.
        sigmoid: raw scores are logits.
        first_class: lower ones are background.
        score_min: boxes below are dropped.
        overlap_max: intersection over union above which the lower score of two boxes of one class is dropped.
    """

    box_source: TensorName
    score_source: TensorName
    grids: Annotated[tuple[AnchorGrid, ...], msgspec.Meta(min_length=1, max_length=16)]
    order: Literal["yxhw", "xywh"] = "yxhw"
    scales: tuple[Positive, Positive, Positive, Positive] = (10.0, 10.0, 5.0, 5.0)
    size_is_log: bool = True
    sigmoid: bool = True
    first_class: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    score_min: Share = 0.5
    overlap_max: Share = 0.5
    boxes_max: Annotated[int, msgspec.Meta(ge=1, le=BOXES_MAX)] = 16
    points: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0


Before: TypeAlias = DecodeImage | Resize | Normalise | Layout | Constant
After: TypeAlias = Softmax | TopK | DetectBoxes
