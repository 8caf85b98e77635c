"""Brackets that are taken away unread mean what they mean to a reader of JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearcast.errors import Code, MeshError
from nearcast.transport.json_elements import NESTED_TEXTS_MAX, flatten, read_elements

SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=4)
LEAVES = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.booleans())


def read_or_none(text, shape, datatype="FP32"):
    try:
        return read_elements("x", datatype, text.encode(), shape)
    except MeshError:
        return None


def built(value, shape):
    """The same by building all of it."""
    try:
        elements = flatten("x", value, shape)
    except MeshError:
        return None
    return elements if all(isinstance(each, (bool, int, float)) for each in elements) else None


@given(st.data(), SHAPES, st.sampled_from([None, 1, "\t "]))
def test_data_nested_as_the_shape_says_is_read(data, shape, indent):
    count = int(np.prod(shape))
    elements = data.draw(st.lists(LEAVES, min_size=count, max_size=count))
    value = np.array(elements, dtype=object).reshape(shape).tolist()
    assert read_or_none(json.dumps(value, indent=indent), shape) == elements
    assert read_or_none(json.dumps(elements), shape) == elements


@given(
    st.recursive(st.one_of(LEAVES, st.none(), st.text("[],x", max_size=3)), lambda inner: st.lists(inner, max_size=3)),
    SHAPES,
)
def test_any_other_data_is_read_alike_or_refused_alike(value, shape):
    if isinstance(value, list):
        found, expected = read_or_none(json.dumps(value), shape), built(value, shape)
        count = int(np.prod(shape))  # whoever calls compares it
        assert (found if found and len(found) == count else None) == (
            expected if expected and len(expected) == count else None
        )


@given(SHAPES, st.data())
def test_texts_may_hold_brackets(shape, data):
    count = int(np.prod(shape))
    texts = data.draw(st.lists(st.text('[]{},\\"é'), min_size=count, max_size=count))
    value = np.array([*texts, None], dtype=object)[:-1].reshape(shape).tolist()
    for given_data in (value, texts):
        assert read_or_none(json.dumps(given_data), shape, "BYTES") == texts


@pytest.mark.parametrize("element", [b"[]", b"{}", b"[1]", b'{"":0}'])
def test_a_million_brackets_are_no_objects(element):
    data = b"[" + b",".join([element] * 200_000) + b"]"
    for datatype, shape in (("FP32", [200_000]), ("FP32", [2, 0, 10**9]), ("BYTES", [NESTED_TEXTS_MAX])):
        with pytest.raises(MeshError) as raised:
            read_elements("x", datatype, data, shape)
        assert raised.value.code in (Code.INVALID_REQUEST, Code.TOO_LARGE)
    assert read_elements("x", "FP32", b"[[],[]]", [2, 0, 10**9]) == []


@pytest.mark.parametrize("text", ["[[1],[]]", "[[],[null]]", "[[{}],[]]", '[[],["x"]]'])
def test_an_element_where_the_shape_has_none_is_refused(text):
    assert read_or_none("[ [ ],\n[]]", [2, 0]) == []
    assert read_or_none(text, [2, 0]) is None
