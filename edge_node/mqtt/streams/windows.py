"""From messages of any length to windows of one length. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Cut:
    """`windows` [count, window], and the `rest` that the next message continues."""

    windows: Samples
    rest: Samples


def first_rest(window: int, hop: int, dtype: np.dtype[Any]) -> Samples:
    """What stands before the first sample: zeros where windows overlap."""
    return np.zeros(window - hop, dtype)


def cut(rest: Samples, samples: Samples, *, window: int, hop: int) -> Cut:
    """Cut the windows that are complete now.

    The windows are the same however the samples were divided into messages: window i covers the samples from
    `i * hop` to `i * hop + window` of the rest that the stream began with and all samples since.

    Args:
        rest: 1-D, of the previous cut or `first_rest`; shorter than `window`.
        samples: 1-D, of the same type.
        window: length in samples.
        hop: samples from one window to the next, 0 < hop <= window.
    """
    joined = np.concatenate((rest, samples))
    count = max(0, (len(joined) - window) // hop + 1)
    if not count:
        return Cut(np.empty((0, window), joined.dtype), joined)
    windows = np.lib.stride_tricks.sliding_window_view(joined, window)[: (count - 1) * hop + 1 : hop]
    return Cut(windows, joined[count * hop :].copy())
