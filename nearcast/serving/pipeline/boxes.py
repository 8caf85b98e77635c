"""Boxes of single-shot detectors: anchors, decoding, non-maximum suppression. Pure functions of arrays.

Liu et al., "SSD: Single Shot MultiBox Detector", 2016: a raw box is an offset from its anchor, in units of the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from nearcast.store.steps import AnchorGrid, DetectBoxes

Array: TypeAlias = npt.NDArray[Any]
Frame: TypeAlias = tuple[float, float, float, float]
"""Where an image lies in the model's input: left, top, width, height, as shares of the input."""
WHOLE: Frame = (0.0, 0.0, 1.0, 1.0)
CANDIDATES_MAX = 1024
"""Boxes of one image that are compared with each other: the best ones."""
_LOGIT_MAX = 80.0
_LOG_SIZE_MAX = 10.0


class Detections(msgspec.Struct, frozen=True, kw_only=True):
    """Of a batch of images, padded with zeros to the declared number of rows."""

    boxes: Array
    scores: Array
    classes: Array
    points: Array


def make_anchors(grids: Sequence[AnchorGrid]) -> Array:
    """All anchors as centre y, centre x, height, width: FP32 [anchors, 4]."""
    parts = []
    for grid in grids:
        y, x = np.meshgrid(
            (np.arange(grid.rows) + 0.5) / grid.rows, (np.arange(grid.columns) + 0.5) / grid.columns, indexing="ij"
        )
        sizes = np.asarray(grid.sizes)
        centres = np.stack([y, x], axis=-1).reshape(-1, 1, 2).repeat(len(sizes), axis=1)
        parts.append(np.concatenate([centres, np.broadcast_to(sizes, centres.shape)], axis=-1).reshape(-1, 4))
    return np.concatenate(parts).astype(np.float32)


def detect_boxes(step: DetectBoxes, anchors: Array, raw_boxes: Array, raw_scores: Array, frames: Array) -> Detections:
    """The boxes of every image of a batch, each image for itself.

    Args:
        step: how the model speaks.
        anchors: as `make_anchors` gives them.
        raw_boxes: [images, anchors, 4 + 2 * points].
        raw_scores: [images, anchors, classes].
        frames: where each image lies in the model's input: left, top, width, height, FP32 [images, 4].
    """
    images, rows = len(raw_boxes), step.boxes_max
    found = Detections(
        boxes=np.zeros((images, rows, 4), np.float32),
        scores=np.zeros((images, rows), np.float32),
        classes=np.zeros((images, rows), np.int32),
        points=np.zeros((images, rows, step.points, 2), np.float32),
    )
    for index in range(images):
        scores, classes = _best_classes(step, raw_scores[index])
        chosen = np.flatnonzero(scores >= step.score_min)
        chosen = chosen[np.argsort(-scores[chosen], kind="stable")][:CANDIDATES_MAX]
        boxes, points = _decode(step, anchors[chosen], raw_boxes[index][chosen].astype(np.float32))
        kept = suppress(boxes, classes[chosen], overlap_max=step.overlap_max, boxes_max=rows)
        count = len(kept)
        left, top, width, height = frames[index].tolist()
        offset, extent = np.array([top, left], np.float32), np.array([height, width], np.float32)
        found.boxes[index, :count] = (boxes[kept] - np.tile(offset, 2)) / np.tile(extent, 2)
        found.scores[index, :count] = scores[chosen][kept]
        found.classes[index, :count] = classes[chosen][kept]
        found.points[index, :count] = (points[kept] - offset) / extent
    return found


def suppress(boxes: Array, classes: Array, *, overlap_max: float, boxes_max: int) -> list[int]:
    """Which boxes stay: best first, each drops those of its class that overlap it by more than `overlap_max`.

    Args:
        boxes: top, left, bottom, right, [boxes, 4], the best score first.
        classes: [boxes].
        overlap_max: intersection over union.
        boxes_max: how many stay at most.
    """
    sizes = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    areas = sizes.prod(axis=1)
    alive = np.ones(len(boxes), bool)
    kept: list[int] = []
    for index in range(len(boxes)):
        if not alive[index]:
            continue
        kept.append(index)
        if len(kept) == boxes_max:
            break
        low, high = np.maximum(boxes[index, :2], boxes[:, :2]), np.minimum(boxes[index, 2:], boxes[:, 2:])
        shared = np.maximum(high - low, 0).prod(axis=1)
        union = areas[index] + areas - shared
        alive &= ~((shared > overlap_max * union) & (classes == classes[index]))
    return kept


def _best_classes(step: DetectBoxes, raw: Array) -> tuple[Array, Array]:
    """Score and number of the best class of every anchor, background left out."""
    raw = raw[:, step.first_class :].astype(np.float32)
    best = raw.argmax(axis=-1)
    scores = np.take_along_axis(raw, best[:, None], axis=-1)[:, 0]
    if step.sigmoid:
        scores = 1 / (1 + np.exp(-np.clip(scores, -_LOGIT_MAX, _LOGIT_MAX)))
    return scores, (best + step.first_class).astype(np.int32)


def _decode(step: DetectBoxes, anchors: Array, raw: Array) -> tuple[Array, Array]:
    """Corners (top, left, bottom, right) and points (y, x) in shares of the model's input."""
    if step.order == "xywh":
        raw = np.concatenate([raw[:, [1, 0, 3, 2]], raw[:, 4:]], axis=1)
    scales = np.asarray(step.scales, np.float32)
    centres = raw[:, :2] / scales[:2] * anchors[:, 2:] + anchors[:, :2]
    sizes = raw[:, 2:4] / scales[2:]
    if step.size_is_log:
        sizes = np.exp(np.clip(sizes, -_LOG_SIZE_MAX, _LOG_SIZE_MAX))
    halves = sizes * anchors[:, 2:] / 2
    points = raw[:, 4 : 4 + 2 * step.points].reshape(len(raw), step.points, 2)[:, :, ::-1]
    points = points / scales[:2] * anchors[:, None, 2:] + anchors[:, None, :2]
    return np.concatenate([centres - halves, centres + halves], axis=1), points
