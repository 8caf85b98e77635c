"""Batched answers are the unbatched ones: bit for bit, in the order of the requests, for every shape, type and axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from nearcast.serving.engines import load_engine
from nearcast.serving.joining import join, split
from nearcast.serving.signature import Signature
from nearcast.store.contents import Contents
from nearcast.wire.tensors import DATATYPES, dtype_of, to_raw
from tests.tiny_models import affine_model, recurrent_model, tensor, write_version

DTYPES = tuple(dtype_of(datatype) for datatype in DATATYPES)


class FakeEngine:
    """Row by row: each output row is a function of the same input row, whatever the axes are."""

    def __init__(self, axes: dict[str, int], out_axis: int) -> None:
        self.axes, self.out_axis = axes, out_axis

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        moved = np.moveaxis(inputs["x"], self.axes["x"], 0)
        return {"same": inputs["x"], "moved": np.moveaxis(moved[..., None], 0, self.out_axis)}


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, list[np.ndarray]]:
    inner = draw(st.lists(st.integers(0, 3), max_size=2))
    axis = draw(st.integers(0, len(inner)))
    dtype = draw(st.sampled_from(DTYPES))
    parts = []
    for rows in draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)):
        shape = (*inner[:axis], rows, *inner[axis:])
        if dtype.hasobject:
            array = np.empty(shape, dtype=object)
            for at in np.ndindex(*shape):
                array[at] = draw(st.binary(max_size=3))
        elif dtype.kind == "V":
            array = draw(npst.arrays(np.dtype("<u2"), shape)).view(dtype)
        else:
            array = draw(npst.arrays(dtype, shape))
        parts.append(array)
    return axis, parts


@settings(max_examples=150, deadline=None)
@given(requests(), st.integers(0, 1))
def test_joining_and_splitting_is_the_identity(drawn: tuple[int, list[np.ndarray]], out_axis: int) -> None:
    axis, parts = drawn
    engine = FakeEngine({"x": axis}, out_axis)
    inputs = [{"x": part} for part in parts]
    alone = [engine.run(each) for each in inputs]
    rows = [part.shape[axis] for part in parts]
    together = split(engine.run(join(inputs, {"x": axis})), rows, {"same": axis, "moved": out_axis})
    for want, got in zip(alone, together, strict=True):
        assert want.keys() == got.keys()
        for name in want:
            assert got[name].shape == want[name].shape
            assert got[name].dtype == want[name].dtype
            assert got[name].flags.c_contiguous
            assert to_raw(np.ascontiguousarray(want[name])) == to_raw(got[name]), "bit for bit, NaN too"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Signature]]:
    root: Path = tmp_path_factory.mktemp("models")
    affine = write_version(root / "affine", affine_model())
    recurrent = write_version(
        root / "recurrent",
        recurrent_model(),
        inputs=(tensor("x", "FP32", (-1, 3)), tensor("state", "FP32", (2, -1, 3), 1)),
        outputs=(tensor("y", "FP32", (-1, 3)), tensor("state_out", "FP32", (2, -1, 3), 1)),
    )
    return {
        "affine": (load_engine(Contents(affine, root / "affine")), Signature(affine)),
        "recurrent": (load_engine(Contents(recurrent, root / "recurrent")), Signature(recurrent)),
    }


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["affine", "recurrent"]),
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_a_real_engine_gives_each_request_its_own_rows(
    engines: dict[str, tuple[Any, Signature]], model: str, rows: list[int], seed: int
) -> None:
    engine, signature = engines[model]
    assert signature.batchable
    random = np.random.default_rng(seed)
    requests: list[dict[str, Any]] = []
    for count in rows:
        if model == "affine":
            requests.append({"x": random.standard_normal((count, 4), dtype=np.float32)})
        else:
            state = random.standard_normal((2, count, 3), dtype=np.float32)
            requests.append({"x": random.standard_normal((count, 3), dtype=np.float32), "state": state})
        signature.require(requests[-1])
        assert signature.rows(requests[-1]) == count
    assert len({signature.key(request) for request in requests}) == 1
    alone = [engine.run(request) for request in requests]
    together = split(engine.run(join(requests, signature.input_axes)), rows, signature.output_axes)
    for want, got in zip(alone, together, strict=True):
        for name in want:
            np.testing.assert_array_equal(want[name], got[name])
