"""Many requests as one: tensors joined along their batch axes, and the answers taken apart again, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors


def join(parts: Sequence[Tensors], axes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
    """One set of inputs from several of equal names, types and shapes but for the batch axis.

    Args:
        parts: the inputs of each request.
        axes: batch axis per tensor name; what has none must be equal in all parts.

    Raises:
        ValueError: if the parts do not fit together.
    """
    joined = dict(parts[0])
    if len(parts) == 1:
        return joined
    for name, first in parts[0].items():
        if name in axes:
            joined[name] = np.concatenate(list(map(itemgetter(name), parts)), axis=axes[name])
        elif any(part[name].tobytes() != first.tobytes() for part in parts):
            raise ValueError(f"the parts differ in {name}, which has no batch axis")
    return joined


def split(outputs: Tensors, rows: Sequence[int], axes: Mapping[str, int]) -> list[dict[str, npt.NDArray[Any]]]:
    """What each request gets: `rows[i]` rows of every output, in the order of the requests, contiguous in memory.

    Raises:
        MeshError: INTERNAL if an output has not one row for each row that went in.
    """
    total = sum(rows)
    spans = [slice(stop - count, stop) for stop, count in zip(accumulate(rows), rows, strict=True)]
    columns = []
    for name, tensor in outputs.items():
        axis = axes[name]
        if tensor.ndim <= axis or tensor.shape[axis] != total:
            raise MeshError(
                Code.INTERNAL,
                f"Output {name} has shape {list(tensor.shape)} for {total} rows along axis {axis}; "
                "the manifest declares a batch axis that the model does not keep.",
            )
        before = (slice(None),) * axis
        where: Sequence[Any] = [(*before, span) for span in spans] if axis else spans
        columns.append(map(np.ascontiguousarray, map(tensor.__getitem__, where)))
    return [dict(zip(outputs, part, strict=True)) for part in zip(*columns, strict=True)]
