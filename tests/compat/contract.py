"""The models that a server under test must hold; README.md says the same in words."""

from __future__ import annotations

from tests.compat.tensors import DATATYPES, Tensor, make

IDENTITY = {datatype: f"identity_{datatype.lower()}" for datatype in DATATYPES}
"""x [-1, -1] -> y = x, one model for each datatype."""
ADD = "add"
"""a, b FP32 [-1, 4] -> sum, difference FP32 [-1, 4]. A server that can batch should batch it."""
SLOW = "slow"
"""x FP32 [-1, 4] -> y = x, after 20 ms to 1 s of work, one request at a time."""
SEQUENCE = "sequence"
"""One input INT8 [1, 3, 40], hidden state: the answer depends on what its sequence has sent before."""

A = make("FP32", (2, 4), [1, 2, 3, 4, 5, 6, 7, 8])
B = make("FP32", (2, 4), [0.5, 0.25, 0, -1, 8, 4, 2, 1])
SUM = make("FP32", (2, 4), [1.5, 2.25, 3, 3, 13, 10, 9, 9])
DIFFERENCE = make("FP32", (2, 4), [0.5, 1.75, 3, 5, -3, 2, 5, 7])
ONE_ROW = make("FP32", (1, 4), [1, 2, 3, 4])


def add_inputs() -> dict[str, Tensor]:
    """Two rows for `add`."""
    return {"a": A, "b": B}
