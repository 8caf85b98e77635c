"""Triton's classification extension: the largest elements of an output as text, `value:index[:label]`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.wire.tensors import Array, datatype_of

ELEMENTS_MAX = 1 << 16
"""Of an output that is ranked: it happens on the loop, where a larger one would hold everybody up."""


def classify(name: str, array: Array, count: int, labels: Sequence[str], *, by_row: bool) -> Array:
    """The `count` largest elements of an output, the largest first; of equal ones the first comes first.

    Args:
        name: of the output, for the error.
        array: numbers of any shape.
        count: how many; fewer where there are no more.
        labels: text by index; an element without one shows its index alone.
        by_row: rank every row of the first axis by itself, else all elements together.

    Returns:
        BYTES of shape [rows, count], or [count] unless `by_row`.

    Raises:
        MeshError: INVALID_REQUEST for an output of text, TOO_LARGE for more than `ELEMENTS_MAX` elements.
    """
    if array.dtype.kind not in "biufV" or datatype_of(array.dtype) == "BYTES":
        raise MeshError(Code.INVALID_REQUEST, f"Output '{name}' holds no numbers and has no classes.")
    if array.size > ELEMENTS_MAX:
        raise MeshError(
            Code.TOO_LARGE,
            f"Output '{name}' has {array.size} elements; at most {ELEMENTS_MAX} can be ranked for classes.",
        )
    rows = array.reshape(array.shape[0], prod(array.shape[1:])) if by_row else array.reshape(1, array.size)
    keys = rows.astype(np.float32) if rows.dtype.kind == "V" else rows
    if keys.dtype.kind == "f":
        keys = np.where(np.isnan(keys), -np.inf, keys)
    last = rows.shape[1] - 1
    ranked = last - np.argsort(keys[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :count]
    out = np.empty(ranked.shape, dtype=object)
    for place, index in np.ndenumerate(ranked):
        out[place] = _text(rows[place[0], index], int(index), labels)
    return out if by_row else out[0]


def _text(value: np.generic, index: int, labels: Sequence[str]) -> bytes:
    number = f"{float(value):f}" if value.dtype.kind in "fV" else str(int(value))
    label = f":{labels[index]}" if index < len(labels) else ""
    return f"{number}:{index}{label}".encode()
