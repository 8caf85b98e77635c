"""Whether an answer is certain enough to be the last word (`Manifest.cascade`)."""

from __future__ import annotations

import numpy as np

from nearcast.handler import Tensors
from nearcast.store.manifest import Cascade


def is_uncertain(cascade: Cascade, outputs: Tensors) -> bool:
    """Whether the largest value of any row of the cascade's output lies in [low, high), or is no number.

    Args:
        cascade: of the version that answered.
        outputs: all that it gave. Rows lie along the first axis; an output of one axis is a single row.
    """
    scores = outputs[cascade.output]
    if scores.ndim < 2:
        scores = scores.reshape(1, -1)
    elif scores.ndim > 2:
        scores = scores.reshape(scores.shape[0], -1)
    if not scores.size:
        return False
    top = scores.max(axis=1)
    if cascade.softmax:
        # The largest probability of a softmax is 1 / sum(exp(x - max)).
        with np.errstate(invalid="ignore"):
            top = 1.0 / np.exp(scores.astype(np.float64) - top[:, None]).sum(axis=1)
    return not bool(np.all((top < cascade.low) | (top >= cascade.high)))
