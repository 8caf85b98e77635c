"""The classification extension ranks by value then place, in rows or all together, and only what it can rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from nearcast.errors import Code, MeshError
from nearcast.transport.classification import ELEMENTS_MAX, classify
from nearcast.transport.outputs import Form, read_form, read_place

NUMBERS = st.sampled_from(["<f4", "<f8", "<i8", "u1", "?"]).flatmap(
    lambda kind: (
        arrays(kind, array_shapes(min_dims=1, max_dims=3, max_side=6), elements={"allow_nan": False})
        if "f" in kind
        else arrays(kind, array_shapes(min_dims=1, max_dims=3, max_side=6))
    )
)


@given(NUMBERS, st.integers(1, 8), st.booleans())
def test_the_first_classes_are_those_of_a_plain_sort(array, count, by_row):
    found = classify("y", array, count, (), by_row=by_row)
    rows = array.reshape(array.shape[0], -1).tolist() if by_row else [array.reshape(-1).tolist()]
    for row, top in zip(rows, found if by_row else [found], strict=True):
        expected = sorted(range(len(row)), key=lambda index: (-row[index], index))[:count]
        assert [int(text.split(b":")[1]) for text in top] == expected


def test_labels_numbers_and_what_is_no_number():
    array = np.float32([0.5, np.nan, 2])
    assert classify("y", array, 9, ("a", "b"), by_row=False).tolist() == [b"2.000000:2", b"0.500000:0:a", b"nan:1:b"]
    assert classify("y", np.int8([3, -7]), 2, ("grün",), by_row=False).tolist() == ["3:0:grün".encode(), b"-7:1"]
    assert classify("y", np.zeros((0, 3)), 2, (), by_row=True).shape == (0, 2)
    assert classify("y", np.zeros((2, 0)), 2, (), by_row=True).shape == (2, 0)


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.array([b"text"], dtype=object), Code.INVALID_REQUEST),
        (np.array(["text"]), Code.INVALID_REQUEST),
        (np.zeros(ELEMENTS_MAX + 1, np.uint8), Code.TOO_LARGE),
    ],
)
def test_what_has_no_classes(array, code):
    with pytest.raises(MeshError) as caught:
        classify("y", array, 1, (), by_row=False)
    assert caught.value.code is code


@pytest.mark.parametrize(
    "parameters",
    [
        {"classification": 0},
        {"classification": -1},
        {"classification": True},
        {"classification": "3"},
        {"classification": 1.0},
        {"classification": 2**63},
        {"classification": 3, "shared_memory_region": "r", "shared_memory_byte_size": 8},
        {"shared_memory_region": "r"},
        {"shared_memory_region": 7, "shared_memory_byte_size": 8},
        {"shared_memory_region": "r", "shared_memory_byte_size": -8},
        {"shared_memory_region": "r", "shared_memory_byte_size": True},
        {"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": -1},
        {"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": "0"},
    ],
)
def test_malformed_parameters_of_outputs(parameters):
    with pytest.raises(MeshError) as caught:
        read_form("y", parameters)
    assert caught.value.code is Code.INVALID_REQUEST


def test_other_parameters_change_nothing():
    assert read_place("x", {"binary_data_size": 4}) is None
    assert read_form("y", {"binary_data": True}) == Form()
