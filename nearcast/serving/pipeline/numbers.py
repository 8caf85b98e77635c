"""Numbers on their way into and out of a model: normalise, softmax, the highest k. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nearcast.store.steps import Normalise

Array: TypeAlias = npt.NDArray[Any]


def normalise(step: Normalise, pixels: Array) -> Array:
    """(x - mean) * scale over the last axis, in 32-bit floats."""
    mean, scale = np.asarray(step.mean, np.float32), np.asarray(step.scale, np.float32)
    values = pixels.astype(np.float32)
    values -= mean
    values *= scale
    return values.astype(np.float16) if step.datatype == "FP16" else values


def softmax(logits: Array) -> Array:
    """Shares that sum to 1 along the last axis; the maximum is taken off first, so nothing overflows."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return shares


def top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """The k highest along the last axis and where they stand (INT32), the highest first; of equals the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(scores, order, axis=-1), order.astype(np.int32)


def name_classes(classes: Array, labels: Sequence[str], used: Array | None = None) -> Array:
    """The labels of class numbers, as BYTES of the same shape; b"" where there is none, or where `used` is false."""
    names = np.array([*(label.encode() for label in labels), b""], dtype=object)
    known = (classes >= 0) & (classes < len(labels))
    if used is not None:
        known &= used
    found: Array = names[np.where(known, classes, len(labels))]
    return found
