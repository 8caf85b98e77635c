"""The elements of a tensor out of JSON, without an object for each of its brackets.

Data may be nested as the shape says. Built as it stands, 2 MiB of empty arrays are 700 000 objects and a quarter of a
second for the loop. So the brackets of numbers are compared with those that the shape makes, and taken away. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from nearcast.errors import Code, MeshError

NESTED_TEXTS_MAX = 65_536
"""Arrays in the data of a tensor of texts, where brackets may be text as well."""
_BRACKETS = b"[]"
_NO_STRUCTURE = bytes(set(range(256)) - set(b"[],"))
_numbers = msgspec.json.Decoder(list[bool | int | float])
_texts = msgspec.json.Decoder(list[str])


def read_elements(name: str, datatype: str, data: bytes, shape: Sequence[int]) -> list[Any]:
    """Elements of flat data, or of data nested exactly as the shape says; texts for BYTES, else numbers. Whether there
    are as many as the shape has is left to the caller.

    Raises:
        MeshError: INVALID_REQUEST if it is neither; TOO_LARGE for texts in too many arrays.
    """
    if not data.startswith(b"["):
        raise MeshError(Code.INVALID_REQUEST, f"The data of tensor '{name}' must be an array.")
    if datatype == "BYTES":
        return _read_texts(name, data, shape)
    if data.find(b"[", 1) > 0:
        data = _take_brackets(name, data, shape)
    try:
        return _numbers.decode(data)
    except msgspec.DecodeError as error:
        raise MeshError(Code.INVALID_REQUEST, f"Tensor '{name}' holds a value that {datatype} cannot hold.") from error


def flatten(name: str, data: list[Any], shape: Sequence[int]) -> list[Any]:
    """Elements of flat data, or of data nested exactly as the shape says.

    Raises:
        MeshError: INVALID_REQUEST if it is neither.
    """
    if not data or not isinstance(data[0], list):
        return data
    level = [data]
    for size in shape:
        if not all(isinstance(node, list) and len(node) == size for node in level):
            raise _misfit(name, shape)
        level = [child for node in level for child in node]
    return level


def _read_texts(name: str, data: bytes, shape: Sequence[int]) -> list[Any]:
    try:
        return _texts.decode(data)
    except msgspec.ValidationError:  # nested, or something else
        if data.count(b"[") + data.count(b"{") > NESTED_TEXTS_MAX:
            reason = f"Tensor '{name}' has more than {NESTED_TEXTS_MAX} arrays; write its data as a flat one."
            raise MeshError(Code.TOO_LARGE, reason) from None
    elements = flatten(name, msgspec.json.decode(data), shape)
    if not all(isinstance(element, str) for element in elements):
        raise MeshError(Code.INVALID_REQUEST, f"The elements of BYTES tensor '{name}' must be strings.")
    return elements


def _take_brackets(name: str, data: bytes, shape: Sequence[int]) -> bytes:
    brackets = data.translate(None, _NO_STRUCTURE)
    outer = shape[: shape.index(0) + 1] if 0 in shape else shape  # what an empty array would hold may be of any size
    if len(brackets) != _nesting_size(outer) or brackets != _nesting(outer):
        raise _misfit(name, shape)
    if 0 not in shape:
        return b"[" + data.translate(None, _BRACKETS) + b"]"
    if data.translate(None, b"[],").strip():  # an element where the shape has none
        raise _misfit(name, shape)
    return b"[]"


def _nesting_size(shape: Sequence[int]) -> int:
    size = 0
    for axis in reversed(shape):
        size = 2 + axis * size + max(0, axis - 1)
    return size


def _nesting(shape: Sequence[int]) -> bytes:
    """Brackets and commas of data that is nested so."""
    text = b""
    for axis in reversed(shape):
        text = b"[" + b",".join([text] * axis) + b"]"
    return text


def _misfit(name: str, shape: Sequence[int]) -> MeshError:
    return MeshError(Code.INVALID_REQUEST, f"The nesting of tensor '{name}' does not fit its shape {list(shape)}.")
